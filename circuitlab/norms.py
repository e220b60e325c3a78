"""Gradients of head projections carried back through the norm that feeds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Readers:
    """Heads that read one residual stream through a norm and a projection of their own.

    Attributes:
        norm: Maps each position on its own.
        weight: The projections, ``[readers, d_model, d_head]``.
        at_shift: What the projections give where the norm gives its bias alone,
            ``[readers, d_head]``.
    """

    norm: nn.Module
    weight: Tensor
    at_shift: Tensor


def pull_back(readers: Readers, streams: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
    """The gradient at the stream of each reader's own reading of it, mean over runs.

    The norm is differentiated, not frozen: its scale depends on the stream. LayerNorm has a closed
    form that costs one product for all runs; any other norm goes through autograd.

    Args:
        readers: Who reads.
        streams: What the norm reads, ``[runs, tokens, d_model]``.
        values: What the projections gave, ``[runs, readers, tokens, d_head]``.
        gradients: Gradient there, same shape.

    Returns:
        ``[readers, tokens, d_model]``.
    """
    back = readers.weight.transpose(-1, -2)
    norm = readers.norm
    if isinstance(norm, nn.Identity):
        return gradients.mean(0) @ back
    if type(norm) is nn.LayerNorm and norm.normalized_shape == streams.shape[-1:]:
        return _layer_norm(readers, norm, streams, values, gradients)
    total = torch.zeros(len(back), *streams.shape[1:], dtype=streams.dtype, device=streams.device)
    for stream, gradient in zip(streams, gradients, strict=True):
        with torch.enable_grad():
            at = stream.detach().expand(total.shape).clone().requires_grad_(True)
            total += torch.autograd.grad(norm(at), at, gradient @ back)[0]
    return total / len(streams)


def _layer_norm(
    readers: Readers, norm: nn.LayerNorm, streams: Tensor, values: Tensor, gradients: Tensor
) -> Tensor:
    """LayerNorm's closed form, for all runs at once.

    With ``n`` the normalised stream, ``s`` its scale and ``G = g (weight W)^T`` centred, one run
    gives ``s (G - n mean(n G))``. The first term is linear in ``g``, so runs are summed before
    the product. In the second, ``n . G = g . (n weight W)``, and that is the projection's own
    value less what it gives at the shift: nothing of size d_model is made per reader and run.
    """
    n_runs, _, d_model = streams.shape
    variance, mean = torch.var_mean(streams, -1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + norm.eps)
    normal = (streams - mean) * scale
    weight = readers.weight
    if norm.weight is not None:
        weight = weight * norm.weight.detach().to(weight.dtype)[:, None]
    weight = weight - weight.mean(1, keepdim=True)
    scaled = gradients * (scale / n_runs)[:, None]
    along = (scaled * (values - readers.at_shift[:, None])).sum(-1) / d_model
    result = scaled.sum(0) @ weight.transpose(-1, -2)
    # [tokens, readers, runs] @ [tokens, runs, d_model], laid out by token
    result -= torch.bmm(along.permute(2, 1, 0), normal.transpose(0, 1)).transpose(0, 1)
    return result
