"""Data of a page: a circuit as columns of plain JSON, every text made visible."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from circuitlab.components import Component
from circuitlab.errors import GraphError
from circuitlab.graph import CircuitGraph
from circuitlab.labels import clip, excerpt, visible
from circuitlab.layout import Selection, select
from circuitlab.legend import n_edges, sign_words
from circuitlab.page.facts import about
from circuitlab.page.places import layouts

#: Effects that a page holds at most, strongest first: more than this it cannot draw at once.
MOST = 20_000
#: Effects that a page shows when it opens.
FIRST = 300

_LONGEST, _MANY, _DEEP = 600, 60, 3
#: What the page shows in words of its own.
_NODE_KNOWN = frozenset({"kind", "layer", "role", "position", "token"})
_EDGE_KNOWN = frozenset({"score", "in", "port"})


def page_data(circuit: CircuitGraph, details: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that a page shows of a circuit.

    Args:
        circuit: A well-formed circuit; effects with data ``in`` are coloured by it.
        details: More about components, by name: ``role``, ``pattern``, ``effects``, ``card``.

    Raises:
        GraphError: the circuit is not well formed, or details are of no component of it or have
            another form.
    """
    drawn = _with_measured(circuit)
    selection = select(drawn, MOST)
    names = list(selection.components)
    edges = _edges(circuit, selection, {name: index for index, name in enumerate(names)})
    own = any("kind" in data for *_, data in circuit.edges(data=True)) or any(
        component.symbol for component in selection.components.values()
    )
    return {
        "about": about(circuit),
        "nodes": [_node(circuit, c) for c in selection.components.values()],
        "layouts": [
            {
                "name": name,
                "x": [_short(places[node][0]) for node in names],
                "y": [_short(-places[node][1]) for node in names],
            }
            for name, places in layouts(selection).items()
        ],
        "edges": edges,
        "details": _details(circuit, names, details),
        "n_effects": selection.n_effects,
        "n_model": None if own else n_edges(circuit),
        "noun": "effect" if own else "edge",
        "first": FIRST,
        "helps": selection.helps,
        "established": selection.established,
        "signs": list(sign_words(circuit)),
        "owners": _owners(circuit),
    }


def _owners(circuit: CircuitGraph) -> dict[str, str]:
    """What each colour says where two circuits are compared, of those that have no edge too."""
    names = circuit.graph.get("compared")
    first, second = names if isinstance(names, list) and len(names) == 2 else ("A", "B")
    words = {"a": f"only {first}", "b": f"only {second}", "both": "both"}
    return {owner: clip(visible(text), 45) for owner, text in words.items()}


def embed(data: Mapping[str, Any]) -> str:
    """Data as JSON that may stand in a script element: no ``<``, ``>`` or ``&`` is left in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), sort_keys=True)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON that a page can show: text visible and clipped, numbers of four figures."""
    if value is None or isinstance(value, bool | int):
        return value if value is None or abs(value) < 1 << 53 else str(value)
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        return rounded if math.isfinite(rounded) else str(value)
    if isinstance(value, Mapping) and depth < _DEEP:
        items = list(value.items())
        shown = {_text(str(key)): plain(item, depth + 1) for key, item in items[:_MANY]}
        return shown | ({"…": f"{len(items) - _MANY} more"} if len(items) > _MANY else {})
    if isinstance(value, list | tuple) and depth < _DEEP:
        shown_list = [plain(item, depth + 1) for item in value[:_MANY]]
        return shown_list + ([f"… {len(value) - _MANY} more"] if len(value) > _MANY else [])
    return _text(value if isinstance(value, str) else repr(value))


def _text(text: str) -> str:
    return visible(clip(text, _LONGEST))


def _short(value: float) -> float:
    return round(value, 1)


def _with_measured(circuit: CircuitGraph) -> CircuitGraph:
    """The circuit with what was measured and not kept, which pictures leave out."""
    dropped = [
        (s, t, p) for s, t, p, kept in circuit.edges(keys=True, data="kept") if kept is False
    ]
    if not dropped:
        return circuit
    whole = circuit.copy()
    for edge in dropped:
        del whole.edges[edge]["kept"]
    found: CircuitGraph = whole
    return found


def _node(circuit: CircuitGraph, c: Component) -> dict[str, Any]:
    data = circuit.nodes[c.name]
    found: dict[str, Any] = {
        "name": visible(c.name),
        "kind": _text(c.kind),
        "label": c.label,
        "role": c.role,
        "tip": _text(c.tooltip),
        "w": c.width,
        "h": c.height,
        "data": {
            _text(str(key)): plain(value)
            for key, value in data.items()
            if key not in _NODE_KNOWN and value is not None
        },
    }
    for key in ("layer", "position", "token", "role"):
        if data.get(key) is not None:
            found["full_role" if key == "role" else key] = plain(data[key])
    if c.ports:
        found["ports"] = [visible(port) for port in c.ports]
    if c.stacked:
        found["stacked"] = True
    if not c.known:
        found["strange"] = True
    if c.symbol:
        word, rise, size = c.symbol.word
        figure = c.symbol.figure or (0.0, 0.0)
        entering = sum(1 for _ in circuit.in_edges(c.name))
        found["symbol"] = {
            "feet": [[_short(x), _short(-y)] for x, y in c.symbol.feet(entering)],
            "outlines": [[[_short(x), _short(-y)] for x, y in o] for o in c.symbol.outlines],
            "word": [word, _short(-rise), size],
            "figure": [c.role, _short(-figure[0]), figure[1]] if c.symbol.figure else None,
        }
    return found


def _edges(circuit: CircuitGraph, selection: Selection, index: Mapping[str, int]) -> dict[str, Any]:
    effects = selection.effects[::-1]
    ports = sorted({effect.port for effect in effects})
    keys = [(effect.source, effect.target, effect.port) for effect in effects]
    columns: dict[str, dict[str, list[Any]]] = {}
    for number, edge in enumerate(keys):
        for name, value in circuit.edges[edge].items():
            if name not in _EDGE_KNOWN and value is not None:
                column = columns.setdefault(_text(str(name)), {"at": [], "is": []})
                column["at"].append(number)
                column["is"].append(plain(value))
    found: dict[str, Any] = {
        "source": [index[effect.source] for effect in effects],
        "target": [index[effect.target] for effect in effects],
        "port": [ports.index(effect.port) for effect in effects],
        "ports": [visible(port) for port in ports],
        "score": [plain(effect.score) for effect in effects],
        "columns": {
            name: {"is": column["is"]} if len(column["at"]) == len(keys) else column
            for name, column in sorted(columns.items())
        },
        "undirected": [i for i, effect in enumerate(effects) if not effect.directed],
    }
    if any(effect.owner for effect in effects):
        found["owner"] = [effect.owner for effect in effects]
    return found


def _details(
    circuit: CircuitGraph, names: Sequence[str], details: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    for name in details:
        if name not in circuit:
            raise GraphError(
                f"details of {excerpt(str(name))!r}: the circuit has no such component; "
                f"give details of its own components alone"
            )
    found = {}
    for index, name in enumerate(names):
        if detail := details.get(name):
            found[str(index)] = _detail(name, detail)
    return found


def _detail(name: str, detail: Mapping[str, Any]) -> dict[str, Any]:
    strange = set(detail) - {"role", "pattern", "effects", "card"}
    if strange:
        raise GraphError(
            f"details of {excerpt(name)!r} have {sorted(strange)}, which a page does not show; "
            f"give role, pattern, effects or card"
        )
    found: dict[str, Any] = {}
    if "role" in detail:
        found["role"] = _text(str(detail["role"]))
    if "effects" in detail:
        found["effects"] = _effects(name, detail["effects"])
    if "pattern" in detail:
        found["pattern"] = _pattern(name, detail["pattern"])
    if "card" in detail:
        card = detail["card"]
        drawn = isinstance(card, str) and card.lstrip().startswith("<svg")
        lines = [card] if isinstance(card, str) else list(card)
        found["card"] = (
            {"svg": _standalone(card.lstrip())} if drawn else {"lines": [_text(x) for x in lines]}
        )
    return found


def _effects(name: str, effects: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in effects.items():
        number = isinstance(value, int | float) and math.isfinite(value)
        if key not in ("noise", "denoise") or not number:
            raise GraphError(
                f"effects of {excerpt(name)!r} have {excerpt(str(key))!r}: {value!r}; "
                f"give noise and denoise, finite numbers"
            )
    return {key: plain(value) for key, value in effects.items()}


def _standalone(svg: str) -> str:
    """An SVG fragment as a document of its own, which a picture must be."""
    if "xmlns=" not in svg[: svg.find(">")]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return svg.encode("utf-8", "backslashreplace").decode("utf-8")


def _pattern(name: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
    tokens, values = list(pattern["tokens"]), [list(row) for row in pattern["values"]]
    n = len(tokens)
    if len(values) != n or any(len(row) != n for row in values):
        raise GraphError(
            f"attention pattern of {excerpt(name)!r} is not {n} x {n}, one row and one column for "
            f"each token; give values [query][key]"
        )
    if not all(0 <= value <= 1.001 for row in values for value in row):
        raise GraphError(
            f"attention pattern of {excerpt(name)!r} has a value that is no probability; "
            f"give what the softmax gives"
        )
    return {
        "tokens": [_token(str(token)) for token in tokens],
        "values": [[round(float(value), 3) for value in row] for row in values],
    }


def _token(text: str) -> str:
    """A token with the blanks at its ends made visible: they are part of it."""
    inner = text.strip(" ")
    if not inner:
        return "␣" * len(text)
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return visible(clip("␣" * before + inner + "␣" * after, 60))
