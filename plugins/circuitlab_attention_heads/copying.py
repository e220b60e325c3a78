"""Copying: whether a head raises the tokens it attends to, from its weights alone.

The full OV circuit of a head, ``W_E W_OV W_U``, says which logits it raises when it attends to a
token. Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, look at the signs of
its eigenvalues: a head that copies has positive ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, track

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel

#: Tokens whose embeddings are taken at once.
_TOKENS = 8192
#: Eigenvalues that add up to no more than this share of what the factors' norms allow are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Copying:
    """How the heads of a model copy.

    Attributes:
        eigenvalues: Non-zero eigenvalues of the full OV circuit, ``[n_layers, n_heads, d_head]``,
            complex, on the CPU.
        scores: ``Σ λ / Σ |λ|``, ``[n_layers, n_heads]``, float64: 1 where all are positive and the
            head copies, -1 where all are negative and it suppresses. NaN for a head that reaches
            no logit.
    """

    eigenvalues: Tensor
    scores: Tensor


@torch.no_grad()
def copying(model: TracedModel) -> Copying:
    """Eigenvalues of every head's full OV circuit, norms folded, logits less their mean.

    Nothing of size ``vocab x vocab`` is made: ``W_E W_V W_O W_U`` and ``W_O W_U W_E W_V`` have the
    same non-zero eigenvalues, and the second is ``d_head x d_head``. Position embeddings, MLPs, and
    biases do not count.

    Raises:
        ModelError: a norm is neither a LayerNorm, an RMSNorm nor an identity.
    """
    dtype = torch.promote_types(model.dtype, torch.float32)
    through = _embedded_unembedding(model)
    eigenvalues, scores = [], []
    for layer in track(range(model.n_layers), "finding eigenvalues of OV circuits"):
        heads = model.weights.folded(layer, dtype)
        small = heads.o.double() @ through @ heads.v.double()
        # Small, not symmetric, and as quick on a CPU as anywhere.
        values = torch.linalg.eigvals(small.cpu())
        allowed = (heads.o.double().norm(dim=(1, 2)) * heads.v.double().norm(dim=(1, 2))).cpu()
        total = values.abs().sum(-1)
        there = total > _ROUNDING * allowed * float(through.norm())
        scores.append(torch.where(there, values.sum(-1).real / total, torch.nan))
        eigenvalues.append(values)
    return Copying(torch.stack(eigenvalues), torch.stack(scores))


def _embedded_unembedding(model: TracedModel) -> Tensor:
    """W_U W_E, ``[d_model, d_model]``, float64; W_U centred over the vocabulary."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    unembedding, _ = model.weights.unembedding(dtype)
    mean, embedding = unembedding.mean(1, keepdim=True), model.weights.embedding(dtype)
    total = torch.zeros(len(unembedding), len(unembedding), dtype=torch.float64, device=mean.device)
    for start in range(0, len(embedding), _TOKENS):
        part = slice(start, start + _TOKENS)
        total += (unembedding[:, part] - mean) @ embedding[part]
    return total


@torch.no_grad()
def copied_share(
    model: TracedModel,
    heads: Sequence[tuple[int, int]],
    *,
    top: int = 5,
    n_tokens: int = 256,
    seed: int = 0,
) -> Tensor:
    """Share of tokens that a head, attending to one, puts among its first choices.

    Wang et al. 2022 (arXiv:2211.00593) so tell name movers, on the names of their prompts.

    Args:
        model: Any traced model.
        heads: (layer, head) of each.
        top: A token is copied where fewer than this many others get as large a logit from
            ``W_E[t] W_OV W_U``.
        n_tokens: How many tokens are tried, drawn without replacement; all where there are fewer.
        seed: Of the draw.

    Returns:
        ``[len(heads)]``, float64, 0 to 1.

    Raises:
        OptionError: ``top`` or ``n_tokens`` is below 1.
    """
    if top < 1 or n_tokens < 1:
        raise OptionError(f"top {top} of {n_tokens} tokens: give 1 or more of each")
    dtype = torch.promote_types(model.dtype, torch.float32)
    embedding, (unembedding, _) = model.weights.embedding(dtype), model.weights.unembedding(dtype)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(embedding), generator=generator)[:n_tokens].to(model.device)
    shares = torch.zeros(len(heads), dtype=torch.float64)
    layers = sorted({layer for layer, _ in heads})
    for layer in track(layers, "trying what heads copy"):
        weights = model.weights.folded(layer, dtype)
        for row, head in ((row, h) for row, (own, h) in enumerate(heads) if own == layer):
            values = embedding[drawn] @ weights.v[head]
            above = _others_above(values, weights.o[head], unembedding, drawn)
            shares[row] = (above < top).double().mean().cpu()
    return shares


def _others_above(values: Tensor, output: Tensor, unembedding: Tensor, own: Tensor) -> Tensor:
    """How many tokens get at least the logit that each token itself gets, ``[n_tokens]``.

    Args:
        values: What the head carries of each token, ``[n_tokens, d_head]``.
        output: W_O, ``[d_head, d_model]``.
        unembedding: ``[d_model, vocab]``.
        own: The tokens, ``[n_tokens]``.
    """
    mine = ((values @ output) * unembedding[:, own].T).sum(-1, keepdim=True)
    above = torch.zeros_like(own)
    for start in range(0, unembedding.shape[1], _TOKENS):
        logits = values @ (output @ unembedding[:, start : start + _TOKENS])
        here = own[:, None] == torch.arange(start, start + logits.shape[1], device=own.device)
        above += ((logits >= mine) & ~here).sum(-1)
    return above
