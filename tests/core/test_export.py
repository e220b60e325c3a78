"""Circuit files: the right format, whole or not at all, and back again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import networkx as nx
import pytest

from circuitlab.errors import GraphError, OptionError, PluginError, ResourceError
from circuitlab.export import EXPORTERS, find_exporter, read_circuit, read_mib, write_circuit
from circuitlab.graph import CircuitGraph
from circuitlab.panels import TextTable
from circuitlab.wiring import Wiring


@pytest.fixture
def circuit() -> CircuitGraph:
    wiring = Wiring(2, 3)
    graph = CircuitGraph(
        model="tiny", n_layers=2, n_heads=3, d_model=24, parallel=False, options={"top": 4},
        commit=None,
    )  # fmt: skip
    for name in ("input", "a0.h1", "m0", "a1.h2", "logits"):
        component = wiring.component(name)
        graph.add_component(name, kind=component.kind, layer=component.layer)
    graph.nodes["a0.h1"]["score"] = -0.5
    graph.add_effect("input", "a0.h1", -1.5, port="v")
    graph.add_effect("a0.h1", "a1.h2", -0.1, port="k", scores=[1.0, None])
    graph.add_effect("a0.h1", "a1.h2", 0.25, port="q")
    graph.add_effect("m0", "a1.h2", 1e-7, port="q", kept=False)
    graph.add_effect("a1.h2", "logits", -3.0)
    return graph


def effects(graph: CircuitGraph) -> list[tuple[str, str, str, float]]:
    return list(graph.effects())


# --- choosing and writing -------------------------------------------------------------------------


def test_longest_suffix_wins() -> None:
    """``x.mib.json`` is EAP-IG's JSON, ``x.json`` our own; capitals do not matter."""
    assert find_exporter(Path("x.mib.json")) is EXPORTERS[".mib.json"]
    assert find_exporter(Path("my.circuit.JSON")) is EXPORTERS[".json"]


@pytest.mark.parametrize("name", ["x", "x.jpeg", ".svg", "json"])
def test_unknown_suffix_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    """The message lists the suffixes there are, those of plugins included; nothing is written."""
    exporters = {**EXPORTERS, ".own": lambda graph, path: None}
    with pytest.raises(OptionError, match=r"\.json .*\.own .*\.svg"):
        write_circuit(CircuitGraph(), tmp_path / name, exporters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", sorted(EXPORTERS))
def test_every_format_is_written(suffix: str, circuit: CircuitGraph, tmp_path: Path) -> None:
    """Each suffix gives one complete file and leaves nothing else in the folder."""
    path = tmp_path / f"out put{suffix}"
    TextTable(title="t", header=["a"], rows=[["b"]]).add_to(circuit)
    assert write_circuit(circuit, path) == []
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size > 100


def test_warnings_reach_the_caller(circuit: CircuitGraph, tmp_path: Path) -> None:
    """What an exporter warns of is returned."""

    def own(graph: CircuitGraph, path: Path) -> list[str]:
        path.write_text("x")
        return ["lost the colours"]

    assert write_circuit(circuit, tmp_path / "a.own", {".own": own}) == ["lost the colours"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), ValueError()]
)
def test_failed_write_keeps_the_older_file(
    failure: Exception, circuit: CircuitGraph, tmp_path: Path
) -> None:
    """An exporter that fails half-way leaves the older file as it was and no debris."""

    def broken(graph: CircuitGraph, path: Path) -> None:
        path.write_text("half")
        raise failure

    path = tmp_path / "a.own"
    path.write_text("older")
    with pytest.raises(ResourceError if isinstance(failure, OSError) else ValueError):
        write_circuit(circuit, path, {".own": broken})
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_name_appears_only_when_the_file_is_whole(
    circuit: CircuitGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final name is given by one rename, after the bytes are on the disk."""
    seen: list[str] = []
    path = tmp_path / "a.json"

    def fsync(descriptor: int) -> None:
        seen.append("fsync")
        assert not path.exists()

    def replace(draft: Path, target: Path) -> None:
        seen.append("replace")
        assert Path(draft).read_text() == circuit.to_json()
        assert Path(draft).stat().st_dev == tmp_path.stat().st_dev
        rename(draft, target)

    rename = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_circuit(circuit, path)
    assert seen == ["fsync", "replace"]
    assert path.read_text() == circuit.to_json()


def test_exporter_that_writes_nothing_is_named(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A plugin's exporter that forgets the file is an error of the plugin."""
    with pytest.raises(PluginError, match=r"a\.own"):
        write_circuit(circuit, tmp_path / "a.own", {".own": lambda graph, path: None})


def test_missing_folder_is_named(circuit: CircuitGraph, tmp_path: Path) -> None:
    """The message names the folder; once it is made, as the message says, writing works."""
    path = tmp_path / "new" / "a.json"
    with pytest.raises(ResourceError, match=r"new.*create it"):
        write_circuit(circuit, path)
    path.parent.mkdir()
    write_circuit(circuit, path)
    assert path.exists()


def test_folder_is_not_overwritten(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A folder of the output's name is refused."""
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ResourceError, match="not a file"):
        write_circuit(circuit, tmp_path / "a.json")


# --- JSON -----------------------------------------------------------------------------------------


def test_json_round_trip(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A circuit read back is the circuit that was written, provenance and data included."""
    write_circuit(circuit, tmp_path / "a.json")
    back = read_circuit(tmp_path / "a.json")
    assert nx.utils.graphs_equal(back, circuit)
    assert back.graph == circuit.graph


def test_json_refuses_nan(circuit: CircuitGraph, tmp_path: Path) -> None:
    """NaN never reaches a file, nor does a file appear."""
    circuit.graph["faithfulness"] = float("nan")
    for suffix in (".json", ".mib.json", ".graphml"):
        circuit.graph["nested"] = {"loss": float("nan")}
        with pytest.raises((GraphError, ValueError)):
            write_circuit(circuit, tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.json", "a.mib.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"digraph {}",
        b"[1, 2]",
        b'{"prompts": []}',
        b'{"nodes": 1, "edges": 2, "graph": 3, "cfg": 4}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_other_documents_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    """A file that is no circuit is named in one GraphError, whatever else it is."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GraphError, match=name.replace(".", r"\.")):
        read_circuit(path)


@pytest.mark.parametrize("name", ["a.json", "a.mib.json"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    """A file that is not there is said to be missing, with the command that writes one."""
    with pytest.raises(GraphError, match="does not exist; `circuitlab trace --output"):
        read_circuit(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.mib.json"])
def test_nan_score_is_refused_on_reading(name: str, circuit: CircuitGraph, tmp_path: Path) -> None:
    """A score that is no finite number is refused."""
    path = tmp_path / name
    write_circuit(circuit, path)
    path.write_text(path.read_text().replace("-1.5", "NaN"))
    with pytest.raises(GraphError, match=r"NaN|nan"):
        read_circuit(path)


# --- EAP-IG / MIB ---------------------------------------------------------------------------------


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
    circuit = read_mib(path)
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


# --- GraphML --------------------------------------------------------------------------------------


def test_graphml_round_trip(circuit: CircuitGraph, tmp_path: Path) -> None:
    """Every effect comes back with its port and score; None, lists and dicts are JSON text."""
    circuit.add_component("bell\x07 <b>&", kind="feature", layer=1, tags=["a", None])
    write_circuit(circuit, tmp_path / "a.graphml")
    back = nx.read_graphml(tmp_path / "a.graphml", force_multigraph=True)
    found = {(s, t, d["port"], d["score"]) for s, t, d in back.edges(data=True)}
    assert found == set(effects(circuit))
    assert json.loads(back.nodes["bell\\u{7} <b>&"]["tags"]) == ["a", None]
    assert json.loads(back.graph["options"]) == {"top": 4}
    assert back.graph["commit"] == "null"
    assert back.nodes["a0.h1"]["layer"] == 0
