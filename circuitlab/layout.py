"""Layout: what of a circuit is shown, how large, and where, without Graphviz.

Input is at the bottom and logits on top, as papers of the field draw it. Small circuits are laid
out by Graphviz (see ``render``); :func:`grid` places all others, layer by component.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from circuitlab.components import Component, Effect, draw_component, draw_effect, number
from circuitlab.graph import EDGE_SCORE, CircuitGraph
from circuitlab.routes import Places, beside, line_width, path_of
from circuitlab.rows import Passages, broken, is_broken, packed
from circuitlab.scene import Box, Curve, Point, Text

#: Effects a picture shows unless it is told otherwise: more cannot be told apart.
MAX_EDGES = 300
#: Components up to which Graphviz's ``dot`` lays a circuit out: beyond, it is slow and tangled.
MAX_DOT_NODES = 60
#: Effects up to which each one carries its score in figures.
MAX_NUMBERED = 16

#: Offset in points of the box behind that of a component which stands for several.
STACK = 3.0

#: Okabe & Ito's blue and vermillion: told apart by every kind of colour vision, and in grey.
HELPS, HURTS = "#0072B2", "#D55E00"
#: The same, greyed, for a circuit that its own check did not establish.
FAINT_HELPS, FAINT_HURTS = "#7F97A6", "#B09384"
#: Where a sign says something else: their bluish green and reddish purple.
NEGATIVE, POSITIVE = "#AA4499", "#009E73"
#: Where two circuits are compared: colour and dash of what is in one, in the other, in both. The
#: colours are Okabe & Ito's too; the dashes tell them apart without any.
OWNED = {"a": ("#56B4E9", "dashed"), "b": ("#E69F00", "dotted"), "both": ("#333333", "solid")}
#: An effect of exactly 0 neither helps nor hurts.
NEUTRAL = "#888888"


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
        helps: Whether a negative score says that the effect helps the task; else a sign says what
            the circuit's own score says.
    """

    components: Mapping[str, Component]
    effects: tuple[Effect, ...]
    n_effects: int
    scores: tuple[float, float]
    established: bool
    tied: bool
    helps: bool

    def ink(self, effect: Effect) -> tuple[str, str]:
        """Colour and dash of an effect: ``solid``, ``dashed`` or ``dotted``."""
        if effect.owner:
            return OWNED[effect.owner]
        dashed = effect.redundant or not self.established
        return self.colour(effect.score), "dashed" if dashed else "solid"

    def colour(self, score: float) -> str:
        """Colour of a score's sign."""
        if score == 0:
            return NEUTRAL
        if not self.helps:
            return NEGATIVE if score < 0 else POSITIVE
        if self.established:
            return HELPS if score < 0 else HURTS
        return FAINT_HELPS if score < 0 else FAINT_HURTS

    @property
    def small(self) -> bool:
        """Whether the picture is small enough for Graphviz to lay it out well and at once."""
        return len(self.components) <= MAX_DOT_NODES and len(self.effects) <= MAX_EDGES

    @property
    def broken(self) -> bool:
        """Whether a row was too long for a page; :func:`grid` lays such a picture out best."""
        return is_broken(self.components.values())

    @property
    def numbered(self) -> bool:
        """Whether each effect carries its score in figures."""
        return len(self.effects) <= MAX_NUMBERED

    def ranks(self) -> list[list[Component]]:
        """Components that stand on one line, from the input upwards."""
        ranks: dict[tuple[int, ...], list[Component]] = {}
        for component in self.components.values():
            ranks.setdefault(component.rank, []).append(component)
        return [ranks[rank] for rank in sorted(ranks)]


def select(circuit: CircuitGraph, max_edges: int = MAX_EDGES) -> Selection:
    """The ``max_edges`` strongest effects and their components, ties by name.

    Effects whose data say ``kept=False`` were measured but are not part of the circuit; those with
    a ``gate`` are told by that gate.

    Raises:
        GraphError: the circuit is not well formed.
    """
    circuit.validate()
    edges = circuit.edges
    ordered = [
        effect
        for effect in circuit.effects()
        if edges[effect[:3]].get("kept", True) and edges[effect[:3]].get("gate") not in circuit
    ]
    kept = _with_whole_gates(circuit, ordered, max(max_edges, 0))
    names = {end for source, target, *_ in kept for end in (source, target)}
    if len(kept) == circuit.number_of_edges() and len(circuit) <= MAX_DOT_NODES:
        names = set(circuit)
    largest = max((abs(score) for *_, score in kept), default=0.0) or 1.0
    effects = [draw_effect(circuit, effect, abs(effect[3]) / largest) for effect in reversed(kept)]
    ports: dict[str, set[str]] = {}
    for effect in effects:
        if effect.port:
            ports.setdefault(effect.target, set()).add(effect.port)
    ends = Counter(end for effect in effects for end in (effect.source, effect.target))
    components = [
        draw_component(circuit, name, names, ports.get(name, set()), ends[name]) for name in names
    ]
    components = broken(components, effects)
    components.sort(key=lambda c: (c.rank, c.column))
    sizes = [abs(effect.score) for effect in effects]
    return Selection(
        {component.name: component for component in components},
        tuple(effects),
        len(ordered),
        (min(sizes, default=0.0), max(sizes, default=0.0)),
        circuit.graph.get("verdict") != "not established",
        0 < len(kept) < len(ordered) and abs(kept[-1][3]) == abs(ordered[len(kept)][3]),
        helps(circuit),
    )


def helps(circuit: CircuitGraph) -> bool:
    """Whether a negative score means that the edge helps, as it does unless a plugin says else."""
    score = str(circuit.graph.get("score", EDGE_SCORE))
    return re.search(r"negative (= )?(the edge |it )?helps", score) is not None


def _with_whole_gates(
    circuit: CircuitGraph, ordered: list[tuple[str, str, str, float]], n: int
) -> list[tuple[str, str, str, float]]:
    """The first ``n`` effects, and all of each gate that they touch: half a gate would be false."""
    first = ordered[:n]
    gates = {e for effect in first for e in effect[:2] if circuit.nodes[e].get("kind") == "gate"}
    return first + [e for e in ordered[n:] if gates.intersection(e[:2])]


def boxes(selection: Selection, places: Places) -> list[Box]:
    """The components, drawn."""
    found: list[Box] = []
    for name, c in selection.components.items():
        box = _box(c, places.nodes[name])
        if c.stacked:
            found.append(replace(box, x=box.x + STACK, y=box.y + STACK, tooltip="", texts=()))
        found.append(box)
    return found


def curves(selection: Selection, places: Places) -> list[Curve]:
    """The effects, drawn, weakest first."""
    weakest = min((effect.strength for effect in selection.effects), default=0.0)
    # Among many lines the weak ones step back, so that the strong ones can be followed.
    # Not where colours say which circuit has an edge: pale ones could not be told apart.
    flat = len(selection.effects) <= 40 or weakest == 1 or any(e.owner for e in selection.effects)
    fade = 0.0 if flat else 0.65 / (1 - weakest)
    return [
        Curve(
            points,
            selection.ink(effect)[0],
            line_width(effect.strength),
            opacity=(1.0 - fade * (1.0 - effect.strength)) * opacity(effect),
            tip=tip if effect.directed else None,
            dash=selection.ink(effect)[1],
            tooltip=effect.tooltip,
        )
        for effect, points, tip in zip(selection.effects, places.curves, places.tips, strict=True)
    ]


def opacity(effect: Effect) -> float:
    """How firm an effect's line is: faint where few resamples found it again, never gone."""
    return 0.2 + 0.8 * effect.inclusion


def numbers(selection: Selection, places: Places) -> list[Text]:
    """The scores written beside the effects."""
    return [
        Text(
            x, y, number(selection.effects[i].score), 8.0,
            selection.ink(selection.effects[i])[0], halo=True,
        )
        for i, (x, y) in sorted(places.numbers.items())
    ]  # fmt: skip


def grid(selection: Selection) -> Places:
    """Places computed here: one row per layer, one column per head, MLPs in their own column.

    Components that have a token position stand in the columns of that position. Gates stand above
    their members, on a row of their own. What may stand anywhere in its row stands in the middle,
    in the order of what it reads.
    """
    components = selection.components.values()
    slots = _slots(selection)
    columns = sorted(set(slots.values()))
    pitch = max((c.width for c in components), default=50.0) + 22.0
    across = {column: index * pitch for index, column in enumerate(columns)}
    middle = max(across.values(), default=0.0) / 2
    heights = _heights(selection)
    nodes: dict[str, Point] = {}
    for row in selection.ranks():
        right = -math.inf
        for c, x in _wished(selection, row, nodes) if row[0].symbol else ():
            right = max(x, right + pitch)
            nodes[c.name] = right, heights[c.rank]
        for name, x in _packed(selection, row, nodes, middle).items():
            nodes[name] = x, heights[row[0].rank]
        for c in row:
            x = middle if c.is_end else across.get(slots.get(c.name, (0, 0, "")), middle)
            nodes.setdefault(c.name, (x, heights[c.rank]))
    for row in [*reversed(selection.ranks()), *selection.ranks()]:
        for name, x in _packed(selection, row, nodes, middle).items():
            nodes[name] = x, heights[row[0].rank]
    paths = [path_of(selection.components, nodes, effect) for effect in selection.effects]
    curves, tips = [points for points, _ in paths], [tip for _, tip in paths]
    if not selection.broken:
        return Places(nodes, tuple(curves), tuple(tips), {})
    passages = Passages(selection.ranks(), nodes)
    for index, effect in enumerate(selection.effects):
        (*_, end), tip, target = curves[index], tips[index], selection.components[effect.target]
        if target.is_end:
            # Many lines to one point could not be told apart.
            aside = max(-0.45, min(0.45, (nodes[effect.source][0] - end[0]) / 900)) * target.width
            end, tips[index] = (end[0] + aside, end[1]), (tip[0] + aside, tip[1])
        if curves[index][0][1] < end[1]:
            curves[index] = passages.lead(curves[index][0], end)
    written = {i: beside(curve[-4:], 1) for i, curve in enumerate(curves) if selection.numbered}
    return Places(nodes, tuple(curves), tuple(tips), written)


def _slots(selection: Selection) -> dict[str, tuple[int, int, str]]:
    """The column of each component; what shares rank and token position stands side by side."""
    slots: dict[str, tuple[int, int, str]] = {}
    taken: Counter[tuple[tuple[int, ...], int]] = Counter()
    for c in selection.components.values():
        if c.symbol or c.is_end or c.loose:
            continue
        slots[c.name] = c.column
        if c.positional:
            slots[c.name] = (c.column[0], taken[c.rank, c.column[0]], "")
            taken[c.rank, c.column[0]] += 1
    return slots


def _heights(selection: Selection) -> dict[tuple[int, ...], float]:
    components = selection.components.values()
    inner = [row[0].rank for row in selection.ranks() if not row[0].is_end]
    loose = {c.rank for c in components if c.loose}
    layers = sorted({rank[0] for rank in inner})
    rise = max((c.height for c in components), default=24.0) + 46.0
    heights: dict[tuple[int, ...], float] = {}
    height = 0.0
    for before, rank in zip([None, *inner], inner, strict=False):
        # The MLP reads the heads of its own layer: it stands above them, in a column of its own.
        half = 0.5 * rise * (len(rank) == 2 and rank[1] == 1 and rank not in loose)
        if before is None:
            height = half
        elif {before[1:], rank[1:]} <= {(0,), (1,)} and not loose & {before, rank}:
            steps = layers.index(rank[0]) - layers.index(before[0])
            height += rise * (steps + 0.5 * (rank[1] - before[1]))
        else:
            height += 0.75 * rise
        heights[rank] = height
    floor, ceiling = min(heights.values(), default=0.0), max(heights.values(), default=0.0)
    for c in components:
        if c.is_end:
            heights[c.rank] = floor - 58 if c.kind == "input" else ceiling + 58
    return heights


def _packed(
    selection: Selection, row: list[Component], nodes: Mapping[str, Point], middle: float
) -> dict[str, float]:
    """What may stand anywhere in a row: side by side, ordered by what it is joined to."""
    loose = [c for c in row if c.loose]
    return packed([c for c, _ in _wished(selection, loose, nodes)], middle)


def _wished(
    selection: Selection, row: list[Component], nodes: Mapping[str, Point]
) -> list[tuple[Component, float]]:
    """Components over the middle of what they are joined to and is placed, from left to right."""
    members: dict[str, list[float]] = {c.name: [] for c in row}
    for effect in selection.effects:
        for one, other in (effect[:2], effect[1::-1]):
            # The logits, in the middle, say nothing about sides.
            if other in members and one in nodes and selection.components[one].kind != "logits":
                members[other].append(nodes[one][0])
    wished = [(c, sum(members[c.name]) / max(1, len(members[c.name]))) for c in row]
    return sorted(wished, key=lambda pair: (pair[1], pair[0].name))


def _box(component: Component, place: Point) -> Box:
    x, y = place
    fill, stroke, _, radius = component.style
    return Box(
        x, y, component.width, component.height, fill, stroke, radius,
        dashed=not component.known, tooltip=component.tooltip,
        texts=component.texts(x, y),
        outlines=component.symbol.outlines if component.symbol else (),
    )  # fmt: skip
