"""Attention scores split over what the earlier components wrote, on the query's and the key's side.

A residual stream is a sum, and with the norm's scale σ frozen at each token a score is bilinear in
it (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits):

    s_ij = scale · Σ_ab q_a,i R_i R_j^T k_b,j,    q_a,i = x_a,i / σ_i @ W_Q

with the biases as further parts. The sum over all parts is the head's own score, exactly. Where
queries and keys are normed, the scales of these norms are frozen too. A soft cap is no sum: scores
here are before it, see :func:`circuitlab_attention_heads.margins.split_margin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import Site

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Run, TracedModel

#: Parts that no component writes. The first is what the output biases of earlier attentions put
#: into the stream; the second the head's own b_Q or b_K, with the shift of its norm.
BIASES = ("attention-bias", "bias")
#: Parts of ``input`` in a model with learned positions.
INPUTS = ("token", "position")


@dataclass(frozen=True)
class ScoreParts:
    """What each part of the stream gives the heads of a layer to compare, for one query a prompt.

    The score of a key is the product of the sum of ``queries`` and the sum of that key's ``keys``.

    Attributes:
        names: The parts: the sources before the layer, ``input`` as :data:`INPUTS` where the model
            has learned positions, and then :data:`BIASES`.
        queries: ``[n_parts, batch, n_heads, d_head]``, rotated and times the layer's scale.
        keys: ``[n_parts, batch, pos, n_heads, d_head]``, rotated. Without meaning where padded.
        softcap: ``c`` of the cap ``c tanh(score / c)`` of the model's scores; 0 for none.
    """

    names: tuple[str, ...]
    queries: Tensor
    keys: Tensor
    softcap: float = 0.0


@dataclass(frozen=True)
class StreamParts:
    """What the components wrote in one run: the same for all layers.

    Attributes:
        names: ``input``, or :data:`INPUTS`, and all other sources.
        outputs: ``[n_parts, batch, pos, d_model]``; 0 where padded.
    """

    names: tuple[str, ...]
    outputs: Tensor


def stream_parts(model: TracedModel, run: Run) -> StreamParts:
    """The parts of the residual stream of a run that read ``model.source_sites``."""
    outputs, names = model.source_outputs(run), model.wiring.sources
    if model.weights.positions() is None:
        return StreamParts(names, outputs)
    site = Site("embed")
    token = model.run(run.tokens, read=[site], logits="none")[site].to(outputs.dtype)
    token = token * run.mask[..., None]
    position = outputs[0] - token
    return StreamParts((*INPUTS, *names[1:]), torch.cat([token[None], position[None], outputs[1:]]))


@torch.no_grad()
def split_scores(
    model: TracedModel, run: Run, parts: StreamParts, layer: int, at: Tensor
) -> ScoreParts:
    """Split the scores of a layer's heads for one query of each prompt.

    Args:
        model: The model.
        run: A run that read ``resid_pre``, q and k of the layer.
        parts: Of the same run.
        layer: The layer.
        at: Column of each prompt's query, ``[batch]``.
    """
    dtype = parts.outputs.dtype
    folded = model.weights.folded(layer, dtype)
    biases = [model.weights.attention_bias(n).to(dtype) for n in range(layer)]
    constant = torch.stack([torch.zeros_like(parts.outputs[0, 0, 0]), *biases]).sum(0)
    n_parts = model.wiring.first_source(layer) + len(parts.names) - len(model.wiring.sources)
    rows = torch.arange(len(at), device=run.mask.device)
    stream = run[Site("resid_pre", layer)].to(dtype)
    # A padded token may hold anything, a stream of size 0 too.
    sigma = model.weights.norm_scale(layer, stream).where(run.mask[..., None], 1)

    def read(weight: Tensor, bias: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """``[n_parts + 2, ..., n_heads, d_head]`` of outputs ``[n_parts, ..., d_model]``."""
        joined = weight.transpose(0, 1).flatten(1)
        of_bias = (constant @ joined).expand(1, *scale.shape[:-1], -1)
        written = torch.cat([outputs @ joined, of_bias]) / scale
        own = bias.flatten().expand(1, *scale.shape[:-1], -1)
        return torch.cat([written, own]).view(-1, *scale.shape[:-1], *bias.shape)

    outputs = parts.outputs[:n_parts]
    queries = read(folded.q, folded.q_bias, outputs[:, rows, at], sigma[rows, at]) * folded.scale
    keys = read(folded.k, folded.k_bias, outputs, sigma)
    of_queries, of_keys = (_own_scale(model, run, Site(p, layer), dtype) for p in ("q", "k"))
    queries, keys = queries / of_queries[rows, at], keys / of_keys
    turns = _turns(model, run, layer, dtype)
    if turns is not None:
        queries = torch.einsum("nbhd,bde->nbhe", queries, turns[rows, at])
        keys = torch.einsum("nbphd,bpde->nbphe", keys, turns)
    names = (*parts.names[:n_parts], *BIASES)
    return ScoreParts(names, queries, keys, model.architecture.score_softcap)


def _own_scale(model: TracedModel, run: Run, site: Site, dtype: torch.dtype) -> Tensor:
    """What the norm of queries or keys divides by, ``[batch, pos, n_heads, 1]``."""
    scale = model.weights.scale_behind(site, run[site].to(dtype)).where(
        run.mask[..., None, None], 1
    )
    return scale.repeat_interleave(model.n_heads // scale.shape[2], 2)


def _turns(model: TracedModel, run: Run, layer: int, dtype: torch.dtype) -> Tensor | None:
    """How each token's query and key are rotated, ``[batch, pos, d_head, d_head]``, or None."""
    positions = run.tokens.position_ids
    count = torch.arange(int(positions.max()) + 1, device=positions.device)
    turns = model.weights.rotations(count, dtype, layer)
    return None if turns is None else turns[positions]
