"""What stands between pre-activations and latents, with the gradients that training needs."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(pre: Tensor, k: int) -> Tensor:
    """The ``k`` largest along the last axis where they are above 0, else 0; same shape."""
    values, indices = pre.topk(k, -1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``pre`` where it exceeds the threshold, taken as 0 at least; else 0.

    Gradient in ``pre``: 1 above the threshold, else 0. In the threshold, within ``bandwidth / 2``
    of it: ``-threshold / bandwidth`` (Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 11 with a
    rectangular kernel).

    Args:
        pre: ``[..., n]``.
        threshold: ``[n]``.
        bandwidth: Width of the window.
    """
    threshold = threshold.relu()
    jumped = torch.where(pre > threshold, pre, 0.0)
    return jumped - _through(pre, threshold, threshold / bandwidth, bandwidth)


def step_sum(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """How many exceed their threshold, ``[...]``; arguments as for :func:`jump_relu`.

    Gradient in the threshold, within ``bandwidth / 2`` of it: ``-1 / bandwidth`` (Rajamanoharan et
    al. 2024, arXiv:2407.14435, eq. 12); in ``pre``: none.
    """
    threshold = threshold.relu()
    above = (pre > threshold).to(pre.dtype)
    slope = torch.full_like(threshold, 1 / bandwidth)
    return (above - _through(pre, threshold, slope, bandwidth)).sum(-1)


def gated(pre: Tensor, gate_bias: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """``max((pre - gate_bias) * exp(scale) + bias, 0)`` where ``pre > 0``, else 0."""
    magnitude = (pre - gate_bias) * scale.exp() + bias
    return torch.where(pre > 0, magnitude.relu(), 0.0)


def _through(pre: Tensor, threshold: Tensor, slope: Tensor, bandwidth: float) -> Tensor | float:
    """0 with the gradient ``slope`` in the threshold, within the window."""
    if not threshold.requires_grad:
        return 0.0
    inside = (pre - threshold).abs() < bandwidth / 2
    return torch.where(inside, slope, 0.0).detach() * (threshold - threshold.detach())
