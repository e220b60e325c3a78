"""Rows of features: groups drawn as stacks, long rows broken, lines led between boxes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from circuitlab import CircuitGraph, write_circuit
from circuitlab.layout import Places, Selection, grid, select
from circuitlab.render import svg, to_dot
from circuitlab.rows import MAX_ROW

#: Numbers of features below and above.
SIZES = [(1, 20), (13, 19), (9, 8), (70, 90)]


def features(n_sources: int, n_targets: int) -> CircuitGraph:
    """Features of two sites: one source acts on all, the others on a target each."""
    circuit = CircuitGraph(score="positive = the source raises the target")
    for n, site in ((n_sources, "mlp_in"), (n_targets, "mlp_out")):
        for number in range(n):
            data = {"site": f"{site}.0", "role": f"word {number}"}
            circuit.add_component(f"{site}.0.f{number}", kind="feature", layer=0, **data)
    for site in ("mlp_in", "mlp_out"):
        # Lower than the others: it has no second line.
        circuit.add_component(f"{site}.0.error", kind="error", layer=0, site=f"{site}.0")
    circuit.add_effect("mlp_in.0.error", "mlp_out.0.error", 0.2)
    circuit.add_component("logits", kind="logits", layer=1)
    for number in range(n_targets):
        target = f"mlp_out.0.f{number}"
        circuit.add_effect("mlp_in.0.f0", target, 1.0 + number / 100)
        if number % 3 == 0:
            circuit.add_effect("mlp_in.0.error", target, 0.3)
        if number < n_sources and number:
            circuit.add_effect(f"mlp_in.0.f{number}", target, 0.5)
        circuit.add_effect(target, "logits", -0.1)
    return circuit


def placed(circuit: CircuitGraph) -> tuple[Selection, Places]:
    selection = select(circuit)
    return selection, grid(selection)


def at(points: tuple[tuple[float, float], ...], share: float) -> tuple[float, float]:
    """A point of a Bezier curve of several segments."""
    n = (len(points) - 1) // 3
    part = min(int(share * n), n - 1)
    t, four = share * n - part, points[3 * part : 3 * part + 4]
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
    x, y = (sum(w * p[axis] for w, p in zip(weights, four, strict=True)) for axis in (0, 1))
    return x, y


@pytest.mark.parametrize("sizes", SIZES)
def test_long_rows_fit_a_page(sizes: tuple[int, int]) -> None:
    """At most eight boxes beside each other, or three for each row that there is."""
    selection, places = placed(features(*sizes))
    rows: dict[float, int] = {}
    for x, y in places.nodes.values():
        rows[y] = rows.get(y, 0) + 1
        assert -1e4 < x < 1e4
    n = max(sizes) + 1
    assert max(rows.values()) <= max(MAX_ROW, round(3 * n / (n / 3) ** 0.5) + 1)
    xs, ys = zip(*places.nodes.values(), strict=True)
    assert max(xs) - min(xs) < 3 * (max(ys) - min(ys)) + 100 * MAX_ROW
    assert selection.broken


@pytest.mark.parametrize("sizes", SIZES)
def test_no_boxes_overlap_and_every_line_rises(sizes: tuple[int, int]) -> None:
    """Boxes stand apart, and a source stands below its target."""
    selection, places = placed(features(*sizes))
    found = selection.components
    for (a, (x, y)), (b, (u, v)) in combinations(places.nodes.items(), 2):
        beside = abs(x - u) >= (found[a].width + found[b].width) / 2
        assert beside or abs(y - v) >= (found[a].height + found[b].height) / 2
    for effect in selection.effects:
        assert places.nodes[effect.source][1] < places.nodes[effect.target][1]


@pytest.mark.parametrize("sizes", SIZES)
def test_no_line_runs_behind_a_box(sizes: tuple[int, int]) -> None:
    """Lines pass rows between their boxes; they begin and end at their own."""
    selection, places = placed(features(*sizes))
    for effect, points in zip(selection.effects, places.curves, strict=True):
        assert len(points) % 3 == 1
        for step in range(1, 60):
            x, y = at(points, step / 60)
            for name, (u, v) in places.nodes.items():
                box = selection.components[name]
                inside = abs(x - u) < box.width / 2 - 1e-6 and abs(y - v) < box.height / 2 - 1e-6
                assert not inside, (effect.source, effect.target, name)


def test_short_rows_stay_whole() -> None:
    """Up to eight features are one row, and heads are never moved out of their columns."""
    selection = select(features(MAX_ROW - 1, MAX_ROW - 1))
    assert not selection.broken
    assert len(selection.ranks()) == 3
    circuit = CircuitGraph()
    for head in range(20):
        circuit.add_component(f"a0.h{head}", kind="head", layer=0)
        circuit.add_effect(f"a0.h{head}", circuit.add_component("m0", kind="mlp", layer=0), 1.0)
    assert not select(circuit).broken
    assert len(select(circuit).ranks()) == 2


def test_features_face_those_they_act_on() -> None:
    """In two rows of pairs, features stand in the order of their targets: no lines cross."""
    circuit = CircuitGraph()
    for number, other in enumerate([3, 0, 5, 1, 4, 2]):
        for site, index in (("mlp_in", number), ("mlp_out", other)):
            name = f"{site}.0.f{index}"
            circuit.add_component(name, kind="feature", layer=0, site=f"{site}.0", role="word")
        circuit.add_effect(f"mlp_in.0.f{number}", f"mlp_out.0.f{other}", 1.0)
    places = grid(select(circuit)).nodes
    pairs = sorted(circuit.edges(), key=lambda pair: places[pair[0]])
    assert [target for _, target in pairs] == sorted(
        (target for _, target in pairs), key=lambda name: places[name]
    )


def clusters() -> CircuitGraph:
    circuit = features(3, 3)
    members = ["mlp_out.0.f7", "mlp_out.0.<f9>"]
    data = {"site": "mlp_out.0", "role": "cat dog", "members": members}
    circuit.add_component("mlp_out.0.c0", kind="cluster", layer=0, **data)
    circuit.add_effect("mlp_in.0.f0", "mlp_out.0.c0", 0.7)
    return circuit


def test_a_group_is_a_stack_that_names_its_members() -> None:
    """Two boxes, the number in the label, the members in the tooltip, a word in the legend."""
    text, plain = svg(clusters()), svg(features(3, 3))
    assert text.count('<g class="node">') == plain.count('<g class="node">') + 2
    assert "cat dog · 2</text>" in text
    assert "<title>mlp_out.0.c0: cat dog · 2: mlp_out.0.f7, mlp_out.0.&lt;f9&gt;</title>" in text
    assert "stacked: features active together, and how many" in text
    assert "stacked" not in plain
    assert "stroke-dasharray" not in text
    assert to_dot(clusters()).count('peripheries="2"') == 1


def test_a_group_stands_among_the_features_of_its_site() -> None:
    """Its row is that of its members, whatever they are."""
    found = select(clusters()).components
    assert found["mlp_out.0.c0"].rank == found["mlp_out.0.f0"].rank
    assert found["mlp_out.0.c0"].known


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".dot", ".svg"])
def test_broken_rows_are_written(tmp_path: Path, suffix: str) -> None:
    """Every picture, without a warning, the same bytes each time."""
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path in paths:
        assert write_circuit(features(2, 20), path) == []
    if suffix in (".svg", ".dot"):
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_few_lines_have_their_figures_though_rows_are_broken() -> None:
    """A score is written beside each of up to 16 lines."""
    circuit = CircuitGraph()
    circuit.add_component("mlp_in.0.error", kind="error", layer=0, site="mlp_in.0")
    for number in range(12):
        name = f"mlp_out.0.f{number}"
        circuit.add_component(name, kind="feature", layer=0, site="mlp_out.0")
        circuit.add_effect("mlp_in.0.error", name, 1.0)
    selection, places = placed(circuit)
    assert selection.broken
    assert sorted(places.numbers) == list(range(12))
