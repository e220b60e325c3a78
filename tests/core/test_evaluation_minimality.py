"""Minimality: what each part's removal costs, and which parts do nothing, by formulas."""

from __future__ import annotations

from typing import cast

import pytest
from evidence_oracles import FormulaRuns, adding

from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.minimality import minimality
from circuitlab.wiring import Edge, Wiring

SMALL = Wiring(2, 2)
INTO = [Edge("input", name, port) for name, port in (("a0.h0", "v"), ("a0.h1", "v"), ("m0", ""))]
OUT = [Edge(name, "logits") for name in ("a0.h0", "a0.h1", "m0")]


def as_runs(runs: FormulaRuns) -> CircuitRuns:
    return cast("CircuitRuns", runs)


def test_drops_of_a_sum() -> None:
    """Where edges add up, an edge's drop is its weight, a component's that of all out of it."""
    weights = {edge: float(n) for n, edge in enumerate([*INTO, *OUT], start=-1)}
    weights[Edge("a1.h0", "logits")] = 4.0
    total = sum(weights.values())
    found = minimality(as_runs(adding(SMALL, weights, sizes=[1.0, 2.0])), frozenset([*INTO, *OUT]))
    drops = {part.name: part.drop for part in found.edges}
    assert drops == pytest.approx(
        {
            "input → a0.h0:v": -1 / total, "input → a0.h1:v": 0.0, "input → m0": 1 / total,
            "a0.h0 → logits": 2 / total, "a0.h1 → logits": 3 / total, "m0 → logits": 4 / total,
        }
    )  # fmt: skip
    assert [part.name for part in found.components] == ["m0", "a0.h1", "a0.h0"]
    assert [part.drop for part in found.components] == pytest.approx([n / total for n in (4, 3, 2)])
    assert [part.name for part in found.edges if part.idle] == ["input → a0.h1:v"]
    assert found.whole == pytest.approx(9 / total) == found.without_idle


def test_interval_of_a_drop() -> None:
    """A drop that differs between pairs has an interval around it, one that does not a point."""
    even, odd = OUT[0], OUT[1]

    def formula(kept: frozenset[Edge]) -> list[float]:
        return [(even in kept) + size * (odd in kept) for size in (0.0, 1.0, 2.0, 5.0)]

    found = minimality(as_runs(FormulaRuns(SMALL, formula)), frozenset([even, odd]))
    parts = {part.name: part for part in found.edges}
    low, high = parts["a0.h1 → logits"].interval or (0, 0)
    assert low < parts["a0.h1 → logits"].drop < high
    assert parts["a0.h0 → logits"].interval == pytest.approx((1 / 3, 1 / 3))
    alone = minimality(as_runs(adding(SMALL, {even: 1.0}, sizes=[1.0])), frozenset([even]))
    assert alone.edges[0].interval is None


def test_parts_that_stand_in_for_one_another() -> None:
    """Either of two heads does: no edge is missed alone, all are together, and contexts show it."""

    def formula(kept: frozenset[Edge]) -> list[float]:
        done = any({into, out} <= kept for into, out in zip(INTO[:2], OUT[:2], strict=True))
        return [float(done), 2.0 * done]

    kept = frozenset([*INTO, *OUT])
    found = minimality(as_runs(FormulaRuns(SMALL, formula)), kept, n_contexts=12, seed=3)
    assert all(part.idle and part.drop == 0 for part in found.edges)
    assert (found.whole, found.without_idle) == (1.0, 0.0)
    parts = {part.name: part for part in found.components}
    assert {name: part.drop for name, part in parts.items()} == dict.fromkeys(parts, 0.0)
    assert parts["a0.h0"].largest == parts["a0.h1"].largest == 1.0
    assert [name for name, part in parts.items() if part.idle] == ["m0"]


def test_level_node() -> None:
    """At level node there are components alone, and the idle ones among them are left out."""

    def formula(kept: frozenset[str]) -> list[float]:
        return [1.0 * ("a0.h0" in kept) + 3.0 * ("m1" in kept)]

    runs = FormulaRuns(SMALL, formula, level="node")
    found = minimality(as_runs(runs), frozenset({"input", "a0.h0", "a1.h1", "m1"}))
    assert [(part.name, part.drop) for part in found.components] == [
        ("m1", 0.75), ("a0.h0", 0.25), ("a1.h1", 0.0),
    ]  # fmt: skip
    assert found.edges == ()
    assert (found.whole, found.without_idle) == (1.0, 1.0)
    assert [part["idle"] for part in found.to_json()["components"]] == [False, False, True]


def test_few_calls() -> None:
    """All removals run in three calls."""
    runs = adding(SMALL, dict.fromkeys(SMALL.edges, 1.0), sizes=[1.0])
    minimality(as_runs(runs), frozenset(SMALL.edges))
    assert runs.calls <= 3
