"""Circuit files: which suffix is written and read how, and how a file is written whole or not.

.json          the circuit, complete; what `circuitlab render` and `evaluate` read
.mib.json      circuit JSON of EAP-IG and of the MIB benchmark (Hanna et al. 2024)
.graphml       for Gephi, Cytoscape, yEd
.dot .svg .png .pdf   pictures (see ``render``)
.plot.svg .plot.png .plot.pdf   panels (see ``plots``)
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from circuitlab import plots, render
from circuitlab.errors import GraphError, OptionError, PluginError, ResourceError
from circuitlab.graph import CircuitGraph
from circuitlab.labels import visible
from circuitlab.mib import mib_document, parse_mib

#: Writes the circuit to the path and returns warnings, if any.
Exporter = Callable[[CircuitGraph, Path], list[str] | None]


def write_json(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as node-link JSON, complete; NaN is refused."""
    path.write_text(circuit.to_json(), encoding="utf-8")


def write_mib(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as EAP-IG / MIB circuit JSON; scores keep our sign (see ``mib``)."""
    path.write_text(json.dumps(mib_document(circuit), allow_nan=False) + "\n", encoding="utf-8")


def write_graphml(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as GraphML; the port is edge data, values GraphML has no type for are JSON."""
    plain = nx.MultiDiGraph(**_graphml_data(circuit.graph))
    for name, data in circuit.nodes(data=True):
        plain.add_node(visible(str(name)), **_graphml_data(data))
    # GraphML wants edge ids unique in the file; our keys, the ports, are not.
    for index, (source, target, port, data) in enumerate(circuit.edges(keys=True, data=True)):
        ends = visible(str(source)), visible(str(target))
        plain.add_edge(*ends, key=f"e{index}", **_graphml_data({**data, "port": port}))
    nx.write_graphml(plain, path)


#: The exporters of the core, by suffix.
EXPORTERS: dict[str, Exporter] = {
    ".json": write_json,
    ".mib.json": write_mib,
    ".graphml": write_graphml,
    **dict.fromkeys(render.SUFFIXES, render.draw),
    **dict.fromkeys(plots.SUFFIXES, plots.plot),
}


def find_exporter(path: Path, exporters: Mapping[str, Exporter] = EXPORTERS) -> Exporter:
    """The exporter with the longest suffix that the file's name ends in.

    Raises:
        OptionError: there is none; the message lists those there are.
    """
    name = path.name.lower()
    fitting = [suffix for suffix in exporters if name.endswith(suffix) and name != suffix]
    if not fitting:
        known = " ".join(sorted(exporters))
        raise OptionError(f"output {str(path)!r} has no known suffix; give it one of {known}")
    return exporters[max(fitting, key=len)]


def check_target(path: Path, exporters: Mapping[str, Exporter] = EXPORTERS) -> None:
    """Refuse, before any work is done, a path that no circuit can be written to.

    Raises:
        OptionError: the suffix is not known.
        ResourceError: its folder does not exist or may not be written, or a folder has its name.
    """
    find_exporter(path, exporters)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ResourceError(
            f"output {str(path)!r}: folder {str(folder)!r} does not exist; create it first"
        )
    if path.exists() and not path.is_file():
        raise ResourceError(f"output {str(path)!r} is not a file; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(
            f"output {str(path)!r}: folder {str(folder)!r} may not be written; choose another one"
        )


def write_circuit(
    circuit: CircuitGraph, path: Path, exporters: Mapping[str, Exporter] = EXPORTERS
) -> list[str]:
    """Write the circuit in the format of the path's suffix and return warnings.

    The file appears under its name when it is complete and safe on the disk, or not at all; an
    older file of that name stays until then.

    Raises:
        OptionError: the suffix is not known.
        ResourceError: the file cannot be written there.
    """
    check_target(path, exporters)
    exporter = find_exporter(path, exporters)
    target = path.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=".circuitlab-", dir=target.parent) as folder:
            draft = Path(folder, target.name)
            warnings = exporter(circuit, draft)
            if not draft.is_file():
                raise PluginError(
                    f"the exporter for {path.name!r} wrote no file at the path it was given"
                )
            _flush(draft)
            os.replace(draft, target)
    except OSError as error:
        raise ResourceError(
            f"output {str(path)!r} cannot be written: {error.strerror or error}; "
            f"check free space and permissions of {str(target.parent)!r}"
        ) from error
    return list(warnings or [])


def read_circuit(path: Path) -> CircuitGraph:
    """The circuit in a ``.json`` or ``.mib.json`` file.

    Raises:
        GraphError: no such file, not JSON, another document, or a score that is no finite number.
        ResourceError: the file cannot be read.
    """
    return read_mib(path) if path.name.lower().endswith(".mib.json") else _read_json(path)


def read_mib(path: Path) -> CircuitGraph:
    """The circuit in an EAP-IG or MIB circuit JSON file, scores as they stand there.

    Raises:
        GraphError: no such file, not JSON, another document, or a score that is no finite number.
        ResourceError: the file cannot be read.
    """
    text = _read_text(path)
    try:
        # EAP-IG writes NaN as the score of nodes it did not score, so NaN must come through here.
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"circuit {str(path)!r} is not JSON: {error}") from error
    try:
        return parse_mib(document)
    except GraphError as error:
        raise GraphError(f"circuit {str(path)!r}: {error}") from error


def _read_json(path: Path) -> CircuitGraph:
    text = _read_text(path)
    try:
        return CircuitGraph.from_json(text)
    except (GraphError, RecursionError) as error:
        raise GraphError(f"circuit {str(path)!r}: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise GraphError(
            f"circuit {str(path)!r} does not exist; "
            f"`circuitlab trace --output {path.name}` writes one"
        ) from None
    except UnicodeDecodeError as error:
        raise GraphError(
            f"circuit {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}); "
            f"give the .json that `circuitlab trace` wrote"
        ) from error
    except OSError as error:
        raise ResourceError(f"circuit {str(path)!r} cannot be read: {error.strerror}") from error


def _graphml_data(data: Mapping[Any, Any]) -> dict[str, Any]:
    return {visible(str(name)): _graphml_value(value) for name, value in data.items()}


def _graphml_value(value: Any) -> str | int | float | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        # GraphML's long has 64 bits.
        return value if abs(value) < 1 << 63 else str(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        return visible(value)
    try:
        return json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"value {value!r} cannot be written as GraphML ({error}); use plain, finite JSON values"
        ) from error


def _flush(path: Path) -> None:
    """Have the bytes on the disk before the name points at them."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
