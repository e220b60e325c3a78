"""The exact check: a sample of edges patched, against which the gradient scores are held.

The strongest edges of the circuit are all patched. Of the others two strata are sampled at random:
the middle, which with the strongest carries all but a twentieth of the absolute scores, and the
bottom, which carries that twentieth and is nearly always the most. What the scores say of the
bottom is that nothing happens there; an edge of it that does much is one that the gradient misses.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import Edge, edge_effects

if TYPE_CHECKING:
    from circuitlab import Ablation, CircuitGraph, EncodedTask, TracedModel

#: An edge is confirmed when its exact effect has the score's sign and this share of its size.
LEAST_EXACT = 0.1
#: Share of the absolute scores that the bottom carries at most.
BOTTOM = 0.05
#: Effects this much smaller than the largest score or effect are rounding.
NEGLIGIBLE = 1e-6
#: Two computations of one effect in float32 may differ by this share.
ROUNDING = 1e-4
#: The interval of the missed edges holds the truth in this share of samples at least.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Stratum:
    """Edges of one part of the ranking, and which of them were drawn.

    Attributes:
        name: ``top``, ``middle`` or ``bottom``.
        size: How many edges it has.
        outside: How many of them are not in the circuit.
        drawn: The edges to patch.
    """

    name: str
    size: int
    outside: int
    drawn: tuple[Edge, ...]

    @property
    def weight(self) -> float:
        """How many edges each one drawn stands for."""
        return self.size / len(self.drawn)


@dataclass(frozen=True)
class Patched:
    """A patched edge: its score, its exact effect, both mean over pairs, and its stratum."""

    edge: Edge
    score: float
    exact: float
    kept: bool
    stratum: Stratum

    @property
    def confirmed(self) -> bool:
        """Whether the effect has the score's sign and a fair share of its size."""
        same = self.exact * self.score > 0
        return same and abs(self.exact) >= LEAST_EXACT * abs(self.score)


def check(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    scores: Tensor,
    ablation: Ablation,
    *,
    verify: int,
    batch_size: int | None,
) -> float | None:
    """Patch the ``verify`` strongest edges and as many of the others; write what that shows.

    Edges of the circuit get ``exact`` and, where they have a score, ``confirmed``; the circuit
    gets ``graph["exact_check"]``. Draws from torch's random numbers.

    Returns:
        The share of the strongest edges' scores that is confirmed; None when nothing was patched.
    """
    ranked = _ranked(model, scores)
    kept = [Edge(*effect[:3]) for effect in circuit.effects() if effect[3] != 0]
    if not kept or not verify:
        return None
    strata = draw(ranked, kept, verify)
    edges = [edge for stratum in strata for edge in stratum.drawn]
    exact = edge_effects(
        model, pairs, edges, ablation=ablation, batch_size=batch_size, stage="exact check"
    ).mean(1)
    owners = [stratum for stratum in strata for _ in stratum.drawn]
    inside = {Edge(*effect[:3]) for effect in circuit.effects()}
    patched = [
        Patched(edge, ranked[edge], effect, edge in inside, owner)
        for edge, effect, owner in zip(edges, exact.tolist(), owners, strict=True)
    ]
    for one in patched:
        if one.kept:
            data = circuit.edges[one.edge]
            data["exact"] = one.exact
            if one.score:
                data["confirmed"] = one.confirmed
    strongest = [one for one in patched if one.stratum.name == "top"]
    total = math.fsum(abs(one.score) for one in strongest)
    share = math.fsum(abs(one.score) for one in strongest if one.confirmed) / total
    circuit.graph["exact_check"] = {
        "checked": len(strongest),
        "confirmed": sum(one.confirmed for one in strongest),
        "confirmed_share": share,
        "agreement": agreement(patched),
        "missed": missed(strata, patched, abs(ranked[kept[-1]])),
        "sampled": [_plain(one) for one in patched],
    }
    return share


def draw(ranked: dict[Edge, float], kept: Sequence[Edge], verify: int) -> list[Stratum]:
    """The strongest edges, all of them, and samples of the middle and of the bottom.

    Args:
        ranked: Score of every edge, strongest first.
        kept: Edges of the circuit that have a score, strongest first.
        verify: Size of the top; half as many are drawn from the middle and from the bottom, and
            from the other where one has too few, or where the top has.

    Returns:
        The strata that have edges; none without one that is drawn.
    """
    top = kept[:verify]
    rest = [edge for edge in ranked if edge not in set(top)]
    total = math.fsum(map(abs, ranked.values()))
    carried = math.fsum(abs(ranked[edge]) for edge in top)
    n_middle = 0
    while n_middle < len(rest) and carried < (1 - BOTTOM) * total:
        carried += abs(ranked[rest[n_middle]])
        n_middle += 1
    middle, bottom = rest[:n_middle], rest[n_middle:]
    wanted = 2 * verify - len(top)
    n_bottom = min(len(bottom), max((wanted + 1) // 2, wanted - len(middle)))
    picked = min(len(middle), max(1, wanted - n_bottom))
    inside = set(kept)
    return [
        Stratum(name, len(part), sum(edge not in inside for edge in part), _sample(part, n))
        for name, part, n in (
            ("top", top, len(top)),
            ("middle", middle, picked),
            ("bottom", bottom, n_bottom),
        )
        if part
    ]


def _sample(edges: Sequence[Edge], n: int) -> tuple[Edge, ...]:
    """So many of them at random, in their order."""
    if n >= len(edges):
        return tuple(edges)
    return tuple(edges[i] for i in sorted(torch.randperm(len(edges))[:n].tolist()))


def agreement(patched: Sequence[Patched]) -> dict[str, float | None]:
    """How scores agree with exact effects, estimated for all edges; each drawn one stands for many.

    ``sign``: share of the edges with an effect whose score has its sign. ``sign_by_effect``: share
    of the sum of absolute effects that these carry. ``rank_correlation``: Spearman's, of signed
    values. ``slope``: of the effects on the scores through 0, least squares. None where undefined.
    """
    weight = torch.tensor([one.stratum.weight for one in patched], dtype=torch.float64)
    score = torch.tensor([one.score for one in patched], dtype=torch.float64)
    exact = torch.tensor([one.exact for one in patched], dtype=torch.float64)
    least = NEGLIGIBLE * torch.cat([score, exact]).abs().max()
    exact = torch.where(exact.abs() <= least, 0.0, exact)
    right, size = score * exact > 0, weight * exact.abs()
    return {
        "sign": _ratio(weight[right].sum(), weight[exact != 0].sum()),
        "sign_by_effect": _ratio(size[right].sum(), size.sum()),
        "rank_correlation": _correlation(_ranks(score, weight), _ranks(exact, weight), weight),
        "slope": _ratio((weight * score * exact).sum(), (weight * score * score).sum()),
    }


def missed(strata: Sequence[Stratum], patched: Sequence[Patched], cutoff: float) -> dict[str, Any]:
    """How many edges outside the circuit do as much as its weakest score says, by the sample.

    The estimate is Horvitz and Thompson's. The interval adds up exact intervals of the strata
    (hypergeometric, Bonferroni), so it holds at any sample size, and is wide where few were drawn.
    """
    found = [one for one in patched if not one.kept and abs(one.exact) >= cutoff * (1 - ROUNDING)]
    sampled = [part for part in strata if len(part.drawn) < part.size]
    error = (1 - CONFIDENCE) / max(1, len(sampled))
    low = high = 0
    for part in strata:
        hits = sum(one.stratum is part for one in found)
        bounds = (
            count_interval(part.size, len(part.drawn), hits, error)
            if part in sampled
            else (hits, hits)
        )
        low, high = low + bounds[0], high + min(bounds[1], part.outside)
    return {
        "estimate": math.fsum(one.stratum.weight for one in found),
        "interval": [low, high],
        "found": len(found),
        "patched": sum(not one.kept for one in patched),
        "of": sum(part.outside for part in strata),
        "cutoff": cutoff,
    }


def count_interval(size: int, drawn: int, hits: int, error: float) -> tuple[int, int]:
    """Exact interval of how many of ``size`` are hits, when ``hits`` of ``drawn`` at random are.

    It misses the truth with a probability of at most ``error``, half of it on either side (Clopper
    and Pearson's construction with the hypergeometric distribution).
    """

    def at_most(n: int, count: int) -> float:
        ways = sum(math.comb(n, k) * math.comb(size - n, drawn - k) for k in range(count + 1))
        return ways / math.comb(size, drawn)

    counts = range(hits, size - (drawn - hits) + 1)
    few = bisect_left(counts, True, key=lambda n: 1 - at_most(n, hits - 1) > error / 2)
    many = bisect_left(counts, True, key=lambda n: at_most(n, hits) <= error / 2)
    return counts[few], counts[many - 1]


def scores_of(model: TracedModel, scores: Tensor) -> dict[Edge, float]:
    """Score of every edge, in the model's order, from ``[n_sources, n_receivers]``."""
    wiring, values = model.wiring, scores.tolist()
    columns = {tuple(receiver): n for n, receiver in enumerate(wiring.receivers)}
    return {
        edge: values[wiring.source_rows[edge.source]][columns[edge.target, edge.port]]
        for edge in wiring.edges
    }


def _ranked(model: TracedModel, scores: Tensor) -> dict[Edge, float]:
    """Score of every edge, strongest first, ties by name."""
    found = scores_of(model, scores)
    return dict(sorted(found.items(), key=lambda item: (-abs(item[1]), item[0])))


def _ranks(values: Tensor, weight: Tensor) -> Tensor:
    """Rank of each among all that the drawn ones stand for; ties share theirs."""
    below = (values[None] < values[:, None]).double()
    return (below + (values[None] == values[:, None]).double() / 2) @ weight


def _correlation(one: Tensor, other: Tensor, weight: Tensor) -> float | None:
    share = weight / weight.sum()
    one, other = one - share @ one, other - share @ other
    return _ratio(share @ (one * other), ((share @ one**2) * (share @ other**2)).sqrt())


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole != 0 else None


def _plain(one: Patched) -> dict[str, Any]:
    source, target, port = one.edge
    return {
        "source": source,
        "target": target,
        "port": port,
        "score": one.score,
        "exact": one.exact,
        "confirmed": one.confirmed if one.score else None,
        "stratum": one.stratum.name,
        "in_circuit": one.kept,
    }
