"""Pictures of compared circuits and of resampled ones: colours, dashes, opacity, in each format."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from edge_circuits import circuit_of
from PIL import Image

from circuitlab import CircuitGraph, compare_circuits, render
from circuitlab.layout import OWNED, opacity, select
from circuitlab.legend import meanings, owner_words

SPACE = "{http://www.w3.org/2000/svg}"


def compared() -> CircuitGraph:
    """One edge only in A, one in both, one only in B."""
    both = {("m0", "logits", ""): -1.0}
    first = circuit_of({("input", "m0", ""): -2.0, **both})
    second = circuit_of({("input", "logits", ""): 3.0, **both})
    return compare_circuits(first, second, names=("one", "two")).circuit


def lines(svg: str) -> dict[str, ElementTree.Element]:
    """The group of each edge, by its tooltip."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SPACE}g"):
        title = group.find(f"{SPACE}title")
        if group.get("class") == "edge" and title is not None:
            found[str(title.text).partition("  ")[0]] = group
    return found


def test_dot_has_the_same_colours_dashes_and_words() -> None:
    """A picture that another program lays out says the same."""
    dot = render.to_dot(compared())
    styles = re.findall(r'color="(#\w+)", fontcolor.*style="(\w+)"', dot)
    assert sorted(styles) == sorted((colour, dash) for colour, dash in OWNED.values())
    assert "dashed: only one; dotted: only two; solid: both" in dot
    assert "helps the task" not in dot


def test_bitmap_has_the_three_colours() -> None:
    """PNG and PDF are drawn by Graphviz from pinned places: each colour is there."""
    scene, _ = render._scene(compared(), 300)
    image = Image.open(io.BytesIO(render._paint(scene, "png"))).convert("RGB")
    pixels = {pixel for _, pixel in image.getcolors(1 << 24)}
    for colour, _ in OWNED.values():
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in pixels


def test_compared_edges_do_not_fade() -> None:
    """Among many edges weak ones step back, but not where colours say whose they are."""
    edges = {("input", "logits", str(i)): -1.0 / (1 + i) for i in range(60)}
    alone, both = circuit_of(edges), compare_circuits(circuit_of(edges), circuit_of(edges)).circuit
    faded = [group for group in lines(render.svg(alone)).values() if group.get("opacity")]
    assert len(faded) > 40
    assert not [group for group in lines(render.svg(both)).values() if group.get("opacity")]


def test_an_edge_that_says_something_else_is_drawn_by_its_sign() -> None:
    """Data ``in`` of another meaning change nothing."""
    circuit = circuit_of({("input", "m0", ""): -2.0})
    plain = render.svg(circuit)
    circuit.edges["input", "m0", ""]["in"] = "elsewhere"
    assert render.svg(circuit) == plain
    assert owner_words(circuit, select(circuit)) == {}


# --- inclusion ------------------------------------------------------------------------------------


def test_inclusion_is_opacity() -> None:
    """The rarer an edge is found again, the fainter; never gone; said in the legend."""
    circuit = circuit_of({("input", "m0", ""): -2.0, ("m0", "logits", ""): -1.0})
    circuit.edges["input", "m0", ""]["inclusion"] = 1.0
    assert not any("faint" in words for words in meanings(select(circuit)))
    shades = []
    for share in (0.9, 0.5, 0.0):
        circuit.edges["m0", "logits", ""]["inclusion"] = share
        groups = lines(render.svg(circuit))
        assert groups["input → m0"].get("opacity") is None
        shades.append(float(str(groups["m0 → logits"].get("opacity"))))
        assert "faint: found again in few resamples" in render.svg(circuit)
    assert shades == pytest.approx([0.92, 0.6, 0.2])
    assert 'color="#0072B233"' in render.to_dot(circuit)


@pytest.mark.parametrize("value", [None, "0.5", True, 2.0, -0.1, float("nan")])
def test_what_is_no_share_is_passed_over(value: object) -> None:
    """Data of that name which are no number from 0 to 1 change nothing."""
    circuit = circuit_of({("input", "m0", ""): -2.0})
    circuit.edges["input", "m0", ""]["inclusion"] = value
    (effect,) = select(circuit).effects
    assert opacity(effect) == 1.0
