"""Curve: faithfulness of the strongest edges, from a thousandth of all edges to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from circuitlab.edge_sets import existing_edges
from circuitlab.errors import GraphError, NumericsError, OptionError
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.faithfulness import Faithfulness, faithfulness
from circuitlab.evaluation.kept import kept_edges
from circuitlab.graph import CircuitGraph
from circuitlab.labels import counted
from circuitlab.wiring import Receiver, Wiring

Rule = Literal["absolute", "helping"]

#: Shares of all edges in MIB.
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

RULES: dict[Rule, str] = {
    "absolute": "edges of largest absolute score first, ties by name; not pruned",
    "helping": "edges of lowest score first (those that help most), ties by name; not pruned",
}


@dataclass(frozen=True, kw_only=True)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size.

    Attributes:
        fractions: Shares of all edges, increasing.
        n_edges: Edges of each circuit: the share of all edges, rounded down.
        points: Faithfulness of each.
        cpr: Area under the faithfulness, on a linear axis of fractions, by trapezoids; the better
            the larger. None where the faithfulness is not defined.
        cmd: Area of abs(1 - faithfulness); the better the smaller.
        rule: Which edges a circuit has, in words.
    """

    fractions: tuple[float, ...]
    n_edges: tuple[int, ...]
    points: tuple[Faithfulness, ...]
    cpr: float | None
    cmd: float | None
    rule: str

    @property
    def faithfulness(self) -> list[float | None]:
        """The value at each fraction."""
        return [point.value for point in self.points]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {
            "fractions": list(self.fractions),
            "n_edges": list(self.n_edges),
            "points": [point.to_json() for point in self.points],
            "cpr": self.cpr,
            "cmd": self.cmd,
            "rule": self.rule,
        }


def faithfulness_curve(
    runs: CircuitRuns,
    scores: Tensor | CircuitGraph,
    *,
    rule: Rule = "absolute",
    grid: Sequence[float] = GRID,
    seed: int = 0,
) -> FaithfulnessCurve:
    """Faithfulness of the strongest edges for a grid of sizes, and its areas.

    The measures of MIB's circuit track (Mueller et al. 2025, arXiv:2504.13151): CPR is the area
    under the faithfulness, CMD that of its distance from 1. Areas depend on the rule by which
    edges are chosen, which is why it is part of the result.

    Args:
        runs: At level ``edge``.
        scores: ``[n_sources, n_receivers]`` in the order of the wiring, entries that are no edge
            are ignored; or a circuit with a score of every edge of the model.
        rule: ``absolute`` takes edges by absolute score, ``helping`` by how far below 0 it is.
        grid: Shares of all edges, increasing, in (0, 1].
        seed: Of the intervals.

    Raises:
        OptionError: the rule, the grid or the level of the runs does not fit.
        GraphError: the circuit has no score for some edge, or is of another model.
        NumericsError: a score is not finite.
    """
    if rule not in RULES:
        raise OptionError(f"rule {rule!r} does not exist; use {' or '.join(RULES)}")
    if runs.level != "edge":
        raise OptionError(f"runs at level {runs.level} cannot take single edges; use level edge")
    rises = all(a < b for a, b in pairwise((0.0, *grid)))
    if not grid or not rises or grid[-1] > 1:
        raise OptionError(f"grid {list(grid)}: give increasing shares of all edges, in (0, 1]")
    wiring = runs.model.wiring
    ranked = _ranked(wiring, scores, rule)
    sizes = tuple(int(share * wiring.n_edges) for share in grid)
    masks = torch.zeros(len(sizes), len(wiring.sources), len(wiring.receivers), dtype=torch.bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask.view(-1)[ranked[:size]] = True
    points = tuple(
        faithfulness(kept, runs.whole, runs.empty, seed=seed) for kept in runs.metric(masks)
    )
    values = [point.value for point in points]
    return FaithfulnessCurve(
        fractions=tuple(grid),
        n_edges=sizes,
        points=points,
        cpr=_area(grid, values),
        cmd=_area(grid, [None if value is None else abs(1 - value) for value in values]),
        rule=RULES[rule],
    )


def _area(grid: Sequence[float], values: Sequence[float | None]) -> float | None:
    area = 0.0
    for (left, right), (first, second) in zip(pairwise(grid), pairwise(values), strict=True):
        if first is None or second is None:
            return None
        area += (right - left) * (first + second) / 2
    return area


def _ranked(wiring: Wiring, scores: Tensor | CircuitGraph, rule: Rule) -> Tensor:
    """Places of all edges in a flat mask, the first to be taken first."""
    table = _table(wiring, scores) if isinstance(scores, CircuitGraph) else scores.double().cpu()
    exists = existing_edges(wiring)
    if table.shape != exists.shape:
        raise GraphError(
            f"scores have shape {list(table.shape)}; give [n_sources, n_receivers], here "
            f"{list(exists.shape)}"
        )
    places = exists.flatten().nonzero().flatten()
    found = table.flatten()[places]
    if not torch.isfinite(found).all():
        row, column = divmod(int(places[~torch.isfinite(found)][0]), exists.shape[1])
        target, port = wiring.receivers[column]
        raise NumericsError(
            f"edge {wiring.sources[row]}->{target}{f'<{port}>' if port else ''} has score "
            f"{float(table[row, column])}; run in a wider type (--dtype float32)"
        )
    values = (-found.abs() if rule == "absolute" else found).tolist()
    names = [
        (wiring.sources[place // exists.shape[1]], *wiring.receivers[place % exists.shape[1]])
        for place in places.tolist()
    ]
    order = sorted(range(len(values)), key=lambda number: (values[number], names[number]))
    return places[order]


def _table(wiring: Wiring, circuit: CircuitGraph) -> Tensor:
    """The scores of a circuit that has one for every edge."""
    kept_edges(circuit, wiring)
    table = torch.full((len(wiring.sources), len(wiring.receivers)), torch.nan).double()
    for source, target, port, data in circuit.edges(keys=True, data=True):
        column = wiring.receiver_columns.get(Receiver(target, port))
        if data.get("kind") is None and column is not None and source in wiring.source_rows:
            table[wiring.source_rows[source], column] = float(data["score"])
    missing = int(table[existing_edges(wiring)].isnan().sum())
    if missing:
        raise GraphError(
            f"the circuit has no score for {missing:,} of {counted(wiring.n_edges, 'edge')}; a "
            f"curve takes all of them in order: trace with --top all"
        )
    return table
