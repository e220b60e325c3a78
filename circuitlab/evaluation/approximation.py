"""Approximation: how well scores agree with exact patching, on strong and on weak edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from circuitlab.comparing import rank_correlation
from circuitlab.errors import NumericsError
from circuitlab.graph import effect_name
from circuitlab.patching import edge_effects
from circuitlab.selection import NEGLIGIBLE
from circuitlab.wiring import Receiver

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.ablation import Ablation
    from circuitlab.model import TracedModel
    from circuitlab.prompts import EncodedTask
    from circuitlab.wiring import Edge, Wiring

#: Edges that are patched.
N_EDGES = 50
#: Share of the absolute scores that the strongest carry, and these with the middle.
STRATA = (("top", 0.5), ("middle", 0.95), ("bottom", 1.0))


@dataclass(frozen=True)
class Sampled:
    """A patched edge, its stratum, its score, and its exact effect, mean over pairs."""

    edge: Edge
    stratum: str
    score: float
    exact: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **self.edge._asdict(), "stratum": self.stratum, "score": self.score, "exact": self.exact
        }  # fmt: skip


@dataclass(frozen=True)
class Approximation:
    """How scores agree with exact effects on a stratified sample.

    Attributes:
        rank_correlation: Spearman's, of signed values, ties sharing their rank; None where scores
            or effects are all equal.
        sign: Share of the edges with an effect whose score has its sign; None without any.
        sampled: The edges.
        strata: How many edges each stratum has.
    """

    rank_correlation: float | None
    sign: float | None
    sampled: tuple[Sampled, ...]
    strata: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {
            "rank_correlation": self.rank_correlation,
            "sign": self.sign,
            "strata": self.strata,
            "sampled": [one.to_json() for one in self.sampled],
        }


def approximation(
    model: TracedModel,
    pairs: EncodedTask,
    scores: Tensor,
    *,
    n_edges: int = N_EDGES,
    ablation: Ablation = "counterfactual",
    batch_size: int | None = None,
    seed: int = 0,
) -> Approximation:
    """Patch a sample of edges and hold their scores against it.

    Edges are ranked by absolute score. The strongest that carry half of its sum are the top, those
    up to 95 % the middle, the rest the bottom; a third of the sample is drawn from each, and more
    where another has too few.

    Args:
        model: The model.
        pairs: What the scores are of.
        scores: ``[n_sources, n_receivers]``, mean over pairs.
        n_edges: How many edges to patch.
        ablation: What an ablated source writes.
        batch_size: Pairs per pass; None chooses by memory.
        seed: Which edges.

    Raises:
        NumericsError: a score or an activation is not finite.
    """
    # Effects much smaller than the largest value are rounding: they have no sign.
    strata = _strata(model.wiring, scores)
    drawn = _drawn(strata, n_edges, seed)
    effects = edge_effects(
        model, pairs, [edge for edge, _, _ in drawn], ablation=ablation, batch_size=batch_size
    ).mean(1)
    exact = effects.tolist()
    sampled = tuple(Sampled(*one, effect) for one, effect in zip(drawn, exact, strict=True))
    values = torch.tensor([one.score for one in sampled], dtype=torch.float64)
    least = NEGLIGIBLE * max(map(abs, [*values.tolist(), *exact]), default=0.0)
    effects = torch.where(effects.abs() <= least, 0.0, effects)
    there = effects != 0
    same = (values * effects > 0)[there].double()
    return Approximation(
        rank_correlation(values.tolist(), effects.tolist()),
        float(same.mean()) if len(same) else None,
        sampled,
        {name: len(edges) for name, edges in strata.items()},
    )


def _strata(wiring: Wiring, scores: Tensor) -> dict[str, list[tuple[Edge, float]]]:
    """Edges with their scores, strongest first, ties by name, parted by what they carry."""
    rows, columns, values = wiring.source_rows, wiring.receiver_columns, scores.tolist()
    ranked = []
    for edge in wiring.edges:
        score = values[rows[edge.source]][columns[Receiver(edge.target, edge.port)]]
        if not abs(score) < float("inf"):
            raise NumericsError(f"edge {effect_name(*edge)} has score {score}; run in a wider type")
        ranked.append((edge, score))
    ranked.sort(key=lambda item: (-abs(item[1]), item[0]))
    total = sum(abs(score) for _, score in ranked)
    parts: dict[str, list[tuple[Edge, float]]] = {name: [] for name, _ in STRATA}
    carried = 0.0
    for edge, score in ranked:
        name = next((name for name, share in STRATA if carried < share * total), "bottom")
        parts[name].append((edge, score))
        carried += abs(score)
    return parts


def _drawn(
    strata: dict[str, list[tuple[Edge, float]]], n_edges: int, seed: int
) -> list[tuple[Edge, str, float]]:
    """A sample of every stratum, in their order; the smallest strata are served first."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    left = n_edges
    for number, name in enumerate(sorted(strata, key=lambda name: len(strata[name]))):
        sizes[name] = min(len(strata[name]), left // (len(strata) - number))
        left -= sizes[name]
    drawn = []
    for name, edges in strata.items():
        picked = torch.randperm(len(edges), generator=generator)[: sizes[name]].sort().values
        drawn += [(edges[i][0], name, edges[i][1]) for i in picked.tolist()]
    return drawn
