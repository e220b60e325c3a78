"""``circuitlab compare``: two circuits side by side, or more of them laid over one another."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuitlab.cli import screen
from circuitlab.labels import visible

if TYPE_CHECKING:
    from circuitlab.comparing import Comparison
    from circuitlab.graph import CircuitGraph

#: Edges that are listed.
SHOWN = 10


@click.command()
@click.argument("circuits", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), multiple=True,
    help="File to write; its suffix names the format. May be given several times.",
)  # fmt: skip
@click.option("--top", type=click.IntRange(min=0), help="Only the strongest edges of each.")
@click.option("--names-only", is_flag=True, help="Compare names of edges, of models of any shape.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON document on stdout.")
def compare(
    circuits: tuple[Path, ...],
    output: tuple[Path, ...],
    top: int | None,
    names_only: bool,
    as_json: bool,
) -> None:
    """Compare two circuits edge by edge; lay three or more over one another.

    With --top the other edges are no part of a circuit, but their scores count all the same.
    """
    from circuitlab.cli.installed import load_registry
    from circuitlab.export import check_target, read_circuit

    if len(circuits) < 2:
        raise click.UsageError("give two circuits or more")
    if names_only and len(circuits) > 2:
        raise click.UsageError("--names-only compares two circuits")
    exporters = load_registry().exporters if output else {}
    for path in output:
        check_target(path, exporters)
    read = {name: read_circuit(path) for name, path in _names(circuits).items()}
    if top is not None:
        for circuit in read.values():
            _cut(circuit, top)
    if len(read) > 2:
        from circuitlab.combining import overlay_circuits

        whole = overlay_circuits(read)
        _write(whole, output, exporters)
        _show_overlay(whole, list(read), output, as_json=as_json)
        return
    from circuitlab.comparing import compare_circuits

    a, b = read.values()
    first, second = read
    comparison = compare_circuits(a, b, names=(first, second), names_only=names_only)
    _write(comparison.circuit, output, exporters)
    _show(comparison, output, as_json=as_json)


def _cut(circuit: CircuitGraph, top: int) -> None:
    """Keep the strongest edges; the others stay as measured and not kept."""
    from circuitlab.comparing import kept_edges

    for edge in list(kept_edges(circuit))[top:]:
        circuit.edges[edge]["kept"] = False


def _names(paths: tuple[Path, ...]) -> dict[str, Path]:
    """What each circuit is called: its file's name, its whole path where two have one name."""
    short = [path.name.partition(".")[0] or path.name for path in paths]
    if len(set(short)) < len(paths):
        short = [str(path) for path in paths]
    if len(set(short)) < len(paths):
        raise click.UsageError("one circuit is given twice")
    return dict(zip(short, paths, strict=True))


def _write(circuit: CircuitGraph, paths: tuple[Path, ...], exporters: Mapping[str, Any]) -> None:
    from circuitlab.export import write_circuit

    for path in paths:
        for warning in write_circuit(circuit, path, exporters):
            screen.warn(warning)


def _show(comparison: Comparison, paths: tuple[Path, ...], *, as_json: bool) -> None:
    if as_json:
        _out({**comparison.to_json(), "paths": [str(path) for path in paths]})
        return
    a, b = comparison.names
    _lines(f"{a} · {b}", comparison.lines(), paths)
    from circuitlab.graph import effect_name

    owner = dict.fromkeys(comparison.only_a, f"only {a}")
    owner |= dict.fromkeys(comparison.only_b, f"only {b}")
    rows = [
        (effect_name(*edge), _figure(one), _figure(other), owner.get(edge, "both"))
        for edge, (one, other) in comparison.scores.items()
    ]
    _table(("edge", a, b, "in"), rows)


def _show_overlay(
    whole: CircuitGraph, names: list[str], paths: tuple[Path, ...], *, as_json: bool
) -> None:
    rows = [(effect, whole.edges[effect[:3]]) for effect in whole.effects()]
    if as_json:
        edges = [{"source": s, "target": t, "port": p, **data} for (s, t, p, _), data in rows]
        facts = {"names": names, "score": whole.graph["score"]}
        told = {"findings": whole.graph["findings"], "paths": [str(path) for path in paths]}
        _out({"schema": "circuitlab-overlay/1", **facts, **told, "edges": edges})
        return
    from circuitlab.graph import effect_name

    _lines(" · ".join(names), whole.graph["findings"], paths)
    sign = {True: "same", False: "MIXED", None: ""}
    table = [
        (
            effect_name(*effect[:3]),
            *(_figure(data["scores"].get(name)) for name in names),
            f"{len(data['kept_by'])} of {len(names)}",
            sign[data.get("signs_agree")],
        )
        for effect, data in rows
    ]
    _table(("edge", *names, "kept by", "sign"), table)


def _lines(title: str, values: Mapping[str, str], paths: tuple[Path, ...]) -> None:
    written = {"written": ", ".join(map(str, paths))} if paths else {}
    screen.pairs(title, {**values, **written})


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        more = len(rows) - SHOWN
        rest = [(f"… {more:,} more", *[""] * (len(header) - 1))] if more > 0 else []
        screen.table(tuple(map(visible, header)), [*rows[:SHOWN], *rest])
    sys.stdout.flush()


def _figure(score: float | None) -> str:
    return "" if score is None else f"{score:+.3f}"


def _out(document: Mapping[str, Any]) -> None:
    screen.out(json.dumps(document, allow_nan=False))
    sys.stdout.flush()
