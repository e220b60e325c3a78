"""Combining circuits: paths by brute force, every score told by its circuit, conflicts said."""

from __future__ import annotations

import json
from itertools import pairwise, product

import networkx as nx
import pytest
from edge_circuits import NAMES, circuit_of, random_edges

import circuitlab
from circuitlab import CircuitGraph, GraphError, OptionError, join_circuits, overlay_circuits
from circuitlab.comparing import EdgeKey, kept_edges


def on_paths(edges: set[EdgeKey], at: str, *, to: bool) -> set[EdgeKey]:
    """Edges on paths to, or from, a component, by walking every path there is."""
    graph = nx.DiGraph()
    graph.add_edges_from(edge[:2] for edge in edges)
    found: set[EdgeKey] = set()
    for other in NAMES:
        ends = (other, at) if to else (at, other)
        if all(end in graph for end in ends) and other != at:
            for path in nx.all_simple_paths(graph, *ends):
                steps = set(pairwise(path))
                found |= {edge for edge in edges if edge[:2] in steps}
    return found


# --- joined ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "at"), list(product(range(6), ["a0.h1", "m0"])))
def test_joined_edges_are_those_on_paths_through_the_component(seed: int, at: str) -> None:
    """What reaches it in the first and leaves it in the second, each with its own data."""
    first, second = random_edges(seed, 0.7), random_edges(seed + 50, 0.7)
    before = on_paths(set(first), at, to=True)
    after = on_paths(set(second), at, to=False)
    assert before
    assert after
    joined = join_circuits(circuit_of(first), circuit_of(second), at=at)
    assert set(joined.edges(keys=True)) == before | after
    for edge in before:
        assert joined.edges[edge] == {"score": first[edge], "from": "first"}
    for edge in after:
        assert joined.edges[edge] == {"score": second[edge], "from": "second"}


def test_joined_keeps_the_provenance_of_both() -> None:
    """Scores say whose they are, shared facts stay, and the file holds it all."""
    at = "m0"
    first = circuit_of({("input", at, ""): -1.0}, model="m", n_layers=2, task="x", score="unit one")
    second = circuit_of(
        {(at, "logits", ""): 2.0}, model="m", n_layers=2, task="y", score="unit two"
    )
    joined = join_circuits(first, second, at=at)
    assert joined.graph["score"] == "before m0: unit one; after it: unit two"
    assert joined.graph["joined"] == {"at": at, "first": first.graph, "second": second.graph}
    assert joined.graph["model"] == "m"
    assert "task" not in joined.graph
    assert CircuitGraph.from_json(joined.to_json()).graph == joined.graph


def test_effects_that_are_not_kept_are_not_joined() -> None:
    """A measured effect outside a circuit is no part of what reaches a component."""
    first = circuit_of({("input", "m0", ""): -1.0})
    first.add_effect("a0.h0", "m0", 9.0, kept=False)
    joined = join_circuits(first, circuit_of({("m0", "logits", ""): 2.0}), at="m0")
    assert set(joined) == {"input", "m0", "logits"}


@pytest.mark.parametrize(
    ("at", "fact"),
    [
        ("m7", "'m7' is not in the first circuit"),
        ("a0.h0", "no edge of the first circuit reaches 'a0.h0'"),
        ("logits", "no edge of the second circuit leaves 'logits'"),
    ],
)
def test_joining_where_nothing_meets_is_refused(at: str, fact: str) -> None:
    """The message says which circuit has nothing there."""
    circuit = circuit_of({("input", "m0", ""): -1.0, ("m0", "logits", ""): 2.0})
    with pytest.raises(GraphError, match=fact):
        join_circuits(circuit, circuit, at=at)


def test_edges_that_run_in_a_circle_are_refused() -> None:
    """Two circuits in which the same components run in another order do not fit."""
    first = CircuitGraph()
    second = CircuitGraph()
    for circuit in (first, second):
        for name in ("u", "v", "w"):
            circuit.add_component(name, kind="feature", layer=0)
    first.add_effect("u", "w", 1.0)
    second.add_effect("w", "u", 1.0)
    with pytest.raises(GraphError, match=r"do not fit together: .*cycle"):
        join_circuits(first, second, at="w")
    with pytest.raises(GraphError, match=r"do not fit together: .*cycle"):
        overlay_circuits({"a": first, "b": second})


# --- overlaid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_overlay_by_brute_force(seed: int) -> None:
    """Score, keepers, agreement and signs of every edge, from the scores alone."""
    parts = {name: random_edges(seed * 3 + i, 0.4) for i, name in enumerate(["x", "y", "z"])}
    overlay = overlay_circuits({name: circuit_of(edges) for name, edges in parts.items()})
    union = set().union(*parts.values())
    assert set(overlay.edges(keys=True)) == union
    for edge in union:
        scores = {name: edges[edge] for name, edges in parts.items() if edge in edges}
        data = overlay.edges[edge]
        assert data["scores"] == scores
        assert data["kept_by"] == list(scores)
        assert data["agreement"] == len(scores) / 3
        largest = {name: max(abs(s) for s in edges.values()) for name, edges in parts.items()}
        mean = sum(score / largest[name] for name, score in scores.items()) / 3
        assert data["score"] == pytest.approx(mean)
        signs = {score > 0 for score in scores.values()}
        assert data.get("signs_agree") == (len(signs) == 1 if len(scores) > 1 else None)
    whole = sum(all(edge in edges for edges in parts.values()) for edge in union)
    assert overlay.graph["findings"]["kept by all"] == f"{whole} of {len(union)} edges"


def test_a_score_that_is_not_kept_is_told_and_does_not_count() -> None:
    """An analysis that measured an edge and left it out does not keep it."""
    edge = ("input", "m0", "")
    second = circuit_of({("m0", "logits", ""): 1.0})
    second.add_effect("input", "m0", 0.25, kept=False)
    data = overlay_circuits({"a": circuit_of({edge: -2.0}), "b": second}).edges[edge]
    assert data["scores"] == {"a": -2.0, "b": 0.25}
    assert data["kept_by"] == ["a"]
    assert data["signs_agree"] is False
    assert data["score"] == -0.5


def test_annotations_are_merged_and_conflicts_said() -> None:
    """What one circuit says stands; where two differ the first stands, with both beside it."""
    edges = {("input", "m0", ""): 1.0}
    first, second = circuit_of(edges), circuit_of(edges)
    first.nodes["m0"].update(role="mover", only=1)
    second.nodes["m0"].update(role="copier", other=2, role_note=None)
    data = overlay_circuits({"a": first, "b": second}).nodes["m0"]
    assert data == {
        "kind": "mlp", "layer": 0, "role": "mover", "only": 1, "other": 2, "role_note": None,
        "conflicts": {"role": {"a": "mover", "b": "copier"}},
    }  # fmt: skip


def test_a_component_of_two_kinds_is_refused() -> None:
    """The same name for two things cannot be one component."""
    edges = {("input", "m0", ""): 1.0}
    first, second = circuit_of(edges), circuit_of(edges)
    second.nodes["m0"]["kind"] = "head"
    with pytest.raises(GraphError, match="'m0' has kind 'mlp' in a, 'head' in b"):
        overlay_circuits({"a": first, "b": second})


@pytest.mark.parametrize(
    ("key", "values"), [("n_layers", (2, 3)), ("model", ("x", "y")), ("model_revision", ("1", "2"))]
)
def test_circuits_of_different_models_are_refused(key: str, values: tuple[object, object]) -> None:
    """Joined or overlaid: the message names what differs."""
    edges = {("input", "m0", ""): 1.0, ("m0", "logits", ""): 1.0}
    first, second = (circuit_of(edges, **{key: value}) for value in values)
    for combine in (
        lambda: overlay_circuits({"a": first, "b": second}),
        lambda: join_circuits(first, second, at="m0"),
    ):
        with pytest.raises(GraphError, match=rf"different .*{key} is {values[0]!r}"):
            combine()


def test_one_circuit_is_no_overlay() -> None:
    """Two are needed."""
    with pytest.raises(OptionError, match="1 circuit to overlay"):
        overlay_circuits({"a": CircuitGraph()})


def test_overlay_of_three_analyses() -> None:
    """Gradient, exact and search circuits of a gate, whose table a file and a plot hold."""
    circuits = {
        "eap-ig": circuitlab.build_circuit("gate-and"),
        "exact": circuitlab.build_circuit("gate-and", analysis="path-patching"),
        "acdc": circuitlab.build_circuit("gate-and", analysis="acdc"),
    }
    overlay = overlay_circuits(circuits)
    again = CircuitGraph.from_json(overlay.to_json())
    assert again.graph["overlay"].keys() == circuits.keys()
    (table,) = circuitlab.panels_of(overlay)
    assert json.loads(json.dumps(overlay.graph["plots"]))[0]["header"][1:4] == list(circuits)
    assert table.title == "Edges by circuit"
    whole = set.intersection(*(set(kept_edges(c)) for c in circuits.values()))
    assert {e for e in again.edges(keys=True) if again.edges[e]["agreement"] == 1.0} == whole
    assert whole
