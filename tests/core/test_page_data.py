"""Data of a page: every effect with its numbers, two circuits as one, places without overlap."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from circuitlab.comparing import compare_circuits
from circuitlab.errors import GraphError
from circuitlab.graph import CircuitGraph
from circuitlab.layout import select
from circuitlab.page import compose
from circuitlab.page import data as page_data_module
from circuitlab.page.data import MOST, page_data
from circuitlab.page.places import layouts
from circuitlab.wiring import Wiring


def random_circuit(
    n: int, seed: int = 0, layers: int = 3, heads: int = 4, **provenance: Any
) -> CircuitGraph:
    """A circuit of ``n`` edges of a model, drawn at random, half of them with data."""
    wiring, draw = Wiring(layers, heads), random.Random(seed)
    circuit = CircuitGraph(n_layers=layers, n_heads=heads, **provenance)
    for edge in draw.sample(list(wiring.edges), n):
        for name in (edge.source, edge.target):
            part = wiring.component(name)
            circuit.add_component(name, kind=part.kind, layer=part.layer)
        circuit.add_effect(edge.source, edge.target, draw.gauss(0, 1), port=edge.port)
        if draw.random() < 0.5:
            circuit.edges[edge.source, edge.target, edge.port]["exact"] = draw.gauss(0, 1)
    return circuit


def read(found: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """The effects in a page's data, in its order."""
    names, edges = [node["name"] for node in found["nodes"]], found["edges"]
    return [
        (names[s], names[t], edges["ports"][p], score)
        for s, t, p, score in zip(
            edges["source"], edges["target"], edges["port"], edges["score"], strict=True
        )
    ]


def column(found: dict[str, Any], name: str) -> dict[int, Any]:
    """A column of a page's data as number of the edge to value."""
    data = found["edges"]["columns"][name]
    return dict(zip(data.get("at", range(len(data["is"]))), data["is"], strict=True))


@pytest.mark.parametrize("n", [1, 40, 262])
def test_every_effect_is_there_strongest_first(n: int) -> None:
    """Ends, port and score of each effect are those of the circuit, to four figures."""
    circuit = random_circuit(n)
    found = page_data(circuit, {})
    expected = list(circuit.effects())
    assert [effect[:3] for effect in read(found)] == [effect[:3] for effect in expected]
    for (*_, score), (*_, exact) in zip(read(found), expected, strict=True):
        assert score == pytest.approx(exact, rel=5e-4)
    known = {i: circuit.edges[effect[:3]].get("exact") for i, effect in enumerate(expected)}
    known = {i: value for i, value in known.items() if value is not None}
    if known:
        assert column(found, "exact") == pytest.approx(known, rel=5e-4)
    assert (found["n_effects"], found["n_model"]) == (n, 262)


def test_page_holds_the_strongest_and_says_of_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more effects than a page can draw the strongest are held, and all are counted."""
    monkeypatch.setattr(page_data_module, "MOST", 7)
    circuit = random_circuit(50)
    found = page_data(circuit, {})
    assert [e[:3] for e in read(found)] == [e[:3] for e in circuit.top(7).effects()]
    assert found["n_effects"] == 50


def test_page_of_twenty_thousand_effects_is_small() -> None:
    """A page of 20,000 effects has them all and is a fifth of the 5 MB that it may be."""
    circuit = random_circuit(20_000, layers=12, heads=12)
    assert len(compose(circuit).encode()) < 1_000_000
    assert MOST == 20_000
    assert len(read(page_data(circuit, {}))) == 20_000


def test_what_was_measured_and_not_kept_is_there_and_told() -> None:
    """Effects outside the circuit come with ``kept`` false; the circuit itself is not changed."""
    circuit = random_circuit(20)
    weakest = [effect[:3] for effect in circuit.effects()][-5:]
    for edge in weakest:
        circuit.edges[edge]["kept"] = False
    found = page_data(circuit, {})
    dropped = {read(found)[i][:3] for i, kept in column(found, "kept").items() if kept is False}
    assert dropped == set(weakest)
    assert [circuit.edges[edge]["kept"] for edge in weakest] == [False] * 5


def test_second_circuit_is_compared() -> None:
    """With a second circuit the page is that of the comparison of the two, and tells it."""
    first = random_circuit(60, seed=1, method="eap", model="m")
    second = random_circuit(60, seed=2, method="eap-ig", model="m")
    comparison = compare_circuits(first, second)
    assert compose(first, other=second) == compose(comparison.circuit)
    found = page_data(comparison.circuit, {})
    sides = {"a": comparison.only_a, "both": comparison.both, "b": comparison.only_b}
    owners = dict(zip([e[:3] for e in read(found)], found["edges"]["owner"], strict=True))
    assert owners == {edge: side for side, edges in sides.items() for edge in edges}
    assert found["owners"] == {"a": "only A · eap", "b": "only B · eap-ig", "both": "both"}
    assert ["method", "eap | eap-ig"] in found["about"]["facts"]
    assert ["Jaccard", f"{len(comparison.both) / len(owners):.2f}"] in found["about"]["facts"]


def test_a_side_without_an_edge_of_its_own_is_named_too() -> None:
    """The legend counts 0 edges of the second circuit by its name, as in the terminal."""
    first = random_circuit(60, seed=1)
    found = page_data(compare_circuits(first, first.top(20), names=("all", "few")).circuit, {})
    assert found["owners"] == {"a": "only all", "b": "only few", "both": "both"}


def test_total_effects_are_no_edges_of_the_model() -> None:
    """They are called effects, and not counted among the model's edges."""
    circuit = random_circuit(40)
    assert (page_data(circuit, {})["noun"], page_data(circuit, {})["n_model"]) == ("edge", 262)
    for *_, data in circuit.edges(data=True):
        data["kind"] = "total"
    assert (page_data(circuit, {})["noun"], page_data(circuit, {})["n_model"]) == ("effect", None)


def test_circuits_that_together_run_in_a_circle_are_refused() -> None:
    """Two circuits whose effects form a cycle cannot be drawn as one."""
    circuits = []
    for source, target in (("x", "y"), ("y", "x")):
        circuit = CircuitGraph()
        for name in ("x", "y"):
            circuit.add_component(name, kind="head", layer=0)
        circuit.add_effect(source, target, 1.0)
        circuits.append(circuit)
    with pytest.raises(GraphError, match="the circuit has a cycle"):
        compose(circuits[0], other=circuits[1])


def test_details_reach_their_component() -> None:
    """Role, pattern, effects and card stand at the component they were given for."""
    circuit = random_circuit(30)
    pattern = {"tokens": [" a", "b ", "  "], "values": [[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]}
    found = page_data(circuit, {
        "m1": {"card": "<svg><rect/></svg>", "role": "writer"},
        "a1.h0": {"pattern": pattern, "effects": {"noise": -1.23456}, "card": ["one", "two"]},
    })  # fmt: skip
    names = [node["name"] for node in found["nodes"]]
    by_name = {names[int(index)]: detail for index, detail in found["details"].items()}
    assert by_name["m1"]["role"] == "writer"
    assert by_name["m1"]["card"]["svg"].startswith(
        '<svg xmlns="http://www.w3.org/2000/svg"><rect/>'
    )
    assert by_name["a1.h0"] == {
        "pattern": {"tokens": ["␣a", "b␣", "␣␣"], "values": pattern["values"]},
        "effects": {"noise": -1.235},
        "card": {"lines": ["one", "two"]},
    }


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({"a9.h9": {}}, "no such component"),
        ({"input": {"colour": "red"}}, "colour"),
        ({"input": {"effects": {"noise": math.nan}}}, "finite"),
        ({"input": {"effects": {"sideways": 1.0}}}, "sideways"),
        ({"input": {"pattern": {"tokens": ["a"], "values": [[1, 0]]}}}, "1 x 1"),
        ({"input": {"pattern": {"tokens": ["a"], "values": [[2.0]]}}}, "no probability"),
        ({"input": {"pattern": {"tokens": ["a"], "values": [[math.nan]]}}}, "no probability"),
    ],
)
def test_details_of_another_form_are_refused(details: dict[str, Any], words: str) -> None:
    """Details of nothing, of unknown kinds, or with numbers that are none, are refused."""
    circuit = random_circuit(262)
    with pytest.raises(GraphError, match=words):
        compose(circuit, details=details)


def positional(n_positions: int, heads: int = 2) -> CircuitGraph:
    """Heads at token positions, all read by the logits."""
    circuit = CircuitGraph()
    circuit.add_component("logits", kind="logits", layer=2)
    for layer, head, position in itertools.product(range(2), range(heads), range(n_positions)):
        name = f"a{layer}.h{head}[{position}]"
        circuit.add_component(name, kind="head", layer=layer, position=position, token="cat")
        circuit.add_effect(name, "logits", -1.0 - position)
    return circuit


def features(n: int) -> CircuitGraph:
    """Features below an MLP and above it."""
    circuit = CircuitGraph(score="positive = the source raises the target")
    for index in range(n):
        for site in ("mlp_in", "mlp_out"):
            name = f"{site}.0.f{index}"
            circuit.add_component(name, kind="feature", layer=0, site=f"{site}.0", role="a b c")
        circuit.add_effect(f"mlp_in.0.f{index}", f"mlp_out.0.f{index * 7 % (index + 1)}", 1.0)
    return circuit


@pytest.mark.parametrize(
    "circuit",
    [random_circuit(1), random_circuit(262), random_circuit(2000, layers=12, heads=12),
     positional(12), positional(40, heads=1), features(5), features(90)],
    ids=["one", "small", "large", "positions", "many positions", "few features", "features"],
)  # fmt: skip
def test_components_never_overlap(circuit: CircuitGraph) -> None:
    """In every layout boxes are apart, and what has a score to the logits stands below them."""
    selection = select(circuit, MOST)
    for places in layouts(selection).values():
        assert set(places) == set(selection.components)
        for a, b in itertools.combinations(selection.components.values(), 2):
            (xa, ya), (xb, yb) = places[a.name], places[b.name]
            apart = abs(xa - xb) * 2 >= a.width + b.width or abs(ya - yb) * 2 >= a.height + b.height
            assert apart, (a.name, b.name)
        for effect in selection.effects:
            if not selection.components[effect.target].loose:
                assert places[effect.source][1] < places[effect.target][1]


def test_token_positions_run_from_left_to_right() -> None:
    """By position, components stand in the order of the prompt; by layer, in rows of a layer."""
    selection = select(positional(9), MOST)
    found = layouts(selection)
    assert list(found) == ["positions", "layers"]
    for head in ("a0.h0", "a0.h1", "a1.h0"):
        xs = [found["positions"][f"{head}[{position}]"][0] for position in range(9)]
        assert xs == sorted(xs)
        assert len(set(xs)) == 9
    heights = {
        layer: [y for name, (_, y) in found["layers"].items() if name.startswith(f"a{layer}")]
        for layer in range(2)
    }
    assert max(heights[0]) < min(heights[1])


def test_without_positions_there_is_one_layout() -> None:
    """Where no component has a token position nothing is to be chosen."""
    assert list(layouts(select(random_circuit(40), MOST))) == ["layers"]
