"""The bank: pairs of prompts to walk between, frozen before anything is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import ModelError, OptionError, ResourceError, TaskError, distinct_rows

if TYPE_CHECKING:
    from circuitlab import Task, Tokens, TracedModel

Ids = tuple[int, ...]

#: The kinds that need no file.
KINDS = ("last-token", "task", "unrelated")
#: Prompts drawn from a model's own texts for each pair that is asked for.
_DRAWN = 4
#: Last tokens that name a prompt whose context is another.
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Bank:
    """Pairs of prompts A and B of equal length; no pair is there twice.

    Attributes:
        a: Prompts A, ``[n_pairs, pos]``; walks run in their context.
        b: Prompts B, ``[n_pairs, pos]``, padded alike.
        labels: A short name of A and of B, ``[n_pairs]``.
        same_prefix: Whether A and B differ in the last token alone, in every pair. Only then does
            the activation of B, put into the run of A, give what B gives.
        kind: ``last-token``, ``task``, ``unrelated``, or the name of a file.
    """

    a: Tokens
    b: Tokens
    labels: list[tuple[str, str]]
    same_prefix: bool
    kind: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def swapped(self) -> Bank:
        """The same pairs, walked from B to A in the context of B."""
        return replace(self, a=self.b, b=self.a, labels=[(b, a) for a, b in self.labels])

    def rows(self, index: slice | Sequence[int]) -> Bank:
        """The chosen pairs."""
        chosen = range(len(self))[index] if isinstance(index, slice) else index
        picked = list(chosen)
        return replace(
            self,
            a=self.a.rows(picked),
            b=self.b.rows(picked),
            labels=[self.labels[row] for row in picked],
        )


def make_bank(
    model: TracedModel,
    task: Task | None,
    pairs: str = "last-token",
    n: int = 64,
    seed: int = 0,
) -> Bank:
    """At most ``n`` pairs of prompts, the same for the same seed.

    Prompts of ``last-token`` and ``unrelated`` are drawn from the model's own texts; from the clean
    prompts of the task where it has none.

    Args:
        model: Any traced model.
        task: The task; None for a model with texts of its own, or a file.
        pairs: One of

            * ``last-token``: B is A with another last token (Shinkle and Heimersheim 2025): one in
              which a prompt ends and that A holds; failing that, any in which a prompt ends;
              failing that, any that A holds;
            * ``task``: the task's clean and corrupt prompts;
            * ``unrelated``: two prompts of equal length (Janiak et al. 2024, arXiv:2409.17113), no
              prompt in two pairs while there are others;
            * a ``.jsonl`` file with an object on each line, whose ``a`` and ``b`` are texts or
              lists of token ids.
        n: Fewer where there are fewer.
        seed: Of what is drawn.

    Raises:
        OptionError: ``pairs`` is unknown, ``n`` is below 1, or no prompts are there.
        TaskError: no pair can be made, or the file is malformed; the message names the line.
    """
    if n < 1:
        raise OptionError(f"a bank of {n} pairs is empty; give 1 or more")
    found: Iterable[tuple[Ids, Ids]]
    if pairs == "task":
        found = _task_pairs(model, task)
    elif pairs == "last-token":
        bos = getattr(model.tokenizer, "bos_token_id", None)
        found = _last_tokens(_prompts(model, task, n, seed), n, seed, bos)
    elif pairs == "unrelated":
        found = _unrelated(_prompts(model, task, n, seed), seed)
    elif pairs.endswith(".jsonl"):
        found = _read_pairs(model, Path(pairs))
    else:
        raise OptionError(
            f"--pairs {pairs!r} is unknown; use {', '.join(KINDS)}, or a .jsonl file of pairs"
        )
    kept: dict[tuple[Ids, Ids], None] = {}
    for pair in found:
        if len(kept) == n:
            break
        kept[pair] = None
    if not kept:
        raise TaskError(f"--pairs {pairs}: {_WHY[pairs]}; use --pairs FILE.jsonl")
    return _bank(model, list(kept), Path(pairs).name)


#: Why there is no pair of a kind.
_WHY = {
    "last-token": "every prompt is one token long, always the same",
    "unrelated": "no two prompts have the same length",
}


def _bank(model: TracedModel, pairs: Sequence[tuple[Ids, Ids]], kind: str) -> Bank:
    a, b = (model.tokens([pair[side] for pair in pairs]) for side in (0, 1))
    same = all(first[:-1] == second[:-1] for first, second in pairs)
    shown = 1 if same else _NAMED
    names = [[_name(model, ids[-shown:]) for ids in pair] for pair in pairs]
    return Bank(a, b, [(first, second) for first, second in names], same, kind)


def _name(model: TracedModel, ids: Ids) -> str:
    return " ".join(text.strip() or repr(text) for text in model.token_texts(ids))


def _prompts(model: TracedModel, task: Task | None, n: int, seed: int) -> list[Ids]:
    """Distinct prompts as token ids: the model's own texts, or else the task's clean prompts."""
    try:
        tokens = model.tokens(model.corpus(_DRAWN * n, seed))
    except ModelError:
        if task is None:
            raise OptionError(
                f"model {model.name!r} brings no texts of its own and there is no task to take "
                f"prompts from; name one (--task), or use --pairs FILE.jsonl"
            ) from None
        tokens = model.encode(task).clean
    return list(dict.fromkeys(_rows(tokens)))


def _rows(tokens: Tokens) -> list[Ids]:
    rows = zip(tokens.ids, tokens.mask, strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in rows]


def _last_tokens(
    prompts: Sequence[Ids], n: int, seed: int, bos: int | None
) -> Iterator[tuple[Ids, Ids]]:
    """Each prompt with another last token, then each with a second one, until there are ``n``."""
    generator = torch.Generator().manual_seed(seed)
    ends = sorted({prompt[-1] for prompt in prompts})
    pools = []
    for prompt in _shuffled(prompts, generator)[:n]:
        held = set(prompt[:-1]) - {prompt[-1], bos}
        others = [end for end in ends if end != prompt[-1]]
        pool = [end for end in others if end in held] or others or sorted(held)
        pools.append((prompt, _shuffled(pool, generator)))
    for turn in range(max((len(pool) for _, pool in pools), default=0)):
        for prompt, pool in pools:
            if turn < len(pool):
                yield prompt, (*prompt[:-1], pool[turn])


def _unrelated(prompts: Sequence[Ids], seed: int) -> Iterator[tuple[Ids, Ids]]:
    """Pairs of one length: first such that no prompt is in two, then all others."""
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[Ids]] = {}
    for prompt in _shuffled(prompts, generator):
        by_length.setdefault(len(prompt), []).append(prompt)
    groups = [by_length[length] for length in sorted(by_length)]
    apart = [pair for group in groups for pair in zip(group[::2], group[1::2], strict=False)]
    yield from _shuffled(apart, generator)
    rest = [(a, b) for group in groups for i, a in enumerate(group) for b in group[i + 1 :]]
    yield from _shuffled(rest, generator)


def _shuffled(items: Sequence[Any], generator: torch.Generator) -> list[Any]:
    order = torch.randperm(len(items), generator=generator).tolist()
    return [items[place] for place in order]


def _task_pairs(model: TracedModel, task: Task | None) -> list[tuple[Ids, Ids]]:
    if task is None:
        raise OptionError("--pairs task: there is no task; name one with --task")
    pairs = model.encode(task)
    if not pairs.aligned:
        raise TaskError(
            f"task {task.name!r}: clean and corrupt prompts differ in length, so that the last "
            f"positions do not correspond; use --align drop, or --pairs last-token"
        )
    chosen = distinct_rows(pairs)
    return list(
        zip(_rows(pairs.clean.rows(chosen)), _rows(pairs.corrupt.rows(chosen)), strict=True)
    )


def _read_pairs(model: TracedModel, path: Path) -> list[tuple[Ids, Ids]]:
    """The pairs of a file, each line checked."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except PermissionError as error:
        raise ResourceError(f"{path}: reading is not permitted; change its permissions") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read ({error}); give a .jsonl file in UTF-8") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            pairs.append(_read_pair(model, line, f"{path}:{number}"))
    if not pairs:
        raise TaskError(f"{path} holds no pair; write an object with a and b on each line")
    return pairs


def _read_pair(model: TracedModel, line: str, where: str) -> tuple[Ids, Ids]:
    form = "write an object with a and b, texts or lists of token ids"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON ({error}); {form}") from error
    if not isinstance(value, dict) or value.keys() != {"a", "b"}:
        raise TaskError(f"{where}: no pair; {form}")
    found = []
    for name in ("a", "b"):
        prompt = value[name]
        ids = isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)
        if not ids and not isinstance(prompt, str):
            raise TaskError(f"{where}: {name} is no prompt; {form}")
        try:
            found += _rows(model.tokens([prompt if isinstance(prompt, str) else tuple(prompt)]))
        except TaskError as error:
            raise TaskError(f"{where}, {name}: {error}") from error
    a, b = found
    if len(a) != len(b):
        raise TaskError(f"{where}: a has {len(a)} tokens, b {len(b)}; give prompts of equal length")
    if a == b:
        raise TaskError(f"{where}: a and b are the same tokens; change one of them")
    return a, b
