"""GraphML, both ways: for Gephi, Cytoscape, yEd, igraph and networkx.

The port is edge data. Values that GraphML has no type for are JSON text (see ``markup``). A file of
another program gives its own node and edge data, under the names ``foreign`` expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from circuitlab.errors import GraphError
from circuitlab.formats.foreign import check_schema, to_circuit
from circuitlab.formats.markup import NAME, Columns, node_ids, parse_xml, read_row, write_xml
from circuitlab.graph import SCHEMA, CircuitGraph

_NAMESPACE = "http://graphml.graphdrawing.org/xmlns"
#: Graph data that says the file is ours.
_MARK = "circuitlab_schema"

_Keys = Mapping[str, Mapping[str, str]]


def graphml_text(circuit: CircuitGraph) -> str:
    """The circuit as GraphML; the same circuit gives the same text.

    Raises:
        GraphError: a value is not plain, finite JSON.
    """
    columns = Columns()
    graph = Element("graph", edgedefault="directed")
    _add_data(graph, columns, "graph", {_MARK: SCHEMA, **circuit.graph})
    ids = node_ids(circuit)
    for name, data in circuit.nodes(data=True):
        node = SubElement(graph, "node", id=ids[name])
        _add_data(node, columns, "node", data if ids[name] == name else {**data, NAME: name})
    # Edge ids are unique in the file; our keys, the ports, are not.
    for index, (source, target, port, data) in enumerate(circuit.edges(keys=True, data=True)):
        edge = SubElement(graph, "edge", id=f"e{index}", source=ids[source], target=ids[target])
        _add_data(edge, columns, "edge", {**data, "port": port})
    root = Element("graphml", xmlns=_NAMESPACE)
    for key, scope, name, kind in columns:
        SubElement(root, "key", {"id": key, "for": scope, "attr.name": name, "attr.type": kind})
    root.append(graph)
    return write_xml(root)


def parse_graphml(data: bytes) -> CircuitGraph:
    """The circuit in a GraphML file, ours or another program's.

    Raises:
        GraphError: not GraphML, undirected, nested, or without what a circuit needs.
    """
    root = parse_xml(data)
    graphs = root.findall("graph")
    if root.tag != "graphml" or len(graphs) != 1:
        raise GraphError(f"not a GraphML graph: <{root.tag}> with {len(graphs)} graphs")
    (graph,) = graphs
    edges = graph.findall("edge")
    undirected = graph.get("edgedefault") != "directed"
    if any(edge.get("directed", str(not undirected).lower()) != "true" for edge in edges):
        raise GraphError("the graph is undirected; effects run one way: save it as directed")
    if graph.find("hyperedge") is not None or graph.find("node/graph") is not None:
        raise GraphError("the graph has hyperedges or graphs within nodes; flatten it first")
    keys = {str(key.get("id")): key.attrib for key in root.findall("key")}
    marks = [key for key, entry in keys.items() if entry.get("attr.name") == _MARK]
    mark = [d.text for d in graph.findall("data") if d.get("key") in marks]
    if mark:
        check_schema(mark[0])
    provenance = _data(graph, keys, ours=bool(mark))
    provenance.pop(_MARK, None)
    defaults = dict(_defaults(root))
    names: dict[str, str] = {}
    nodes = []
    for node in graph.findall("node"):
        key = str(node.get("id"))
        found = {**defaults.get("node", {}), **_data(node, keys, ours=bool(mark))}
        name = str(found.pop(NAME) if mark and NAME in found else key)
        names[key] = name
        nodes.append((name, found))
    rows = []
    for edge in edges:
        ends = [names.get(str(edge.get(end)), str(edge.get(end))) for end in ("source", "target")]
        found = {**defaults.get("edge", {}), **_data(edge, keys, ours=bool(mark))}
        rows.append((ends[0], ends[1], found))
    return to_circuit(provenance, nodes, rows, ours=bool(mark))


def _add_data(parent: Element, columns: Columns, scope: str, data: Mapping[Any, Any]) -> None:
    for key, text in columns.rows(scope, data):
        SubElement(parent, "data", key=key).text = text


def _data(parent: Element, keys: _Keys, *, ours: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for data in parent.findall("data"):
        key = str(data.get("key"))
        entry = keys.get(key)
        if entry is None:
            raise GraphError(f"data of key {key!r} has no <key> that says what it is")
        if len(data) or "attr.name" not in entry:
            continue  # how another program draws it
        name, kind = entry["attr.name"], entry.get("attr.type", "string")
        found[name] = read_row(key, data.text or "", kind, name, ours=ours)
    return found


def _defaults(root: Element) -> Iterator[tuple[str, dict[str, Any]]]:
    """What nodes and edges have where they do not say otherwise."""
    for scope in ("node", "edge"):
        found: dict[str, Any] = {}
        for key in root.findall("key"):
            default, name = key.find("default"), key.get("attr.name")
            if key.get("for") in (scope, "all", None) and default is not None and name:
                kind = key.get("attr.type", "string")
                found[name] = read_row("", default.text or "", kind, name, ours=False)
        yield scope, found
