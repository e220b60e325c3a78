"""What the trained models are asked in their tasks, their training never showed them."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from circuitlab import zoo
from circuitlab.tasks import Task
from circuitlab.zoo import docstring_mini, greater_than, induction, ioi_mini
from circuitlab.zoo.recipe import Example, Recipe, split


def task_of(name: str) -> Task:
    return next(task for task in zoo.tasks() if task.name == name)


def draw(recipe: Recipe, n: int = 3000) -> list[Example]:
    rng = Random("look at the training data")
    return [recipe.example(rng) for _ in range(n)]


def successions(words: list[str]) -> set[tuple[str, str]]:
    return set(pairwise(words))


def test_induction_pairs_are_held_out() -> None:
    """Training never asks for a held-out succession; every pair does."""
    asked = set()
    for example in draw(induction.RECIPE):
        words = ["<bos>", *split(example.text)]
        asked |= {(words[question.position], question.answers[0]) for question in example.questions}
    assert len(asked) > 2000
    assert not asked & set(induction.HELD_OUT)
    for pair in task_of("induction").pairs:
        assert (split(pair.clean)[-1], pair.answers[0]) in induction.HELD_OUT


def test_ioi_pairs_are_held_out() -> None:
    """The two people of a pair never meet in training."""
    names = set(ioi_mini.NAMES)
    seen = {frozenset(names & set(split(example.text))) for example in draw(ioi_mini.RECIPE)}
    tested = {frozenset(names & set(split(pair.clean))) for pair in task_of("ioi-mini").pairs}
    assert len(seen) > 150
    assert not seen & tested


def test_greater_than_pairs_are_held_out() -> None:
    """The starting year of a pair, with its century, never starts anything in training."""
    seen = {tuple(split(example.text)[6:8]) for example in draw(greater_than.RECIPE)}
    tested = {tuple(split(pair.clean)[6:8]) for pair in task_of("greater-than").pairs}
    assert len(seen) > 500
    assert not seen & tested


def test_docstring_pairs_are_held_out() -> None:
    """The last documented argument of a pair never precedes the answer in training."""
    seen = set()
    for example in draw(docstring_mini.RECIPE):
        head = example.text.split("(")[1].split(")")[0]
        seen |= successions(head.split(", "))
    assert len(seen) > 500
    for pair in task_of("docstring-mini").pairs:
        assert (split(pair.clean)[-3], pair.answers[0]) not in seen
