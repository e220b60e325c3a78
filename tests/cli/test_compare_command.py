"""``circuitlab compare``: what it prints and writes, for two circuits and for more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_circuits import circuit_of, random_edges

import circuitlab
from circuitlab import compare_circuits, overlay_circuits

Lab = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    found = {}
    for seed, name in enumerate(["one", "two", "three"]):
        circuit = circuit_of(random_edges(seed, 0.4), model="m", n_layers=2, method=name)
        found[name] = tmp_path / f"{name}.json"
        circuitlab.write_circuit(circuit, found[name])
    return found


def test_two_circuits_are_compared(lab: Lab, files: dict[str, Path]) -> None:
    """Lines and edges of the comparison, and pictures of both, as asked for."""
    outputs = ["c.svg", "c.html", "c.json", "c.plot.svg"]
    flags = [part for path in outputs for part in ("-o", path)]
    done = lab("compare", files["one"], files["two"], *flags)
    assert done.code == 0, done.err
    found = compare_circuits(
        circuitlab.read_circuit(files["one"]),
        circuitlab.read_circuit(files["two"]),
        names=("one", "two"),
    )
    for key, value in found.lines().items():
        assert f"{key}: {value}" in done.out
    assert "written: c.svg, c.html, c.json, c.plot.svg" in done.out
    rows = [line.split("\t") for line in done.out.splitlines() if "→" in line and "\t" in line]
    assert len(rows) == min(10, len(found.scores))
    strongest = next(iter(found.scores))
    assert rows[0][0] == circuitlab.graph.effect_name(*strongest)
    again = circuitlab.read_circuit(Path("c.json"))
    assert again.graph["compared"] == ["one", "two"]
    assert {d["in"] for *_, d in again.edges(data=True)} == {"a", "b", "both"}
    assert "only one" in Path("c.svg").read_text("utf-8")
    assert "only one" in Path("c.html").read_text("utf-8")
    assert "Scores side by side" in Path("c.plot.svg").read_text("utf-8")


def test_json_is_one_document(lab: Lab, files: dict[str, Path]) -> None:
    """The comparison's own JSON, with the paths written."""
    done = lab("compare", files["one"], files["two"], "--json", "-o", "c.svg")
    assert done.code == 0
    assert done.json["schema"] == "circuitlab-comparison/1"
    assert done.json["paths"] == ["c.svg"]
    assert done.json["names"] == ["one", "two"]
    both = random_edges(0, 0.4).keys() & random_edges(1, 0.4).keys()
    assert {tuple(edge) for edge in done.json["both"]} == both


def test_three_circuits_are_overlaid(lab: Lab, files: dict[str, Path]) -> None:
    """A table of every edge by circuit; the overlay is what is written."""
    done = lab("compare", *files.values(), "-o", "all.json", "-o", "all.svg")
    assert done.code == 0, done.err
    circuits = {name: circuitlab.read_circuit(path) for name, path in files.items()}
    overlay = overlay_circuits(circuits)
    assert f"kept by all: {overlay.graph['findings']['kept by all']}" in done.out
    assert "edge\tone\ttwo\tthree\tkept by\tsign" in done.out
    assert circuitlab.read_circuit(Path("all.json")).to_json() == overlay.to_json()
    done = lab("compare", *files.values(), "--json")
    assert done.json["schema"] == "circuitlab-overlay/1"
    assert len(done.json["edges"]) == overlay.number_of_edges()


def test_top_keeps_the_strongest_and_their_scores(lab: Lab, files: dict[str, Path]) -> None:
    """Other edges are in neither circuit, but a score is not lost with them."""
    done = lab("compare", files["one"], files["two"], "--top", "4", "--json")
    found = done.json
    assert len(found["only_a"]) + len(found["both"]) == 4
    assert len(found["only_b"]) + len(found["both"]) == 4
    second = random_edges(1, 0.4)
    for *edge, _, other in found["scores"]:
        assert other == second.get(tuple(edge))


def test_formats_may_be_mixed(lab: Lab, files: dict[str, Path]) -> None:
    """A circuit is like itself in another format; equal names are told apart by their paths."""
    lab("render", files["one"], "-o", "one.graphml")
    done = lab("compare", files["one"], "one.graphml", "--json")
    assert done.json["jaccard"] == 1.0
    assert done.json["differences"] == []
    assert done.json["names"] == [str(files["one"]), "one.graphml"]


def test_other_shapes_need_names_only(lab: Lab, files: dict[str, Path]) -> None:
    """Refused with the flag that compares all the same, which works."""
    circuit = circuit_of(random_edges(9), n_layers=5)
    circuitlab.write_circuit(circuit, Path("other.json"))
    done = lab("compare", files["one"], "other.json")
    assert done.code == 3
    assert "n_layers is 2 in one, 5 in other" in done.err
    assert "--names-only" in done.err
    done = lab("compare", files["one"], "other.json", "--names-only")
    assert done.code == 0
    assert "rank correlation" not in done.out


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["one.json"], "two circuits or more"),
        (["one.json", "one.json"], "given twice"),
        (["one.json", "two.json", "three.json", "--names-only"], "--names-only compares two"),
        (["one.json", "two.json", "-o", "x.jpeg"], "no known suffix"),
    ],
)
def test_wrong_usage_is_told(lab: Lab, files: dict[str, Path], words: list[str], fact: str) -> None:
    """Exit 2, and nothing is written."""
    before = sorted(Path.cwd().iterdir())
    done = lab("compare", *words)
    assert done.code == 2
    assert fact in done.err
    assert sorted(Path.cwd().iterdir()) == before


def test_file_that_is_no_circuit_is_named(lab: Lab, files: dict[str, Path]) -> None:
    """Exit 3 with the file."""
    Path("bad.json").write_text("{}", "utf-8")
    done = lab("compare", files["one"], "bad.json")
    assert done.code == 3
    assert "bad.json" in done.err


def test_names_of_files_send_nothing_to_the_terminal(lab: Lab, files: dict[str, Path]) -> None:
    """Control characters in a file's name and in a circuit are shown, not obeyed."""
    bad = Path("a\x1b[2Jb.json")
    circuit = circuit_of(random_edges(4), model="m", n_layers=2, method="\x1b[31mred")
    circuitlab.write_circuit(circuit, bad)
    for flags in ([], ["-o", "x.svg"]):
        done = lab("compare", files["one"], bad, *flags)
        assert done.code == 0, done.err
        assert "\x1b" not in done.out + done.err
    assert "\x1b" not in Path("x.svg").read_text("utf-8")
    assert json.loads(lab("compare", files["one"], bad, "--json").out)


def test_it_loads_no_torch(files: dict[str, Path]) -> None:
    """Comparing files is quick: no model library is imported."""
    import subprocess
    import sys

    code = (
        "import sys; from circuitlab.cli import main; "
        "sys.argv = ['circuitlab', 'compare', 'one.json', 'two.json']\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "print('LOADED', *(n for n in ('torch', 'transformers', 'nnsight') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("LOADED")
