"""Summaries: closed forms of known curves, on any grid, and loops that do the same slowly."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from circuitlab_activation_plateaus.walks import summaries
from circuitlab_activation_plateaus.walks.summaries import (
    Summary,
    excess,
    isotonic,
    peaks,
    summarise,
)
from torch import Tensor

from circuitlab import NumericsError, OptionError

EVEN = torch.linspace(0, 1, 51, dtype=torch.float64)
FINE = torch.linspace(0, 1, 1001, dtype=torch.float64)


def uneven(seed: int = 0, near: float = 0.5) -> Tensor:
    """An even grid with 40 more places drawn around one."""
    generator = torch.Generator().manual_seed(seed)
    more = near + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    return torch.cat([EVEN, more[(more > 0) & (more < 1)]]).unique()


def logistic(t: Tensor, slope: float, middle: float = 0.5) -> Tensor:
    """A logistic curve from exactly 0 to exactly 1."""
    curve = torch.sigmoid(slope * (t - middle))
    ends = torch.sigmoid(slope * (torch.tensor([0.0, 1.0], dtype=torch.float64) - middle))
    return (curve - ends[0]) / (ends[1] - ends[0])


def numbers(summary: Summary, row: int = 0) -> dict[str, float]:
    return {field.name: float(getattr(summary, field.name)[row]) for field in fields(summary)}


LINE = {
    "width": 0.8,
    "max_slope": 1,
    "location": 0.5,
    "participation": 1,
    "boundaries": 0,
    "flat_start": 0.1,
    "flat_end": 0.1,
    "deviation": 0,
}


@pytest.mark.parametrize("t", [EVEN, uneven()], ids=["even", "uneven"])
def test_a_line_has_its_closed_form(t: Tensor) -> None:
    """Width 0.8, slope and participation 1, no boundary: with rounding on it too."""
    noise = 1e-7 * torch.randn(len(t), generator=torch.Generator().manual_seed(1)).double()
    for curve, tolerance in ((t, 1e-9), (t + noise, 2e-3)):
        assert numbers(summarise(t, curve[None])) == pytest.approx(LINE, abs=tolerance)


@pytest.mark.parametrize("slope", [20.0, 60.0])
def test_a_logistic_curve_has_its_closed_form(slope: float) -> None:
    """Width 2 ln 9 / k, slope k / 4, participation 6 / k, one boundary in the middle."""
    found = numbers(summarise(FINE, logistic(FINE, slope)[None]))
    assert found["width"] == pytest.approx(2 * math.log(9) / slope, rel=1e-3)
    assert found["max_slope"] == pytest.approx(slope / 4, rel=1e-3)
    assert found["participation"] == pytest.approx(6 / slope, rel=1e-3)
    assert found["location"] == pytest.approx(0.5, abs=1e-9)
    assert found["boundaries"] == 1
    assert found["flat_start"] == pytest.approx(0.5 - math.log(9) / slope, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_do_not_depend_on_the_grid(seed: int) -> None:
    """Even, fine and refined grids tell the same of one curve.

    A secant over h in the middle of a logistic curve of slope k is lower by (k h)² / 12.
    """
    fine = numbers(summarise(FINE, logistic(FINE, 20)[None]))
    for t in (EVEN, uneven(seed), uneven(seed, near=0.2)):
        assert numbers(summarise(t, logistic(t, 20)[None])) == pytest.approx(
            fine, abs=5e-3, rel=1.05 * (20 * 0.02) ** 2 / 12
        )


@pytest.mark.parametrize("t", [FINE, EVEN, uneven(near=0.7)], ids=["fine", "even", "uneven"])
def test_a_staircase_has_its_steps(t: Tensor) -> None:
    """Two steps are two peaks of the speed, at their places, and width is from one to the other."""
    curve = (logistic(t, 80, 0.3) + logistic(t, 80, 0.7))[None] / 2
    speed = curve.diff(dim=1) / t.diff()
    where = peaks(t, speed)[0]
    middles = ((t[1:] + t[:-1]) / 2)[where]
    assert middles.tolist() == pytest.approx([0.3, 0.7], abs=0.011)
    found = numbers(summarise(t, curve))
    assert found["boundaries"] == 2
    # At level 0.1 the first step has done 0.2 of itself, ln 4 / 80 before its middle.
    assert found["width"] == pytest.approx(0.4 + 2 * math.log(4) / 80, abs=5e-3)


def test_a_level_that_is_a_plateau_is_passed_in_its_middle() -> None:
    """A curve at exactly one half from 0.2 to 0.8 is located at 0.5."""
    t = torch.tensor([0.0, 0.1, 0.2, 0.8, 1.0], dtype=torch.float64)
    curve = torch.tensor([[0.0, 0.25, 0.5, 0.5, 1.0]], dtype=torch.float64)
    assert numbers(summarise(t, curve))["location"] == pytest.approx(0.5)


def test_a_true_step_is_as_sharp_as_its_interval() -> None:
    """A jump within one interval: slope 1 / interval, width 0.8 of it, participation its length."""
    t = torch.tensor([0.0, 0.4, 0.41, 1.0], dtype=torch.float64)
    found = numbers(summarise(t, torch.tensor([[0.0, 0.0, 1.0, 1.0]])))
    assert found["max_slope"] == pytest.approx(100)
    assert found["width"] == pytest.approx(0.008)
    assert found["participation"] == pytest.approx(0.01)
    assert found["boundaries"] == 1
    assert (found["flat_start"], found["flat_end"]) == pytest.approx((0.401, 0.591))


def test_a_curve_is_rescaled_from_its_own_ends() -> None:
    """Any response has the numbers of the same curve from 0 to 1: units and offset do not count."""
    t, curve = uneven(), logistic(uneven(), 12)[None]
    plain = numbers(summarise(t, curve))
    assert numbers(summarise(t, 3 + 700 * curve)) == pytest.approx(plain, rel=1e-9, abs=1e-9)


def test_backwards_is_the_same() -> None:
    """A curve from its other end has equal width, slope, participation and boundaries."""
    t = uneven(near=0.3)
    curve = (logistic(t, 30, 0.35) + 2 * logistic(t, 90, 0.6))[None] / 3
    there, back = (
        numbers(s) for s in (summarise(t, curve), summarise(1 - t.flip(0), 1 - curve.flip(1)))
    )
    assert there["location"] == pytest.approx(1 - back.pop("location"))
    assert (there.pop("flat_start"), there.pop("flat_end")) == pytest.approx(
        (back.pop("flat_end"), back.pop("flat_start"))
    )
    del there["location"]
    assert there == pytest.approx(back)


def test_forth_and_back_is_told() -> None:
    """A curve that swings past its end deviates by what the isotonic fit cannot follow."""
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    curve = torch.tensor([[0.0, 1.5, 1.5, 0.5, 1.0]], dtype=torch.float64)
    # Weights 1 2 2 2 1: all but the first step are pooled at 8 / 7.
    assert isotonic(t, curve).tolist() == [pytest.approx([0, *[8 / 7] * 4])]
    assert numbers(summarise(t, curve))["deviation"] == pytest.approx(8 / 7 - 0.5)


def pooled(weights: list[float], values: list[float]) -> list[float]:
    """Pool adjacent violators, one block after another."""
    blocks: list[list[float]] = []
    for weight, value in zip(weights, values, strict=True):
        blocks.append([weight, value, 1])
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            w, v, n = blocks.pop()
            total = blocks[-1][0] + w
            mean = (blocks[-1][0] * blocks[-1][1] + w * v) / total
            blocks[-1] = [total, mean, blocks[-1][2] + n]
    return [value for _, value, n in blocks for _ in range(int(n))]


@pytest.mark.parametrize("seed", range(3))
def test_the_isotonic_fit_pools_violators(seed: int) -> None:
    """Every row against pooling by hand, weights the steps' shares of the path."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(6, 23, generator=generator, dtype=torch.float64).sort(1).values
    d = torch.randn(6, 23, generator=generator, dtype=torch.float64) + 3 * t
    found = isotonic(t, d)
    for row in range(6):
        gaps = [0.0, *t[row].diff().tolist(), 0.0]
        weights = [(a + b) / 2 for a, b in pairwise(gaps)]
        assert found[row].tolist() == pytest.approx(pooled(weights, d[row].tolist()), abs=1e-12)


def slow_peaks(lengths: list[float], v: list[float]) -> list[bool]:
    """Peaks as their definition reads, one at a time."""
    total = sum(x * dt for x, dt in zip(v, lengths, strict=True))
    found = []
    for i, height in enumerate(v):
        left = i
        while left > 0 and v[left - 1] < height:
            left -= 1
        right = i
        while right < len(v) - 1 and v[right + 1] <= height:
            right += 1
        base = max(min(v[left : i + 1]), min(v[i : right + 1]))
        change, j = 0.0, i
        while j >= 0 and v[j] > base:
            change += (v[j] - base) * lengths[j]
            j -= 1
        j = i + 1
        while height > base and j < len(v) and v[j] > base:
            change += (v[j] - base) * lengths[j]
            j += 1
        found.append(change >= 0.1 * total)
    return found


@pytest.mark.parametrize("smooth", [1, 9])
def test_peaks_are_those_of_their_definition(smooth: int) -> None:
    """Random speeds, jagged and smooth, with ties, against loops; some have several peaks."""
    generator = torch.Generator().manual_seed(smooth)
    t = torch.rand(40, 31, generator=generator, dtype=torch.float64).sort(1).values
    raw = torch.randint(0, 6, (40, 30 + smooth - 1), generator=generator).double() ** 3
    v = raw.unfold(1, smooth, 1).mean(-1)
    found, lengths = peaks(t, v), t.diff(dim=1)
    assert found.tolist() == [
        slow_peaks(*rows) for rows in zip(lengths.tolist(), v.tolist(), strict=True)
    ]
    assert int(found.sum(1).max()) > 1


@pytest.mark.parametrize(
    ("speed", "n"),
    [
        ([1, 1, 1, 1, 1], 0),
        ([1, 2, 3, 4, 5], 0),
        ([5, 4, 3, 2, 1], 0),
        ([0, 5, 5, 5, 0], 1),
        ([0, 5, 0, 5, 0], 2),
        ([0, 5, 4.9, 5, 0], 1),
        ([1, 1, 1.2, 1, 1], 0),
        ([0, 9, 0, 0.5, 0], 1),
    ],
)
def test_boundaries_are_counted_once(speed: list[float], n: int) -> None:
    """Even, rising, falling, flat-topped, two, jagged, a ripple, and one too small to count."""
    assert int(peaks(torch.linspace(0, 1, 6), torch.tensor([speed])).sum()) == n


def test_a_given_speed_is_what_participates() -> None:
    """Participation and boundaries are those of the output's own speed where it is given."""
    speed = torch.tensor([[0.0, 0.0, 4.0, 0.0]])
    t = torch.linspace(0, 1, 5)
    found = numbers(summarise(t, t[None], speed))
    assert found["participation"] == pytest.approx(0.25)
    assert found["boundaries"] == 1
    assert found["max_slope"] == pytest.approx(1)


def test_excess_is_a_ratio_of_slopes() -> None:
    """Three times steeper than the path itself is 3."""
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    out = summarise(t, torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1 / 3, 2 / 3, 1.0]]))
    inside = summarise(t, t.expand(2, -1))
    assert excess(out, inside).tolist() == pytest.approx([3, 1])


def test_rows_are_summarised_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has the numbers it has by itself, however many go through a table together."""
    t = torch.stack([uneven(near=0.4)[:80], uneven(near=0.6)[:80]])
    t = (t - t[:, :1]) / (t[:, -1:] - t[:, :1])
    curves = torch.stack([logistic(t[0], 9), logistic(t[1], 50, 0.7)])
    both = summarise(t, curves)
    monkeypatch.setattr(summaries, "SQUARES", 1)
    for row in range(2):
        alone = numbers(summarise(t[row], curves[row : row + 1]))
        assert numbers(both, row) == pytest.approx(alone, abs=1e-12)
        assert numbers(summarise(t, curves), row) == pytest.approx(alone, abs=1e-12)


@pytest.mark.parametrize(
    ("curve", "speed", "error", "fact"),
    [
        ([0.0, 1.0, 0.0], None, NumericsError, "curve 1 of 1 ends no higher than it begins"),
        ([0.0, float("nan"), 1.0], None, NumericsError, "the speed of walk 1 of 1 is"),
        ([0.0, 0.5, 1.0], [0.0, 0.0], NumericsError, "the speed of walk 1 of 1 is 0 all along"),
        ([0.0, 0.5, 1.0], [1.0], OptionError, "speeds have shape"),
        ([0.0, 0.5], None, OptionError, "places t have shape"),
    ],
)
def test_curves_without_numbers_are_refused(
    curve: list[float], speed: list[float] | None, error: type[Exception], fact: str
) -> None:
    """No rise, NaN, no speed, and shapes that do not go together."""
    given = None if speed is None else torch.tensor([speed])
    with pytest.raises(error, match=fact):
        summarise(torch.linspace(0, 1, 3), torch.tensor([curve]), given)
