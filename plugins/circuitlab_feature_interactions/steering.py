"""Steering: the weight of a sparsity term, moved until as many latents are active as wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of a step in the smoothed error.
_SMOOTH = 0.1
#: How fast the logarithm of the weight moves for each unit of error; and what it has of it at once.
_GAIN, _AT_ONCE = 0.01, 0.5
#: Error, in either direction, beyond which the weight moves no faster; and how far the logarithm of
#: the weight may move in all.
_MOST_ERROR, _MOST = 1.0, 7.0


@dataclass(eq=False)
class Steering:
    """The weight of one dictionary's sparsity term.

    The error is the logarithm of active latents over wanted ones, smoothed over steps. The
    logarithm of the weight is its integral plus a share of it, so that the weight comes to rest
    where the error is 0. Nothing is drawn at random.

    Attributes:
        start: The weight at the beginning.
        wanted: Active latents per token that are aimed at; None: the weight stays.
        error: Smoothed.
        moved: Logarithm of the weight over ``start``, without the share of the error.
    """

    start: float
    wanted: int | None
    error: float = 0.0
    moved: float = 0.0

    @property
    def weight(self) -> float:
        """Of the sparsity term at the next step."""
        if self.wanted is None:
            return self.start
        return self.start * math.exp(self.moved + _AT_ONCE * self.error)

    def note(self, l0: float) -> None:
        """Move towards what is wanted after a step with so many active latents per token."""
        if self.wanted is None:
            return
        # Few of a batch's tokens may have any: still a number.
        error = math.log(max(l0, 0.1) / self.wanted)
        self.error += _SMOOTH * (min(max(error, -_MOST_ERROR), _MOST_ERROR) - self.error)
        self.moved = min(max(self.moved + _GAIN * self.error, -_MOST), _MOST)

    def state(self) -> Tensor:
        """What changes, float64 ``[2]``."""
        return torch.tensor([self.error, self.moved], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what :meth:`state` gave."""
        self.error, self.moved = state.tolist()
