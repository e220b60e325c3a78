"""Norms: what those of a block give, and what passes through their Jacobians.

With n what a norm gives but for its gain, its mean taken off where it does so, and s its scale, its
Jacobian but for the gain is ``(1 - n n^T / d) / s``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from circuitlab import Site, TracedModel


@dataclass(frozen=True, slots=True)
class StreamNorm:
    """The part of a norm that is not linear: its mean and its scale.

    Attributes:
        centred: Whether the mean is taken off.
        scaled: Whether the stream is divided by its size.
        epsilon: What is added to the mean square.
    """

    centred: bool
    scaled: bool
    epsilon: float

    @classmethod
    def read(cls, model: TracedModel, site: Site) -> StreamNorm:
        """That of the norm that reads a site.

        Raises:
            ModelError: it is none that can be folded.
        """
        norm = model.weights.norm_at(site)
        return cls(norm.centred, norm.scaled, norm.epsilon)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised stream ``[..., d]``, its gain left out, and its scale ``[..., 1]``."""
        if not self.scaled:
            return x, torch.ones_like(x[..., :1])
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        return x / scale, scale

    def along(self, normal: Tensor, directions: Tensor) -> Tensor:
        """How much directions ``[..., k, d]`` point along streams ``[..., d]``, ``[..., k]``.

        ``n . direction / d``: the share of a direction that the norm takes out again.
        """
        if not self.scaled:
            return torch.zeros_like(directions[..., 0])
        return (directions @ normal[..., None])[..., 0] / normal.shape[-1]

    def pull_back(self, normal: Tensor, scale: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at streams, from that at what the norm gives; ``[..., k, d]`` both."""
        taken = self.along(normal, gradient)[..., None] * normal[..., None, :]
        return (gradient - taken) / scale[..., None, :]


@dataclass(frozen=True, eq=False, slots=True)
class Normed:
    """What a norm behind a projection makes of some rows, in groups that are normed each alone.

    Attributes:
        normal: Without the gain, ``[..., groups, width]``.
        scale: ``[..., groups, 1]``.
        given: With the gain, ``[..., groups * width]``.
    """

    normal: Tensor
    scale: Tensor
    given: Tensor

    def picked(self, pick: Callable[[Tensor], Tensor]) -> Normed:
        """The same of some of the rows."""
        return Normed(pick(self.normal), pick(self.scale), pick(self.given))


class NormBehind:
    """An RMSNorm behind a projection, of heads each alone or of all numbers; or none.

    Attributes:
        there: Whether there is one.
        gain: ``[width]``; ones where there is none.

    Raises:
        ModelError: the norm is of another kind.
    """

    def __init__(self, model: TracedModel, site: Site, dtype: torch.dtype) -> None:
        norm = model.weights.norm_at(site)
        self.there, self.epsilon = norm.scaled, norm.epsilon
        gain = norm.gain.to(device=model.device, dtype=dtype)
        if site.kind in ("q", "k") and len(gain) > model.d_head:
            # Each key stands once for every head that reads it: their mean square is the same.
            heads = gain.view(-1, model.d_head)
            gain = heads.repeat_interleave(model.n_heads // len(heads), 0).flatten()
        self.gain = gain

    def __call__(self, x: Tensor) -> Normed:
        """The norm of rows ``[..., groups * width]``."""
        groups = self._grouped(x)
        if not self.there:
            return Normed(groups, torch.ones_like(groups[..., :1]), x)
        scale = (groups.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        normal = groups / scale
        return Normed(normal, scale, (normal * self.gain).flatten(-2))

    def push(self, state: Normed, change: Tensor) -> Tensor:
        """How far what is given moves with the rows, ``[..., k, groups * width]`` both."""
        if not self.there:
            return change
        groups = self._grouped(change)
        return (self._through(state, groups) * self.gain).flatten(-2)

    def pull_back(self, state: Normed, gradient: Tensor) -> Tensor:
        """The gradient at the rows, from that at what is given, ``[..., k, groups * width]``."""
        if not self.there:
            return gradient
        groups = self._grouped(gradient)
        return self._through(state, groups * self.gain).flatten(-2)

    def _grouped(self, x: Tensor) -> Tensor:
        """``[..., groups, width]`` of ``[..., groups * width]``."""
        return x.reshape(*x.shape[:-1], -1, len(self.gain))

    def _through(self, state: Normed, x: Tensor) -> Tensor:
        """The Jacobian but for the gain, which is symmetric, times ``[..., k, groups, width]``."""
        normal = state.normal[..., None, :, :]
        along = (x * normal).mean(-1, keepdim=True)
        return (x - along * normal) / state.scale[..., None, :, :]
