"""Medians: intervals against resampling by hand, their coverage, and pairs beyond the grid."""

from __future__ import annotations

import statistics

import pytest
import torch
from circuitlab_activation_plateaus.walks.medians import difference_of_medians, median_interval
from torch import Tensor

from circuitlab import NumericsError, OptionError


def random(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [7, 8])
def test_an_interval_is_that_of_resampled_medians(n: int) -> None:
    """The same draws, each median by the standard library, and the 2.5 % cut off each end."""
    values = random(n)
    draws = torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(5))
    medians = sorted(statistics.median(values[draw].tolist()) for draw in draws)
    assert median_interval(values, seed=5) == (medians[50], medians[-51])


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("paired", [True, False])
def test_a_difference_is_that_of_resampled_medians(paired: bool, n: int) -> None:
    """Paired values are drawn together, others each for itself."""
    a, b = random(n), random(n, 1)
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(n, (2000, n), generator=generator)
    others = draws if paired else torch.randint(n, (2000, n), generator=generator)
    differences = sorted(
        statistics.median(a[i].tolist()) - statistics.median(b[j].tolist())
        for i, j in zip(draws, others, strict=True)
    )
    found, interval = difference_of_medians(a, b, 3, paired=paired)
    assert found == statistics.median(a.tolist()) - statistics.median(b.tolist())
    assert interval == (differences[50], differences[-51])


def test_a_common_part_of_pairs_cancels() -> None:
    """Pairs that differ by a constant have a difference without spread; unpaired they have one."""
    a = 10 * random(40)
    found, interval = difference_of_medians(a + 1, a, paired=True)
    assert interval == pytest.approx((1, 1))
    assert found == pytest.approx(1)
    _, loose = difference_of_medians(a + 1, a)
    assert loose is not None
    assert loose[1] - loose[0] > 1


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    """Of 200 samples of a skewed law, 95 % of the intervals hold its median, within 3 errors."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(200, 40, dtype=torch.float64).exponential_(1, generator=generator)
    median = torch.tensor(2.0).log()
    held = 0
    for sample in samples:
        interval = median_interval(sample)
        assert interval is not None
        held += interval[0] <= median <= interval[1]
    assert abs(held / 200 - 0.95) < 3 * (0.95 * 0.05 / 200) ** 0.5


def test_values_beyond_what_was_measured_are_allowed() -> None:
    """An infinite value is a large one: ends of the interval may be infinite, never NaN."""
    values = torch.tensor([1.0, 2.0, 3.0, float("inf"), float("inf")])
    interval = median_interval(values)
    assert interval == (1.0, float("inf"))


def test_a_single_pair_has_no_interval() -> None:
    """One pair says nothing of others."""
    assert median_interval(torch.ones(1)) is None
    assert difference_of_medians(torch.ones(1), torch.zeros(3)) == (1.0, None)


def test_values_without_a_median_are_refused() -> None:
    """NaN, none, an infinite one in a difference, and pairs that are none."""
    bad = torch.tensor([1.0, float("nan")])
    with pytest.raises(NumericsError, match="hold NaN"):
        median_interval(bad)
    with pytest.raises(NumericsError, match="are none"):
        median_interval(bad[:0])
    with pytest.raises(NumericsError, match="are not all finite"):
        difference_of_medians(torch.ones(2), torch.tensor([1.0, float("inf")]))
    with pytest.raises(NumericsError, match="are none"):
        difference_of_medians(torch.ones(2), bad[:0])
    with pytest.raises(OptionError, match="2 values are paired with 3"):
        difference_of_medians(torch.ones(2), torch.ones(3), paired=True)
