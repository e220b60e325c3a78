"""Clustering: k-means and Ward's method, how many clusters there are, and how alike two are.

Everything works on points ``[n, d]`` in float64 and is the same for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Criterion = Literal["silhouette", "bic"]

#: Starts of k-means, of which the best counts, and rounds of each at most.
RESTARTS, ROUNDS = 10, 100
#: Mean silhouettes below it show no structure (Kaufman and Rousseeuw 1990).
LEAST_SILHOUETTE = 0.25
#: Of the largest variance along an axis: below it an axis is rounding.
_ROUNDING = 1e-12


def coordinates(points: Tensor) -> Tensor:
    """The points about their mean, along as few axes as keep every distance, ``[n, r]``."""
    x = points.double() - points.double().mean(0)
    tall = x.shape[0] > x.shape[1]
    values, vectors = torch.linalg.eigh(x.T @ x if tall else x @ x.T)
    kept = values > _ROUNDING * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    axes: Tensor = vectors[:, kept]
    return x @ axes if tall else axes * values[kept].sqrt()


def k_means(points: Tensor, k: int, seed: int = 0) -> Tensor:
    """Labels ``[n]`` of the k-means with the least inertia of ten starts (Lloyd 1982).

    Starts are drawn as by Arthur and Vassilvitskii (2007). Fewer than ``k`` clusters are found
    where there are fewer different points.
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(points), dtype=torch.int64, device=points.device), math.inf
    for _ in range(RESTARTS):
        labels, inertia = _lloyd(points, _spread(points, k, generator))
        if inertia < least * (1 - 1e-9):
            best, least = labels, inertia
    return ranked(best)


def ward(points: Tensor) -> list[tuple[int, int, float]]:
    """Merges by Ward's method, by the growth of the inertia that each costs (Ward 1963).

    Found along chains of nearest neighbours (Murtagh 1983), so that all take n² steps.

    Returns:
        ``n - 1`` merges ``(i, j, cost)``, cheapest first; i and j are points of the two clusters.
    """
    n = len(points)
    costs = torch.cdist(points, points).square() / 2
    costs.fill_diagonal_(math.inf)
    sizes = torch.ones(n, dtype=points.dtype, device=points.device)
    merges: list[tuple[int, int, float]] = []
    chain: list[int] = []
    alive = set(range(n))
    while len(alive) > 1:
        if not chain:
            chain.append(min(alive))
        top = chain[-1]
        nearest = int(costs[top].argmin())
        if len(chain) > 1 and costs[top, chain[-2]] <= costs[top, nearest]:
            i, j = chain.pop(), chain.pop()
            merges.append((i, j, float(costs[i, j])))
            _merge(costs, sizes, i, j)
            alive.remove(j)
        else:
            chain.append(nearest)
    return sorted(merges, key=lambda merge: merge[2])


def cut(merges: Sequence[tuple[int, int, float]], k: int) -> Tensor:
    """Labels ``[n]`` of the ``k`` clusters that are left before the last ``k - 1`` merges."""
    parents = list(range(len(merges) + 1))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    for i, j, _ in merges[: len(parents) - k]:
        parents[root(i)] = root(j)
    return ranked(torch.tensor([root(i) for i in range(len(parents))]))


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """Mean silhouette (Rousseeuw 1987), -1 to 1; a point alone in its cluster counts as 0.

    Args:
        distances: Between the points, ``[n, n]``.
        labels: ``[n]``, of at least two clusters, counted from 0.
    """
    members = torch.nn.functional.one_hot(labels).to(distances)
    sizes = members.sum(0)
    sums = distances @ members
    own = labels[:, None]
    alone = sizes[labels] == 1
    inside = sums.gather(1, own)[:, 0] / (sizes[labels] - 1).clamp(min=1)
    outside = (sums / sizes).scatter(1, own, math.inf).amin(1)
    larger = torch.maximum(inside, outside)
    # All distances 0: the point is as near to the others as to its own.
    values = torch.where(larger > 0, (outside - inside) / larger, 0.0)
    return float(torch.where(alone, 0.0, values).mean())


def bic(points: Tensor, labels: Tensor) -> float:
    """Bayesian information criterion of round Gaussians of one variance; larger is better.

    The log-likelihood less half the number of parameters times ln n, as of X-means (Pelleg and
    Moore 2000). The variance is taken to be at least 1e-6 of that of all points.
    """
    n, d = points.shape
    members = torch.nn.functional.one_hot(labels).to(points)
    sizes = members.sum(0)
    k = len(sizes)
    means = (members.T @ points) / sizes[:, None]
    inside = float((points - means[labels]).square().sum())
    total = float((points - points.mean(0)).square().sum())
    variance = max(inside / (d * max(n - k, 1)), 1e-6 * total / (d * n))
    if variance == 0:  # all points are one
        return 0.0
    fit = -0.5 * n * d * math.log(2 * math.pi * variance) - 0.5 * inside / variance
    fit += float((sizes * (sizes / n).log()).sum())
    return fit - 0.5 * (k * (d + 1)) * math.log(n)


def choose(
    points: Tensor, label: Callable[[int], Tensor], by: Criterion, most: int
) -> tuple[Tensor, dict[int, float]]:
    """Labels with the best number of clusters, and the criterion for each number.

    Args:
        points: ``[n, d]``.
        label: From a number of clusters to labels.
        by: ``silhouette``: the largest mean silhouette of two clusters or more, one cluster where
            it is below 0.25; ``bic``: the largest criterion of one or more.
        most: Largest number of clusters.
    """
    one = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    most = min(most, len(torch.unique(points, dim=0)))
    distances = torch.cdist(points, points)
    found: dict[int, Tensor] = {1: one}
    values: dict[int, float] = {1: bic(points, one)} if by == "bic" else {}
    for k in range(2, most + 1):
        found[k] = label(k).to(points.device)
        if by == "bic":
            values[k] = bic(points, found[k])
        else:
            values[k] = silhouette(distances, found[k])
    best = max(values, key=lambda k: (values[k], -k), default=1)
    if by == "silhouette" and values.get(best, 0.0) < LEAST_SILHOUETTE:
        best = 1
    return found[best], values


def likeness(a: Tensor, b: Tensor) -> float:
    """Adjusted Rand index of two labellings ``[n]`` (Hubert and Arabie 1985).

    1: the same up to names; 0: as alike as by chance.
    """
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a.cpu(), b.cpu()), torch.ones(len(a), dtype=torch.float64), accumulate=True)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = first * second / max(pairs(table.sum()), 1.0)
    spread = (first + second) / 2 - chance
    return 1.0 if spread == 0 else (both - chance) / spread


def ranked(labels: Tensor) -> Tensor:
    """The same clusters, numbered from 0 by size, the one of the earliest point first in ties."""
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    first = {int(label): place for place, label in reversed(list(enumerate(inverse.tolist())))}
    order = sorted(first, key=lambda label: (-int(counts[label]), first[label]))
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return places.to(labels.device)[inverse]


def _spread(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Starts far from one another: each is drawn by its squared distance from those before."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = torch.full((len(points),), math.inf, dtype=points.dtype, device=points.device)
    while len(chosen) < k:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        if not nearest.any():
            break
        chosen.append(int(torch.multinomial(nearest.cpu(), 1, generator=generator)))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Labels and inertia where neither centres nor labels move any more."""
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(ROUNDS):
        members = torch.nn.functional.one_hot(labels, len(centres)).to(points)
        sizes = members.sum(0)
        # A centre that lost all its points stays where it was.
        means = (members.T @ points) / sizes.clamp(min=1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels, float((points - centres[labels]).square().sum())


def _merge(costs: Tensor, sizes: Tensor, i: int, j: int) -> None:
    """Join cluster j to i: the costs of further merges, after Lance and Williams (1967)."""
    own = costs[i, j]
    joined = (sizes + sizes[i]) * costs[i] + (sizes + sizes[j]) * costs[j] - sizes * own
    joined /= sizes + sizes[i] + sizes[j]
    joined[[i, j]] = math.inf
    costs[i], costs[:, i] = joined, joined
    costs[j], costs[:, j] = math.inf, math.inf
    sizes[i] += sizes[j]
