"""Panels of path patching: each shows what was measured, and stands there if it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from circuitlab_path_patching.panels import add_panels

from circuitlab import (
    Bars,
    CircuitGraph,
    Curves,
    Heatmap,
    Panel,
    Scatter,
    UpSet,
    build_circuit,
    panels_of,
    write_circuit,
)

GATE: dict[str, Any] = {
    "name": "gate1", "type": "AND", "members": ["a0.h0", "a0.h1"], "noise": [1.0, 0.9],
    "denoise": [0.0, 0.1], "interaction": 9.0,
    "table": [["00", 0.0, -0.5, 0.5], ["10", 1.0, 0.5, 1.5], ["01", 0.5, 0, 1], ["11", 10, 10, 10]],
    "dividends": {"a0.h0": 1.0, "a0.h1": 0.5, "a0.h0+a0.h1": 8.5},
}  # fmt: skip


def scattered(n: int, **graph: Any) -> CircuitGraph:
    """``n`` effects at all angles, the strongest outside, and one in one direction only."""
    circuit = CircuitGraph(**graph)
    circuit.add_component("logits", kind="logits", layer=9)
    for i in range(n):
        angle, radius = 2.4 * i, 1.0 * i / n
        name = circuit.add_component(f"a{i // 8}.h{i % 8}", kind="head", layer=i // 8)
        noise, denoise = abs(radius * math.cos(angle)), radius * math.sin(angle)
        circuit.add_effect(name, "logits", -radius, noise=noise, denoise=denoise)
    circuit.add_component("m8", kind="mlp", layer=8)
    circuit.add_effect("m8", "logits", -0.1)
    return circuit


def panels(circuit: CircuitGraph) -> list[Panel]:
    add_panels(circuit, "logit-difference")
    return panels_of(circuit)


def test_each_effect_is_a_point_at_its_noise_and_denoise() -> None:
    """Horizontal is noising, vertical denoising, the weight is the score; strongest first."""
    circuit = scattered(20)
    (panel,) = panels(circuit)
    assert isinstance(panel, Scatter)
    assert panel.guide == "gates"
    expected = [
        (f"{source} → logits", data["noise"], data["denoise"], score)
        for source, target, port, score in circuit.effects()
        for data in [circuit.edges[source, target, port]]
        if "noise" in data
    ]
    assert [(p.name, p.x, p.y, p.weight) for p in panel.points] == expected
    assert len(expected) == 20
    assert "One point per edge" in panel.caption


def test_total_effects_are_named_by_their_component() -> None:
    """An arrow that stands for all paths is no edge."""
    circuit = scattered(3)
    for *_, data in circuit.edges(data=True):
        data["kind"] = "total"
    (panel,) = panels(circuit)
    assert isinstance(panel, Scatter)
    assert {point.name for point in panel.points} == {"a0.h0", "a0.h1", "a0.h2"}
    assert "One point per component" in panel.caption


def test_strongest_of_very_many_are_points() -> None:
    """A plot of all edges of a large model stays one that can be drawn, and says what it leaves."""
    (panel,) = panels(scattered(2100))
    assert isinstance(panel, Scatter)
    weights = [abs(point.weight or 0) for point in panel.points]
    assert len(weights) == 2000
    assert min(weights) == 100 / 2100
    assert "Strongest 2,000 of 2,100." in panel.caption


def test_gate_is_a_point_with_its_members() -> None:
    """It stands for their places, by the symbol of its type, and arrows at it are no points."""
    circuit = scattered(3, gates=[GATE])
    circuit.add_component("gate1", kind="gate", layer=0)
    circuit.add_effect("a0.h0", "gate1", -1, noise=1, denoise=0)
    panel = panels(circuit)[0]
    assert isinstance(panel, Scatter)
    *points, gate = panel.points
    assert len(points) == 3
    assert (gate.kind, gate.name) == ("AND", "AND +9\na0.h0, a0.h1")
    assert gate.members == ((1.0, 0.0), (0.9, 0.1))
    assert (gate.x, gate.y) == pytest.approx((0.95, 0.05))
    assert "Yellow: a gate" in panel.caption
    assert "Yellow" not in panels(scattered(3))[0].caption


def test_gate_without_a_place_is_left_out() -> None:
    """Where there is nothing to divide by, as for XOR, only the table can be shown."""
    gate = {key: value for key, value in GATE.items() if key not in ("noise", "denoise")}
    circuit = CircuitGraph(gates=[gate | {"type": "XOR"}])
    (panel,) = panels(circuit)
    assert isinstance(panel, UpSet)
    assert panel.title == "gate1: XOR, interaction +9"


def test_gate_table_is_shown_as_it_is() -> None:
    """Bars are the mixtures' means with their intervals; dividends are those of the gate."""
    (_, panel) = panels(scattered(0, gates=[GATE]))
    assert isinstance(panel, UpSet)
    assert panel.members == ("a0.h0", "a0.h1")
    assert [(bar.name, bar.value, bar.lo, bar.hi) for bar in panel.bars] == [
        ("00", 0.0, -0.5, 0.5), ("10", 1.0, 0.5, 1.5), ("01", 0.5, 0, 1), ("11", 10, None, None),
    ]  # fmt: skip
    assert {bar.name: bar.value for bar in panel.dividends} == GATE["dividends"]
    assert panel.what == "logit-difference"


def test_gates_of_many_members_have_no_table() -> None:
    """Thirty-two bars tell nothing: such a gate stands among the points alone."""
    big = {"members": list("abcde"), "noise": [0.1] * 5, "denoise": [0.1] * 5}
    table = [[format(i, "05b"), 0, 0, 0] for i in range(32)]
    (panel,) = panels(CircuitGraph(gates=[GATE | big | {"table": table}]))
    assert isinstance(panel, Scatter)


def test_gates_that_are_drawn_come_first() -> None:
    """Four tables at most; one that is no gate is called what its members are to each other."""
    plain = GATE | {"name": "gate2", "drawn": False, "relation": "redundant", "type": "ADD"}
    found = panels(CircuitGraph(gates=[plain, *[GATE | {"drawn": True}] * 4, plain]))
    titles = [panel.title for panel in found if isinstance(panel, UpSet)]
    assert titles == ["gate1: AND, interaction +9"] * 4
    found = panels(CircuitGraph(gates=[plain]))
    assert [panel.title for panel in found] == ["gate2: redundant, interaction +9"]
    captions = [panel.caption for panel in panels(CircuitGraph(gates=[GATE] * 6))]
    assert "4 of 6 gates." in captions[1]


def test_doses_are_shown_as_they_are() -> None:
    """Each curve has its band, its threshold as a mark, and its slope in words."""
    curve = {
        "name": "a0.h1", "mean": [0, -1, -2], "lo": [-1, -3, -9], "hi": [1, 2, 3], "slope": -2.04,
        "threshold": 0.4,
    }  # fmt: skip
    flat = curve | {"name": "m0", "threshold": None}
    doses = {"alphas": [0.0, 0.5, 1.0], "curves": [curve, flat], "what": "effect"}
    (panel,) = panels(CircuitGraph(doses=doses))
    assert panels(CircuitGraph(doses=doses | {"curves": []})) == []
    assert isinstance(panel, Curves)
    assert panel.apart
    assert panel.x == (0.0, 0.5, 1.0)
    one, other = panel.curves
    assert (one.name, one.mean, one.lo, one.hi) == ("a0.h1", (0, -1, -2), (-1, -3, -9), (1, 2, 3))
    assert (one.mark, one.note) == (0.4, "slope −2")
    assert other.mark is None


def test_hypotheses_are_shown_as_they_are() -> None:
    """A bar per hypothesis with its interval and number of paths, by mode; none without effect."""
    rows: list[dict[str, Any]] = [
        {"name": "one", "mode": "denoise", "explained": 0.47, "lo": 0.4, "hi": 0.5, "n_paths": 1},
        {"name": "all", "mode": "noise", "explained": 0.97, "lo": None, "hi": None, "n_paths": 4},
        {"name": "flat", "mode": "noise", "explained": None, "lo": None, "hi": None, "n_paths": 4},
    ]
    (panel,) = panels(CircuitGraph(hypotheses=rows))
    assert isinstance(panel, Bars)
    assert [(b.name, b.value, b.lo, b.hi, b.note) for b in panel.bars] == [
        ("one", 0.47, 0.4, 0.5, "1 path"), ("all", 0.97, None, None, "4 paths"),
    ]  # fmt: skip
    assert len({bar.kind for bar in panel.bars}) == 2
    assert panel.reference == 1.0
    assert panels(CircuitGraph(hypotheses=rows[2:])) == []


@pytest.mark.parametrize(
    ("analysis", "options", "kinds"),
    [
        ("path-patching", {}, ["scatter"]),
        ("path-patching", {"mode": "noise"}, []),
        ("path-patching", {"gates": True}, ["scatter", "upset"]),
        ("path-patching", {"scope": "residual", "mode": "noise"}, ["heatmap"]),
        ("dose-response", {"mode": "noise", "top": 2}, ["curves"]),
        ("dose-response", {"top": 2}, ["curves", "scatter"]),
        ("token-ablation", {}, ["heatmap", "scatter", "upset"]),
        ("acdc", {}, []),
    ],
)
def test_only_what_was_measured_is_shown(
    analysis: str, options: dict[str, Any], kinds: list[str], tmp_path: Path
) -> None:
    """An analysis adds the panels of what it measured, and they can be drawn."""
    circuit = build_circuit("gate-and", None, analysis, **options)
    found = panels_of(CircuitGraph.from_json(circuit.to_json()))
    assert [panel.kind for panel in found][: len(kinds)] == kinds
    assert {panel.kind for panel in found} == set(kinds)
    if kinds:
        write_circuit(circuit, tmp_path / "x.plot.svg")
        assert (tmp_path / "x.plot.svg").read_bytes().startswith(b"<?xml")


def test_heat_maps_of_places_rise_with_the_layers() -> None:
    """The last layer is on top, as in a diagram, and each value is the effect at its place."""
    circuit = build_circuit(
        "gate-and", None, "path-patching", scope="residual", mode="noise", top="all"
    )
    (panel,) = panels_of(circuit)
    assert isinstance(panel, Heatmap)
    assert panel.rows == ("resid_post.0", "resid_mid.0", "resid_pre.0")
    kept = {source: score for source, _, _, score in circuit.effects()}
    assert len(kept) == len(panel.rows) * len(panel.columns)
    for row, values in zip(panel.rows, panel.values, strict=True):
        for position, value in enumerate(values):
            assert value == kept[f"{row}[{position}]"]
