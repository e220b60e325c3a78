"""Medians, ratios and the table of a benchmark's rounds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One timing of a work, which may be the mean of several calls.

    Attributes:
        seconds: Wall time of one call.
        cpu_seconds: Processor time of one call, all threads of this process.
        foreign_cores: Cores other processes kept busy meanwhile; None where /proc is missing.
    """

    seconds: float
    cpu_seconds: float
    foreign_cores: float | None


def floor(samples: dict[str, Sample]) -> float:
    """Seconds of two plain forward passes, one of them back again: the least EAP could cost."""
    return samples["forward"].seconds + samples["backward"].seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rounds: list[dict[str, Sample]], work: str, base: str) -> dict[str, float]:
    """How many times as long as ``base`` a work took, within rounds."""
    return spread([r[work].seconds / r[base].seconds for r in rounds])


def summarize(rounds: list[dict[str, Sample]], memory: dict[str, float]) -> dict[str, Any]:
    """Per work: seconds, ratios to the floor of the same round, peak memory and its ratio."""
    summary: dict[str, Any] = {"floor": {"seconds": spread([floor(r) for r in rounds])}}
    for name in rounds[0]:
        row: dict[str, Any] = {"seconds": spread([r[name].seconds for r in rounds])}
        row["x floor"] = spread([r[name].seconds / floor(r) for r in rounds])
        foreign = [f for r in rounds if (f := r[name].foreign_cores) is not None]
        row["foreign_cores"] = max(foreign) if foreign else None
        summary[name] = row
    for name, peak in memory.items():
        row = summary.setdefault(name, {})
        row["peak_mib"], row["x backward's peak"] = peak, peak / memory["backward"]
    return summary


def add_peers(summary: dict[str, Any], peers: dict[str, dict[str, Any]]) -> None:
    """A row per peer; its ratios are of medians, for it ran in a process of its own."""
    for name, measured in peers.items():
        seconds = spread([float(s) for s in measured["seconds"]])
        row: dict[str, Any] = {"seconds": seconds}
        least = summary["floor"]["seconds"]["median"]
        row["x floor"] = {key: value / least for key, value in seconds.items()}
        if peak := measured.get("peak_mib"):
            row["peak_mib"] = peak
            if backward := summary["backward"].get("peak_mib"):
                row["x backward's peak"] = peak / backward
        summary[name] = row


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    heads = ["work", "median s", "min - max s", "x floor (min - max)"]
    heads += ["peak MiB", "x backward's peak", "foreign cores"]
    rows = [heads]
    for name, row in summary.items():
        cells = dict.fromkeys(heads, "") | {"work": name}
        if seconds := row.get("seconds"):
            cells["median s"] = f"{seconds['median']:.4f}"
            cells["min - max s"] = f"{seconds['min']:.4f} - {seconds['max']:.4f}"
        if ratio := row.get("x floor"):
            text = f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})"
            cells["x floor (min - max)"] = text
        if "peak_mib" in row:
            cells["peak MiB"] = f"{row['peak_mib']:.0f}"
        if "x backward's peak" in row:
            cells["x backward's peak"] = f"{row[heads[5]]:.2f}"
        if row.get("foreign_cores") is not None:
            cells["foreign cores"] = f"{row['foreign_cores']:.1f}"
        rows.append(list(cells.values()))
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
