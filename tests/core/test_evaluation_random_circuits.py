"""Random circuits: as large, as mixed and as connected as the circuit; and its place among them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from itertools import combinations, product
from random import Random
from typing import Any, cast

import networkx as nx
import pytest
from evidence_oracles import FormulaRuns, adding

from circuitlab.errors import TaskError
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.random_circuits import random_circuits, random_control, shares
from circuitlab.wiring import Edge, Wiring

IOI = Wiring(3, 4)


def kind(wiring: Wiring, edge: Edge) -> tuple[str, str, str]:
    return wiring.component(edge.source).kind, wiring.component(edge.target).kind, edge.port


def on_paths(edges: Collection[Edge]) -> bool:
    """Whether networkx finds every edge on a path from input to logits."""
    graph = nx.DiGraph((edge.source, edge.target) for edge in edges)
    if "input" not in graph or "logits" not in graph:
        return False
    ahead = nx.descendants(graph, "input") | {"input"}
    behind = nx.ancestors(graph, "logits") | {"logits"}
    return all(edge.source in ahead and edge.target in behind for edge in edges)


def connected(wiring: Wiring, n: int, seed: int) -> frozenset[Edge]:
    """Some connected circuit, by adding whole random paths."""
    rng, edges = Random(seed), set[Edge]()
    while len(edges) < n:
        path, at = [], "input"
        while at != "logits":
            path.append(rng.choice([edge for edge in wiring.edges if edge.source == at]))
            at = path[-1].target
        edges |= {*path}
    return frozenset(edges)


def as_runs(runs: FormulaRuns) -> CircuitRuns:
    return cast("CircuitRuns", runs)


@pytest.mark.parametrize("size", [5, 20, 60])
@pytest.mark.parametrize("wiring", [IOI, Wiring(2, 4, parallel=True)], ids=["gpt2", "parallel"])
def test_random_circuits_are_like_the_circuit(wiring: Wiring, size: int) -> None:
    """As many edges of each type, every edge on a path, no two the same, and mostly other edges."""
    kept = connected(wiring, size, seed=1)
    found = random_circuits(wiring, kept, 30, seed=0)
    assert len(found.circuits) == len({*found.circuits}) == 30
    for circuit in found.circuits:
        edges = [Edge(*edge) for edge in circuit]
        assert Counter(kind(wiring, e) for e in edges) == Counter(kind(wiring, e) for e in kept)
        assert on_paths(edges)
    assert sum(len({*circuit} & kept) for circuit in found.circuits) < 0.9 * 30 * len(kept)
    assert (
        found.how == f"{len(kept)} edges, all on paths from input to logits, as many of each type"
    )


def test_circuits_are_drawn_uniformly() -> None:
    """Of the 15 circuits of a type mix each is drawn as often, by a chi-squared test."""
    wiring = Wiring(1, 3)
    kept = {
        Edge("input", "a0.h0", "q"), Edge("input", "a0.h1", "v"), Edge("a0.h0", "m0"),
        Edge("a0.h1", "logits"), Edge("m0", "logits"),
    }  # fmt: skip
    pools = [
        [e for e in wiring.edges if kind(wiring, e) == kind(wiring, one)] for one in sorted(kept)
    ]
    every = [frozenset(edges) for edges in product(*pools) if on_paths(edges)]
    assert len(every) == 15
    n = 300
    drawn = Counter(random_circuits(wiring, kept, 1, seed=i).circuits[0] for i in range(n))
    assert {*drawn} == {*every}
    squared = sum((drawn[circuit] - n / 15) ** 2 / (n / 15) for circuit in every)
    assert squared < 36.1  # 99.9 % of the chi-squared distribution with 14 degrees of freedom


def test_types_are_given_up_where_they_leave_too_few() -> None:
    """From 15 circuits no p below .05 can come: then edges of any type are drawn."""
    wiring = Wiring(1, 3)
    kept = {
        Edge("input", "a0.h0", "q"), Edge("input", "a0.h1", "v"), Edge("a0.h0", "m0"),
        Edge("a0.h1", "logits"), Edge("m0", "logits"),
    }  # fmt: skip
    found = random_circuits(wiring, kept, 40, seed=0)
    assert len(found.circuits) == 40
    assert all(len(circuit) == 5 and on_paths(map_edges(circuit)) for circuit in found.circuits)
    assert re.search(r"of any type \(with as many of each type: 1[45]\)$", found.how)


def map_edges(circuit: Collection[Any]) -> list[Edge]:
    return [Edge(*edge) for edge in circuit]


def test_all_circuits_of_a_small_model_are_found_once() -> None:
    """Where there are fewer than asked for, all of them come once, and their number is said."""
    wiring = Wiring(1, 1)
    kept = {Edge("input", "logits"), Edge("input", "m0"), Edge("m0", "logits")}
    sets = [frozenset(c) for c in combinations(wiring.edges, 3) if on_paths(c)]
    found = random_circuits(wiring, kept, 30, seed=0)
    assert {*found.circuits} == {*sets}
    assert len(found.circuits) == len(sets)
    assert f"no more than {len(sets)} were found" in found.how


def test_same_seed_same_circuits() -> None:
    """The seed decides, and nothing else: not the order of the edges."""
    kept = connected(IOI, 20, seed=3)
    first = random_circuits(IOI, sorted(kept), 5, seed=7)
    assert random_circuits(IOI, sorted(kept, reverse=True), 5, seed=7) == first
    assert random_circuits(IOI, kept, 5, seed=8) != first


def test_every_process_draws_the_same() -> None:
    """The seed decides, and not the order in which a process goes through a set of names."""
    program = (
        "from circuitlab.evaluation.random_circuits import random_circuits as draw\n"
        "from circuitlab.wiring import Edge, Wiring\n"
        "kept = {Edge('input', 'a0.h0', 'q'), Edge('a0.h0', 'm1'), Edge('m1', 'logits')}\n"
        "print([sorted(c) for c in draw(Wiring(2, 4), kept, 3).circuits])\n"
        "print([sorted(c) for c in draw(Wiring(2, 4), {'a0.h0', 'm1'}, 3, level='node').circuits])"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert told[0] == told[1] != ""


def test_empty_circuit_has_no_random_ones() -> None:
    """There is one empty circuit, and so none to compare it with."""
    found = random_circuits(IOI, set(), 10)
    assert found.circuits == []
    assert found.how == "none: the circuit is empty"


def test_whole_model_is_its_only_random_circuit() -> None:
    """A circuit of all edges is like itself alone."""
    assert random_circuits(IOI, IOI.edges, 10).circuits == [frozenset(IOI.edges)]


def test_nodes_keep_their_kinds() -> None:
    """As many heads and MLPs, `input` and `logits` as they were; all of them where they are few."""
    kept = {"input", "a0.h1", "a2.h3", "m1", "logits"}
    found = random_circuits(IOI, kept, 50, level="node", seed=0)
    assert len({*found.circuits}) == 50
    for circuit in found.circuits:
        assert {"input", "logits"} < {*circuit}
        assert Counter(str(name)[0] for name in circuit) == Counter("ialma")
    few = random_circuits(Wiring(1, 3), {"a0.h0", "a0.h1"}, 50, level="node")
    assert {*few.circuits} == {
        frozenset(two) for two in combinations(["a0.h0", "a0.h1", "a0.h2"], 2)
    }
    assert few.how == "2 heads and 0 MLPs, any; there are 3"


def test_share_is_a_ratio_of_means() -> None:
    """The share is the mean metric's, not the mean of each pair's share."""
    edge = IOI.edges[0]
    runs = adding(IOI, {edge: 1.0, IOI.edges[1]: 3.0}, sizes=[1.0, 5.0])
    assert shares(as_runs(runs), runs.metric([{edge}, set(), IOI.edges])) == [0.25, 0.0, 1.0]
    flat = adding(IOI, {}, sizes=[1.0, 5.0])
    with pytest.raises(TaskError, match="use a task with an effect"):
        shares(as_runs(flat), flat.metric([{edge}]))


def test_place_among_random_circuits() -> None:
    """Percentile, p, median and ends are those of the random circuits' own values."""
    weights = {edge: float(n % 7) for n, edge in enumerate(IOI.edges)}
    runs = adding(IOI, weights, sizes=[1.0, 2.0])
    kept = connected(IOI, 15, seed=0)
    value = sum(weights[edge] for edge in kept) / sum(weights.values())
    control = random_control(as_runs(runs), kept, value, n=60, seed=4)
    drawn = random_circuits(IOI, kept, 60, seed=4).circuits
    values = [sum(weights[e] for e in map_edges(c)) / sum(weights.values()) for c in drawn]
    assert control.values == pytest.approx(values)
    reached = sum(other > value - 1e-9 for other in values)
    assert 0 < reached < 60
    assert control.p == (1 + reached) / 61
    assert control.percentile == pytest.approx(100 * (60 - reached) / 60)
    ranked = sorted(values)
    assert control.median == pytest.approx((ranked[29] + ranked[30]) / 2)
    assert control.low == pytest.approx(ranked[1] + (59 * 0.025 - 1) * (ranked[2] - ranked[1]))
    assert control.high == pytest.approx(ranked[57] + (59 * 0.975 - 57) * (ranked[58] - ranked[57]))
    assert control.metric.shape == (60, 2)
    assert control.to_json()["n"] == 60


def test_circuits_that_do_the_same_are_no_worse() -> None:
    """Where every circuit does all of the task, none stands out: p is 1, whatever rounding says."""
    runs = FormulaRuns(IOI, lambda kept: [float(bool(kept)) * (1 + 1e-7 * (len(kept) % 3))] * 3)
    kept = connected(IOI, 10, seed=0)
    control = random_control(as_runs(runs), kept, 1.0 + 2e-7, n=20)
    assert control.p == 1.0
    assert control.percentile == 0.0


def test_a_circuit_is_no_control_of_itself() -> None:
    """Of a model with few circuits all others are run, and never the one that is tested."""
    wiring = Wiring(1, 2)
    runs = adding(wiring, dict.fromkeys(wiring.edges, 1.0), sizes=[1.0])
    kept = connected(wiring, 3, seed=0)
    drawn = random_control(as_runs(runs), kept, 0.5, n=200, seed=1).drawn.circuits
    every = random_circuits(wiring, kept, 201, seed=1).circuits
    assert frozenset(kept) in every
    assert {*drawn} == {*every} - {frozenset(kept)}


def test_no_random_circuit_no_place() -> None:
    """An empty circuit has no p and no percentile, and says why."""
    runs = adding(IOI, dict.fromkeys(IOI.edges, 1.0), sizes=[1.0])
    found = random_control(as_runs(runs), frozenset(), 0.0).to_json()
    assert found["n"] == 0
    assert found["p"] is found["percentile"] is found["median"] is None
    assert found["how"] == "none: the circuit is empty"
