"""Faithfulness and its interval: closed forms, SciPy's numbers, coverage, known circuits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from circuitlab import Ablation, TracedModel, load_model, zoo
from circuitlab.bootstrap import bca_mean, bca_ratio
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.faithfulness import faithfulness

ABOVE = [0.3, 1.9, 2.4, 0.2, 5.1, 0.9, 1.1, 0.6, 3.3, 0.4, 0.8, 7.5]
BELOW = [1.1, 2.0, 2.9, 0.7, 6.3, 1.6, 1.2, 0.9, 4.1, 1.3, 0.9, 8.8]
HAND = [name for name, entry in zoo.MODELS.items() if entry.kind == "hand"]


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bca_is_that_of_scipy() -> None:
    """SciPy 1.17.1's ``bootstrap`` with method BCa and 400,000 paired resamples gives the same."""
    ratio = bca_ratio(tensor(ABOVE), tensor(BELOW), resamples=100_000)
    mean = bca_mean(tensor(ABOVE), resamples=100_000)
    assert ratio == pytest.approx((0.6507, 0.8322), abs=0.003)
    assert mean == pytest.approx((1.108, 3.721), abs=0.03)
    # The percentile interval of that mean is [0.958, 3.367].
    assert bca_mean(-tensor(ABOVE), resamples=100_000) == pytest.approx((-3.721, -1.108), abs=0.03)


def test_bca_of_no_information() -> None:
    """One pair, equal resamples and nothing to divide by have no interval."""
    assert bca_mean(tensor([3.0])) is None
    assert bca_mean(tensor([3.0, 3.0, 3.0])) is None
    assert bca_ratio(tensor([0.1, 0.2, 0.3]), tensor([0.3, 0.6, 0.9])) is None
    assert bca_ratio(tensor([1.0, 2.0]), tensor([0.0, 1.0])) is None


def test_bca_is_repeatable() -> None:
    """The seed draws the resamples, and their number changes little."""
    first, again, other = (bca_mean(tensor(ABOVE), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert other == pytest.approx(first, abs=0.3)
    assert bca_mean(tensor(ABOVE), resamples=500) != first


def test_bca_covers_the_truth() -> None:
    """Of 400 skewed samples of 40 pairs, the interval holds the true ratio of means in 95 %."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 400, 40, generator=generator, dtype=torch.float64)
    below = (0.5 * drawn[0]).exp()
    above = below * (0.6 + 0.3 * drawn[1])
    covered = 0
    for seed, (top, bottom) in enumerate(zip(above, below, strict=True)):
        low, high = bca_ratio(top, bottom, seed=seed, resamples=1000) or (0.0, 0.0)
        covered += low <= 0.6 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_ratio_of_means() -> None:
    """(m(C) - m(empty)) / (m(M) - m(empty)), each m a mean: not the mean of the pairs' ratios."""
    kept, whole, empty = tensor([2, 9]), tensor([3, 11]), tensor([1, 1])
    found = faithfulness(kept, whole, empty)
    assert found.value == pytest.approx(4.5 / 6)
    assert (found.metric, found.whole, found.empty, found.n_pairs) == (5.5, 7.0, 1.0, 2)
    assert faithfulness(empty, whole, empty).value == 0
    assert faithfulness(whole, whole, empty).value == 1
    assert faithfulness(2 * whole - empty, whole, empty).value == 2
    # A metric that the task lowers is a behaviour too.
    assert faithfulness(-kept, -whole, -empty).value == found.value


def test_interval_is_of_whole_pairs() -> None:
    """The interval is that of the ratio, resampled over pairs."""
    empty = tensor([0.5] * 12)
    found = faithfulness(tensor(ABOVE) + 0.5, tensor(BELOW) + 0.5, empty, seed=3, resamples=4000)
    expected = bca_ratio(tensor(ABOVE), tensor(BELOW), seed=3, resamples=4000)
    assert found.interval == pytest.approx(expected)
    assert found.reason == ""
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["interval"] == list(found.interval or ())
    assert document["value"] == found.value


def test_nothing_to_divide_by() -> None:
    """Where the effect may be 0 there is no value, and the reason says the effect."""
    whole = tensor([1.0, -1.2, 0.8, -0.7, 0.3])
    found = faithfulness(whole, whole, torch.zeros_like(whole))
    assert found.value is found.interval is None
    assert found.reason.startswith("the model's metric less that of the empty circuit is 0.04 [-")
    assert found.reason.endswith("], which may be 0")
    same = faithfulness(tensor([1.0]), tensor([2.0]), tensor([2.0]))
    assert same.value is None
    assert json.dumps(same.to_json(), allow_nan=False)


def test_no_interval() -> None:
    """One pair, or the same share in every pair, leaves a value alone, and says why."""
    one = faithfulness(tensor([1.0]), tensor([2.0]), tensor([0.0]))
    assert (one.value, one.interval, one.reason) == (0.5, None, "one pair has no interval")
    same = faithfulness(tensor([1.0, 2.0]), tensor([2.0, 4.0]), tensor([0.0, 0.0]))
    assert (same.value, same.reason) == (0.5, "all pairs give the same share")
    assert same.interval is None


def runs_of(name: str, ablation: Ablation) -> tuple[TracedModel, CircuitRuns]:
    model = load_model(name)
    task = next(task for task in zoo.tasks() if task.name == name)
    return model, CircuitRuns(model, model.encode(task), ablation=ablation)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
@pytest.mark.parametrize("name", HAND)
def test_known_circuits(name: str, ablation: Ablation) -> None:
    """The mechanism that was compiled does all of the task, whatever the rest carries."""
    _, runs = runs_of(name, ablation)
    found = runs.metric([zoo.known_edges(name), ()])
    assert faithfulness(found[0], runs.whole, runs.empty).value == pytest.approx(1, abs=1e-5)
    assert faithfulness(found[1], runs.whole, runs.empty).value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", HAND)
def test_circuits_of_single_effects(name: str) -> None:
    """Edges that do something alone are enough against the corrupt prompt, but not for OR.

    Either bit alone keeps the answer of ``gate-or``, so no edge of a bit has an effect alone.
    """
    _, runs = runs_of(name, "counterfactual")
    known = zoo.known_edges(name, sense="effective")
    value = faithfulness(runs.metric([known])[0], runs.whole, runs.empty).value
    assert value == pytest.approx(0 if name == "gate-or" else 1, abs=1e-5)
