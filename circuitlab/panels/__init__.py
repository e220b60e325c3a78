"""Panels: plots as plain data that an analysis puts beside its circuit, drawn by ``plots``.

A panel checks itself when it is made. ``panel.add_to(circuit)`` appends it to
``circuit.graph["plots"]`` as plain JSON, and :func:`panels_of` reads it back, from files of
strangers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from circuitlab.errors import GraphError
from circuitlab.panels.cells import Heatmap, Image, TextTable
from circuitlab.panels.lines import Curve, Curves
from circuitlab.panels.marks import Bar, Bars, Guide, Histogram, Point, Scatter, UpSet
from circuitlab.panels.panel import Panel

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph

__all__ = [
    "KINDS",
    "Bar",
    "Bars",
    "Curve",
    "Curves",
    "Guide",
    "Heatmap",
    "Histogram",
    "Image",
    "Panel",
    "Point",
    "Scatter",
    "TextTable",
    "UpSet",
    "panels_of",
]

KINDS: Mapping[str, type[Panel]] = {
    panel.kind: panel
    for panel in (Heatmap, Curves, Scatter, Bars, UpSet, Histogram, TextTable, Image)
}


def panels_of(circuit: CircuitGraph) -> list[Panel]:
    """The panels in ``circuit.graph["plots"]``.

    Raises:
        GraphError: they do not have the form that panels give them.
    """
    found = circuit.graph.get("plots", [])
    if not isinstance(found, list):
        raise GraphError(
            f'graph["plots"] of the circuit is a {type(found).__name__}, not a list of panels; run '
            f"the analysis again"
        )
    return [_panel(data, number) for number, data in enumerate(found, 1)]


def _panel(data: object, number: int) -> Panel:
    try:
        kind = data.get("kind") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(kind, str) or kind not in KINDS:
            raise GraphError(f"it is none of {', '.join(KINDS)}")
        return KINDS[kind].from_json({k: value for k, value in data.items() if k != "kind"})
    except GraphError as error:
        raise GraphError(
            f"panel {number} of the circuit cannot be plotted: {error}; run the analysis again"
        ) from error
