"""Gradients carried back through a norm, for many readers of one stream at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pull_back(norm: nn.Module, stream: Tensor, gradient: Tensor) -> Tensor:
    """Vector-Jacobian products of ``norm`` at ``stream``, one per reader.

    The norm is differentiated, not frozen: its scale depends on the stream. LayerNorm has its
    closed form; any other norm goes through autograd.

    Args:
        norm: A module that maps each position on its own.
        stream: What the norm reads, ``[tokens, d_model]``.
        gradient: Gradient at the norm's output, ``[readers, tokens, d_model]``, contiguous.

    Returns:
        Gradient at the norm's input, ``[readers, tokens, d_model]``.
    """
    if isinstance(norm, nn.Identity):
        return gradient
    if type(norm) is nn.LayerNorm and norm.normalized_shape == stream.shape[-1:]:
        return _layer_norm(norm, stream, gradient)
    with torch.enable_grad():
        at = stream.detach().expand(gradient.shape).clone().requires_grad_(True)
        (result,) = torch.autograd.grad(norm(at), at, gradient)
    return result


def _layer_norm(norm: nn.LayerNorm, stream: Tensor, gradient: Tensor) -> Tensor:
    """The closed form, in PyTorch's own fused kernel: every reader sees a copy of the stream."""
    readers, tokens, width = gradient.shape
    variance, mean = torch.var_mean(stream, -1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + norm.eps)
    weight = None if norm.weight is None else norm.weight.detach().to(gradient.dtype)
    result: Tensor = torch.ops.aten.native_layer_norm_backward(
        gradient.view(readers * tokens, width),
        stream.repeat(readers, 1),
        [width],
        mean.repeat(readers, 1),
        scale.repeat(readers, 1),
        weight,
        None,
        [True, False, False],
    )[0]
    return result.view(gradient.shape)
