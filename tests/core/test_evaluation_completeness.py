"""Completeness: the complement, and circuit against model with the same components knocked out."""

from __future__ import annotations

from typing import cast

import pytest
from evidence_oracles import FormulaRuns, adding

from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.completeness import complement, completeness, components, without
from circuitlab.wiring import Edge, Wiring

SMALL = Wiring(2, 2)
INTO = [Edge("input", name, port) for name, port in (("a0.h0", "v"), ("a0.h1", "v"), ("m0", ""))]
OUT = [Edge(name, "logits") for name in ("a0.h0", "a0.h1", "m0")]


def as_runs(runs: FormulaRuns) -> CircuitRuns:
    return cast("CircuitRuns", runs)


def backed_up(kept: frozenset[Edge]) -> list[float]:
    """`a0.h0` does the task, and so does `a0.h1` where `a0.h0` is silent; `m0` does nothing."""
    done = any({into, out} <= kept for into, out in zip(INTO[:2], OUT[:2], strict=True))
    return [float(done), 2.0 * done]


def test_parts_of_a_circuit() -> None:
    """Components leave out the ends; a component goes with the edges out of it, and no others."""
    kept = {*INTO[:2], *OUT[:2], Edge("a0.h0", "m0")}
    assert components(kept) == ["a0.h0", "a0.h1", "m0"]
    assert components({"input", "m1", "a1.h0"}) == ["a1.h0", "m1"]
    assert without(kept, ["a0.h0"]) == {*INTO[:2], OUT[1]}
    assert without({"input", "m1", "a1.h0"}, ["m1"]) == {"input", "a1.h0"}


def test_complement_is_all_else() -> None:
    """Circuit and complement make up the model; of components `input` belongs to both."""
    runs = as_runs(FormulaRuns(SMALL, backed_up))
    assert complement(runs, INTO) == frozenset(SMALL.edges) - {*INTO}
    nodes = as_runs(FormulaRuns(SMALL, lambda kept: [float(len(kept))], level="node"))
    assert complement(nodes, {"input", "m0"}) == {"input", "a0.h0", "a0.h1", "a1.h0", "a1.h1", "m1"}


def test_shares_of_a_sum() -> None:
    """Where edges add up, each knock-out leaves the sum of the weights that are left."""
    weights = {edge: 1.0 + n for n, edge in enumerate(SMALL.edges)}
    runs, kept = adding(SMALL, weights, sizes=[1.0, 3.0]), frozenset([*INTO, *OUT])
    total = sum(weights.values())
    found = completeness(as_runs(runs), kept, seed=2)
    assert found.complement.value == pytest.approx(
        sum(weight for edge, weight in weights.items() if edge not in kept) / total
    )
    assert len(found.random) > 3
    for out in (*found.random, *found.greedy):
        left = {edge: w for edge, w in weights.items() if edge.source not in out.removed}
        assert out.model == pytest.approx(sum(left.values()) / total)
        assert out.circuit == pytest.approx(sum(left[e] for e in kept if e in left) / total)
        assert out.gap == pytest.approx(abs(out.model - out.circuit))
        assert {*out.removed} <= {"a0.h0", "a0.h1", "m0"}
    assert found.worst is not None
    assert found.worst.gap == max(out.gap for out in (*found.random, *found.greedy))


def test_a_back_up_that_is_left_out_is_found() -> None:
    """A circuit without the back-up is faithful; knocking its head out shows what it lacks."""
    kept = frozenset([INTO[0], OUT[0], INTO[2], OUT[2]])
    found = completeness(as_runs(FormulaRuns(SMALL, backed_up)), kept, n_random=0)
    assert found.complement.value == 1.0
    assert found.greedy[0].removed == ("a0.h0",)
    assert (found.greedy[0].circuit, found.greedy[0].model, found.greedy[0].gap) == (0, 1, 1)
    assert len(found.greedy) == 1
    assert found.worst == found.greedy[0]


def test_with_the_back_up_there_is_no_gap() -> None:
    """A circuit that has all of it answers as the model does, whatever is knocked out."""
    found = completeness(as_runs(FormulaRuns(SMALL, backed_up)), frozenset([*INTO, *OUT]))
    assert found.complement.value == 0.0
    assert found.worst is not None
    assert found.worst.gap == 0.0


def test_components_at_level_node() -> None:
    """At level node a knock-out takes the component out of the circuit and of the model."""
    runs = FormulaRuns(SMALL, lambda kept: [float(len(kept)), 2.0 * len(kept)], level="node")
    found = completeness(as_runs(runs), frozenset({"input", "a0.h0", "m1"}), seed=1)
    assert found.complement.value == pytest.approx(5 / 7)
    for out in found.random:
        assert out.circuit == pytest.approx((3 - len(out.removed)) / 7)
        assert out.model == pytest.approx((7 - len(out.removed)) / 7)


def test_nothing_to_knock_out() -> None:
    """A circuit that goes straight from input to logits has a complement, and no knock-outs."""
    edge = Edge("input", "logits")
    runs = adding(SMALL, {edge: 1.0, OUT[0]: 1.0}, sizes=[1.0])
    found = completeness(as_runs(runs), frozenset([edge])).to_json()
    assert found["random"] == found["greedy"] == []
    assert found["worst"] is None
    assert found["complement"]["value"] == 0.5


def test_same_seed_same_knock_outs() -> None:
    """The seed decides what is knocked out; few calls run it all."""
    weights = {edge: 1.0 + n for n, edge in enumerate(SMALL.edges)}
    kept = frozenset(edge for edge in SMALL.edges if edge.port != "q")
    first, again, other = (
        completeness(as_runs(runs := adding(SMALL, weights, sizes=[1.0, 3.0])), kept, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert runs.calls <= 2 + len(other.greedy) + 1
