"""Crossings and normals: on a staircase whose borders are hyperplanes written into its weights."""

from __future__ import annotations

import math

import pytest
import torch
from circuitlab_activation_plateaus.regions.finding import Regions, find_regions
from circuitlab_activation_plateaus.regions.normals import (
    Crossings,
    Directions,
    Facing,
    Walkers,
    face,
    find_crossings,
    token_directions,
)
from circuitlab_activation_plateaus.walks.paths import lerp, slerp
from oracles import random_gpt2
from region_oracles import Staircase, staircase
from torch import Tensor

from circuitlab import Site, load_model

SITE = Site("resid_pre", 0)
PLACES = (0.3, 4.1, 1.6, 2.7)


def walkers(stairs: Staircase, pairs: list[tuple[int, int]]) -> Walkers:
    """Straight walks between the staircase's tokens."""
    model = stairs.model
    tokens = [model.tokens([(stairs.first + pair[side],) for pair in pairs]) for side in (0, 1)]
    ends = [model.run(part, read=[SITE])[SITE][:, -1] for part in tokens]
    return Walkers(model, tokens[0], SITE, lerp, (ends[0], ends[1]))


def crossed(walking: Walkers, n_steps: int = 9) -> tuple[Regions, Crossings]:
    n_rows = len(walking.a)
    t = torch.linspace(0, 1, n_steps, dtype=torch.float64).expand(n_rows, -1)
    rows = torch.arange(n_rows).repeat_interleave(n_steps)
    logits = walking.logits(rows, t.flatten()).view(n_rows, n_steps, -1)
    # Regions by token, in the order of the stairs.
    regions = Regions("argmax", torch.arange(4), logits.new_zeros(0, 1))
    return regions, find_crossings(regions, t, regions.assign(logits), walking.logits)


PAIRS = [(0, 1), (1, 0), (2, 3), (0, 2)]


def test_crossings_lie_on_the_hyperplanes() -> None:
    """Each walk crosses every border between its ends, in order, where the formula says."""
    stairs = staircase(PLACES)
    _, found = crossed(walkers(stairs, PAIRS))
    rows: list[tuple[int, int, int, float]] = []
    for row, (a, b) in enumerate(PAIRS):
        start, end = PLACES[a], PLACES[b]
        here = [j for j in range(3) if (start - stairs.border(j)) * (end - stairs.border(j)) < 0]
        for j in here if end > start else reversed(here):
            place = (stairs.border(j) - start) / (end - start)
            rows.append((row, j, j + 1, place) if end > start else (row, j + 1, j, place))
    assert found.rows.tolist() == [row for row, *_ in rows]
    assert found.before.tolist() == [before for _, before, _, _ in rows]
    assert found.after.tolist() == [after for _, _, after, _ in rows]
    assert found.t.tolist() == pytest.approx([place for *_, place in rows], abs=1e-5)


def test_regions_between_two_steps_are_found() -> None:
    """Two steps far apart still give all three borders that lie between them."""
    stairs = staircase(PLACES)
    _, found = crossed(walkers(stairs, [(0, 1)]), n_steps=2)
    assert list(zip(found.before.tolist(), found.after.tolist(), strict=True)) == [
        (0, 1), (1, 2), (2, 3)
    ]  # fmt: skip
    expected = [(stairs.border(j) - PLACES[0]) / (PLACES[1] - PLACES[0]) for j in range(3)]
    assert found.t.tolist() == pytest.approx(expected, abs=1e-5)


def test_normals_are_those_of_the_hyperplanes() -> None:
    """The normal faces the region entered, the slope is that of the ramp times the walk's."""
    stairs = staircase(PLACES)
    walking = walkers(stairs, PAIRS)
    regions, found = crossed(walking)
    facing = face(regions, found, walking)
    both = zip(found.before.tolist(), found.after.tolist(), strict=True)
    expected = torch.stack([(b - a) * stairs.normal(min(a, b)) for a, b in both])
    torch.testing.assert_close(facing.normals, expected, atol=1e-5, rtol=0)
    speeds = torch.tensor([abs(PLACES[b] - PLACES[a]) for a, b in PAIRS]).double()[found.rows]
    torch.testing.assert_close(facing.slope, speeds * stairs.slope(), rtol=1e-5, atol=0)
    torch.testing.assert_close(facing.share, torch.ones(len(found)).double(), rtol=1e-3, atol=0)
    assert facing.known.all()


def test_steep_ramp_has_the_same_borders() -> None:
    """A ramp narrower than the reach of the slope still has its place and its normal."""
    stairs = staircase(PLACES, (1.0, 2.0), steepness=3000.0)
    walking = walkers(stairs, [(0, 1)])
    t = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    regions = Regions("argmax", torch.arange(3), torch.zeros(0, 1))
    found = find_crossings(regions, t, torch.tensor([[0, 2]]), walking.logits, halvings=30)
    facing = face(regions, found, walking)
    expected = [(stairs.border(j) - PLACES[0]) / (PLACES[1] - PLACES[0]) for j in range(2)]
    assert found.t.tolist() == pytest.approx(expected, abs=1e-6)
    normals = torch.stack([stairs.normal(j) for j in range(2)])
    torch.testing.assert_close(facing.normals, normals, atol=1e-5, rtol=0)
    assert (facing.share > 2).all()


def test_jump_has_no_normal() -> None:
    """Where the output jumps and the gradient says nothing of it, no normal is given."""
    stairs = staircase(PLACES)
    walking = walkers(stairs, [(0, 1)])
    regions, found = crossed(walking)
    flat = _Jumping(walking, (stairs.border(1) - PLACES[0]) / (PLACES[1] - PLACES[0]))
    facing = face(regions, Crossings(*(part[1:2] for part in vars(found).values())), flat)
    assert facing.slope.item() > 100
    assert facing.share.item() == pytest.approx(0, abs=1e-6)
    assert not facing.known.any()
    assert not facing.normals.any()


class _Jumping(Walkers):
    """The same walks, but their output only jumps, at one place."""

    def __init__(self, walking: Walkers, at: float) -> None:
        self.a, self.b, self._path, self._at = walking.a, walking.b, lerp, at

    def logits(self, rows: Tensor, t: Tensor) -> Tensor:
        return torch.eye(4)[torch.where(t > self._at, 2, 1)]

    def gradients(self, rows: Tensor, t: Tensor, margin: object) -> Tensor:
        return torch.zeros(len(rows), self.a.shape[1])


def test_normals_are_finite_differences() -> None:
    """On a random GPT-2 with padded prompts, a normal is the gradient that small steps measure."""
    model = load_model(random_gpt2(seed=3))
    a = model.tokens([(1, 2, 3), (4, 5), (6, 1, 8)])
    b = model.tokens([(1, 2, 9), (4, 7), (6, 1, 30)])
    t = torch.linspace(0, 1, 7, dtype=torch.float64).expand(3, -1)
    for site, kind, k in (
        (Site("resid_pre", 1), "argmax", None),
        (Site("resid_mid", 0), "kmeans", 8),
        (Site("z", 1, head=1), "kmeans", 8),
    ):
        ends = [model.run(part, read=[site])[site][:, -1] for part in (a, b)]
        walking = Walkers(model, a, site, slerp, (ends[0], ends[1]))
        logits = walking.logits(torch.arange(3).repeat_interleave(7), t.flatten())
        regions = find_regions(logits, kind, k=k)  # type: ignore[arg-type]  # one of the kinds
        found = find_crossings(regions, t, regions.assign(logits).view(3, 7), walking.logits)
        assert len(found) >= 2, (site, kind)
        facing = face(regions, found, walking)
        for i, row in enumerate(found.rows):
            clean = model.run(a.rows([int(row)]), read=[site])
            point = walking.points(row[None], found.t[i : i + 1])
            steps = 1e-5 * torch.eye(point.shape[1], dtype=torch.float64)
            points = torch.cat([point, point + steps, point - steps])
            values = clean[site].repeat(len(points), *[1] * (clean[site].ndim - 1))
            values[:, -1] = points
            same = clean.tokens.repeat(len(points))
            after = model.run(same, write={site: values}).logits[:, -1]
            both = (part[i].expand(len(points)) for part in (found.before, found.after))
            here, above, below = regions.margin(after, *both).split([1, *[len(steps)] * 2])
            expected = torch.nn.functional.normalize(above - below, dim=0)
            torch.testing.assert_close(facing.normals[i], expected, atol=1e-5, rtol=0)
            assert here.item() == pytest.approx(0, abs=1e-4)


def test_walks_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few walks a pass takes, logits and gradients are the same."""
    stairs = staircase(PLACES)
    regions, found = crossed(walkers(stairs, PAIRS))
    whole = face(regions, found, walkers(stairs, PAIRS))
    monkeypatch.setattr(
        "circuitlab_activation_plateaus.regions.normals.STREAMS", {"cpu": 1, "cuda": 1}
    )
    small = walkers(stairs, PAIRS)
    again = face(regions, crossed(small)[1], small)
    torch.testing.assert_close(again.normals, whole.normals)
    torch.testing.assert_close(again.slope, whole.slope, rtol=1e-5, atol=0)


def test_no_crossing() -> None:
    """Walks that stay in one region have no crossing, no slope and no normal."""
    stairs = staircase((0.1, 0.2))
    walking = walkers(stairs, [(0, 1)])
    regions, found = crossed(walking)
    facing = face(regions, found, walking)
    assert len(found) == 0
    assert facing.normals.shape == (0, stairs.model.d_model)
    assert isinstance(facing, Facing)


def test_directions_are_matched_by_cosine() -> None:
    """The best matches are those with the largest |cos|, signed, whatever their length."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 8, generator=generator)
    vectors[3] = 0
    named = Directions("features", vectors, lambda chosen: [f"f{i}" for i in chosen])
    normal = -5 * vectors[17] + 0.1 * torch.randn(8, generator=generator)
    cosines = [float(v @ normal / (v.norm() * normal.norm())) if v.any() else 0.0 for v in vectors]
    best = sorted(range(40), key=lambda i: -abs(cosines[i]))[:3]
    found = named.match(normal, 3)
    assert [name for name, _ in found] == [f"f{i}" for i in best]
    assert found[0][0] == "f17"
    assert [cosine for _, cosine in found] == pytest.approx([cosines[i] for i in best], rel=1e-4)


def test_chance_is_that_of_random_directions() -> None:
    """In the plane, one direction's |cos| with a random one is below cos(0.05 π / 2) in 95 %."""
    named = Directions("one", torch.tensor([[2.0, 0.0]]), lambda chosen: ["x"] * len(chosen))
    found = [named.chance(seed) for seed in range(20)]
    assert sum(found) / 20 == pytest.approx(math.cos(0.05 * math.pi / 2), abs=1e-3)
    assert named.chance(3) == found[3]


def test_token_directions_are_what_logits_read() -> None:
    """A step along a token's direction raises its centred logit by the direction's own part."""
    stairs = staircase(PLACES)
    directions = token_directions(stairs.model)
    head = stairs.model.weights.unembedding(torch.float32)[0]
    expected = head - head.mean(1, keepdim=True)
    torch.testing.assert_close(directions.vectors, expected.T)
    assert directions.label([0, 5]) == stairs.model.token_texts([0, 5])
