"""The noise × denoise picture: which effects are needed, which suffice, and the gates they form.

Noising n is the share of the task's effect that is lost when one component alone turns corrupt in
the clean run; denoising d is the share that comes back when it alone turns clean in the corrupt
run. A member of an AND gate has n = 1, d = 0; of an OR gate n = 0, d = 1; of a sum, both the same.
The angle of (n, d) tells them apart; half a turn more is the same relation with the other sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.patches import Polygon
from matplotlib.transforms import Bbox

from circuitlab_path_patching.plots.ink import (
    FAINT,
    GATE_FILL,
    INK,
    SOFT,
    TYPE_COLOURS,
    entries,
    figure,
    marker,
    number,
    readable,
    reading,
)
from circuitlab_path_patching.plots.panels import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from circuitlab import CircuitGraph

#: Strongest points that are drawn, strongest that get a name where there is room, and gates.
MAX_POINTS, MAX_LABELS, MAX_GATES = 2000, 12, 8
#: Ends of the axes, the smallest that holds every point.
_ENDS = (0.12, 0.28, 0.55, 1.12)
_SECTORS = ("AND", "ADD", "OR", "XOR")
_WIDTH, _HEIGHT = 6.9, 5.9


class Point(NamedTuple):
    """An effect in both directions, as shares of the task's effect."""

    name: str
    noise: float
    denoise: float
    score: float


@dataclass(frozen=True)
class Group:
    """A gate and where its members lie, ``(n, d)`` each."""

    type: str
    interaction: float
    names: str
    members: tuple[tuple[float, float], ...]


def sector(noise: float, denoise: float) -> str:
    """The gate type at the angle of ``(n, d)``: 0° AND, 45° ADD, 90° OR, 135° XOR, ± 22.5°."""
    angle = math.degrees(math.atan2(denoise, noise)) % 180
    return _SECTORS[math.floor((angle + 22.5) / 45) % 4]


def quadrants(circuit: CircuitGraph) -> Iterator[Panel]:
    """The panel, where the circuit has effects in both directions."""
    with reading("the effects' noise and denoise"):
        points = _points(circuit)
    with reading('graph["gates"]'):
        groups = _groups(circuit)
    if not points and not groups:
        return
    noun = "component" if all("→" not in point.name for point in points) else "edge"
    caption = (
        f"One point per {noun}, larger with |score|. Right: needed, the task breaks when it alone "
        "is corrupt. Up: it suffices,\nthe task comes back when it alone is clean."
    )
    if groups:
        caption += " Yellow: a gate and its interaction; lines lead to its members, circled."
    if len(points) > MAX_POINTS:
        caption += f" Strongest {MAX_POINTS:,} of {len(points):,}."
        points = points[:MAX_POINTS]
    yield Panel(
        "Needed or sufficient? Noising against denoising", caption, _WIDTH, _HEIGHT,
        lambda part, frame: _draw(part, frame, points, groups),
    )  # fmt: skip


def _points(circuit: CircuitGraph) -> list[Point]:
    found = []
    for source, target, port, score in circuit.effects():
        data = circuit.edges[source, target, port]
        kinds = {circuit.nodes[end].get("kind") for end in (source, target)}
        if data.get("noise") is None or data.get("denoise") is None or "gate" in kinds:
            continue
        name = f"{source} → {target}{':' + port if port else ''}"
        name = source if data.get("kind") == "total" else name
        found.append(Point(name, number(data["noise"]), number(data["denoise"]), score))
    return found


def _groups(circuit: CircuitGraph) -> list[Group]:
    groups = []
    drawn = [gate for gate in entries(circuit.graph, "gates") if gate.get("drawn", True)]
    for gate in drawn[:MAX_GATES]:
        noise, denoise = gate.get("noise") or [], gate.get("denoise") or []
        if not noise or None in noise or None in denoise:
            continue  # nothing to divide by: the group's own effect is flat, as for XOR
        members = zip(map(number, noise), map(number, denoise), strict=True)
        names = readable(", ".join(map(str, gate["members"])), 30)
        interaction = number(gate["interaction"])
        groups.append(Group(readable(gate["type"], 8), interaction, names, tuple(members)))
    return groups


# --- drawing --------------------------------------------------------------------------------------


def _draw(
    part: SubFigure, frame: tuple[float, float, float, float], points: list[Point],
    groups: list[Group],
) -> None:  # fmt: skip
    values = [v for p in points for v in (p.noise, p.denoise)]
    values += [v for g in groups for place in g.members for v in place]
    low, high = _limits(values)
    _, bottom, _, top = frame
    # Room for the axis labels at the left and below, for the sectors' names at the right and above.
    side = min(0.745 * _WIDTH, (top - bottom) * part.bbox.height / part.dpi - 0.75)
    inches = part.bbox.height / part.dpi
    axes = part.add_axes(
        (0.75 / _WIDTH, top - (0.25 + side) / inches, side / _WIDTH, side / inches)
    )
    axes.set(xlim=(low, high), ylim=(low, high))
    _sectors(axes, low, high)
    axes.axhline(0, color="#999999", linewidth=0.6, zorder=1)
    axes.axvline(0, color="#999999", linewidth=0.6, zorder=1)
    axes.set_xlabel("noising n: share of the effect lost when it alone is corrupt")
    axes.set_ylabel("denoising d: share restored when it alone is clean")
    largest = max((abs(p.score) for p in points), default=0.0) or 1.0
    # Strongest last, on top; near 0 an angle says nothing.
    axes.scatter(
        [p.noise for p in reversed(points)],
        [p.denoise for p in reversed(points)],
        s=[_area(p, largest) for p in reversed(points)],
        color=[
            FAINT
            if math.hypot(p.noise, p.denoise) < 0.02 * high
            else TYPE_COLOURS[sector(p.noise, p.denoise)]
            for p in reversed(points)
        ],
        edgecolors="white", linewidths=0.7, alpha=0.9, zorder=3,
    )  # fmt: skip
    room = _Room(axes, points, largest, [place for g in groups for place in g.members])
    for group in groups:
        _gate(axes, group, room)
    named: set[str] = set()
    for point in points:
        if len(named) == MAX_LABELS:
            break
        if point.name not in named and room.write(readable(point.name, 26), point[1:3], SOFT):
            named.add(point.name)


def _area(point: Point, largest: float) -> float:
    return 14 + 150 * abs(point.score) / largest


def _limits(values: list[float]) -> tuple[float, float]:
    """Both axes' ends: fixed steps, so that pictures can be compared."""
    largest, smallest = max([*values, 0.0]), min([*values, 0.0])
    high = next((end for end in _ENDS if end >= 1.04 * largest), 1.08 * largest)
    return min(-0.25 * high, 1.12 * smallest), high


def _sectors(axes: Axes, low: float, high: float) -> None:
    reach = 3 * max(high, -low)
    for index, name in enumerate(_SECTORS):
        for turn in (0, 180):
            ends = [math.radians(45 * index + turn + side) for side in (-22.5, 22.5)]
            corners = [(0.0, 0.0), *[(reach * math.cos(a), reach * math.sin(a)) for a in ends]]
            axes.add_patch(Polygon(corners, color=TYPE_COLOURS[name], alpha=0.10, lw=0, zorder=0))
    # Outside, where no point can lie; the anti-diagonal leaves the picture on the left.
    texts = {
        "AND": (high, 0.0, 6, "all are needed"),
        "ADD": (high, high, 6, "parts add up"),
        "OR": (0.0, high, 6, "any one suffices"),
        "XOR": (low, -low, 4, "one, not both"),
    }
    for name, (x, y, gap, words) in texts.items():
        above = name == "OR"
        shade = _dark(TYPE_COLOURS[name])
        for text, weight, dx, dy in (
            (name, "bold", 0 if above else gap, gap), (words, "normal", 20 if above else gap, -gap),
        ):  # fmt: skip
            dy = gap if above else dy
            axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha="left", size=8.5,
                va="bottom" if above else "center", weight=weight, color=shade,
                annotation_clip=False, zorder=2,
            )  # fmt: skip


def _dark(colour: str) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.72 * part):02X}" for part in parts)


def _gate(axes: Axes, group: Group, room: _Room) -> None:
    """Lines from the members to the gate's symbol, which stands beside their middle."""
    xs, ys = zip(*group.members, strict=True)
    for x, y in group.members:
        axes.plot([x], [y], "o", ms=11, mfc="none", mec=INK, mew=0.9, zorder=4)
    middle = sum(xs) / len(xs), sum(ys) / len(ys)
    words = f"{group.type} {figure(group.interaction)}"
    place = room.place_symbol(middle, [(words, 7.5), (group.names, 6.5)])
    for x, y in group.members:
        axes.plot([x, place[0]], [y, place[1]], color=INK, linewidth=0.9, zorder=3.5)
    axes.plot(
        [place[0]], [place[1]], marker=marker(group.type), ms=17, mfc=GATE_FILL, mec=INK, mew=0.9,
        zorder=5,
    )  # fmt: skip
    if group.type == "ADD":
        axes.plot([place[0]], [place[1]], marker="+", ms=10, mec=INK, mew=0.9, zorder=5)
    for text, size, weight, shade, drop in (
        (words, 7.5, "bold", INK, -11), (group.names, 6.5, "normal", SOFT, -20),
    ):  # fmt: skip
        axes.annotate(
            text, place, (0, drop), textcoords="offset points", ha="center", va="top", size=size,
            weight=weight, color=shade, zorder=6,
            bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.4},
        )  # fmt: skip


class _Room:
    """Where text still has room; in pixels of a drawing of the axes."""

    def __init__(
        self, axes: Axes, points: list[Point], largest: float, members: list[tuple[float, float]]
    ) -> None:
        self.axes = axes
        figure = axes.get_figure(root=True)
        assert figure is not None
        self.scale = figure.dpi / 72
        self.inside = axes.get_window_extent()
        self.taken: list[Bbox] = []
        self.texts: list[Bbox] = []
        for point in points:
            radius = math.sqrt(_area(point, largest)) / 2 * self.scale
            self.taken.append(self._around(point[1:3], radius, radius))
        self.taken += [self._around(place, 6 * self.scale, 6 * self.scale) for place in members]
        # The name that stands inside the axes, at their left end.
        low = axes.get_xlim()[0]
        self.taken.append(self._around((low, -low), 64 * self.scale, 12 * self.scale))

    def _around(self, place: tuple[float, float], width: float, height: float) -> Bbox:
        x, y = self.axes.transData.transform(place)
        return Bbox([[x - width, y - height], [x + width, y + height]])

    def _free(self, box: Bbox) -> bool:
        inside = box.x0 > self.inside.x0 and box.x1 < self.inside.x1
        inside = inside and box.y0 > self.inside.y0 and box.y1 < self.inside.y1
        return inside and not any(box.overlaps(other) for other in self.taken)

    def _crossed(self, start: tuple[float, float], end: tuple[float, float]) -> bool:
        """Whether a line from one place to the other would run through a text."""
        along = [
            [a + part / 8 * (b - a) for a, b in zip(start, end, strict=True)] for part in range(9)
        ]
        return any(box.contains(x, y) for box in self.texts for x, y in along)

    def write(self, words: str, place: tuple[float, float], colour: str) -> bool:
        """Write beside a point, the nearest free place first; nothing where there is none."""
        width, height = _size(self.axes, words, 7.0)
        x, y = self.axes.transData.transform(place)
        for distance in (8, 15, 26):
            for turn in (0, 45, -45, 90, -90, 135, -135, 180):
                dx, dy = (f(math.radians(turn)) for f in (math.cos, math.sin))
                cx = x + distance * self.scale * dx + dx * width / 2
                cy = y + distance * self.scale * dy + dy * height / 2
                box = Bbox([[cx - width / 2, cy - height / 2], [cx + width / 2, cy + height / 2]])
                if not self._free(box) or self._crossed((x, y), (cx, cy)):
                    continue
                self.taken.append(box)
                self.texts.append(box)
                offset = (cx - x) / self.scale, (cy - y) / self.scale
                line = {"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
                self.axes.annotate(
                    words, place, offset, textcoords="offset points", ha="center", va="center",
                    size=7.0, color=colour, zorder=6, arrowprops=line if distance > 8 else None,
                )  # fmt: skip
                return True
        return False

    def place_symbol(
        self, middle: tuple[float, float], lines: list[tuple[str, float]]
    ) -> tuple[float, float]:
        """A free place for a gate's symbol and the lines of text under it, near ``middle``."""
        widths = [1.08 * _size(self.axes, words, size)[0] for words, size in lines]
        half, below = max(*widths, 20 * self.scale) / 2, 31 * self.scale
        x, y = self.axes.transData.transform(middle)
        for distance in (0, 30, 42, 56, 72, 90):
            for turn in (45, 135, -45, -135, 0, 180, 90, -90):
                cx = x + distance * self.scale * math.cos(math.radians(turn))
                cy = y + distance * self.scale * math.sin(math.radians(turn))
                box = Bbox([[cx - half, cy - below], [cx + half, cy + 11 * self.scale]])
                if self._free(box):
                    self.taken.append(box)
                    self.texts.append(box)
                    found = self.axes.transData.inverted().transform((cx, cy))
                    return float(found[0]), float(found[1])
        return middle


def _size(axes: Axes, words: str, size: float) -> tuple[float, float]:
    text: Any = axes.text(0, 0, words, size=size)
    extent = text.get_window_extent()
    text.remove()
    return extent.width + 4, extent.height + 2
