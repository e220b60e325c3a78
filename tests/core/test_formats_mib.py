"""Circuit JSON of EAP-IG and MIB: every node and edge, the sign, and files of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from format_samples import planted

from circuitlab.errors import GraphError
from circuitlab.export import read_circuit, write_circuit
from circuitlab.graph import CircuitGraph
from circuitlab.wiring import Wiring


@pytest.fixture
def circuit() -> CircuitGraph:
    return planted()


def effects(graph: CircuitGraph) -> list[tuple[str, str, str, float]]:
    return list(graph.effects())


def test_mib_document_has_every_node_and_edge(circuit: CircuitGraph, tmp_path: Path) -> None:
    """All components of the model are listed, the circuit's are marked, scores keep their sign."""
    write_circuit(circuit, tmp_path / "a.mib.json")
    document = json.loads((tmp_path / "a.mib.json").read_text())
    assert document["cfg"] == {
        "n_layers": 2, "n_heads": 3, "parallel_attn_mlp": False, "d_model": 24,
    }  # fmt: skip
    assert list(document["nodes"]) == [*Wiring(2, 3).sources, "logits"]
    assert document["nodes"]["a0.h1"] == {"in_graph": True, "score": -0.5}
    # Its one edge was not kept.
    assert document["nodes"]["m0"] == {"in_graph": False}
    assert document["edges"] == {
        "input->a0.h1<v>": {"score": -1.5, "in_graph": True},
        "a0.h1->a1.h2<k>": {"score": -0.1, "in_graph": True},
        "a0.h1->a1.h2<q>": {"score": 0.25, "in_graph": True},
        "m0->a1.h2<q>": {"score": 1e-7, "in_graph": False},
        "a1.h2->logits": {"score": -3.0, "in_graph": True},
    }


def test_mib_round_trip(circuit: CircuitGraph, tmp_path: Path) -> None:
    """Effects, what is kept, and provenance come back."""
    write_circuit(circuit, tmp_path / "a.mib.json")
    back = read_circuit(tmp_path / "a.mib.json")
    assert effects(back) == effects(circuit)
    assert back.graph == circuit.graph
    assert back.edges["m0", "a1.h2", "q"]["kept"] is False
    assert back.nodes["a0.h1"] == {"kind": "head", "layer": 0, "score": -0.5}


def test_file_of_eap_ig_is_read(tmp_path: Path) -> None:
    """EAP-IG's own file, NaN for nodes without a score and edges without one, is understood."""
    path = tmp_path / "theirs.mib.json"
    document = {
        "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": True, "d_model": 8},
        "nodes": {
            "input": {"in_graph": True, "score": float("nan")},
            "a0.h0": {"in_graph": True, "score": 0.5},
            "m0": {"in_graph": False},
            "logits": {"in_graph": True},
        },
        "edges": {
            "input->a0.h0<q>": {"score": 0.25, "in_graph": True},
            "a0.h0->logits": {"in_graph": True},
            "input->logits": {"in_graph": False},
            "m0->logits": {"score": 0.125, "in_graph": False},
        },
    }
    path.write_text(json.dumps(document))
    circuit = read_circuit(path)
    assert effects(circuit) == [
        ("input", "a0.h0", "q", 0.25), ("m0", "logits", "", 0.125), ("a0.h0", "logits", "", 0.0),
    ]  # fmt: skip
    assert circuit.edges["a0.h0", "logits", ""]["scored"] is False
    assert circuit.edges["m0", "logits", ""]["kept"] is False
    assert circuit.nodes["a0.h0"]["score"] == 0.5
    assert "score" not in circuit.nodes["input"]
    assert circuit.graph["parallel"] is True
    assert "as in the file" in circuit.graph["score"]


@pytest.mark.parametrize(
    ("edge", "fact"),
    [
        ("input->a0.h0", "port ''"),
        ("input->m0<q>", "port 'q'"),
        ("m0->a0.h0<q>", "does not read"),
        ("a0.h0->input", "does not read"),
        ("a9.h9->logits", "does not exist"),
        ("nonsense", "not of the form"),
    ],
)
def test_impossible_edge_is_refused(edge: str, fact: str, tmp_path: Path) -> None:
    """An edge the model cannot have is named with what is wrong with it."""
    cfg = {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8}
    document = {"cfg": cfg, "nodes": {}, "edges": {edge: {"score": 1.0, "in_graph": True}}}
    (tmp_path / "a.mib.json").write_text(json.dumps(document))
    with pytest.raises(GraphError, match=fact):
        read_circuit(tmp_path / "a.mib.json")


@pytest.mark.parametrize("parallel", [False, True])
def test_every_edge_of_a_model_is_legal(parallel: bool, tmp_path: Path) -> None:
    """The check of edges passes exactly the edges of the residual graph."""
    wiring = Wiring(3, 2, parallel)
    circuit = CircuitGraph(n_layers=3, n_heads=2, d_model=8, parallel=parallel)
    for name in (*wiring.sources, "logits"):
        component = wiring.component(name)
        circuit.add_component(name, kind=component.kind, layer=component.layer)
    for source, target, port in wiring.edges:
        circuit.add_effect(source, target, 0.5, port=port)
    write_circuit(circuit, tmp_path / "a.mib.json")
    assert read_circuit(tmp_path / "a.mib.json").number_of_edges() == wiring.n_edges
    circuit.add_effect("m1", "a1.h0", 0.5, port="q")
    with pytest.raises(GraphError, match="does not read m1"):
        write_circuit(circuit, tmp_path / "b.mib.json")


def test_mib_needs_the_model_sizes(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A circuit that does not know its model's sizes is refused by name of what is missing."""
    del circuit.graph["d_model"]
    with pytest.raises(GraphError, match="d_model is None"):
        write_circuit(circuit, tmp_path / "a.mib.json")


# --- files that attack ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "fact"),
    [
        ({"n_layers": 10**9}, "1,000,000,000 layers of 1 heads"),
        ({"n_heads": 10**9}, "1 layers of 1,000,000,000 heads"),
        ({"n_layers": 10**400}, "n_layers is 1000"),
    ],
)
def test_sizes_of_no_model_are_refused_at_once(
    sizes: dict[str, int], fact: str, tmp_path: Path
) -> None:
    """A file of a hundred bytes does not fill the memory with names of components."""
    cfg = {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8, **sizes}
    (tmp_path / "a.mib.json").write_text(json.dumps({"cfg": cfg, "nodes": {}, "edges": {}}))
    with pytest.raises(GraphError, match=fact):
        read_circuit(tmp_path / "a.mib.json")


def test_picture_of_a_circuit_that_claims_to_be_huge(tmp_path: Path) -> None:
    """Its edges are not counted, layer by layer, for a caption."""
    circuit = planted()
    circuit.graph.update(n_layers=10**9, n_heads=10**9)
    write_circuit(circuit, tmp_path / "a.svg")
    assert "showing all 4 edges" in (tmp_path / "a.svg").read_text("utf-8")


@pytest.mark.parametrize("suffix", [".json", ".mib.json", ".neuronpedia.json", ".node-link.json"])
def test_whole_numbers_that_no_float_holds_are_no_scores(suffix: str, tmp_path: Path) -> None:
    """JSON has numbers of any length."""
    path = tmp_path / f"a{suffix}"
    write_circuit(planted(), path)
    assert "-1.5" in path.read_text("utf-8")
    path.write_text(path.read_text("utf-8").replace("-1.5", "1" + "0" * 400), "utf-8")
    with pytest.raises(GraphError, match="finite number"):
        read_circuit(path)
