"""Components and effects as a picture shows them: labels, sizes, tooltips, and what stands where.

A component of a kind that is not known here is a dashed box with its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import networkx as nx

from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.labels import clip, visible
from circuitlab.scene import Text, text_width
from circuitlab.symbols import SYMBOLS, Symbol

_NAME_SIZE, _ROLE_SIZE, _PORT_SIZE = 11.0, 8.0, 8.0
_PORT_ORDER = {"q": 0, "k": 1, "v": 2}
#: Fill, border, text, corner radius of each kind of component; every other kind is drawn dashed.
_STYLES = {
    "input": ("#3B3B3B", "#3B3B3B", "#FFFFFF", 9.0),
    "logits": ("#3B3B3B", "#3B3B3B", "#FFFFFF", 9.0),
    "logit": ("#3B3B3B", "#3B3B3B", "#FFFFFF", 9.0),
    "head": ("#FFFFFF", "#444444", "#111111", 5.0),
    "mlp": ("#E6E6E6", "#444444", "#111111", 0.0),
    "gate": ("#FFF3C4", "#444444", "#111111", 0.0),
    "residual": ("#FFFFFF", "#999999", "#111111", 0.0),
    "token": ("#F4F4F4", "#999999", "#111111", 9.0),
    "feature": ("#FFFFFF", "#444444", "#111111", 9.0),
    "error": ("#F4F4F4", "#999999", "#111111", 0.0),
    "cluster": ("#FFFFFF", "#444444", "#111111", 9.0),
    "region": ("#E3EEF6", "#444444", "#111111", 12.0),
}
#: Where in a layer the features of a site stand.
_PLACES = {"resid_pre": -1, "mlp_in": 0, "mlp_out": 1, "resid_post": 2}
#: Kinds of which a row may hold many, in no order of their own.
_LOOSE = frozenset({"feature", "error", "cluster", "region"})
_OTHER_STYLE = ("#FFFFFF", "#888888", "#111111", 0.0)
#: Where two circuits are compared: in which of them an effect is.
OWNERS = ("a", "b", "both")
_NO_POSITION = -(1 << 30)


class Effect(NamedTuple):
    """One effect as a picture shows it; ``strength`` is |score| over the largest one, 0 to 1.

    ``directed`` is false for the border of two regions, which has no direction and no arrow.
    ``owner`` is ``a``, ``b`` or ``both`` where two circuits are compared, else empty. ``inclusion``
    is the share of resamples in which the effect was found again, 1 where none were drawn.
    """

    source: str
    target: str
    port: str
    score: float
    strength: float
    tooltip: str
    redundant: bool = False
    directed: bool = True
    owner: str = ""
    inclusion: float = 1.0


@dataclass(frozen=True, slots=True)
class Component:
    """One component as a picture shows it; sizes in points.

    ``rank`` orders what stands above what: the layer, then the place in the layer. ``column`` is
    the place from left to right: the token position where there is one, then the component.
    """

    name: str
    kind: str
    rank: tuple[int, ...]
    column: tuple[int, int, str]
    label: str
    role: str
    ports: tuple[str, ...]
    width: float
    height: float
    tooltip: str
    symbol: Symbol | None = None

    @property
    def style(self) -> tuple[str, str, str, float]:
        """Fill, border and text colour, and the corner radius in points."""
        return _STYLES.get(self.kind, _OTHER_STYLE)

    @property
    def known(self) -> bool:
        """Whether the kind is one that pictures have a shape for."""
        return self.kind in _STYLES and (self.kind != "gate" or self.symbol is not None)

    @property
    def is_end(self) -> bool:
        """Whether it is the input or the logits, which stand in the middle of their own rows."""
        return self.kind in ("input", "logits")

    @property
    def positional(self) -> bool:
        """Whether it is a component at one token position."""
        return self.column[0] != _NO_POSITION

    @property
    def loose(self) -> bool:
        """Whether it may stand anywhere in its row, and its row be broken into several."""
        return self.kind in _LOOSE and not self.positional

    @property
    def stacked(self) -> bool:
        """Whether it stands for several components."""
        return self.kind == "cluster"

    def foot(self, port: str) -> float:
        """Where along its lower side the port lies, in points right of the middle."""
        if port not in self.ports:
            return 0.0
        return ((self.ports.index(port) + 0.5) / len(self.ports) - 0.5) * self.width

    def texts(self, x: float, y: float) -> tuple[Text, ...]:
        """Its texts when it is centred at ``(x, y)``."""
        ink = self.style[2]
        if self.symbol:
            word, rise, size = self.symbol.word
            texts = [Text(x, y + rise, word, size, ink, bold=True)]
            if self.symbol.figure and self.role:
                rise, size = self.symbol.figure
                texts.append(Text(x, y + rise, self.role, size, "#555555"))
            return tuple(texts)
        top, foot = y + self.height / 2, y - self.height / 2 + 6
        texts = [Text(x, top - 12, self.label, _NAME_SIZE, ink)]
        if self.role:
            soft = "#CCCCCC" if self.is_end else "#666666"
            texts.append(Text(x, top - 23.5, self.role, _ROLE_SIZE, soft))
        texts += [
            Text(x + self.foot(port), foot, clip(visible(port), 4), _PORT_SIZE, "#777777")
            for port in self.ports
        ]
        return tuple(texts)


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


def draw_effect(
    circuit: CircuitGraph, effect: tuple[str, str, str, float], strength: float
) -> Effect:
    """One effect of a picture; ``strength`` is |score| over the largest one."""
    source, target, port, score = effect
    data = circuit.edges[effect[:3]]
    redundant = data.get("redundant") is True
    directed = not all(_is_region(circuit, end) for end in (source, target))
    tooltip = f"{effect_name(source, target, port)}  {number(score)}"
    # What stands last in a tooltip is the score.
    tooltip = f"redundant: {tooltip}" if redundant else tooltip
    owner, inclusion = str(data.get("in", "")), data.get("inclusion")
    share = float(inclusion) if is_share(inclusion) else 1.0
    return Effect(
        source, target, port, score, strength, tooltip, redundant, directed,
        owner if owner in OWNERS else "", share,
    )  # fmt: skip


def is_share(value: object) -> TypeGuard[float]:
    """Whether a value is a number from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def draw_component(
    circuit: CircuitGraph, name: str, names: set[str], ports: set[str], n_effects: int
) -> Component:
    """One component of a picture that shows ``names`` and reads it through ``ports``."""
    data = circuit.nodes[name]
    rank = _rank(circuit, name, names)
    kind = str(data.get("kind", ""))
    if kind == "gate" and (symbol := SYMBOLS.get(str(data.get("gate")))):
        return _gate(name, data, rank, symbol)
    full = visible(str(name))
    token = _token(data)
    note = visible(str(data.get("role") or data.get("label") or "")) or token
    members = data.get("members")
    if kind == "cluster" and isinstance(members, list | tuple):
        note = f"{note} · {len(members)}" if note else str(len(members))
    label, role = clip(full, 22), clip(note, 26)
    if kind == "token" and token:
        # A token is known by its text; its name only says where it stands.
        label, role = clip(token, 22), clip(full, 26)
    if kind == "region" and token:
        label, role = clip(token, 22), clip(full if note == token else f"{full} · {note}", 26)
    ordered = tuple(sorted(ports, key=lambda p: (_PORT_ORDER.get(p, 3), p)))
    width = max(
        text_width(label, _NAME_SIZE) + 14, text_width(role, _ROLE_SIZE) + 12,
        13.0 * len(ordered), 44.0,
    )  # fmt: skip
    if kind in ("input", "logits"):
        width = max(width, min(40.0 + 9.0 * n_effects, 130.0))
    height = 24.0 + (11.0 if role else 0.0) + (8.0 if ordered else 0.0)
    tooltip = f"{full}: {note}" if note else full
    if kind == "cluster" and isinstance(members, list | tuple):
        tooltip += visible(f": {', '.join(map(str, members))}")
    return Component(
        str(name), kind, rank, _column(str(name), data), label, role, ordered, round(width),
        height, tooltip,
    )  # fmt: skip


def _gate(name: str, data: Mapping[str, Any], rank: tuple[int, ...], symbol: Symbol) -> Component:
    interaction = data.get("interaction")
    figure = number(float(interaction)) if isinstance(interaction, int | float) else ""
    members = data.get("members")
    listed = ", ".join(map(str, members)) if isinstance(members, list | tuple) else ""
    parts = [f"{data['gate']} of {listed}" if listed else str(data["gate"])]
    parts += [f"interaction {figure}"] * bool(figure)
    parts += [str(data["label"])] if data.get("label") else []
    tooltip = visible(f"{name}: {'; '.join(parts)}")
    return Component(
        str(name), "gate", rank, _column(str(name), data), symbol.word[0], figure, (),
        symbol.width, symbol.height, tooltip, symbol,
    )  # fmt: skip


def _token(data: Mapping[str, Any]) -> str:
    """A token's text on one line; blanks at its ends are part of it and are shown.

    An ellipsis says that other prompts have other tokens there: ``tokens``.
    """
    text = data.get("token")
    if not isinstance(text, str):
        return ""
    inner = text.strip(" ")
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    others = " …" if data.get("tokens") else ""
    return visible("␣" * before + inner + "␣" * (after if inner else 0)) + others


def _column(name: str, data: Mapping[str, Any]) -> tuple[int, int, str]:
    kind, position = data.get("kind"), data.get("position")
    place = re.search(r"\[(-?\d+)\]$", name) or re.search(r"^t(-?\d+)$", name)
    if not isinstance(position, int):
        position = int(place[1]) if place else _NO_POSITION
    head = re.search(r"h(\d+)(?:\[-?\d+\])?$", name)
    return (
        position, int(head[1]) if head else 1 << 30, "" if kind in ("mlp", "head") else name
    )  # fmt: skip


def _rank(circuit: CircuitGraph, name: str, names: set[str]) -> tuple[int, ...]:
    """Layer, then place in the layer: heads 0, what reads them 1; a gate just above its members.

    A region stands above all that its borders lead from, so that no border runs sideways.
    """
    data = circuit.nodes[name]
    kind, layer = data.get("kind"), _layer(data)
    if kind in ("input", "logits"):
        top = max(_layer(data) for _, data in circuit.nodes(data=True))
        return (-1, 0) if kind == "input" else (top + 1, 0)
    if kind == "token":
        return (-1, 1)
    if kind == "gate":
        members = [_rank(circuit, n, names) for n in circuit.predecessors(name) if n in names]
        return (*max(members, default=(layer, 0)), 1)
    if kind == "residual" and (site := re.match(r"resid_(pre|mid|post)\b", name)):
        return {"pre": (layer, -1), "mid": (layer, 0, 2), "post": (layer, 2)}[site[1]]
    if kind in ("feature", "error", "cluster"):
        site = re.match(r"[a-z_]*", str(data.get("site")))
        return (layer, _PLACES.get(site[0] if site else "", 1))
    if kind == "region":
        below = {n for n in nx.ancestors(circuit, name) & names if _is_region(circuit, n)}
        path = nx.dag_longest_path(circuit.subgraph({*below, name}), weight=None)
        return (layer, 0, len(path) - 1)
    return (layer, 0 if kind == "head" else 1)


def _is_region(circuit: CircuitGraph, name: str) -> bool:
    return bool(circuit.nodes[name].get("kind") == "region")


def _layer(data: Mapping[str, Any]) -> int:
    layer = data.get("layer", 0)
    return layer if isinstance(layer, int) else 0
