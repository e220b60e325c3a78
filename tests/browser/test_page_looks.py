"""The page in a browser: strangers' text, themes, small screens, pictures, and many edges."""

from __future__ import annotations

import random
import statistics
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from circuitlab.graph import CircuitGraph
from circuitlab.page import Section, compose
from circuitlab.wiring import Wiring

Opener = Callable[..., Any]

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "javascript:alert(1)",
    "<!-- <script>",
    "&lt;b&gt;",
    "constructor",
    "__proto__",
    "‮ right to left \ud800",
]

#: Times between frames while something happens.
FRAMES = """
window.frames_seen = [];
(function next(time) { frames_seen.push(time); requestAnimationFrame(next); })(0);
"""


def nasty_circuit(word: str) -> CircuitGraph:
    """A circuit that has a stranger's word wherever it can."""
    circuit = CircuitGraph(model=word, task=word, method=word, verdict=word, verdict_reason=word,
                           findings={word: word}, warnings=[word])  # fmt: skip
    data = {word: word, "pairs": [[word, 1.0]], "table": {word: {word: word}}}
    circuit.add_component(word, kind=word, layer=0, role=word, token=word, **data)
    circuit.add_component("logits", kind="logits", layer=1)
    circuit.add_effect(word, "logits", -1.0, port=word, note=word, more={word: [word]})
    return circuit


@pytest.mark.parametrize("word", NASTY)
def test_text_of_strangers_stays_text(open_page: Opener, word: str) -> None:
    """Nothing runs, nothing is added: every element on the page is of a kind we made."""
    details = {word: {"role": word, "card": [word], "effects": {"noise": -1.0}}}
    opened = open_page(compose(nasty_circuit(word), details=details, head=[word]))
    shown = opened.data["nodes"][0]["name"]
    opened.page.fill("#search", shown[:5])
    opened.page.click("#components button")
    assert opened.page.inner_text("#card h2") == shown
    opened.page.click("#card .score")
    assert shown in opened.page.inner_text("#card h2")
    assert opened.page.evaluate("document.querySelectorAll('script').length") == 2
    assert opened.page.evaluate("document.images.length") == 0
    names = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not [name for name in opened.page.evaluate(names) if name.startswith("on")]


def corner(opened: Any) -> list[int]:
    """The colour at the corner of the circuit."""
    opened.settle()
    pixel = """view => {
      const copy = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      copy.drawImage(view, 0, 0);
      return [...copy.getImageData(3, 3, 1, 1).data].slice(0, 3);
    }"""
    return list(opened.page.eval_on_selector("#view", pixel))


def test_theme_follows_the_system_until_it_is_chosen(open_page: Opener) -> None:
    """Dark where the system is dark, light where it is light; the button decides from then on."""
    page = compose(nasty_circuit("a0.h0"))
    dark, light = open_page(page, color_scheme="dark"), open_page(page, color_scheme="light")
    assert max(corner(dark)) < 60
    assert min(corner(light)) > 220
    dark.page.click("#to-theme")
    assert corner(dark) == corner(light)
    light.page.emulate_media(color_scheme="dark")
    assert max(corner(light)) < 60
    dark.page.emulate_media(color_scheme="light")
    dark.page.emulate_media(color_scheme="dark")
    assert min(corner(dark)) > 220


@pytest.mark.parametrize(("width", "height"), [(800, 600), (390, 700), (1920, 1080)])
def test_nothing_hangs_over_the_edge(open_page: Opener, width: int, height: int) -> None:
    """On small and large screens all parts fit, and filters and details can be reached."""
    circuit = large(200)
    for page in (compose(circuit), compose(circuit, sections=[Section("Rates", "<p>1</p>")])):
        opened = open_page(page, width=width, height=height)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        if width < 1080:
            assert not opened.page.is_visible("#filters")
            opened.page.keyboard.press("/")
        assert opened.page.is_visible("#search")
        opened.page.click("#components button >> nth=0")
        opened.page.keyboard.press("Escape")
        stage = opened.page.locator("#stage").bounding_box()
        assert stage["width"] > 250
        assert stage["height"] > 150
        assert opened.page.is_visible("#card")


def test_tab_reaches_everything_and_everything_has_a_name(open_page: Opener) -> None:
    """The focus goes through page, filters, circuit and tools; no control is without a name."""
    opened = open_page(compose(large(12)))
    reached = []
    for _ in range(45):
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("document.activeElement.id"))
    order = [reached.index(name) for name in ("to-keys", "search", "view", "closer")]
    assert order == sorted(order)
    nameless = """[...document.querySelectorAll("button, input, canvas, a, aside, [role]")]
      .filter(e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()
        || e.id === "count" || e.id === "said")).map(e => e.outerHTML)"""
    assert opened.page.evaluate(nameless) == []


def test_picture_can_be_saved(open_page: Opener, tmp_path: Path) -> None:
    """PNG gives a picture twice as fine as the view."""
    opened = open_page(compose(large(40)))
    with opened.page.expect_download() as download:
        opened.page.click("#to-image")
    assert download.value.suggested_filename == "circuit.png"
    download.value.save_as(tmp_path / "circuit.png")
    content = (tmp_path / "circuit.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    box = opened.page.locator("#view").bounding_box()
    assert struct.unpack(">II", content[16:24]) == (2 * box["width"], 2 * (box["height"] + 26))


#: Remembers where boxes and words are drawn, in the circuit's own places.
DRAWN = """() => {
  window.boxes = []; window.scores = [];
  const own = CanvasRenderingContext2D.prototype, { roundRect, fillText } = own;
  own.roundRect = function (x, y, w, h, ...rest) {
    boxes.push([x, y, w, h]);
    return roundRect.call(this, x, y, w, h, ...rest);
  };
  own.fillText = function (text, x, y, ...rest) {
    if (/^[-−+][0-9]/.test(text)) scores.push([x, y]);
    return fillText.call(this, text, x, y, ...rest);
  };
  document.getElementById("fit").click();
}"""


def test_scores_cover_no_component(open_page: Opener) -> None:
    """Edges that pass behind a component have their number beside it; nearly all find a place."""
    circuit = CircuitGraph()
    wiring = Wiring(3, 3)
    for name in (*wiring.sources, "logits"):
        kind, layer, _ = wiring.component(name)
        circuit.add_component(name, kind=kind, layer=layer)
    for number, name in enumerate(wiring.sources):
        circuit.add_effect(name, "logits", -1.0 - number, kind="total")
    opened = open_page(compose(circuit))
    opened.page.evaluate(DRAWN)
    opened.settle()
    boxes, scores = opened.page.evaluate("[boxes, scores]")
    assert len({tuple(score) for score in scores}) >= len(wiring.sources) - 2
    for x, y in scores:
        for left, top, width, height in boxes:
            assert not (left < x < left + width and top < y < top + height)


def large(n: int) -> CircuitGraph:
    """A circuit of ``n`` edges drawn at random from a model of 12 layers of 12 heads."""
    wiring, draw = Wiring(12, 12), random.Random(0)
    circuit = CircuitGraph(model="large", task="toy", n_layers=12, n_heads=12)
    for edge in draw.sample(list(wiring.edges), n):
        for name in (edge.source, edge.target):
            part = wiring.component(name)
            circuit.add_component(name, kind=part.kind, layer=part.layer)
        circuit.add_effect(edge.source, edge.target, draw.gauss(0, 1) ** 3, port=edge.port)
    return circuit


def frames(opened: Any, act: Callable[[], None]) -> list[float]:
    """Milliseconds between frames while something is done."""
    opened.page.evaluate("frames_seen.length = 0")
    act()
    opened.settle()
    return [b - a for a, b in pairwise(opened.page.evaluate("frames_seen"))]


def test_twenty_thousand_edges_stay_at_hand(open_page: Opener) -> None:
    """The page opens on 300 edges at once; it moves in 50 ms a frame, with all edges in 200 ms."""
    opened = open_page(compose(large(20_000)))
    painted = opened.page.evaluate(
        """() => new Promise(done => new PerformanceObserver(
        list => done(list.getEntries()[0].startTime)).observe({type: "paint", buffered: true}))"""
    )
    assert painted < 1500
    assert opened.page.inner_text("#count").startswith("Showing 300 of 20,000 edges")
    opened.page.evaluate(FRAMES)

    def drag() -> None:
        opened.page.mouse.move(700, 450)
        opened.page.mouse.down()
        for step in range(25):
            opened.page.mouse.move(700 + 4 * step, 450 + 2 * step)
        opened.page.mouse.up()

    assert statistics.median(frames(opened, drag)) < 50
    opened.page.get_by_label("|score|").fill("400")
    assert opened.shown() == 20_000
    assert statistics.median(frames(opened, drag)) < 200
    opened.page.wait_for_timeout(400)
    opened.page.fill("#search", "a5.h5")
    opened.page.click("#components button >> nth=0")
    assert opened.page.inner_text("#card h2") == "a5.h5"
