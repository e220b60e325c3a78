"""Responses: how far an output has gone from one end of a walk to the other, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm

from circuitlab import NumericsError, OptionError

#: Ends whose distance is this many roundings of their size, or less, are one point.
ROUNDINGS = 100


def apart(values: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Whether both ends of each walk differ by more than rounding, ``[n_rows]`` bool.

    Args:
        values: ``[n_rows, n_steps, width]``; its first and last steps are the ends.
        a: Other starts, ``[n_rows, width]``.
        b: Other ends, ``[n_rows, width]``.
    """
    start, end = _ends(values, a, b)
    rounding = torch.finfo(values.dtype).eps * torch.maximum(_lengths(start), _lengths(end))
    return _lengths(start - end) > ROUNDINGS * rounding


def d_rel(values: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Distance from the start over that between the ends, ``[n_rows, n_steps]``, float64.

    0 at the start, 1 at the end, and above 1 where the output is further off than the end (Janiak
    et al. 2024, arXiv:2409.17113).

    Args:
        values: ``[n_rows, n_steps, width]``; its first and last steps are the ends.
        a: Other starts, ``[n_rows, width]``.
        b: Other ends, ``[n_rows, width]``.

    Raises:
        NumericsError: both ends of a walk are one point to rounding (see :func:`apart`).
    """
    start, end = _checked_ends(values, a, b)
    return _distances(values, start) / _lengths(start - end)[:, None]


def d_sym(values: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Distance from the start over the sum of those from both ends, ``[n_rows, n_steps]``, float64.

    Between 0 and 1; swapping the ends gives 1 minus it (Shinkle and Heimersheim 2025).

    Args:
        values: ``[n_rows, n_steps, width]``; its first and last steps are the ends.
        a: Other starts, ``[n_rows, width]``.
        b: Other ends, ``[n_rows, width]``.

    Raises:
        NumericsError: both ends of a walk are one point to rounding (see :func:`apart`).
    """
    start, end = _checked_ends(values, a, b)
    from_start, from_end = _distances(values, start), _distances(values, end)
    return from_start / (from_start + from_end)


def kl(logits: Tensor, base: Tensor | None = None) -> Tensor:
    """Divergence KL(P_base || P_step) in nats, ``[n_rows, n_steps]``, float64, at least 0.

    Args:
        logits: ``[n_rows, n_steps, vocab]``, centred or not.
        base: ``[n_rows, vocab]``; the first step where None.
    """
    return _divergences(logits, base, _divergence)


def jsd(logits: Tensor, base: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence in nats, ``[n_rows, n_steps]``, float64, between 0 and ln 2.

    Args:
        logits: ``[n_rows, n_steps, vocab]``, centred or not.
        base: ``[n_rows, vocab]``; the first step where None.
    """

    def both(first: Tensor, other: Tensor) -> Tensor:
        middle = torch.logaddexp(first, other) - math.log(2)
        return (_divergence(first, middle) + _divergence(other, middle)) / 2

    return _divergences(logits, base, both)


def intervals(t: Tensor, n_rows: int, n_steps: int) -> Tensor:
    """Lengths of the intervals between steps, ``[n_rows, n_steps - 1]``, float64.

    Args:
        t: Places, ``[n_steps]`` or ``[n_rows, n_steps]``.
        n_rows: Number of walks.
        n_steps: Steps of each, at least 2.

    Raises:
        OptionError: t has another shape, or does not rise everywhere.
    """
    if t.shape not in ((n_steps,), (n_rows, n_steps)) or n_steps < 2:
        raise OptionError(
            f"places t have shape {list(t.shape)} beside {n_rows} walks of {n_steps} steps; give "
            f"one for each of at least 2 steps"
        )
    lengths = t.double().diff(dim=-1).expand(n_rows, -1)
    if not bool((lengths > 0).all()):
        raise OptionError("places t do not rise at every step; sort them and leave repeats out")
    return lengths


def speed(t: Tensor, values: Tensor) -> Tensor:
    """How fast the output moves in each interval, ``[n_rows, n_steps - 1]``, float64.

    The length of the change over the interval, divided by the interval: the derivative's length at
    its middle, to second order.

    Args:
        t: Places, ``[n_steps]`` or ``[n_rows, n_steps]``, rising.
        values: ``[n_rows, n_steps, width]``.

    Raises:
        OptionError: t does not rise everywhere.
    """
    lengths = intervals(t, *values.shape[:2])
    return _lengths(values[:, 1:] - values[:, :-1]) / lengths


#: Responses by name, each from ``[n_rows, n_steps, width]`` to ``[n_rows, n_steps]``. ``kl`` and
#: ``jsd`` take logits; the others take logits, best centred, or any site.
RESPONSES: dict[str, Callable[[Tensor], Tensor]] = {
    "d-rel": d_rel,
    "d-sym": d_sym,
    "kl": kl,
    "jsd": jsd,
}


def _ends(values: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Start and end of each walk, ``[n_rows, width]``."""
    start, end = values[:, 0] if a is None else a, values[:, -1] if b is None else b
    return start.to(values), end.to(values)


def _checked_ends(values: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Start and end of each walk, which differ."""
    same = ~apart(values, a, b)
    if same.any():
        raise NumericsError(
            f"walk {int(same.nonzero()[0]) + 1} of {len(same)}: both ends answer alike, to "
            f"rounding, so no distance between them can be a unit; leave this pair out"
        )
    return _ends(values, a, b)


def _distances(values: Tensor, point: Tensor) -> Tensor:
    """From each step to one point of its walk, ``[n_rows, n_steps]``, float64."""
    return _lengths(values - point[:, None])


def _lengths(vectors: Tensor) -> Tensor:
    """Euclidean, over the last axis, float64."""
    lengths: Tensor = vector_norm(vectors, dim=-1)
    return lengths.double()


def _divergences(
    logits: Tensor, base: Tensor | None, divergence: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A divergence of the base's log-probabilities and every step's, walk by walk."""
    first = logits[:, 0] if base is None else base.to(logits)
    together = zip(first, logits, strict=True)  # in float64 all at once would be too many
    rows = [
        divergence(start.double().log_softmax(-1), steps.double().log_softmax(-1))
        for start, steps in together
    ]
    return torch.stack(rows).clamp(min=0)


def _divergence(first: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities, summed over the last axis."""
    return (first.exp() * (first - other)).sum(-1)
