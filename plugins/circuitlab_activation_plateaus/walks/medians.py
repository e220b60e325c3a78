"""Medians over pairs, with bootstrap intervals: percentile, 95 %, seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from circuitlab import Interval, NumericsError, OptionError

RESAMPLES = 2000
#: Share of resamples beyond either end of an interval.
OUTSIDE = 0.025


def median_interval(values: Tensor, seed: int = 0) -> Interval | None:
    """95 % interval of the median over pairs; None for a single pair.

    Args:
        values: One number per pair, ``[n]``; infinite where it lies beyond what was measured.
        seed: Of the resamples.

    Raises:
        NumericsError: a value is NaN, or there is none.
    """
    if not len(values) or bool(values.isnan().any()):
        fact = "hold NaN" if len(values) else "are none"
        raise NumericsError(f"the values whose median is asked for {fact}; leave it out")
    if len(values) < 2:
        return None
    return _interval(_resampled(values, _draws(len(values), _generator(seed))))


def difference_of_medians(
    a: Tensor, b: Tensor, seed: int = 0, *, paired: bool = False
) -> tuple[float, Interval | None]:
    """median(a) - median(b), and its 95 % interval; None for a single pair.

    Args:
        a: One number per pair, ``[n]``.
        b: The same, ``[m]``.
        seed: Of the resamples.
        paired: Whether both are measured on the same pairs; then a resample draws the same pairs
            for both.

    Raises:
        OptionError: paired values differ in number.
        NumericsError: a value is not finite, or there is none.
    """
    for values in (a, b):
        if not len(values) or not bool(values.isfinite().all()):
            fact = "are not all finite" if len(values) else "are none"
            raise NumericsError(f"the values whose medians are compared {fact}; leave it out")
    if paired and len(a) != len(b):
        raise OptionError(f"{len(a)} values are paired with {len(b)}; give one of each for a pair")
    difference = float(_median(a.double()) - _median(b.double()))
    if len(a) < 2 or len(b) < 2:
        return difference, None
    generator = _generator(seed)
    draws = _draws(len(a), generator)
    others = draws if paired else _draws(len(b), generator)
    return difference, _interval(_resampled(a, draws) - _resampled(b, others))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draws(n: int, generator: torch.Generator) -> Tensor:
    """Which values each resample draws, ``[resamples, n]``."""
    return torch.randint(n, (RESAMPLES, n), generator=generator)


def _resampled(values: Tensor, draws: Tensor) -> Tensor:
    """The median of each resample, float64."""
    return _median(values.double().cpu()[draws])


def _median(values: Tensor) -> Tensor:
    """Median over the last axis; the mean of the two in the middle where their number is even."""
    ordered, n = values.sort(dim=-1).values, values.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def _interval(medians: Tensor) -> Interval:
    """The middle 95 % of resamples, without arithmetic between them: some may be infinite."""
    ordered, cut = medians.sort().values, round(OUTSIDE * len(medians))
    return float(ordered[cut]), float(ordered[-1 - cut])
