"""Rows: many components of one kind side by side, broken to fit a page, and ways between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from circuitlab.components import Component, Effect
from circuitlab.scene import Point

#: Components that fit side by side on a page.
MAX_ROW = 8
#: Points between components that may stand anywhere in their row.
GAP = 16.0
#: What a line keeps away from a box, and lines through one gap from each other, in points.
_CLEAR, _APART = 2.0, 3.5


def broken(components: Sequence[Component], effects: Iterable[Effect]) -> list[Component]:
    """The same components, rows that are too long for a page broken into several.

    What is driven from below stands in the lower rows, what drives what is above in the upper ones.
    Only rows are broken whose components may stand anywhere in them.
    """
    drive = {c.name: 0.0 for c in components}
    for effect in effects:
        drive[effect.source] += effect.strength
        drive[effect.target] -= effect.strength
    rows: dict[tuple[int, ...], list[Component]] = {}
    for c in components:
        rows.setdefault(c.rank, []).append(c)
    found: list[Component] = []
    for row in rows.values():
        n = len(row)
        # Of very many the rows grow with their number, or the picture would be a column.
        most = max(MAX_ROW, math.ceil(math.sqrt(3 * n)))
        if n <= most or not all(c.loose for c in row):
            found += row
            continue
        n_rows = math.ceil(n / most)
        row.sort(key=lambda c: (drive[c.name], c.column))
        # Up to 0, below whatever stands above the row.
        found += [
            replace(c, rank=(*c.rank, place * n_rows // n + 1 - n_rows))
            for place, c in enumerate(row)
        ]
    return found


def is_broken(components: Iterable[Component]) -> bool:
    """Whether any row was broken."""
    return any(c.loose and len(c.rank) > 2 and c.rank[-1] < 0 for c in components)


def packed(row: Sequence[Component], middle: float) -> dict[str, float]:
    """Where the components of a row stand, from left to right, side by side about the middle."""
    left = middle - sum(c.width + GAP for c in row) / 2
    found = {}
    for c in row:
        found[c.name] = left + (c.width + GAP) / 2
        left += c.width + GAP
    return found


class Passages:
    """Ways for lines through rows that they do not end in: between the boxes, not behind them.

    Args:
        rows: Components by row.
        nodes: Where they stand.
    """

    def __init__(self, rows: Iterable[Sequence[Component]], nodes: Mapping[str, Point]) -> None:
        self._rows: list[tuple[float, float, list[tuple[float, float]]]] = []
        self._used: Counter[tuple[float, float]] = Counter()
        for row in rows:
            if all(c.loose for c in row):
                x = {c.name: nodes[c.name][0] for c in row}
                sides = sorted((x[c.name] - c.width / 2, x[c.name] + c.width / 2) for c in row)
                half = max(c.height for c in row) / 2 + _CLEAR
                self._rows.append((nodes[row[0].name][1], half, sides))
        self._rows.sort()

    def lead(self, start: Point, end: Point) -> tuple[Point, ...]:
        """Bezier points upwards from ``start`` to ``end``; both are left and reached vertically."""
        points: list[Point] = [start]
        for height, half, sides in self._rows:
            x, y = points[-1]
            low, high = height - half, height + half
            if high <= y or end[1] <= low:
                continue
            if end[1] <= high:
                # Its target's row: up beside boxes that are higher than the target.
                points += _rising(points[-1], (end[0], low))
                continue
            if y < low:
                x = self._gap(height, sides, x + (end[0] - x) * (height - y) / (end[1] - y))
                points += _rising(points[-1], (x, low))
            points += _rising(points[-1], (x, high))
        return (*points, *_rising(points[-1], end))

    def _gap(self, height: float, sides: Sequence[tuple[float, float]], wished: float) -> float:
        """The free place nearest to a wish."""
        free = [(left, right) for (_, left), (right, _) in pairwise(sides)]
        beyond = GAP / 2
        middles = [sides[0][0] - beyond, *((a + b) / 2 for a, b in free), sides[-1][1] + beyond]
        if not any(left - _CLEAR <= wished <= right + _CLEAR for left, right in sides):
            return wished
        middle = min(middles, key=lambda x: (abs(x - wished), x))
        number = self._used[height, middle]
        self._used[height, middle] += 1
        # 0, 1, -1, 0, …: three lines can be told apart in a gap.
        return middle + _APART * ((number + 1) % 3 - 1)


def _rising(start: Point, end: Point) -> tuple[Point, Point, Point]:
    """A Bezier segment that leaves and arrives vertically."""
    reach = 0.45 * (end[1] - start[1])
    return (start[0], start[1] + reach), (end[0], end[1] - reach), end
