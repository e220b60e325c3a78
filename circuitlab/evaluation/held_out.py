"""Held-out pairs: those a circuit is scored on must not be those it was found on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from circuitlab.errors import CircuitLabError, TaskError
from circuitlab.graph import CircuitGraph
from circuitlab.tasks import PromptPair, Task
from circuitlab.zoo import tasks as bundled_tasks
from circuitlab.zoo.drawing import new_pairs

Origin = Literal["given", "unused", "new", "halves", "same"]

#: Fewest pairs on which an interval is worth giving; fewer are not split off.
MIN_PAIRS = 8
#: Pairs that are drawn anew, or taken from a longer task.
N_PAIRS = 64


@dataclass(frozen=True)
class HeldOut:
    """The pairs that a circuit is scored on.

    Attributes:
        task: The pairs, none of them twice.
        circuit: What is scored: the circuit as it was given, or one found again on half the pairs.
        origin: ``given``: by the caller; ``unused``: of the task, and not used; ``new``: drawn
            anew; ``halves``: found again on one half, scored on the other; ``same``: scored on the
            very pairs it was found on.
        how: The same in a sentence.
        source: The pairs that ``circuit`` was found on, as far as they are at hand; None if none.
        found_on: How many pairs the circuit was found on; None where nobody knows.
        left_out: Pairs of the task that were not taken: the circuit was found on them, they stand
            twice, or there were enough.
        shared_prompts: Prompts of ``task`` that also stand among those the circuit was found on.
    """

    task: Task
    circuit: CircuitGraph
    origin: Origin
    how: str
    source: Task | None
    found_on: int | None
    left_out: int
    shared_prompts: int | None

    @property
    def independent(self) -> bool:
        """Whether no pair is one that the circuit was found on."""
        return self.origin != "same"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "origin": self.origin,
            "how": self.how,
            "independent": self.independent,
            "n_pairs": len(self.task.pairs),
            "digest": self.task.digest,
            "found_on": self.found_on,
            "left_out": self.left_out,
            "shared_prompts": self.shared_prompts,
        }


def hold_out(
    circuit: CircuitGraph,
    task: Task,
    *,
    given: Task | None = None,
    rediscover: Callable[[Task], CircuitGraph] | None = None,
    seed: int = 0,
) -> HeldOut:
    """Pairs to score a circuit on, the most independent that can be had.

    In this order: those given; those of the task that the circuit was not found on; new ones, for
    the task of a trained bundled model; one half of the pairs, for a circuit found again on the
    other; and where nothing else is left, the same pairs.

    Args:
        circuit: As it was traced.
        task: The task it is scored on.
        given: Pairs that the caller holds out.
        rediscover: Finds the circuit again on other pairs; None where that cannot be done.
        seed: Of the draw.

    Raises:
        TaskError: the circuit was found on every pair that was given.
    """
    used = _used(circuit, task)
    if given is not None:
        pairs = _distinct(given.pairs, used or ())
        if not pairs:
            raise TaskError(
                f"held-out task {given.name!r}: the circuit was found on every one of its "
                f"{len(given.pairs)} pairs; give others, or leave --held-out away"
            )
        how = f"the pairs of {given.name} that were given"
        if used is None:
            how += "; the circuit does not say which pairs it was found on"
        return _held(replace(given, metric=task.metric), pairs, circuit, "given", how, used, task)
    if used is not None:
        pairs = _distinct(task.pairs, used)[:N_PAIRS]
        if len(pairs) >= MIN_PAIRS:
            how = f"pairs of {task.name} that the circuit was not found on"
            return _held(task, pairs, circuit, "unused", how, used, task)
    pairs = _drawn(task, used, seed)
    if len(pairs) >= MIN_PAIRS:
        how = f"new pairs, drawn as those of {task.name} are"
        return _held(task, pairs, circuit, "new", how, used, task)
    halves = _halves(circuit, task, rediscover, seed)
    return halves if isinstance(halves, HeldOut) else _same(circuit, task, used, halves)


def _halves(
    circuit: CircuitGraph,
    task: Task,
    rediscover: Callable[[Task], CircuitGraph] | None,
    seed: int,
) -> HeldOut | str:
    """The circuit found again on half the pairs; or why it cannot be."""
    pairs = _distinct(task.pairs, ())
    if rediscover is None:
        return "it cannot be found again, since no analysis made it that is installed"
    if len(pairs) < MIN_PAIRS:
        return f"{task.name} has too few pairs to be split"
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = len(pairs) // 2
    first, second = ([pairs[i] for i in sorted(part)] for part in (order[:middle], order[middle:]))
    half = replace(task, pairs=tuple(first))
    try:
        again = rediscover(half)
    except CircuitLabError as error:
        return f"it cannot be found again on half the pairs ({error})"
    how = f"half the pairs of {task.name}, for the circuit as found again on the other half"
    digests = {pair.digest for pair in first}
    return _held(task, second, again, "halves", how, digests, half)


def _same(circuit: CircuitGraph, task: Task, used: set[str] | None, reason: str) -> HeldOut:
    how = f"THE SAME PAIRS that the circuit was found on: {reason}"
    if used is None:
        how = f"pairs that the circuit MAY HAVE BEEN FOUND ON, it does not say: {reason}"
    return _held(task, _distinct(task.pairs, ()), circuit, "same", how, used, task)


def _held(
    task: Task,
    pairs: Sequence[PromptPair],
    circuit: CircuitGraph,
    origin: Origin,
    how: str,
    used: set[str] | None,
    source: Task,
) -> HeldOut:
    """Put together, with what the two sets of pairs share; ``source`` holds the used ones."""
    known = [p for p in source.pairs if used is None or p.digest in used]
    seen = {prompt for pair in known for prompt in _prompts(pair)}
    shared = {prompt for pair in pairs for prompt in _prompts(pair)} & seen
    return HeldOut(
        task=replace(task, pairs=tuple(pairs)),
        circuit=circuit,
        origin=origin,
        how=how,
        source=replace(source, pairs=tuple(known)) if known else None,
        found_on=None if used is None else len(used),
        left_out=0 if origin in ("new", "halves") else len(task.pairs) - len(pairs),
        shared_prompts=None if used is None or not known else len(shared),
    )


def _used(circuit: CircuitGraph, task: Task) -> set[str] | None:
    """Digests of the pairs that the circuit was found on; None where it does not say."""
    digests, n_pairs = circuit.graph.get("pairs_digest"), circuit.graph.get("n_pairs")
    if isinstance(digests, list):
        return set(map(str, digests))
    if isinstance(n_pairs, int) and n_pairs > 0:
        first = task.take(n_pairs)
        if first.digest == circuit.graph.get("task_digest"):
            return {pair.digest for pair in first.pairs}
    return None


def _drawn(task: Task, used: set[str] | None, seed: int) -> list[PromptPair]:
    """New pairs; none unless the task is, or is part of, the one that comes with a model."""
    own = {
        pair for bundled in bundled_tasks() if bundled.name == task.name for pair in bundled.pairs
    }
    if not own.issuperset(task.pairs):
        return []
    avoid = {pair.digest for pair in own} | (used or set())
    return list(new_pairs(task.name, N_PAIRS, avoid=avoid, seed=seed))


def _distinct(pairs: Iterable[PromptPair], avoid: Iterable[str]) -> list[PromptPair]:
    seen, found = set(avoid), []
    for pair in pairs:
        if pair.digest not in seen:
            seen.add(pair.digest)
            found.append(pair)
    return found


def _prompts(pair: PromptPair) -> tuple[Any, Any]:
    return pair.clean, pair.corrupt
