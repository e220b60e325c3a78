"""Images: a plane of colours over two axes, with places marked in it and a legend of colours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.patheffects import withStroke

from circuitlab.panels import Image
from circuitlab.plots.frame import ROW, Frame, Key, Tile, draw_legend, label_axes, legend_rows
from circuitlab.plots.ink import INK, readable

#: Inches of the longer side, and of the shorter one at least.
_LONG, _SHORT = 3.0, 0.8
_CHANNELS = ("#FF0000", "#00FF00", "#0000FF")


def image(panel: Image) -> Tile:
    """The image as a tile; a unit is as long to the right as upwards, but for a strip."""
    across, up = _edges(panel.x), _edges(panel.y)
    wide, high = _size(across, up)
    keys = [
        Key(readable(words, 40), colour)
        for words, colour in zip(panel.channels, _CHANNELS, strict=False)
    ]
    rows = legend_rows(keys, wide)

    def draw(frame: Frame) -> None:
        axes = frame.axes(0.62, 0.45, wide, high)
        pixels = [[[float(part) for part in pixel] for pixel in row] for row in panel.pixels]
        axes.pcolormesh(across, up, pixels, rasterized=True)
        for point in panel.points:
            axes.plot(
                [point.x], [point.y], marker="o", markersize=5, markerfacecolor="#FFFFFF",
                markeredgecolor=INK, markeredgewidth=0.8, linestyle="none", clip_on=False,
            )  # fmt: skip
            left = point.x > (across[0] + across[-1]) / 2
            axes.annotate(
                readable(point.name, 24), (point.x, point.y), (-5 if left else 5, 5),
                textcoords="offset points", ha="right" if left else "left", size=7.5, color=INK,
                path_effects=[withStroke(linewidth=2.2, foreground="white")],
            )  # fmt: skip
        label_axes(axes, panel.x_label, panel.y_label, wide, high)
        draw_legend(frame, 0.62, 0.52 + high + ROW * len(rows), rows)

    return Tile(0.62 + wide + 0.15, 0.55 + high + ROW * len(rows), draw)


def _edges(middles: Sequence[float]) -> list[float]:
    """Where cells begin and end: halfway between their middles."""
    first, last = 1.5 * middles[0] - 0.5 * middles[1], 1.5 * middles[-1] - 0.5 * middles[-2]
    return [first, *((a + b) / 2 for a, b in pairwise(middles)), last]


def _size(across: Sequence[float], up: Sequence[float]) -> tuple[float, float]:
    """Width and height in inches."""
    units = across[-1] - across[0], up[-1] - up[0]
    scale = _LONG / max(units)
    return max(scale * units[0], _SHORT), max(scale * units[1], _SHORT)
