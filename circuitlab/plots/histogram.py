"""Histograms: how values are distributed, series over one another in the same bins."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from circuitlab.panels import Histogram
from circuitlab.plots.frame import ROW, Frame, Key, Tile, draw_legend, label_axes, legend_rows
from circuitlab.plots.ink import COLOURS, readable

#: Series that one panel shows, and bins at least and at most.
MAX_SERIES, FEWEST, MOST = 7, 8, 40
_WIDE, _HIGH = 3.3, 2.1


def histogram(panel: Histogram) -> Tile:
    """The histogram as a tile; of series of different lengths the shares, else the numbers."""
    shown = dict(list(panel.series.items())[:MAX_SERIES])
    edges = bins(shown)
    shares = len({len(values) for values in shown.values()}) > 1
    keys = [
        Key(f"{readable(name, 30)}, {len(values):,}", COLOURS[number], "-")
        for number, (name, values) in enumerate(shown.items())
    ]
    rows = legend_rows(keys, _WIDE)

    def draw(frame: Frame) -> None:
        axes = frame.axes(0.62, 0.45, _WIDE, _HIGH)
        for number, values in enumerate(shown.values()):
            heights = counts(values, edges)
            heights = [height / len(values) for height in heights] if shares else heights
            axes.stairs(heights, edges, fill=True, color=COLOURS[number], alpha=0.14)
            axes.stairs(heights, edges, color=COLOURS[number], linewidth=1.3)
        axes.set_xlim(edges[0], edges[-1])
        label_axes(axes, panel.what, "share of the series" if shares else "count", _WIDE, _HIGH)
        frame.fit(axes)
        draw_legend(frame, 0.62, 0.52 + _HIGH + ROW * len(rows), rows)

    left_out = len(panel.series) - len(shown)
    note = f"First {len(shown)} of {len(panel.series):,} series." if left_out else ""
    return Tile(0.62 + _WIDE + 0.15, 0.55 + _HIGH + ROW * len(rows), draw, note)


def bins(series: Mapping[str, Sequence[float]]) -> list[float]:
    """Edges that all series share: of whole numbers one bin each, where they are few.

    Else as many bins of equal width as the root of the longest series' length, 8 to 40.
    """
    values = [value for one in series.values() for value in one]
    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values) and high - low < MOST:
        return [low - 0.5 + step for step in range(int(high - low) + 2)]
    n = min(max(FEWEST, math.ceil(math.sqrt(max(map(len, series.values()))))), MOST)
    low, high = float(low), float(high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # no width that numbers can tell apart
        half = 0.5 * max(abs(high), 1e-9) if low else 0.5
        low, high = low - half, high + half
    return [low + (high - low) * step / n for step in range(n)] + [high]


def counts(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """How many values lie in each bin; the last bin has its upper edge too."""
    found = [0.0] * (len(edges) - 1)
    for value in values:
        found[min(bisect_right(edges, value), len(found)) - 1] += 1
    return found
