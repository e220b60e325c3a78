"""Combining circuits of one model: joined at a component, or laid over one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx

from circuitlab.comparing import EdgeKey, check_kinds, check_shapes, kept_edges
from circuitlab.errors import GraphError, OptionError
from circuitlab.graph import EDGE_SCORE, CircuitGraph, effect_name
from circuitlab.panels import TextTable

_SHARED = (
    "model", "model_revision", "family", "n_layers", "n_heads", "d_model", "parallel", "task",
    "task_digest", "metric", "ablation", "n_edges_total",
)  # fmt: skip
_REMEDY = "combine circuits of one model"
#: Edges of an overlay that its table has.
_ROWS = 40


def join_circuits(first: CircuitGraph, second: CircuitGraph, *, at: str) -> CircuitGraph:
    """What reaches a component in one circuit and what leaves it in another, as one circuit.

    Args:
        first: Of it, the edges on paths to ``at``.
        second: Of it, the edges on paths from ``at``.
        at: A component of both.

    Returns:
        The circuit. Data ``from`` of an edge is ``first`` or ``second``; ``graph["joined"]`` has
        the provenance of both, and ``graph["score"]`` says whose scores are which. Where a
        component is in both, annotations are merged as in :func:`overlay_circuits`.

    Raises:
        GraphError: ``at`` is not in both, nothing reaches or leaves it, the circuits are of
            different models, effects of one name are of two kinds, or edges of the two together run
            in a circle.
    """
    parts = {"first": first, "second": second}
    _check(parts)
    for name, part in parts.items():
        if at not in part:
            raise GraphError(
                f"component {at!r} is not in the {name} circuit; join at one that is in both"
            )
    before, after = nx.ancestors(first, at) | {at}, nx.descendants(second, at) | {at}
    edges = {
        "first": [edge for edge in kept_edges(first) if edge[1] in before],
        "second": [edge for edge in kept_edges(second) if edge[0] in after],
    }
    for name, word in (("first", "reaches"), ("second", "leaves")):
        if not edges[name]:
            raise GraphError(
                f"no edge of the {name} circuit {word} {at!r}; join at another component"
            )
    words = [str(part.graph.get("score", EDGE_SCORE)) for part in parts.values()]
    said = words[0] if words[0] == words[1] else f"before {at}: {words[0]}; after it: {words[1]}"
    joined = CircuitGraph(**_shared(parts.values()), score=said)
    joined.graph["joined"] = {"at": at, **{name: dict(c.graph) for name, c in parts.items()}}
    joined.graph["method"] = f"two circuits joined at {at}"
    used = {end for some in edges.values() for edge in some for end in edge[:2]}
    _add_components(joined, parts, used)
    for name, part in parts.items():
        for edge in edges[name]:
            joined.add_edge(*edge, **{**part.edges[edge], "from": name})
    _check_order(joined)
    return joined


def overlay_circuits(circuits: Mapping[str, CircuitGraph]) -> CircuitGraph:
    """Circuits of one model as one: each edge with its score by each, and how many keep it.

    Args:
        circuits: At least two, by what they shall be called.

    Returns:
        The circuit. Data of an edge: ``scores`` by circuit, where one has a score of it;
        ``kept_by``, the circuits it is part of; ``agreement``, their share of all; ``signs_agree``,
        whether all its scores but 0 have one sign, where there are two or more. Its ``score`` is
        the mean over circuits of the score as a share of the circuit's largest, 0 where it is not
        kept. Annotations of components are merged; where circuits say different things the first
        stands, and data ``conflicts`` has them all by circuit. ``graph["overlay"]`` has every
        provenance.

    Raises:
        OptionError: fewer than two circuits.
        GraphError: a circuit is malformed, they are of different models, a component or an effect
            has two kinds, or edges together run in a circle.
    """
    if len(circuits) < 2:
        raise OptionError(f"{len(circuits)} circuit to overlay; give two or more")
    _check(circuits)
    overlay = CircuitGraph(**_shared(circuits.values()))
    overlay.graph["score"] = (
        "mean over circuits of the score as a share of the circuit's largest, 0 where not kept"
    )
    overlay.graph["overlay"] = {
        name: {key: value for key, value in c.graph.items() if key != "plots"}
        for name, c in circuits.items()
    }
    overlay.graph["method"] = f"overlay of {', '.join(circuits)}"
    kept = {name: kept_edges(circuit) for name, circuit in circuits.items()}
    edges = sorted({edge for some in kept.values() for edge in some})
    _add_components(overlay, circuits, {end for edge in edges for end in edge[:2]})
    for edge in edges:
        overlay.add_edge(*edge, **_edge_data(edge, circuits, kept))
    _check_order(overlay)
    _tell(overlay, list(circuits))
    return overlay


def _edge_data(
    edge: EdgeKey,
    circuits: Mapping[str, CircuitGraph],
    kept: Mapping[str, Mapping[EdgeKey, float]],
) -> dict[str, Any]:
    scores = {
        name: float(circuit.edges[edge]["score"])
        for name, circuit in circuits.items()
        if circuit.has_edge(*edge)
    }
    keepers = [name for name in circuits if edge in kept[name]]
    shares = [scores[name] / (max(map(abs, kept[name].values())) or 1.0) for name in keepers]
    data: dict[str, Any] = {
        "score": sum(shares) / len(circuits),
        "scores": scores,
        "kept_by": keepers,
        "agreement": len(keepers) / len(circuits),
    }
    signs = [score > 0 for score in scores.values() if score]
    if len(signs) > 1:
        data["signs_agree"] = all(signs) or not any(signs)
    return data


def _tell(overlay: CircuitGraph, names: list[str]) -> None:
    """Findings, and the table of the strongest edges."""
    edges = overlay.edges
    whole = sum(len(data["kept_by"]) == len(names) for *_, data in edges(data=True))
    mixed = sum(data.get("signs_agree") is False for *_, data in edges(data=True))
    overlay.graph["findings"] = {
        "kept by all": f"{whole} of {len(edges)} edges",
        "signs": f"{mixed} of {len(edges)} edges help by one circuit and hurt by another",
    }
    rows = []
    for source, target, port, _ in overlay.effects():
        data = edges[source, target, port]
        scores = [f"{data['scores'][n]:+.3g}" if n in data["scores"] else "" for n in names]
        sign = {True: "same", False: "MIXED"}.get(data.get("signs_agree"), "")
        keepers = f"{len(data['kept_by'])} of {len(names)}"
        rows.append([effect_name(source, target, port), *scores, keepers, sign])
    if rows:
        TextTable(
            title="Edges by circuit", header=["edge", *names, "kept by", "sign"], rows=rows[:_ROWS]
        ).add_to(overlay)


def _add_components(
    whole: CircuitGraph, circuits: Mapping[str, CircuitGraph], used: set[str]
) -> None:
    """Components with the data of all circuits; the first stands where they differ."""
    for component in sorted(used):
        told = {name: c.nodes[component] for name, c in circuits.items() if component in c}
        data: dict[str, Any] = {}
        conflicts: dict[str, dict[str, Any]] = {}
        for key in dict.fromkeys(key for part in told.values() for key in part):
            values = {name: part[key] for name, part in told.items() if key in part}
            data[key] = next(iter(values.values()))
            if any(value != data[key] for value in values.values()):
                conflicts[key] = values
        for key in ("kind", "layer"):
            if key in conflicts:
                said = ", ".join(f"{value!r} in {name}" for name, value in conflicts[key].items())
                raise GraphError(f"component {component!r} has {key} {said}; rename it in one")
        whole.add_node(component, **{**data, **({"conflicts": conflicts} if conflicts else {})})


def _check(circuits: Mapping[str, CircuitGraph]) -> None:
    for circuit in circuits.values():
        circuit.validate()
    check_shapes(circuits.items(), _REMEDY)
    check_kinds(circuits.items())
    for key in ("model", "model_revision"):
        told = {name: c.graph[key] for name, c in circuits.items() if c.graph.get(key) is not None}
        if len({repr(value) for value in told.values()}) > 1:
            said = ", ".join(f"{value!r} in {name}" for name, value in told.items())
            raise GraphError(f"the circuits are of different models: {key} is {said}; {_REMEDY}")


def _check_order(circuit: CircuitGraph) -> None:
    try:
        circuit.validate()
    except GraphError as error:
        raise GraphError(f"the circuits do not fit together: {error}") from error


def _shared(circuits: Iterable[CircuitGraph]) -> dict[str, Any]:
    first, *others = circuits
    return {
        key: first.graph[key]
        for key in _SHARED
        if key in first.graph and all(c.graph.get(key) == first.graph[key] for c in others)
    }
