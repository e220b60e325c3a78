"""Paths: points between two activations, or away from one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from circuitlab import OptionError

#: Below this angle, in radians, a spherical path is a straight one.
STRAIGHT = 1e-4
#: Ends this close to opposite, in radians, have no shortest arc between them.
OPPOSITE = 1e-3

#: From the ends ``[..., d]`` and the places t ``[n]`` or ``[..., n]`` to points ``[..., n, d]``.
Path = Callable[[Tensor, Tensor, Tensor], Tensor]


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points of the straight line from ``a`` (t = 0) to ``b`` (t = 1), both ends exact.

    Args:
        a: Starts, ``[..., d]``.
        b: Ends, ``[..., d]``.
        t: Places, ``[n]`` or ``[..., n]``; any real numbers.

    Returns:
        ``[..., n, d]``.
    """
    places = t.to(a)[..., None]
    return (1 - places) * a[..., None, :] + places * b[..., None, :]


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points whose direction turns evenly from ``a`` to ``b`` while the norm changes linearly.

    Both ends are exact and obtuse angles are turned through. Below 1e-4 radians the line is
    straight. The path of Shinkle and Heimersheim (2025), whose code takes the angle of the absolute
    cosine: there an obtuse pair's path leaves the arc.

    Args:
        a: Starts, ``[..., d]``.
        b: Ends, ``[..., d]``.
        t: Places, ``[n]`` or ``[..., n]``, between 0 and 1.

    Returns:
        ``[..., n, d]``.

    Raises:
        OptionError: an end is zero, or two ends are opposite to within 1e-3 radians.
    """
    sizes = [end.double().norm(dim=-1, keepdim=True) for end in (a, b)]
    for size in sizes:
        _refuse(size[..., 0] == 0, "one end is zero and has no direction; use the path lerp")
    units = [end.double() / size for end, size in zip((a, b), sizes, strict=True)]
    # Exact at small and at large angles, where the arc cosine is not.
    angle = 2 * torch.atan2((units[0] - units[1]).norm(dim=-1), (units[0] + units[1]).norm(dim=-1))
    _refuse(
        angle > math.pi - OPPOSITE,
        "the ends point in opposite directions and no arc between them is the shortest; "
        "use the path lerp, or other pairs",
    )
    places, angle = t.to(sizes[0]), angle[..., None]
    norm = (1 - places) * sizes[0] + places * sizes[1]
    shares = [
        (norm / size * torch.sin(part * angle) / torch.sin(angle)).to(a)[..., None]
        for size, part in zip(sizes, (1 - places, places), strict=True)
    ]
    points = shares[0] * a[..., None, :] + shares[1] * b[..., None, :]
    return torch.where(angle[..., None] < STRAIGHT, lerp(a, b, t), points)


def ray(a: Tensor, u: Tensor, alpha: Tensor) -> Tensor:
    """Points ``a + alpha u``, ``[..., n, d]``.

    Args:
        a: Starts, ``[..., d]``.
        u: Directions, ``[..., d]``; their length counts.
        alpha: How far, ``[n]`` or ``[..., n]``, in lengths of ``u``.
    """
    return a[..., None, :] + alpha.to(a)[..., None] * u[..., None, :]


def plane(a: Tensor, b: Tensor, c: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Points ``A + alpha (B - A) + beta (C - P)``, P the nearest point to C on the line AB.

    The slice of Janiak et al. (2024, arXiv:2409.17113): its two axes are perpendicular.

    Args:
        a: Corner at (0, 0), ``[..., d]``.
        b: Corner at (1, 0), ``[..., d]``.
        c: Third point, at beta = 1, ``[..., d]``.
        alpha: First coordinates, ``[n]`` or ``[..., n]``.
        beta: Second coordinates of the same points, ``[n]`` or ``[..., n]``.

    Returns:
        ``[..., n, d]``.

    Raises:
        OptionError: A and B are the same point.
    """
    side = b - a
    square = side.square().sum(-1, keepdim=True)
    _refuse(square[..., 0] == 0, "the first two corners are one point; take another prompt")
    foot = a + ((c - a) * side).sum(-1, keepdim=True) / square * side
    return ray(a, side, alpha) + beta.to(a)[..., None] * (c - foot)[..., None, :]


#: Paths between two activations, by name; ``embed`` is a straight one through ``resid_pre.0``.
PATHS: dict[str, Path] = {"lerp": lerp, "slerp": slerp, "embed": lerp}


def _refuse(bad: Tensor, fact: str) -> None:
    """Refuse the first row that is bad."""
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise OptionError(f"pair {row + 1}: {fact}")
