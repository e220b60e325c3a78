"""What ``attention-heads`` shows: compositions, copying, and eigenvalues of OV circuits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from circuitlab import Heatmap, Point, Scatter
from circuitlab_attention_heads.head_names import head_name

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph
    from circuitlab_attention_heads.composing import Measured
    from circuitlab_attention_heads.composition import Port

#: Writers, and readers, in one heat map.
SHOWN = 40
#: Heads whose eigenvalues are shown.
DISCS = 6


def add_panels(circuit: CircuitGraph, measured: Measured) -> None:
    """Add the plots to ``graph["plots"]``, and those of roles."""
    for port in measured.found.raw:
        _add_compositions(circuit, measured, port)
    _add_effects(circuit)
    _add_copying(circuit, measured)
    _add_eigenvalues(circuit, measured)
    for panel in [] if measured.roles is None else measured.roles.panels():
        panel.add_to(circuit)


def _add_compositions(circuit: CircuitGraph, measured: Measured, port: Port) -> None:
    scores = measured.found.times_chance(port)
    rows, columns = _strongest(scores), _strongest(scores.T)
    if not rows:
        return
    whole = len(rows) < SHOWN and len(columns) < SHOWN
    Heatmap(
        title=f"{port.upper()}-composition",
        caption="1 is what unrelated heads have."
        + ("" if whole else f" At most {SHOWN} writers and readers, by their largest score."),
        rows=[head_name(measured.heads[row]) for row in rows],
        columns=[head_name(measured.heads[column]) for column in columns],
        values=[[_finite(scores[row, column]) for column in columns] for row in rows],
        what="composition, × chance",
        row_label="writer",
        column_label="reader",
        diverging=False,
        notes=[[_note(scores[row, column]) for column in columns] for row in rows],
    ).add_to(circuit)


def _strongest(scores: Tensor) -> list[int]:
    """Rows with a score, at most :data:`SHOWN`, those of the largest, in forward order."""
    largest = scores.nan_to_num(-1).amax(1)
    order = largest.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return sorted(row for row in order if largest[row] >= 0)


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _note(value: Tensor) -> str:
    number = _finite(value)
    return "" if number is None else f"{number:.2f}"


def _add_effects(circuit: CircuitGraph) -> None:
    """Scores against what patching the same edges does, where they were patched."""
    points = [
        Point(
            name=f"{source} → {target}:{port}",
            x=data["score"],
            y=data["exact"],
            kind=port,
            weight=abs(data["exact"]),
        )
        for source, target, port, data in circuit.edges(keys=True, data=True)
        if "exact" in data
    ]
    if points:
        Scatter(
            title="weights and behaviour",
            caption="Heads that compose by their weights need not do so on these prompts. Larger "
            "points: larger effects.",
            x_label="composition, × chance",
            y_label="effect of patching the edge; negative helps",
            points=points,
        ).add_to(circuit)


def _add_copying(circuit: CircuitGraph, measured: Measured) -> None:
    scores = measured.copying.scores
    if not bool(scores.isfinite().any()):
        return
    Heatmap(
        title="copying",
        caption="Σ λ / Σ |λ| of each head's full OV circuit: 1 copies, -1 suppresses.",
        rows=[str(layer) for layer in range(scores.shape[0])],
        columns=[str(head) for head in range(scores.shape[1])],
        values=[[_finite(score) for score in row] for row in scores],
        what="copying score, -1 to 1",
        row_label="layer",
        column_label="head",
        notes=[[_note(score) for score in row] for row in scores],
    ).add_to(circuit)


def _add_eigenvalues(circuit: CircuitGraph, measured: Measured) -> None:
    """Eigenvalues of the heads that copy or suppress most."""
    scored = [head for head in measured.heads if math.isfinite(measured.copying.scores[head])]
    chosen = sorted(scored, key=lambda head: -abs(float(measured.copying.scores[head])))[:DISCS]
    points = []
    for head in sorted(chosen):
        values = measured.copying.eigenvalues[head]
        for value in (values / values.abs().max()).tolist():
            points.append(Point(name="", x=value.real, y=value.imag, kind=head_name(head)))
    if points:
        most = "" if len(chosen) == len(scored) else f" Of {len(chosen)} heads, by |copying|."
        Scatter(
            title="eigenvalues of OV circuits",
            caption=f"Of W_E W_OV W_U, / the largest of the head: copying lies to the right.{most}",
            x_label="real part",
            y_label="imaginary part",
            points=points,
            guide="unit-circle",
        ).add_to(circuit)
