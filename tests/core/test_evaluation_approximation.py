"""Approximation: agreement of scores with exact patching, on samples of every stratum."""

from __future__ import annotations

import json

import pytest
import torch
from oracles import random_gpt2
from torch import Tensor

import circuitlab
from circuitlab import EncodedTask, NumericsError, PromptPair, Task, TracedModel, edge_effects
from circuitlab.evaluation.approximation import Approximation, approximation, rank_correlation
from circuitlab.wiring import Edge, Receiver


@pytest.fixture(scope="module")
def exact() -> tuple[TracedModel, EncodedTask, Tensor]:
    """A random GPT-2, pairs of different length, and the exact effects of all of its edges."""
    torch.manual_seed(0)
    model = circuitlab.load_model(random_gpt2())
    pairs = tuple(
        PromptPair(ids, [ids[0], ids[1] + 1, *ids[2:]], [10 + n], [20 + n])
        for n, ids in enumerate(([5, 9, 3, 7, 2], [4, 8, 1], [6, 6, 2, 9]))
    )
    encoded = model.encode(Task("random", pairs))
    effects = edge_effects(model, encoded, model.wiring.edges).mean(1)
    scores = torch.zeros(len(model.wiring.sources), len(model.wiring.receivers)).double()
    for (source, target, port), effect in zip(model.wiring.edges, effects, strict=True):
        column = model.wiring.receiver_columns[Receiver(target, port)]
        scores[model.wiring.source_rows[source], column] = effect
    return model, encoded, scores


def value(model: TracedModel, scores: Tensor, edge: Edge) -> float:
    column = model.wiring.receiver_columns[Receiver(edge.target, edge.port)]
    return float(scores[model.wiring.source_rows[edge.source], column])


def test_exact_scores_agree(exact: tuple[TracedModel, EncodedTask, Tensor]) -> None:
    """Exact scores agree perfectly, their negatives not at all, and each edge's effect is right."""
    model, pairs, scores = exact
    found = approximation(model, pairs, scores, n_edges=20)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.sign == 1.0
    assert len(found.sampled) == len({one.edge for one in found.sampled}) == 20
    for one in found.sampled:
        assert one.score == value(model, scores, one.edge)
        assert one.exact == pytest.approx(one.score, rel=1e-4, abs=1e-7)
    turned = approximation(model, pairs, -scores, n_edges=20)
    assert turned.rank_correlation == pytest.approx(-1.0)
    assert turned.sign == 0.0


def test_agreement_by_brute_force(exact: tuple[TracedModel, EncodedTask, Tensor]) -> None:
    """Of noisy scores, both numbers are those of the sample, counted by hand."""
    model, pairs, scores = exact
    noisy = scores + scores.abs().mean() * torch.randn_like(scores)
    found = approximation(model, pairs, noisy, n_edges=24, seed=1)
    one = [item.score for item in found.sampled]
    other = [item.exact for item in found.sampled]
    least = 1e-6 * max(map(abs, one + other))
    right = [a * b > 0 for a, b in zip(one, other, strict=True) if abs(b) > least]
    assert len(right) >= 23
    assert found.sign == pytest.approx(sum(right) / len(right))
    ranks = [[sorted(values).index(v) for v in values] for values in (one, other)]
    squared = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    n = len(one)
    assert found.rank_correlation == pytest.approx(1 - 6 * squared / (n * (n * n - 1)))
    assert 0 < found.sign < 1


def test_strata_part_the_rank(exact: tuple[TracedModel, EncodedTask, Tensor]) -> None:
    """The top carries half of the absolute scores, with the middle 95 %; each is drawn from."""
    model, pairs, scores = exact
    found = approximation(model, pairs, scores, n_edges=15)
    sizes = sorted((abs(value(model, scores, edge)) for edge in model.wiring.edges), reverse=True)
    total = sum(sizes)
    top = next(n for n in range(len(sizes)) if sum(sizes[:n]) >= 0.5 * total)
    both = next(n for n in range(len(sizes)) if sum(sizes[:n]) >= 0.95 * total)
    expected = {"top": top, "middle": both - top, "bottom": len(sizes) - both}
    assert found.strata == expected
    weakest = {
        name: min(abs(one.score) for one in found.sampled if one.stratum == name)
        for name in found.strata
    }
    assert weakest["top"] >= sizes[top - 1]
    assert sizes[top] >= weakest["middle"] >= sizes[both - 1]
    drawn = [one.stratum for one in found.sampled]
    assert sorted(drawn.count(name) for name in found.strata)[0] >= min(5, *expected.values())


def test_a_small_stratum_leaves_its_place(exact: tuple[TracedModel, EncodedTask, Tensor]) -> None:
    """Where one edge carries all scores, the others are drawn from the bottom."""
    model, pairs, scores = exact
    one = torch.zeros_like(scores)
    one[0, 0] = 1.0
    found = approximation(model, pairs, one, n_edges=10)
    assert [item.stratum for item in found.sampled] == ["top"] + ["bottom"] * 9
    every = approximation(model, pairs, scores, n_edges=10_000)
    assert len(every.sampled) == model.wiring.n_edges


def test_same_seed_same_edges(exact: tuple[TracedModel, EncodedTask, Tensor]) -> None:
    """The seed decides which edges are patched."""
    first, again, other = (approximation(*exact, n_edges=12, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert (
        json.loads(json.dumps(first.to_json(), allow_nan=False))["sampled"][0]["stratum"] == "top"
    )


def test_ranks_with_ties() -> None:
    """Ties share their mean rank; a constant has no rank correlation."""
    one, other = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 2.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: covariance 1.125 * ..., by hand.
    a, b = torch.tensor([-1.5, 0, 0, 1.5]), torch.tensor([-1.5, 1.5, 0, 0])
    assert rank_correlation(one, other) == pytest.approx(float(a @ b / (a @ a)))
    assert rank_correlation(one, torch.ones(4)) is None


def test_nothing_but_rounding(exact: tuple[TracedModel, EncodedTask, Tensor]) -> None:
    """Scores of zero have no rank and agree in no sign; NaN is refused and named."""
    model, pairs, scores = exact
    found = approximation(model, pairs, torch.zeros_like(scores), n_edges=6)
    assert isinstance(found, Approximation)
    assert found.rank_correlation is None
    assert found.sign == 0.0
    with pytest.raises(NumericsError, match="has score nan"):
        approximation(model, pairs, scores * torch.nan)
