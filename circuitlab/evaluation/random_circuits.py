"""Random circuits of a circuit's size and kind: what faithfulness is worth beside theirs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from circuitlab.errors import TaskError
from circuitlab.wiring import Edge

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.evaluation.circuit_runs import CircuitRuns
    from circuitlab.evaluation.kept import Level
    from circuitlab.wiring import Wiring

#: A circuit as a set of edges, or of components at level ``node``.
Circuit = frozenset[Edge] | frozenset[str]

#: Swaps after which a circuit has forgotten how it was made; of small ones more are needed, and
#: are cheap: so many that this many edges have been looked at.
SWAPS = 300
LOOKS = 5_000
#: With fewer random circuits p cannot come below .05.
FEWEST = 19
#: Two computations of one share in float32 differ by less than this.
ROUNDING = 1e-5


@dataclass(frozen=True)
class RandomCircuits:
    """Different random circuits, fewer than asked for where there are no more.

    Attributes:
        circuits: Sets of edges, or of components at level ``node``.
        how: What they have in common with the circuit, for people.
    """

    circuits: list[Circuit]
    how: str


@dataclass(frozen=True)
class RandomControl:
    """How a circuit's faithfulness compares with that of random circuits.

    Attributes:
        values: Faithfulness of each random circuit, on the same pairs.
        median: Their middle; None without any.
        low: Their 2.5th percentile.
        high: Their 97.5th percentile.
        percentile: Share of them, in percent, that lie below the circuit.
        p: (1 + those at least as faithful) / (their number + 1).
        drawn: The circuits, and what they have in common with the one that is tested.
        metric: Their metric, ``[n_circuits, n_pairs]``.
    """

    values: list[float]
    median: float | None
    low: float | None
    high: float | None
    percentile: float | None
    p: float | None
    drawn: RandomCircuits = field(repr=False)
    metric: Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; without the circuits, but with their number ``n`` and ``how``."""
        return {
            "n": len(self.values),
            "how": self.drawn.how,
            "values": self.values,
            "median": self.median,
            "low": self.low,
            "high": self.high,
            "percentile": self.percentile,
            "p": self.p,
        }


def shares(runs: CircuitRuns, metric: Tensor) -> list[float]:
    """Faithfulness (m(C) - m(∅)) / (m(M) - m(∅)), a ratio of means over pairs, of each circuit.

    Args:
        runs: What gave ``metric``.
        metric: ``[n_circuits, n_pairs]``.

    Raises:
        TaskError: the whole model's mean metric is that of the empty circuit.
    """
    empty = float(runs.empty.mean())
    effect = float(runs.whole.mean()) - empty
    if not effect:
        raise TaskError(
            f"the whole model and the empty circuit both have a mean metric of {empty:.4g}, so no "
            f"share of their difference is defined; use a task with an effect"
        )
    found: list[float] = ((metric.mean(1) - empty) / effect).tolist()
    return found


def random_control(
    runs: CircuitRuns, kept: Collection[Any], value: float, *, n: int = 100, seed: int = 0
) -> RandomControl:
    """Hold a circuit's faithfulness against that of other random circuits of its size and kind.

    Args:
        runs: Runs circuits on the pairs that ``value`` was measured on.
        kept: The circuit, as ``runs`` takes it.
        value: Its faithfulness; a random circuit within 1e-5 of it counts as no worse.
        n: How many random circuits to run.
        seed: Which.
    """
    drawn = random_circuits(runs.model.wiring, kept, n + 1, level=runs.level, seed=seed)
    others = [circuit for circuit in drawn.circuits if circuit != frozenset(kept)]
    drawn = replace(drawn, circuits=others[:n])
    metric = runs.metric(drawn.circuits)
    values = shares(runs, metric)
    if not values:
        return RandomControl([], None, None, None, None, None, drawn, metric)
    ends = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(ends).tolist()
    reached = sum(other >= value - ROUNDING for other in values)
    return RandomControl(
        values=values,
        median=median,
        low=low,
        high=high,
        percentile=100 * (len(values) - reached) / len(values),
        p=(1 + reached) / (1 + len(values)),
        drawn=drawn,
        metric=metric,
    )


def random_circuits(
    wiring: Wiring, kept: Collection[Any], n: int, *, level: Level = "edge", seed: int = 0
) -> RandomCircuits:
    """Up to ``n`` different random circuits like a given one.

    At level ``edge`` they have as many edges, as many of each type (kind of source, kind of
    receiver, port), and every edge lies on a path from ``input`` to ``logits``. A random set of
    edges is mended until it is connected; then random swaps that keep it so, whose stationary
    distribution is uniform, make it forget how. Where the types leave fewer than 19 circuits, as in
    small models, only the number of edges and the paths are kept.

    At level ``node`` they have as many heads and as many MLPs, and ``input`` and ``logits`` where
    the circuit has them. Every component reads and is read, so paths are there by themselves.

    Args:
        wiring: Of the model.
        kept: The circuit: edges, or names of components at level ``node``.
        n: How many.
        level: What ``kept`` holds.
        seed: The same seed gives the same circuits.

    Raises:
        GraphError: a component does not exist in the model.
    """
    rng = Random(seed)  # noqa: S311  # no secret
    if not kept:
        return RandomCircuits([], "none: the circuit is empty")
    if level == "node":
        return _of_nodes(wiring, sorted(kept), n, rng)
    chosen = {Edge(*edge) for edge in kept}
    types = {edge: _type(wiring, edge) for edge in wiring.edges}
    wanted = Counter(types[edge] for edge in wiring.edges if edge in chosen)
    size = f"{len(kept)} edges, all on paths from input to logits"
    found = _drawn(_Drawer(wiring, types, wanted), n, rng)
    if len(found) >= min(n, FEWEST):
        few = "" if len(found) == n else f"; no more than {len(found)} were found"
        return RandomCircuits(found, f"{size}, as many of each type{few}")
    one = dict.fromkeys(types, ("any", "any"))
    loose = _drawn(_Drawer(wiring, one, Counter({("any", "any"): len(kept)})), n, rng)
    few = "" if len(loose) == n else f"; no more than {len(loose)} were found"
    return RandomCircuits(
        loose, f"{size}, of any type (with as many of each type: {len(found)}){few}"
    )


def _of_nodes(wiring: Wiring, kept: Sequence[str], n: int, rng: Random) -> RandomCircuits:
    pools: dict[str, list[str]] = defaultdict(list)
    for name in wiring.sources:
        pools[wiring.component(name).kind].append(name)
    wanted = Counter(wiring.component(name).kind for name in kept)
    ends = frozenset(name for name in kept if name in ("input", "logits"))
    ways = math.prod(math.comb(len(pools[kind]), wanted[kind]) for kind in ("head", "mlp"))
    found: dict[frozenset[str], None] = {}
    while len(found) < min(n, ways):
        drawn = [rng.sample(pools[kind], wanted[kind]) for kind in ("head", "mlp")]
        found[ends.union(*drawn)] = None
    few = "" if ways >= n else f"; there are {ways}"
    return RandomCircuits(list(found), f"{wanted['head']} heads and {wanted['mlp']} MLPs, any{few}")


Type = tuple[str, str]


def _type(wiring: Wiring, edge: Edge) -> Type:
    return wiring.component(edge.source).kind, edge.port or wiring.component(edge.target).kind


def _drawn(drawer: _Drawer, n: int, rng: Random) -> list[Circuit]:
    """Up to ``n`` different circuits; stops when new ones become rare."""
    found: dict[Circuit, None] = {}
    missed = 0
    while len(found) < n and missed < 25 + n // 4:
        circuit = drawer.draw(rng)
        if circuit is None or circuit in found:
            missed += 1
        else:
            found[circuit] = None
    return list(found)


class _Drawer:
    """Draws connected sets of edges with given numbers of each type.

    Sets of sources are kept as the bits of whole numbers: bit 0 is ``input``.
    """

    def __init__(self, wiring: Wiring, types: dict[Edge, Type], wanted: Counter[Type]) -> None:
        self.wiring, self.types, self.wanted = wiring, types, wanted
        self.pools: dict[Type, list[Edge]] = defaultdict(list)
        for edge, kind in types.items():
            self.pools[kind].append(edge)
        self.last = len(wiring.sources)
        self._into = [0] * (self.last + 1)
        self._times: Counter[tuple[int, int]] = Counter()
        rows = {**wiring.source_rows, "logits": self.last}
        self.places = {edge: (rows[edge.source], rows[edge.target]) for edge in wiring.edges}

    def draw(self, rng: Random) -> Circuit | None:
        """A circuit; None where none was found in a fair number of steps."""
        size = sum(self.wanted.values())
        for _ in range(20):
            edges = [e for kind, n in self.wanted.items() for e in rng.sample(self.pools[kind], n)]
            self._begin(edges)
            if self._mend(edges, rng, 20 * size + 100):
                self._swap(edges, rng)
                return frozenset(edges)
        return None

    def _mend(self, edges: list[Edge], rng: Random, steps: int) -> bool:
        """Replace edges until all lie on paths; a step makes it worse only now and then."""
        chosen = set(edges)
        n_dead = self._n_dead()
        for _ in range(steps):
            if not n_dead:
                return True
            places = self._dead(edges) if rng.random() < 0.5 else range(len(edges))
            place = rng.choice(places)
            old, new = edges[place], self._other(edges[place], chosen, rng)
            if new is None:
                continue
            self._exchange([old], [new])
            left = self._n_dead()
            if left <= n_dead or rng.random() < 0.02:
                edges[place] = new
                chosen.remove(old)
                chosen.add(new)
                n_dead = left
            else:
                self._exchange([new], [old])
        return False

    def _swap(self, edges: list[Edge], rng: Random) -> None:
        """Replace up to three edges at once by others of their types, wherever all stay on paths.

        One alone seldom can be where the circuit is small and each edge needs another.
        """
        chosen = set(edges)
        for _ in range(max(SWAPS, LOOKS // len(edges))):
            places = rng.sample(range(len(edges)), min(rng.choice((1, 1, 2, 3)), len(edges)))
            old = [edges[place] for place in places]
            new = [rng.choice(self.pools[self.types[edge]]) for edge in old]
            if len({*new} - chosen) < len(new):
                continue
            self._exchange(old, new)
            if not self._n_dead():
                chosen.difference_update(old)
                chosen.update(new)
                for place, edge in zip(places, new, strict=True):
                    edges[place] = edge
            else:
                self._exchange(new, old)

    def _other(self, edge: Edge, chosen: set[Edge], rng: Random) -> Edge | None:
        """Another edge of the type, on a path if one is met soon; None if all are chosen."""
        pool = self.pools[self.types[edge]]
        if len(pool) == self.wanted[self.types[edge]]:
            return None
        reached, useful = self._ends()
        free = None
        for _ in range(20):
            other = rng.choice(pool)
            if other not in chosen:
                free = other
                if self._alive(other, reached, useful):
                    break
        return free

    def _begin(self, edges: Sequence[Edge]) -> None:
        self._into = [0] * (self.last + 1)
        self._times.clear()
        self._exchange([], edges)

    def _exchange(self, old: Sequence[Edge], new: Sequence[Edge]) -> None:
        """Keep count of which component reads which, through however many ports."""
        for edge in old:
            source, target = place = self.places[edge]
            self._times[place] -= 1
            if not self._times[place]:
                self._into[target] ^= 1 << source
        for edge in new:
            source, target = place = self.places[edge]
            self._times[place] += 1
            self._into[target] |= 1 << source

    def _ends(self) -> tuple[int, int]:
        """Sources that ``input`` reaches, and components that reach ``logits``, as bits."""
        reached, useful = 1, 1 << self.last
        for row in range(1, self.last):
            if self._into[row] & reached:
                reached |= 1 << row
        for row in range(self.last, 0, -1):
            if useful >> row & 1:
                useful |= self._into[row]
        return reached, useful

    def _dead(self, edges: Sequence[Edge]) -> list[int]:
        """Numbers of the edges that lie on no path."""
        reached, useful = self._ends()
        return [n for n, edge in enumerate(edges) if not self._alive(edge, reached, useful)]

    def _n_dead(self) -> int:
        """How many edges lie on no path."""
        reached, useful = self._ends()
        found = 0
        for target, into in enumerate(self._into):
            lost = into & ~reached if useful >> target & 1 else into
            while lost:
                source = lost.bit_length() - 1
                found += self._times[source, target]
                lost ^= 1 << source
        return found

    def _alive(self, edge: Edge, reached: int, useful: int) -> bool:
        source, target = self.places[edge]
        return bool(reached >> source & 1 and useful >> target & 1)
