"""A finished circuit as a result on stdout: a table, lines, or one JSON document."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.cli import screen
from circuitlab.errors import OptionError
from circuitlab.graph import effect_name

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph

SCHEMA = "circuitlab-run/1"

#: Names that ``--fail-under`` takes.
METRIC_NAMES = (
    "accuracy", "metric_clean", "metric_corrupt", "effect", "edges", "components",
    "completeness_gap", "explained_share", "confirmed_share",
)  # fmt: skip

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
    end = {"time": f"{facts['seconds']:.1f} s"}
    if paths:
        end["written"] = ", ".join(map(str, paths))
    end["next"] = _next(paths)
    if screen.plain(sys.stdout):
        screen.pairs(title, {**_summary(circuit), **_edge_lines(circuit), **end})
        return
    screen.pairs(title, _summary(circuit))
    if circuit.number_of_edges():
        screen.table((_edge_word(circuit), "score", "patched", ""), _edge_rows(circuit))
    screen.pairs("", end)


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
        OptionError: it is not of that form, or names no metric of a result.
    """
    name, _, number = text.partition("=")
    name = name.strip().replace("-", "_")
    try:
        least = float(number)
    except ValueError:
        least = math.nan
    if not math.isfinite(least):
        raise OptionError(f"--fail-under {text!r} is not NAME=NUMBER, as accuracy=0.9")
    if name not in METRIC_NAMES:
        raise OptionError(
            f"--fail-under {text!r}: a result has no metric {name!r}; "
            f"its metrics are {', '.join(METRIC_NAMES)}"
        )
    return name, least


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


def _summary(circuit: CircuitGraph) -> dict[str, str]:
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
        f"{base['n_pairs']} pairs, metric {base['clean']:.3g} clean, {base['corrupt']:.3g} "
        f"corrupt; effect {base['effect']:.3g}, 95 % interval {bounds}; "
        f"accuracy {base['accuracy']:.0%}"
    )
    rows["method"] = ", ".join(filter(None, (facts.get("method"), facts.get("ablation"))))
    total = facts.get("n_edges_total")
    of = f" of {total:,}" if total else ""
    size = f"{circuit.number_of_edges():,}{of} edges, {circuit.number_of_nodes()} components"
    rows["size"] = size
    rows["score"] = str(facts["score"])
    return {key: value for key, value in rows.items() if value}


def _completeness(whole: dict[str, Any]) -> str:
    if whole["share"] is None:
        return (
            f"{whole['gap']:+.3g}; its share is undefined, there is no reliable effect to explain"
        )
    near = whole["at_clean"] / whole["effect"]
    return (
        f"{whole['gap']:+.3g} of an effect of {whole['effect']:+.3g} (scores explain "
        f"{_percent(whole['share'])}; {_percent(near)} nearest the clean prompt)"
    )


def _percent(share: float) -> str:
    """A share in whole percent, without a minus before zero."""
    return f"{round(share, 2) + 0.0:.0%}"


def _edge_word(circuit: CircuitGraph) -> str:
    """What an effect is called: a candidate, where the circuit is not established."""
    return "candidate, not found" if circuit.graph.get("verdict") == "not established" else "edge"


def _edge_rows(circuit: CircuitGraph) -> list[tuple[str, str, str, str]]:
    """Name, score, exact effect and mark of the strongest effects."""
    rows = []
    for source, target, port, score in islice(circuit.effects(), SHOWN):
        data = circuit.edges[source, target, port]
        exact, confirmed = data.get("exact"), data.get("confirmed")
        mark = "" if confirmed is None else "confirmed" if confirmed else "not confirmed"
        shown = "" if exact is None else f"{exact:+.3f}"
        rows.append((effect_name(source, target, port), f"{score:+.3f}", shown, mark))
    if (more := circuit.number_of_edges() - SHOWN) > 0:
        rows.append((f"… {more:,} more", "", "", ""))
    return rows


def _edge_lines(circuit: CircuitGraph) -> dict[str, str]:
    """The same as one line each."""
    lines = {}
    for number, (name, score, exact, mark) in enumerate(_edge_rows(circuit), start=1):
        checked = f"   patched {exact}, {mark}" if exact else ""
        key = f"{_edge_word(circuit)} {number}" if score else "…"
        lines[key] = f"{name}   {score}{checked}" if score else name.removeprefix("… ")
    return lines


def _next(paths: Sequence[Path]) -> str:
    files = [
        path
        for path in paths
        if path.name.endswith(".json") and not path.name.endswith(".mib.json")
    ]
    if files:
        return f"circuitlab render {files[0]} --output {files[0].with_suffix('.pdf')}"
    if paths:
        return "add --output circuit.json to keep the circuit and its provenance"
    return "no file written: add --output circuit.svg --output circuit.json"
