"""Clustering of output states: against exhaustive search, definitions by loops, closed forms."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from circuitlab_activation_plateaus.regions.clustering import (
    bic,
    choose,
    coordinates,
    cut,
    k_means,
    likeness,
    ranked,
    silhouette,
    ward,
)
from torch import Tensor


def blobs(k: int, each: int, d: int, *, spread: float = 0.05, seed: int = 0) -> Tensor:
    """``k`` clouds about the corners of a simplex, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k * each, d, generator=generator, dtype=torch.float64)
    return torch.eye(d, dtype=torch.float64)[:k].repeat_interleave(each, 0) + spread * noise


def inertia(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances from the means of clusters, by loops."""
    total = 0.0
    for label in set(labels.tolist()):
        members = points[labels == label]
        total += float((members - members.mean(0)).square().sum())
    return total


@pytest.mark.parametrize(("n", "d"), [(7, 20), (20, 7), (6, 6)])
def test_coordinates_keep_distances(n: int, d: int) -> None:
    """Every distance is that of the points, in as many axes as the points span."""
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = coordinates(points)
    assert found.shape == (n, min(n - 1, d))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points))


def test_coordinates_of_equal_points() -> None:
    """Points that are all one span no axis."""
    assert coordinates(torch.ones(4, 3)).shape == (4, 0)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_k_means_is_the_best_partition(k: int, seed: int) -> None:
    """No partition of 8 points into k clusters has less inertia: all are tried."""
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = min(
        inertia(points, torch.tensor(labels))
        for labels in product(range(k), repeat=8)
        if len(set(labels)) == k
    )
    assert inertia(points, k_means(points, k)) == pytest.approx(best, rel=1e-9)


def test_k_means_does_not_depend_on_seed_or_order() -> None:
    """Separate clouds are found whatever the seed, and in whatever order the points come."""
    points, truth = blobs(4, 12, 5), torch.arange(4).repeat_interleave(12)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    for seed in range(5):
        assert likeness(k_means(points, 4, seed), truth) == 1.0
        assert likeness(k_means(points[order], 4, seed), truth[order]) == 1.0
        assert torch.equal(k_means(points, 4, seed), k_means(points, 4, seed))


def test_k_means_of_few_different_points() -> None:
    """Two different points are two clusters, however many are asked for."""
    points = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)
    assert k_means(points, 4).tolist() == [0, 1, 0, 1, 0]


def merged_by_search(points: Tensor, k: int) -> Tensor:
    """Ward's method as it is defined: join the two clusters that cost least, again and again."""
    clusters = [[i] for i in range(len(points))]

    def cost(i: int, j: int) -> float:
        a, b = points[clusters[i]], points[clusters[j]]
        share = len(a) * len(b) / (len(a) + len(b))
        return float(share * (a.mean(0) - b.mean(0)).square().sum())

    while len(clusters) > k:
        i, j = min(combinations(range(len(clusters)), 2), key=lambda pair: cost(*pair))
        clusters[i] += clusters.pop(j)
    labels = torch.zeros(len(points), dtype=torch.int64)
    for number, cluster in enumerate(clusters):
        labels[cluster] = number
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_ward_joins_what_costs_least(seed: int) -> None:
    """At every number of clusters the chains give what the definition gives, at its cost."""
    points = torch.randn(14, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    merges = ward(points)
    for k in range(1, 15):
        truth = merged_by_search(points, k)
        assert likeness(cut(merges, k), truth) == 1.0
        spent = sum(cost for _, _, cost in merges[: 14 - k])
        assert spent == pytest.approx(inertia(points, truth))


def test_ward_ends_with_equal_points() -> None:
    """Points that coincide are joined first, at no cost."""
    points = torch.tensor([[0.0], [5.0], [0.0], [5.0], [0.0], [5.0]], dtype=torch.float64)
    merges = ward(points)
    assert [cost for _, _, cost in merges] == pytest.approx([0, 0, 0, 0, 3 * 3 / 6 * 25])
    assert cut(merges, 2).tolist() == [0, 1, 0, 1, 0, 1]


def test_silhouette_is_its_definition() -> None:
    """Mean of (b - a) / max(a, b) by loops; a point alone counts as 0."""
    points = torch.randn(9, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 0])
    distances = torch.cdist(points, points)
    values = []
    for i, own in enumerate(labels.tolist()):
        means = {
            label: [float(distances[i, j]) for j in range(9) if labels[j] == label and j != i]
            for label in range(3)
        }
        if not means[own]:
            values.append(0.0)
            continue
        a = sum(means[own]) / len(means[own])
        b = min(sum(m) / len(m) for label, m in means.items() if label != own)
        values.append((b - a) / max(a, b))
    assert silhouette(distances, labels) == pytest.approx(sum(values) / 9)


def test_bic_is_its_definition() -> None:
    """Log-density of every point under its Gaussian and its weight, less what parameters cost."""
    points, labels = blobs(2, 6, 3, spread=0.3), torch.tensor([0] * 6 + [1] * 6)
    means = torch.stack([points[:6].mean(0), points[6:].mean(0)])
    variance = inertia(points, labels) / (3 * 10)
    normal = torch.distributions.Normal(means[labels], math.sqrt(variance))
    fit = float(normal.log_prob(points).sum()) + 12 * math.log(0.5)
    assert bic(points, labels) == pytest.approx(fit - 0.5 * (2 * 3 + 1 + 1) * math.log(12))


@pytest.mark.parametrize("by", ["silhouette", "bic"])
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("method", ["k-means", "ward"])
def test_planted_number_of_clusters_is_chosen(by: str, k: int, method: str) -> None:
    """Of separate clouds either criterion counts as many as there are, by either method."""
    points, truth = blobs(k, 15, 6), torch.arange(k).repeat_interleave(15)
    merges = ward(points)
    label = {"k-means": lambda n: k_means(points, n), "ward": lambda n: cut(merges, n)}[method]
    labels, values = choose(points, label, by, 8)  # type: ignore[arg-type]  # parametrised
    assert likeness(labels, truth) == 1.0
    assert max(values, key=lambda n: values[n]) == k


@pytest.mark.parametrize("by", ["silhouette", "bic"])
def test_one_cloud_is_one_cluster(by: str) -> None:
    """A single round cloud in many dimensions is not split."""
    points = torch.randn(60, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    labels, _ = choose(points, lambda k: k_means(points, k), by, 6)  # type: ignore[arg-type]  # same
    assert labels.unique().tolist() == [0]


def test_equal_points_are_one_cluster() -> None:
    """Without any difference there is nothing to split, and no criterion to compare."""
    points = torch.zeros(5, 2, dtype=torch.float64)
    labels, values = choose(points, lambda k: k_means(points, k), "silhouette", 4)
    assert labels.tolist() == [0] * 5
    assert values == {}


def test_likeness_is_the_adjusted_rand_index() -> None:
    """Counted over pairs of points by loops; the same up to names is 1, whatever the names."""
    a, b = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    pairs = list(combinations(range(8), 2))
    same = [[bool(x[i] == x[j]) for i, j in pairs] for x in (a, b)]
    both, first, second = sum(map(all, zip(*same, strict=True))), sum(same[0]), sum(same[1])
    chance = first * second / len(pairs)
    assert likeness(a, b) == pytest.approx((both - chance) / ((first + second) / 2 - chance))
    assert likeness(a, 2 - a) == 1.0


def test_clusters_are_numbered_by_size() -> None:
    """The largest is 0; of two that are as large, the one that is seen first."""
    assert ranked(torch.tensor([7, 3, 3, 5, 5, 3, 9])).tolist() == [2, 0, 0, 1, 1, 0, 3]
