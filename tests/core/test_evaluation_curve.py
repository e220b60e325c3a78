"""Curves of faithfulness against circuits chosen and areas summed in another way."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from random_tasks import random_task

from circuitlab import (
    CircuitGraph,
    GraphError,
    NumericsError,
    OptionError,
    Task,
    edge_effects,
    load_model,
)
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.curve import GRID, faithfulness_curve
from circuitlab.evaluation.kept import kept_edges
from circuitlab.selection import circuit_of


@pytest.fixture(scope="module")
def runs() -> CircuitRuns:
    """On a random GPT-2 of 46 edges, pairs whose corrupt prompts lower the metric."""
    model = load_model((oracles.random_gpt2(2, 2, 16, seed=3), None))
    drawn = random_task([6, 3, 5, 6]).pairs
    clean, corrupt = (
        model.run(side).logits[:, -1]
        for side in ([pair.clean for pair in drawn], [pair.corrupt for pair in drawn])
    )
    more = clean - corrupt
    ends = zip(drawn, more.argmax(-1).tolist(), more.argmin(-1).tolist(), strict=True)
    pairs = tuple(
        replace(pair, answers=(right,), wrong_answers=(wrong,)) for pair, right, wrong in ends
    )
    return CircuitRuns(model, model.encode(Task("lowered", pairs)))


@pytest.fixture(scope="module")
def scores(runs: CircuitRuns) -> torch.Tensor:
    """Effects of single edges, rounded so that some are equal."""
    wiring = runs.model.wiring
    table = torch.zeros(len(wiring.sources), len(wiring.receivers), dtype=torch.float64)
    effects = edge_effects(runs.model, runs.pairs, wiring.edges).mean(1).round(decimals=1)
    for (source, target, port), effect in zip(wiring.edges, effects, strict=True):
        place = [tuple(receiver) for receiver in wiring.receivers].index((target, port))
        table[wiring.sources.index(source), place] = effect
    return table


def share(runs: CircuitRuns, circuit: CircuitGraph) -> float:
    """Ratio of means of the edges of a circuit."""
    metric = runs.metric([kept_edges(circuit, runs.model.wiring)])[0]
    return float((metric - runs.empty).mean() / (runs.whole - runs.empty).mean())


def test_circuits_of_the_strongest(runs: CircuitRuns, scores: torch.Tensor) -> None:
    """Each point is the circuit that a trace would keep: strongest first, ties by name."""
    wiring = runs.model.wiring
    curve = faithfulness_curve(runs, scores)
    assert curve.fractions == GRID
    assert curve.n_edges == tuple(int(part * wiring.n_edges) for part in GRID)
    assert curve.n_edges[-1] == wiring.n_edges
    full = circuit_of(wiring, scores)
    expected = [share(runs, full.top(n)) if n else 0.0 for n in curve.n_edges]
    assert curve.faithfulness == pytest.approx(expected, abs=1e-9)
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-9)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-9)
    assert len(set(curve.faithfulness)) >= 5
    assert curve.rule.startswith("edges of largest absolute score first")


def test_helping_edges_first(runs: CircuitRuns, scores: torch.Tensor) -> None:
    """By the other rule the lowest scores come first, which is another curve."""
    wiring = runs.model.wiring
    curve = faithfulness_curve(runs, scores, rule="helping", grid=(0.3, 0.8))
    # Shifted until all help, the strongest are the lowest.
    lowered = circuit_of(wiring, scores.double() - 100)
    expected = [share(runs, lowered.top(n)) for n in curve.n_edges]
    assert curve.faithfulness == pytest.approx(expected, abs=1e-9)
    other = faithfulness_curve(runs, scores, grid=(0.3, 0.8))
    assert abs(other.points[1].metric - curve.points[1].metric) > 0.01
    assert "help most" in curve.rule


def test_areas(runs: CircuitRuns, scores: torch.Tensor) -> None:
    """CPR and CMD are areas by trapezoids on a linear axis; together at least the axis's length."""
    curve = faithfulness_curve(runs, scores)
    x, f = (torch.tensor(y, dtype=torch.float64) for y in (curve.fractions, curve.faithfulness))
    assert curve.cpr == pytest.approx(float(torch.trapezoid(f, x)), abs=1e-12)
    assert curve.cmd == pytest.approx(float(torch.trapezoid((1 - f).abs(), x)), abs=1e-12)
    assert (curve.cpr or 0) + (curve.cmd or 0) >= GRID[-1] - GRID[0] - 1e-12
    document = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    assert document["cpr"] == curve.cpr
    assert [point["value"] for point in document["points"]] == curve.faithfulness


def test_scores_of_a_circuit(runs: CircuitRuns, scores: torch.Tensor) -> None:
    """A circuit with a score of every edge stands for the table of its scores."""
    full = circuit_of(runs.model.wiring, scores)
    assert faithfulness_curve(runs, full).to_json() == faithfulness_curve(runs, scores).to_json()
    with pytest.raises(GraphError, match=r"no score for 6 of 46 edges.*--top all"):
        faithfulness_curve(runs, full.top(40))


def test_entries_that_are_no_edge(runs: CircuitRuns, scores: torch.Tensor) -> None:
    """What stands in the table where there is no edge is not looked at."""
    table = scores.clone()
    table[-1, 0] = torch.nan
    again = faithfulness_curve(runs, table)
    assert again.faithfulness == faithfulness_curve(runs, scores).faithfulness


def test_nothing_to_keep() -> None:
    """Where model and empty circuit do not differ, points have reasons and areas no value."""
    model = load_model((oracles.random_gpt2(1, 2, 16), None))
    pairs = model.encode(random_task([3, 4], "kl-divergence"))
    runs = CircuitRuns(model, pairs)
    runs.empty = runs.whole
    curve = faithfulness_curve(runs, torch.ones(4, 8), grid=(0.5, 1.0))
    assert curve.faithfulness == [None, None]
    assert curve.cpr is curve.cmd is None
    assert all(point.reason for point in curve.points)
    assert json.dumps(curve.to_json(), allow_nan=False)


def test_what_has_no_curve(runs: CircuitRuns, scores: torch.Tensor) -> None:
    """Wrong rules, grids, levels, shapes and scores are named."""

    def refused(error: type[Exception], words: str, *given: Any, **how: Any) -> None:
        with pytest.raises(error, match=words):
            faithfulness_curve(*(given or (runs, scores)), **how)

    refused(OptionError, "rule 'signed' does not exist; use absolute or helping", rule="signed")
    for grid in ((), (0.5, 0.2), (0.0, 1.0), (0.5, 1.5)):
        refused(OptionError, "give increasing shares", grid=grid)
    nodes = CircuitRuns(runs.model, runs.pairs, level="node")
    refused(OptionError, "level node cannot take single edges", nodes, scores)
    refused(GraphError, r"shape \[2, 3\]; give \[n_sources, n_receivers\]", runs, torch.ones(2, 3))
    broken = scores.clone()
    broken[0, 1] = torch.inf
    refused(NumericsError, "edge input->a0.h1<q> has score inf", runs, broken)
