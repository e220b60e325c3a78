"""Circuit files: the right format, whole or not at all, and back again."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path

import networkx as nx
import pytest
from format_samples import planted

from circuitlab.errors import GraphError, OptionError, PluginError, ResourceError
from circuitlab.export import EXPORTERS, check_target, find_exporter, read_circuit, write_circuit
from circuitlab.graph import CircuitGraph
from circuitlab.panels import TextTable


@pytest.fixture
def circuit() -> CircuitGraph:
    return planted()


# --- choosing and writing -------------------------------------------------------------------------


def test_longest_suffix_wins() -> None:
    """``x.mib.json`` is EAP-IG's JSON, ``x.json`` our own; capitals do not matter."""
    assert find_exporter(Path("x.mib.json")) is EXPORTERS[".mib.json"]
    assert find_exporter(Path("my.circuit.JSON")) is EXPORTERS[".json"]


@pytest.mark.parametrize("name", ["x", "x.jpeg", ".svg", "json"])
def test_unknown_suffix_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    """The message lists the suffixes there are, those of plugins included; nothing is written."""
    exporters = {**EXPORTERS, ".own": lambda graph, path: None}
    with pytest.raises(OptionError, match=r"\.json .*\.own .*\.svg"):
        write_circuit(CircuitGraph(), tmp_path / name, exporters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", sorted(EXPORTERS))
def test_every_format_is_written(suffix: str, circuit: CircuitGraph, tmp_path: Path) -> None:
    """Each suffix gives one complete file and leaves nothing else in the folder."""
    path = tmp_path / f"out put{suffix}"
    TextTable(title="t", header=["a"], rows=[["b"]]).add_to(circuit)
    assert write_circuit(circuit, path) == []
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size > 100


def test_warnings_reach_the_caller(circuit: CircuitGraph, tmp_path: Path) -> None:
    """What an exporter warns of is returned."""

    def own(graph: CircuitGraph, path: Path) -> list[str]:
        path.write_text("x")
        return ["lost the colours"]

    assert write_circuit(circuit, tmp_path / "a.own", {".own": own}) == ["lost the colours"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), ValueError()]
)
def test_failed_write_keeps_the_older_file(
    failure: Exception, circuit: CircuitGraph, tmp_path: Path
) -> None:
    """An exporter that fails half-way leaves the older file as it was and no debris."""

    def broken(graph: CircuitGraph, path: Path) -> None:
        path.write_text("half")
        raise failure

    path = tmp_path / "a.own"
    path.write_text("older")
    with pytest.raises(ResourceError if isinstance(failure, OSError) else ValueError):
        write_circuit(circuit, path, {".own": broken})
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_name_appears_only_when_the_file_is_whole(
    circuit: CircuitGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final name is given by one rename, after the bytes are on the disk."""
    seen: list[str] = []
    path = tmp_path / "a.json"

    def fsync(descriptor: int) -> None:
        seen.append("fsync")
        assert not path.exists()

    def replace(draft: Path, target: Path) -> None:
        seen.append("replace")
        assert Path(draft).read_text() == circuit.to_json()
        assert Path(draft).stat().st_dev == tmp_path.stat().st_dev
        rename(draft, target)

    rename = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_circuit(circuit, path)
    assert seen == ["fsync", "replace"]
    assert path.read_text() == circuit.to_json()


def test_exporter_that_writes_nothing_is_named(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A plugin's exporter that forgets the file is an error of the plugin."""
    with pytest.raises(PluginError, match=r"a\.own"):
        write_circuit(circuit, tmp_path / "a.own", {".own": lambda graph, path: None})


def test_missing_folder_is_named(circuit: CircuitGraph, tmp_path: Path) -> None:
    """The message names the folder; once it is made, as the message says, writing works."""
    path = tmp_path / "new" / "a.json"
    with pytest.raises(ResourceError, match=r"new.*create it"):
        write_circuit(circuit, path)
    path.parent.mkdir()
    write_circuit(circuit, path)
    assert path.exists()


def test_folder_is_not_overwritten(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A folder of the output's name is refused."""
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ResourceError, match="not a file"):
        write_circuit(circuit, tmp_path / "a.json")


# --- JSON -----------------------------------------------------------------------------------------


def test_json_round_trip(circuit: CircuitGraph, tmp_path: Path) -> None:
    """A circuit read back is the circuit that was written, provenance and data included."""
    write_circuit(circuit, tmp_path / "a.json")
    back = read_circuit(tmp_path / "a.json")
    assert nx.utils.graphs_equal(back, circuit)
    assert back.graph == circuit.graph


def test_json_refuses_nan(circuit: CircuitGraph, tmp_path: Path) -> None:
    """NaN never reaches a file, nor does a file appear."""
    circuit.graph["faithfulness"] = float("nan")
    for suffix in (".json", ".mib.json", ".graphml"):
        circuit.graph["nested"] = {"loss": float("nan")}
        with pytest.raises((GraphError, ValueError)):
            write_circuit(circuit, tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.json", "a.mib.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"digraph {}",
        b"[1, 2]",
        b'{"prompts": []}',
        b'{"nodes": 1, "edges": 2, "graph": 3, "cfg": 4}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_other_documents_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    """A file that is no circuit is named in one GraphError, whatever else it is."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GraphError, match=name.replace(".", r"\.")):
        read_circuit(path)


@pytest.mark.parametrize("name", ["a.json", "a.mib.json"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    """A file that is not there is said to be missing, with the command that writes one."""
    with pytest.raises(GraphError, match="does not exist; `circuitlab trace --output"):
        read_circuit(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.mib.json"])
def test_nan_score_is_refused_on_reading(name: str, circuit: CircuitGraph, tmp_path: Path) -> None:
    """A score that is no finite number is refused."""
    path = tmp_path / name
    write_circuit(circuit, path)
    path.write_text(path.read_text().replace("-1.5", "NaN"))
    with pytest.raises(GraphError, match=r"NaN|nan"):
        read_circuit(path)


def test_plots_are_refused_before_the_work_where_nothing_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without matplotlib a path for plots is refused, and one for a diagram is not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"a\.plot\.svg' needs matplotlib; run `pip install"):
        check_target(tmp_path / "a.plot.svg")
    check_target(tmp_path / "a.svg")
