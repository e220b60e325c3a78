"""Kept: which edges or components of the model a circuit consists of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from circuitlab.errors import GraphError
from circuitlab.graph import CircuitGraph
from circuitlab.wiring import Edge, Wiring

#: What a circuit is a set of: edges, or components with all their outgoing edges.
Level = Literal["edge", "node"]

#: Kinds of components that stand for others beside them in the graph.
_DRAWN = frozenset({"gate", "cluster"})


def kept_edges(circuit: CircuitGraph, wiring: Wiring) -> frozenset[Edge]:
    """The edges of the model that the circuit keeps.

    That is every effect but those with the data ``kept=False``, those with a ``kind`` of their own
    (total effects, paths), and those of gates and clusters.

    Args:
        circuit: A circuit of this model.
        wiring: The model's residual graph.

    Raises:
        GraphError: an effect is no edge of the model; the circuit was found on a model of other
            sizes; or it has effects and none of them is an edge.
    """
    _check_sizes(circuit, wiring)
    edges = list(_edges(circuit))
    if not edges and circuit.number_of_edges():
        raise GraphError(
            "the circuit has no edge of the model, only effects of a kind of their own; circuits "
            "of edges can be evaluated (edge-attribution, path-patching --scope edges), and with "
            "--level node those of heads and MLPs (path-patching --scope nodes)"
        )
    for edge in edges:
        for name in edge[:2]:
            _check_name(name, wiring)
    wiring.by_block(edges)
    return frozenset(edge for edge in edges if circuit.edges[tuple(edge)].get("kept", True))


def kept_nodes(circuit: CircuitGraph, wiring: Wiring) -> frozenset[str]:
    """The components that the circuit keeps, without ``logits``, which write nothing.

    Where the circuit has edges, all that a kept edge begins or ends at; else, of a circuit of
    components, those that have a ``score`` and not the data ``kept=False``.

    Args:
        circuit: A circuit of this model.
        wiring: The model's residual graph.

    Raises:
        GraphError: as :func:`kept_edges`; or a component is none of the model, such as a component
            at one position, or the residual stream.
    """
    if any(_edges(circuit)) or not circuit.number_of_edges():
        ends = {name for edge in kept_edges(circuit, wiring) for name in edge[:2]}
        return frozenset(ends - {"logits"})
    _check_sizes(circuit, wiring)
    names = [
        name
        for name, data in circuit.nodes(data=True)
        if name != "logits" and "score" in data and data.get("kind") not in _DRAWN
    ]
    if not names:
        raise GraphError(
            "the circuit has neither an edge nor a scored component of the model; circuits of "
            "edges can be evaluated (edge-attribution, path-patching --scope edges), and those of "
            "heads and MLPs (path-patching --scope nodes)"
        )
    for name in names:
        _check_name(name, wiring)
    return frozenset(name for name in names if circuit.nodes[name].get("kept", True))


def _edges(circuit: CircuitGraph) -> Iterator[Edge]:
    """Effects that say they are edges of the model."""
    for source, target, port, data in circuit.edges(keys=True, data=True):
        ends = {circuit.nodes[name].get("kind") for name in (source, target)}
        if data.get("kind") is None and not ends & _DRAWN:
            yield Edge(source, target, port)


def _check_sizes(circuit: CircuitGraph, wiring: Wiring) -> None:
    for field in ("n_layers", "n_heads", "parallel"):
        said, real = circuit.graph.get(field), getattr(wiring, field)
        if said is not None and said != real:
            raise GraphError(
                f"the circuit was found on a model with {field} {said}, and this one has {real}; "
                f"evaluate it on the model it was found on"
            )


def _check_name(name: str, wiring: Wiring) -> None:
    if name not in wiring.source_rows and name != "logits":
        raise GraphError(
            f"component {name!r} is no head, MLP, input or logits of a model of {wiring.n_layers} "
            f"layers and {wiring.n_heads} heads; circuits of these can be evaluated, not those of "
            f"features, positions or the residual stream"
        )
