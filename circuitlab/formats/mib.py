"""Circuit JSON of EAP-IG and of the MIB benchmark, both ways.

``{"cfg": {n_layers, n_heads, parallel_attn_mlp, d_model}, "nodes": {name: {"in_graph", "score"?}},
"edges": {"a0.h1->a1.h0<q>": {"score", "in_graph"}}}`` (Hanna et al. 2024, arXiv:2403.17806;
``Graph.to_json`` and ``Graph.from_json`` of the EAP-IG package).

Scores pass unchanged in both directions. Ours are metric(edge patched) - metric(reference), so
negative helps; EAP-IG's are gradients of a loss over n prompts, which its code divides by n twice:
our score is -n times its score. What selects by absolute value does not see the difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from circuitlab.errors import GraphError
from circuitlab.formats.foreign import FOREIGN_SCORE
from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.wiring import PORTS, Wiring

#: Heads of the largest model that a file may be of.
LARGEST = 1 << 17

_EDGE = re.compile(r"(?P<source>.+?)->(?P<target>[^<]+)(?:<(?P<port>[qkv])>)?")


def mib_document(circuit: CircuitGraph) -> dict[str, Any]:
    """The circuit as EAP-IG / MIB circuit JSON: every node of the model, every edge of the circuit.

    ``in_graph`` of an edge is its data ``kept``, true where there is none, and false for every edge
    of a circuit that is not established; a node is in the graph when such an edge begins or ends
    there. Gates, and effects of a ``kind`` of their own, such as total effects, are no edges of the
    model and are left out; a node's score stays. Provenance goes under a fourth key,
    ``circuitlab``, that other readers pass over.

    Raises:
        GraphError: the circuit does not say the sizes of its model, or has components other than
            input, heads, MLPs and logits, or an edge the model does not have.
    """
    sizes = {key: _size(circuit.graph, key) for key in ("n_layers", "n_heads", "d_model")}
    parallel = bool(circuit.graph.get("parallel", False))
    wiring = _wiring(sizes, parallel)
    found = circuit.graph.get("verdict") != "not established"
    edges, used = {}, set()
    for source, target, port, data in circuit.edges(keys=True, data=True):
        if data.get("kind") is not None or _is_gate(circuit, source) or _is_gate(circuit, target):
            continue
        kept = found and bool(data.get("kept", True))
        try:
            _check_edge(wiring, source, target, port)
        except GraphError as error:
            raise GraphError(
                f"{error}; EAP-IG circuit JSON cannot hold it: write a .json"
            ) from error
        name = f"{source}->{target}" + (f"<{port}>" if port else "")
        edges[name] = {"score": float(data["score"]), "in_graph": kept}
        used |= {source, target} if kept else set()
    scored = any(
        "score" in data for name, data in circuit.nodes(data=True) if name in wiring.source_rows
    )
    if circuit.number_of_edges() and not edges and not scored:
        raise GraphError(
            "the circuit has no edge and no scored component of the model, only effects of a kind "
            "of their own; EAP-IG circuit JSON cannot hold them: write a .json"
        )
    nodes: dict[str, dict[str, float]] = {}
    for name in (*wiring.sources, "logits"):
        nodes[name] = {"in_graph": name in used}
        score = circuit.nodes[name].get("score") if name in circuit else None
        if _finite(score):
            nodes[name]["score"] = float(score)
    return {
        "cfg": {
            "n_layers": sizes["n_layers"],
            "n_heads": sizes["n_heads"],
            "parallel_attn_mlp": parallel,
            "d_model": sizes["d_model"],
        },
        "nodes": nodes,
        "edges": edges,
        "circuitlab": dict(circuit.graph),
    }


def _is_gate(circuit: CircuitGraph, name: str) -> bool:
    return bool(circuit.nodes[name].get("kind") == "gate")


def parse_mib(document: object) -> CircuitGraph:
    """The circuit in EAP-IG / MIB circuit JSON, ours or another program's.

    An edge without a score is membership and nothing more: where it is in the graph it gets score 0
    and the data ``scored=False``, else it is left out. Edges that are listed and not in the graph
    keep their score and get ``kept=False``.

    Raises:
        GraphError: the document is not of this form, or a score is not a finite number.
    """
    cfg, nodes, edges, provenance = _parts(document)
    sizes = {key: _size(cfg, key) for key in ("n_layers", "n_heads")}
    parallel = bool(cfg.get("parallel_attn_mlp", False))
    wiring = _wiring(sizes, parallel)
    circuit = CircuitGraph()
    circuit.graph.update(
        provenance if isinstance(provenance, Mapping) else {"score": FOREIGN_SCORE}
    )
    circuit.graph.update(sizes, parallel=parallel)
    if "d_model" in cfg:
        circuit.graph["d_model"] = _size(cfg, "d_model")
    _add_nodes(circuit, wiring, nodes)
    for name, data in edges.items():
        _add_edge(circuit, wiring, name, data)
    circuit.validate()
    return circuit


_Part = Mapping[str, Any]


def _parts(document: object) -> tuple[_Part, _Part, _Part, object]:
    if isinstance(document, Mapping):
        cfg, nodes, edges = (document.get(key) for key in ("cfg", "nodes", "edges"))
        if isinstance(cfg, Mapping) and isinstance(nodes, Mapping) and isinstance(edges, Mapping):
            return cfg, nodes, edges, document.get("circuitlab")
    raise GraphError(
        "not an EAP-IG circuit: the JSON has no objects cfg, nodes and edges; "
        "a CircuitLab circuit ends in .json, not in .mib.json"
    )


def _add_nodes(circuit: CircuitGraph, wiring: Wiring, nodes: Mapping[str, Any]) -> None:
    for name, data in nodes.items():
        component = wiring.component(name)
        if not isinstance(data, Mapping):
            raise GraphError(f"component {name!r} is {data!r}; it needs an object with in_graph")
        if data.get("in_graph", True):
            # EAP-IG writes NaN for a node that it did not score.
            score = {"score": float(data["score"])} if _finite(data.get("score")) else {}
            circuit.add_component(name, kind=component.kind, layer=component.layer, **score)


def _add_edge(circuit: CircuitGraph, wiring: Wiring, name: str, data: object) -> None:
    match = _EDGE.fullmatch(name)
    if match is None or not isinstance(data, Mapping):
        raise GraphError(
            f"edge {name!r} is not of the form a0.h1->a1.h0<q> with an object of score and in_graph"
        )
    source, target, port = match["source"], match["target"], match["port"] or ""
    _check_edge(wiring, source, target, port)
    kept, score = bool(data.get("in_graph", True)), data.get("score")
    extra: dict[str, Any] = {} if kept else {"kept": False}
    if score is None:
        if not kept:
            return
        score, extra = 0.0, {"scored": False}
    if not _finite(score):
        raise GraphError(
            f"effect {effect_name(source, target, port)} has score {score!r}; "
            f"a score must be a finite number: trace again and look for NaN in the model"
        )
    for end in (source, target):
        if end not in circuit:
            component = wiring.component(end)
            circuit.add_component(end, kind=component.kind, layer=component.layer)
    circuit.add_effect(source, target, float(score), port=port, **extra)


def _check_edge(wiring: Wiring, source: str, target: str, port: str) -> None:
    """Refuse an edge that no model of this wiring has."""
    name = effect_name(source, target, port)
    head = wiring.component(target).kind == "head"
    wiring.component(source)
    if head != (port in PORTS) or (not head and port):
        raise GraphError(
            f"effect {name} has port {port!r}; heads are read through q, k or v, others through ''"
        )
    if source not in _readable(wiring, target):
        raise GraphError(
            f"effect {name} cannot be: {target} does not read {source}, which runs later"
        )


def _readable(wiring: Wiring, target: str) -> frozenset[str]:
    component = wiring.component(target)
    first = wiring.first_source(component.layer)
    heard = int(component.kind == "mlp" and not wiring.parallel)
    if component.kind == "input":
        return frozenset()
    return frozenset(wiring.sources[: first + heard * wiring.n_heads])


def _wiring(sizes: Mapping[str, int], parallel: bool) -> Wiring:
    if sizes["n_layers"] * sizes["n_heads"] > LARGEST:
        raise GraphError(
            f"the circuit is of a model of {sizes['n_layers']:,} layers of {sizes['n_heads']:,} "
            f"heads; no more than {LARGEST:,} heads are read: check cfg"
        )
    return Wiring(sizes["n_layers"], sizes["n_heads"], parallel)


def _size(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise GraphError(
            f"the circuit's {key} is {value!r}; EAP-IG circuit JSON needs the model's sizes: "
            f"use a circuit that `circuitlab trace` wrote"
        )
    return value


def _finite(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
