"""Completeness: what the model does without a circuit, and without parts of it.

A circuit that is all there is leaves nothing when it is taken out (necessity), and whatever is
knocked out, it answers as the whole model does without the same parts (Wang et al. 2022,
arXiv:2211.00593).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from circuitlab.evaluation.faithfulness import Faithfulness, faithfulness
from circuitlab.evaluation.random_circuits import Circuit, shares

if TYPE_CHECKING:
    from circuitlab.evaluation.circuit_runs import CircuitRuns

#: Random sets of components that are knocked out.
N_RANDOM = 20
#: Steps of the greedy search, and components tried in each.
GREEDY_STEPS = 6
GREEDY_TRIES = 10


@dataclass(frozen=True)
class KnockOut:
    """What is left of circuit and model without the same components.

    Attributes:
        removed: Names of the components K.
        circuit: Share of the effect that the circuit keeps without them, F(C without K).
        model: Share that the model keeps without them, F(M without K).
    """

    removed: tuple[str, ...]
    circuit: float
    model: float

    @property
    def gap(self) -> float:
        """|F(C without K) - F(M without K)|, which is 0 for a complete circuit."""
        return abs(self.circuit - self.model)

    def to_json(self) -> dict[str, Any]:
        """The fields and the gap as plain JSON."""
        return {**asdict(self), "removed": list(self.removed), "gap": self.gap}


@dataclass(frozen=True)
class Completeness:
    """Necessity and completeness of a circuit.

    Attributes:
        complement: Faithfulness of all that is outside the circuit; near 0 for a necessary one.
        random: Random sets of its components knocked out, half of them on average.
        greedy: A set that grows by what raises the gap most, one step each.
    """

    complement: Faithfulness
    random: tuple[KnockOut, ...]
    greedy: tuple[KnockOut, ...]

    @property
    def worst(self) -> KnockOut | None:
        """The set with the largest gap; None for a circuit without components."""
        return max((*self.random, *self.greedy), key=lambda out: out.gap, default=None)

    def to_json(self) -> dict[str, Any]:
        """The fields and the worst set as plain JSON."""
        return {
            "complement": self.complement.to_json(),
            "random": [out.to_json() for out in self.random],
            "greedy": [out.to_json() for out in self.greedy],
            "worst": None if self.worst is None else self.worst.to_json(),
        }


def completeness(
    runs: CircuitRuns,
    kept: Collection[Any],
    *,
    n_random: int = N_RANDOM,
    seed: int = 0,
    resamples: int = 2000,
) -> Completeness:
    """Run the complement, and circuit and model with the same components knocked out.

    To knock a component out is to patch all edges out of it. ``input`` is never knocked out.

    Args:
        runs: Runs circuits on held-out pairs.
        kept: The circuit, as ``runs`` takes it.
        n_random: How many random sets of components to knock out.
        seed: Which, and of the greedy search and the bootstrap.
        resamples: Of the complement's interval.
    """
    rng = Random(seed)  # noqa: S311  # no secret
    rest = runs.metric([complement(runs, kept)])[0]
    names = components(kept)
    drawn = [[name for name in names if rng.random() < 0.5] for _ in range(n_random)]
    sets = list(dict.fromkeys(tuple(removed) for removed in drawn if removed))
    return Completeness(
        faithfulness(rest, runs.whole, runs.empty, seed=seed, resamples=resamples),
        tuple(_knocked_out(runs, kept, sets)),
        tuple(_greedy(runs, kept, names, rng)),
    )


def complement(runs: CircuitRuns, kept: Collection[Any]) -> Circuit:
    """All that is outside a circuit; at level ``node`` always with ``input``."""
    if runs.level == "edge":
        return frozenset(runs.model.wiring.edges) - {*kept}
    return frozenset(runs.model.wiring.sources) - ({*kept} - {"input"})


def components(kept: Collection[Any]) -> list[str]:
    """Names of a circuit's components between ``input`` and ``logits``, sorted."""
    names = {name for part in kept for name in ([part] if isinstance(part, str) else part[:2])}
    return sorted(names - {"input", "logits"})


def without(kept: Collection[Any], removed: Collection[str]) -> Circuit:
    """A circuit less some components: none of the edges out of them is kept."""
    sources = {*removed}
    return frozenset(
        part for part in kept if (part if isinstance(part, str) else part[0]) not in sources
    )


def _knocked_out(
    runs: CircuitRuns, kept: Collection[Any], sets: Sequence[tuple[str, ...]]
) -> list[KnockOut]:
    whole = runs.model.wiring.edges if runs.level == "edge" else runs.model.wiring.sources
    circuits = [without(part, removed) for part in (kept, whole) for removed in sets]
    found = shares(runs, runs.metric(circuits))
    both = zip(sets, found[: len(sets)], found[len(sets) :], strict=True)
    return [KnockOut(removed, circuit, model) for removed, circuit, model in both]


def _greedy(
    runs: CircuitRuns, kept: Collection[Any], names: Sequence[str], rng: Random
) -> list[KnockOut]:
    """The best of each step, while the gap grows; each step tries some of the components left."""
    steps: list[KnockOut] = []
    removed: tuple[str, ...] = ()
    while len(steps) < GREEDY_STEPS and (left := sorted({*names} - {*removed})):
        tried = rng.sample(left, min(GREEDY_TRIES, len(left)))
        best = max(
            _knocked_out(runs, kept, [(*removed, name) for name in tried]), key=lambda out: out.gap
        )
        if steps and best.gap <= steps[-1].gap:
            break
        steps.append(best)
        removed = best.removed
    return steps
