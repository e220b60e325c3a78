"""Regions of a region graph, as pictures show them: boxes by token, borders without arrows."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from circuitlab import CircuitGraph, write_circuit
from circuitlab.layout import Selection, grid, select
from circuitlab.render import svg, to_dot


def regions(borders: list[tuple[str, str]]) -> CircuitGraph:
    circuit = CircuitGraph(model="tiny", score="share of walks that cross the border")
    for name in sorted({end for border in borders for end in border}):
        circuit.add_component(name, kind="region", layer=1, token=f" {name}!", role="30 %")
    for number, (a, b) in enumerate(borders, 1):
        circuit.add_effect(a, b, number / 10)
    return circuit


CHAIN = [("r1", "r2"), ("r2", "r3"), ("r3", "r4")]
ALL = list(combinations(["r1", "r2", "r3", "r4", "r5"], 2))


def depth(selection: Selection, name: str) -> int:
    return selection.components[name].rank[-1]


@pytest.mark.parametrize("borders", [CHAIN, ALL, [("r1", "r3"), ("r2", "r3"), ("r1", "r4")]])
def test_no_border_runs_sideways(borders: list[tuple[str, str]]) -> None:
    """Every region stands above those that its borders come from, by as few rows as can be."""
    selection = select(regions(borders))
    for source, target in borders:
        assert depth(selection, source) < depth(selection, target)
    for name in selection.components:
        below = [depth(selection, source) for source, target in borders if target == name]
        assert depth(selection, name) == max(below, default=-1) + 1


def test_region_is_named_by_its_token() -> None:
    """The box shows the most likely token, and under it the region's name and what it says."""
    text = svg(regions(CHAIN))
    for name in ("r1", "r2", "r3", "r4"):
        assert f">␣{name}!</text>" in text
        assert f">{name} · 30 %</text>" in text
    assert "stroke-dasharray" not in text


def test_borders_have_no_arrow() -> None:
    """A border has no direction; an effect between a component and a region has one."""
    circuit = regions(CHAIN)
    assert "polygon" not in svg(circuit)
    assert to_dot(circuit).count('dir="none"') == 3
    circuit.add_component("m0", kind="mlp", layer=0)
    circuit.add_effect("m0", "r1", 1.0)
    assert svg(circuit).count("<polygon") == 1
    assert to_dot(circuit).count('dir="none"') == 3


def test_borders_reach_both_boxes() -> None:
    """Placed without Graphviz too, a border ends at the lower side of the upper box, no gap."""
    selection = select(regions(CHAIN))
    places = grid(selection)
    for effect, points, tip in zip(selection.effects, places.curves, places.tips, strict=True):
        upper, (x, y) = selection.components[effect.target], places.nodes[effect.target]
        assert points[-1] == tip == (x, y - upper.height / 2)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".dot", ".svg"])
def test_region_graph_is_written(tmp_path: Path, suffix: str) -> None:
    """Every picture of a region graph is written without a warning."""
    path = tmp_path / f"regions{suffix}"
    assert write_circuit(regions(ALL), path) == []
    assert path.stat().st_size > 500
