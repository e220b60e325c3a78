"""Formats that hold a whole circuit: what is written is what is read, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import pytest
from circuitlab_feature_interactions.circuits import feature_interactions
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.sites import site_pairs
from feature_oracles import dictionaries
from format_samples import circuits, planted
from hypothesis import HealthCheck, given, settings
from path_scores import small_model
from random_tasks import random_task

import circuitlab
from circuitlab import CircuitGraph, DictionaryInfo, export
from circuitlab.errors import GraphError
from circuitlab.export import EXPORTERS, READERS, read_circuit, write_circuit
from circuitlab.graph import EDGE_SCORE

#: Formats that lose nothing; ``.mib.json`` holds edges of a model alone.
WHOLE = (".gexf", ".graphml", ".json", ".neuronpedia.json", ".node-link.json")


def same(first: CircuitGraph, second: CircuitGraph) -> bool:
    """Nodes, edges, data and provenance, types of values included: 1 is not 1.0 nor True."""
    return repr(sorted_parts(first)) == repr(sorted_parts(second))


def sorted_parts(circuit: CircuitGraph) -> list[object]:
    def ordered(value: object) -> object:
        if isinstance(value, dict):
            return sorted(((k, ordered(v)) for k, v in value.items()), key=repr)
        return [ordered(v) for v in value] if isinstance(value, list) else value

    nodes = sorted((name, ordered(dict(data))) for name, data in circuit.nodes(data=True))
    edges = sorted(
        ((s, t, p, ordered(dict(data))) for s, t, p, data in circuit.edges(keys=True, data=True)),
        key=lambda edge: edge[:3],
    )
    return [ordered(circuit.graph), nodes, edges]


def test_every_format_that_is_read_is_written() -> None:
    """Readers and exporters go by the same suffixes, and all but one lose nothing."""
    assert set(READERS) <= set(EXPORTERS)
    assert set(READERS) == {*WHOLE, ".mib.json"}


def test_same_knows_types() -> None:
    """The comparison of these tests tells 1, 1.0 and True, and a missing from an empty value."""
    first, second = planted(), planted()
    assert same(first, second)
    for value in (4.0, True, "4"):
        second.graph["options"] = {"top": value}
        assert not same(first, second)


@pytest.mark.parametrize("suffix", WHOLE)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(circuit=circuits())
def test_any_circuit_comes_back(circuit: CircuitGraph, suffix: str, tmp_path: Path) -> None:
    """Any names, ports and data, and the same circuit gives the same bytes."""
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    EXPORTERS[suffix](circuit, first)
    EXPORTERS[suffix](circuit, second)
    assert first.read_bytes() == second.read_bytes()
    assert same(read_circuit(first), circuit)


# --- what analyses give ---------------------------------------------------------------------------


def edges_of_ioi_mini(folder: Path) -> CircuitGraph:
    return circuitlab.build_circuit("ioi-mini", top=30, n_pairs=8)


def gates_of_gate_or(folder: Path) -> CircuitGraph:
    return circuitlab.build_circuit("gate-or", analysis="path-patching", gates=True)


def tokens_of_induction(folder: Path) -> CircuitGraph:
    return circuitlab.build_circuit("induction", analysis="token-ablation", n_pairs=4)


def clusters_of_features(folder: Path) -> CircuitGraph:
    _, model = small_model("gpt2")
    pairs = site_pairs("mlp", model)
    found = dictionaries(pairs, 6)
    for site, one in found.items():
        one.info = DictionaryInfo(site=str(site), model=model.name, context_length=16)
    write_set(DictionarySet(found, pairs, {}), folder)
    options = {"top": 12, "min_coactivation": 2, "verify": 2, "n_tokens": 1, "cluster": "group"}
    return feature_interactions(model, random_task([6, 5]), dictionaries=folder, **options)


@pytest.fixture(
    scope="module",
    params=[edges_of_ioi_mini, gates_of_gate_or, tokens_of_induction, clusters_of_features],
    ids=lambda make: make.__name__,
)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CircuitGraph:
    make: Callable[[Path], CircuitGraph] = request.param
    return make(tmp_path_factory.mktemp("dictionaries"))


@pytest.mark.parametrize("suffix", WHOLE)
def test_circuit_of_an_analysis_comes_back(real: CircuitGraph, suffix: str, tmp_path: Path) -> None:
    """Edges, gates, tokens, features and clusters, with their provenance and panels."""
    path = tmp_path / f"a{suffix}"
    write_circuit(real, path)
    expected = CircuitGraph.from_json(real.to_json())
    expected.graph.setdefault("score", EDGE_SCORE)
    found = read_circuit(path)
    found.graph.setdefault("score", EDGE_SCORE)
    assert same(found, expected)


def test_render_converts_among_all_formats(lab: Callable[..., object], tmp_path: Path) -> None:
    """A chain through every format ends where it began."""
    circuit = planted()
    path = tmp_path / "start.json"
    write_circuit(circuit, path)
    for number, suffix in enumerate((*WHOLE, ".json")):
        target = tmp_path / f"step{number}{suffix}"
        done = lab("render", path, "--output", target)
        assert done.code == 0, done.err  # type: ignore[attr-defined]
        path = target
    assert "score" not in circuit.graph
    circuit.graph["score"] = EDGE_SCORE  # said in .node-link.json, which has nothing else to say it
    assert same(read_circuit(path), circuit)


# --- what cannot be written or read ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(READERS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {"deep": [float("nan")]}])
def test_what_is_no_json_is_refused(suffix: str, value: object, tmp_path: Path) -> None:
    """No format takes a value that is not plain and finite, nor leaves a file behind."""
    circuit = planted()
    circuit.graph["loss"] = value
    with pytest.raises(GraphError):
        write_circuit(circuit, tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [s for s in WHOLE if s not in (".graphml", ".gexf")])
def test_data_under_a_name_that_files_need_is_refused(suffix: str, tmp_path: Path) -> None:
    """It would be lost without a word."""
    circuit = planted()
    circuit.nodes["m0"]["id"] = 5
    with pytest.raises(GraphError, match="'m0' has data 'id'"):
        write_circuit(circuit, tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_too_large_a_file_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of more than the limit is not parsed, however little of the disk it takes."""
    assert export.MAX_BYTES >= 100 << 20  # what Neuronpedia takes
    monkeypatch.setattr(export, "MAX_BYTES", 1 << 20)
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(GraphError, match=r"a\..*more than 1 MiB"):
        read_circuit(path)


@pytest.mark.parametrize("suffix", sorted(READERS))
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{}", b"[]", b"<a/>", b"[" * 99_999])
def test_what_is_no_circuit_is_named(suffix: str, content: bytes, tmp_path: Path) -> None:
    """Any other file is one GraphError that names it."""
    path = tmp_path / f"other{suffix}"
    path.write_bytes(content)
    with pytest.raises(GraphError, match="other"):
        read_circuit(path)


@pytest.mark.parametrize("schema", ["circuitlab-circuit/2", None, 7, "x" * 10_000])
@pytest.mark.parametrize("suffix", [".json", ".neuronpedia.json", ".gexf", ".graphml"])
def test_file_of_another_version_is_refused(suffix: str, schema: object, tmp_path: Path) -> None:
    """A schema that is not known here is named, and nothing is guessed."""
    path = tmp_path / f"a{suffix}"
    write_circuit(planted(), path)
    new = "circuitlab-other/1" if schema is None else str(schema)
    path.write_text(path.read_text("utf-8").replace("circuitlab-circuit/1", new), "utf-8")
    if suffix == ".gexf" and not new.startswith("circuitlab-"):
        new = "circuitlab-circuit/22"
        path.write_text(path.read_text("utf-8").replace(str(schema), new), "utf-8")
    with pytest.raises(GraphError, match=r"schema .* is not .*circuitlab-circuit/1") as caught:
        read_circuit(path)
    assert len(str(caught.value)) < 600


def test_json_without_a_schema_is_told_apart(tmp_path: Path) -> None:
    """The message says under which suffix a plain file is read, and it is."""
    document = nx.node_link_data(planted(), edges="edges")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(GraphError, match=r"\.node-link\.json"):
        read_circuit(path)
    path = path.rename(tmp_path / "a.node-link.json")
    assert list(read_circuit(path).effects()) == list(planted().effects())


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_a_score_too_large_to_be_summed_is_refused(suffix: str, tmp_path: Path) -> None:
    """1e100 is a score, and more is none: a sum of many must be finite."""
    path = tmp_path / f"a{suffix}"
    circuit = planted()
    circuit.add_effect("a1.h2", "logits", -1e100)
    write_circuit(circuit, path)
    assert next(read_circuit(path).effects())[-1] == -1e100
    text = path.read_text("utf-8").replace("-1e+100", "-1.5e+100")
    path.write_text(text, "utf-8")
    with pytest.raises(GraphError, match="at most 1e\\+100 in size"):
        read_circuit(path)
