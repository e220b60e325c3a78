"""Layout: what of a circuit is shown, how large, and where, without Graphviz.

Input is at the bottom and logits on top, as papers of the field draw it. Small circuits are laid
out by Graphviz (see ``render``); :func:`grid` places all others, layer by component.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.labels import clip, visible
from circuitlab.scene import Box, Curve, Point, Text, arrow_length, text_width

#: Effects a picture shows unless it is told otherwise: more cannot be told apart.
MAX_EDGES = 300
#: Components up to which Graphviz's ``dot`` lays a circuit out: beyond, it is slow and tangled.
MAX_DOT_NODES = 60
#: Effects up to which each one carries its score in figures.
MAX_NUMBERED = 16

#: Okabe & Ito's blue and vermillion: told apart by every kind of colour vision, and in grey.
HELPS, HURTS = "#0072B2", "#D55E00"
#: The same, greyed, for a circuit that its own check did not establish.
FAINT_HELPS, FAINT_HURTS = "#7F97A6", "#B09384"

_NAME_SIZE, _ROLE_SIZE, _PORT_SIZE = 11.0, 8.0, 8.0
_PORT_ORDER = {"q": 0, "k": 1, "v": 2}
#: Fill, border, text, corner radius of each kind of component; every other kind is drawn dashed.
_STYLES = {
    "input": ("#3B3B3B", "#3B3B3B", "#FFFFFF", 9.0),
    "logits": ("#3B3B3B", "#3B3B3B", "#FFFFFF", 9.0),
    "head": ("#FFFFFF", "#444444", "#111111", 5.0),
    "mlp": ("#E6E6E6", "#444444", "#111111", 0.0),
}
_OTHER_STYLE = ("#FFFFFF", "#888888", "#111111", 0.0)


class Effect(NamedTuple):
    """One effect as a picture shows it; ``strength`` is |score| over the largest one, 0 to 1."""

    source: str
    target: str
    port: str
    score: float
    strength: float
    tooltip: str


@dataclass(frozen=True, slots=True)
class Component:
    """One component as a picture shows it; sizes in points."""

    name: str
    kind: str
    rank: tuple[int, int]
    column: tuple[int, str]
    label: str
    role: str
    ports: tuple[str, ...]
    width: float
    height: float
    tooltip: str

    @property
    def style(self) -> tuple[str, str, str, float]:
        """Fill, border and text colour, and the corner radius in points."""
        return _STYLES.get(self.kind, _OTHER_STYLE)

    @property
    def known(self) -> bool:
        """Whether the kind is one of the core's own."""
        return self.kind in _STYLES

    def foot(self, port: str) -> float:
        """Where along its lower side the port lies, in points right of the middle."""
        if port not in self.ports:
            return 0.0
        return ((self.ports.index(port) + 0.5) / len(self.ports) - 0.5) * self.width


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a circuit that a picture shows.

    Attributes:
        components: By rank, then column.
        effects: Weakest first, so that the strongest are drawn last, on top.
        n_effects: Number of effects of the whole circuit.
        scores: Smallest and largest |score| that is shown.
        established: False when the circuit says that its own check did not establish it.
        tied: Whether an effect that is left out is as strong as one that is shown.
    """

    components: Mapping[str, Component]
    effects: tuple[Effect, ...]
    n_effects: int
    scores: tuple[float, float]
    established: bool
    tied: bool

    @property
    def small(self) -> bool:
        """Whether the picture is small enough for Graphviz to lay it out well and at once."""
        return len(self.components) <= MAX_DOT_NODES and len(self.effects) <= MAX_EDGES

    @property
    def numbered(self) -> bool:
        """Whether each effect carries its score in figures."""
        return len(self.effects) <= MAX_NUMBERED

    def ranks(self) -> list[list[Component]]:
        """Components that stand on one line, from the input upwards."""
        ranks: dict[tuple[int, int], list[Component]] = {}
        for component in self.components.values():
            ranks.setdefault(component.rank, []).append(component)
        return [ranks[rank] for rank in sorted(ranks)]


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


def select(circuit: CircuitGraph, max_edges: int = MAX_EDGES) -> Selection:
    """The ``max_edges`` strongest effects and their components, ties by name.

    Effects whose data say ``kept=False`` were measured but are not part of the circuit.

    Raises:
        GraphError: the circuit is not well formed.
    """
    circuit.validate()
    edges = circuit.edges
    ordered = [e for e in circuit.effects() if edges[e[:3]].get("kept", True)]
    kept = ordered[: max(max_edges, 0)]
    names = {end for source, target, *_ in kept for end in (source, target)}
    if len(kept) == circuit.number_of_edges() and len(circuit) <= MAX_DOT_NODES:
        names = set(circuit)
    largest = max((abs(score) for *_, score in kept), default=0.0) or 1.0
    effects = [
        Effect(s, t, p, score, abs(score) / largest, f"{effect_name(s, t, p)}  {number(score)}")
        for s, t, p, score in reversed(kept)
    ]
    ports: dict[str, set[str]] = {}
    for effect in effects:
        if effect.port:
            ports.setdefault(effect.target, set()).add(effect.port)
    top = max((_layer(data) for _, data in circuit.nodes(data=True)), default=0)
    ends = Counter(end for effect in effects for end in (effect.source, effect.target))
    components = [_component(n, circuit.nodes[n], ports.get(n, set()), top, ends[n]) for n in names]
    components.sort(key=lambda c: (c.rank, c.column))
    sizes = [abs(effect.score) for effect in effects]
    return Selection(
        {component.name: component for component in components},
        tuple(effects),
        len(ordered),
        (min(sizes, default=0.0), max(sizes, default=0.0)),
        circuit.graph.get("verdict") != "not established",
        0 < len(kept) < len(ordered) and abs(kept[-1][3]) == abs(ordered[len(kept)][3]),
    )


def number(score: float) -> str:
    """A score for people: signed, two significant figures, a true minus sign."""
    if score == 0:
        return "0"
    if not 1e-3 <= abs(score) < 1e5:
        text = f"{score:+.1e}"
    else:
        digits = max(0, 1 - math.floor(math.log10(abs(score))))
        text = f"{score:+.{digits}f}"
    return text.replace("-", "−")


def line_width(strength: float) -> float:
    """Width in points of an effect's line: by the root, so that weak ones still show."""
    return 0.7 + 3.3 * math.sqrt(strength)


def colour(score: float, established: bool = True) -> str:
    """Colour of a score's sign."""
    if established:
        return HELPS if score < 0 else HURTS
    return FAINT_HELPS if score < 0 else FAINT_HURTS


def boxes(selection: Selection, places: Places) -> list[Box]:
    """The components, drawn."""
    return [_box(c, places.nodes[name]) for name, c in selection.components.items()]


def curves(selection: Selection, places: Places) -> list[Curve]:
    """The effects, drawn, weakest first."""
    weakest = min((effect.strength for effect in selection.effects), default=0.0)
    # Among many lines the weak ones step back, so that the strong ones can be followed.
    fade = 0.0 if len(selection.effects) <= 40 or weakest == 1 else 0.65 / (1 - weakest)
    return [
        Curve(
            points,
            colour(effect.score, selection.established),
            line_width(effect.strength),
            opacity=1.0 - fade * (1.0 - effect.strength),
            tip=tip,
            dashed=not selection.established,
            tooltip=effect.tooltip,
        )
        for effect, points, tip in zip(selection.effects, places.curves, places.tips, strict=True)
    ]


def numbers(selection: Selection, places: Places) -> list[Text]:
    """The scores written beside the effects."""
    return [
        Text(
            x, y, number(selection.effects[i].score), 8.0,
            colour(selection.effects[i].score, selection.established), halo=True,
        )
        for i, (x, y) in sorted(places.numbers.items())
    ]  # fmt: skip


def grid(selection: Selection) -> Places:
    """Places computed here: one row per layer, one column per head, MLPs in their own column."""
    components = selection.components.values()
    columns = sorted({c.column for c in components if not _is_end(c)})
    pitch = max((c.width for c in components), default=50.0) + 22.0
    across = {column: index * pitch for index, column in enumerate(columns)}
    middle = max(across.values(), default=0.0) / 2
    layers = sorted({c.rank[0] for c in components if not _is_end(c)})
    rise = max((c.height for c in components), default=24.0) + 46.0
    # The MLP reads the heads of its own layer: it stands above them, in a column of its own.
    heights = {
        c.rank: rise * (layers.index(c.rank[0]) + 0.5 * c.rank[1])
        for c in components
        if not _is_end(c)
    }
    floor, ceiling = min(heights.values(), default=0.0), max(heights.values(), default=0.0)
    for component in components:
        if _is_end(component):
            heights[component.rank] = floor - 58 if component.kind == "input" else ceiling + 58
    nodes = {
        c.name: (middle if _is_end(c) else across[c.column], heights[c.rank]) for c in components
    }
    paths = [_path(selection, nodes, effect) for effect in selection.effects]
    return Places(nodes, tuple(p for p, _ in paths), tuple(t for _, t in paths), {})


def _path(
    selection: Selection, nodes: Mapping[str, Point], effect: Effect
) -> tuple[tuple[Point, ...], Point]:
    source, target = selection.components[effect.source], selection.components[effect.target]
    (x0, y0), (x1, y1) = nodes[effect.source], nodes[effect.target]
    y0 += source.height / 2
    tip = (x1 + target.foot(effect.port), y1 - target.height / 2)
    x1, y1 = tip[0], tip[1] - arrow_length(line_width(effect.strength))
    rise = y1 - y0
    reach = max(18.0, 0.4 * rise)
    # A line straight up would hide behind the boxes of its own column.
    bow = 0.0 if abs(x1 - x0) > 20 or rise < 60 else 26.0 + 0.05 * rise
    return ((x0, y0), (x0 + bow, y0 + reach), (x1 + bow, y1 - reach), (x1, y1)), tip


def _box(component: Component, place: Point) -> Box:
    x, y = place
    fill, stroke, ink, radius = component.style
    top = y + component.height / 2
    texts = [Text(x, top - 12, component.label, _NAME_SIZE, ink)]
    if component.role:
        texts.append(Text(x, top - 23.5, component.role, _ROLE_SIZE, "#666666"))
    foot = y - component.height / 2 + 6
    texts += [
        Text(x + component.foot(port), foot, clip(visible(port), 4), _PORT_SIZE, "#777777")
        for port in component.ports
    ]
    return Box(
        x, y, component.width, component.height, fill, stroke, radius,
        dashed=not component.known, tooltip=component.tooltip, texts=tuple(texts),
    )  # fmt: skip


def _component(
    name: str, data: Mapping[str, Any], ports: set[str], top: int, n_effects: int
) -> Component:
    kind = str(data.get("kind", ""))
    full = visible(str(name))
    note = visible(str(data.get("role") or data.get("label") or ""))
    label, role = clip(full, 22), clip(note, 26)
    ordered = tuple(sorted(ports, key=lambda p: (_PORT_ORDER.get(p, 3), p)))
    width = max(
        text_width(label, _NAME_SIZE) + 14, text_width(role, _ROLE_SIZE) + 12,
        13.0 * len(ordered), 44.0,
    )  # fmt: skip
    if kind in ("input", "logits"):
        width = max(width, min(40.0 + 9.0 * n_effects, 130.0))
    height = 24.0 + (11.0 if role else 0.0) + (8.0 if ordered else 0.0)
    rank = {"input": (-1, 0), "logits": (top + 1, 0)}.get(
        kind, (_layer(data), 0 if kind == "head" else 1)
    )
    head = re.search(r"h(\d+)$", str(name))
    column = (int(head[1]) if head else 1 << 30, "" if kind in ("mlp", "head") else str(name))
    tooltip = f"{full}: {note}" if note else full
    return Component(
        str(name), kind, rank, column, label, role, ordered, round(width), height, tooltip
    )


def _layer(data: Mapping[str, Any]) -> int:
    layer = data.get("layer", 0)
    return layer if isinstance(layer, int) else 0


def _is_end(component: Component) -> bool:
    return component.kind in ("input", "logits")
