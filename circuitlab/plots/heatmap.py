"""Heat maps: coloured cells with names of rows and columns, notes in them and a colour bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from circuitlab.panels import Heatmap
from circuitlab.plots.frame import Frame, Tile
from circuitlab.plots.ink import BLUE, FAINT, GRID, INK, MISSING, ORANGE, fitting, inches, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Rows and columns up to which notes are written, and cells up to which each is drawn as a shape.
NOTED, SHAPES = 16, 5000
#: Inches that names of rows and columns need each, and the size of all the cells at most.
_PITCH, _WIDEST, _HIGHEST = 0.125, 8.0, 6.5
_BAR = 0.85

_SIGNS = LinearSegmentedColormap.from_list("signs", [BLUE, "#FFFFFF", ORANGE], N=257)
_SIZES = LinearSegmentedColormap.from_list("sizes", ["#FFFFFF", "#A9CBE3", BLUE, "#00324F"], N=256)


def heatmap(panel: Heatmap) -> Tile:
    """The heat map as a tile, with cells as large as its names and notes need."""
    rows = [readable(name, 24) for name in panel.rows]
    columns = [readable(name, 14) for name in panel.columns]
    notes = _notes(panel)
    wide, high = _cell(panel, notes)
    n_rows, n_columns = len(rows), len(columns)
    inner, tall = wide * n_columns, high * n_rows
    upright = max(inches(name, 7) for name in columns) <= max(wide, _PITCH) - 0.05
    foot = 0.22 if upright else 0.12 + max(inches(name, 7) for name in columns)
    foot += 0.2 if panel.column_label else 0.0
    side = 0.12 + max(inches(name, 7) for name in rows) + (0.2 if panel.row_label else 0.0)

    def draw(frame: Frame) -> None:
        axes = frame.axes(side, foot, inner, tall)
        colours = _cells(axes, panel, grid=min(wide, high) >= 0.08)
        _names(axes.set_xticks, columns, wide)
        _names(axes.set_yticks, rows, high)
        axes.tick_params(axis="x", rotation=0 if upright else 90)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set(visible=True, color=FAINT, linewidth=0.6)
        axes.set_xlabel(fitting(panel.column_label, 7.5, inner + 0.5), size=7.5)
        axes.set_ylabel(fitting(panel.row_label, 7.5, tall + 0.5), size=7.5)
        _write(axes, notes, panel, colours)
        _colour_bar(frame, side + inner + 0.16, foot, tall, colours, panel.what)

    width = side + inner + _BAR
    return Tile(width, max(foot + tall + 0.05, 1.0), draw, _note(panel, tall))


def _notes(panel: Heatmap) -> list[list[str]]:
    """Notes as they are written; none where there are too many cells."""
    if panel.notes is None or max(len(panel.rows), len(panel.columns)) > NOTED:
        return []
    return [[readable(note, 12) for note in row] for row in panel.notes]


def _cell(panel: Heatmap, notes: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Width and height of a cell: square, but for notes and for room."""
    n_rows, n_columns = len(panel.rows), len(panel.columns)
    side = min(0.36, max(2.2 / max(n_rows, n_columns), 0.16))
    high = min(max(side, 0.9 / n_rows), _HIGHEST / n_rows)
    widest = max((inches(note, 6) for row in notes for note in row), default=0.0)
    wide = min(max(side, 1.2 / n_columns, widest + 0.1), _WIDEST / n_columns)
    return wide, high


def _cells(axes: Axes, panel: Heatmap, *, grid: bool) -> Any:
    """Draw the cells; gives what says their colours."""
    values = [[math.nan if v is None else float(v) for v in row] for row in panel.values]
    known = [v for row in values for v in row if not math.isnan(v)]
    if panel.diverging:
        high = max(map(abs, known), default=0.0) or 1.0
        low = -high
    else:
        low, high = min([*known, 0.0]), max([*known, 0.0])
        high = high if high > low else low + 1.0
    scale = (_SIGNS if panel.diverging else _SIZES).with_extremes(bad=MISSING)
    mesh = axes.pcolormesh(
        values, cmap=scale, norm=Normalize(low, high), edgecolors=GRID if grid else "none",
        linewidth=0.5, rasterized=len(values) * len(values[0]) > SHAPES,
    )  # fmt: skip
    axes.invert_yaxis()
    return mesh


def _names(setter: Any, names: Sequence[str], pitch: float) -> None:
    """Names at their cells; where they would run into one another, every n-th."""
    step = math.ceil(_PITCH / pitch) if pitch < _PITCH else 1
    setter([i + 0.5 for i in range(0, len(names), step)], names[::step], size=7)


def _write(axes: Axes, notes: Sequence[Sequence[str]], panel: Heatmap, colours: Any) -> None:
    for y, row in enumerate(notes):
        for x, note in enumerate(row):
            value = panel.values[y][x]
            red, green, blue, _ = colours.to_rgba(math.nan if value is None else float(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            axes.text(
                x + 0.5, y + 0.5, note, size=6, ha="center", va="center_baseline",
                color=INK if light else "#FFFFFF",
            )  # fmt: skip


def _colour_bar(
    frame: Frame, left: float, bottom: float, tall: float, colours: Any, what: str
) -> None:
    # A low map has a bar of its height, a high one a bar that the eye can compare.
    height = min(tall, 3.0)
    side = frame.axes(left, bottom + tall - height, 0.12, height)
    bar = Colorbar(side, colours)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=max(2, min(7, int(height / 0.3))))
    side.tick_params(labelsize=7, length=2)
    if _beside(what, tall):
        side.set_ylabel(readable(what, 200), size=7.5)


def _beside(what: str, tall: float) -> bool:
    """Whether the words stand along the colour bar."""
    return len(what) <= 60 and inches(readable(what, 60), 7.5) <= min(tall, 3.0) + 0.2


def _note(panel: Heatmap, tall: float) -> str:
    """What the caption says of the colours."""
    said = "" if _beside(panel.what, tall) else f"Colour: {panel.what}."
    if any(value is None for row in panel.values for value in row):
        said += " Grey: no value."
    return said.strip()
