"""The page in a browser: what clicking, typing and choosing show."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from circuitlab.graph import CircuitGraph
from circuitlab.page import Section, compose, figure, frame
from circuitlab.render import svg

Opener = Callable[..., Any]

EDGES = [
    ("input", "m0", "", -8.25),
    ("m2", "logits", "", -8.0),
    ("m0", "a1.h0", "v", -3.75),
    ("a1.h0", "m2", "", -2.5),
    ("input", "a1.h0", "k", -1.25),
    ("a1.h0", "logits", "", -1.0),
    ("input", "a0.h1", "q", 0.75),
    ("a0.h1", "a1.h0", "k", 0.5),
    ("input", "m2", "", -0.25),
]


def circuit_of(edges: list[tuple[str, str, str, float]] = EDGES, **graph: Any) -> CircuitGraph:
    """A small circuit with both signs, all ports and data on an edge."""
    circuit = CircuitGraph(model="tiny", task="toy", metric="logit-difference", **graph)
    for name in ("input", "a0.h1", "m0", "a1.h0", "m2", "logits"):
        kind = {"a": "head", "m": "mlp"}.get(name[0], name)
        layer = 3 if name == "logits" else int(name[1]) if name[1].isdigit() else 0
        circuit.add_component(name, kind=kind, layer=layer)
    circuit.nodes["a1.h0"]["role"] = "name mover"
    for source, target, port, score in edges:
        circuit.add_effect(source, target, score, port=port)
    if circuit.has_edge("m0", "a1.h0", "v"):
        circuit.edges["m0", "a1.h0", "v"].update(exact=-2.625, confirmed=True)
    return circuit


def heading(opened: Any) -> str:
    """The title of the card."""
    opened.settle()
    return str(opened.page.inner_text("#card h2"))


def listed(opened: Any, title: str) -> list[tuple[str, str]]:
    """The components under a heading of the card, with their scores."""
    section = opened.page.locator(
        "#card section", has=opened.page.locator(f"h3:has-text('{title}')")
    )
    rows = section.locator("li").all()
    return [(r.locator(".name").inner_text(), r.locator(".score").inner_text()) for r in rows]


def test_page_opens_and_says_what_it_shows(open_page: Opener) -> None:
    """The page opens from a file, without a network, and tells the whole circuit first."""
    opened = open_page(compose(circuit_of(verdict="established", n_layers=3, n_heads=2)))
    assert opened.page.inner_text("#count").startswith("Showing 9 of 9 edges")
    assert heading(opened) == "toy · tiny"
    assert opened.page.inner_text("#verdict") == "established"
    assert opened.page.inner_text("#legend").startswith("helps the task (−)")
    assert len(opened.page.query_selector_all("#components button")) == 6


def test_click_on_a_component_tells_what_it_reads_and_feeds(open_page: Opener) -> None:
    """The card lists edges in and out, strongest first, and each entry leads on."""
    opened = open_page(compose(circuit_of()))
    opened.page.mouse.click(*opened.place("a1.h0"))
    assert heading(opened) == "a1.h0"
    assert "name mover" in opened.page.inner_text("#card")
    into = sorted((e for e in EDGES if e[1] == "a1.h0"), key=lambda e: -abs(e[3]))
    assert [name for name, _ in listed(opened, "Reads from")] == [e[0] for e in into]
    assert listed(opened, "Reads from")[0][1] == "−3.75"
    assert listed(opened, "Feeds") == [("m2", "−2.5"), ("logits", "−1")]
    opened.page.click("#card li:has-text('m0') button >> nth=0")
    assert heading(opened) == "m0"
    assert listed(opened, "Feeds") == [("a1.h0:v", "−3.75")]
    opened.page.click("#card .score >> text=−3.75")
    assert heading(opened) == "m0 → a1.h0:v"


def test_click_on_an_edge_tells_its_data(open_page: Opener) -> None:
    """A click beside no component but on a line tells score, patched effect and rank."""
    opened = open_page(
        compose(circuit_of([("m0", "a1.h0", "v", -3.75), ("m2", "logits", "", 1.0)]))
    )
    nodes = {node["name"]: node for node in opened.data["nodes"]}
    (x0, y0), (x1, y1) = opened.place("m0"), opened.place("a1.h0")
    # From the top of one box to the arrow below the other; the middle of such a curve is on it.
    scale = float(opened.page.get_attribute("#view", "data-scale"))
    rise = scale * (nodes["a1.h0"]["h"] - nodes["m0"]["h"] + 2 * 10.1) / 2
    opened.page.mouse.click((x0 + x1) / 2, (y0 + y1 + rise) / 2)
    assert heading(opened) == "m0 → a1.h0:v"
    card = opened.page.inner_text("#card")
    for words in ("1. strongest of 2", "−3.75", "helps the task", "−2.63", "as value"):
        assert words in card
    opened.page.mouse.click(x0, y0 + 150)
    assert heading(opened) == "toy · tiny"


def test_pointer_over_a_component_says_its_name(open_page: Opener) -> None:
    """A tip names what is under the pointer, and goes when nothing is."""
    opened = open_page(compose(circuit_of()))
    x, y = opened.place("a1.h0")
    opened.page.mouse.move(x, y)
    opened.settle()
    assert opened.page.inner_text("#tip") == "a1.h0: name mover"
    opened.page.mouse.move(x, y + 5000)
    opened.settle()
    assert not opened.page.is_visible("#tip")


def test_keys_search_and_walk(open_page: Opener) -> None:
    """/ searches by role, arrows follow the strongest edges, Esc lets go, ? lists the keys."""
    opened = open_page(compose(circuit_of()))
    keys = opened.page.keyboard
    keys.press("/")
    assert opened.page.evaluate("document.activeElement.id") == "search"
    keys.type("MOVER")
    assert opened.page.inner_text("#components") == "a1.h0\nname mover"
    keys.press("Enter")
    assert heading(opened) == "a1.h0"
    walked = []
    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown"):
        keys.press(key)
        walked.append(heading(opened))
    assert walked == ["m2", "logits", "m2", "a1.h0", "m0", "input"]
    assert opened.page.inner_text("#said").startswith("input")
    keys.press("Escape")
    assert heading(opened) == "toy · tiny"
    keys.press("?")
    assert opened.page.is_visible("#keys")
    keys.press("Escape")
    assert not opened.page.is_visible("#keys")


def test_left_and_right_go_along_a_row(open_page: Opener) -> None:
    """In a row, → leads to the next component on the right, and ← back."""
    circuit = CircuitGraph()
    for head in range(3):
        circuit.add_component(f"a0.h{head}", kind="head", layer=0)
    circuit.add_component("logits", kind="logits", layer=1)
    for head in range(3):
        circuit.add_effect(f"a0.h{head}", "logits", 1.0 + head)
    opened = open_page(compose(circuit))
    opened.page.mouse.click(*opened.place("a0.h0"))
    walked = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        opened.page.keyboard.press(key)
        walked.append(heading(opened))
    assert walked == ["a0.h1", "a0.h2", "a0.h2", "a0.h1"]


def test_keys_zoom_and_fit(open_page: Opener) -> None:
    """+ and − change the scale, the wheel zooms about the pointer, f shows all again."""
    opened = open_page(compose(circuit_of()))

    def scale() -> float:
        opened.page.wait_for_timeout(200)
        return float(opened.page.get_attribute("#view", "data-scale"))

    first = scale()
    opened.page.keyboard.press("+")
    assert scale() == pytest.approx(first * 1.25)
    opened.page.keyboard.press("-")
    assert scale() == pytest.approx(first)
    before = opened.place("m0")
    opened.page.mouse.move(*before)
    opened.page.mouse.wheel(0, -50)
    assert scale() > first * 1.05
    assert opened.place("m0") == pytest.approx(before, abs=0.5)
    opened.page.keyboard.press("f")
    assert scale() == pytest.approx(first)


def test_drag_moves_the_circuit_and_selects_nothing(open_page: Opener) -> None:
    """Components follow the pointer; letting go of them is no click."""
    opened = open_page(compose(circuit_of()))
    x, y = opened.place("m0")
    opened.page.mouse.move(x, y)
    opened.page.mouse.down()
    opened.page.mouse.move(x + 60, y + 40, steps=4)
    opened.page.mouse.up()
    opened.settle()
    assert opened.place("m0") == pytest.approx((x + 60, y + 40), abs=1.0)
    assert heading(opened) == "toy · tiny"


@pytest.mark.parametrize(
    ("label", "left"),
    [
        ("helps the task (−)", lambda e: e[3] > 0),
        ("hurts the task (+)", lambda e: e[3] < 0),
        ("k", lambda e: e[2] != "k"),
        ("one input", lambda e: e[2] != ""),
        ("mlp", lambda e: "m" not in (e[0][0], e[1][0])),
    ],
)
def test_filters_leave_what_they_say(open_page: Opener, label: str, left: Any) -> None:
    """Unticking a sign, a port or a kind leaves the other edges, and ticking brings all back."""
    opened = open_page(compose(circuit_of()))
    box = opened.page.get_by_label(label, exact=True)
    box.uncheck()
    assert opened.shown() == sum(map(left, EDGES))
    assert f"Showing {opened.shown()} of 9" in opened.page.inner_text("#count")
    box.check()
    assert opened.shown() == 9


def test_slider_shows_the_strongest(open_page: Opener) -> None:
    """The slider's figure is the score of the weakest edge that is shown."""
    opened = open_page(compose(circuit_of()))
    slider = opened.page.get_by_label("|score|")
    for value in ("0", "200", "300", "400"):
        slider.fill(value)
        n = opened.shown()
        weakest = sorted((abs(e[3]) for e in EDGES), reverse=True)[n - 1]
        assert slider.get_attribute("aria-valuetext") == f"{weakest:g} and more"
    slider.fill("0")
    assert opened.shown() == 1


def test_inclusion_and_measured_only(open_page: Opener) -> None:
    """Rarely found edges can be left out; what is not in the circuit is shown when asked for."""
    circuit = circuit_of()
    for i, (source, target, port, _) in enumerate(EDGES):
        circuit.edges[source, target, port]["inclusion"] = i / 8
        if i >= 7:
            circuit.edges[source, target, port]["kept"] = False
    opened = open_page(compose(circuit))
    assert opened.page.inner_text("#count") == "Showing 7 of 7 edges"
    opened.page.get_by_label("Found again").fill("50")
    assert opened.shown() == 3
    opened.page.get_by_label("also what is not in the circuit").check()
    assert opened.shown() == 5


def test_comparison_counts_and_colours(open_page: Opener) -> None:
    """Only A, only B and both have their counts, three colours and a box each."""
    opened = open_page(compose(circuit_of(EDGES[:6]), other=circuit_of(EDGES[4:])))
    legend = opened.page.inner_text("#legend")
    for words in ("only A (4)", "only B (3)", "both (2)"):
        assert words in legend
    colours = opened.page.eval_on_selector_all(
        "#legend .dash", "all => all.map(e => getComputedStyle(e).color)"
    )
    assert len(set(colours)) == 3
    opened.page.get_by_label("only B").uncheck()
    assert opened.shown() == 6
    opened.page.mouse.click(*opened.place("a1.h0"))
    assert listed(opened, "Reads from") == [("m0", "−3.75"), ("input", "−1.25")]


def test_layouts_by_position_and_by_layer(open_page: Opener) -> None:
    """Chosen by position, components stand in the order of tokens; by layer, in rows."""
    circuit = CircuitGraph()
    circuit.add_component("logits", kind="logits", layer=1)
    for position, token in enumerate(["the", "cat", "sat"]):
        name = f"a0.h0[{position}]"
        circuit.add_component(name, kind="head", layer=0, position=position, token=token)
        circuit.add_effect(name, "logits", -1.0 - position)
    opened = open_page(compose(circuit))
    for name in ("token positions", "layers"):
        opened.page.get_by_label(name).check()
        opened.settle()
        places = [opened.place(f"a0.h0[{i}]") for i in range(3)]
        assert places == sorted(places)
        assert len({round(y) for _, y in places}) == 1
        opened.page.mouse.click(*places[1])
        assert heading(opened) == "a0.h0[1]"
    opened.page.fill("#search", "cat")
    assert opened.page.inner_text("#components .name") == "a0.h0[1]"


def test_details_are_shown(open_page: Opener) -> None:
    """Effects both ways, attention and the feature card stand in the card."""
    pattern = {
        "tokens": ["the", "cat", "sat"],
        "values": [[1, 0, 0], [0.75, 0.25, 0], [0.1, 0.9, 0]],
    }
    opened = open_page(compose(circuit_of(), details={
        "a1.h0": {"pattern": pattern, "effects": {"noise": -4.5, "denoise": -3.25}},
        "m0": {"card": '<svg viewBox="0 0 9 9"><rect width="9" height="9"/></svg>'},
    }))  # fmt: skip
    opened.page.mouse.click(*opened.place("a1.h0"))
    card = opened.page.inner_text("#card")
    assert card.index("−4.5") < card.index("−3.25")
    assert "query 2 sat → key 1 cat: 0.9" in card
    opened.page.focus("#card canvas")
    opened.page.keyboard.press("ArrowUp")
    assert "query 1 cat → key 1 cat: 0.25" in opened.page.inner_text("#card .says")
    opened.page.mouse.click(*opened.place("m0"))
    opened.until("document.querySelector('#card img').naturalWidth > 0")


def test_report_has_its_sections_and_figures(open_page: Opener) -> None:
    """Sections follow the circuit, links lead to them, and figures keep their own style."""
    box = '<path style="fill:#f00" d="M0 0h4v4h-4z"/>'
    styled = f'<svg viewBox="0 0 4 4" width="4" height="4">{box}</svg>'
    figures = figure(svg(circuit_of()), "The circuit") + figure(styled, "red")
    sections = [Section("Rates", "<table><tr><td>1</td></tr></table>"), Section("Figures", figures)]
    opened = open_page(compose(circuit_of(), sections=sections, head=["87 % of the effect"]))
    assert opened.page.inner_text(".head") == "87 % of the effect"
    opened.page.click("nav a >> text=Figures")
    opened.until("[...document.images].every(i => i.naturalWidth > 0)")
    red = opened.page.evaluate(
        """() => { const c = document.createElement("canvas").getContext("2d");
        c.drawImage(document.images[1], 0, 0); return [...c.getImageData(2, 2, 1, 1).data]; }"""
    )
    assert red == [255, 0, 0, 255]
    opened.until("document.getElementById('s-figures').getBoundingClientRect().top < 300")


def test_notebook_frame_runs_the_page_and_nothing_else(open_page: Opener) -> None:
    """In its frame the page works, though it can reach neither its parent nor the disk."""
    opened = open_page(f"<!doctype html><title>n</title>{frame(circuit_of())._repr_html_()}")
    inner = opened.page.frame_locator("iframe")
    assert inner.locator("#count").inner_text() == "Showing 9 of 9 edges"
    assert not inner.locator("#to-image").is_visible()
    inner.locator("#components button").first.click()
    assert re.fullmatch(r"\S+", inner.locator("#card h2").inner_text())


def test_empty_circuit_has_a_page(open_page: Opener) -> None:
    """A circuit of nothing opens and says so."""
    opened = open_page(compose(CircuitGraph()))
    assert opened.page.inner_text("#count") == "Showing 0 of 0 edges"
    opened.page.keyboard.press("ArrowUp")
    opened.page.keyboard.press("f")
