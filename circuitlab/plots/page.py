"""The page: panels in rows of up to three columns, under the circuit's name and verdict.

Drawn by matplotlib's own canvases, never its global state, and never by a reader's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from circuitlab import panels as kinds
from circuitlab.plots.bars import bars, upset
from circuitlab.plots.curves import curves
from circuitlab.plots.frame import Frame, Tile
from circuitlab.plots.heatmap import heatmap
from circuitlab.plots.histogram import histogram
from circuitlab.plots.image import image
from circuitlab.plots.ink import FONT, INK, RED, SOFT, broken, inches, readable
from circuitlab.plots.scatter import scatter
from circuitlab.plots.table import table

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph

#: Panels that are drawn, columns of a row, and the width in inches after which a row ends.
MAX_PANELS, COLUMNS, WIDEST = 24, 3, 16.5
#: Inches round the page and between panels, and heights of a line of each kind of text.
_EDGE, _GAP = 0.3, 0.32
_HEAD, _VERDICT, _TITLE, _CAPTION = 0.26, 0.18, 0.19, 0.145
#: Least width of a panel, and the width up to which a panel makes room for its title.
_NARROW, _TITLE_WIDTH = 2.4, 4.2

_TILES: Mapping[type[kinds.Panel], Callable[[Any], Tile]] = {
    kinds.Heatmap: heatmap,
    kinds.Curves: curves,
    kinds.Scatter: scatter,
    kinds.Bars: bars,
    kinds.UpSet: upset,
    kinds.Histogram: histogram,
    kinds.TextTable: table,
    kinds.Image: image,
}


@dataclass(frozen=True)
class _Block:
    """A tile with its title above and its caption below."""

    tile: Tile
    width: float
    title: list[str]
    caption: list[str]
    name: str

    @property
    def height(self) -> float:
        under = 0.1 + _CAPTION * len(self.caption) if self.caption else 0.0
        return _TITLE * len(self.title) + 0.08 + self.tile.height + under

    def draw(self, figure: Figure, left: float, top: float) -> None:
        high = figure.get_size_inches()[1]
        under = top - _TITLE * len(self.title) - 0.08 - self.tile.height
        frame = Frame(figure, left, high + under, self.width, self.name)
        for number, line in enumerate(self.title):
            y = self.tile.height + 0.08 + _TITLE * (len(self.title) - number - 1)
            frame.text(0, y, line, size=10, color=INK, va="bottom")
        self.tile.draw(frame)
        for number, line in enumerate(self.caption):
            frame.text(0, -0.08 - _CAPTION * number, line, size=7.5, color=SOFT, va="top")


@dataclass
class _Row:
    """Columns of blocks; below a short block another may stand."""

    columns: list[list[_Block]] = field(default_factory=list)

    @property
    def width(self) -> float:
        return sum(max(b.width for b in c) for c in self.columns) + _GAP * len(self.columns[1:])

    @property
    def height(self) -> float:
        return max(_stacked(column) for column in self.columns)

    def take(self, block: _Block) -> bool:
        """Place a block, if there is room for it."""
        if not self.columns:
            self.columns = [[block]]
            return True
        last = self.columns[-1]
        narrow = block.width <= 1.25 * max(one.width for one in last)
        if len(self.columns) > 1 and narrow and _stacked([*last, block]) <= self.height:
            last.append(block)
            return True
        if len(self.columns) < COLUMNS and self.width + _GAP + block.width <= WIDEST:
            self.columns.append([block])
            return True
        return False


def compose(circuit: CircuitGraph, panels: Sequence[kinds.Panel]) -> Figure:
    """The page of a circuit's panels."""
    rows: list[_Row] = []
    for number, panel in enumerate(panels[:MAX_PANELS]):
        block = _block(panel, f"panel {number}")
        if not rows or not rows[-1].take(block):
            rows.append(_Row([[block]]))
    width = max(row.width for row in rows) + 2 * _EDGE
    head = _head(circuit, width - 2 * _EDGE, len(panels))
    height = sum(row.height + _GAP for row in rows) - _GAP + 2 * _EDGE
    height += sum(step for _, _, step in head) + 0.12
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    y = -_EDGE
    for line, style, step in head:
        figure.text(
            _EDGE, height + y, line, transform=figure.dpi_scale_trans, va="top", weight="bold",
            **style,
        )  # fmt: skip
        y -= step
    y -= 0.12
    for row in rows:
        x = _EDGE
        for column in row.columns:
            top = y
            for block in column:
                block.draw(figure, x, top)
                top -= block.height + _GAP
            x += max(block.width for block in column) + _GAP
        y -= row.height + _GAP
    return figure


@contextmanager
def settings() -> Iterator[None]:
    """Draw with the plots' own settings: text of strangers must never reach TeX."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        style: Any = _STYLE
        matplotlib.rcParams.update(style)
        yield


_STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 8.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.limits": (-3, 4),
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.hashsalt": "circuitlab",
    "savefig.facecolor": "white",
}


def _block(panel: kinds.Panel, name: str) -> _Block:
    tile = _TILES[type(panel)](panel)
    heading = min(inches(readable(panel.title, 200), 10), _TITLE_WIDTH)
    width = max(tile.width, heading + 0.02, _NARROW)
    title = broken(panel.title, 10, width, most=2)
    caption = " ".join(filter(None, (panel.caption, tile.note)))
    return _Block(tile, width, title, broken(caption, 7.5, width, most=8), name)


def _stacked(column: Sequence[_Block]) -> float:
    return sum(block.height for block in column) + _GAP * len(column[1:])


def _head(
    circuit: CircuitGraph, width: float, n_panels: int
) -> list[tuple[str, dict[str, Any], float]]:
    """Lines above the panels: what the circuit is of, and what speaks against it."""
    named = [_word(circuit.graph.get(key)) for key in ("model", "task", "metric")]
    title = " · ".join(word for word in named if word)
    lines = [
        (line, {"size": 12, "color": INK}, _HEAD)
        for line in broken(title, 12, width, most=3, bold=True)
    ]
    if circuit.graph.get("verdict") == "not established":
        reason = str(circuit.graph.get("verdict_reason") or "no reason was recorded")
        said = broken(f"NOT ESTABLISHED: {reason}", 8.5, width, most=3, bold=True)
        lines += [(line, {"size": 8.5, "color": RED}, _VERDICT) for line in said]
    if n_panels > MAX_PANELS:
        left_out = f"The first {MAX_PANELS} of {n_panels:,} panels."
        lines.append((left_out, {"size": 8.5, "color": SOFT}, _VERDICT))
    return lines


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        value = value.get("name", "")
    return "" if value is None else readable(value, 60)
