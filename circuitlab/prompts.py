"""Prompts as tokens: a task encoded for one model, with every check made at the door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from circuitlab.errors import OptionError, SiteError, TaskError
from circuitlab.labels import counted
from circuitlab.metrics import METRICS, Answers, Metric, find_metric
from circuitlab.notebook import Shown, html_table
from circuitlab.notes import Notes, pair_names
from circuitlab.tasks import Align, Prompt, PromptPair, Task
from circuitlab.tokenization import Encoder, Tokenizer, quoted


@dataclass(frozen=True, eq=False, slots=True)
class Tokens:
    """Prompts of one batch, padded on the left so that the last position is every prompt's last.

    Attributes:
        ids: ``[batch, pos]``, int64; 0 where padded.
        mask: ``[batch, pos]``, bool; True where a token is real, and others may attend to it.
        positions: ``[batch, pos]``, where each token stands; None: after the real ones before it.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def position_ids(self) -> Tensor:
        """Position of each token in its own prompt, ``[batch, pos]``; 0 where padded."""
        if self.positions is not None:
            return self.positions
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def rows(self, index: int | slice | Sequence[int] | Tensor) -> Tokens:
        """The chosen prompts, ``[chosen, pos]``; an integer gives a batch of one."""
        chosen = [index] if isinstance(index, int) else index
        return self._each(lambda part: part[chosen])

    def trimmed(self) -> Tokens:
        """The same prompts without the padding that all of them share."""
        start = self._start()
        return self._each(lambda part: part[:, start:])

    def hiding(self, chosen: Tensor) -> Tokens:
        """The same prompts in which no token attends to those ``chosen``, ``[batch, pos]`` bool.

        All keep their positions. What a run holds at a hidden token has no meaning.
        """
        return Tokens(self.ids, self.mask & ~chosen, self.position_ids)

    def repeat(self, n: int) -> Tokens:
        """All prompts ``n`` times over, ``[n * batch, pos]``."""
        return self._each(lambda part: part.repeat(n, 1))

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on ``device``."""
        return self._each(lambda part: part.to(device))

    def _start(self) -> int:
        """First column that is not padding in every prompt."""
        return self.mask.shape[1] - int(self.mask.any(0).cumsum(0).count_nonzero())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        positions = None if self.positions is None else change(self.positions)
        return Tokens(change(self.ids), change(self.mask), positions)


@dataclass(frozen=True, eq=False, slots=True)
class EncodedTask(Shown):
    """A task's prompts and answers as one model reads them.

    Attributes:
        task: The task as it was given.
        clean: Clean prompts, ``[batch, pos]``.
        corrupt: Corrupt prompts, ``[batch, pos]``, the same ``pos``.
        answers: Right and wrong answers of each pair.
        metric: What scores a run.
        warnings: What is odd about the task without stopping it, one sentence each.
        tokens_text: The clean prompt's tokens of each pair as text, without padding, for people.
        numbers: Number of each row's pair in the task, counted from 1.
    """

    task: Task
    clean: Tokens
    corrupt: Tokens
    answers: Answers
    metric: Metric
    warnings: tuple[str, ...]
    tokens_text: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.clean)

    def _shown(self) -> tuple[str, str]:
        width = self.clean.ids.shape[1]
        text = f"{counted(len(self), 'pair')} of task {self.task.name!r}, {width} positions, "
        text += f"metric {self.metric.name}"
        rows: list[tuple[object, ...]] = [
            (number, " ".join(tokens), self.task.pairs[number - 1].answers)
            for number, tokens in zip(self.numbers, self.tokens_text, strict=True)
        ]
        rows += [("warning", warning, "") for warning in self.warnings]
        return text, html_table(("pair", "clean, as tokens", "answers"), rows, caption=text)

    @property
    def aligned(self) -> bool:
        """Whether a position means the same in the clean and the corrupt prompt of every pair."""
        return torch.equal(self.clean.mask, self.corrupt.mask)

    def rows(self, index: slice | Sequence[int]) -> EncodedTask:
        """The chosen pairs, without the padding that all of their prompts share."""
        picked = range(len(self))[index] if isinstance(index, slice) else list(index)
        clean, corrupt = self.clean.rows(list(picked)), self.corrupt.rows(list(picked))
        start = min(clean._start(), corrupt._start())
        return replace(
            self,
            clean=clean._each(lambda part: part[:, start:]),
            corrupt=corrupt._each(lambda part: part[:, start:]),
            answers=Answers(self.answers.right[list(picked)], self.answers.wrong[list(picked)]),
            tokens_text=tuple(self.tokens_text[i] for i in picked),
            numbers=tuple(self.numbers[i] for i in picked),
        )

    def batches(self, size: int) -> Iterator[EncodedTask]:
        """The pairs in order, ``size`` at a time, each batch only as wide as it must be.

        Raises:
            OptionError: ``size`` is below 1.
        """
        if size < 1:
            raise OptionError(f"batch size {size} is too small; use 1 or more")
        return (self.rows(slice(i, i + size)) for i in range(0, len(self), size))

    def score(self, logits: Tensor, reference: Tensor) -> Tensor:
        """The metric of each pair, ``[batch]``, in at least float32; higher = more of the task.

        Args:
            logits: Logits after the last token, ``[batch, vocab]``.
            reference: The clean run's, ``[batch, vocab]``.

        Raises:
            SiteError: the logits have another shape.
        """
        for name, value in (("logits", logits), ("reference", reference)):
            if value.ndim != 2 or value.shape[0] != len(self):
                raise SiteError(
                    f"{name} to score have shape {list(value.shape)}; "
                    f"give those after the last token, [{len(self)}, vocab]"
                )
        return self.metric(logits, self.answers, reference)

    def narrowed(self) -> tuple[EncodedTask, Tensor | None]:
        """The task scored on few logits, and the tokens these belong to, ``[n]``.

        Where the metric looks at the answers alone, only their logits need to be computed: the task
        returned takes logits ``[batch, n]``. Else it is this task, and None.
        """
        if not self.metric.answers_only:
            return self, None
        parts = (self.answers.right, self.answers.wrong)
        both = torch.cat([part.flatten() for part in parts])
        tokens = torch.unique(both[both >= 0])
        places = [
            torch.where(part < 0, -1, torch.searchsorted(tokens, part.contiguous().clamp(min=0)))
            for part in parts
        ]
        return replace(self, answers=Answers(*places)), tokens

    def to(self, device: torch.device | str) -> EncodedTask:
        """The same task with its tensors on ``device``."""
        answers = Answers(self.answers.right.to(device), self.answers.wrong.to(device))
        return replace(
            self, clean=self.clean.to(device), corrupt=self.corrupt.to(device), answers=answers
        )


def encode_prompts(
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    *,
    vocab_size: int,
    n_positions: int,
) -> Tokens:
    """The prompts as token ids, padded on the left to the longest.

    Args:
        tokenizer: None for a model that has none; then every prompt must be token ids.
        prompts: At least one. Text gets what the tokenizer adds in front (a BOS token) but not what
            it appends: the answer follows the prompt's own last token. Ids are used as they are.
        vocab_size: Size of the model's vocabulary.
        n_positions: Longest prompt the model reads, in tokens.

    Raises:
        TaskError: a prompt cannot be encoded; the message names it, its tokens and a remedy.
    """
    if not prompts:
        raise TaskError("there are no prompts to encode; give at least one")
    encoder = Encoder(tokenizer, vocab_size, n_positions)
    encoded = [encoder.prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]
    return _padded(encoded, max(len(ids) for ids in encoded))


def encode_task(
    tokenizer: Tokenizer | None,
    task: Task,
    *,
    vocab_size: int,
    n_positions: int,
    metric: str | None = None,
    align: Align | None = None,
) -> EncodedTask:
    """The task as one model reads it.

    Answers are single tokens; one that is named twice counts once.

    Args:
        tokenizer: None for a model that has none; then prompts and answers must be token ids.
        task: What to encode.
        vocab_size: Size of the model's vocabulary.
        n_positions: Longest prompt the model reads, in tokens.
        metric: Taken instead of the task's.
        align: Taken instead of the task's.

    Raises:
        TaskError: a pair cannot be used; the message names it, its tokens and a remedy.
        OptionError: ``align`` is none of the three.
    """
    align = align or task.align
    if align not in get_args(Align):
        raise OptionError(f"align {align!r} is unknown; use {', '.join(get_args(Align))}")
    chosen = find_metric(metric or task.metric)
    encoder = Encoder(tokenizer, vocab_size, n_positions)
    notes = Notes(task)
    rows = [_encode_pair(encoder, notes, pair, i, chosen) for i, pair in enumerate(task.pairs, 1)]
    _refuse_equal(task, encoder, rows)
    rows = _align(task, encoder, notes, rows, align)
    _note_repeats(notes, rows)
    width = max(max(len(row.clean), len(row.corrupt)) for row in rows)
    return EncodedTask(
        task,
        _padded([row.clean for row in rows], width),
        _padded([row.corrupt for row in rows], width),
        Answers(_answer_ids([row.right for row in rows]), _answer_ids([row.wrong for row in rows])),
        chosen,
        notes.sentences(),
        tuple(encoder.tokens(row.clean) for row in rows),
        tuple(row.number for row in rows),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One encoded pair; ``number`` counts from 1 in the task."""

    number: int
    clean: list[int]
    corrupt: list[int]
    right: list[int]
    wrong: list[int]


def _encode_pair(
    encoder: Encoder, notes: Notes, pair: PromptPair, number: int, metric: Metric
) -> _Row:
    where = f"task {notes.task.name!r}, pair {number}"
    ids: dict[str, list[int]] = {}
    for part, prompt in (("clean", pair.clean), ("corrupt", pair.corrupt)):
        ids[part] = encoder.prompt(prompt, f"{where}: {part}")
        for fact in encoder.oddities(prompt, ids[part]):
            notes.add(f"{part} {fact}", number)
    if metric.needs_wrong and not pair.wrong_answers:
        free = [name for name, other in METRICS.items() if not other.needs_wrong]
        raise TaskError(
            f"{where}: metric {metric.name!r} needs a wrong answer and there is none; "
            f"name one, or use --metric {free[0]}"
        )
    right = [encoder.answer(answer, f"{where}: answer") for answer in pair.answers]
    wrong = [encoder.answer(answer, f"{where}: wrong answer") for answer in pair.wrong_answers]
    both = [i for i in right if i in wrong]
    if both:
        raise TaskError(
            f"{where}: token {quoted(encoder.tokens(both[:1])[0])} is both an answer and a wrong "
            f"answer; take it out of one of them"
        )
    spaceless = [a for a in (*pair.answers, *pair.wrong_answers) if encoder.lacks_space(a)]
    if spaceless and isinstance(pair.clean, str) and not pair.clean[-1].isspace():
        notes.add(
            "an answer begins without a space, so it continues the last word; "
            "put a space before it if it is a word of its own",
            number,
            f"{quoted(str(spaceless[0]))} and {quoted(f' {spaceless[0]}')} are different tokens",
        )
    return _Row(
        number, ids["clean"], ids["corrupt"], list(dict.fromkeys(right)), list(dict.fromkeys(wrong))
    )


def _refuse_equal(task: Task, encoder: Encoder, rows: list[_Row]) -> None:
    equal = [row for row in rows if row.clean == row.corrupt]
    if equal:
        raise TaskError(
            f"task {task.name!r}, {pair_names([row.number for row in equal])}: "
            f"the metric gap is 0, clean and corrupt are the same tokens "
            f"{encoder.shown(equal[0].clean)}; change corrupt or leave the pair out"
        )


def _align(
    task: Task, encoder: Encoder, notes: Notes, rows: list[_Row], align: Align
) -> list[_Row]:
    uneven = [row for row in rows if len(row.clean) != len(row.corrupt)]
    if not uneven:
        return rows
    if align == "refuse":
        lengths = "; ".join(
            f"pair {row.number}: clean has {len(row.clean)} tokens {encoder.shown(row.clean)}, "
            f"corrupt {len(row.corrupt)} {encoder.shown(row.corrupt)}"
            for row in uneven[:3]
        )
        raise TaskError(
            f"task {task.name!r}, {pair_names([row.number for row in uneven])}: clean and corrupt "
            f"differ in length ({lengths}); use --align drop to leave such pairs out, "
            f"or --align pad to pad the shorter on the left"
        )
    for row in uneven:
        if align == "drop":
            notes.add("left out, clean and corrupt differ in length", row.number)
        else:
            notes.add(
                "the shorter prompt is padded on the left; positions no longer correspond",
                row.number,
            )
    if align == "pad":
        return rows
    kept = [row for row in rows if len(row.clean) == len(row.corrupt)]
    if not kept:
        raise TaskError(
            f"task {task.name!r}: clean and corrupt differ in length in every pair, none is left; "
            f"use --align pad, or prompts of equal length"
        )
    return kept


def _note_repeats(notes: Notes, rows: list[_Row]) -> None:
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    repeats = []
    for row in rows:
        key = (tuple(row.clean), tuple(row.corrupt))
        if key in seen:
            repeats.append(row.number)
        seen.add(key)
    for number in repeats:
        notes.add(
            f"{len(repeats)} of {len(rows)} pairs repeat an earlier one; they weigh double in "
            f"every mean and are no further evidence in an interval, leave them out",
            number,
        )


def _padded(rows: list[list[int]], width: int) -> Tokens:
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return Tokens(ids, mask)


def _answer_ids(rows: list[list[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)
