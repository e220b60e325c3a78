"""Draws of prompts and seeds, and the frontier: each against a closed form or brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from circuitlab_feature_interactions import intervals
from circuitlab_feature_interactions.frontier import (
    EDGES,
    Drawn,
    Group,
    at_reconstruction,
    differences,
    frontier,
    group_sets,
)
from circuitlab_feature_interactions.intervals import (
    RESAMPLES,
    draw_groups,
    draw_prompts,
    draw_seeds,
    group_prompts,
    interval_of,
)
from torch import Tensor

from circuitlab import mean_intervals


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(
    quality: Any, edges: Any, *, setting: str = "a", penalised: bool = False, **more: Any
) -> Group:
    numbers = {"r2": quality, EDGES: edges, **more}
    tensors = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in numbers.items()}
    return Group(setting, "", penalised, (0,), tensors, [])


# --- draws ----------------------------------------------------------------------------------------


def test_draws_are_as_many_prompts_each_time() -> None:
    """The first row has each prompt once; every other as many in all, with replacement."""
    draws = draw_prompts(30)
    assert draws.shape == (1 + RESAMPLES, 30)
    assert torch.equal(draws[0], torch.ones(30, dtype=torch.float64))
    assert torch.equal(draws.sum(1), torch.full((1 + RESAMPLES,), 30.0, dtype=torch.float64))
    assert draws[1:].var(0).mean() == pytest.approx(1 - 1 / 30, rel=0.05)
    assert torch.equal(draws, draw_prompts(30))


def test_many_prompts_are_drawn_in_groups() -> None:
    """More prompts than groups: those of a group come together, and groups are alike in size."""
    n = intervals.GROUPS * 3 + 7
    groups, draws = group_prompts(n), draw_prompts(n)
    counts = torch.bincount(groups)
    assert len(counts) == intervals.GROUPS
    assert set(counts.tolist()) == {3, 4}
    assert torch.equal(draws, draw_groups(intervals.GROUPS)[:, groups])
    # Prompts stand in the order of their lengths: a group must not be a stretch of that order.
    assert abs(float(torch.corrcoef(torch.stack([torch.arange(n), groups]))[0, 1])) < 0.1


def test_interval_of_a_mean_is_the_cores() -> None:
    """On a plain mean it is the percentile interval of `mean_intervals`, to the draws' noise."""
    values = torch.randn(80, generator=generator()).double().exp()
    drawn = draw_groups(80) @ values / 80
    wanted = mean_intervals(values[None])[0]
    assert wanted is not None
    width = wanted[1] - wanted[0]
    assert interval_of(drawn) == pytest.approx(wanted, abs=0.1 * width)


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 300 samples of 60 numbers from N(0, 1) about 95 % of the intervals hold 0."""
    samples, draws = torch.randn(300, 60, generator=generator(1)).double(), draw_groups(60)
    ends = [interval_of(draws @ sample / 60) for sample in samples]
    share = sum(end is not None and end[0] < 0 < end[1] for end in ends) / 300
    assert 0.95 - 0.05 < share < 0.95 + 0.04  # 4 and 3 standard errors


def test_interval_is_about_the_number_itself() -> None:
    """Draws that all lie above the number, as those of a Gini do, are moved onto it."""
    noise = torch.randn(RESAMPLES, generator=generator()).double()
    values = torch.cat([torch.tensor([0.5]).double(), 0.7 + 0.01 * noise])
    low, high = interval_of(values) or (0.0, 0.0)
    assert low == pytest.approx(0.5 - 0.0196, abs=0.003)
    assert high == pytest.approx(0.5 + 0.0196, abs=0.003)


def test_interval_needs_numbers() -> None:
    """None where the number, or more than 5 % of the draws, is missing; a few may be."""
    values = torch.randn(1 + RESAMPLES, generator=generator()).double()
    some, many, first = values.clone(), values.clone(), values.clone()
    some[1:40], many[1:80], first[0] = torch.nan, torch.nan, torch.nan
    assert interval_of(some) is not None
    assert interval_of(many) is None
    assert interval_of(first) is None


@pytest.mark.parametrize("n", [2, 3, 5])
def test_seeds_vary_as_the_mean_of_so_many_does(n: int) -> None:
    """The draws' variance is s²/n, with the unbiased s²: drawing n of n would give less."""
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0])[:n].double()
    means = draw_seeds(range(n)) @ values
    assert means[0] == pytest.approx(float(values.mean()))
    assert float(means[1:].var()) == pytest.approx(float(values.var()) / n, rel=0.12)
    assert means[1:].mean() == pytest.approx(float(values.mean()), abs=0.2)


def test_the_same_seeds_are_drawn_alike() -> None:
    """Two settings of the same seeds are paired, in whatever order; one seed does not vary."""
    first, second = draw_seeds([0, 1, 2]), draw_seeds([2, 0, 1])
    assert torch.equal(first[:, [2, 0, 1]], second)
    assert not torch.equal(first, draw_seeds([3, 4, 5]))
    assert torch.equal(draw_seeds([7]), torch.ones(1 + RESAMPLES, 1, dtype=torch.float64))


# --- the frontier ---------------------------------------------------------------------------------


def test_sets_of_a_setting_are_means_over_seeds() -> None:
    """Each draw weighs the seeds as `draw_seeds` says; settings keep their order."""
    parts = torch.rand(3, 1 + RESAMPLES, generator=generator()).double()
    sets = [Drawn("b", "k 4", True, seed, {"r2": parts[seed]}) for seed in (2, 0, 1)]
    sets.insert(1, Drawn("a", "k 4", False, 0, {"r2": parts[0]}))
    found = group_sets(sets)
    assert [g.setting for g in found] == ["b", "a"]
    assert found[0].seeds == (2, 0, 1)
    wanted = (draw_seeds([0, 1, 2]) * parts.T).sum(1)
    assert torch.allclose(found[0].numbers["r2"], wanted)
    assert torch.allclose(found[1].numbers["r2"], parts[0])
    assert [point["r2"] for point in found[0].by_seed] == [float(parts[s, 0]) for s in (2, 0, 1)]


def test_frontier_leaves_out_what_another_beats() -> None:
    """Less reconstruction and more edges is beaten, and so is one of the two alone; ties stay."""
    made = {
        "low": group([0.7], [5.0]),
        "beaten": group([0.75], [11.0]),
        "middle": group([0.8], [10.0]),
        "as good, more edges": group([0.8], [12.0]),
        "as sparse, worse": group([0.6], [5.0]),
        "twin": group([0.9], [20.0]),
        "other twin": group([0.9], [20.0]),
    }
    kept = frontier(list(made.values()), "r2")
    names = {id(one): name for name, one in made.items()}
    assert [names[id(one)] for one in kept] == ["low", "middle", "twin", "other twin"]


def test_line_between_neighbours_is_numpys() -> None:
    """In each draw it is `numpy.interp` on that draw's own order; NaN beyond the ends."""
    g, n = generator(3), 200
    quality = torch.tensor([0.9, 0.7, 0.8])[:, None] + 0.06 * torch.randn(3, n, generator=g)
    edges = torch.rand(3, n, generator=g) * 10
    wanted = 0.8 + 0.1 * torch.randn(n, generator=g)
    groups = [group(q, e) for q, e in zip(quality, edges, strict=True)]
    found = at_reconstruction(wanted.double(), groups, "r2", [EDGES])[EDGES]
    outside = 0
    for draw in range(n):
        order = quality[:, draw].double().argsort()
        x, y = quality[order, draw].double().numpy(), edges[order, draw].double().numpy()
        target = float(wanted[draw].double())
        if not x[0] <= target <= x[-1]:
            assert found[draw].isnan()
            outside += 1
        else:
            assert float(found[draw]) == pytest.approx(np.interp(target, x, y))
    assert 10 < outside < 150


def test_one_setting_serves_at_its_own_place_alone() -> None:
    """A frontier of one has numbers at its very reconstruction, and nowhere else."""
    alone = [group([0.8, 0.8], [3.0, 4.0])]
    wanted = torch.tensor([0.8, 0.81], dtype=torch.float64)
    found = at_reconstruction(wanted, alone, "r2", [EDGES])[EDGES]
    assert float(found[0]) == 3.0
    assert found[1].isnan()


def planted(shift: float, noise: Tensor) -> tuple[list[Group], Group]:
    """Independent settings on a line in every draw, and one that is off it by a share."""
    line = [group(q + noise, 100 * (q + noise)) for q in (0.6, 0.7, 0.9)]
    own = torch.full_like(noise, 0.83) + noise
    return line, group(own, 100 * own * (1 + shift), penalised=True)


@pytest.mark.parametrize("shift", [-0.2, 0.0, 0.3])
def test_a_planted_difference_is_found(shift: float) -> None:
    """Edges per token are off by the planted share; without one the interval holds 0."""
    noise = 0.01 * torch.randn(1 + RESAMPLES, generator=generator()).double()
    line, own = planted(shift, noise)
    jitter = torch.randn(1 + RESAMPLES, generator=generator(1)).double()
    own = group(own.numbers["r2"], own.numbers[EDGES] + jitter, penalised=True)
    found = differences(own, at_reconstruction(own.numbers["r2"], line, "r2", [EDGES]))
    low, high = interval_of(found[f"{EDGES}_share"]) or (0.0, 0.0)
    assert low < float(found[f"{EDGES}_share"][0]) < high
    assert float(found[f"{EDGES}_share"][0]) == pytest.approx(shift, abs=0.04)
    assert (low < 0 < high) == (shift == 0)


def test_fewer_edges_by_less_reconstruction_are_no_finding() -> None:
    """A setting that slid down the independent line has fewer edges, and no difference."""
    line, _ = planted(0, torch.zeros(1 + RESAMPLES).double())
    lower = group(torch.full((1001,), 0.65), torch.full((1001,), 65.0), penalised=True)
    assert lower.numbers[EDGES][0] < line[1].numbers[EDGES][0]
    found = differences(lower, at_reconstruction(lower.numbers["r2"], line, "r2", [EDGES]))
    assert found[EDGES].abs().max() < 1e-3
