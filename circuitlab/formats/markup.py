"""XML of graphs: a parser that expands no entities, and attribute values as typed text.

GraphML and GEXF know booleans, whole numbers, doubles and text. Every other value, and text that
XML cannot hold, is JSON, under an attribute whose id begins with :data:`JSON_ID`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder, indent, tostring
from xml.parsers import expat

from circuitlab.errors import GraphError
from circuitlab.graph import load_json
from circuitlab.labels import excerpt, invisible, visible

#: Ids of attributes that hold JSON begin with this.
JSON_ID = "json"
#: Node data with a name that XML cannot hold, where the node's id is not it.
NAME = "circuitlab_name"

_DEEPEST = 100


def parse_xml(data: bytes) -> Element:
    """The tree of an XML document, tags without their namespaces.

    Raises:
        GraphError: not XML, nested too deeply, or with a document type: only that can define
            entities, and a few lines of those expand to gigabytes.
    """
    builder = TreeBuilder()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise GraphError(f"not a graph: XML nested more than {_DEEPEST} deep")
        builder.start(_local(tag), {_local(name): value for name, value in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_local(tag))

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise GraphError(f"not XML: {error}") from error
    return builder.close()


def write_xml(root: Element) -> str:
    """The tree as a document, indented."""
    indent(root)
    text: str = tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


class Columns:
    """The attributes of a document: one id for each combination of scope, name and type."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, str, str, bool], str] = {}

    def __iter__(self) -> Iterator[tuple[str, str, str, str]]:
        """Id, scope, name and type of each."""
        return ((key, *place[:3]) for place, key in self._ids.items())

    def rows(self, scope: str, data: Mapping[Any, Any]) -> list[tuple[str, str]]:
        """Id and text of each value.

        Raises:
            GraphError: a name is no visible text, or a value is not plain, finite JSON.
        """
        rows = []
        for name, value in data.items():
            if not isinstance(name, str) or not name or any(map(invisible, name)):
                raise GraphError(
                    f"data {name!r} has no visible name; XML cannot hold it: rename it"
                )
            kind, text = _typed(value)
            place = scope, name, kind or "string", not kind
            number = len(self._ids)
            rows.append((self._ids.setdefault(place, f"{'d' if kind else JSON_ID}{number}"), text))
        return rows


def read_value(text: str, kind: str, name: str) -> Any:
    """The value that text of an XML attribute of type ``kind`` says.

    Raises:
        GraphError: the text is no such value.
    """
    try:
        if kind == "boolean":
            return {"true": True, "false": False, "1": True, "0": False}[text.strip().lower()]
        if kind in ("int", "integer", "long", "short", "byte"):
            return int(text)
        if kind in ("float", "double"):
            if not math.isfinite(value := float(text)):
                raise ValueError
            return value
    except (KeyError, ValueError) as error:
        raise GraphError(f"data {name!r} is '{excerpt(text, 40)}', which is no {kind}") from error
    return text


def read_row(key: str, text: str, kind: str, name: str, *, ours: bool) -> Any:
    """The value of a row: JSON where the file is ours and the id says so.

    Raises:
        GraphError: the text is no such value.
    """
    if not (ours and key.startswith(JSON_ID)):
        return read_value(text, kind, name)
    try:
        return load_json(text)
    except ValueError as error:
        raise GraphError(f"data {name!r} is not JSON: {error}") from error


def node_ids(names: Iterable[str]) -> dict[str, str]:
    """An id for each name that XML can hold and another program can show: the name where it can."""
    names = list(names)
    # A visible name is its own id; no other may take that.
    ids = {name: name for name in names if visible(name) == name and name}
    taken = set(ids)
    for name in names:
        if name not in ids:
            shown = visible(name)
            while shown in taken or not shown:
                shown += "'"
            taken.add(shown)
            ids[name] = shown
    return ids


def _typed(value: Any) -> tuple[str, str]:
    """Type and text of a value; no type where the text is JSON."""
    if isinstance(value, bool):
        return "boolean", "true" if value else "false"
    if isinstance(value, int) and abs(value) < 1 << 63:
        return "long", str(value)
    if isinstance(value, float) and math.isfinite(value):
        return "double", repr(value)
    if isinstance(value, str) and not any(map(invisible, value)):
        return "string", value
    try:
        return "", json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"value {excerpt(repr(value), 80)} cannot be written ({error}); "
            f"use plain, finite JSON values"
        ) from error


def _local(tag: str) -> str:
    return tag.rpartition(" ")[2]


def _refuse_doctype(*_: object) -> None:
    raise GraphError(
        "the XML has a document type, which can define entities; remove the <!DOCTYPE …> part"
    )
