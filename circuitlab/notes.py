"""Notes: what is odd about the pairs of a task, gathered until it is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuitlab.tasks import Task


class Notes:
    """Warnings, gathered so that one sentence names all the pairs it holds for."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._pairs: dict[str, list[int]] = {}
        self._examples: dict[str, str] = {}

    def add(self, fact: str, number: int, example: str = "") -> None:
        """Note a fact about a pair; the first example stays."""
        self._pairs.setdefault(fact, []).append(number)
        self._examples.setdefault(fact, example)

    def sentences(self) -> tuple[str, ...]:
        """One warning for each fact."""
        return tuple(
            f"task {self.task.name!r}, {pair_names(numbers)}: {fact}"
            + (f" ({self._examples[fact]})" if self._examples[fact] else "")
            for fact, numbers in self._pairs.items()
        )


def pair_names(numbers: list[int]) -> str:
    """``pair 3``; ``pairs 1, 4, 6, 7, 9 and 2 more`` names the first five."""
    if len(numbers) == 1:
        return f"pair {numbers[0]}"
    named = ", ".join(map(str, numbers[:5]))
    return f"pairs {named}" + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
