"""Node-link JSON as networkx and D3 write it, both ways.

``{"directed", "multigraph", "graph", "nodes": [{"id", …}], "edges": [{"source", "target", "key"?,
…}]}``; ``links`` is read too, the older name of ``edges``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitlab.errors import GraphError
from circuitlab.formats.foreign import to_circuit
from circuitlab.graph import EDGE_SCORE, CircuitGraph


def node_link_document(circuit: CircuitGraph) -> dict[str, Any]:
    """The circuit as ``networkx.node_link_data`` gives it; ``key`` is the port.

    Its ``graph`` always has ``score``, what a score is in words.

    Raises:
        GraphError: data have a name that this format needs for itself.
    """
    circuit.validate()
    document = circuit.to_document()
    del document["schema"]
    # Nothing else here says whose file it is, and so what its scores are.
    return {**document, "graph": {"score": EDGE_SCORE, **document["graph"]}}


def parse_node_link(document: object) -> CircuitGraph:
    """The circuit in node-link JSON, ours or another program's.

    Raises:
        GraphError: not such a document, undirected, or without what a circuit needs.
    """
    if not isinstance(document, Mapping):
        raise GraphError("not node-link JSON: no object")
    nodes, edges = document.get("nodes"), document.get("edges", document.get("links"))
    if not isinstance(nodes, list) or not isinstance(edges, list):
        raise GraphError("not node-link JSON: it needs lists nodes and edges (or links)")
    if document.get("directed") is not True:
        raise GraphError("the graph is undirected; effects run one way: save a DiGraph")
    graph = document.get("graph", {})
    if isinstance(graph, list):  # as networkx 1 wrote it
        graph = dict(_pairs(graph))
    if not isinstance(graph, Mapping):
        raise GraphError("not node-link JSON: graph is no object")
    return to_circuit(graph, map(_node, nodes), map(_edge, edges))


def _pairs(values: list[Any]) -> list[tuple[str, Any]]:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in values):
        raise GraphError("not node-link JSON: graph is no object")
    return [(str(key), value) for key, value in values]


def _node(node: object) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(node, Mapping) or not isinstance(node.get("id"), str):
        raise GraphError(f"node {node!r:.80} has no id that is text; name it")
    return node["id"], {key: value for key, value in node.items() if key != "id"}


def _edge(edge: object) -> tuple[str, str, Mapping[str, Any]]:
    ends = [edge.get(end) for end in ("source", "target")] if isinstance(edge, Mapping) else []
    if not isinstance(edge, Mapping) or not all(isinstance(end, str) for end in ends):
        raise GraphError(f"edge {edge!r:.80} has no source and target that are text")
    data = {key: value for key, value in edge.items() if key not in ("source", "target", "key")}
    # networkx numbers parallel edges that have no key of their own.
    key = edge.get("key", "")
    data.setdefault("port", key if isinstance(key, str) else "")
    return str(ends[0]), str(ends[1]), data
