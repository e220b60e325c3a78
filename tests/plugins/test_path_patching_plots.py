"""Plots of path patching: what stands where, and that nothing of a stranger's text is obeyed."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from circuitlab_path_patching.plots import plot as plots
from circuitlab_path_patching.plots import quadrants
from circuitlab_path_patching.plots.ink import readable
from circuitlab_path_patching.plots.plot import plot
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from circuitlab import CircuitGraph, GraphError, OptionError, ResourceError

GATE = {
    "name": "gate1", "type": "AND", "members": ["a0.h0", "a0.h1"], "noise": [1.0, 0.9],
    "denoise": [0.0, 0.1], "interaction": 9.0,
    "table": [["00", 0.0, -0.5, 0.5], ["10", 1.0, 0.5, 1.5], ["01", 0.5, 0, 1], ["11", 10, 9, 11]],
    "dividends": {"a0.h0": 1.0, "a0.h1": 0.5, "a0.h0+a0.h1": 8.5},
}  # fmt: skip
DOSES = {
    "alphas": [0.0, 0.5, 1.0],
    "curves": [
        {"name": f"a0.h{i}", "mean": [0, -i, -2 * i], "lo": [-1, -2 - i, -9], "hi": [1, 2, 3],
         "slope": -2.0, "threshold": 0.4 if i else None}
        for i in range(3)
    ],
}  # fmt: skip
HEATMAP = {
    "rows": ["resid_post.0", "resid_post.1"], "columns": [" The", "cat", "$x$"],
    "values": [[-3.0, 0.0, 1.0], [0.5, None, 2.0]], "what": "effect; negative helps",
}  # fmt: skip
HYPOTHESES = [
    {"name": "one path", "explained": 0.47, "lo": 0.4, "hi": 0.5, "n_paths": 1},
    {"name": "all", "explained": 0.97, "lo": 0.9, "hi": 1.0, "n_paths": 4},
]
DATA = {"gates": [GATE], "doses": DOSES, "heatmap": HEATMAP, "hypotheses": HYPOTHESES}


def with_data(**graph: Any) -> CircuitGraph:
    circuit = CircuitGraph(model="tiny", task="toy", metric="logit-difference", **graph)
    circuit.add_component("logits", kind="logits", layer=9)
    return circuit


def scattered(n: int = 60) -> CircuitGraph:
    """``n`` effects at all angles, the strongest outside."""
    circuit = with_data()
    for i in range(n):
        angle, radius = 2.4 * i, 1.0 * i / n
        name = circuit.add_component(f"a{i // 8}.h{i % 8}", kind="head", layer=i // 8)
        noise, denoise = abs(radius * math.cos(angle)), radius * math.sin(angle)
        circuit.add_effect(name, "logits", -radius, noise=noise, denoise=denoise)
    return circuit


@pytest.fixture
def composed() -> Iterator[Any]:
    """Compose a figure with the plot's own settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(plots._style())
        yield plots._compose


def axes_of(figure: Figure, part: int = 0) -> Any:
    """Axes of one panel, from left to right; the title's row comes first."""
    panels = [sub for sub in figure.subfigs if sub.axes]
    return panels[part].axes


def shown(svg: Path) -> list[str]:
    """Texts of an SVG: they are drawn as outlines, and each is named in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text("utf-8"))


# --- the quadrants --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "denoise", "expected"),
    [
        (1, 0, "AND"), (0, 1, "OR"), (0.5, 0.5, "ADD"), (-0.5, 0.5, "XOR"), (0.5, -0.5, "XOR"),
        (-1, 0, "AND"), (0, -1, "OR"), (-0.5, -0.5, "ADD"), (1, 0.41, "AND"), (1, 0.42, "ADD"),
        (0.41, 1, "OR"), (0.42, 1, "ADD"), (1, -0.41, "AND"), (1, -0.42, "XOR"),
        (-0.41, 1, "OR"), (-0.42, 1, "XOR"), (1, -1e-18, "AND"),
    ],
)  # fmt: skip
def test_sector_is_the_nearest_type(noise: float, denoise: float, expected: str) -> None:
    """Sectors reach 22.5 degrees to each side, tan 22.5° = 0.4142; half a turn changes nothing."""
    assert quadrants.sector(noise, denoise) == expected


def test_each_effect_is_a_point_at_its_n_and_d(composed: Any) -> None:
    """Horizontal is noising, vertical denoising; larger scores are larger and on top."""
    circuit = scattered(20)
    circuit.add_component("m1", kind="mlp", layer=1)
    circuit.add_effect("m1", "logits", -0.1)  # measured in one direction only
    (axes,) = axes_of(composed(circuit))
    (points,) = axes.collections
    found = [tuple(place) for place in points.get_offsets()]
    data = [d for *_, d in circuit.edges(data=True) if "noise" in d]
    expected = [(d["noise"], d["denoise"]) for d in sorted(data, key=lambda d: abs(d["score"]))]
    assert found == [pytest.approx(place) for place in expected]
    assert list(points.get_sizes()) == sorted(points.get_sizes())


def test_axes_are_equal_and_hold_every_point(composed: Any) -> None:
    """A unit is as long to the right as upwards: angles are what they seem to be."""
    for scale in (0.05, 1.0, 7.0, -3.0):
        circuit = scattered(30)
        for *_, data in circuit.edges(data=True):
            data["noise"], data["denoise"] = scale * data["noise"], scale * data["denoise"]
        (axes,) = axes_of(composed(circuit))
        assert axes.get_xlim() == axes.get_ylim()
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height)
        places = axes.collections[0].get_offsets()
        assert axes.get_xlim()[0] <= places.min() <= places.max() <= axes.get_xlim()[1]


def test_names_do_not_overlap(composed: Any) -> None:
    """At most 12 of 60 points are named, the strongest among them, and no two texts overlap."""
    circuit = scattered(60)
    circuit.graph["gates"] = [GATE, GATE | {"type": "OR", "noise": [0, 0.1], "denoise": [1, 0.8]}]
    (axes,) = axes_of(composed(circuit))
    inside = axes.get_window_extent()
    texts = [a for a in axes.get_children() if isinstance(a, Annotation) and a.zorder == 6]
    axes.figure.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in texts]  # without the line to the point
    named = [text.get_text() for text in texts if "→" in text.get_text()]
    strongest = [f"{s} → {t}" for s, t, *_ in circuit.effects()]
    assert strongest[0] in named
    assert 5 <= len(named) <= 12
    assert [name for name in strongest if name in named] == named
    for box, other in combinations(boxes, 2):
        overlap = (
            min(box.x1, other.x1) - max(box.x0, other.x0),
            min(box.y1, other.y1) - max(box.y0, other.y0),
        )
        assert min(overlap) < 3  # pixels; the two lines of one gate touch
    assert all(box.x0 >= inside.x0 and box.x1 <= inside.x1 for box in boxes)


def test_gate_is_joined_to_its_members(composed: Any) -> None:
    """One line leads from each member's place to its symbol, which the caption explains."""
    circuit = with_data(gates=[GATE])
    panels = [*quadrants.quadrants(scattered(3)), *quadrants.quadrants(circuit)]
    assert ["Yellow: a gate" in panel.caption for panel in panels] == [False, True]
    (axes, *_) = axes_of(composed(circuit))
    lines = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    joins = [line for line in lines if line[0] in ([1.0, 0.0], [0.9, 0.1])]
    assert [line[0] for line in joins] == [[1.0, 0.0], [0.9, 0.1]]
    assert joins[0][1] == joins[1][1]
    for line in joins:  # the symbol covers no member
        assert math.dist(*axes.transData.transform(line)) > 12
    assert {"AND +9.0", "a0.h0, a0.h1"} <= {text.get_text() for text in axes.texts}


def test_gate_without_a_place_is_left_out(composed: Any) -> None:
    """Where there is nothing to divide by, as for XOR, only the table can be shown."""
    gate = GATE | {"type": "XOR", "noise": [None, None], "denoise": [None, None]}
    axes = axes_of(composed(with_data(gates=[gate])))
    assert len(axes) == 2
    assert axes[0].get_title("left").startswith("gate1: XOR")


# --- the other panels -----------------------------------------------------------------------------


def test_gate_table_is_drawn_as_it_is(composed: Any) -> None:
    """Bars are the mixtures' means by number of clean members, dots say who is clean."""
    table, dividends = axes_of(composed(with_data(gates=[GATE])), 1)
    assert [bar.get_height() for bar in table.patches] == [0.0, 1.0, 0.5, 10.0]
    dots = [text.get_text() for text in table.texts if text.get_text() in "●○"]
    assert "".join(dots) == "○●○●" + "○○●●"  # a0.h0, then a0.h1
    assert [bar.get_width() for bar in dividends.patches] == [1.0, 0.5, 8.5]
    (error,) = [c for c in table.collections if len(c.get_segments()) == 4]
    assert [segment[:, 1].tolist() for segment in error.get_segments()] == [
        [-0.5, 0.5], [0.5, 1.5], [0, 1], [9, 11],
    ]  # fmt: skip


def test_gates_of_many_members_have_no_table(composed: Any) -> None:
    """Thirty-two bars tell nothing: such a gate stands in the quadrants alone."""
    big = {"members": list("abcde"), "noise": [0.1] * 5, "denoise": [0.1] * 5}
    table = [[format(i, "05b"), 0, 0, 0] for i in range(32)]
    figure = composed(with_data(gates=[GATE | big | {"table": table}]))
    assert len(figure.axes) == 1


def test_doses_are_drawn_as_they_are(composed: Any) -> None:
    """One small picture per curve, on common axes, its band and its threshold in it."""
    axes = axes_of(composed(with_data(doses=DOSES)))
    assert len(axes) == 3
    for index, one in enumerate(axes):
        curve = DOSES["curves"][index]
        lines = {len(line.get_xdata()): line for line in one.lines}
        assert lines[3].get_ydata().tolist() == curve["mean"]
        assert one.get_ylim() == axes[0].get_ylim()
        (band,) = one.collections
        assert {y for _, y in band.get_paths()[0].vertices} >= {*curve["lo"], *curve["hi"]}
        dotted = [line for line in one.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == ([0.4] if index else [])


def test_heat_map_is_centred_and_layers_rise(composed: Any) -> None:
    """0 is white, what helps is blue, the first row is at the bottom, a gap is grey."""
    axes, bar = axes_of(composed(with_data(heatmap=HEATMAP)))
    (mesh,) = axes.collections
    assert mesh.get_clim() == (-3.0, 3.0)
    values = mesh.get_array()
    assert values[0].tolist() == [-3.0, 0.0, 1.0]
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == HEATMAP["rows"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["␣The", "cat", "$x$"]
    colours = mesh.to_rgba(values)
    assert matplotlib.colors.to_hex(colours[0, 0]) == "#0072b2"
    assert matplotlib.colors.to_hex(mesh.to_rgba(0.0)) == "#ffffff"
    assert matplotlib.colors.to_hex(colours[1, 1]) == "#dddddd"
    assert bar.get_ylabel() == "logit-difference"


def test_hypotheses_are_drawn_as_they_are(composed: Any) -> None:
    """A bar per hypothesis with its interval, between a line at 0 and one at 1."""
    (axes,) = axes_of(composed(with_data(hypotheses=HYPOTHESES)))
    assert [bar.get_width() for bar in axes.patches] == [0.47, 0.97]
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert lines == [[0.4, 0.5], [0.9, 1.0], [0, 0], [1, 1]]
    assert [text.get_text() for text in axes.texts] == ["1 path", "4 paths"]


@pytest.mark.parametrize("key", sorted(DATA))
def test_only_what_was_measured_is_drawn(key: str, tmp_path: Path) -> None:
    """A panel stands there if, and only if, the circuit has its data."""
    headings = {
        "gates": "Gates: every mixture of clean and corrupt", "doses": "Dose–response: how much",
        "heatmap": "Where it matters", "hypotheses": "Path hypotheses",
    }  # fmt: skip
    plot(with_data(**{key: DATA[key]}), tmp_path / "x.svg")
    texts = "\n".join(shown(tmp_path / "x.svg"))
    assert {name for name, heading in headings.items() if heading in texts} == {key}
    assert ("Needed or sufficient?" in texts) == (key == "gates")


def test_all_panels_stand_side_by_side(composed: Any) -> None:
    """No panel's axes overlap another's."""
    circuit = scattered(30)
    circuit.graph.update(DATA)
    figure = composed(circuit)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 1 + 2 + 3 + 2 + 1
    assert not [1 for box, other in combinations(boxes, 2) if box.overlaps(other)]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")]
)
def test_same_circuit_same_bytes(
    suffix: str, magic: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the date, nor the reader's own matplotlib settings, nor an earlier plot count."""
    circuit = scattered(12)
    circuit.graph.update(DATA)
    plot(circuit, tmp_path / f"one{suffix}")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    plot(with_data(doses=DOSES), tmp_path / f"other{suffix}")
    plot(circuit, tmp_path / f"two{suffix}")
    assert matplotlib.rcParams["font.size"] == 20.0
    one = (tmp_path / f"one{suffix}").read_bytes()
    assert one.startswith(magic)
    assert one == (tmp_path / f"two{suffix}").read_bytes()
    assert b"Matplotlib" not in one


def test_matplotlib_waits_for_a_plot() -> None:
    """Importing the module loads neither matplotlib nor torch: ``--help`` stays fast."""
    loaded = "{'matplotlib', 'torch'} & {*sys.modules}"
    program = f"import circuitlab_path_patching.plots.plot, sys; print({loaded})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "set()\n"


def test_unestablished_circuit_says_so(tmp_path: Path) -> None:
    """A plot carries the verdict that its circuit carries."""
    plot(
        with_data(doses=DOSES, verdict="not established", verdict_reason="chance"),
        tmp_path / "x.svg",
    )
    assert "NOT ESTABLISHED: chance" in shown(tmp_path / "x.svg")
    assert "tiny · toy · logit-difference" in shown(tmp_path / "x.svg")


NASTY = [
    "$\\frac{1}{0}$",
    "$",
    "--><script>alert(1)</script>",
    "&lt;]]>",
    "a\x00\x1b\u202e\ud800",
    "日本",
]


@settings(max_examples=15, deadline=None)
@given(text=st.one_of(st.sampled_from(NASTY), st.text(st.characters(), min_size=1, max_size=20)))
def test_text_of_strangers_is_only_text(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tokens, names and tasks are neither TeX nor XML, and every character has a glyph."""
    path = tmp_path_factory.mktemp("plot") / "x.svg"
    circuit = scattered(3)
    circuit.graph.update(
        task=text,
        gates=[GATE | {"members": [text, text], "dividends": {text: 1.0}}],
        heatmap=HEATMAP | {"columns": [text, "b", "c"], "what": text},
        hypotheses=[HYPOTHESES[0] | {"name": text}],
    )
    plot(circuit, path)
    for element in ET.parse(path).iter():
        assert element.tag.split("}")[1] not in {"script", "foreignObject", "a"}
        links = [value for name, value in element.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_readable_text_loses_nothing() -> None:
    """Ordinary text stays as it is; what has no glyph is written out; blanks at ends are shown."""
    assert readable(" Mary $x_1$ <b>") == "␣Mary $x_1$ <b>"
    assert readable("\n日") == "\\u{a}\\u{65e5}"
    assert readable("  ") == "␣␣"
    assert readable("x" * 50, 10) == "xxxxxxxxx…"


# --- refusals -------------------------------------------------------------------------------------


def test_nothing_to_plot_names_what_to_run(tmp_path: Path) -> None:
    """A circuit with scores alone has a diagram, no plot."""
    circuit = with_data()
    with pytest.raises(OptionError, match="path-patching --mode both"):
        plot(circuit, tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    """The message names the suffix and those there are."""
    with pytest.raises(OptionError, match=r"'\.bmp'.*\.svg"):
        plot(with_data(doses=DOSES), tmp_path / "x.bmp")


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install circuitlab\[plots\]"):
        plot(with_data(doses=DOSES), tmp_path / "x.svg")


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The message names the file and the fact."""
    with pytest.raises(ResourceError, match=r"'x\.svg' cannot be written"):
        plot(with_data(doses=DOSES), tmp_path / "none" / "x.svg")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gates", "AND"),
        ("gates", [{"name": "gate1"} | {"noise": [1], "denoise": [1, 2], "type": "OR"}]),
        ("gates", [GATE | {"table": [["0", 1, 1, 1]]}]),
        ("gates", [GATE | {"interaction": float("nan")}]),
        ("doses", {"alphas": [0, 1], "curves": [{"name": "x", "mean": [1], "lo": [1], "hi": [1]}]}),
        ("doses", {"alphas": [], "curves": [{"name": "x", "mean": [], "lo": [], "hi": []}]}),
        ("heatmap", HEATMAP | {"columns": ["a"]}),
        ("heatmap", {"rows": [], "columns": [], "values": []}),
        ("hypotheses", [{"name": "x"}]),
        ("hypotheses", [HYPOTHESES[0] | {"explained": "much"}]),
    ],
)
def test_malformed_data_are_named(key: str, value: object, tmp_path: Path) -> None:
    """A circuit file that someone edited is refused by the part that is wrong."""
    with pytest.raises(GraphError, match=rf'graph\["{key}"\] of the circuit cannot be plotted'):
        plot(with_data(**{key: value}), tmp_path / "x.svg")
