"""Places: where a page's components stand, by layer and by token position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from circuitlab.components import Component
from circuitlab.layout import Selection, grid
from circuitlab.rows import GAP, MAX_ROW, packed
from circuitlab.scene import Point

#: Effects that decide where components stand: beyond, order in a row no longer depends on them.
_DECIDING = 1_000
#: Height over width that a wide circuit is stretched to, and how far at most.
_SHAPE, _MOST_STRETCHED = 0.7, 3.0
#: Points between rows: room for arrows.
_RISE = 52.0


def layouts(selection: Selection) -> dict[str, Mapping[str, Point]]:
    """Ways to lay a circuit out: name to centre of each component, in points, y upwards.

    ``layers`` is always there; ``positions`` comes first where components have a token position.
    """
    strongest = replace(selection, effects=selection.effects[-_DECIDING:])
    drawn = _fitted(selection, grid(strongest).nodes)
    if not any(c.positional for c in selection.components.values()):
        return {"layers": drawn}
    return {"positions": drawn, "layers": _by_layer(selection)}


def _fitted(selection: Selection, places: Mapping[str, Point]) -> dict[str, Point]:
    """The same places for a screen: rows as narrow as their boxes allow, then higher if need be."""
    tight = 0.0
    for row in selection.ranks():
        row = sorted(row, key=lambda c: places[c.name][0])
        for left, right in pairwise(row):
            apart = places[right.name][0] - places[left.name][0]
            tight = max(tight, ((left.width + right.width) / 2 + GAP) / apart if apart else 1.0)
    narrow = min(tight, 1.0) or 1.0
    places = {name: (x * narrow, y) for name, (x, y) in places.items()}
    xs, ys = [x for x, _ in places.values()] or [0.0], [y for _, y in places.values()] or [0.0]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    factor = min(_MOST_STRETCHED, max(1.0, _SHAPE * width / height)) if height else 1.0
    return {name: (x, y * factor) for name, (x, y) in places.items()}


def _by_layer(selection: Selection) -> dict[str, Point]:
    """Components side by side in the row of their layer, whatever their token position."""
    places: dict[str, Point] = {}
    height = 0.0
    for rank in selection.ranks():
        for row in _lines(rank):
            tall = max(c.height for c in row)
            height += tall / 2
            places |= {name: (x, height) for name, x in packed(row, 0.0).items()}
            height += tall / 2 + _RISE
    return places


def _lines(row: list[Component]) -> list[list[Component]]:
    """A row broken where it is too long for a page, into lines of about one length."""
    n = len(row)
    most = max(2 * MAX_ROW, math.ceil(math.sqrt(3 * n)))
    n_lines = math.ceil(n / most)
    bounds = [line * n // n_lines for line in range(n_lines + 1)]
    return [row[low:high] for low, high in pairwise(bounds)]
