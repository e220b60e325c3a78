"""Metrics equal their definitions, written out for one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitlab import TaskError
from circuitlab.metrics import METRICS, Answers, find_metric

VOCAB = 7
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3, unique=True)


def answers(rows: list[tuple[list[int], list[int]]]) -> Answers:
    """Rows of right and wrong ids, padded with -1."""
    sides = []
    for side in zip(*rows, strict=True):
        width = max(map(len, side))
        sides.append(torch.tensor([row + [-1] * (width - len(row)) for row in side]))
    return Answers(*sides)


def softmax(row: Tensor) -> list[float]:
    exps = [math.exp(value) for value in row.tolist()]
    return [value / sum(exps) for value in exps]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_metrics_are_their_definitions(rows: list[tuple[list[int], list[int]]], seed: int) -> None:
    """Each prompt's number is the formula's, however many answers its neighbours have."""
    generator = torch.Generator().manual_seed(seed)
    logits, clean = 2 * torch.randn(2, len(rows), VOCAB, generator=generator, dtype=torch.float64)
    found = {n: m(logits, answers(rows), clean).tolist() for n, m in METRICS.items()}
    for row, (right, wrong) in enumerate(rows):
        values, p, q = logits[row].tolist(), softmax(logits[row]), softmax(clean[row])
        expected = {
            "logit-difference": mean([values[i] for i in right]) - mean([values[i] for i in wrong]),
            "answer-log-prob": math.log(sum(p[i] for i in right)),
            "kl-divergence": -sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        }
        assert set(expected) == set(METRICS)
        for name, value in expected.items():
            assert abs(found[name][row] - value) < 1e-12, name


@pytest.mark.parametrize("name", sorted(METRICS))
def test_higher_is_more_of_the_task(name: str) -> None:
    """Raising the right answer's logit from the clean distribution's side never lowers a metric."""
    given_answers = answers([([1], [2])])
    clean = torch.tensor([[0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    away = torch.zeros(1, VOCAB)
    metric = METRICS[name]
    assert metric(clean, given_answers, clean) > metric(away, given_answers, clean)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_gradient_is_the_slope(name: str) -> None:
    """Metrics are differentiable: autograd agrees with finite differences."""
    generator = torch.Generator().manual_seed(3)
    logits, clean = torch.randn(2, 3, VOCAB, generator=generator, dtype=torch.float64)
    given_answers = answers([([1], [2]), ([0, 3], [4]), ([5], [6, 1])])
    assert torch.autograd.gradcheck(
        lambda x: METRICS[name](x, given_answers, clean), logits.requires_grad_(True)
    )


def test_kl_divergence_at_the_clean_run() -> None:
    """It is 0 there, its largest value, and so is its gradient."""
    clean = torch.randn(2, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = clean.clone().requires_grad_(True)
    value = METRICS["kl-divergence"](logits, answers([([0], [1])] * 2), clean)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert float(value.detach().abs().max()) < 1e-15
    assert float(gradient.abs().max()) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    """Logits of a half-precision model lose nothing more in the metric."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    given_answers = answers([([0], [1])] * 2)
    for metric in METRICS.values():
        value = metric(logits, given_answers, logits.flip(0))
        assert value.dtype == torch.float32
        wide = metric(logits.double(), given_answers, logits.flip(0).double())
        assert float((value - wide).abs().max()) < 1e-5


def test_unknown_metric_lists_metrics() -> None:
    """A name that is not there is answered with those there are; each of them is found."""
    with pytest.raises(TaskError, match="metric 'f1' does not exist; metrics are") as caught:
        find_metric("f1")
    for name in str(caught.value).rpartition("metrics are ")[2].split(", "):
        assert find_metric(name).name == name
