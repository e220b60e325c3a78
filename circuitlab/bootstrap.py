"""Bootstrap intervals over prompt pairs, 95 %, seeded; resamples draw whole pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.prompts import EncodedTask

RESAMPLES = 2000
_ENDS = (0.025, 0.975)
#: Resamples that differ by no more than this share of the value are equal.
_ROUNDING = 1e-12

#: The ends of a 95 % interval.
Interval = tuple[float, float]


def distinct_rows(pairs: EncodedTask) -> list[int]:
    """First row of each different pair: a pair told twice is no second observation."""
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    for row in range(len(pairs)):
        parts = (pairs.clean, pairs.corrupt)
        key = tuple(tuple(part.ids[row][part.mask[row]].tolist()) for part in parts)
        first.setdefault(key, row)
    return list(first.values())


def mean_intervals(values: Tensor, seed: int = 0) -> list[Interval | None]:
    """Interval of the mean of each row of ``[n, n_pairs]``; None for a single pair."""
    n_pairs = values.shape[1]
    if n_pairs < 2:
        return [None] * len(values)
    means = _counts(n_pairs, seed) @ values.double().T / n_pairs
    low, high = torch.quantile(means, means.new_tensor(_ENDS), dim=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def ratio_interval(above: Tensor, below: Tensor, seed: int = 0) -> Interval | None:
    """Interval of mean(above) / mean(below) over the same pairs, ``[n_pairs]`` each.

    None for a single pair, and where a resample has nothing to divide by.
    """
    n_pairs = len(above)
    counts = _counts(n_pairs, seed)
    divisors = counts @ below.double()
    if n_pairs < 2 or not bool((divisors > 0).all()):
        return None
    low, high = torch.quantile(
        counts @ above.double() / divisors, torch.tensor(_ENDS, dtype=torch.float64)
    ).tolist()
    return low, high


def bca_mean(values: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """Bias-corrected and accelerated (BCa) interval of the mean of ``[n_pairs]``.

    Efron 1987 (doi:10.2307/2289144), with the acceleration of the jackknife. None for a single
    pair, and where all resamples give the same to rounding.
    """
    return bca_ratio(values, torch.ones_like(values), seed=seed, resamples=resamples)


def bca_ratio(
    above: Tensor, below: Tensor, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """BCa interval of mean(above) / mean(below) over the same pairs, ``[n_pairs]`` each.

    As :func:`bca_mean`; None too where pairs left out or drawn leave nothing to divide by.
    """
    n_pairs, above, below = len(above), above.double().cpu(), below.double().cpu()
    if n_pairs < 2:
        return None
    counts = _counts(n_pairs, seed, resamples)
    drawn = (counts @ above) / (counts @ below)
    value = above.sum() / below.sum()
    left_out = (above.sum() - above) / (below.sum() - below)
    if not bool(torch.isfinite(drawn).all() and torch.isfinite(left_out).all()):
        return None
    if float(drawn.max() - drawn.min()) <= _ROUNDING * float(value.abs()):
        return None
    off = left_out.mean() - left_out
    acceleration = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    # Ties count half; a value outside all resamples is as far out as they can tell.
    share = ((drawn < value).double().mean() + (drawn <= value).double().mean()) / 2
    bias = torch.special.ndtri(share.clamp(1 / (2 * resamples), 1 - 1 / (2 * resamples)))
    shifted = bias + torch.special.ndtri(drawn.new_tensor(_ENDS))
    ends = torch.special.ndtr(bias + shifted / (1 - acceleration * shifted))
    low, high = torch.quantile(drawn, ends).tolist()
    return low, high


def _counts(n_pairs: int, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """How often each resample drew each pair, ``[resamples, n_pairs]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n_pairs, (resamples, n_pairs), generator=generator)
    counts = torch.zeros(resamples, n_pairs, dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones_like(counts))
