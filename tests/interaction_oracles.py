"""Interactions of latents by differentiating dense functions, slowly, to test against.

The functions go through the modules of a Hugging Face model and through dictionaries as a whole;
nothing here knows which latents are active, or how a norm or an attention is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dictionary_oracles import random_dictionary
from torch import Tensor, nn

from circuitlab.dictionaries import Dictionary

Function = Callable[[Tensor], Tensor]


def pair_of_dictionaries(kind: str, d: int, n: int = 12, **options: Any) -> list[Dictionary]:
    """A source and a target dictionary of one kind."""
    return [random_dictionary(kind, d_in=d, n=n, seed=s, **options) for s in (1, 2)]


def gpt2_mlp(module: nn.Module, layer: int) -> Function:
    """What the MLP of a GPT-2 writes, from the stream that its norm reads, ``[..., d]``."""
    block: Any = module.get_submodule(f"transformer.h.{layer}")
    return lambda x: block.mlp(block.ln_2(x))


def gpt2_block(module: nn.Module, layer: int) -> Function:
    """The stream after a block of a GPT-2 of one prompt without padding, ``[pos, d]``."""
    block: Any = module.get_submodule(f"transformer.h.{layer}")
    n_heads = block.attn.num_heads

    def whole(x: Tensor) -> Tensor:
        n, d = x.shape
        parts = block.attn.c_attn(block.ln_1(x)).split(d, -1)
        q, k, v = (part.view(n, n_heads, -1).transpose(0, 1) for part in parts)
        scores = q @ k.transpose(1, 2) / (d // n_heads) ** 0.5
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        z = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        after = x + block.attn.c_proj(z.transpose(0, 1).reshape(n, d))
        written: Tensor = after + block.mlp(block.ln_2(after))
        return written

    return whole


def dense_attributions(
    function: Function, source: Dictionary, target: Dictionary, x: Tensor, *, at_input: bool
) -> tuple[Tensor, Tensor]:
    """``J_ij z_j`` of all latents by reverse-mode differentiation.

    Args:
        function: From what the source dictionary reads to what the target dictionary reads.
        source: Dictionary.
        target: Dictionary.
        x: ``[..., d]``, all of which may act on all.
        at_input: Differentiate at ``x``, not at its reconstruction.

    Returns:
        ``[..., n_target, ..., n_source]``; and the target latents there.
    """
    z = source.encode(x).detach()
    missed = x - source.decode(z) if at_input else torch.zeros_like(x)

    def latents(z: Tensor) -> Tensor:
        return target.encode(function(source.decode(z) + missed))

    jacobian: Any = torch.func.jacrev(latents)(z)
    return jacobian * z, latents(z)


def scattered(values: Tensor, index: Tensor, n: int) -> Tensor:
    """``[..., k]`` at the places ``index`` ``[..., k]`` of ``[..., n]``, added up; 0 elsewhere."""
    return torch.zeros(*values.shape[:-1], n, dtype=values.dtype).scatter_add(-1, index, values)
