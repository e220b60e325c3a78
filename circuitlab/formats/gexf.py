"""GEXF 1.3, both ways: the format of Gephi.

Nodes and edges carry their data as attributes; parallel edges differ in ``kind``, the port. The
weight of an edge is its absolute score, since Gephi lays out by weight; the score with its sign is
an attribute. GEXF has no data of the graph: provenance is JSON in the description.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from circuitlab.errors import GraphError
from circuitlab.formats.foreign import check_schema, to_circuit
from circuitlab.formats.markup import (
    NAME,
    Columns,
    node_ids,
    parse_xml,
    read_row,
    read_value,
    write_xml,
)
from circuitlab.graph import SCHEMA, CircuitGraph, load_json

_NAMESPACE = "http://gexf.net/1.3"

_Titles = Mapping[str, tuple[str, str]]


def gexf_text(circuit: CircuitGraph) -> str:
    """The circuit as GEXF 1.3; the same circuit gives the same text.

    Raises:
        GraphError: a value is not plain, finite JSON.
    """
    columns = Columns()
    nodes, edges = Element("nodes"), Element("edges")
    ids = node_ids(circuit)
    for name, data in circuit.nodes(data=True):
        node = SubElement(nodes, "node", id=ids[name], label=ids[name])
        _add_values(node, columns, "node", data if ids[name] == name else {**data, NAME: name})
    for index, (source, target, port, data) in enumerate(circuit.edges(keys=True, data=True)):
        ends = {"source": ids[source], "target": ids[target]}
        weight = repr(abs(float(data["score"])))
        edge = SubElement(edges, "edge", {"id": f"e{index}", **ends, "weight": weight})
        if port and port.isprintable():
            edge.set("kind", port)
        _add_values(edge, columns, "edge", {**data, "port": port})
    try:
        note = json.dumps({"schema": SCHEMA, "graph": circuit.graph}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphError(f"the circuit's provenance is not plain JSON: {error}") from error
    root = Element("gexf", xmlns=_NAMESPACE, version="1.3")
    meta = SubElement(root, "meta")
    SubElement(meta, "creator").text = "CircuitLab"
    SubElement(meta, "description").text = note
    graph = SubElement(root, "graph", defaultedgetype="directed", mode="static")
    for scope in ("node", "edge"):
        listed = SubElement(graph, "attributes", {"class": scope, "mode": "static"})
        for key, owner, title, kind in columns:
            if owner == scope:
                SubElement(listed, "attribute", id=key, title=title, type=kind)
    graph.extend((nodes, edges))
    return write_xml(root)


def parse_gexf(data: bytes) -> CircuitGraph:
    """The circuit in a GEXF file of any version, ours or another program's.

    Raises:
        GraphError: not GEXF, undirected, or without what a circuit needs.
    """
    root = parse_xml(data)
    graph = root.find("graph")
    if root.tag != "gexf" or graph is None:
        raise GraphError(f"not a GEXF graph: <{root.tag}>")
    edges = graph.findall("edges/edge")
    kind = graph.get("defaultedgetype", "undirected")
    if any(edge.get("type", kind) != "directed" for edge in edges):
        raise GraphError("the graph is undirected; effects run one way: save it as directed")
    note = _note(root)
    ours = note is not None
    titles = {scope: _titles(graph, scope) for scope in ("node", "edge")}
    names: dict[str, str] = {}
    nodes = []
    for node in graph.iter("node"):
        key = str(node.get("id"))
        found = _values(node, titles["node"], ours=ours)
        name = str(found.pop(NAME) if ours and NAME in found else key)
        label = node.get("label", "")
        if not ours and label not in ("", name):
            found.setdefault("label", label)
        names[key] = name
        nodes.append((name, found))
    rows = []
    for edge in edges:
        ends = [names.get(str(edge.get(end)), str(edge.get(end))) for end in ("source", "target")]
        found = _values(edge, titles["edge"], ours=ours)
        if not ours:
            found.setdefault("weight", read_value(edge.get("weight", "1"), "double", "weight"))
            found.setdefault("port", edge.get("kind", ""))
        rows.append((ends[0], ends[1], found))
    return to_circuit(note or {}, nodes, rows, ours=ours)


def _add_values(parent: Element, columns: Columns, scope: str, data: Mapping[Any, Any]) -> None:
    values = SubElement(parent, "attvalues")
    for key, text in columns.rows(scope, data):
        SubElement(values, "attvalue", {"for": key, "value": text})


def _note(root: Element) -> dict[str, Any] | None:
    """Provenance, where the file is ours."""
    text = root.findtext("meta/description") or ""
    if not text.startswith('{"schema": "circuitlab-'):
        return None
    try:
        note = load_json(text)
    except ValueError as error:
        raise GraphError(f"the description is not JSON: {error}") from error
    check_schema(note.get("schema"))
    graph = note.get("graph")
    if not isinstance(graph, dict):
        raise GraphError("the description holds no provenance; write the file again")
    return graph


def _titles(graph: Element, scope: str) -> dict[str, tuple[str, str]]:
    """Title and type of each attribute, by its id."""
    return {
        str(entry.get("id")): (str(entry.get("title")), entry.get("type", "string"))
        for listed in graph.findall("attributes")
        if listed.get("class") == scope
        for entry in listed.findall("attribute")
    }


def _values(parent: Element, titles: _Titles, *, ours: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in parent.findall("attvalues/attvalue"):
        key = value.get("for") or value.get("id") or ""
        if key not in titles:
            raise GraphError(f"value of attribute {key!r} has no <attribute> that says what it is")
        title, kind = titles[key]
        found[title] = read_row(key, value.get("value", ""), kind, title, ours=ours)
    return found
