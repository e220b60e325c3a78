"""Circuit files: which suffix is written and read how, and how a file is written whole or not.

Written and read:

.json              the circuit, complete
.mib.json          circuit JSON of EAP-IG and of the MIB benchmark (Hanna et al. 2024)
.neuronpedia.json  attribution graphs of Neuronpedia and circuit-tracer
.node-link.json    plain node-link JSON of networkx and D3
.graphml .gexf     for Gephi, Cytoscape, yEd, igraph

Written alone: .dot .svg .png .pdf, pictures (see ``render``); .html, the interactive page (see
``page``); .plot.svg .plot.png .plot.pdf, panels (see ``plots``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from circuitlab import page, plots, render
from circuitlab.errors import GraphError, OptionError, PluginError, ResourceError
from circuitlab.formats.gexf import gexf_text, parse_gexf
from circuitlab.formats.graphml import graphml_text, parse_graphml
from circuitlab.formats.mib import mib_document, parse_mib
from circuitlab.formats.neuronpedia import neuronpedia_document, parse_neuronpedia
from circuitlab.formats.node_link import node_link_document, parse_node_link
from circuitlab.graph import CircuitGraph, explore_by, load_json, save_by

#: Largest file that is read, in bytes.
MAX_BYTES = 1 << 28
#: Largest attribution graph that Neuronpedia takes, in bytes.
UPLOAD_BYTES = 100 << 20

#: Writes the circuit to the path and returns warnings, if any.
Exporter = Callable[[CircuitGraph, Path], list[str] | None]


def write_json(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as node-link JSON, complete; NaN is refused."""
    path.write_text(circuit.to_json(), encoding="utf-8")


def write_mib(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as EAP-IG / MIB circuit JSON; scores keep our sign (see ``formats.mib``)."""
    _write_document(mib_document(circuit), path)


def write_neuronpedia(circuit: CircuitGraph, path: Path) -> list[str]:
    """The circuit as an attribution graph of Neuronpedia; warns of what it does not take."""
    _write_document(neuronpedia_document(circuit), path)
    if path.stat().st_size <= UPLOAD_BYTES:
        return []
    return [
        f"{path.name} has more than {UPLOAD_BYTES >> 20} MiB, which Neuronpedia does not take; "
        f"write fewer edges with --top"
    ]


def write_node_link(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as networkx's plain node-link JSON."""
    _write_document(node_link_document(circuit), path)


def write_graphml(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as GraphML (see ``formats.graphml``)."""
    path.write_text(graphml_text(circuit), encoding="utf-8")


def write_gexf(circuit: CircuitGraph, path: Path) -> None:
    """The circuit as GEXF (see ``formats.gexf``)."""
    path.write_text(gexf_text(circuit), encoding="utf-8")


#: The exporters of the core, by suffix.
EXPORTERS: dict[str, Exporter] = {
    ".json": write_json,
    ".mib.json": write_mib,
    ".neuronpedia.json": write_neuronpedia,
    ".node-link.json": write_node_link,
    ".graphml": write_graphml,
    ".gexf": write_gexf,
    page.SUFFIX: page.write_page,
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
        ResourceError: its folder does not exist or may not be written, a folder has its name, or
            what draws it is not installed.
    """
    find_exporter(path, exporters)
    if path.name.lower().endswith(plots.SUFFIXES):
        plots.check_installed(f"output {str(path)!r}")
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
    return write_whole(path, lambda draft: exporter(circuit, draft))


def write_whole(path: Path, write: Callable[[Path], list[str] | None]) -> list[str]:
    """Have ``write`` make a draft that becomes the file ``path``, and return its warnings.

    Raises:
        ResourceError: the file cannot be written there.
        PluginError: no draft was written.
    """
    target = path.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=".circuitlab-", dir=target.parent) as folder:
            draft = Path(folder, target.name)
            warnings = write(draft)
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
    """The circuit in a file of any format that is read; its suffix says which, ``.json`` else.

    Raises:
        GraphError: no such file, another document, or a score that is no finite number.
        ResourceError: the file cannot be read.
    """
    name = path.name.lower()
    fitting = [suffix for suffix in READERS if name.endswith(suffix)]
    reader = READERS[max(fitting, key=len)] if fitting else _parse_own
    data = _read_bytes(path)
    try:
        return reader(data)
    except UnicodeDecodeError as error:
        raise GraphError(
            f"circuit {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}); "
            f"give the .json that `circuitlab trace` wrote"
        ) from error
    except (GraphError, RecursionError) as error:
        raise GraphError(f"circuit {str(path)!r}: {error}") from error


def _parse_own(data: bytes) -> CircuitGraph:
    return CircuitGraph.from_json(_text(data))


def _parse_mib(data: bytes) -> CircuitGraph:
    # EAP-IG writes NaN as the score of nodes it did not score, so NaN must come through here.
    return parse_mib(_json(data, json.loads))


#: What reads each format, by suffix.
READERS: Mapping[str, Callable[[bytes], CircuitGraph]] = MappingProxyType(
    {
        ".json": _parse_own,
        ".mib.json": _parse_mib,
        ".neuronpedia.json": lambda data: parse_neuronpedia(_json(data, load_json)),
        ".node-link.json": lambda data: parse_node_link(_json(data, load_json)),
        ".graphml": parse_graphml,
        ".gexf": parse_gexf,
    }
)


def _json(data: bytes, loads: Callable[[str], object]) -> object:
    text = _text(data)
    try:
        return loads(text)
    except ValueError as error:
        raise GraphError(f"not JSON: {error}") from error


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise GraphError(
            f"circuit {str(path)!r} does not exist; "
            f"`circuitlab trace --output {path.name}` writes one"
        ) from None
    except OSError as error:
        raise ResourceError(f"circuit {str(path)!r} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise GraphError(
            f"circuit {str(path)!r} has more than {MAX_BYTES >> 20} MiB, the most that is read; "
            f"write fewer edges, as `circuitlab trace --top 10000` does"
        )
    return data


def _write_document(document: object, path: Path) -> None:
    try:
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphError(f"the circuit cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Have the bytes on the disk before the name points at them."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


save_by(write_circuit)
explore_by(page.frame)
