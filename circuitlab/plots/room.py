"""Room: where text and symbols still find a place between the points of a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.transforms import Bbox

from circuitlab.plots.ink import FAINT, inches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]


class Room:
    """What is taken of the axes; sizes are points, places are data."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        figure = axes.get_figure(root=True)
        assert figure is not None
        self._scale = figure.dpi / 72
        self._inside = axes.get_window_extent()
        self._taken: list[Bbox] = []
        self._texts: list[Bbox] = []

    def take(self, place: Place, width: float, height: float) -> None:
        """Keep what is nearer to ``place`` than this free of text."""
        x, y = self.axes.transData.transform(place)
        dx, dy = width * self._scale, height * self._scale
        self._taken.append(Bbox([[x - dx, y - dy], [x + dx, y + dy]]))

    def write(self, words: str, place: Place, colour: str) -> bool:
        """Write beside a point, the nearest free place first; nothing where there is none."""
        width, height = self._size(words, 7.0)
        x, y = self.axes.transData.transform(place)
        for distance in (8, 15, 26):
            for turn in (0, 45, -45, 90, -90, 135, -135, 180):
                dx, dy = (f(math.radians(turn)) for f in (math.cos, math.sin))
                cx = x + distance * self._scale * dx + dx * width / 2
                cy = y + distance * self._scale * dy + dy * height / 2
                box = Bbox([[cx - width / 2, cy - height / 2], [cx + width / 2, cy + height / 2]])
                if not self._free(box) or self._crossed((x, y), (cx, cy)):
                    continue
                self._taken.append(box)
                self._texts.append(box)
                offset = (cx - x) / self._scale, (cy - y) / self._scale
                line = {"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
                self.axes.annotate(
                    words, place, offset, textcoords="offset points", ha="center", va="center",
                    size=7.0, color=colour, zorder=6, arrowprops=line if distance > 8 else None,
                )  # fmt: skip
                return True
        return False

    def place_symbol(
        self, middle: Place, lines: Sequence[tuple[str, float]], members: Sequence[Sequence[float]]
    ) -> Place:
        """A free place for a symbol and the lines of text under it, near ``middle``.

        A place is better where no line from a member to the symbol runs through its text.
        """
        widths = [1.08 * self._size(words, size)[0] for words, size in lines]
        half, below = max([*widths, 20 * self._scale]) / 2, 31 * self._scale
        ends = [self.axes.transData.transform(place).tolist() for place in members]
        x, y = self.axes.transData.transform(middle)
        for strict in (True, False):
            for distance in (0, 30, 42, 56, 72, 90):
                for turn in (45, 135, -45, -135, 0, 180, 90, -90):
                    cx = x + distance * self._scale * math.cos(math.radians(turn))
                    cy = y + distance * self._scale * math.sin(math.radians(turn))
                    box = Bbox([[cx - half, cy - below], [cx + half, cy + 11 * self._scale]])
                    text = Bbox([[box.x0, box.y0], [box.x1, cy - 10 * self._scale]])
                    crossed = any(_meets(text, end, (cx, cy)) for end in ends)
                    if self._free(box) and not (strict and crossed):
                        self._taken.append(box)
                        self._texts.append(box)
                        found = self.axes.transData.inverted().transform((cx, cy))
                        return float(found[0]), float(found[1])
        return middle

    def _size(self, words: str, size: float) -> tuple[float, float]:
        return inches(words, size) * 72 * self._scale + 4, (1.2 * size + 1) * self._scale + 2

    def _free(self, box: Bbox) -> bool:
        inside = box.x0 > self._inside.x0 and box.x1 < self._inside.x1
        inside = inside and box.y0 > self._inside.y0 and box.y1 < self._inside.y1
        return inside and not any(box.overlaps(other) for other in self._taken)

    def _crossed(self, start: Place, end: Place) -> bool:
        """Whether a line from one place to the other would run through a text."""
        return any(_meets(box, start, end) for box in self._texts)


def _meets(box: Bbox, start: Sequence[float], end: Sequence[float]) -> bool:
    """Whether a line between two places runs through a box, by nine places along it."""
    along = [[a + part / 8 * (b - a) for a, b in zip(start, end, strict=True)] for part in range(9)]
    return any(box.contains(x, y) for x, y in along)
