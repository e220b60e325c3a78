"""Figures of a report, as SVGs: the circuit, and what was measured of it as panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from circuitlab import render
from circuitlab.errors import ResourceError
from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.panels import Bar, Bars, Curve, Curves, Histogram, Panel, Point, Scatter
from circuitlab.plots import show_plots

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Edges whose frequency is drawn, the rarest first.
_EDGES = 20


def figures(circuit: CircuitGraph, results: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """SVGs by name, and warnings.

    There are ``circuit``, and where they were measured ``pairs``, ``controls``, ``curve`` and
    ``stability``; without matplotlib ``circuit`` alone.
    """
    drawn = {"circuit": render.svg(circuit)}
    try:
        for name, panel in _panels(circuit, results):
            page = CircuitGraph()
            panel.add_to(page)
            drawn[name] = show_plots(page).svg + "\n"
    except ResourceError as error:
        return drawn, [f"plots are left out of the report: {error}"]
    return drawn, []


def _panels(circuit: CircuitGraph, results: Mapping[str, Any]) -> Iterator[tuple[str, Panel]]:
    yield "pairs", _pairs(results)
    if values := results["random_circuits"].get("values"):
        yield "controls", _controls(values, results["faithfulness"]["value"])
    if any(point["value"] is not None for point in results["curve"].get("points", [])):
        yield "curve", _curve(results["curve"])
    own = [
        edge
        for edge in results["stability"].get("inclusion", [])
        if circuit.has_edge(edge["source"], edge["target"], edge["port"])
    ]
    if own:
        yield "stability", _stability(own)


def _pairs(results: Mapping[str, Any]) -> Panel:
    rates = results["base_rates"]["per_pair"]
    points = [
        Point(name=str(number), x=clean, y=kept)
        for number, clean, kept in zip(
            rates["number"], rates["clean"], rates["circuit"], strict=True
        )
    ]
    return Scatter(
        title="Each held-out pair",
        x_label=f"{results['circuit']['metric']} of the model",
        y_label="of the circuit",
        points=points,
        guide="diagonal",
        caption="On the line the circuit does what the model does; numbers are those of pairs.",
    )


def _controls(values: list[float], value: float) -> Panel:
    return Histogram(
        title="Random circuits of this size",
        what="faithfulness",
        series={"random circuits": values, "this circuit": [value]},
    )


def _curve(curve: Mapping[str, Any]) -> Panel:
    points = curve["points"]
    ends = [point["interval"] or [None, None] for point in points]
    return Curves(
        title="Faithfulness by size",
        x=curve["fractions"],
        x_label="share of all edges",
        y_label="faithfulness",
        curves=[
            Curve(
                name="faithfulness",
                mean=[point["value"] for point in points],
                lo=[low for low, _ in ends],
                hi=[high for _, high in ends],
            )
        ],
        log_x=True,
        caption=curve["rule"],
    )


def _stability(edges: list[Mapping[str, Any]]) -> Panel:
    rarest = sorted(edges, key=lambda edge: edge["inclusion"])[:_EDGES]
    bars = [
        Bar(name=effect_name(edge["source"], edge["target"], edge["port"]), value=edge["inclusion"])
        for edge in rarest
    ]
    return Bars(
        title="How often each edge is found again",
        what="share of resamples",
        bars=bars,
        caption="Edges that are found again least often come first.",
    )
