"""CircuitGraph: what goes in, what is refused, and that networkx and JSON give it back."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitlab import CircuitGraph, GraphError
from circuitlab.graph import LARGEST_SCORE, effect_name


def small() -> CircuitGraph:
    """input -> a0.h0 -> logits, input -> m0 -> logits, and two heads that lead nowhere."""
    circuit = CircuitGraph(model="toy", verdict="established")
    circuit.add_component("input", kind="input", layer=0)
    for head in range(3):
        circuit.add_component(f"a0.h{head}", kind="head", layer=0, head=head)
    circuit.add_component("m0", kind="mlp", layer=0)
    circuit.add_component("logits", kind="logits", layer=1)
    circuit.add_effect("input", "a0.h0", -1.5, port="q")
    circuit.add_effect("input", "a0.h0", 0.5, port="k")
    circuit.add_effect("a0.h0", "logits", -2.0)
    circuit.add_effect("input", "m0", 0.25)
    circuit.add_effect("m0", "logits", 0.25)
    circuit.add_effect("input", "a0.h1", 0.25, port="v")
    circuit.add_effect("a0.h2", "logits", -0.125)
    return circuit


def same(one: nx.MultiDiGraph, other: nx.MultiDiGraph) -> bool:
    return (
        dict(one.nodes(data=True)) == dict(other.nodes(data=True))
        and sorted(one.edges(keys=True, data=True)) == sorted(other.edges(keys=True, data=True))
        and one.graph == other.graph
    )


def test_effects_are_strongest_first() -> None:
    """Effects come by absolute score; ties by name, whatever the order they were added in."""
    assert [effect[3] for effect in small().effects()] == [-2, -1.5, 0.5, 0.25, 0.25, 0.25, -0.125]
    ties = [effect[:3] for effect in small().effects() if effect[3] == 0.25]
    assert ties == [("input", "a0.h1", "v"), ("input", "m0", ""), ("m0", "logits", "")]


def test_effect_replaces_an_earlier_one() -> None:
    """One effect per source, target and port: measuring again replaces."""
    circuit = small()
    n_edges = circuit.number_of_edges()
    circuit.add_effect("m0", "logits", 7, exact=6.5)
    assert circuit.number_of_edges() == n_edges
    assert circuit.edges["m0", "logits", ""] == {"score": 7.0, "exact": 6.5}


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_score_must_be_finite(score: float) -> None:
    """What was not measured is left out; a NaN is refused, and the effect is named."""
    with pytest.raises(GraphError, match=r"a0\.h0 → logits has score .* leave an effect out"):
        small().add_effect("a0.h0", "logits", score)


def test_ends_must_exist() -> None:
    """An effect of a component that was not added names it and the remedy, which works."""
    circuit = small()
    with pytest.raises(GraphError, match=r"input → m1: component 'm1' .* add_component first"):
        circuit.add_effect("input", "m1", 1.0)
    circuit.add_component("m1", kind="mlp", layer=1)
    circuit.add_effect("input", "m1", 1.0)
    circuit.validate()


def test_top_keeps_the_strongest() -> None:
    """The strongest effects and what they join; none, or all, at the ends; provenance stays."""
    circuit = small()
    two = circuit.top(2)
    assert {e[:3] for e in two.effects()} == {("a0.h0", "logits", ""), ("input", "a0.h0", "q")}
    assert set(two) == {"input", "a0.h0", "logits"}
    assert two.graph == circuit.graph
    assert circuit.top(0).number_of_edges() == 0
    assert circuit.top(99).number_of_edges() == circuit.number_of_edges()
    assert circuit.number_of_edges() == 7


def test_prune_keeps_what_lies_between() -> None:
    """Only components between input and logits stay; without an end, nothing does."""
    pruned = small().prune()
    assert set(pruned) == {"input", "a0.h0", "m0", "logits"}
    assert pruned.number_of_edges() == 5
    circuit = small()
    circuit.remove_node("input")
    assert len(circuit.prune()) == 0
    cut = small()
    cut.remove_nodes_from(["a0.h0", "m0"])
    assert cut.prune().number_of_edges() == 0


def test_networkx_gives_circuits_back() -> None:
    """Copies, subgraphs, reversals and compositions are CircuitGraphs with their data."""
    circuit = small()
    assert same(circuit.copy(), circuit)
    others = (
        circuit.copy(),
        circuit.subgraph(["input", "m0"]),
        circuit.subgraph(["input", "m0"]).copy(),
        circuit.edge_subgraph([("input", "m0", "")]).copy(),
        circuit.reverse(),
        nx.compose(circuit, circuit),
        circuit.top(1),
        circuit.prune(),
    )
    for other in others:
        assert isinstance(other, CircuitGraph)
    assert nx.dag_longest_path_length(circuit) == 2


names = st.text(min_size=1, max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    components=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=2, unique=True
    ),
    scores=st.lists(st.floats(-LARGEST_SCORE, LARGEST_SCORE), max_size=12),
    extra=values,
)
def test_json_round_trip(components: list[str], scores: list[float], extra: Any) -> None:
    """Any circuit with plain data comes back equal, and is written the same way again."""
    circuit = CircuitGraph(note=extra)
    for layer, name in enumerate(components):
        circuit.add_component(name, kind="own", layer=layer, note=extra)
    ends = [(a, b) for i, a in enumerate(components) for b in components[i + 1 :]]
    for (source, target), score, port in zip(ends, scores, "qkv" * 4, strict=False):
        circuit.add_effect(source, target, score, port=port, note=extra)
    text = circuit.to_json()
    again = CircuitGraph.from_json(text)
    assert isinstance(again, CircuitGraph)
    assert same(again, circuit)
    assert again.to_json() == text
    assert json.loads(text)["schema"] == "circuitlab-circuit/1"


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1: object()}])
def test_only_plain_data_is_written(value: object) -> None:
    """Provenance that JSON cannot hold is refused by the writer, not written as something else."""
    circuit = small()
    circuit.graph["own"] = value
    with pytest.raises(GraphError, match="cannot be written as JSON"):
        circuit.to_json()


def broken(**changes: Any) -> str:
    document = json.loads(small().to_json())
    document.update(changes)
    return json.dumps(document)


NODE = {"id": "input", "kind": "input", "layer": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a circuit"),
        ("{", "not a circuit"),
        ("[]", "no graph, nodes and edges"),
        ("{}", "no graph, nodes and edges"),
        ('{"graph": {}, "nodes": [], "edges": [], "x": NaN}', "NaN is not JSON"),
        (broken(nodes=[{"kind": "input"}]), "named by a int, not a str"),
        (broken(nodes=None), "malformed"),
        (broken(nodes=[3], edges=[]), "malformed"),
        (broken(edges=[{"source": "input"}]), "malformed"),
        (broken(edges=7), "malformed"),
        (broken(graph=7), "malformed"),
        (broken(nodes=[{**NODE, "layer": "0"}], edges=[]), "'input' has layer '0'; it needs a int"),
        (broken(nodes=[{**NODE, "layer": True}], edges=[]), "'input' has layer True"),
        (broken(nodes=[{**NODE, "kind": None}], edges=[]), "'input' has kind None"),
        (broken(nodes=[{**NODE, "id": 3}], edges=[]), "named by a int, not a str"),
        (broken(nodes=[NODE], edges=[{"source": "input", "target": "m9", "key": ""}]), "'m9'"),
    ],
)
def test_text_that_is_no_circuit(text: str, message: str) -> None:
    """Whatever is read, the answer is a circuit or one clear GraphError."""
    with pytest.raises(GraphError, match=re.escape(message)):
        CircuitGraph.from_json(text)


@pytest.mark.parametrize(
    ("port", "data", "message"),
    [
        ("", {}, "has score None"),
        ("", {"score": "1"}, "has score '1'"),
        ("", {"score": True}, "has score True"),
        ("", {"score": 10**400}, "has score 1000"),
        ("", {"score": math.nan}, "has score nan"),
        (3, {"score": 1.0}, "has port 3, not a str"),
    ],
)
def test_validate_names_the_effect(port: Any, data: dict[str, Any], message: str) -> None:
    """An edge put in past add_effect is found and named."""
    circuit = small()
    circuit.add_edge("m0", "logits", key=port, **data)
    if port == "":
        circuit.remove_edge("m0", "logits", key="")
        circuit.add_edge("m0", "logits", key="", **data)
    with pytest.raises(GraphError, match=f"m0 → logits.*{message}"):
        circuit.validate()


def test_validate_refuses_cycles() -> None:
    """Effects run forward; a cycle is spelled out."""
    circuit = small()
    circuit.validate()
    circuit.add_effect("logits", "m0", 1.0)
    with pytest.raises(GraphError, match=r"has a cycle: (m0 -> logits|logits -> m0)"):
        circuit.validate()


def test_notebook_shows_picture_and_text() -> None:
    """A circuit shows itself as one inline SVG, safe to stand in a page, and as text."""
    bundle = small()._repr_mimebundle_()
    assert sorted(bundle) == ["image/svg+xml", "text/plain"]
    assert bundle["text/plain"] == "CircuitGraph with 6 nodes and 7 edges"
    root = ElementTree.fromstring(bundle["image/svg+xml"])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "a0.h0" in bundle["image/svg+xml"]


def test_notebook_shows_text_of_a_malformed_circuit() -> None:
    """A circuit that cannot be drawn says why, and sends no control characters."""
    circuit = small()
    circuit.add_node("a0.h9\x1b[2J")
    bundle = circuit._repr_mimebundle_()
    assert list(bundle) == ["text/plain"]
    assert "not drawn: component" in bundle["text/plain"]
    assert "\x1b" not in bundle["text/plain"]


@pytest.mark.parametrize(
    ("module", "kinds"),
    [("circuitlab", "['image/svg+xml', 'text/plain']"), ("circuitlab.graph", "['text/plain']")],
)
def test_public_name_brings_its_picture(module: str, kinds: str) -> None:
    """The public CircuitGraph can draw itself; the graph module alone loads no drawing."""
    code = f"from {module} import CircuitGraph as C; print(sorted(C()._repr_mimebundle_()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kinds


def test_effect_name() -> None:
    """An effect is written with its port, if it has one."""
    assert effect_name("input", "a0.h1", "k") == "input → a0.h1:k"
    assert effect_name("m0", "logits") == "m0 → logits"
