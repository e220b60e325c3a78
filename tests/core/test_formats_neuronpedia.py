"""Attribution graphs: the schema holds, traps are kept clear of, files are read."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from format_samples import circuits, planted
from hypothesis import given, settings
from neuronpedia_schema import SCHEMA

import circuitlab
from circuitlab.errors import GraphError
from circuitlab.export import read_circuit, write_circuit
from circuitlab.formats.neuronpedia import neuronpedia_document, parse_neuronpedia
from circuitlab.graph import CircuitGraph

VALID = jsonschema.Draft7Validator(SCHEMA)


def attribution_graph() -> dict[str, Any]:
    """What circuit-tracer writes for two features, an error, two tokens and a logit."""
    common = {"activation": None, "influence": None, "is_target_logit": False, "run_idx": 0}
    token = {**common, "feature": None, "layer": "E", "feature_type": "embedding"}
    kind = "cross layer transcoder"
    return {
        "metadata": {
            "slug": "two-words", "scan": "gemma-2-2b", "prompt_tokens": ["<bos>", " two"],
            "prompt": "<bos> two", "schema_version": 1, "node_threshold": 0.8,
        },
        "qParams": {"pinnedIds": ["0_7_1"], "supernodes": [["numbers", "0_7_1", "1_9_1"]]},
        "nodes": [
            {**token, "node_id": "E_2_0", "ctx_idx": 0, "jsNodeId": "E_2-0", "clerp": ""},
            {**token, "node_id": "E_15_1", "ctx_idx": 1, "jsNodeId": "E_15-1", "clerp": ""},
            {**common, "node_id": "0_7_1", "feature": 35, "layer": "0", "ctx_idx": 1,
             "feature_type": kind, "jsNodeId": "0_7-0", "clerp": "two", "activation": 2.5},
            {**common, "node_id": "1_9_1", "feature": 64, "layer": "1", "ctx_idx": 1,
             "feature_type": kind, "jsNodeId": "1_9-0", "clerp": ""},
            {**common, "node_id": "0_1_1", "feature": -1, "layer": "1", "ctx_idx": 1,
             "feature_type": "mlp reconstruction error", "jsNodeId": "0_1-1", "clerp": "Err"},
            {**common, "node_id": "3_4_1", "feature": 4, "layer": "3", "ctx_idx": 1,
             "feature_type": "logit", "jsNodeId": "L_4-1", "is_target_logit": True,
             "token_prob": 0.5, "clerp": 'Output " three" (p=0.500)'},
        ],
        "links": [
            {"source": "E_15_1", "target": "0_7_1", "weight": 1.5},
            {"source": "0_7_1", "target": "1_9_1", "weight": -0.5},
            {"source": "1_9_1", "target": "3_4_1", "weight": 2.0},
            {"source": "0_1_1", "target": "3_4_1", "weight": 0.25},
        ],
    }  # fmt: skip


# --- what is written ------------------------------------------------------------------------------


def test_the_schema_can_fail() -> None:
    """A graph of circuit-tracer is valid; without any one required field it is not."""
    graph = attribution_graph()
    VALID.validate(graph)
    for key in graph:
        assert not VALID.is_valid({k: v for k, v in graph.items() if k != key})
    for part in ("nodes", "links"):
        for key in SCHEMA["properties"][part]["items"]["required"]:
            broken = copy.deepcopy(graph)
            del broken[part][0][key]
            assert not VALID.is_valid(broken), key


@settings(max_examples=60, deadline=None)
@given(circuit=circuits())
def test_any_circuit_is_valid_and_free_of_traps(circuit: CircuitGraph) -> None:
    """The schema holds; ids are unique; each logit has one probability; labels are no HTML."""
    document = json.loads(json.dumps(neuronpedia_document(circuit), allow_nan=False))
    VALID.validate(document)
    ids = [node["node_id"] for node in document["nodes"]]
    assert max(Counter(ids).values()) == 1
    assert {end for link in document["links"] for end in (link["source"], link["target"])} <= {*ids}
    pairs = Counter((link["source"], link["target"]) for link in document["links"])
    assert set(pairs.values()) <= {1}
    for node in document["nodes"]:
        assert node["clerp"].count("(p=") == (node["feature_type"] == "logit")
        assert "<" not in node["clerp"]
        assert 0 <= node["ctx_idx"] < len(document["metadata"]["prompt_tokens"])
        if node["feature_type"] == "logit":
            # What the page there makes of it.
            assert 0 <= float(node["clerp"].split("(p=")[1].split(")")[0]) <= 1


def test_features_and_errors_of_layer_0_keep_their_own_ids() -> None:
    """circuit-tracer calls both ``0_5_3``; here each has its name, whatever that is."""
    circuit = CircuitGraph()
    for number, name in enumerate(["0_5_3", "<0_5_3>", "0 5 3", "n1", "n2"]):
        kind = "error" if number % 2 else "feature"
        circuit.add_component(name, kind=kind, layer=0, position=3)
    ids = [node["node_id"] for node in neuronpedia_document(circuit)["nodes"]]
    assert len(set(ids)) == 5
    assert ids[0] == "0_5_3"


def test_a_circuit_is_mapped_as_documented() -> None:
    """Layers, places, types, and one link for all ports of a pair: the sum of their scores."""
    document = neuronpedia_document(planted())
    nodes = {node["node_id"]: node for node in document["nodes"]}
    found = {name: (n["layer"], n["feature_type"], n["feature"]) for name, n in nodes.items()}
    assert found == {
        "input": ("E", "embedding", None), "a0.h1": ("0", "unknown", None),
        "m0": ("0", "unknown", None), "a1.h2": ("1", "unknown", None),
        "logits": ("3", "logit", None),
    }  # fmt: skip
    weights = {(link["source"], link["target"]): link["weight"] for link in document["links"]}
    assert weights == {
        ("input", "a0.h1"): -1.5, ("a0.h1", "a1.h2"): -0.1 + 0.25, ("m0", "a1.h2"): 1e-7,
        ("a1.h2", "logits"): -3.0,
    }  # fmt: skip
    assert document["metadata"]["scan"] == "tiny"
    assert "negative = the edge helps" in document["metadata"]["info"]["description"]


def test_influence_is_the_cumulative_share_of_scores_that_leave() -> None:
    """By hand: 3, 1.5, 0.35 and 1e-7 leave the components, strongest first."""
    document = neuronpedia_document(planted())
    total = 3 + 1.5 + 0.35 + 1e-7
    expected = {"a1.h2": 3 / total, "input": 4.5 / total, "a0.h1": 4.85 / total, "m0": 1.0}
    found = {n["node_id"]: n["influence"] for n in document["nodes"]}
    assert found.pop("logits") is None
    assert found == pytest.approx(expected, abs=1e-12)


def test_labels_carry_roles_and_escape_html() -> None:
    """A role stands behind the name; markup in it is text there, and no probability."""
    circuit = CircuitGraph()
    role = "<img src=x onerror=alert(1)> (p=0.9)"
    circuit.add_component("a0.h1", kind="head", layer=0, role=role)
    (node,) = neuronpedia_document(circuit)["nodes"]
    assert node["clerp"] == "a0.h1 (&lt;img src=x onerror=alert(1)&gt; ( p=0.9))"


def test_places_are_positions_of_the_prompt() -> None:
    """Tokens give the prompt; negative positions count from its end; what has none is last."""
    circuit = CircuitGraph()
    for place, token in enumerate(["When", " Mary", " and"]):
        circuit.add_component(f"t{place}", kind="token", layer=0, position=place, token=token)
    circuit.add_component("m0[-2]", kind="mlp", layer=0, position=-2)
    circuit.add_component("logits", kind="logits", layer=1)
    document = neuronpedia_document(circuit)
    assert document["metadata"]["prompt_tokens"] == ["When", " Mary", " and"]
    assert document["metadata"]["prompt"] == "When Mary and"
    assert [node["ctx_idx"] for node in document["nodes"]] == [0, 1, 2, 1, 2]
    assert document["nodes"][1]["clerp"] == "Emb: &quot; Mary&quot;"


def test_clusters_are_supernodes() -> None:
    """A cluster's role is the label of its supernode."""
    circuit = CircuitGraph()
    circuit.add_component("mlp_in.0/c1", kind="cluster", layer=0, role="names", members=["1", "2"])
    document = neuronpedia_document(circuit)
    (node,) = document["nodes"]
    assert document["qParams"]["supernodes"] == [["names", node["node_id"]]]


def test_real_circuit_is_valid(tmp_path: Path) -> None:
    """What an analysis of a bundled model gives, in the file that is written."""
    circuit = circuitlab.build_circuit("gate-or", analysis="path-patching", gates=True)
    write_circuit(circuit, tmp_path / "a.neuronpedia.json")
    document = json.loads((tmp_path / "a.neuronpedia.json").read_text("utf-8"))
    VALID.validate(document)
    assert len(document["nodes"]) == len(circuit)


def test_a_file_that_neuronpedia_does_not_take_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written, with a warning; one of a fitting size has none."""
    path = tmp_path / "a.neuronpedia.json"
    assert write_circuit(planted(), path) == []
    monkeypatch.setattr("circuitlab.export.UPLOAD_BYTES", path.stat().st_size - 1)
    (warning,) = write_circuit(planted(), path)
    assert "a.neuronpedia.json has more than" in warning
    assert path.exists()


# --- what is read ---------------------------------------------------------------------------------


def test_graph_of_circuit_tracer_is_read(tmp_path: Path) -> None:
    """Features, errors, tokens and logits with place and label; weights as they stand there."""
    (tmp_path / "a.neuronpedia.json").write_text(json.dumps(attribution_graph()), "utf-8")
    circuit = read_circuit(tmp_path / "a.neuronpedia.json")
    facts = {name: (d["kind"], d["layer"], d["position"]) for name, d in circuit.nodes(data=True)}
    assert facts == {
        "E_2_0": ("token", 0, 0), "E_15_1": ("token", 0, 1), "0_7_1": ("feature", 0, 1),
        "1_9_1": ("feature", 1, 1), "0_1_1": ("error", 1, 1), "3_4_1": ("logit", 3, 1),
    }  # fmt: skip
    assert list(circuit.effects()) == [
        ("1_9_1", "3_4_1", "", 2.0), ("E_15_1", "0_7_1", "", 1.5), ("0_7_1", "1_9_1", "", -0.5),
        ("0_1_1", "3_4_1", "", 0.25),
    ]  # fmt: skip
    feature = circuit.nodes["0_7_1"]
    assert (feature["feature"], feature["activation"], feature["role"]) == (35, 2.5, "two")
    assert feature["supernode"] == "numbers"
    assert circuit.nodes["E_15_1"]["token"] == " two"
    assert circuit.graph["model"] == "gemma-2-2b"
    assert "as in the file" in circuit.graph["score"]


def test_what_was_read_is_valid_again_and_complete() -> None:
    """Reading, writing and reading gives the circuit; ids, types and probabilities are theirs."""
    circuit = parse_neuronpedia(attribution_graph())
    document = neuronpedia_document(circuit)
    VALID.validate(document)
    theirs, ours = ({n["node_id"]: n for n in d["nodes"]} for d in (attribution_graph(), document))
    for name, node in theirs.items():
        for key in ("feature", "layer", "ctx_idx", "feature_type"):
            assert ours[name][key] == node[key] or (name, key) == ("3_4_1", "layer"), (name, key)
    assert ours["3_4_1"]["layer"] == "3"
    assert ours["3_4_1"]["clerp"] == "Output &quot; three&quot; (p=0.500)"
    assert document["qParams"]["supernodes"] == [["numbers", "0_7_1", "1_9_1"]]
    again = parse_neuronpedia(json.loads(json.dumps(document)))
    assert again.to_json() == circuit.to_json()


def test_a_picture_of_it_can_be_drawn(tmp_path: Path) -> None:
    """The built-in and Graphviz's layouts know its kinds."""
    circuit = parse_neuronpedia(attribution_graph())
    write_circuit(circuit, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert all(f"{name}" in text for name in circuit if name != "E_2_0")


@pytest.mark.parametrize(
    ("path", "value", "fact"),
    [
        (("metadata",), None, "needs metadata"),
        (("nodes",), {}, "needs metadata, nodes"),
        (("nodes", 0), 7, "node 7 has no node_id"),
        (("nodes", 0, "node_id"), 7, "has no node_id"),
        (("nodes", 0, "node_id"), "0_7_1", "'0_7_1' is there twice"),
        (("nodes", 2, "layer"), "top", "layer 'top'"),
        (("nodes", 2, "ctx_idx"), 1.5, "ctx_idx 1.5"),
        (("nodes", 2, "ctx_idx"), True, "ctx_idx True"),
        (("links", 0), None, "link None"),
        (("links", 0, "source"), "nobody", "no node is called 'nobody'"),
        (("links", 0, "weight"), "heavy", "score 'heavy'"),
        (("links", 0, "weight"), True, "score True"),
        (("links", 1, "target"), "E_15_1", "cycle"),
        (("circuitlab",), {"schema": "circuitlab-circuit/1"}, "malformed"),
        (("circuitlab",), [], "malformed"),
    ],
)
def test_a_malformed_graph_says_why(path: tuple[Any, ...], value: Any, fact: str) -> None:
    """Offender and fact in one line; nothing is guessed."""
    document = attribution_graph()
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(GraphError, match=fact):
        parse_neuronpedia(document)


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "1e999"])
def test_weights_are_finite(weight: str, tmp_path: Path) -> None:
    """What JSON cannot say, or no float holds, is refused."""
    text = json.dumps(attribution_graph()).replace("-0.5", weight)
    (tmp_path / "a.neuronpedia.json").write_text(text, "utf-8")
    with pytest.raises(GraphError, match=r"not JSON: (NaN|Infinity|1e999)"):
        read_circuit(tmp_path / "a.neuronpedia.json")
