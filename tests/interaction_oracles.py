"""Interactions of latents by differentiating dense functions, slowly, to test against.

The functions go through the modules of a Hugging Face model and through dictionaries as a whole;
nothing here knows which latents are active, or how a norm or an attention is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.attributions import Attributions
from circuitlab_feature_interactions.penalties import penalty
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


def gated_mlp(module: nn.Module, layer: int) -> Function:
    """What the MLP of a Llama, Qwen2 or Gemma writes, in float64 where their norm works in less."""
    block: Any = module.get_submodule(f"model.layers.{layer}")
    norm, mlp = block.post_attention_layernorm, block.mlp
    gemma = type(norm).__name__.startswith("Gemma")
    eps = norm.eps if gemma else norm.variance_epsilon
    gain = norm.weight.detach().double() + gemma
    gate, up, down = (
        part.weight.detach().double().T for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )

    def written(x: Tensor) -> Tensor:
        normed = gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        hidden: Tensor = mlp.act_fn(normed @ gate) * (normed @ up)
        return hidden @ down

    return written


def gpt2_attention(module: nn.Module, layer: int) -> Function:
    """What the attention of a GPT-2 writes in one prompt without padding, ``[pos, d]``."""
    block: Any = module.get_submodule(f"transformer.h.{layer}")
    n_heads = block.attn.num_heads

    def written(x: Tensor) -> Tensor:
        n, d = x.shape
        parts = block.attn.c_attn(block.ln_1(x)).split(d, -1)
        q, k, v = (part.view(n, n_heads, -1).transpose(0, 1) for part in parts)
        scores = q @ k.transpose(1, 2) / (d // n_heads) ** 0.5
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        z = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        out: Tensor = block.attn.c_proj(z.transpose(0, 1).reshape(n, d))
        return out

    return written


def gpt2_block(module: nn.Module, layer: int) -> Function:
    """The stream after a block of a GPT-2 of one prompt without padding, ``[pos, d]``."""
    attention, mlp = gpt2_attention(module, layer), gpt2_mlp(module, layer)

    def whole(x: Tensor) -> Tensor:
        after = x + attention(x)
        return after + mlp(after)

    return whole


def pair_of_transcoders(kind: str, d: int, n: int = 12, *, skip: bool = False) -> list[Dictionary]:
    """Transcoders of two MLPs, ``d`` numbers in and out."""
    found = []
    for seed in (1, 2):
        form = "skip" if skip else "transcoder"
        wide = random_dictionary(kind, form, d_in=d, n=n, seed=seed)
        parts = {
            name.lower(): getattr(wide, name) for name in ("W_e", "b_e", "W_d", "b_d", "W_skip")
        }
        for name in ("w_d", "b_d", "w_skip"):
            parts[name] = None if parts[name] is None else parts[name][..., :d]
        parts |= {name: getattr(wide, name) for name in ("k", "threshold", "r_mag", "b_mag")}
        found.append(Dictionary(**parts, transcoder=True, apply_b_dec_to_input=False))
    return found


def dense_transcoded(
    mlp: Function,
    between: Function,
    source: Dictionary,
    target: Dictionary,
    x: Tensor,
    *,
    at_input: bool,
) -> tuple[Tensor, Tensor]:
    """``J_ij z_j`` of all latents of two transcoders by reverse-mode differentiation.

    Args:
        mlp: From the stream that the source reads to what it stands for.
        between: From the stream with that added to the one that the target reads.
        source: Transcoder.
        target: Transcoder.
        x: The stream that the source reads, ``[pos, d]``, which goes on beside it.
        at_input: Differentiate at what the MLP writes, not at what the transcoder writes.

    Returns:
        ``[pos, n_target, pos, n_source]``; and the target latents there.
    """
    z = source.encode(x).detach()
    missed = mlp(x) - source.decode(z, x) if at_input else torch.zeros_like(x)

    def latents(z: Tensor) -> Tensor:
        return target.encode(between(x + source.decode(z, x) + missed))

    jacobian: Any = torch.func.jacrev(latents)(z)
    return jacobian * z, latents(z)


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


def dense_positions(found: Attributions, n_positions: int, values: Tensor | None = None) -> Tensor:
    """All pairs of places and latents, ``[n, n_target, pos, n_source + 1]``.

    Of the attributions' values, or of one of their parts, which are of the own position.
    """
    assert found.source_position is not None
    assert found.own is not None
    width = found.n_source + 1
    columns = found.source_position * width + found.source_index
    if values is None:
        values = found.values
    else:
        columns = columns.gather(1, found.own)
    index = columns[:, None].expand_as(values)
    wide = scattered(values, index, n_positions * width).transpose(1, 2)
    index = found.target_index[:, None].expand(-1, wide.shape[1], -1)
    dense = scattered(wide, index, found.n_target).transpose(1, 2)
    return dense.unflatten(-1, (n_positions, width))


@torch.no_grad()
def over_draws(
    route: Any,
    source: Dictionary,
    target: Dictionary,
    x: Tensor,
    kind: str,
    draws: dict[str, int],
) -> tuple[Tensor, float]:
    """A penalty at 300 draws, and without drawing."""
    scale = torch.linspace(0.5, 1.5, target.n, dtype=x.dtype)
    measure, generator = penalty(kind), torch.Generator().manual_seed(1)
    exact = measure(route.attributions(source, target, x), scale)
    drawn = [
        measure(route.attributions(source, target, x, generator=generator, **draws), scale)
        for _ in range(300)
    ]
    return torch.stack(drawn), float(exact)


def scattered(values: Tensor, index: Tensor, n: int) -> Tensor:
    """``[..., k]`` at the places ``index`` ``[..., k]`` of ``[..., n]``, added up; 0 elsewhere."""
    return torch.zeros(*values.shape[:-1], n, dtype=values.dtype).scatter_add(-1, index, values)


def assert_gradients(loss: Callable[[], Tensor], *dictionaries: Dictionary) -> None:
    """The gradient of a loss in every map and bias is that of finite differences."""
    loss().backward()  # type: ignore[no-untyped-call]  # torch's own
    generator = torch.Generator().manual_seed(0)
    for dictionary in dictionaries:
        for name in ("W_e", "b_e", "W_d", "b_d"):
            parameter = getattr(dictionary, name)
            step = 1e-6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            given = 0.0 if parameter.grad is None else float((parameter.grad * step).sum())
            with torch.no_grad():
                parameter += step
                above = float(loss())
                parameter -= 2 * step
                below = float(loss())
                parameter += step
            assert given == pytest.approx((above - below) / 2, rel=1e-5, abs=1e-12)
