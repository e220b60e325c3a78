"""Plots of each kind: values, names and marks stand where they belong."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text
from plot_samples import (
    BARS,
    CURVES,
    HEATMAP,
    HISTOGRAM,
    IMAGE,
    TABLE,
    UPSET,
    axes_of,
    circuit_with,
    compose,
    shown,
)

from circuitlab import Curve, Curves, Heatmap, Histogram, Image
from circuitlab.plots import plot
from circuitlab.plots.histogram import bins, counts

# --- heat maps ------------------------------------------------------------------------------------


def test_heat_map_is_centred_and_reads_downwards() -> None:
    """0 is white, the ends are the signs' colours, the first row is on top, a gap is grey."""
    axes, bar = axes_of(compose(HEATMAP))
    (mesh,) = axes.collections
    assert mesh.get_clim() == (-3.0, 3.0)
    values = mesh.get_array()
    assert values[0].tolist() == [-3.0, 0.0, 1.0]
    assert axes.get_ylim() == (2.0, 0.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a0", "a1"]
    assert axes.get_yticks().tolist() == [0.5, 1.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["␣The", "cat", "$x$"]
    colours = mesh.to_rgba(values)
    assert [to_hex(colours[0, n]) for n in (0, 1)] == ["#0072b2", "#ffffff"]
    assert to_hex(mesh.to_rgba(3.0)) == "#d55e00"
    assert to_hex(colours[1, 1]) == "#d4d4d4"
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("token", "layer", "effect")


def test_sizes_darken_from_zero() -> None:
    """Without two signs the scale begins at 0, or below where there is less, and only darkens."""
    for least, low in ((1.0, 0.0), (-2.0, -2.0)):
        panel = Heatmap(
            title="t", rows=["a"], columns=["x", "y", "z"], values=[[least, 3, 4]], what="w",
            diverging=False,
        )  # fmt: skip
        (mesh,) = axes_of(compose(panel))[0].collections
        assert mesh.get_clim() == (low, 4.0)
        light = [sum(mesh.to_rgba(low + (4 - low) * step / 20)[:3]) for step in range(21)]
        assert light == sorted(light, reverse=True)
        assert light[0] == pytest.approx(3.0, abs=0.01)


def test_notes_stand_in_their_cells() -> None:
    """Each note is in the middle of its cell and inside of it, light on dark and dark on light."""
    panel = Heatmap(
        title="t", rows=[f"r{i}" for i in range(16)], columns=[f"c{i}" for i in range(16)],
        values=[[0.0] * 8 + [1.0] * 8 for _ in range(16)], what="w", diverging=False,
        notes=[[f"{i}:{j} note" for j in range(16)] for i in range(16)],
    )  # fmt: skip
    axes, _ = axes_of(compose(panel))
    assert len(axes.texts) == 256
    for text in axes.texts:
        x, y = text.get_position()
        assert text.get_text() == f"{y - 0.5:.0f}:{x - 0.5:.0f} note"
        assert text.get_color() == ("#222222" if x < 8 else "#FFFFFF")
        corners = axes.transData.inverted().transform(text.get_window_extent())
        assert abs(corners[:, 0] - x).max() < 0.5
        assert abs(corners[:, 1] - y).max() < 0.5
    larger = Heatmap(
        title="t", rows=["r"], columns=["c"] * 17, values=[[0.0] * 17], what="w", notes=[["n"] * 17]
    )
    assert len(axes_of(compose(larger))[0].texts) == 0


@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (2, 40), (40, 40), (300, 7), (5, 400)])
def test_names_of_cells_do_not_overlap(n_rows: int, n_columns: int) -> None:
    """Up to 40 rows and columns all have their names; of more, every n-th; the size is bounded."""
    panel = Heatmap(
        title="t", rows=[f"layer {i}" for i in range(n_rows)],
        columns=[f" token {i}" for i in range(n_columns)],
        values=[[i - j for j in range(n_columns)] for i in range(n_rows)], what="w",
    )  # fmt: skip
    figure = compose(panel)
    axes, _ = axes_of(figure)
    for labels, n in ((axes.get_xticklabels(), n_columns), (axes.get_yticklabels(), n_rows)):
        step = -(-n // len(labels))
        assert step == 1 if n <= 40 else step > 1
        assert [label.get_text().split()[-1] for label in labels] == [
            str(i) for i in range(0, n, step)
        ]
        boxes = [label.get_window_extent() for label in labels]
        assert not [1 for one, other in pairwise(boxes) if one.overlaps(other)]
    assert max(figure.get_size_inches()) < 12


# --- curves ---------------------------------------------------------------------------------------


def test_curves_are_drawn_as_they_are() -> None:
    """Each curve has its values, its band and its name; a gap is a gap."""
    (axes,) = axes_of(compose(CURVES))
    lines = {line.get_ydata().tolist()[1]: line for line in axes.lines}
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1, 2]] * 3
    assert axes.lines[0].get_ydata().tolist() == [1, 2, 4]
    assert str(lines[1.5].get_ydata().tolist()) == "[1.0, 1.5, nan]"
    (band,) = axes.collections
    assert {y for _, y in band.get_paths()[0].vertices} >= {0.5, 1, 3, 2, 5}
    assert [text.get_text() for text in axes.texts] == ["stream", "attention", "MLP"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "norm")
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_names_of_curves_stand_at_their_ends() -> None:
    """In the order of their ends, in their colours, beside the axes, and none over another."""
    ends = [0.0, 0.01, 0.02, 1.0, 1.0, 1.0, 1.0, 0.5]
    curves = [Curve(name=f"c{n}", mean=[0.5, end]) for n, end in enumerate(ends)]
    panel = Curves(title="t", x=[0, 1], x_label="x", y_label="y", curves=curves)
    figure = compose(panel)
    (axes,) = axes_of(figure)
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [f"c{n}" for n in range(8)]
    heights = {n: box.y0 for n, box in enumerate(boxes)}
    assert sorted(heights, key=heights.__getitem__) == [0, 1, 2, 7, 3, 4, 5, 6]
    assert not [1 for box, other in combinations(boxes, 2) if box.overlaps(other)]
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)
    assert all(box.x1 < figure.bbox.x1 for box in boxes)


def test_logarithmic_axes_have_plain_numbers() -> None:
    """Ticks are numbers or powers of ten, in text and not in TeX; a band may reach 0."""
    panel = Curves(
        title="t", x=[1, 10, 1e5], x_label="x", y_label="y", log_x=True, log_y=True,
        curves=[Curve(name="c", mean=[1e-6, 1, 20], lo=[0, 0, 1], hi=[1, 2, 30])],
    )  # fmt: skip
    (axes,) = axes_of(compose(panel))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    words = {text.get_text() for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]}
    assert {"1", "10⁵", "10⁻⁶"} <= words
    assert not [word for word in words if "$" in word or "\\" in word]


def test_curves_apart_share_their_axes() -> None:
    """One small picture per curve, its mark dotted, its note beside its name."""
    curves = [
        Curve(name=f"a0.h{i}", mean=[0, -i, -2 * i], lo=[-1, -2 - i, -9], hi=[1, 2, 3],
              mark=0.4 if i else None, note=f"slope {i}")
        for i in range(3)
    ]  # fmt: skip
    panel = Curves(
        title="t", x=[0.0, 0.5, 1.0], x_label="dose", y_label="effect", curves=curves, apart=True
    )
    axes = axes_of(compose(panel))
    assert len(axes) == 3
    for curve, one in zip(curves, axes, strict=True):
        lines = {len(line.get_xdata()): line for line in one.lines}
        assert lines[3].get_ydata().tolist() == list(curve.mean)
        assert one.get_ylim() == axes[0].get_ylim()
        (band,) = one.collections
        assert {y for _, y in band.get_paths()[0].vertices} >= {
            *(curve.lo or ()),
            *(curve.hi or ()),
        }
        dotted = [line for line in one.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == ([0.4] if curve.mark else [])
        assert (one.get_title("left"), one.get_title("right")) == (curve.name, curve.note)
    boxes = [axes.get_tightbbox() for axes in axes]
    assert not [1 for box, other in combinations(boxes, 2) if box.overlaps(other)]


def test_a_value_alone_is_seen() -> None:
    """A value between two that are missing gets a dot; a curve that only begins late gets none."""
    x = [float(i) for i in range(60)]
    late = Curve(name="late", mean=[None if i < 20 else i for i in x])
    alone = Curve(name="alone", mean=[1.0 if i == 30 else None for i in x])
    panel = Curves(title="t", x=x, x_label="x", y_label="y", curves=[late, alone])
    (axes,) = axes_of(compose(panel))
    markers = [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 60]
    assert markers == ["None", "o"]


# --- bars, histograms, tables ---------------------------------------------------------------------


def test_bars_are_drawn_as_they_are() -> None:
    """A bar per value with its interval, from a line at 0; a dashed line at the reference."""
    (axes,) = axes_of(compose(BARS))
    assert [bar.get_width() for bar in axes.patches] == [0.47, -0.2]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.4, 0.5], [0, 0], [1, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one path", "all"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.texts] == ["1 path", "4 paths"]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    low, high = axes.get_xlim()
    assert low < -0.2
    assert high > 1.0


def test_sets_are_drawn_as_they_are() -> None:
    """Bars by number of members, dots say who is in the set, intervals stand on their bars."""
    table, dividends = axes_of(compose(UPSET))
    assert [bar.get_height() for bar in table.patches] == [0.0, 1.0, 0.5, 10.0]
    dots = [text.get_text() for text in table.texts if text.get_text() in "●○"]
    assert "".join(dots) == "○●○●" + "○○●●"  # a0.h0, then a0.h1
    assert [bar.get_width() for bar in dividends.patches] == [1.0, 8.5]
    (error,) = [c for c in table.collections if len(c.get_segments()) == 4]
    assert [segment[:, 1].tolist() for segment in error.get_segments()] == [
        [-0.5, 0.5], [1, 1], [0, 1], [9, 11],
    ]  # fmt: skip


def test_histogram_counts_every_value_once() -> None:
    """Series share their bins; of series of different length the shares are shown."""
    (axes,) = axes_of(compose(HISTOGRAM))
    first, _, second, _ = (patch.get_data() for patch in axes.patches)
    assert first.edges.tolist() == second.edges.tolist()
    assert (first.edges[0], first.edges[-1], len(first.values)) == (0.0, 0.9, 8)
    third = pytest.approx(1 / 3)
    assert first.values.tolist() == [pytest.approx(2 / 3), 0, 0, 0, 0, 0, 0, third]
    assert [n for n, value in enumerate(second.values) if value == 1.0] == [4]
    assert axes.get_ylabel() == "share of the series"


@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-50, 50), min_size=1, max_size=60))
def test_bins_hold_every_value(values: list[float]) -> None:
    """Counts sum to the number of values, and each is what counting by hand gives."""
    edges = bins({"s": values})
    assert all(low < high for low, high in pairwise(edges))
    found = counts(values, edges)
    last = len(found) - 1
    for n, count in enumerate(found):
        inside = [
            v for v in values if edges[n] <= v < edges[n + 1] or (n == last and v == edges[-1])
        ]
        assert count == len(inside)
    assert sum(found) == len(values)


def test_whole_numbers_have_a_bin_each() -> None:
    """A bin is centred on each whole number; series of equal length show numbers of values."""
    panel = Histogram(title="t", what="w", series={"a": [1, 1, 3], "b": [2, 2, 2]})
    (axes,) = axes_of(compose(panel))
    first, _, second, _ = (patch.get_data() for patch in axes.patches)
    assert first.edges.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert (first.values.tolist(), second.values.tolist()) == ([2, 0, 1], [0, 3, 0])
    assert axes.get_ylabel() == "count"


def test_table_is_written_as_it_is(tmp_path: Path) -> None:
    """Every cell is there, numbers with three figures, blanks at ends shown."""
    plot(circuit_with(TABLE), tmp_path / "x.svg")
    assert {"token", "score", "␣Mary", "2.95", "x", "−1"} <= set(shown(tmp_path / "x.svg"))


def test_columns_of_a_table_line_up() -> None:
    """Words begin at the left of their column, numbers end at its right, and none overlap."""
    figure = compose(TABLE)
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts}
    assert boxes["token"].x0 == pytest.approx(boxes["x"].x0, abs=1.5)
    assert boxes["score"].x1 == pytest.approx(boxes["2.95"].x1, abs=1.5)
    assert boxes["2.95"].x1 == pytest.approx(boxes["−1"].x1, abs=1.5)
    assert boxes["token"].x1 < boxes["score"].x0
    assert boxes["token"].y0 > boxes["␣Mary"].y1 > boxes["␣Mary"].y0 > boxes["x"].y1


# --- images ---------------------------------------------------------------------------------------


def test_image_has_its_colours_where_they_belong() -> None:
    """Each pixel has its colour about its place, the first row is at the bottom, equal units."""
    (axes,) = axes_of(compose(IMAGE))
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == [[list(pixel) for pixel in row] for row in IMAGE.pixels]
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [-0.625, 0.125, 0.875, 1.625]
    assert corners[:, 0, 1].tolist() == [-0.5, 0.5, 1.5]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.625, 1.625), (-0.5, 1.5))
    box = axes.get_window_extent()
    assert box.width / 2.25 == pytest.approx(box.height / 2)
    assert [(line.get_xdata(), line.get_ydata()) for line in axes.lines] == [([0], [0])]
    assert [text.get_text() for text in axes.texts] == ["A"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("α", "β")


def test_image_says_what_its_colours_are() -> None:
    """Red, green and blue are explained in this order; without channels there is no legend."""
    figure = compose(IMAGE)
    words = [text.get_text() for text in figure.texts if text.get_text().startswith("like")]
    assert words == ["like A", "like B", "like C"]
    keys = [line for line in figure.findobj(Line2D) if line.get_marker() == "s"]
    assert [to_hex(key.get_markerfacecolor()) for key in keys] == ["#ff0000", "#00ff00", "#0000ff"]
    plain = Image(
        title="t", x=[0, 1], y=[0, 1], x_label="", y_label="", pixels=[[[0, 0, 0]] * 2] * 2
    )
    assert [line.get_marker() for line in compose(plain).findobj(Line2D)].count("s") == 0
