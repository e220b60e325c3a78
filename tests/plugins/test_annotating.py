"""Roles told: findings, heat map and node data, and circuits whose heads get them."""

from __future__ import annotations

import json

import pytest
from circuitlab_attention_heads.annotating import annotate
from circuitlab_attention_heads.roles import RoleTable, find_roles

from circuitlab import CircuitGraph, GraphError, load_model


def score(table: RoleTable, layer: int, head: int, role: str) -> float:
    return float(table.of(layer, head)["role_scores"][role]["score"])


def circuit_of(*names: str) -> CircuitGraph:
    """A circuit of such heads between input and logits, as analyses make them."""
    circuit = CircuitGraph()
    circuit.add_component("input", kind="input", layer=0)
    circuit.add_component("m0", kind="mlp", layer=0)
    circuit.add_component("logits", kind="logits", layer=2)
    for name in names:
        circuit.add_component(name, kind="head", layer=int(name[1]))
        circuit.add_effect(name, "logits", -1.0)
    return circuit


# --- the table ------------------------------------------------------------------------------------


def test_findings_name_heads_by_role() -> None:
    """One line per role, strongest heads first, with interval and control; only asked heads."""
    table = find_roles(load_model("induction"))
    found = table.findings()
    assert list(found) == ["previous-token", "induction"]
    one = table.of(0, 3)["role_scores"]["previous-token"]
    assert found["previous-token"] == (
        f"a0.h3 {one['score']:.2f} [{one['lo']:.2f}, {one['hi']:.2f}], control {one['control']:.2f}"
    )
    named = [line.split()[0] for line in found["induction"].split("; ")]
    by_score = sorted(range(4), key=lambda h: -score(table, 1, h, "induction"))
    assert named == [f"a1.h{head}" for head in by_score]
    assert list(table.findings([(1, 3)])) == ["induction"]
    assert "none" in table.findings([(0, 0)])["roles"]


def test_long_findings_are_cut() -> None:
    """Of many heads with a role four are named, and the others counted."""
    nodes = {
        (0, head): {
            "roles": ["induction"],
            "role_scores": {
                "induction": {"score": 0.9 - head / 100, "lo": 0.0, "hi": 1.0, "control": 0.0}
            },
        }
        for head in range(6)
    }
    lines = RoleTable((1, 6), nodes, {"roles": ["induction"]}).findings()["induction"].split("; ")
    assert [line.split()[0] for line in lines[:4]] == [f"a0.h{head}" for head in range(4)]
    assert lines[4:] == ["2 more"]


def test_panel_shows_every_head() -> None:
    """The heat map has the score and short name of each role, and the largest score where none."""
    model = load_model("hand-induction")
    table = find_roles(model)
    (panel,) = table.panels()
    assert [list(row) for row in panel.notes] == [["prev", ""], ["ind", ""]]
    found = [[table.of(layer, head)["role_scores"] for head in range(2)] for layer in range(2)]
    largest = [[max(one["score"] for one in scores.values()) for scores in row] for row in found]
    assert [list(row) for row in panel.values] == largest
    json.dumps(panel.to_json(), allow_nan=False)


def test_node_data_are_plain_and_their_own() -> None:
    """What a node gets is JSON without NaN, and changing it does not change the table."""
    table = find_roles(load_model("induction"))
    found = table.of(1, 0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    found["role_scores"].clear()
    assert table.of(1, 0)["role_scores"]


# --- circuits -------------------------------------------------------------------------------------


def test_heads_get_their_roles() -> None:
    """Each head has the data of the table, a head at a position those of the head; no one else."""
    model = load_model("hand-induction")
    circuit = circuit_of("a0.h0", "a1.h0", "a1.h0[3]", "a1.h1", "a1.h0[-1]")
    before = circuit.copy()
    annotate(circuit, model, None)
    table = find_roles(model)
    for name in ("a0.h0", "a1.h0", "a1.h0[3]", "a1.h0[-1]", "a1.h1"):
        added = {
            key: value
            for key, value in circuit.nodes[name].items()
            if key not in before.nodes[name]
        }
        assert added == table.of(int(name[1]), int(name[4]))
    assert circuit.nodes["a1.h0[3]"]["role"] == "induction"
    assert "role" not in circuit.nodes["a1.h1"]
    for name in ("input", "m0", "logits"):
        assert circuit.nodes[name] == before.nodes[name]
    assert list(circuit.nodes) == list(before.nodes)
    assert list(circuit.effects()) == list(before.effects())
    assert circuit.graph["roles"] == dict(table.facts)
    assert CircuitGraph.from_json(circuit.to_json()).nodes == circuit.nodes


def test_findings_are_those_of_its_heads() -> None:
    """Findings name the heads that the circuit holds, and leave those of others as they were."""
    model = load_model("induction")
    circuit = circuit_of("a1.h3", "a0.h3")
    circuit.graph["findings"] = {"induction": "mine", "other": "too"}
    annotate(circuit, model, None)
    table = find_roles(model)
    assert circuit.graph["findings"] == {
        "induction": "mine",
        "other": "too",
        "previous-token": table.findings()["previous-token"],
    }
    alone = circuit_of("a1.h3")
    annotate(alone, model, None)
    assert list(alone.graph["findings"]) == ["induction"]
    assert alone.graph["findings"]["induction"].startswith("a1.h3 ")
    assert ";" not in alone.graph["findings"]["induction"]


def test_what_was_measured_stays() -> None:
    """A head that has scores already keeps them; a circuit without other heads gets nothing."""
    model = load_model("hand-induction")
    circuit = circuit_of("a0.h0")
    circuit.nodes["a0.h0"]["role_scores"] = {"induction": {"score": 0.5}}
    before = json.loads(circuit.to_json())
    annotate(circuit, model, None)
    assert json.loads(circuit.to_json()) == before
    bare = circuit_of()
    annotate(bare, model, None)
    assert bare.graph == circuit_of().graph


def test_small_model_says_why_there_are_no_roles() -> None:
    """On a gate the circuit stays as it is, but for a finding that says what is in the way."""
    circuit = circuit_of("a0.h0", "a0.h1")
    annotate(circuit, load_model("gate-and"), None)
    assert set(circuit.nodes["a0.h0"]) == {"kind", "layer"}
    assert circuit.graph["findings"]["roles"].startswith("not measured: prompts of 4 tokens")


@pytest.mark.parametrize("name", ["a2.h0", "a0.h2", "a0.h0.extra"])
def test_heads_of_another_model_are_refused(name: str) -> None:
    """A head that the model does not have is an error that names both, and nothing is changed."""
    circuit = circuit_of("a0.h0", name)
    with pytest.raises(GraphError, match=f"'{name}' is no head of model 'hand-induction'"):
        annotate(circuit, load_model("hand-induction"), None)
    assert set(circuit.nodes["a0.h0"]) == {"kind", "layer"}
