"""Task: the behaviour a circuit should explain, as contrasting pairs of prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from circuitlab.errors import OptionError, TaskError
from circuitlab.labels import counted, excerpt, invisible
from circuitlab.notebook import Shown, html_table

#: A prompt is text, or token ids for a model without a tokenizer.
Prompt = str | tuple[int, ...]
Answer = str | int
#: What to do with a pair whose prompts differ in length.
Align = Literal["refuse", "pad", "drop"]

#: No vocabulary is this large; ids from here on cannot be meant.
ID_LIMIT = 2**31
#: Longest task name, so that a file named after it can be made on every system.
NAME_LIMIT = 100

_SEPARATORS = "/\\:"


@dataclass(frozen=True, slots=True)
class PromptPair:
    """One contrast: the clean prompt and a corrupt one that differs in what the task turns on.

    Attributes:
        clean: Prompt the model answers rightly.
        corrupt: The same kind (text or ids), with the decisive information changed.
        answers: Right next tokens of the clean prompt, at least one. Text keeps its leading space.
        wrong_answers: Next tokens the right ones are compared with; some metrics need them.

    Lists, and a single answer without a list, are accepted and kept as tuples.

    Raises:
        TaskError: a value has the wrong type or is empty, an id is negative, or text and ids mix.
    """

    clean: Prompt
    corrupt: Prompt
    answers: tuple[Answer, ...]
    wrong_answers: tuple[Answer, ...] = ()

    def __post_init__(self) -> None:
        for key in ("clean", "corrupt"):
            object.__setattr__(self, key, _checked_prompt(key, getattr(self, key)))
        for key in ("answers", "wrong_answers"):
            object.__setattr__(self, key, _checked_answers(key, getattr(self, key)))
        if not self.answers:
            raise TaskError("answers is empty; name at least one right answer")
        if isinstance(self.clean, str) != isinstance(self.corrupt, str):
            kinds = ("text", "token ids") if isinstance(self.clean, str) else ("token ids", "text")
            raise TaskError(
                f"clean is {kinds[0]}, corrupt is {kinds[1]}; "
                f"write both as text or both as token ids"
            )

    @property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the pair's canonical JSON."""
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values in auto-circuit's layout, as a task file holds them."""
        return {
            "clean": _plain(self.clean),
            "corrupt": _plain(self.corrupt),
            "answers": list(self.answers),
            "wrong_answers": list(self.wrong_answers),
        }


@dataclass(frozen=True, slots=True)
class Task(Shown):
    """A named set of prompt pairs and the metric that says how well a run does on them.

    Attributes:
        name: Usable as a file name: no path separator, ``..`` or invisible character.
        pairs: At least one.
        metric: Name of a metric, see :mod:`circuitlab.metrics`.
        description: What the model has to do, for people.
        align: What to do with pairs whose prompts differ in length: ``refuse``; ``drop`` them; or
            ``pad`` the shorter on the left, after which positions no longer correspond.

    Raises:
        TaskError: the name cannot be used, or there are no pairs.
    """

    name: str
    pairs: tuple[PromptPair, ...]
    metric: str = "logit-difference"
    description: str = ""
    align: Align = "refuse"

    def __post_init__(self) -> None:
        _check_name(self.name)
        for key in ("metric", "description"):
            if not isinstance(getattr(self, key), str):
                raise TaskError(
                    f"task {self.name!r}: {key} is {kind_of(getattr(self, key))}; it must be text"
                )
            if _has_surrogate(getattr(self, key)):
                raise TaskError(
                    f"task {self.name!r}: {key} holds half a surrogate pair; write UTF-8"
                )
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if not self.pairs:
            raise TaskError(f"task {self.name!r} has no prompt pairs; give at least one")

    @classmethod
    def from_pair(
        cls,
        clean: str | Sequence[int],
        corrupt: str | Sequence[int],
        answer: Answer | Sequence[Answer],
        wrong: Answer | Sequence[Answer] | None = None,
        *,
        name: str = "prompt-pair",
        metric: str = "logit-difference",
    ) -> Self:
        """A task of one pair.

        Example:
            >>> task = Task.from_pair("When Mary and John went, John gave it to",
            ...                       "When Mary and John went, Mary gave it to", " Mary", " John")
            >>> len(task.pairs)
            1

        Raises:
            TaskError: a value cannot be used, see :class:`PromptPair`.
        """
        pair = PromptPair(
            clean if isinstance(clean, str) else tuple(clean),
            corrupt if isinstance(corrupt, str) else tuple(corrupt),
            _as_tuple(answer),
            () if wrong is None else _as_tuple(wrong),
        )
        return cls(name, (pair,), metric)

    @property
    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the task's canonical JSON."""
        return _digest(self.to_json())

    def _shown(self) -> tuple[str, str]:
        text = f"Task {self.name!r}: {counted(len(self.pairs), 'pair')}, metric {self.metric}"
        rows = [(p.clean, p.corrupt, p.answers, p.wrong_answers) for p in self.pairs]
        header = ("clean", "corrupt", "answers", "wrong answers")
        return text, html_table(header, rows, caption=text)

    def take(self, n: int) -> Task:
        """The task of the first ``n`` pairs; the whole task when it has no more than that.

        Raises:
            OptionError: ``n`` is below 1.
        """
        if n < 1:
            raise OptionError(f"task {self.name!r}: cannot take {n} pairs; take 1 or more")
        return self if n >= len(self.pairs) else replace(self, pairs=self.pairs[:n])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values in auto-circuit's layout, as a task file holds them."""
        return {
            "name": self.name,
            "metric": self.metric,
            "description": self.description,
            "prompts": [pair.to_json() for pair in self.pairs],
        }


def slug(text: str) -> str:
    """A usable task name made from any text: what a name may not hold becomes ``-``."""
    kept = "".join("-" if c in _SEPARATORS or invisible(c) else c for c in text)
    while ".." in kept:
        kept = kept.replace("..", ".")
    return kept[:NAME_LIMIT].strip(" .") or "task"


def kind_of(value: object) -> str:
    """What a value read from a file is, in words a writer of the file knows."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "a table"}
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "a list"
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _checked_prompt(key: str, value: object) -> Prompt:
    if isinstance(value, str):
        _check_text(key, value)
        return value
    if not isinstance(value, list | tuple):
        raise TaskError(f"{key} is {kind_of(value)}; it must be text or a list of token ids")
    if not value:
        raise TaskError(f"{key} is empty; write at least one token")
    return tuple(_checked_id(key, item) for item in value)


def _checked_answers(key: str, value: object) -> tuple[Answer, ...]:
    items = value if isinstance(value, list | tuple) else (value,)
    answers: list[Answer] = []
    for item in items:
        if isinstance(item, str):
            _check_text(key, item)
            answers.append(item)
        elif isinstance(item, int) and not isinstance(item, bool):
            answers.append(_checked_id(key, item))
        else:
            raise TaskError(f"{key} holds {kind_of(item)}; an answer must be text or a token id")
    if len({type(answer) for answer in answers}) > 1:
        raise TaskError(f"{key} mixes text and token ids; write all as text or all as token ids")
    return tuple(answers)


def _check_text(key: str, text: str) -> None:
    if not text:
        raise TaskError(f"{key} holds empty text; write at least one token")
    if _has_surrogate(text):
        raise TaskError(
            f"{key} '{excerpt(text, 40)}' holds half a surrogate pair, which no tokenizer reads; "
            f"write the whole character"
        )


def _checked_id(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        shown = f" ('{excerpt(value, 40)}')" if isinstance(value, str) else ""
        raise TaskError(
            f"{key} holds {kind_of(value)}{shown} where a token id was expected; "
            f"write whole numbers, or the whole prompt as text"
        )
    if value < 0:
        shown_id = max(value, -ID_LIMIT)
        raise TaskError(f"{key} holds the negative token id {shown_id}; ids start at 0")
    if value >= ID_LIMIT:
        raise TaskError(f"{key} holds a token id of {ID_LIMIT} or more; write a smaller one")
    return value


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TaskError(f"task name is {kind_of(name)}; it must be text")
    shown = excerpt(name, 60)
    if not name.strip(" ."):
        raise TaskError(f"task name '{shown}' is empty; name the task")
    if ".." in name or any(c in _SEPARATORS for c in name):
        raise TaskError(
            f"task name '{shown}' looks like a path; use a name without '/', '\\', ':' or '..'"
        )
    if name != name.strip(" ."):
        raise TaskError(f"task name '{shown}' begins or ends with a space or dot; leave it out")
    if len(name) > NAME_LIMIT:
        raise TaskError(f"task name '{shown}' has {len(name)} characters; use at most {NAME_LIMIT}")
    if any(invisible(c) for c in name):
        raise TaskError(f"task name '{shown}' holds an invisible character; leave it out")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _as_tuple(answers: Answer | Sequence[Answer]) -> tuple[Answer, ...]:
    return (answers,) if isinstance(answers, str | int) else tuple(answers)


def _plain(prompt: Prompt) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _digest(value: dict[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:12]
