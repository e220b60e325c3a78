"""Discrimination: whether scores rank the edges of a known circuit above all others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from circuitlab.errors import GraphError, NumericsError
from circuitlab.graph import effect_name
from circuitlab.selection import NEGLIGIBLE
from circuitlab.wiring import Edge, Receiver

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.wiring import Wiring


@dataclass(frozen=True)
class Discrimination:
    """How well absolute scores tell the known edges from the others.

    Attributes:
        auroc: Probability that a known edge has a larger absolute score than another, ties counted
            half: 1 for a perfect ranking, 0.5 for a random one.
        average_precision: Mean precision at the rank of each known edge; edges that tie are taken
            together.
        n_known: Known edges.
        n_edges: All edges.
    """

    auroc: float
    average_precision: float
    n_known: int
    n_edges: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return asdict(self)


def discrimination(
    wiring: Wiring, scores: Tensor, known: Collection[tuple[str, str, str]]
) -> Discrimination:
    """Hold scores of every edge against the edges that are known to do the task.

    Scores below a millionth of the largest are rounding, and tie with 0.

    Args:
        wiring: The model's residual graph.
        scores: ``[n_sources, n_receivers]`` in the order of ``wiring``.
        known: Edges of the true circuit, as (source, target, port).

    Raises:
        GraphError: a known edge is none of the model's, or all or none are known.
        NumericsError: a score is NaN or infinite.
    """
    true = {Edge(*edge) for edge in known}
    if unknown := true - {*wiring.edges}:
        raise GraphError(
            f"edge {effect_name(*min(unknown))} is none of this model's; name edges that it has"
        )
    if not 0 < len(true) < wiring.n_edges:
        raise GraphError(
            f"{len(true)} of {wiring.n_edges} edges are known; a ranking needs some, and others"
        )
    rows, columns, values = wiring.source_rows, wiring.receiver_columns, scores.tolist()
    sizes = {
        edge: abs(values[rows[edge.source]][columns[Receiver(edge.target, edge.port)]])
        for edge in wiring.edges
    }
    for edge, size in sizes.items():
        if not size < float("inf"):
            raise NumericsError(f"edge {effect_name(*edge)} has score {size}; run in a wider type")
    least = NEGLIGIBLE * max(sizes.values())
    ranked = sorted(
        ((0.0 if size <= least else size, edge in true) for edge, size in sizes.items()),
        reverse=True,
    )
    n_other = wiring.n_edges - len(true)
    above = correct = 0
    precision = area = 0.0
    for _, group in groupby(ranked, key=lambda item: item[0]):
        hits = [hit for _, hit in group]
        found, missed = sum(hits), len(hits) - sum(hits)
        area += found * (n_other - (above - correct) - missed / 2)
        above, correct = above + len(hits), correct + found
        precision += found * correct / above
    return Discrimination(
        area / (len(true) * n_other), precision / len(true), len(true), wiring.n_edges
    )
