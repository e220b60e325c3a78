"""Stability: whether other draws of the pairs would have given the same circuit.

Discovery is an estimator, and its variance belongs to its result (Méloux et al. 2025,
arXiv:2510.00845).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab.errors import OptionError
from circuitlab.evaluation.kept import kept_edges
from circuitlab.progress import track
from circuitlab.selection import circuit_of
from circuitlab.wiring import Edge

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.graph import CircuitGraph
    from circuitlab.wiring import Wiring

#: Bootstrap resamples of the pairs.
RESAMPLES = 20
#: An edge recurs when at least this share of resamples has it.
RECURS = 0.9


@dataclass(frozen=True)
class Stability:
    """What resampling the pairs does to a circuit.

    Attributes:
        inclusion: Share of resamples with each edge that the circuit or any of them has.
        recurring: Share of the circuit's edges that at least 90 % of the resamples have; None for a
            circuit without edges.
        jaccard: Mean over pairs of resamples of (edges in both) / (edges in either).
        n_resamples: How many.
        n_pairs: Pairs that each of them draws, with replacement.
        how: How the circuits were found.
    """

    inclusion: dict[Edge, float]
    recurring: float | None
    jaccard: float
    n_resamples: int
    n_pairs: int
    how: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON; edges that recur most first."""
        ranked = sorted(self.inclusion.items(), key=lambda item: (-item[1], item[0]))
        return {
            **vars(self),
            "inclusion": [{**edge._asdict(), "inclusion": share} for edge, share in ranked],
        }

    def write(self, circuit: CircuitGraph) -> None:
        """Give the circuit's edges the share of resamples that have them, as ``inclusion``."""
        for source, target, port, data in circuit.edges(keys=True, data=True):
            if (edge := Edge(source, target, port)) in self.inclusion:
                data["inclusion"] = self.inclusion[edge]


def stability(
    wiring: Wiring,
    kept: Collection[Edge],
    scores: Tensor,
    *,
    top: int | Literal["all"] = "all",
    threshold: float | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Stability:
    """Find the circuit again from resamples of cached scores.

    Args:
        wiring: The model's residual graph.
        kept: The circuit's edges.
        scores: Of each pair it was found on, ``[n_pairs, n_sources, n_receivers]``.
        top: As the circuit's own cut.
        threshold: As the circuit's own cut.
        n_resamples: How many.
        seed: Which.

    Raises:
        OptionError: ``n_resamples`` is below 2, or there are no pairs.
        NumericsError: a score is not finite.
    """
    draws = _draws(len(scores), n_resamples, seed)
    flat = scores.double().flatten(1)
    found = []
    for rows in draws:
        mean = flat[rows].mean(0).view(scores.shape[1:])
        found.append(kept_edges(circuit_of(wiring, mean, top=top, threshold=threshold), wiring))
    return _summed(kept, found, len(scores), "cut as the circuit was, from scores of each pair")


def rediscovered(
    wiring: Wiring,
    kept: Collection[Edge],
    rediscover: Callable[[list[int]], CircuitGraph],
    n_pairs: int,
    *,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Stability:
    """Find the circuit again by running its analysis on resamples of the pairs.

    Args:
        wiring: The model's residual graph.
        kept: The circuit's edges.
        rediscover: Finds a circuit on the pairs of the given rows, some more than once.
        n_pairs: Pairs that the circuit was found on.
        n_resamples: How many runs.
        seed: Of the resamples.

    Raises:
        OptionError: ``n_resamples`` is below 2, or there are no pairs.
        GraphError: a circuit that was found is none of single edges.
    """
    draws = _draws(n_pairs, n_resamples, seed)
    found = [
        kept_edges(rediscover(rows.tolist()), wiring) for rows in track(draws, "finding it again")
    ]
    return _summed(kept, found, n_pairs, "by running the analysis again")


def _draws(n_pairs: int, n_resamples: int, seed: int) -> list[Tensor]:
    """Rows of each resample."""
    if n_resamples < 2 or n_pairs < 2:
        raise OptionError(
            f"{n_resamples} resamples of {n_pairs} pairs say nothing of stability; "
            f"give 2 resamples or more, and 2 pairs"
        )
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(n_pairs, (n_resamples, n_pairs), generator=generator))


def _summed(
    kept: Collection[Edge], found: Sequence[frozenset[Edge]], n_pairs: int, how: str
) -> Stability:
    counts = Counter(edge for edges in found for edge in edges)
    own = {Edge(*edge) for edge in kept}
    inclusion = {edge: counts[edge] / len(found) for edge in sorted(own | {*counts})}
    overlaps = [_jaccard(one, other) for one, other in combinations(found, 2)]
    recurring = sum(inclusion[edge] >= RECURS for edge in own) / len(own) if own else None
    return Stability(inclusion, recurring, sum(overlaps) / len(overlaps), len(found), n_pairs, how)


def _jaccard(one: frozenset[Edge], other: frozenset[Edge]) -> float:
    return len(one & other) / len(one | other) if one or other else 1.0
