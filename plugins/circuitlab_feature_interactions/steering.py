"""Steering: the weight of a sparsity term, moved until as many latents are active as wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of a step in the smoothed error.
_SMOOTH = 0.1
#: How fast the logarithm of the weight moves for each unit of error: by the step, and, for a short
#: training, by the whole of it; and how much of the error is in the weight at once.
_GAIN, _WHOLE, _AT_ONCE = 0.01, 5.0, 3.0
#: Error, in either direction, beyond which the weight moves no faster; and how far the logarithm of
#: the weight may move in all.
_MOST_ERROR, _MOST = 1.0, 7.0


@dataclass(eq=False)
class Steering:
    """The weight of one dictionary's sparsity term.

    The error is the logarithm of active latents over wanted ones, smoothed over steps. The weight
    is ``start`` times the exponential of the error's integral, plus ``start`` times a multiple of
    the error, so that it comes to rest where the error is 0. Nothing is drawn at random.

    Attributes:
        start: The weight at the beginning.
        wanted: Active latents per token that are aimed at; None: the weight stays.
        steps: Of the training.
        least: The weight is never below it. Thresholds that have become too high come down only
            if a term draws them, so theirs may be below 0.
        error: Smoothed.
        moved: The integral.
    """

    start: float
    wanted: int | None
    steps: int = 1000
    least: float = 0.0
    error: float = 0.0
    moved: float = 0.0

    @property
    def weight(self) -> float:
        """Of the sparsity term at the next step."""
        if self.wanted is None:
            return self.start
        return max(self.least, self.start * (math.exp(self.moved) + _AT_ONCE * self.error))

    def note(self, l0: float) -> None:
        """Move towards what is wanted after a step with so many active latents per token."""
        if self.wanted is None:
            return
        # Where nothing is active the error is large, not infinite.
        error = math.log(max(l0, 0.1) / self.wanted)
        self.error += _SMOOTH * (min(max(error, -_MOST_ERROR), _MOST_ERROR) - self.error)
        gain = max(_GAIN, _WHOLE / self.steps)
        self.moved = min(max(self.moved + gain * self.error, -_MOST), _MOST)

    def state(self) -> Tensor:
        """What changes, float64 ``[2]``."""
        return torch.tensor([self.error, self.moved], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what :meth:`state` gave."""
        self.error, self.moved = state.tolist()
