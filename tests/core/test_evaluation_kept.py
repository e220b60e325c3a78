"""What a circuit keeps: edges and components of the model, and what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuitlab import CircuitGraph, GraphError, build_circuit, read_circuit, write_circuit
from circuitlab.evaluation.kept import kept_edges, kept_nodes
from circuitlab.wiring import Edge, Wiring

WIRING = Wiring(2, 2)


def circuit(effects: list[tuple[Any, ...]], **graph: Any) -> CircuitGraph:
    """Effects are source, target, port and data."""
    made = CircuitGraph(**graph)
    for source, target, port, data in effects:
        for name in (source, target):
            kinds = {
                "a": "head",
                "m": "mlp",
                "i": "input",
                "l": "logits",
                "g": "gate",
                "c": "cluster",
            }
            if name not in made:
                made.add_component(name, kind=kinds[name[0]], layer=0)
        made.add_effect(source, target, -1.0, port=port, **data)
    return made


PLAIN = [
    ("input", "a0.h1", "k", {}),
    ("a0.h1", "a1.h0", "q", {"exact": -1.0}),
    ("input", "m0", "", {"kept": False}),
    ("m0", "logits", "", {"kept": True}),
]


def test_edges() -> None:
    """Every effect is an edge, unless it says that it is not kept."""
    expected = {("input", "a0.h1", "k"), ("a0.h1", "a1.h0", "q"), ("m0", "logits", "")}
    found = kept_edges(circuit(PLAIN), WIRING)
    assert found == expected
    assert all(isinstance(edge, Edge) for edge in found)
    assert kept_edges(CircuitGraph(), WIRING) == kept_nodes(CircuitGraph(), WIRING) == frozenset()
    assert kept_edges(circuit([("m0", "m1", "", {"kept": False})]), WIRING) == frozenset()


def test_nodes_of_edges() -> None:
    """A component is kept with an edge that is; the logits write nothing."""
    assert kept_nodes(circuit(PLAIN), WIRING) == {"input", "a0.h1", "a1.h0", "m0"}


def test_effects_of_other_kinds() -> None:
    """Total effects, paths, gates and clusters are no edges of the model."""
    others = [
        ("a0.h0", "logits", "", {"kind": "total"}),
        ("input", "a1.h1", "v", {"kind": "path"}),
        ("a0.h0", "gate1", "", {}),
        ("gate1", "m0", "", {}),
        ("cluster1", "logits", "", {}),
    ]
    assert kept_edges(circuit(PLAIN + others), WIRING) == kept_edges(circuit(PLAIN), WIRING)
    assert kept_nodes(circuit(PLAIN + others), WIRING) == kept_nodes(circuit(PLAIN), WIRING)
    with pytest.raises(GraphError, match=r"no edge of the model.*path-patching --scope edges"):
        kept_edges(circuit(others), WIRING)
    with pytest.raises(GraphError, match="neither an edge nor a scored component"):
        kept_nodes(circuit(others), WIRING)


def test_circuits_of_components() -> None:
    """Of a circuit of components those that are scored are kept, unless they say otherwise."""
    made = circuit([(name, "logits", "", {"kind": "total"}) for name in ("input", "a1.h1", "m0")])
    for name in ("input", "a1.h1", "m0"):
        made.nodes[name]["score"] = -1.0
    made.nodes["m0"]["kept"] = False
    assert kept_nodes(made, WIRING) == {"input", "a1.h1"}


def test_components_that_cannot_be_evaluated() -> None:
    """Positions, the residual stream and features are named."""
    for name, kind in (("a1.h0[5]", "head"), ("resid_pre.1", "residual"), ("m0.f3", "feature")):
        made = circuit([])
        made.add_component(name, kind=kind, layer=0, score=-1.0)
        made.add_component("logits", kind="logits", layer=2)
        made.add_effect(name, "logits", -1.0, kind="total")
        with pytest.raises(GraphError, match="is no head, MLP, input or logits") as refusal:
            kept_nodes(made, WIRING)
        assert repr(name) in str(refusal.value)
        made.add_effect(name, "logits", -1.0, port="x")
        with pytest.raises(GraphError, match="is no head, MLP, input or logits"):
            kept_edges(made, WIRING)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (("m1", "m0", ""), "edge m1 -> m0 does not exist"),
        (("a0.h0", "m0", "q"), "edge a0.h0 -> m0:q does not exist"),
        (("input", "a1.h1", ""), "edge input -> a1.h1 does not exist"),
        (
            ("a2.h0", "logits", ""),
            "'a2.h0' is no head, MLP, input or logits of a model of 2 layers",
        ),
    ],
)
def test_edges_of_another_model(effect: tuple[str, str, str], words: str) -> None:
    """An effect that is no edge of this model is named."""
    for find in (kept_edges, kept_nodes):
        with pytest.raises(GraphError, match=words):
            find(circuit([(*effect, {})]), WIRING)


def test_sizes_of_another_model() -> None:
    """A circuit found on a model of other sizes is refused, also where its names exist."""
    for field, value in (("n_layers", 3), ("n_heads", 4), ("parallel", True)):
        with pytest.raises(GraphError, match=f"found on a model with {field} {value}"):
            kept_edges(circuit(PLAIN, **{field: value}), WIRING)
    assert kept_edges(circuit(PLAIN, n_layers=2, n_heads=2, parallel=False), WIRING)


@pytest.mark.parametrize("suffix", [".json", ".mib.json"])
def test_traced_circuits(suffix: str, tmp_path: Path) -> None:
    """A traced circuit keeps its effects, also when it comes back from a file."""
    traced = build_circuit("gate-and", top=5)
    wiring = Wiring(1, 2)
    expected = {Edge(source, target, port) for source, target, port, _ in traced.effects()}
    assert len(expected) == 5
    write_circuit(traced, tmp_path / f"circuit{suffix}")
    for found in (traced, read_circuit(tmp_path / f"circuit{suffix}")):
        assert kept_edges(found, wiring) == expected


def test_traced_components() -> None:
    """A circuit of path-patching by components keeps the components with a score."""
    traced = build_circuit("gate-and", analysis="path-patching", scope="nodes", top=3)
    found = kept_nodes(traced, Wiring(1, 2))
    assert found == {source for source, _, _, _ in traced.effects()}
    assert len(found) == 3
