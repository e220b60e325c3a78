"""Pictures: what they show, what they never hold, and what happens without Graphviz."""

from __future__ import annotations

import html
import importlib.util
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from circuitlab import render
from circuitlab.errors import GraphError, OptionError, ResourceError
from circuitlab.graph import CircuitGraph
from circuitlab.labels import clip, visible
from circuitlab.layout import FAINT_HELPS, HELPS, HURTS, select
from circuitlab.wiring import Wiring

NASTY = [
    "<|endoftext|>",
    "<b>",
    '"]; evil [label="x',
    "\\N",
    "\\",
    "a\\",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "]]>",
    "<!-- x -->",
    "&lt;&amp;",
    "{a|<b> c}",
    "a\x00b\x1b[31m\u202e\ud800",
    "two  spaces ",
]
ANY_TEXT = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), min_size=1, max_size=40))


def induction_like() -> CircuitGraph:
    """A small circuit with every kind of component, both signs and all ports."""
    circuit = CircuitGraph(
        model="tiny", task="induction", metric="logit-difference", method="eap-ig",
        n_layers=2, n_heads=4, d_model=64, parallel=False,
    )  # fmt: skip
    wiring = Wiring(2, 4)
    for name in ("input", "a0.h1", "m0", "a1.h0", "m1", "logits"):
        component = wiring.component(name)
        circuit.add_component(name, kind=component.kind, layer=component.layer)
    circuit.nodes["a1.h0"]["role"] = "induction head"
    circuit.add_effect("input", "a0.h1", -1.9, port="v")
    circuit.add_effect("a0.h1", "a1.h0", -2.3, port="k")
    circuit.add_effect("input", "a1.h0", -0.7, port="q")
    circuit.add_effect("input", "m0", 0.1)
    circuit.add_effect("m0", "a1.h0", -0.2, port="q")
    circuit.add_effect("a1.h0", "logits", -2.9)
    circuit.add_effect("m0", "m1", 0.4)
    circuit.add_effect("m1", "logits", 0.3)
    return circuit


def whole(wiring: Wiring) -> CircuitGraph:
    """All edges of a wiring, every score different."""
    circuit = CircuitGraph(n_layers=wiring.n_layers, n_heads=wiring.n_heads)
    for name in (*wiring.sources, "logits"):
        component = wiring.component(name)
        circuit.add_component(name, kind=component.kind, layer=component.layer)
    for rank, (source, target, port) in enumerate(wiring.edges, start=1):
        circuit.add_effect(source, target, (-1) ** rank / rank, port=port)
    return circuit


def one_component(name: str, note: str = "") -> CircuitGraph:
    circuit = CircuitGraph(task=name)
    circuit.add_component(name, kind="feature", layer=0, role=note)
    return circuit


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("}text")]


def titles(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("}title")]


def assert_inert(svg: str) -> None:
    """No script, no handler, no link, nothing fetched from elsewhere."""
    for element in ET.fromstring(svg).iter():
        tag = element.tag.split("}")[1]
        assert tag in {"svg", "title", "rect", "g", "a", "text", "path", "polygon", "polyline"}
        assert not [a for a in element.attrib if a.startswith("on") or a.endswith("href")]


@pytest.fixture
def no_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_commands", lambda engine, suffix: [])


def child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let Graphviz be a child that runs ``program``."""
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(render, "_commands", lambda engine, suffix: [command])


# --- strange text ---------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(name=ANY_TEXT, note=ANY_TEXT)
def test_svg_shows_any_text_literally(name: str, note: str) -> None:
    """Any name and role give valid XML with one box, whose text and tooltip are the text itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "_commands", lambda engine, suffix: [])
        svg = render.svg(one_component(name, note))
    root = ET.fromstring(svg)
    assert sum(e.get("class") == "node" for e in root.iter()) == 1
    assert clip(visible(name), 22) in texts(svg)
    assert f"{visible(name)}: {visible(note)}" in titles(svg)
    assert_inert(svg)


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.lists(ANY_TEXT, min_size=40, max_size=40, unique=True))
def test_dot_shows_any_text_literally(names: list[str]) -> None:
    """Graphviz reads our DOT as one node per component and shows each name as it is."""
    circuit = CircuitGraph()
    for index, name in enumerate(names):
        circuit.add_component(name, kind="head" if index % 2 else "mlp", layer=index)
    for before, after in zip(names[::2], names[1::2], strict=True):
        circuit.add_effect(before, after, 1.0, port="q")
    svg = render._graphviz(render.to_dot(circuit), "dot", "svg").decode()
    shown = [element.replace("\xa0", " ") for element in texts(svg)]
    for name in names:
        # Graphviz keeps no blanks at the ends of a record's fields.
        expected = clip(visible(name), 22).replace("\xa0", " ")
        assert not expected.strip() or expected.strip() in {text.strip() for text in shown}
    nodes = [e for e in ET.fromstring(svg).iter() if e.get("class") == "node"]
    assert len([n for n in nodes if len(n) > 1]) == len(names)
    assert_inert(svg)


@pytest.mark.parametrize("text", NASTY)
def test_provenance_is_shown_literally(text: str, no_graphviz: None) -> None:
    """A task name or verdict is text in the caption and nothing else."""
    circuit = induction_like()
    circuit.graph.update(task=text, verdict="not established", verdict_reason=text)
    shown = " ".join(texts(render.svg(circuit)))
    assert visible(text).split()[0] in shown
    assert "NOT ESTABLISHED" in shown


def test_long_label_is_clipped(no_graphviz: None) -> None:
    """A label of 5,000 characters is cut in the picture and whole in the tooltip."""
    svg = render.svg(one_component("x" * 5000))
    assert max(map(len, texts(svg))) < 100
    assert "x" * 5000 in titles(svg)


# --- what a picture says --------------------------------------------------------------------------


def test_same_circuit_same_bytes() -> None:
    """The order in which a circuit was built leaves no trace in its DOT or SVG."""
    circuit = induction_like()
    turned = CircuitGraph(**circuit.graph)
    for name, data in reversed(list(circuit.nodes(data=True))):
        turned.add_node(name, **data)
    for source, target, port, data in reversed(list(circuit.edges(keys=True, data=True))):
        turned.add_edge(source, target, key=port, **data)
    assert render.to_dot(circuit) == render.to_dot(turned)
    assert render.svg(circuit) == render.svg(turned)


def test_colour_says_the_sign_and_width_the_size(no_graphviz: None) -> None:
    """Negative scores are blue, positive ones vermillion, stronger ones wider."""
    root = ET.fromstring(render.svg(induction_like()))
    drawn = {}
    for group in root.iter():
        if group.get("class") == "edge" and group[0].tag.endswith("title"):
            title, path = "".join(group[0].itertext()), group[1]
            drawn[title] = path.get("stroke"), float(path.get("stroke-width", "0"))
    assert drawn["m1 → logits  +0.30"][0] == HURTS
    assert drawn["a0.h1 → a1.h0:k  −2.3"][0] == HELPS
    widths = [drawn[key][1] for key in sorted(drawn, key=lambda k: abs(_score(k)))]
    assert widths == sorted(widths)
    assert len(drawn) == 8


def _score(tooltip: str) -> float:
    return float(tooltip.split()[-1].replace("−", "-"))


def test_caption_names_the_origin(no_graphviz: None) -> None:
    """Model, task, metric, method and the numbers of edges stand in the picture."""
    shown = texts(render.svg(induction_like()))
    assert "tiny · induction · logit-difference · eap-ig" in shown
    assert f"showing 8 of {Wiring(2, 4).n_edges} edges" in shown


def test_cut_picture_says_so(no_graphviz: None) -> None:
    """A picture that leaves effects out says how many there are, and keeps the strongest."""
    circuit = whole(Wiring(4, 4))
    svg = render.svg(circuit, max_edges=20)
    assert "showing the strongest 20 of 479 edges" in " ".join(texts(svg))
    kept = {effect[:3] for effect in select(circuit, 20).effects}
    assert kept == {effect[:3] for effect in list(circuit.effects())[:20]}


def test_equal_scores_at_the_cut_are_reported(no_graphviz: None) -> None:
    """Where equal scores are told apart by name alone, the caption says so."""
    circuit = whole(Wiring(2, 2))
    for *_, data in circuit.edges(data=True):
        data["score"] = 0.5
    assert "equal scores by name" in " ".join(texts(render.svg(circuit, max_edges=5)))


def test_unestablished_circuit_is_not_shown_as_found(no_graphviz: None) -> None:
    """A circuit that failed its own check carries a red line and has no edge in a full colour."""
    circuit = induction_like()
    circuit.graph.update(verdict="not established", verdict_reason="no better than chance")
    svg = render.svg(circuit)
    assert "NOT ESTABLISHED: no better than chance" in texts(svg)
    assert HELPS not in svg
    assert HURTS not in svg
    assert FAINT_HELPS in svg
    assert "NOT ESTABLISHED: no better than chance" in render.to_dot(circuit)


def test_effects_that_were_not_kept_are_not_drawn(no_graphviz: None) -> None:
    """Effects with ``kept=False`` were measured, but are not of the circuit."""
    circuit = induction_like()
    circuit.edges["input", "m0", ""]["kept"] = False
    assert not [title for title in titles(render.svg(circuit)) if title.startswith("input → m0")]


def test_foreign_scores_are_not_called_help(no_graphviz: None) -> None:
    """A score that means something else is not said to help or hurt."""
    circuit = induction_like()
    circuit.graph["score"] = "L2 norm of the change in z"
    shown = " ".join(texts(render.svg(circuit)))
    assert "helps" not in shown
    assert "score: L2 norm of the change in z" in shown


def test_input_is_below_and_logits_above() -> None:
    """Components stand in the order they run, also where no effect joins them."""
    circuit = induction_like()
    circuit.remove_edges_from([("m1", "logits", "")])
    root = ET.fromstring(render.svg(circuit))
    height = {}
    for group in root.iter():
        if group.get("class") == "node":
            height["".join(group[0].itertext()).split(":")[0]] = float(group[1].get("y", "0"))
    order = ["input", "a0.h1", "m0", "a1.h0", "m1", "logits"]
    assert sorted(height, key=height.__getitem__, reverse=True) == order


@pytest.mark.parametrize("wiring", [Wiring(3, 4), Wiring(12, 12)])
def test_boxes_do_not_overlap(wiring: Wiring, no_graphviz: None) -> None:
    """The layout computed here keeps components apart and inside the picture."""
    root = ET.fromstring(render.svg(whole(wiring), max_edges=200))
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    boxes = []
    for group in root.iter():
        if group.get("class") == "node":
            x, y, w, h = (float(group[1].attrib[k]) for k in ("x", "y", "width", "height"))
            assert 0 <= x <= width - w
            assert 0 <= y <= height - h
            boxes.append((x, y, w, h))
    for index, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:index]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


@pytest.mark.parametrize("edges", [0, 1])
def test_tiny_circuits_have_pictures(edges: int) -> None:
    """A circuit without effects, even without components, still gives a picture that says so."""
    circuit = induction_like().top(edges)
    assert ("showing 1 of" if edges else "showing 0 of") in " ".join(texts(render.svg(circuit)))


def test_malformed_circuit_is_refused() -> None:
    """A score that is not finite is named and nothing is drawn."""
    circuit = induction_like()
    circuit.edges["input", "m0", ""]["score"] = float("nan")
    with pytest.raises(GraphError, match="input → m0"):
        render.svg(circuit)


# --- files and Graphviz ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [(".svg", b"<svg"), (".png", b"\x89PNG"), (".pdf", b"%PDF"), (".dot", b"digraph")],
)
def test_draw_writes_each_format(suffix: str, magic: bytes, tmp_path: Path) -> None:
    """Each suffix gives a file of that format, without a warning where Graphviz is installed."""
    path = tmp_path / f"circuit{suffix}"
    assert render.draw(induction_like(), path) == []
    assert path.read_bytes().startswith(magic)


def test_large_picture_has_every_format(tmp_path: Path) -> None:
    """A circuit of 32,491 edges gives a bounded SVG and a PNG."""
    circuit = whole(Wiring(12, 12))
    for suffix in (".svg", ".png"):
        path = tmp_path / f"circuit{suffix}"
        assert render.draw(circuit, path) == []
        assert 10_000 < path.stat().st_size < 5_000_000


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    """The message names the suffix and those there are."""
    with pytest.raises(OptionError, match=r"'\.bmp'.*\.svg"):
        render.draw(induction_like(), tmp_path / "x.bmp")


def test_missing_graphviz_still_gives_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pygraphviz and without dot the built-in layout is used, and a warning says so."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    warnings = render.draw(induction_like(), tmp_path / "x.svg")
    assert warnings == ["Graphviz is not installed; the built-in layout was used"]
    assert "a1.h0" in texts((tmp_path / "x.svg").read_text())


def test_missing_graphviz_is_named_for_png(tmp_path: Path, no_graphviz: None) -> None:
    """A PNG cannot be had without Graphviz; the remedy it names works."""
    with pytest.raises(ResourceError, match=r"pip install pygraphviz.*\.svg"):
        render.draw(induction_like(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
    render.draw(induction_like(), tmp_path / "x.svg")
    assert (tmp_path / "x.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(600)", "did not answer in 0.5 s"),
        ("import os; os.kill(os.getpid(), 11)", "exit -11"),
        ("raise SystemExit('out of memory')", "out of memory"),
        ("print('no layout')", "no usable layout"),
        ("print('{\"objects\": []}')", "no usable layout"),
        ("pass", "exit 0"),
    ],
)
def test_failing_graphviz_falls_back(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that hangs, crashes or talks nonsense costs a warning, not the picture."""
    monkeypatch.setattr(render, "BUDGET", 0.5)
    if "sleep" not in program:
        monkeypatch.setattr(render, "BUDGET", 30.0)
    child(monkeypatch, program)
    (warning,) = render.draw(induction_like(), tmp_path / "x.svg")
    assert said in warning
    assert "built-in layout" in warning
    ET.parse(tmp_path / "x.svg")


def test_second_graphviz_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where pygraphviz fails, the dot program is asked before the built-in layout is used."""
    good = render._commands("dot", "json")
    bad = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(render, "_commands", lambda engine, suffix: [bad, *good])
    assert render.draw(induction_like(), tmp_path / "x.svg") == []


def test_working_directory_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pygraphviz.py that lies where the user works is not run."""
    (tmp_path / "pygraphviz.py").write_text("open('owned', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    render.svg(induction_like())
    assert not (tmp_path / "owned").exists()


def test_dot_has_only_known_attributes() -> None:
    """No attribute of the DOT can point to a file or an address."""
    circuit = induction_like()
    circuit.nodes["m0"].update(URL="javascript:1", href="x", image="/etc/passwd", label="note")
    names = set(re.findall(r'[\[ ](\w+)="', html.unescape(render.to_dot(circuit))))
    assert names <= {
        "rankdir", "ranksep", "nodesep", "outputorder", "fontname", "fontsize", "labelloc",
        "labeljust", "label", "fixedsize", "margin", "rank", "style", "shape", "width", "height",
        "fillcolor", "color", "fontcolor", "tooltip", "id", "penwidth", "arrowsize", "weight",
    }  # fmt: skip
