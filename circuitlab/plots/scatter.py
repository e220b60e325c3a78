"""Scatter plots, before nothing, quadrants, a diagonal, the unit circle, or the gate types.

The gate types are those of noising against denoising. Noising n is the share of the task's effect
that is lost when one component alone turns corrupt in the clean run; denoising d is the share that
comes back when it alone turns clean in the corrupt run. A member of an AND gate has n = 1, d = 0;
of an OR gate n = 0, d = 1; of a sum, both the same. The angle of (n, d) tells them apart; half a
turn more is the same relation with the other sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.patches import Circle, Polygon

from circuitlab.panels import Point, Scatter
from circuitlab.plots.frame import (
    ROW,
    Frame,
    Key,
    Tile,
    draw_legend,
    label_axes,
    legend_rows,
    zero_line,
)
from circuitlab.plots.ink import (
    COLOURS,
    FAINT,
    GATE_COLOURS,
    GATE_FILL,
    INK,
    RULE,
    SOFT,
    dark,
    marker,
    readable,
)
from circuitlab.plots.room import Room
from circuitlab.symbols import SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Strongest points that are drawn, strongest that get a name where there is room, and points with
#: members.
MAX_POINTS, MAX_LABELS, MAX_JOINED = 2000, 12, 8
#: Ends of the axes of noising and denoising, the smallest that holds every point.
_ENDS = (0.12, 0.28, 0.55, 1.12)
_SECTORS = ("AND", "ADD", "OR", "XOR")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
#: Sides of the axes in inches: of the gate types, of other square ones, of the rest.
_LARGE, _SQUARE, _WIDE, _HIGH = 4.7, 3.2, 3.5, 2.8


def sector(noise: float, denoise: float) -> str:
    """The gate type at the angle of ``(n, d)``: 0° AND, 45° ADD, 90° OR, 135° XOR, ± 22.5°."""
    angle = math.degrees(math.atan2(denoise, noise)) % 180
    return _SECTORS[math.floor((angle + 22.5) / 45) % 4]


def scatter(panel: Scatter) -> Tile:
    """The scatter plot as a tile."""
    order = sorted(panel.points, key=lambda point: -abs(point.weight or 0.0))
    points = [point for point in order if not point.members]
    joined = [point for point in panel.points if point.members][:MAX_JOINED]
    note = ""
    if len(points) > MAX_POINTS:
        note = f"{MAX_POINTS:,} of {len(points):,} points."
        points = points[:MAX_POINTS]
    gates = panel.guide == "gates"
    wide, high = (_WIDE, _HIGH) if panel.guide in ("none", "quadrants") else (_SQUARE, _SQUARE)
    wide, high = (_LARGE, _LARGE) if gates else (wide, high)
    looks = _looks(panel)
    rows = legend_rows([] if set(looks) <= {""} else list(looks.values()), wide)
    right, above = (0.95, 0.28) if gates else (0.15, 0.08)
    above += ROW * len(rows)

    def draw(frame: Frame) -> None:
        axes = frame.axes(0.62, 0.45, wide, high)
        _set_limits(axes, panel)
        _guide(axes, panel)
        label_axes(axes, panel.x_label, panel.y_label, wide, high)
        frame.fit(axes)
        areas = _areas(points)
        _draw(axes, panel, points, areas, looks)
        _annotate(axes, points, areas, joined)
        draw_legend(frame, 0.62, 0.45 + high + above, rows)

    return Tile(0.62 + wide + right, 0.45 + high + above, draw, note)


def _looks(panel: Scatter) -> dict[str, Key]:
    """Colour and marker of each kind of point; gate types are told by the guide where it does."""
    kinds = list(dict.fromkeys(point.kind for point in panel.points))
    told = _SECTORS if panel.guide == "gates" else ()
    looks = {}
    plain = [kind for kind in kinds if kind not in SYMBOLS]
    for kind in kinds:
        words = readable(kind or "other", 40)
        if kind in SYMBOLS and kind not in told:
            meaning = SYMBOLS[kind].meaning
            looks[kind] = Key(f"{words}: {meaning}", GATE_FILL, marker(kind), INK)
        elif kind not in SYMBOLS:
            number = plain.index(kind)
            shape = _MARKERS[number % len(_MARKERS)]
            looks[kind] = Key(words, COLOURS[number % len(COLOURS)], shape, "#FFFFFF")
    return looks


def _areas(points: Sequence[Point]) -> list[float]:
    """Sizes of the points in square points: by weight, else all alike."""
    weights = [abs(point.weight or 0.0) for point in points]
    if not any(weights):
        return [26.0 if len(points) <= 200 else 10.0] * len(points)
    return [14 + 150 * weight / max(weights) for weight in weights]


def _draw(
    axes: Axes, panel: Scatter, points: Sequence[Point], areas: Sequence[float],
    looks: dict[str, Key],
) -> None:  # fmt: skip
    """The points that have no members, strongest last, on top; kind by kind."""
    near = 0.02 * axes.get_xlim()[1]
    for kind in dict.fromkeys(point.kind for point in reversed(points)):
        found = [(p, area) for p, area in zip(points, areas, strict=True) if p.kind == kind][::-1]
        key = looks.get(kind)
        if panel.guide == "gates" and not kind:
            # Near 0 an angle says nothing.
            colours = [
                FAINT if math.hypot(p.x, p.y) < near else GATE_COLOURS[sector(p.x, p.y)]
                for p, _ in found
            ]
        else:
            colours = [key.colour if key else GATE_FILL] * len(found)
        axes.scatter(
            [p.x for p, _ in found], [p.y for p, _ in found],
            s=[area if key and key.marker in _MARKERS else 4 * area for _, area in found],
            color=colours, marker=key.marker if key else marker(kind), alpha=0.9,
            edgecolors=key.edge if key else INK, linewidths=0.7, zorder=3,
        )  # fmt: skip


# --- what stands behind the points ----------------------------------------------------------------


def _set_limits(axes: Axes, panel: Scatter) -> None:
    xs = [v for p in panel.points for v in (p.x, *(at[0] for at in p.members))]
    ys = [v for p in panel.points for v in (p.y, *(at[1] for at in p.members))]
    if panel.guide == "gates":
        both = _fixed(xs + ys), _fixed(xs + ys)
    elif panel.guide == "unit-circle":
        reach = 1.12 * max(1.0, *map(abs, xs), *map(abs, ys))
        both = (-reach, reach), (-reach, reach)
    elif panel.guide == "diagonal":
        both = _padded(xs + ys), _padded(xs + ys)
    else:
        zero = [0.0] if panel.guide == "quadrants" else []
        both = _padded(xs + zero), _padded(ys + zero)
    axes.set(xlim=both[0], ylim=both[1])


def _fixed(values: Sequence[float]) -> tuple[float, float]:
    """Ends of both axes in fixed steps, so that pictures can be compared."""
    largest, smallest = max([*values, 0.0]), min([*values, 0.0])
    high = next((end for end in _ENDS if end >= 1.04 * largest), 1.08 * largest)
    return min(-0.25 * high, 1.12 * smallest), high


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low)
    if room <= 1e-9 * max(abs(low), abs(high)):
        room = 0.1 * abs(high) or 1.0
    return low - room, high + room


def _guide(axes: Axes, panel: Scatter) -> None:
    low, high = axes.get_xlim()
    if panel.guide == "gates":
        _sectors(axes, low, high)
    if panel.guide == "diagonal":
        axes.plot([low, high], [low, high], color=RULE, linewidth=0.8, linestyle="--", zorder=1)
    if panel.guide == "unit-circle":
        axes.add_patch(Circle((0, 0), 1.0, fill=False, color=RULE, linewidth=0.9, zorder=1))
    if panel.guide in ("gates", "quadrants", "unit-circle"):
        zero_line(axes)
        zero_line(axes, across=False)


def _sectors(axes: Axes, low: float, high: float) -> None:
    reach = 3 * max(high, -low)
    for index, name in enumerate(_SECTORS):
        for turn in (0, 180):
            ends = [math.radians(45 * index + turn + side) for side in (-22.5, 22.5)]
            corners = [(0.0, 0.0), *[(reach * math.cos(a), reach * math.sin(a)) for a in ends]]
            axes.add_patch(Polygon(corners, color=GATE_COLOURS[name], alpha=0.10, lw=0, zorder=0))
    # Outside, where no point can lie; the anti-diagonal leaves the picture on the left.
    texts = {
        "AND": (high, 0.0, 6, "all are needed"),
        "ADD": (high, high, 6, "parts add up"),
        "OR": (0.0, high, 6, "any one suffices"),
        "XOR": (low, -low, 4, "one, not both"),
    }
    for name, (x, y, gap, words) in texts.items():
        above = name == "OR"
        shade = dark(GATE_COLOURS[name])
        for text, weight, dx, dy in (
            (name, "bold", 0 if above else gap, gap), (words, "normal", 20 if above else gap, -gap),
        ):  # fmt: skip
            dy = gap if above else dy
            axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha="left", size=8.5,
                va="bottom" if above else "center", weight=weight, color=shade,
                annotation_clip=False, zorder=2,
            )  # fmt: skip


# --- what is written beside them ------------------------------------------------------------------


def _annotate(
    axes: Axes, points: Sequence[Point], areas: Sequence[float], joined: Sequence[Point]
) -> None:
    """Points with members near these; then names of the strongest others, where there is room."""
    places = [(float(p.x), float(p.y)) for p in points]
    room = Room(axes)
    for place, area in zip(places, areas, strict=True):
        radius = math.sqrt(area) / 2
        room.take(place, radius, radius)
    for point in joined:
        for x, y in point.members:
            room.take((x, y), 6, 6)
    low = axes.get_xlim()[0]
    if any(text.get_text() == "XOR" for text in axes.texts):
        room.take((low, -low), 64, 12)  # the name that stands inside, at the left end
    for point in joined:
        _join(axes, point, room)
    named: set[str] = set()
    for point, place in zip(points, places, strict=True):
        if len(named) == MAX_LABELS:
            break
        words = readable(point.name, 26)
        if words and words not in named and room.write(words, place, SOFT):
            named.add(words)


def _join(axes: Axes, point: Point, room: Room) -> None:
    """Lines from the members to the point's symbol, which stands where there is room."""
    for x, y in point.members:
        axes.plot([x], [y], "o", ms=11, mfc="none", mec=INK, mew=0.9, zorder=4)
    first, _, second = point.name.partition("\n")
    lines = [(readable(first, 30), 7.5, "bold", INK), (readable(second, 30), 6.5, "normal", SOFT)]
    lines = [line for line in lines if line[0]]
    sizes = [(line[0], line[1]) for line in lines]
    place = room.place_symbol((point.x, point.y), sizes, point.members)
    for x, y in point.members:
        axes.plot([x, place[0]], [y, place[1]], color=INK, linewidth=0.9, zorder=3.5)
    axes.plot(
        [place[0]], [place[1]], marker=marker(point.kind), ms=17, mfc=GATE_FILL, mec=INK, mew=0.9,
        zorder=5,
    )  # fmt: skip
    for (words, size, weight, shade), drop in zip(lines, (-11, -20), strict=False):
        axes.annotate(
            words, place, (0, drop), textcoords="offset points", ha="center", va="top", size=size,
            weight=weight, color=shade, zorder=6,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.4},
        )  # fmt: skip
