"""Routes: the ways effects run between components, and where their scores are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from circuitlab.components import Component, Effect
from circuitlab.scene import Point, arrow_length


@dataclass(frozen=True, slots=True)
class Places:
    """Where components stand and effects run, in points, the origin at the lower left.

    Attributes:
        nodes: Centre of each component.
        curves: Bezier points of each effect, in the order of ``Selection.effects``.
        tips: Tip of each effect's arrow.
        numbers: Where an effect's score is written, by its index; empty when none is.
    """

    nodes: Mapping[str, Point]
    curves: tuple[tuple[Point, ...], ...]
    tips: tuple[Point, ...]
    numbers: Mapping[int, Point]


def line_width(strength: float) -> float:
    """Width in points of an effect's line: by the root, so that weak ones still show."""
    return 0.7 + 3.3 * math.sqrt(strength)


def at_gates(
    components: Mapping[str, Component], effects: Sequence[Effect], places: Places
) -> Places:
    """The same places, but inputs of gates enter side by side, from below, at the symbol's edge."""
    entering: dict[str, list[int]] = {}
    for index, effect in enumerate(effects):
        if components[effect.target].symbol:
            entering.setdefault(effect.target, []).append(index)
    curves, tips, written = list(places.curves), list(places.tips), dict(places.numbers)
    for name, indices in entering.items():
        symbol = components[name].symbol
        assert symbol is not None
        for index in indices:
            source = effects[index].source
            floor = places.nodes[source][1] - components[source].height / 2
            if min(y for _, y in curves[index]) < floor:
                # Graphviz sometimes leads an input around below its own row.
                curves[index], _ = path_of(components, places.nodes, effects[index])
        x, y = places.nodes[name]
        indices.sort(key=lambda i: (curves[i][-4][0], i))
        for index, (dx, dy) in zip(indices, symbol.feet(len(indices)), strict=True):
            tips[index] = x + dx, y + dy
            below = y + dy - arrow_length(line_width(effects[index].strength))
            curves[index] = _from_below(curves[index], (x + dx, below))
            if index in written and written[index][1] > curves[index][-4][1]:
                written[index] = beside(curves[index][-4:], -1 if dx < 0 else 1)
    return Places(places.nodes, tuple(curves), tuple(tips), written)


def beside(segment: tuple[Point, ...], side: int) -> Point:
    """Where a score is written beside a Bezier segment: outwards, so that inputs stay clear."""
    parts = (0.216, 0.432, 0.288, 0.064)  # the Bernstein polynomials at 0.4
    x, y = (sum(w * p[axis] for w, p in zip(parts, segment, strict=True)) for axis in (0, 1))
    (x1, y1), (x2, y2) = segment[0], segment[3]
    length = math.dist((x1, y1), (x2, y2)) or 1.0
    across, up = side * (y2 - y1) / length, side * (x1 - x2) / length
    clear = 6.0 + 12.0 * abs(across)
    return x + clear * across, y + clear * up


def _from_below(points: tuple[Point, ...], end: Point) -> tuple[Point, ...]:
    """The same curve, bent so that it arrives at ``end`` from straight below, without a kink."""
    # Enough of the old curve's end goes that the new one has room to turn.
    kept = max((i for i in range(0, len(points) - 3, 3) if points[i][1] < end[1] - 24), default=0)
    (x, y), (nearby_x, nearby_y) = points[kept], points[kept + 1]
    reach = 0.4 * math.dist((x, y), end)
    stretch = reach / (math.dist((x, y), (nearby_x, nearby_y)) or 1.0)
    leaving = x + stretch * (nearby_x - x), y + stretch * (nearby_y - y)
    # Never lower than where it comes from, or it would lead around its own source.
    below = max(8.0, min(reach, 0.8 * (end[1] - y)))
    return (*points[: kept + 1], leaving, (end[0], end[1] - below), end)


def path_of(
    components: Mapping[str, Component], nodes: Mapping[str, Point], effect: Effect
) -> tuple[tuple[Point, ...], Point]:
    """Bezier points of an effect between components at ``nodes``, and the tip of its arrow."""
    source, target = components[effect.source], components[effect.target]
    (x0, y0), (x1, y1) = nodes[effect.source], nodes[effect.target]
    y0 += source.height / 2
    tip = (x1 + target.foot(effect.port), y1 - target.height / 2)
    head = arrow_length(line_width(effect.strength)) if effect.directed else 0.0
    x1, y1 = tip[0], tip[1] - head
    rise = y1 - y0
    reach = max(18.0, 0.4 * rise)
    # A line straight up would hide behind the boxes of its own column.
    bow = 0.0 if abs(x1 - x0) > 20 or rise < 60 else 26.0 + 0.05 * rise
    return ((x0, y0), (x0 + bow, y0 + reach), (x1 + bow, y1 - reach), (x1, y1)), tip
