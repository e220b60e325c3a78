"""Plots as pages and files: nothing overlaps, and no text of a stranger is obeyed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from typing import get_args

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from plot_samples import ALL, BARS, TABLE, axes_of, circuit_with, compose, shown

from circuitlab import (
    Bar,
    Bars,
    Curve,
    Curves,
    GraphError,
    Heatmap,
    Histogram,
    OptionError,
    Panel,
    Point,
    ResourceError,
    Scatter,
    TextTable,
    UpSet,
    show_plots,
    write_circuit,
)
from circuitlab.panels import Guide
from circuitlab.plots import plot
from circuitlab.plots.ink import FONT, broken, fitting, inches, readable


def texts_of(figure: Figure) -> list[Text]:
    found = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    return [text for text in found if not _hidden_tick(text, figure)]


def _hidden_tick(text: Text, figure: Figure) -> bool:
    """Ticks outside their axes are kept by matplotlib but not drawn."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            every = {
                t for tick in [*axis.majorTicks, *axis.minorTicks] for t in tick.get_children()
            }
            if text in every:
                shown = [t for tick in axis._update_ticks() for t in tick.get_children()]
                return text not in shown
    return False


# --- the page -------------------------------------------------------------------------------------


def test_no_text_overlaps_another() -> None:
    """On a page of all kinds no text lies on another, or leaves the page."""
    figure = compose(*ALL, verdict="not established", verdict_reason="chance " * 60)
    texts = texts_of(figure)
    assert len(texts) > 100
    inside = figure.bbox
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    for words, box in boxes:
        assert inside.x0 <= box.x0, words
        assert box.x1 <= inside.x1, words
        assert inside.y0 <= box.y0, words
        assert box.y1 <= inside.y1, words
    tight = [(words, box.padded(-1, -2)) for words, box in boxes]
    over = [(a, b) for (a, one), (b, other) in combinations(tight, 2) if one.overlaps(other)]
    assert over == []


def test_at_most_three_panels_stand_side_by_side() -> None:
    """Panels go from left to right and then down; no panel's axes overlap another's."""
    figure = compose(*[BARS] * 7)
    boxes = [axes_of(figure, n)[0].get_window_extent() for n in range(7)]
    tops = sorted({round(box.y1) for box in boxes}, reverse=True)
    assert [[n for n, box in enumerate(boxes) if round(box.y1) == top] for top in tops] == [
        [0, 1, 2], [3, 4, 5], [6],
    ]  # fmt: skip
    lefts = [box.x0 for box in boxes]
    assert lefts[0] < lefts[1] < lefts[2]
    assert not [1 for box, other in combinations(boxes, 2) if box.overlaps(other)]


def test_short_panels_stand_under_one_another() -> None:
    """Beside a high panel two low ones share a column, where both fit into its height."""
    high = Heatmap(
        title="t", rows=[f"r{i}" for i in range(40)], columns=["c"], what="w",
        values=[[i] for i in range(40)],
    )  # fmt: skip
    figure = compose(high, BARS, BARS)
    (first,), (second,) = axes_of(figure, 1), axes_of(figure, 2)
    one, other = first.get_window_extent(), second.get_window_extent()
    assert one.x0 == other.x0
    assert other.y1 < one.y0
    assert other.y0 > axes_of(figure)[0].get_window_extent().y0


def test_many_panels_are_counted(tmp_path: Path) -> None:
    """A file of very many panels shows the first of them, and says so."""
    small = TextTable(title="t", header=["a"], rows=[["b"]])
    plot(circuit_with(*[small] * 30), tmp_path / "x.svg")
    assert "The first 24 of 30 panels." in shown(tmp_path / "x.svg")
    assert shown(tmp_path / "x.svg").count("b") == 24


@pytest.mark.parametrize(
    ("panel", "said"),
    [
        (Bars(title="t", what="w", bars=[Bar(name="b", value=1)] * 50), "First 40 of 50."),
        (TextTable(title="t", header=["a"], rows=[["b"]] * 50), "First 40 of 50 rows."),
        (
            Curves(
                title="t", x=[0], x_label="", y_label="", curves=[Curve(name="c", mean=[1])] * 20
            ),
            "First 12 of 20 curves.",
        ),
        (
            Histogram(title="t", what="w", series={f"s{i}": [i] for i in range(9)}),
            "First 7 of 9 series.",
        ),
        (
            Scatter(
                title="t", x_label="", y_label="",
                points=[Point(name="", x=i, y=i) for i in range(2001)],
            ),
            "2,000 of 2,001 points.",
        ),
    ],
    ids=["bars", "table", "curves", "histogram", "scatter"],
)  # fmt: skip
def test_what_is_left_out_is_said(panel: Panel, said: str, tmp_path: Path) -> None:
    """Where not all can be shown, the caption says how much is."""
    plot(circuit_with(panel), tmp_path / "x.svg")
    assert said in shown(tmp_path / "x.svg")


def test_unestablished_circuit_says_so(tmp_path: Path) -> None:
    """A plot carries the verdict that its circuit carries, and what the circuit is of."""
    plot(
        circuit_with(TABLE, verdict="not established", verdict_reason="chance"), tmp_path / "x.svg"
    )
    words = shown(tmp_path / "x.svg")
    assert "NOT ESTABLISHED: chance" in words
    assert {"tiny · toy ·", "logit-difference"} <= set(words)  # broken at the page's width


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")]
)
def test_same_circuit_same_bytes(
    suffix: str, magic: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the date, nor the reader's own matplotlib settings, nor an earlier plot count."""
    circuit = circuit_with(*ALL)
    plot(circuit, tmp_path / f"one{suffix}")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    plot(circuit_with(TABLE), tmp_path / f"other{suffix}")
    plot(circuit, tmp_path / f"two{suffix}")
    assert matplotlib.rcParams["font.size"] == 20.0
    one = (tmp_path / f"one{suffix}").read_bytes()
    assert one.startswith(magic)
    assert one == (tmp_path / f"two{suffix}").read_bytes()
    assert b"Matplotlib" not in one


def test_plots_are_written_by_their_suffix(tmp_path: Path) -> None:
    """``.plot.svg`` writes the panels and ``.svg`` the diagram."""
    circuit = circuit_with(TABLE)
    write_circuit(circuit, tmp_path / "x.plot.svg")
    plot(circuit, tmp_path / "y.svg")
    assert (tmp_path / "x.plot.svg").read_bytes() == (tmp_path / "y.svg").read_bytes()


def test_notebook_shows_the_plots(tmp_path: Path) -> None:
    """The picture is the SVG of the file, as one element that may stand inside a page."""
    picture = show_plots(circuit_with(*ALL))
    plot(circuit_with(*ALL), tmp_path / "x.svg")
    assert picture.svg.startswith("<svg")
    assert ET.fromstring(picture.svg).tag.endswith("svg")
    assert picture._repr_svg_() == picture.svg
    assert (tmp_path / "x.svg").read_text("utf-8").endswith(picture.svg)


def test_matplotlib_waits_for_a_plot() -> None:
    """Importing the package loads neither matplotlib nor torch: ``--help`` stays fast."""
    loaded = "{'matplotlib', 'torch'} & {*sys.modules}"
    program = f"import circuitlab.plots, circuitlab.panels, sys; print({loaded})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "set()\n"


NASTY = [
    "$\\frac{1}{0}$", "$", "--><script>alert(1)</script>", "&lt;]]>", "a\x00\x1b\u202e\ud800",
    "日本", "", " ", "\n", "w" * 3000, "%s {x}",
]  # fmt: skip


@settings(max_examples=6, deadline=None)
@given(text=st.one_of(st.sampled_from(NASTY), st.text(st.characters(), max_size=20)))
def test_text_of_strangers_is_only_text(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Words of panels are neither TeX nor XML, and every character has a glyph."""
    path = tmp_path_factory.mktemp("plot") / "x.svg"
    panels = (
        Heatmap(title=text, caption=text, rows=[text], columns=[text], values=[[1]], what=text,
                row_label=text, column_label=text, notes=[[text]]),
        Curves(title=text, x=[0, 1], x_label=text, y_label=text,
               curves=[Curve(name=text, mean=[1, 2], note=text)]),
        Scatter(title=text, x_label=text, y_label=text, guide="gates",
                points=[Point(name=text, x=1, y=1, kind=text, members=[(0, 0)]),
                        Point(name=text, x=1, y=0, kind=text)]),
        Bars(title=text, what=text, bars=[Bar(name=text, value=1, kind=text, note=text)]),
        UpSet(title=text, what=text, members=[text], bars=[Bar(name="1", value=1)],
              dividends=[Bar(name=text, value=1)]),
        Histogram(title=text, what=text, series={text: [1]}),
        TextTable(title=text, header=[text], rows=[[text]]),
    )  # fmt: skip
    circuit = circuit_with(*panels, verdict="not established", verdict_reason=text)
    circuit.graph["task"] = text
    plot(circuit, path)
    for element in ET.parse(path).iter():
        assert element.tag.split("}")[1] not in {"script", "foreignObject", "a"}
        links = [value for name, value in element.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


EDGE = [0, 1, -1, 1e100, -1e100, 1e-300, 5e-324, 12345678.9, 10**50, -2.5, 7]


@settings(max_examples=16, deadline=None)
@given(data=st.data())
def test_any_numbers_can_be_drawn(data: st.DataObject) -> None:
    """No number that a panel takes breaks its axes, warns, or makes the page huge."""
    number = st.sampled_from(EDGE)
    some = data.draw(st.lists(number, min_size=3, max_size=3))
    lo, hi = sorted(some[:2])
    above = sorted({abs(value) or 1 for value in some})
    apart, guide = data.draw(st.booleans()), data.draw(st.sampled_from(get_args(Guide)))
    every: tuple[Panel, ...] = (
        Heatmap(title="t", rows=["a"], columns=list("xyz"), values=[some], what="w",
                diverging=apart),
        Curves(title="t", x=sorted(set(some)), x_label="x", y_label="y", apart=apart,
               curves=[Curve(name="c", mean=some[: len(set(some))])]),
        Curves(title="t", x=above, x_label="x", y_label="y", log_x=True, log_y=True,
               curves=[Curve(name="c", mean=above)]),
        Scatter(title="t", x_label="x", y_label="y", guide=guide,
                points=[Point(name="p", x=x, y=y, weight=x) for x in some for y in some]),
        Bars(title="t", what="w", bars=[Bar(name="b", value=some[2], lo=lo, hi=hi)], reference=hi),
        UpSet(title="t", what="w", members=["a"], bars=[Bar(name="1", value=hi, lo=lo, hi=hi)]),
        Histogram(title="t", what="w", series={"s": some}),
        TextTable(title="t", header=list("xyz"), rows=[some]),
    )  # fmt: skip
    panel = data.draw(st.sampled_from(every))
    figure = compose(panel)
    assert max(figure.get_size_inches()) < 12


def test_readable_text_loses_nothing() -> None:
    """Ordinary text stays as it is; what has no glyph is written out; blanks at ends are shown."""
    assert readable(" Mary $x_1$ <b>") == "␣Mary $x_1$ <b>"
    assert readable("\n日") == "\\u{a}\\u{65e5}"
    assert readable("  ") == "␣␣"
    assert readable("x" * 50, 10) == "xxxxxxxxx…"
    assert readable("a ", 2) == "a␣"


def test_text_is_measured_as_it_is_drawn() -> None:
    """The width that room is made for is that of the outlines that are drawn."""
    for words, bold in (("a1.h0 → logits", False), ("norm of W_OV", True), ("mmm", False)):
        font = FontProperties(family=FONT, weight="bold" if bold else "normal")
        once, twice = (
            TextPath((0, 0), text, size=9, prop=font).get_extents().width / 72
            for text in (words, words + words)
        )
        step = inches(words + words, 9, bold) - inches(words, 9, bold)
        assert step == pytest.approx(twice - once, rel=0.01)


@given(st.text(st.characters(codec="ascii"), max_size=80), st.floats(0.5, 3.0))
def test_broken_and_cut_text_fits(text: str, width: float) -> None:
    """No line is wider than it may be, and short text is whole."""
    assert all(inches(line, 8) <= width or len(line) == 1 for line in broken(text, 8, width))
    cut = fitting(text, 8, width)
    assert inches(cut, 8) <= width or len(cut) == 1
    assert cut == readable(text, 200) or cut.endswith("…")
    words = "one two three four"
    assert " ".join(broken(words, 8, 0.6)) == words


# --- refusals -------------------------------------------------------------------------------------


def test_nothing_to_plot_names_what_to_run(tmp_path: Path) -> None:
    """A circuit without panels has a diagram, no plot."""
    with pytest.raises(OptionError, match=r"added no panels; .*trace path-patching"):
        plot(circuit_with(), tmp_path / "x.svg")
    with pytest.raises(OptionError, match="nothing to plot"):
        show_plots(circuit_with())
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    """The message names the suffix and those there are."""
    with pytest.raises(OptionError, match=r"'\.bmp'.*\.svg"):
        plot(circuit_with(TABLE), tmp_path / "x.bmp")


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install, for files and for notebooks."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install circuitlab\[plots\]"):
        plot(circuit_with(TABLE), tmp_path / "x.svg")
    with pytest.raises(ResourceError, match=r"pip install circuitlab\[plots\]"):
        show_plots(circuit_with(TABLE))


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The message names the file and the fact."""
    with pytest.raises(ResourceError, match=r"'x\.svg' cannot be written"):
        plot(circuit_with(TABLE), tmp_path / "none" / "x.svg")


def test_malformed_panels_are_refused(tmp_path: Path) -> None:
    """A file that someone edited is refused before anything is drawn."""
    circuit = circuit_with(TABLE)
    circuit.graph["plots"][0]["rows"] = 3
    with pytest.raises(GraphError, match="panel 1 of the circuit cannot be plotted"):
        plot(circuit, tmp_path / "x.svg")
