"""Tiles and frames: how large a drawn panel is, and the place on the page where it is drawn.

Lengths are inches, from the lower left corner of the panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as Outline

from circuitlab.plots.ink import INK, RULE, SOFT, fitting, inches

#: Height of a row of a legend, and size of its text in points.
ROW, TEXT = 0.17, 7.0


@dataclass(frozen=True)
class Tile:
    """A panel ready to be drawn, without its heading and its caption.

    Attributes:
        width: What it needs, in inches.
        height: What it needs.
        draw: Draws it.
        note: What the caption must add, such as what was left out.
    """

    width: float
    height: float
    draw: Callable[[Frame], None]
    note: str = ""


@dataclass(frozen=True)
class Frame:
    """The place of a panel on the page.

    Attributes:
        figure: The page.
        left: Of the panel on the page.
        bottom: Of the panel.
        width: Of the panel.
        name: Label of its axes.
    """

    figure: Figure
    left: float
    bottom: float
    width: float
    name: str

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Axes at a place of the panel."""
        wide, high = self.figure.get_size_inches()
        place = (
            (self.left + left) / wide,
            (self.bottom + bottom) / high,
            width / wide,
            height / high,
        )
        return self.figure.add_axes(place, label=self.name)

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Text at a place of the panel."""
        place = self.left + x, self.bottom + y
        self.figure.text(*place, words, transform=self.figure.dpi_scale_trans, **style)

    def line(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        """A line between places of the panel."""
        places = [self.left + one for one in x], [self.bottom + one for one in y]
        self.figure.add_artist(Line2D(*places, transform=self.figure.dpi_scale_trans, **style))

    def fit(self, axes: Axes) -> None:
        """Narrow axes whose labels stand out to the left."""
        # The page's own canvas measures; what stands out does not change with the width.
        box, place = axes.get_tightbbox(), axes.get_position()
        out = 0.0 if box is None else self.left + 0.05 - box.x0 / self.figure.dpi
        if out > 0:
            step = min(out / self.figure.get_size_inches()[0], 0.8 * place.width)
            axes.set_position((place.x0 + step, place.y0, place.width - step, place.height))


class Key(NamedTuple):
    """What a legend explains: a marker or a line, and its words."""

    words: str
    colour: str
    marker: str | Outline = "s"
    edge: str = "none"


def legend_rows(keys: Sequence[Key], width: float) -> list[list[tuple[float, Key]]]:
    """The keys in rows, each with its distance from the left."""
    rows: list[list[tuple[float, Key]]] = []
    x = width
    for key in keys:
        key = key._replace(words=fitting(key.words, TEXT, width - 0.3))
        needed = 0.36 + inches(key.words, TEXT)
        if not rows or x + needed > width + 0.16:
            rows.append([])
            x = 0.0
        rows[-1].append((x, key))
        x += needed
    return rows


def draw_legend(
    frame: Frame, left: float, top: float, rows: Sequence[Sequence[tuple[float, Key]]]
) -> None:
    """Draw rows of keys, the first at the top."""
    for number, row in enumerate(rows):
        y = top - ROW * (number + 0.5)
        for x, key in row:
            at = left + x
            if key.marker == "-":
                frame.line([at, at + 0.16], [y, y], color=key.colour, linewidth=1.5)
            else:
                frame.line(
                    [at + 0.08], [y], marker=key.marker, markersize=7, linestyle="none",
                    markerfacecolor=key.colour, markeredgecolor=key.edge, markeredgewidth=0.8,
                )  # fmt: skip
            frame.text(at + 0.2, y, key.words, size=TEXT, color=SOFT, va="center_baseline")


def zero_line(axes: Axes, *, across: bool = True) -> None:
    """A faint line at 0, where the axes have one."""
    low, high = axes.get_ylim() if across else axes.get_xlim()
    if low <= 0 <= high:
        (axes.axhline if across else axes.axvline)(0, color=RULE, linewidth=0.6, zorder=0.9)


def label_axes(axes: Axes, x: str, y: str, wide: float, high: float) -> None:
    """Names of both axes, cut where they are longer than the axes by much."""
    axes.set_xlabel(fitting(x, 7.5, wide + 0.4), size=7.5, color=INK)
    axes.set_ylabel(fitting(y, 7.5, high + 0.3), size=7.5, color=INK)
    axes.tick_params(labelsize=7)
