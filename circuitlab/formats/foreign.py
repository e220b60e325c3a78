"""Graphs of other programs as circuits: what their nodes and edges must say.

A node needs ``kind`` and ``layer``, or one of the names ``input``, ``a0.h1``, ``m0``, ``logits``;
an edge needs ``score`` or ``weight``. Its port is its ``port``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from circuitlab.errors import GraphError
from circuitlab.graph import LARGEST_SCORE, SCHEMA, CircuitGraph, effect_name
from circuitlab.labels import excerpt

#: Words of a score that another program wrote.
FOREIGN_SCORE = "as in the file it was read from; its program says what a score is and its sign"

_NAMED = re.compile(r"a(?P<head_layer>\d{1,6})\.h(?P<head>\d{1,6})|m(?P<mlp_layer>\d{1,6})")

Nodes = Iterable[tuple[str, Mapping[str, Any]]]
Edges = Iterable[tuple[str, str, Mapping[str, Any]]]


def check_schema(schema: object) -> None:
    """Refuse a document that another version of CircuitLab wrote.

    Raises:
        GraphError: names the schema, and the one that is read here.
    """
    if schema != SCHEMA:
        raise GraphError(
            f"schema {excerpt(str(schema), 60)!r} is not {SCHEMA!r}, the one this version reads; "
            f"use the CircuitLab that wrote the file"
        )


def to_circuit(
    graph: Mapping[str, Any], nodes: Nodes, edges: Edges, *, ours: bool = False
) -> CircuitGraph:
    """The circuit of a graph that another program wrote, or ours in another program's format.

    Args:
        graph: Provenance.
        nodes: Name and data of each.
        edges: Source, target and data of each, ``port`` among them where it has one.
        ours: Whether we wrote it; else the circuit's ``score`` is :data:`FOREIGN_SCORE` unless
            ``graph`` says what it is.

    Raises:
        GraphError: names what is missing, twice there, or not plain JSON.
    """
    circuit = CircuitGraph()
    circuit.graph.update({**({} if ours else {"score": FOREIGN_SCORE}), **graph})
    listed = list(nodes)
    top = max((_layer(name, data) for name, data in listed if name != "logits"), default=-1) + 1
    for name, told in listed:
        data = dict(told)
        if name in circuit:
            raise GraphError(f"component {name!r} is there twice; give each its own id")
        if "kind" not in data:
            data |= _kind(name)
        if name == "logits":
            data.setdefault("layer", top)
        circuit.add_node(name, **{**data, "layer": _layer(name, data)})
    for source, target, facts in edges:
        _add_edge(circuit, source, target, dict(facts))
    circuit.validate()
    circuit.to_json()
    return circuit


def _add_edge(circuit: CircuitGraph, source: str, target: str, data: dict[str, Any]) -> None:
    port = data.pop("port", "")
    if not isinstance(port, str):
        raise GraphError(
            f"effect {effect_name(source, target)} has port {port!r}, which is no text"
        )
    if "score" not in data and "weight" not in data:
        raise GraphError(
            f"effect {effect_name(source, target, port)} has neither score nor weight; "
            f"give its edge one of them"
        )
    if circuit.has_edge(source, target, port):
        raise GraphError(
            f"effect {effect_name(source, target, port)} is there twice; "
            f"give parallel edges different ports"
        )
    score = data.pop("score") if "score" in data else data.pop("weight")
    if isinstance(score, bool) or not isinstance(score, int | float) or abs(score) > LARGEST_SCORE:
        raise GraphError(
            f"effect {effect_name(source, target, port)} has score {score!r:.40}; "
            f"it needs a finite number, at most {LARGEST_SCORE:g} in size"
        )
    for end in (source, target):
        if end not in circuit:
            raise GraphError(
                f"effect {effect_name(source, target, port)}: no node is called {end!r}"
            )
    circuit.add_edge(source, target, port, **{**data, "score": float(score)})


def _kind(name: str) -> dict[str, Any]:
    """What a name of our own says about a component."""
    named = _NAMED.fullmatch(name)
    if named:
        head = named["head"]
        return {"kind": "head", "head": int(head)} if head else {"kind": "mlp"}
    if name in ("input", "logits"):
        return {"kind": name}
    raise GraphError(_UNKNOWN.format(name=excerpt(name, 60), what="kind"))


def _layer(name: str, data: Mapping[str, Any]) -> int:
    layer = data.get("layer")
    if isinstance(layer, float) and layer.is_integer():
        return int(layer)
    if isinstance(layer, int) and not isinstance(layer, bool):
        return layer
    named = _NAMED.fullmatch(name)
    if layer is None and named:
        return int(named["head_layer"] or named["mlp_layer"])
    if layer is None and name in ("input", "logits"):
        return 0
    raise GraphError(_UNKNOWN.format(name=excerpt(name, 60), what="layer"))


_UNKNOWN = (
    "component '{name}' has no {what}; give each node kind (text) and layer (a whole number), "
    "or one of the names input, a0.h1, m0, logits"
)
