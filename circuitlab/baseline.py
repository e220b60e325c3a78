"""What the model does on a task before anything is patched, and whether it is worth explaining."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from circuitlab.bootstrap import distinct_rows, mean_intervals
from circuitlab.errors import NumericsError, TaskError
from circuitlab.memory import choose_batch_size
from circuitlab.model import TracedModel
from circuitlab.progress import track
from circuitlab.prompts import EncodedTask


@dataclass(frozen=True)
class Baseline:
    """The metric of every pair, clean and corrupt, ``[n_pairs]`` each, float64.

    Attributes:
        clean: Metric of the clean run.
        corrupt: Metric of the corrupt run, scored with the clean run's answers.
        accuracy: Share of pairs whose clean run ranks a right answer above every wrong one; with no
            wrong answers, above every other token.
        chance: Accuracy of guessing among the answers.
        distinct: Rows that repeat no earlier pair; None for all. An interval is taken over these
            alone: a repeated pair is no further evidence.
    """

    clean: Tensor
    corrupt: Tensor
    accuracy: float
    chance: float
    distinct: list[int] | None = None

    @property
    def effect(self) -> float:
        """Mean of corrupt - clean, in metric units."""
        return float((self.corrupt - self.clean).mean())

    def interval(self, seed: int = 0) -> tuple[float, float] | None:
        """Percentile bootstrap 95 % interval of the effect over distinct pairs; None for one."""
        change = self.corrupt - self.clean
        if self.distinct is not None:
            change = change[self.distinct]
        return mean_intervals(change[None], seed)[0]

    def weak(self, seed: int = 0) -> bool:
        """Whether the effect is within its own noise: its interval holds 0."""
        interval = self.interval(seed)
        return interval is not None and interval[0] <= 0 <= interval[1]

    def to_json(self, seed: int = 0) -> dict[str, Any]:
        """What the provenance of a circuit says about it."""
        interval = self.interval(seed)
        undefined = "undefined (1 pair)"
        if interval is not None and interval[0] == interval[1]:
            undefined, interval = "undefined (zero variance)", None
        return {
            "clean": float(self.clean.mean()),
            "corrupt": float(self.corrupt.mean()),
            "effect": self.effect,
            "interval": undefined if interval is None else list(interval),
            "accuracy": self.accuracy,
            "chance": self.chance,
            "n_pairs": len(self.clean),
        }


@torch.no_grad()
def measure(model: TracedModel, pairs: EncodedTask) -> Baseline:
    """Run every pair clean and corrupt.

    Raises:
        NumericsError: an activation is not finite.
    """
    clean, corrupt, right = [], [], 0
    batches = list(pairs.batches(choose_batch_size(model, pairs)))
    for batch in track(batches, "running the task"):
        # Both are begun first: on a host they share a round trip.
        with _naming(batch, "clean"):
            first = model.run(batch.clean)
        with _naming(batch, "corrupt"):
            second = model.run(batch.corrupt)
        with _naming(batch, "clean"):
            logits = first.logits[:, -1]
        with _naming(batch, "corrupt"):
            changed = second.logits[:, -1]
        clean.append(batch.score(logits, logits).double().cpu())
        corrupt.append(batch.score(changed, logits).double().cpu())
        right += _right(batch, logits)
    chance = _chance(pairs, model.vocab_size)
    scores = torch.cat(clean), torch.cat(corrupt)
    return Baseline(*scores, right / len(pairs), chance, distinct_rows(pairs))


def check(baseline: Baseline, pairs: EncodedTask, *, allow_weak: bool, seed: int = 0) -> list[str]:
    """Refuse a task that there is nothing to explain in; return warnings about a doubtful one.

    Raises:
        TaskError: no pair's metric changes, or the change is within its own noise and
            ``allow_weak`` is not set.
    """
    change = baseline.corrupt - baseline.clean
    flat = [pairs.numbers[row] for row in (change == 0).nonzero().flatten().tolist()]
    if len(flat) == len(pairs):
        raise TaskError(
            f"the metric gap is 0 for every pair of task {pairs.task.name!r}: clean and corrupt "
            f"prompts score the same, so no component can matter; change what the corrupt prompts "
            f"differ in, or the answers"
        )
    warnings = []
    if flat:
        warnings.append(f"the metric gap is 0 for pairs {_listed(flat)}: they tell nothing")
    interval = baseline.interval(seed)
    if interval is None:
        warnings.append("1 pair: no interval can be given")
    elif baseline.weak(seed):
        fact = (
            f"metric(corrupt) - metric(clean) is {baseline.effect:.3g} "
            f"[{interval[0]:.3g}, {interval[1]:.3g}] over {len(pairs)} pairs: its 95 % interval "
            f"holds 0"
        )
        if not allow_weak:
            raise TaskError(
                f"task {pairs.task.name!r}: {fact}, so there is no reliable effect to explain; add "
                f"pairs, or go on with --allow-weak"
            )
        warnings.append(f"WEAK TASK: {fact}; shares of the effect are undefined")
    if baseline.accuracy <= baseline.chance:
        warnings.append(
            f"the model does not do the task: accuracy {baseline.accuracy:.0%}, chance "
            f"{baseline.chance:.0%}; a circuit would explain a behaviour that is not there"
        )
    return warnings


@contextmanager
def _naming(batch: EncodedTask, part: Literal["clean", "corrupt"]) -> Iterator[None]:
    """Where a number is not finite inside, its pairs are named."""
    try:
        yield
    except NumericsError as error:
        pairs = _listed(list(batch.numbers))
        raise NumericsError(
            f"task {batch.task.name!r}, {part} prompts of pairs {pairs}: {error}"
        ) from error


def _right(batch: EncodedTask, logits: Tensor) -> int:
    best = logits.gather(-1, batch.answers.right.clamp(min=0))
    best = best.masked_fill(batch.answers.right < 0, -torch.inf).amax(-1)
    rivals = logits
    if batch.answers.wrong.shape[-1]:
        wrong = batch.answers.wrong
        rivals = logits.gather(-1, wrong.clamp(min=0)).masked_fill(wrong < 0, -torch.inf)
        return int((best > rivals.amax(-1)).sum())
    return int((best >= rivals.amax(-1)).sum())


def _chance(pairs: EncodedTask, vocab_size: int) -> float:
    right = (pairs.answers.right >= 0).sum(-1).double()
    wrong = (pairs.answers.wrong >= 0).sum(-1).double()
    total = torch.where(wrong > 0, right + wrong, torch.full_like(right, vocab_size))
    return float((right / total).mean())


def _listed(numbers: list[int], most: int = 8) -> str:
    text = ", ".join(map(str, numbers[:most]))
    return f"{text} and {len(numbers) - most} more" if len(numbers) > most else text
