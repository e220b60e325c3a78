"""Panels of what was measured: needed or sufficient, mixtures of gates, doses, hypotheses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuitlab import Bar, Bars, Curve, Curves, Panel, Point, Scatter, UpSet

if TYPE_CHECKING:
    from circuitlab import CircuitGraph

#: Strongest effects that are points, gates among them, gates with a table and their members.
MAX_POINTS, MAX_GATES, MAX_TABLES, MAX_MEMBERS = 2000, 8, 4, 4


def add_panels(circuit: CircuitGraph, metric: str) -> None:
    """Add panels of all that the circuit has data for.

    Args:
        circuit: Its effects may have ``noise`` and ``denoise``, its graph ``doses``,
            ``hypotheses`` and ``gates``.
        metric: Name of what was measured.
    """
    graph, gates = circuit.graph, circuit.graph.get("gates", [])
    panels = [*_doses(graph.get("doses")), *_hypotheses(graph.get("hypotheses", []))]
    for panel in (*panels, *_needed(circuit, gates), *_mixtures(gates, metric)):
        panel.add_to(circuit)


def _doses(doses: Mapping[str, Any] | None) -> Iterator[Panel]:
    """A small picture of each dose–response curve."""
    if not doses or not doses["curves"]:
        return
    yield Curves(
        title="Dose–response: how much of a patch it takes",
        caption=(
            "α = 0: each run's own value; α = 1: the other run's; beyond: extrapolated.\n"
            "Band: interval over pairs. Dotted: the threshold."
        ),
        x=doses["alphas"],
        x_label="dose α",
        y_label=doses["what"],
        curves=[
            Curve(
                name=curve["name"],
                mean=curve["mean"],
                lo=curve["lo"],
                hi=curve["hi"],
                mark=curve["threshold"],
                note=f"slope {_signed(curve['slope'])}",
            )
            for curve in doses["curves"]
        ],
        apart=True,
    )


def _hypotheses(rows: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """A bar for each path hypothesis for which there is an effect to explain."""
    bars = []
    for row in [row for row in rows if row["explained"] is not None]:
        kept = row["mode"] == "denoise"
        bars.append(
            Bar(
                name=row["name"],
                value=row["explained"],
                lo=row["lo"],
                hi=row["hi"],
                kind="only these clean: kept" if kept else "only these corrupt: lost",
                note=f"{row['n_paths']:,} path{'s' * (row['n_paths'] != 1)}",
            )
        )
    if bars:
        yield Bars(
            title="Path hypotheses",
            caption="1: they explain all of the effect; 0: nothing. Line: interval over pairs.",
            what="share of the effect explained",
            bars=bars,
            reference=1.0,
        )


def _needed(circuit: CircuitGraph, gates: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    """Noising against denoising: an effect is a point, a gate stands beside its members."""
    points = list(_points(circuit))
    joined = list(_joined(gates))
    if not points and not joined:
        return
    noun = "component" if all("→" not in point.name for point in points) else "edge"
    caption = (
        f"One point per {noun}, larger with |score|. Right: needed, the task breaks when it alone "
        f"is corrupt. Up: it suffices, the task comes back when it alone is clean."
    )
    if joined:
        caption += " Yellow: a gate and its interaction; lines lead to its members, circled."
    if len(points) > MAX_POINTS:
        caption += f" Strongest {MAX_POINTS:,} of {len(points):,}."
    yield Scatter(
        title="Needed or sufficient? Noising against denoising",
        caption=caption,
        x_label="noising n: share of the effect lost when it alone is corrupt",
        y_label="denoising d: share restored when it alone is clean",
        points=[*points[:MAX_POINTS], *joined],
        guide="gates",
    )


def _points(circuit: CircuitGraph) -> Iterator[Point]:
    """Effects with a share in both directions, strongest first."""
    for source, target, port, score in circuit.effects():
        data = circuit.edges[source, target, port]
        kinds = {circuit.nodes[end]["kind"] for end in (source, target)}
        if data.get("noise") is None or data.get("denoise") is None or "gate" in kinds:
            continue
        name = f"{source} → {target}{':' + port if port else ''}"
        name = source if data.get("kind") == "total" else name
        yield Point(name=name, x=data["noise"], y=data["denoise"], weight=score)


def _joined(gates: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """Gates that are drawn; not those with nothing to divide by, whose own effect is flat."""
    for gate in [gate for gate in gates if gate.get("drawn", True)][:MAX_GATES]:
        members = list(zip(gate.get("noise", ()), gate.get("denoise", ()), strict=True))
        if members:
            x, y = (sum(place) / len(members) for place in zip(*members, strict=True))
            name = f"{gate['type']} {_signed(gate['interaction'])}\n{', '.join(gate['members'])}"
            yield Point(name=name, x=x, y=y, kind=gate["type"], members=members)


def _mixtures(gates: Sequence[Mapping[str, Any]], metric: str) -> Iterator[Panel]:
    """The metric in every mixture of a gate's members, and what sets add beyond their subsets."""
    known = [gate for gate in gates if gate.get("table")]
    known.sort(key=lambda gate: not gate.get("drawn", True))
    shown = [gate for gate in known if len(gate["members"]) <= MAX_MEMBERS][:MAX_TABLES]
    caption = (
        f"Left: {metric} with the members marked ● clean and the others corrupt.\n"
        f"Right: what each set of members adds beyond its subsets (dividends)."
    )
    if len(shown) < len(known):
        caption += f" {len(shown)} of {len(known)} gates."
    for gate in shown:
        kind = gate["type"]
        if not gate.get("drawn", True):
            kind = gate.get("relation") or kind
        yield UpSet(
            title=f"{gate['name']}: {kind}, interaction {_signed(gate['interaction'])}",
            caption=caption,
            what=metric,
            members=gate["members"],
            bars=[
                Bar(name=bits, value=mean, **({"lo": low, "hi": high} if low < high else {}))
                for bits, mean, low, high in gate["table"]
            ],
            dividends=[Bar(name=name, value=v) for name, v in gate["dividends"].items()],
        )
        caption = ""


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")
