"""Paths: ends, norms and angles against their closed forms, obtuse and nearly equal ends too."""

from __future__ import annotations

import math

import pytest
import torch
from circuitlab_activation_plateaus.walks.paths import PATHS, lerp, plane, ray, slerp
from torch import Tensor

from circuitlab import OptionError

T = torch.linspace(0, 1, 11, dtype=torch.float64)


def pair(degrees: float, norms: tuple[float, float] = (2.0, 5.0), d: int = 7) -> tuple[Tensor, ...]:
    """Two vectors of known angle and norms in a random plane, float64."""
    basis = torch.linalg.qr(torch.randn(d, 2, dtype=torch.float64, generator=seeded())).Q.T
    angle = math.radians(degrees)
    return norms[0] * basis[0], norms[1] * (math.cos(angle) * basis[0] + math.sin(angle) * basis[1])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_ends(*shape: int) -> tuple[Tensor, Tensor]:
    ends = torch.randn(2, *shape, generator=seeded())
    return ends[0], ends[1]


def angles(points: Tensor, start: Tensor) -> Tensor:
    """Degrees between each point and the start."""
    cosines = torch.nn.functional.cosine_similarity(points, start.expand_as(points), dim=-1)
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))


@pytest.mark.parametrize("degrees", [0.01, 30.0, 90.0, 120.0, 162.0, 179.0])
def test_slerp_turns_evenly_and_its_norm_is_linear(degrees: float) -> None:
    """At t the angle from the start is t of the whole one and the norm is between the ends'."""
    a, b = pair(degrees)
    points = slerp(a, b, T)
    assert torch.allclose(angles(points, a), T * degrees, atol=2e-6)
    assert torch.allclose(points.norm(dim=-1), 2 + 3 * T, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_ends_are_exact(name: str) -> None:
    """At 0 and 1 a path gives the ends bit for bit."""
    a, b = random_ends(5, 8)
    points = PATHS[name](a, b, T)
    assert points.shape == (5, 11, 8)
    assert points.dtype == torch.float32
    assert torch.equal(points[:, 0], a)
    assert torch.allclose(points[:, -1], b, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_swapped_ends_walk_the_same_path_backwards(name: str) -> None:
    """The path from b to a at 1 - t is the path from a to b at t."""
    a, b = (end.double() for end in random_ends(5, 8))
    assert torch.allclose(PATHS[name](a, b, T), PATHS[name](b, a, 1 - T), atol=1e-14)


def test_nearly_equal_directions_walk_straight() -> None:
    """Below 1e-4 radians, and for equal ends, a spherical path is the straight line."""
    a = torch.tensor([3.0, 4.0])
    b = torch.stack([a, 2 * a, a + torch.tensor([1e-4, 0.0])])
    assert torch.equal(slerp(a.expand(3, 2), b, T), lerp(a.expand(3, 2), b, T))


def test_each_row_has_its_own_places() -> None:
    """Places ``[..., n]`` are taken row by row."""
    a, b = random_ends(3, 4)
    t = torch.rand(3, 5, generator=seeded(), dtype=torch.float64)
    for path in (lerp, slerp):
        points = path(a, b, t)
        for row in range(3):
            assert torch.allclose(points[row], path(a[row], b[row], t[row]), atol=1e-6)
    expected = a[1] + t[1, 2].float() * b[1]
    assert torch.allclose(ray(a, b, t)[1, 2], expected, atol=1e-6)


def test_straight_paths_are_their_formulas() -> None:
    """Lerp and ray at a few places, one of them beyond the end."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    t = torch.tensor([-0.5, 0.25, 2.0])
    assert lerp(a, b, t).tolist() == [[0.0, 4.0], [1.5, 1.0], [5.0, -6.0]]
    assert ray(a, b, t).tolist() == [[-0.5, 3.0], [1.75, 1.5], [7.0, -2.0]]


def test_plane_has_its_corners_and_perpendicular_axes() -> None:
    """(0, 0) is A, (1, 0) is B, C lies at beta 1, and the axes are perpendicular."""
    a, b, c = torch.randn(3, 4, 6, dtype=torch.float64, generator=seeded())
    alpha = torch.tensor([0.0, 1.0, 0.0, -0.25])
    beta = torch.tensor([0.0, 0.0, 1.0, 1.25])
    points = plane(a, b, c, alpha, beta)
    assert points.shape == (4, 4, 6)
    side, up = b - a, points[:, 2] - a
    assert torch.allclose(points[:, 0], a)
    assert torch.allclose(points[:, 1], b)
    assert (up * side).sum(-1).abs().max() < 1e-12
    foot = c - up
    assert torch.allclose(  # c - up is on the line AB
        torch.linalg.matrix_rank(torch.stack([foot - a, side], 1), tol=1e-9), torch.tensor(1)
    )
    assert torch.allclose(points[:, 3], a - 0.25 * side + 1.25 * up)


@pytest.mark.parametrize(
    ("b", "fact"),
    [
        ([0.0, 0.0], "pair 2: one end is zero"),
        ([-2.0, 1e-4], "pair 2: the ends point in opposite directions"),
    ],
)
def test_ends_without_an_arc_are_refused(b: list[float], fact: str) -> None:
    """A zero end has no direction; opposite ends have no shortest arc."""
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(OptionError, match=fact):
        slerp(a, torch.tensor([[0.0, 1.0], b]), T)
    assert bool(lerp(a, torch.tensor([[0.0, 1.0], b]), T).isfinite().all())


def test_a_plane_through_one_point_is_refused() -> None:
    """Two equal corners span no line."""
    a, c = random_ends(2, 3)
    with pytest.raises(OptionError, match="pair 1: the first two corners are one point"):
        plane(a, a.clone(), c, T, T)
