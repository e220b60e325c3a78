"""A finished circuit as a result on stdout: a table, lines, or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.cli import screen
from circuitlab.errors import OptionError
from circuitlab.graph import effect_name

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph

SCHEMA = "circuitlab-run/1"

#: Edges shown in the summary.
SHOWN = 10


def show(
    circuit: CircuitGraph,
    paths: Sequence[Path],
    warnings: Sequence[str],
    run_id: str,
    *,
    as_json: bool,
) -> None:
    """Print the result."""
    if as_json:
        screen.out(json.dumps(_document(circuit, paths, warnings, run_id), allow_nan=False))
        return
    facts = circuit.graph
    title = f"{facts['model']} · {facts['task']} · {facts['metric']} · {facts['analysis']}"
    screen.pairs(title, _summary(circuit, paths))


def metrics(circuit: CircuitGraph) -> dict[str, float | None]:
    """The numbers that ``--fail-under`` and ``--json`` know, None where undefined."""
    base, whole = circuit.graph["baseline"], circuit.graph.get("completeness")
    found: dict[str, float | None] = {
        "accuracy": base["accuracy"],
        "metric_clean": base["clean"],
        "metric_corrupt": base["corrupt"],
        "effect": base["effect"],
        "edges": float(circuit.number_of_edges()),
        "components": float(circuit.number_of_nodes()),
    }
    if whole is not None:
        found |= {"completeness_gap": whole["gap"], "explained_share": whole["share"]}
    if (check := circuit.graph.get("exact_check")) is not None:
        found["confirmed_share"] = check["confirmed_share"]
    return found


def threshold(text: str) -> tuple[str, float]:
    """``accuracy=0.9`` read as a name and a number.

    Raises:
        OptionError: it is not of that form.
    """
    name, _, number = text.partition("=")
    try:
        return name.strip().replace("-", "_"), float(number)
    except ValueError:
        raise OptionError(f"--fail-under {text!r} is not NAME=NUMBER, as accuracy=0.9") from None


def _document(
    circuit: CircuitGraph, paths: Sequence[Path], warnings: Sequence[str], run_id: str
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "paths": [str(path) for path in paths],
        "metrics": metrics(circuit),
        "warnings": list(warnings),
        "provenance": {key: value for key, value in circuit.graph.items() if key != "warnings"},
        "edges": [
            {"source": s, "target": t, "port": p, **circuit.edges[s, t, p]}
            for s, t, p, _ in circuit.effects()
        ],
    }


def _summary(circuit: CircuitGraph, paths: Sequence[Path]) -> dict[str, str]:
    facts = circuit.graph
    rows: dict[str, str] = {}
    if (whole := facts.get("completeness")) is not None:
        rows["completeness gap"] = _completeness(whole)
    if (check := facts.get("exact_check")) is not None:
        rows["exact check"] = (
            f"{check['confirmed']} of the {check['checked']} strongest edges confirmed by patching "
            f"each one ({check['confirmed_share']:.0%} of their scores)"
        )
    verdict = facts.get("verdict")
    if verdict == "not established":
        rows["circuit"] = f"NOT ESTABLISHED: {facts['verdict_reason']}"
    elif verdict is not None:
        rows["circuit"] = verdict
    base = facts["baseline"]
    interval = base["interval"]
    bounds = interval if isinstance(interval, str) else f"[{interval[0]:.3g}, {interval[1]:.3g}]"
    rows["task"] = (
        f"{base['n_pairs']} pairs, metric {base['clean']:.3g} clean, {base['corrupt']:.3g} corrupt; "
        f"effect {base['effect']:.3g}, 95 % interval {bounds}; accuracy {base['accuracy']:.0%}"
    )
    rows["method"] = ", ".join(filter(None, (facts.get("method"), facts.get("ablation"))))
    total = facts.get("n_edges_total")
    of = f" of {total:,}" if total else ""
    size = f"{circuit.number_of_edges():,}{of} edges, {circuit.number_of_nodes()} components"
    rows["size"] = size
    rows["score"] = str(facts["score"])
    rows |= _edges(circuit, established=verdict != "not established")
    rows["time"] = f"{facts['seconds']:.1f} s"
    if paths:
        rows["written"] = ", ".join(map(str, paths))
    rows["next"] = _next(paths)
    return {key: value for key, value in rows.items() if value}


def _completeness(whole: dict[str, Any]) -> str:
    share = "undefined" if whole["share"] is None else f"{whole['share']:.0%}"
    at_clean = whole["at_clean"] / whole["effect"] if whole["effect"] else None
    near = "" if at_clean is None else f"; {at_clean:.0%} nearest the clean prompt"
    return (
        f"{whole['gap']:+.3g} of an effect of {whole['effect']:+.3g} "
        f"(scores explain {share}{near})"
    )


def _edges(circuit: CircuitGraph, *, established: bool) -> dict[str, str]:
    """The strongest effects; called candidates where they are not established."""
    word = "edge" if established else "candidate, not found"
    rows = {}
    for number, (source, target, port, score) in enumerate(circuit.effects(), start=1):
        if number > SHOWN:
            rows["…"] = f"{circuit.number_of_edges() - SHOWN:,} more"
            break
        exact = circuit.edges[source, target, port].get("exact")
        checked = "" if exact is None else f"   exact {exact:+.3f}"
        rows[f"{word} {number}"] = f"{effect_name(source, target, port)}   {score:+.3f}{checked}"
    return rows


def _next(paths: Sequence[Path]) -> str:
    files = [path for path in paths if path.name.endswith(".json") and not path.name.endswith(".mib.json")]
    if files:
        return f"circuitlab render {files[0]} --output {files[0].with_suffix('.pdf')}"
    if paths:
        return "add --output circuit.json to keep the circuit and its provenance"
    return "no file written: add --output circuit.svg --output circuit.json"
