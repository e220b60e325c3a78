"""Gates, token positions and redundant effects in pictures."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from circuitlab import layout, legend, render
from circuitlab.components import number
from circuitlab.graph import CircuitGraph
from circuitlab.labels import visible
from circuitlab.layout import Places, Selection
from circuitlab.symbols import SYMBOLS

TYPES = sorted(SYMBOLS)
Point = tuple[float, float]


def gated(kind: str = "AND", n_members: int = 2) -> CircuitGraph:
    """Heads of layer 0 join in a gate that the MLP of layer 1 reads."""
    circuit = CircuitGraph(model="hand", task="gates", metric="logit-difference", method="patching")
    circuit.add_component("input", kind="input", layer=0)
    members = [f"a0.h{h}" for h in range(n_members)]
    for index, name in enumerate(members):
        circuit.add_component(name, kind="head", layer=0)
        circuit.add_effect("input", name, -1.0 - index, port="v")
    circuit.add_component("a0.h9", kind="head", layer=0)
    circuit.add_component("m0", kind="mlp", layer=0)
    circuit.add_component("m1", kind="mlp", layer=1)
    circuit.add_component("logits", kind="logits", layer=2)
    circuit.add_component(
        "gate1", kind="gate", layer=1, gate=kind, interaction=0.83, members=members, label="why"
    )
    for index, name in enumerate(members):
        circuit.add_effect(name, "gate1", -0.5 - index)
    circuit.add_effect("gate1", "m1", -2.0)
    circuit.add_effect("a0.h9", "m0", 0.3)
    circuit.add_effect("m1", "logits", -2.0)
    return circuit


def tokens(*texts: str, first: int = 0) -> CircuitGraph:
    """Each token, and one head at its position, with its total effect on the logits."""
    circuit = CircuitGraph(n_layers=1, n_heads=12)
    circuit.add_component("logits", kind="logits", layer=1)
    for position, text in enumerate(texts, start=first):
        circuit.add_component(f"t{position}", kind="token", layer=0, token=text)
        circuit.add_component(f"a0.h{11 - position}[{position}]", kind="head", layer=0)
        for name in (f"t{position}", f"a0.h{11 - position}[{position}]"):
            circuit.add_effect(name, "logits", -1.0 - position % 3, kind="total")
    return circuit


@pytest.fixture(params=["dot", "grid"])
def laid_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each layout in turn: Graphviz's and the built-in one."""
    if request.param == "grid":
        monkeypatch.setattr(render, "_commands", lambda engine, suffix: [])
    return str(request.param)


def places_of(circuit: CircuitGraph) -> tuple[Selection, Places]:
    kept = {}

    def compose(circuit: CircuitGraph, selection: Selection, places: Places) -> object:
        kept["it"] = selection, places
        return legend.compose(circuit, selection, places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "compose", compose)
        render.svg(circuit)
    return kept["it"]


def drawn(circuit: CircuitGraph) -> ET.Element:
    return ET.fromstring(render.svg(circuit))


def node(root: ET.Element, name: str) -> ET.Element:
    (found,) = [
        e for e in root.iter()
        if e.get("class") == "node" and "".join(e[0].itertext()).startswith(name)
    ]  # fmt: skip
    return found


def words(root: ET.Element) -> list[str]:
    return ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")]


def along(points: tuple[Point, ...], steps: int = 200) -> list[Point]:
    """Points on Bezier segments, by de Casteljau."""
    found = []
    for start in range(0, len(points) - 1, 3):
        for step in range(steps + 1):
            t, segment = step / steps, points[start : start + 4]
            while len(segment) > 1:
                segment = tuple(
                    (a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))
                    for a, b in pairwise(segment)
                )
            found.append(segment[0])
    return found


# --- symbols --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_symbol_fills_its_own_box(kind: str) -> None:
    """Its outlines touch all four sides of the box that the layout reserves, and leave none."""
    symbol = SYMBOLS[kind]
    points = [point for outline in symbol.outlines for point in along(outline)]
    for axis, size in ((0, symbol.width), (1, symbol.height)):
        assert max(p[axis] for p in points) == pytest.approx(size / 2)
        assert min(p[axis] for p in points) == pytest.approx(-size / 2)
    # The output leaves at the top of the middle.
    assert max(points, key=lambda p: p[1])[0] == pytest.approx(0, abs=0.5)
    assert symbol.outlines[0][0] == pytest.approx(symbol.outlines[0][-1])


@pytest.mark.parametrize("kind", TYPES)
def test_feet_touch_the_outline_from_below(kind: str) -> None:
    """Each input ends on the symbol's lowest outline, left to right, wherever it enters."""
    symbol = SYMBOLS[kind]
    points = [point for outline in symbol.outlines for point in along(outline, 2000)]
    for x, y in (feet := symbol.feet(5)):
        assert y == pytest.approx(min(py for px, py in points if abs(px - x) < 0.05), abs=0.05)
    assert feet == sorted(feet)


# --- a gate in a picture --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_gate_is_drawn_as_its_symbol(kind: str, laid_out: str) -> None:
    """A closed path with the word inside and members and interaction as its tooltip."""
    gate = node(drawn(gated(kind)), "gate1")
    assert "".join(gate[0].itertext()) == (
        f"gate1: {kind} of a0.h0, a0.h1; interaction {number(0.83)}; why"
    )
    paths = [e.attrib for e in gate.iter() if e.tag.endswith("}path")]
    assert len(paths) == len(SYMBOLS[kind].outlines)
    assert paths[0]["d"].endswith("Z")
    assert [path["fill"] for path in paths[1:]] == ["none"] * (len(paths) - 1)
    assert not [e for e in gate.iter() if e.tag.endswith("}rect")]
    assert words(gate)[0].upper() == kind


@pytest.mark.parametrize("kind", TYPES)
def test_inputs_enter_below_and_the_output_leaves_above(kind: str, laid_out: str) -> None:
    """Tips lie on the symbol's outline, side by side, and no line enters from above."""
    selection, places = places_of(gated(kind, 3))
    symbol, (x, y) = SYMBOLS[kind], places.nodes["gate1"]
    entering = [i for i, e in enumerate(selection.effects) if e.target == "gate1"]
    tips = sorted((places.tips[i][0] - x, places.tips[i][1] - y) for i in entering)
    assert tips == [pytest.approx(foot) for foot in symbol.feet(3)]
    for i in entering:
        before, end = places.curves[i][-2:]
        assert before[0] == end[0] == places.tips[i][0]
        assert before[1] < end[1] < places.tips[i][1]
        source = selection.components[selection.effects[i].source]
        floor = places.nodes[source.name][1] - source.height / 2
        assert min(py for _, py in along(places.curves[i])) >= floor
    (out,) = [i for i, e in enumerate(selection.effects) if e.source == "gate1"]
    assert max(py for _, py in places.curves[out]) > y + symbol.height / 2


def test_inputs_do_not_cross_before_a_gate(laid_out: str) -> None:
    """Inputs enter in the order in which their members stand."""
    selection, places = places_of(gated("OR", 5))
    by_tip = sorted(
        (places.tips[i][0], places.nodes[e.source][0])
        for i, e in enumerate(selection.effects)
        if e.target == "gate1"
    )
    assert [member for _, member in by_tip] == sorted(member for _, member in by_tip)


def test_gate_stands_between_members_and_reader(laid_out: str) -> None:
    """Above every member, below what reads it, though its layer says nothing of that."""
    _, places = places_of(gated())
    height = {name: y for name, (_, y) in places.nodes.items()}
    assert height["input"] < height["a0.h0"] < height["gate1"] < height["m1"] < height["logits"]
    assert height["gate1"] < height["m0"]


def test_gate_of_a_gate_stands_above_it(laid_out: str) -> None:
    """Gates may be members of gates."""
    circuit = gated()
    circuit.add_component("gate2", kind="gate", layer=0, gate="OR", members=["gate1", "m0"])
    circuit.add_effect("gate1", "gate2", -1.0)
    circuit.add_effect("m0", "gate2", -1.0)
    circuit.add_effect("gate2", "logits", -1.0)
    _, places = places_of(circuit)
    height = {name: y for name, (_, y) in places.nodes.items()}
    assert max(height["gate1"], height["m0"]) < height["gate2"] < height["logits"]


def test_bitmap_shows_the_gate() -> None:
    """The PNG has the gate's fill where the SVG has it, and its line on the outline."""
    circuit = gated("MIXED")
    scene, _ = render._scene(circuit, 300)
    (box,) = [box for box in scene.boxes if box.outlines]
    image = Image.open(io.BytesIO(render._paint(scene, "png"))).convert("RGB")
    scale = image.width / scene.width

    def colour(dx: float, dy: float) -> str:
        place = int((box.x + dx) * scale), int((scene.height - box.y - dy) * scale)
        pixel = image.getpixel(place)
        assert isinstance(pixel, tuple)
        return "#" + "".join(f"{part:02X}" for part in pixel)

    assert colour(0, 12) == box.fill
    assert colour(26, 10) == "#FFFFFF"  # the diamond leaves the corners of its box free
    assert colour(14.5, 10) == box.stroke


def test_unknown_gate_is_a_box_with_its_name(laid_out: str) -> None:
    """A plugin's own type of gate is shown like any kind that pictures do not know."""
    gate = node(drawn(gated("NAND")), "gate1")
    assert "gate1" in words(gate)
    assert [e for e in gate.iter() if e.tag.endswith("}rect") and e.get("stroke-dasharray")]


def test_dot_names_the_gate() -> None:
    """The DOT has a shape with the word, which Graphviz draws."""
    for kind in TYPES:
        text = render.to_dot(gated(kind))
        shown = words(ET.fromstring(render._graphviz(text, "dot", "svg").decode()))
        assert kind in [word.upper() for word in shown]
        assert f"{kind}: {SYMBOLS[kind].meaning}" in text


def test_legend_explains_only_what_is_drawn(laid_out: str) -> None:
    """A type of gate that is not in the picture is not in its legend."""
    shown = words(drawn(gated("XOR")))
    assert "XOR: one member without the other" in shown
    assert "number in a gate: interaction of its members" in shown
    assert not [word for word in shown if word.startswith(("AND:", "dashed:"))]
    plain = gated()
    plain.remove_node("gate1")
    assert not [word for word in words(drawn(plain)) if "gate" in word.replace("gates", "")]


def test_arrows_to_gates_are_not_called_edges(laid_out: str) -> None:
    """A member's arrow to its gate is no edge of the model, so they are not counted as such."""
    circuit = gated()
    circuit.graph["n_edges_total"] = 479
    assert "showing all 7 effects" in words(drawn(circuit))
    assert "showing all 4 effects" in words(drawn(tokens("a", "b")))


def test_cut_leaves_gates_whole() -> None:
    """A gate of which one effect is strong enough is shown with all its members."""
    circuit = gated("AND", 4)
    selection = layout.select(circuit, 2)
    shown = {(e.source, e.target) for e in selection.effects}
    assert shown == {(s, t) for s, t in circuit.edges() if "gate1" in (s, t)} | {("input", "a0.h3")}


# --- redundant members ----------------------------------------------------------------------------


def test_redundant_effect_is_dashed(laid_out: str) -> None:
    """Only the redundant member's arrow is dashed, in SVG and DOT; the legend says why."""
    circuit = gated("OR")
    circuit.edges["a0.h1", "gate1", ""]["redundant"] = True
    root = drawn(circuit)
    dashed = [
        "".join(e[0].itertext()) for e in root.iter()
        if e.get("class") == "edge" and e[0].tag.endswith("title") and e[1].get("stroke-dasharray")
    ]  # fmt: skip
    assert dashed == [f"redundant: a0.h1 → gate1  {number(-1.5)}"]
    assert "dashed: redundant, others can stand in" in words(root)
    lines = [line for line in render.to_dot(circuit).splitlines() if 'style="dashed"' in line]
    assert len(lines) == 1
    assert "dashed: redundant, others can stand in" in render.to_dot(circuit)


# --- token positions ------------------------------------------------------------------------------


def test_ellipsis_says_that_prompts_differ() -> None:
    """The commonest text of a position is not shown as if every prompt had it."""
    circuit = tokens("The", "cat")
    circuit.nodes["t1"]["tokens"] = ["cat", "dog"]
    circuit.nodes["a0.h10[1]"].update(token="cat", tokens=["cat", "dog"])
    root = drawn(circuit)
    assert "The" in words(node(root, "t0"))
    assert "cat …" in words(node(root, "t1"))
    assert "cat …" in words(node(root, "a0.h10[1]"))


def test_no_effect_is_neither_help_nor_harm() -> None:
    """An effect of 0 is grey, and the legend does not speak of harm for its sake."""
    circuit = gated()
    circuit.edges["a0.h9", "m0", ""]["score"] = 0.0
    assert layout.HURTS not in render.svg(circuit)
    assert f'stroke="{layout.NEUTRAL}"' in render.svg(circuit)
    shown = words(drawn(circuit))
    assert "helps the task (−)" in shown
    assert "hurts the task (+)" not in shown


def test_second_line_is_light_on_dark_boxes() -> None:
    """What stands below the name of the input or the logits can be read."""
    for kind, dark in (("input", True), ("logits", True), ("head", False)):
        circuit = CircuitGraph()
        circuit.add_component("x", kind=kind, layer=0, token="cat")
        selection, _ = places_of(circuit)
        _, role = selection.components["x"].texts(0, 0)
        assert (int(role.colour[1:3], 16) > 128) == dark


@pytest.mark.parametrize("first", [0, -8])
def test_positions_run_from_left_to_right(first: int, laid_out: str) -> None:
    """Tokens stand as the prompt is read, also when positions count from the end."""
    circuit = tokens("The", " cat", "<x>", " sat", " on", first=first)
    _, places = places_of(circuit)
    for kind in ("token", "head"):
        row = sorted(
            (places.nodes[name][0], name)
            for name, data in circuit.nodes(data=True)
            if data["kind"] == kind
        )
        found = [int(name.strip("]").replace("[", "t").split("t")[-1]) for _, name in row]
        assert found == list(range(first, first + 5))
    assert all(places.nodes[f"t{first}"][1] < y for n, (_, y) in places.nodes.items() if "." in n)


def test_token_is_shown_by_its_text(laid_out: str) -> None:
    """The text is what is read; blanks at its ends are shown, and the name stands under it."""
    root = drawn(tokens(" cat", "\n"))
    assert words(node(root, "t0")) == ["␣cat", "t0"]
    assert words(node(root, "t1")) == ["\\u{a}", "t1"]


def test_residual_sites_stand_around_their_block(laid_out: str) -> None:
    """resid_pre under the heads of its layer, resid_mid above them, resid_post above the MLP."""
    circuit = CircuitGraph()
    kinds = {
        "a0.h0[3]": "head", "resid_pre.1[3]": "residual", "a1.h0[3]": "head",
        "resid_mid.1[3]": "residual", "m1[3]": "mlp", "resid_post.1[3]": "residual",
    }  # fmt: skip
    order = list(kinds)
    for name, kind in kinds.items():
        circuit.add_component(name, kind=kind, layer=int("1" in name))
    circuit.add_component("logits", kind="logits", layer=2)
    for name in order:
        circuit.add_effect(name, "logits", -1.0, kind="total")
    _, places = places_of(circuit)
    assert sorted(order, key=lambda name: places.nodes[name][1]) == order


@pytest.mark.parametrize(
    "circuit", [gated("MIXED", 7), tokens(*"abcdefgh")], ids=["gate", "tokens"]
)
def test_nothing_overlaps(circuit: CircuitGraph, laid_out: str) -> None:
    """Symbols, tokens and components keep apart in both layouts."""
    selection, places = places_of(circuit)
    boxes = [(*places.nodes[c.name], c.width, c.height) for c in selection.components.values()]
    for index, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:index]:
            assert abs(x - x2) >= (w + w2) / 2 - 0.01 or abs(y - y2) >= (h + h2) / 2 - 0.01


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.sampled_from(["<b>", '"]; x [label="', "\\N", "]]>", "a\x00\u202e\ud800"]),
                      st.text(st.characters(), min_size=1, max_size=30)))  # fmt: skip
def test_gate_and_token_text_is_shown_literally(text: str) -> None:
    """Members, labels and tokens of strangers are text in the SVG and nothing else."""
    circuit = gated()
    circuit.nodes["gate1"].update(members=[text], label=text)
    circuit.add_component("t0", kind="token", layer=0, token=text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "_commands", lambda engine, suffix: [])
        root = drawn(circuit)
    tooltip = "".join(node(root, "gate1")[0].itertext())
    assert tooltip.startswith(f"gate1: AND of {visible(text)}; interaction")
    assert {e.tag.split("}")[1] for e in root.iter()} <= {
        "svg", "title", "rect", "g", "text", "path", "polygon",
    }  # fmt: skip
