"""Summaries: how sharp a curve is, where, and how many boundaries it crosses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from circuitlab import NumericsError, OptionError
from circuitlab_activation_plateaus.walks.responses import intervals

#: Levels of a curve between which its width is measured, and the one of its location.
LEVELS = (0.1, 0.5, 0.9)
#: Share of the whole change that a peak's own must be.
PROMINENT = 0.1
#: Numbers that one table of steps times steps may hold, over rows.
SQUARES = 2**21


@dataclass(frozen=True, eq=False)
class Summary:
    """Numbers of one curve per row, ``[n_rows]`` each, float64; curves rescaled from 0 to 1.

    Closed forms: a line has width 0.8, slope 1 and participation 1; a logistic curve of slope k has
    width 2 ln 9 / k, maximal slope k / 4 and participation 6 / k.

    Attributes:
        width: Path between the levels 0.1 and 0.9 of the isotonic fit, in units of t.
        max_slope: Steepest rise of the curve itself, per t.
        location: Where the isotonic fit is one half.
        participation: (∫v)² / (T ∫v²) of the speed v, T the length in t: 1 where it is even, near 0
            at a step.
        boundaries: Peaks of the speed (see :func:`peaks`), int64.
        flat_start: Share of the path before the fit passes 0.1; 0.1 for a line.
        flat_end: Share of it after the fit passes 0.9; 0.1 for a line.
        deviation: Largest distance between the curve and its isotonic fit; above 0.1 the output
            goes forth and back.
    """

    width: Tensor
    max_slope: Tensor
    location: Tensor
    participation: Tensor
    boundaries: Tensor
    flat_start: Tensor
    flat_end: Tensor
    deviation: Tensor


def summarise(t: Tensor, d: Tensor, speed: Tensor | None = None) -> Summary:
    """Summaries of curves; steps need not be even.

    Args:
        t: Places, ``[n_steps]`` or ``[n_rows, n_steps]``, rising.
        d: Any response, ``[n_rows, n_steps]``, higher at its last step than at its first.
        speed: Speed of what responds, ``[n_rows, n_steps - 1]``; that of ``d`` where None.

    Raises:
        OptionError: t does not rise everywhere, or shapes do not go together.
        NumericsError: a curve ends no higher than it begins, or a speed is 0 all along.
    """
    lengths = intervals(t, *d.shape)
    total = lengths.sum(1)
    curve = _rescaled(d)
    rise = curve.diff(dim=1) / lengths
    pace = _checked_speed(rise.abs() if speed is None else speed, lengths)
    fit = isotonic(t, curve)
    places = t.double().expand(d.shape)
    low, middle, high = (_crossing(places, fit, level) for level in LEVELS)
    return Summary(
        width=high - low,
        max_slope=rise.amax(1),
        location=middle,
        participation=(pace * lengths).sum(1).square() / (total * (pace**2 * lengths).sum(1)),
        boundaries=peaks(t, pace).sum(1),
        flat_start=(low - places[:, 0]) / total,
        flat_end=(places[:, -1] - high) / total,
        deviation=(curve - fit).abs().amax(1),
    )


def excess(out: Summary, inside: Summary) -> Tensor:
    """How many times steeper the output is than the path itself, ``[n_rows]``.

    Args:
        out: Summary of the response at the output.
        inside: Summary of the same distance at the site of injection.
    """
    return out.max_slope / inside.max_slope


def isotonic(t: Tensor, d: Tensor) -> Tensor:
    """The rising curve nearest to each ``d``, ``[n_rows, n_steps]``, float64.

    Least squares, each step weighted by its share of the path: at every step the largest, over
    where a stretch begins, of the smallest, over where it ends, of its means (Robertson et al.
    1988).

    Args:
        t: Places, ``[n_steps]`` or ``[n_rows, n_steps]``, rising.
        d: ``[n_rows, n_steps]``.

    Raises:
        OptionError: t does not rise everywhere, or shapes do not go together.
    """
    halves = intervals(t, *d.shape) / 2
    weights = pad(halves, (0, 1)) + pad(halves, (1, 0))
    return torch.cat([_fitted(*rows) for rows in _groups(weights, d.double())])


def peaks(t: Tensor, speed: Tensor) -> Tensor:
    """Which intervals are boundaries: peaks of the speed, ``[n_rows, n_steps - 1]`` bool.

    A peak's base is the higher of the lowest speeds on its two sides, as far as nothing is faster.
    It counts where the speed above its base, summed over the stretch around it that is above the
    base, is at least 10 % of the whole change: so noise, a constant speed and a speed that only
    rises or only falls have none. Peaks lie within the path.

    Args:
        t: Places, ``[n_steps]`` or ``[n_rows, n_steps]``, rising.
        speed: ``[n_rows, n_steps - 1]``.

    Raises:
        OptionError: t does not rise everywhere, or shapes do not go together.
    """
    lengths = intervals(t, len(speed), speed.shape[1] + 1)
    pace = speed.double()
    changes = torch.cat([_prominent_changes(*rows) for rows in _groups(lengths, pace)])
    return changes >= PROMINENT * (pace * lengths).sum(1, keepdim=True)


def _rescaled(d: Tensor) -> Tensor:
    """Curves from 0 at their first step to 1 at their last, float64."""
    curve = d.double()
    rise = curve[:, -1:] - curve[:, :1]
    flat = ~(rise[:, 0] > 0)
    if flat.any():
        raise NumericsError(
            f"curve {int(flat.nonzero()[0]) + 1} of {len(flat)} ends no higher than it begins, so "
            f"it has no levels to pass; leave this pair out"
        )
    return (curve - curve[:, :1]) / rise


def _checked_speed(speed: Tensor, lengths: Tensor) -> Tensor:
    if speed.shape != lengths.shape:
        raise OptionError(
            f"speeds have shape {list(speed.shape)}; give one for each interval between steps, "
            f"{list(lengths.shape)}"
        )
    pace = speed.double()
    still = ~((pace > 0).any(1) & pace.isfinite().all(1))
    if still.any():
        raise NumericsError(
            f"the speed of walk {int(still.nonzero()[0]) + 1} of {len(still)} is 0 all along, or "
            f"not finite; leave this pair out"
        )
    return pace


def _crossing(t: Tensor, fit: Tensor, level: float) -> Tensor:
    """Where a rising curve passes a level, ``[n_rows]``; the middle of a stretch on the level."""
    places = []
    for below in (fit < level, fit <= level):
        after = below.sum(1, keepdim=True)
        (t0, t1), (f0, f1) = (
            (x.gather(1, after - 1)[:, 0], x.gather(1, after)[:, 0]) for x in (t, fit)
        )
        places.append(t0 + (level - f0) / (f1 - f0) * (t1 - t0))
    return (places[0] + places[1]) / 2


def _groups(*tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of ``[n_rows, n]`` tables, as many at a time as a square for each may take."""
    size = max(1, SQUARES // tables[0].shape[1] ** 2)
    for first in range(0, len(tables[0]), size):
        yield tuple(table[first : first + size] for table in tables)


def _fitted(weights: Tensor, d: Tensor) -> Tensor:
    sums, totals = (pad(x.cumsum(1), (1, 0)) for x in (weights * d, weights))
    # [row, i, k]: the mean over a stretch from step i to step k; 0 / 0 where it ends before it
    # begins, which the largest leaves out.
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / (totals[:, None, 1:] - totals[:, :-1, None])
    smallest = means.flip(2).cummin(2).values.flip(2)
    return smallest.masked_fill(~_upper(d), -math.inf).amax(1)


def _prominent_changes(lengths: Tensor, speed: Tensor) -> Tensor:
    """Change above its base around each interval, ``[n_rows, n]``; 0 where it is no peak."""
    here, there = speed[:, :, None], speed[:, None]
    # Of equal peaks the first looks past the second, but not the second past the first.
    right = _reached(there <= here)
    left = _reached(((there < here) | _diagonal(speed)).flip(1, 2)).flip(1, 2)
    lowest = [there.expand_as(side).masked_fill(~side, math.inf).amin(2) for side in (left, right)]
    base = torch.maximum(*lowest)[:, :, None]
    above = there > base
    around = _reached(above) | _reached(above.flip(1, 2)).flip(1, 2)
    return ((there - base) * lengths[:, None] * around).sum(2)


def _reached(passable: Tensor) -> Tensor:
    """From i, the j at or after it with all between passable, ``[n_rows, i, j]`` bool."""
    upper = _upper(passable)
    return (passable | ~upper).to(torch.uint8).cummin(2).values.bool() & upper


def _upper(like: Tensor) -> Tensor:
    """Whether j is at or after i, ``[i, j]`` bool, for tables of rows of length j."""
    n = like.shape[-1]
    return torch.ones(n, n, dtype=torch.bool, device=like.device).triu()


def _diagonal(like: Tensor) -> Tensor:
    """Whether j is i, ``[i, j]`` bool."""
    return torch.eye(like.shape[-1], dtype=torch.bool, device=like.device)
