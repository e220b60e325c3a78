"""A finished circuit as a result on stdout: a table, lines, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.cli import screen
from circuitlab.graph import effect_name
from circuitlab.labels import counted

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
    named = (facts.get(key) for key in ("model", "task", "metric", "analysis"))
    title = " · ".join(filter(None, named))
    end = {"time": f"{facts['seconds']:.1f} s"}
    if paths:
        end["written"] = ", ".join(map(str, paths))
    end["next"] = _next(paths)
    if screen.plain(sys.stdout):
        screen.pairs(title, {**_summary(circuit), **_edge_lines(circuit), **end})
        return
    screen.pairs(title, _summary(circuit))
    if circuit.number_of_edges():
        header = (_edge_word(circuit), "score", *_columns(circuit))
        rows = [(name, score, *cells.values()) for name, score, cells in _edge_rows(circuit)]
        if (more := sum(1 for _ in _told(circuit)) - SHOWN) > 0:
            rows.append((f"… {more:,} more", *[""] * (len(header) - 1)))
        screen.table(header, rows)
    screen.pairs("", end)


def metrics(circuit: CircuitGraph) -> dict[str, float | None]:
    """The numbers that ``--fail-under`` and ``--json`` know, None where undefined."""
    base, whole = circuit.graph.get("baseline"), circuit.graph.get("completeness")
    found: dict[str, float | None] = {}
    if base is not None:
        found = {
            "accuracy": base["accuracy"],
            "metric_clean": base["clean"],
            "metric_corrupt": base["corrupt"],
            "effect": base["effect"],
        }
    found["edges"] = float(circuit.number_of_edges())
    found["components"] = float(circuit.number_of_nodes())
    if whole is not None:
        found |= {"completeness_gap": whole["gap"], "explained_share": whole["share"]}
    if (check := circuit.graph.get("exact_check")) is not None:
        found["confirmed_share"] = check["confirmed_share"]
    return found


def _document(
    circuit: CircuitGraph, paths: Sequence[Path], warnings: Sequence[str], run_id: str
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "paths": [str(path) for path in paths],
        "metrics": metrics(circuit),
        "warnings": list(warnings),
        "provenance": {
            key: value for key, value in circuit.graph.items() if key not in ("warnings", "plots")
        },
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
    rows |= _checks(facts)
    verdict = facts.get("verdict")
    if verdict == "not established":
        rows["circuit"] = f"NOT ESTABLISHED: {facts['verdict_reason']}"
    elif verdict is not None:
        rows["circuit"] = verdict
    if (base := facts.get("baseline")) is not None:
        rows["task"] = _task(base)
    rows["method"] = ", ".join(filter(None, (facts.get("method"), facts.get("ablation"))))
    total = facts.get("n_edges_total")
    of = f" of {total:,}" if total else ""
    size, totals = circuit.number_of_edges(), _totals(circuit)
    shown = f"{size:,}{of} edges" if of and not totals else counted(size, _noun(totals))
    rows["size"] = f"{shown}, {counted(circuit.number_of_nodes(), 'component')}"
    rows |= {str(name): str(text) for name, text in facts.get("findings", {}).items()}
    rows["score"] = str(facts["score"])
    return {key: value for key, value in rows.items() if value}


def _task(base: dict[str, Any]) -> str:
    """What the model does on the task before anything is changed."""
    interval = base["interval"]
    bounds = interval if isinstance(interval, str) else f"[{interval[0]:.3g}, {interval[1]:.3g}]"
    return (
        f"{counted(base['n_pairs'], 'pair')}, metric {base['clean']:.3g} clean, "
        f"{base['corrupt']:.3g} corrupt; effect {base['effect']:.3g}, 95 % interval {bounds}; "
        f"accuracy {base['accuracy']:.0%}"
    )


def _noun(totals: bool) -> str:
    return "effect" if totals else "edge"


def _checks(facts: dict[str, Any]) -> dict[str, str]:
    """What patching showed, and what was done about it."""
    rows = {}
    if (check := facts.get("exact_check")) is not None:
        rows["exact check"] = (
            f"{check['confirmed']} of the {check['checked']} strongest edges confirmed by patching "
            f"each one ({check['confirmed_share']:.0%} of their scores)"
        )
        rows["agreement"] = _agreement(check)
        rows["missed edges"] = _missed(check["missed"])
    if (jumps := facts.get("jumps")) is not None:
        owners = sorted({jump["component"] or "?" for jump in jumps})
        n_pairs = len({jump["pair"] for jump in jumps})
        n_all = facts["baseline"]["n_pairs"]
        where = f", on {n_pairs} of {n_all} pairs, at {', '.join(owners)}" if jumps else ""
        rows["jumps"] = f"{len(jumps)}{where}"
    if (fallen := facts.get("fall_back")) is not None:
        rows["fall-back"] = (
            f"scores failed ({fallen['reason']}); below are exact effects of "
            f"{fallen['patched']:,} edges instead"
        )
    if (joint := facts.get("joint_check")) is not None:
        rows["joint check"] = (
            f"patching the circuit removes {_percent(joint['removed'])} of the effect, patching "
            f"all other edges leaves {_percent(joint['spared'])}"
        )
    return rows


def _agreement(check: dict[str, Any]) -> str:
    """How the scores of all edges agree with exact effects, by a sample."""
    found = check["agreement"]
    shown = {key: "undefined" if found[key] is None else f"{found[key]:.2f}" for key in found}
    return (
        f"by {len(check['sampled'])} patched edges, sign right for "
        f"{'no edge' if found['sign'] is None else _percent(found['sign']) + ' of edges'}, rank "
        f"correlation {shown['rank_correlation']}, effect per score {shown['slope']}"
    )


def _missed(missed: dict[str, Any]) -> str:
    low, high = missed["interval"]
    return (
        f"{missed['estimate']:.3g} of {missed['of']:,} outside the circuit do as much as its "
        f"weakest score (95 % interval {low:,} to {high:,}, {missed['patched']} patched)"
    )


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
    if circuit.graph.get("verdict") == "not established":
        return "candidate, not found"
    return _noun(_totals(circuit))


def _totals(circuit: CircuitGraph) -> bool:
    """Whether some arrow stands for a total effect, or for a gate, and not for an edge."""
    gates = any(kind == "gate" for _, kind in circuit.nodes(data="kind"))
    return gates or any(kind is not None for *_, kind in circuit.edges(data="kind"))


#: Data of effects that have a column, and how a value is written.
_COLUMNS: dict[str, Callable[[Any], str]] = {
    "exact": lambda value: f"{value:+.3f}",
    "confirmed": lambda value: "confirmed" if value else "not confirmed",
    "interval": lambda value: f"[{value[0]:.3g}, {value[1]:.3g}]",
    "noise": lambda value: _percent(value),
    "denoise": lambda value: _percent(value),
}
_HEADINGS = {"exact": "patched", "confirmed": "", "interval": "95 %"}


def _told(circuit: CircuitGraph) -> Iterator[tuple[str, str, str, float]]:
    """Effects, strongest first, without those that a gate tells of."""
    told = circuit.edges
    return (e for e in circuit.effects() if told[e[:3]].get("gate") not in circuit)


def _columns(circuit: CircuitGraph) -> tuple[str, ...]:
    """Headings of the columns for which an effect that is shown has a value."""
    return tuple(_HEADINGS.get(key, key) for key in _known(circuit))


def _known(circuit: CircuitGraph) -> list[str]:
    shown = [circuit.edges[s, t, p] for s, t, p, _ in islice(_told(circuit), SHOWN)]
    return [key for key in _COLUMNS if any(data.get(key) is not None for data in shown)]


def _edge_rows(circuit: CircuitGraph) -> list[tuple[str, str, dict[str, str]]]:
    """Name, score and further columns of the strongest effects."""
    rows, known = [], _known(circuit)
    for source, target, port, score in islice(_told(circuit), SHOWN):
        data = circuit.edges[source, target, port]
        cells = {key: "" if data.get(key) is None else _COLUMNS[key](data[key]) for key in known}
        rows.append((effect_name(source, target, port), f"{score:+.3f}", cells))
    return rows


def _edge_lines(circuit: CircuitGraph) -> dict[str, str]:
    """The same as one line each."""
    lines = {}
    for number, (name, score, cells) in enumerate(_edge_rows(circuit), start=1):
        said = [f"{_HEADINGS.get(key, key)} {text}".strip() for key, text in cells.items() if text]
        more = f"   {', '.join(said)}" if said else ""
        lines[f"{_edge_word(circuit)} {number}"] = f"{name}   {score}{more}"
    if (left := sum(1 for _ in _told(circuit)) - SHOWN) > 0:
        lines["…"] = f"{left:,} more"
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
