"""Rates of growth: regressions, intervals and means over tokens, against numpy and tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from circuitlab_attention_heads.growth import TokenNorms, growth_of_tokens, growth_rate, t_quantile

from circuitlab import ratio_interval

EXACT = {"rel": 1e-10, "abs": 1e-12}


@pytest.mark.parametrize("n_layers", [3, 4, 12, 49])
def test_a_rate_is_that_of_a_linear_regression(n_layers: int) -> None:
    """numpy's fit of log norms and its standard error, with a gap where a layer has no norm."""
    generator = np.random.default_rng(n_layers)
    norms = (1.1 ** np.arange(n_layers) * np.exp(generator.normal(0, 0.2, n_layers))).tolist()
    x, y = np.arange(n_layers), np.log(norms)
    if n_layers > 3:
        norms[2] = None
        x, y = np.delete(x, 2), np.delete(y, 2)
    (slope, offset), covariance = np.polyfit(x, y, 1, cov="unscaled")
    left = ((y - offset - slope * x) ** 2).sum()
    error = math.sqrt(covariance[0, 0] * left / (len(x) - 2))
    rate = growth_rate(norms)
    assert rate is not None
    assert rate.interval is not None
    assert rate.factor == pytest.approx(math.exp(slope), **EXACT)
    half = t_quantile(len(x) - 2) * error
    bounds = (math.exp(slope - half), math.exp(slope + half))
    assert rate.interval == pytest.approx(bounds, **EXACT)
    assert rate.fit == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, **EXACT)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (10, 2.2281),
        (47, 2.0117),
        (120, 1.9799),
    ],
)
def test_quantiles_of_t_are_those_of_the_table(freedom: int, quantile: float) -> None:
    """Two-sided 95 %, as textbooks print them; and by integrating the density."""
    found = t_quantile(freedom)
    assert found == pytest.approx(quantile, abs=5e-5)
    x = np.linspace(-found, found, 200_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    density = scale / math.sqrt(freedom * math.pi) * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-8)


def test_few_layers_have_no_interval() -> None:
    """A line through two layers always fits; through one there is none."""
    assert growth_rate([2.0]) is growth_rate([None, 3.0, 0.0]) is None
    rate = growth_rate([2.0, 3.0])
    assert rate is not None
    assert (rate.factor, rate.interval, rate.fit) == (pytest.approx(1.5), None, None)


def test_intervals_are_over_different_prompts() -> None:
    """Tokens of a prompt are drawn together; a slope of means is the mean of tokens' slopes."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 2, 4, 1, 5, 3, 2, 6)
    rows = [row for row in range(9) if row != 1]
    prompts = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
    norms = torch.rand(4, len(prompts), dtype=torch.float64, generator=generator) + 0.5
    found = growth_of_tokens(norms, prompts, seed=3)
    counts = torch.tensor(lengths)
    slopes = np.polyfit(np.arange(4), norms.log().numpy(), 1)[0]
    assert found.rate is not None
    told = [*found.bounds, found.rate.interval]
    for values, bounds in zip([*norms.log().numpy(), slopes], told, strict=True):
        sums = torch.tensor([values[(prompts == row).numpy()].sum() for row in rows])
        expected = ratio_interval(sums, counts, seed=3)
        assert expected is not None
        assert bounds == pytest.approx([math.exp(end) for end in expected], **EXACT)
    alone = growth_of_tokens(norms, torch.zeros_like(prompts))
    assert alone.bounds == [None] * 4
    assert alone.rate is not None
    assert (alone.rate.factor, alone.rate.interval) == (found.rate.factor, None)


def test_tokens_without_a_write_are_left_out() -> None:
    """Norms of 0 have no logarithm: a place where all are 0 has no mean, a token with a 0 none."""
    norms = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [4.0, 8.0, 0.0]]).double()
    found = growth_of_tokens(norms, torch.tensor([0, 1, 2]))
    assert found.means == [pytest.approx(2**0.5), None, pytest.approx(32**0.5)]
    assert found.bounds[1] is None
    assert found.rate is not None
    assert found.rate.factor == pytest.approx(2)


def test_cosines_are_of_writes_alone() -> None:
    """A token at which nothing is written has no direction; a layer that never writes none."""
    norms = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    cosines = torch.tensor([[0.5, 0.0, 0.1], [0.0, 0.0, 0.0]])
    none = torch.zeros(2, 3)
    tokens = TokenNorms(torch.ones(3, 3), norms, none, cosines, none, torch.zeros(1, 3))
    assert tokens.cosines("attention") == [pytest.approx(0.3), None]
    assert tokens.cosines("mlp") == [None, None]
