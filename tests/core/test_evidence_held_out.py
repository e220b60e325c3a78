"""Which pairs a circuit is scored on: never those it was found on, where others can be had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from circuitlab import CircuitGraph, PromptPair, Task, TaskError, zoo
from circuitlab.evaluation.held_out import MIN_PAIRS, N_PAIRS, hold_out
from circuitlab.zoo.drawing import new_pairs
from circuitlab.zoo.ioi_mini import HELD_OUT, NAMES

IOI = next(task for task in zoo.tasks() if task.name == "ioi-mini")


def found_on(pairs: tuple[PromptPair, ...]) -> CircuitGraph:
    """A circuit that says which pairs it was found on."""
    circuit = CircuitGraph()
    circuit.graph["pairs_digest"] = [pair.digest for pair in pairs]
    return circuit


def own_task(n: int) -> Task:
    """A task of ids that comes with no model."""
    pairs = tuple(PromptPair((1, i, 2), (1, i, 3), (4,), (5,)) for i in range(6, 6 + n))
    return Task("own", pairs)


def test_unused_pairs_of_the_task_come_first() -> None:
    """A circuit found on some pairs of a task is scored on exactly the others."""
    used, others = IOI.pairs[:40], IOI.pairs[40:]
    held = hold_out(found_on(used), IOI)
    assert held.task.pairs == others
    assert (held.origin, held.independent, held.found_on) == ("unused", True, 40)
    assert held.source is not None
    assert held.source.pairs == used
    assert held.left_out == 40


def test_shared_prompts_are_counted() -> None:
    """Prompts in both sets are counted as they are by comparing all of them."""
    used, others = IOI.pairs[:40], IOI.pairs[40:]
    twisted = (replace(others[0], corrupt=used[3].clean), *others[1:])
    held = hold_out(found_on(used), replace(IOI, pairs=(*used, *twisted)))
    both = {
        prompt
        for pair in held.task.pairs
        for prompt in (pair.clean, pair.corrupt)
        if any(prompt in (other.clean, other.corrupt) for other in used)
    }
    assert used[3].clean in both
    assert held.shared_prompts == len(both)


def test_new_pairs_are_drawn_for_a_trained_model() -> None:
    """Where every pair was used, new ones are drawn: of held-out couples, and none of the old."""
    held = hold_out(found_on(IOI.pairs), IOI)
    assert held.origin == "new"
    assert len(held.task.pairs) == N_PAIRS == len(set(held.task.pairs))
    assert not set(held.task.pairs) & set(IOI.pairs)
    for pair in held.task.pairs:
        named = {word for word in str(pair.clean).replace(",", " ").split() if word in NAMES}
        assert any(named == set(couple) for couple in HELD_OUT)
    again, other = (hold_out(found_on(IOI.pairs), IOI, seed=seed) for seed in (0, 1))
    assert again.task == held.task
    assert other.task != held.task


@pytest.mark.parametrize("name", ["induction", "greater-than", "docstring-mini"])
def test_every_trained_task_has_new_pairs(name: str) -> None:
    """New pairs avoid what they are told to avoid, by digest."""
    first = new_pairs(name, 20)
    second = new_pairs(name, 20, avoid={pair.digest for pair in first})
    assert len(set(first)) == len(set(second)) == 20
    assert not set(first) & set(second)


def test_unknown_tasks_have_no_new_pairs() -> None:
    """A task of the same name with pairs of its own is not taken for the bundled one."""
    assert new_pairs("own", 5) == ()
    task = replace(own_task(12), name="ioi-mini")
    assert hold_out(found_on(task.pairs), task).origin == "same"


def test_halves_are_disjoint() -> None:
    """With no other pairs the circuit is found again on one half and scored on the other."""
    task, asked, again = own_task(13), [], CircuitGraph()

    def rediscover(half: Task) -> CircuitGraph:
        asked.append(half)
        return again

    held = hold_out(found_on(task.pairs), task, rediscover=rediscover)
    assert held.origin == "halves"
    assert held.circuit is again
    assert {*asked[0].pairs, *held.task.pairs} == set(task.pairs)
    assert len(asked[0].pairs) + len(held.task.pairs) == 13
    assert held.source == asked[0]
    assert "other half" in held.how


@pytest.mark.parametrize("n", [1, MIN_PAIRS - 1])
def test_too_few_pairs_are_the_same_and_that_is_loud(n: int) -> None:
    """What cannot be split is scored on the same pairs, and nobody can miss it."""
    task = own_task(n)
    held = hold_out(found_on(task.pairs), task, rediscover=lambda half: CircuitGraph())
    assert (held.origin, held.independent) == ("same", False)
    assert "THE SAME PAIRS" in held.how
    assert held.task.pairs == task.pairs


def test_a_failing_analysis_is_told() -> None:
    """Where finding it again fails, the reason is in the sentence."""

    def rediscover(half: Task) -> CircuitGraph:
        raise TaskError("no effect in this half")

    task = own_task(12)
    held = hold_out(found_on(task.pairs), task, rediscover=rediscover)
    assert held.origin == "same"
    assert "no effect in this half" in held.how


def test_given_pairs_are_taken_without_used_ones_and_repeats() -> None:
    """Of given pairs, those the circuit was found on and repeats are left out and counted."""
    task = own_task(12)
    used, others = task.pairs[:4], task.pairs[4:]
    given = Task("held", (*used[:2], *others, others[0]), metric="answer-log-prob")
    held = hold_out(found_on(used), task, given=given)
    assert held.task.pairs == others
    assert held.left_out == 3
    assert held.task.metric == task.metric
    with pytest.raises(TaskError, match="found on every one of its 2 pairs"):
        hold_out(found_on(used), task, given=Task("held", used[:2]))


def test_old_circuits_are_recognised_by_the_digest_of_their_task() -> None:
    """A file that names no pairs, but the digest of the task's first ones, is understood."""
    circuit = CircuitGraph()
    circuit.graph.update(n_pairs=30, task_digest=IOI.take(30).digest)
    held = hold_out(circuit, IOI)
    assert held.origin == "unused"
    assert held.task.pairs == IOI.pairs[30:]


def test_circuits_that_say_nothing_are_scored_as_if_on_the_same_pairs() -> None:
    """Where nobody knows what a circuit was found on, no pair of the task counts as held out."""
    task = own_task(20)
    held = hold_out(CircuitGraph(), task)
    assert (held.origin, held.found_on, held.shared_prompts) == ("same", None, None)
    assert "MAY HAVE BEEN FOUND ON" in held.how
