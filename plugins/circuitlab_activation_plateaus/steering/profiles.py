"""Profiles: curves that rise and fall alike, found by k-means, k by the silhouette."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Most clusters tried.
MOST = 5
#: Without a silhouette above this there is no structure (Kaufman & Rousseeuw 1990).
LEAST_SILHOUETTE = 0.25
#: Curves whose range is below this share of the largest are flat.
FLAT = 0.01
#: Share of its ups and downs that a profile of a plain shape makes in the way of that shape.
PLAIN = 0.8
_STARTS, _ROUNDS = 10, 100


@dataclass(frozen=True)
class Clusters:
    """Curves in groups of one shape.

    Attributes:
        labels: Group of each curve, from 0, the largest change first; -1 for a flat curve.
        names: Shape of each group's mean: ``rising``, ``falling``, ``peaked``, which rises and then
            falls, ``dipped``, or ``mixed``.
        silhouette: Mean silhouette of the curves that are not flat, -1 to 1; None for one group.
    """

    labels: list[int]
    names: list[str]
    silhouette: float | None


def cluster(curves: Tensor, seed: int = 0) -> Clusters:
    """Group curves by shape: each is standardised, so that neither height nor size counts.

    The number of groups is the one with the largest mean silhouette (Rousseeuw 1987), or 1 where
    none exceeds :data:`LEAST_SILHOUETTE`.

    Args:
        curves: ``[n, n_x]``.
        seed: Of the starts of k-means.
    """
    curves = curves.double().cpu()
    ranges = curves.amax(-1) - curves.amin(-1)
    moving = (ranges > FLAT * ranges.max()).nonzero()[:, 0]
    if not len(moving):
        return Clusters([-1] * len(curves), [], None)
    points = standardised(curves[moving])
    best, score = torch.zeros(len(points), dtype=torch.long), None
    for k in range(2, min(MOST, len(points) - 1) + 1):
        labels = k_means(points, k, seed)
        found = silhouette(points, labels)
        if found > max(LEAST_SILHOUETTE, score or 0.0):
            best, score = labels, found
    groups = [(best == group).nonzero()[:, 0] for group in sorted(set(best.tolist()))]
    groups.sort(key=lambda rows: (-float(ranges[moving[rows]].max()), int(rows[0])))
    whole = torch.full((len(curves),), -1)
    for number, rows in enumerate(groups):
        whole[moving[rows]] = number
    names = [shape(points[rows].mean(0)) for rows in groups]
    return Clusters(whole.tolist(), names, score)


def standardised(curves: Tensor) -> Tensor:
    """Each of ``[n, n_x]`` with mean 0 and standard deviation 1; none may be constant."""
    centred = curves - curves.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt()


def k_means(points: Tensor, k: int, seed: int = 0) -> Tensor:
    """Group of each of ``[n, d]``: the best of ten runs of Lloyd's algorithm.

    They start from points drawn far apart (Arthur & Vassilvitskii 2007, k-means++). A group that
    loses all its points takes the point that is farthest from its own.
    """
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(_STARTS):
        labels, spread = _lloyd(points, _start(points, k, generator))
        if best is None or spread < best[0] * (1 - 1e-9):
            best = spread, labels
    assert best is not None
    return best[1]


def silhouette(points: Tensor, labels: Tensor) -> float:
    """Mean over points of (b - a) / max(a, b), Euclidean.

    a is the mean distance to the others of the own group, b to the nearest other group; a point
    alone in its group counts 0 (Rousseeuw 1987).
    """
    member = torch.stack([labels == group for group in sorted(set(labels.tolist()))], -1)
    member = member.to(points)
    sizes = member.sum(0)
    sums = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") @ member
    own = (sums * member).sum(-1) / (sizes - 1).clamp(min=1)[member.argmax(-1)]
    other = (sums / sizes).masked_fill(member.bool(), torch.inf).amin(-1)
    largest = torch.maximum(own, other)
    value = torch.where(largest > 0, (other - own) / largest, 0.0)
    return float(value.where(sizes[member.argmax(-1)] > 1, 0.0).mean())


def shape(profile: Tensor) -> str:
    """What a profile ``[n_x]`` does from left to right, in a word; see :class:`Clusters`."""
    steps = profile.diff()
    whole = float(steps.abs().sum())
    up, down = steps.clamp(min=0), -steps.clamp(max=0)
    highest, lowest = int(profile.argmax()), int(profile.argmin())
    ways = {
        "rising": up.sum(),
        "falling": down.sum(),
        "peaked": up[:highest].sum() + down[highest:].sum(),
        "dipped": down[:lowest].sum() + up[lowest:].sum(),
    }
    fitting = [name for name, along in ways.items() if float(along) >= PLAIN * whole]
    return fitting[0] if fitting else "mixed"


def _start(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres ``[k, d]``: points, each drawn by its squared distance to those drawn before."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(k - 1):
        distance = (points[:, None] - points[chosen]).square().sum(-1).amin(-1)
        # Where fewer points differ than there are centres, any will do.
        weights = distance if bool(distance.any()) else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Groups, and the sum of squared distances to their centres."""
    labels = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        distance = (points[:, None] - centres).square().sum(-1)
        found = distance.argmin(-1)
        nearest = distance.amin(-1)
        for group in range(len(centres)):
            if not bool((found == group).any()):
                farthest = int(nearest.argmax())
                found[farthest], nearest[farthest] = group, 0.0
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack([points[labels == g].mean(0) for g in range(len(centres))])
    return labels, float((points - centres[labels]).square().sum())
