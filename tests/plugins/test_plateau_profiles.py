"""Profiles: planted shapes found, k-means against every partition, silhouettes by their formula."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from circuitlab_activation_plateaus.steering.profiles import (
    cluster,
    k_means,
    shape,
    silhouette,
    standardised,
)
from torch import Tensor

X = torch.linspace(-10, 10, 41, dtype=torch.float64)
SHAPES = {
    "rising": torch.sigmoid(X),
    "falling": -X,
    "peaked": torch.exp(-X * X),
    "dipped": X.abs(),
    "mixed": torch.sin(X),
}


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_names(name: str) -> None:
    """Whatever their height and size, and with a little unevenness."""
    for factor in (0.01, 30.0):
        assert shape(5 + factor * SHAPES[name]) == name
    wavy = SHAPES[name] + 0.002 * torch.sin(9 * X) * SHAPES[name].std()
    assert shape(wavy) == name


def test_planted_groups_are_found() -> None:
    """Three shapes at many heights and sizes, and curves that do not move."""
    sizes = torch.tensor([0.5, 3.0, 1.0, 8.0], dtype=torch.float64)
    kinds = [SHAPES["rising"], SHAPES["falling"] / 10, SHAPES["peaked"]]
    curves = [height + size * kind for kind in kinds for height, size in enumerate(sizes, 1)]
    flat = torch.full_like(X, 4.0) + 1e-4 * noise(len(X))
    rows = torch.stack([*curves, flat])
    found = cluster(rows + 1e-3 * noise(*rows.shape, seed=1))
    assert found.labels[-1] == -1
    groups = [set(found.labels[start : start + 4]) for start in (0, 4, 8)]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert groups[1] == {0}, "the line moves most"
    assert sorted(found.names) == ["falling", "peaked", "rising"]
    assert found.silhouette is not None
    assert found.silhouette > 0.9
    assert cluster(rows, seed=0) == cluster(rows, seed=0)


def test_one_shape_is_one_group() -> None:
    """No structure, no groups; and nothing at all where nothing moves."""
    single = cluster(SHAPES["falling"][None])
    assert (single.labels, single.names, single.silhouette) == ([0], ["falling"], None)
    nothing = cluster(torch.ones(3, 5))
    assert (nothing.labels, nothing.names, nothing.silhouette) == ([-1, -1, -1], [], None)
    blob = cluster(SHAPES["rising"] + 1e-6 * noise(30, 41, seed=4))
    assert (set(blob.labels), blob.silhouette) == ({0}, None)


@pytest.mark.parametrize("k", [2, 3])
def test_k_means_is_the_best_partition(k: int) -> None:
    """Of all ways to part eight points in k groups, the least sum of squares."""
    points = noise(8, 2, seed=k)

    def spread(labels: list[int]) -> float:
        total = 0.0
        for group in set(labels):
            own = points[[row for row, label in enumerate(labels) if label == group]]
            total += float((own - own.mean(0)).square().sum())
        return total

    best = min(spread(list(labels)) for labels in product(range(k), repeat=8))
    labels = k_means(points, k)
    assert len(set(labels.tolist())) == k
    assert math.isclose(spread(labels.tolist()), best, rel_tol=1e-9)


def test_groups_that_lose_their_points_get_others() -> None:
    """Points that coincide are parted all the same."""
    points = torch.tensor([[0.0], [0.0], [0.0], [5.0]], dtype=torch.float64)
    assert len(set(k_means(points, 3).tolist())) == 3


def test_silhouette_is_that_of_its_formula() -> None:
    """(b - a) / max(a, b) for each point, 0 for one alone in its group."""
    points, labels = noise(7, 3, seed=9), [0, 0, 1, 1, 1, 2, 0]

    def mean(row: int, rows: list[int]) -> float:
        return math.fsum(math.dist(points[row].tolist(), points[r].tolist()) for r in rows) / len(
            rows
        )

    values = []
    for row, own in enumerate(labels):
        mates = [r for r, label in enumerate(labels) if label == own and r != row]
        others = [
            mean(row, [r for r, label in enumerate(labels) if label == group])
            for group in set(labels) - {own}
        ]
        a, b = mean(row, mates) if mates else 0.0, min(others)
        values.append((b - a) / max(a, b) if mates else 0.0)
    found = silhouette(points, torch.tensor(labels))
    assert math.isclose(found, math.fsum(values) / 7, abs_tol=1e-12)


def test_standardised_curves_differ_in_shape_alone() -> None:
    """Mean 0 and deviation 1, so that height and size are gone."""
    both = standardised(torch.stack([SHAPES["rising"], 7 - 2 * SHAPES["rising"]]))
    assert torch.allclose(both[0], -both[1])
    assert torch.allclose(both.mean(-1), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(both.std(-1, correction=0), torch.ones(2, dtype=torch.float64))
