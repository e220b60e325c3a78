"""Minimality: what each part of a circuit adds to its faithfulness, and which add nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from circuitlab.bootstrap import Interval, mean_intervals
from circuitlab.evaluation.completeness import components, without
from circuitlab.evaluation.random_circuits import shares
from circuitlab.graph import effect_name

if TYPE_CHECKING:
    from circuitlab.evaluation.circuit_runs import CircuitRuns

#: A part is idle when its removal moves faithfulness by less than this.
IDLE = 0.01
#: Random sets of other components without which each component is removed once more.
N_CONTEXTS = 5


@dataclass(frozen=True)
class Part:
    """A part of a circuit, and what its removal costs.

    Attributes:
        name: Of a component, or of an edge as ``a0.h1 → a1.h0:k``.
        drop: f(C) - f(C without it), a share of the effect; negative: it works against the task.
        interval: 95 % of the drop over pairs, by bootstrap, with the effect held fixed; None for a
            single pair.
        largest: Of a component, the drop of largest size when others are knocked out first, or
            ``drop`` (Wang et al. 2022 ask whether there is such a set); of an edge ``drop``.
    """

    name: str
    drop: float
    interval: Interval | None
    largest: float

    @property
    def idle(self) -> bool:
        """Whether no removal of it moved faithfulness by a hundredth."""
        return abs(self.drop) < IDLE and abs(self.largest) < IDLE

    def to_json(self) -> dict[str, Any]:
        """The fields and ``idle`` as plain JSON."""
        interval = None if self.interval is None else list(self.interval)
        return {**vars(self), "interval": interval, "idle": self.idle}


@dataclass(frozen=True)
class Minimality:
    """What the parts of a circuit are worth.

    Attributes:
        components: Each component, largest drop first.
        edges: Each edge, largest drop first; none at level ``node``.
        whole: Faithfulness of the circuit.
        without_idle: Faithfulness without all idle edges (at level ``node`` components) together:
            far from ``whole`` where they stand in for one another.
    """

    components: tuple[Part, ...]
    edges: tuple[Part, ...]
    whole: float
    without_idle: float

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {
            "components": [part.to_json() for part in self.components],
            "edges": [part.to_json() for part in self.edges],
            "whole": self.whole,
            "without_idle": self.without_idle,
        }


def minimality(
    runs: CircuitRuns, kept: Collection[Any], *, n_contexts: int = N_CONTEXTS, seed: int = 0
) -> Minimality:
    """Remove each component and each edge of a circuit.

    Args:
        runs: Runs circuits on held-out pairs.
        kept: The circuit, as ``runs`` takes it.
        n_contexts: Random sets of components that are knocked out before each component is.
        seed: Which, and of the bootstrap.
    """
    names = components(kept)
    edges = sorted(kept) if runs.level == "edge" else []
    circuits = [frozenset(kept), *(without(kept, [name]) for name in names)]
    circuits += [frozenset(kept) - {edge} for edge in edges]
    metric = runs.metric(circuits)
    values = shares(runs, metric)
    effect = float((runs.whole - runs.empty).mean())
    intervals = mean_intervals((metric[0] - metric[1:]) / effect, seed)
    largest = _in_contexts(runs, kept, names, n_contexts, seed)
    labels = [*names, *(effect_name(*edge) for edge in edges)]
    parts = []
    for label, value, interval in zip(labels, values[1:], intervals, strict=True):
        drop = values[0] - value
        parts.append(Part(label, drop, interval, max(drop, largest.get(label, 0.0), key=abs)))
    of_edges = parts[len(names) :]
    if edges:
        idle = {edge for edge, part in zip(edges, of_edges, strict=True) if part.idle}
        rest = frozenset(kept) - idle
    else:
        rest = without(kept, [part.name for part in parts if part.idle])
    return Minimality(
        tuple(sorted(parts[: len(names)], key=_order)),
        tuple(sorted(of_edges, key=_order)),
        values[0],
        shares(runs, runs.metric([rest]))[0],
    )


def _in_contexts(
    runs: CircuitRuns, kept: Collection[Any], names: Sequence[str], n: int, seed: int
) -> dict[str, float]:
    """Each component's drop of largest size when random sets of others are knocked out first."""
    rng = Random(seed)  # noqa: S311  # no secret
    contexts = [[name for name in names if rng.random() < 0.5] for _ in range(n)]
    asked = [(context, name) for context in contexts for name in names if name not in context]
    circuits = [without(kept, context) for context in contexts]
    circuits += [without(kept, [*context, name]) for context, name in asked]
    values = shares(runs, runs.metric(circuits)) if asked else []
    largest: dict[str, float] = {}
    for (context, name), value in zip(asked, values[n:], strict=True):
        drop = values[contexts.index(context)] - value
        largest[name] = max(drop, largest.get(name, 0.0), key=abs)
    return largest


def _order(part: Part) -> tuple[float, str]:
    return -part.drop, part.name
