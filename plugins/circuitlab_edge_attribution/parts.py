"""Parts: sums over pairs made part by part, so that stopped and split runs give one run's bytes.

Which pairs a part has follows from the model, the task and the batch size alone. A part's sum
begins at 0, and the parts' sums are added in their order, in float64, whoever has made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from circuitlab import Checkpoint, track

if TYPE_CHECKING:
    from circuitlab import EncodedTask

#: Parts at most, and bytes that the sums of all may take: they are kept together.
MOST = 64
KEPT = 2**28


class Adder(Protocol):
    """Adds up batches."""

    total: Tensor

    def add(self, batch: EncodedTask) -> None:
        """Add a batch."""

    def take(self) -> tuple[Tensor, Tensor]:
        """What was added since the last time."""


def cut_into_parts(pairs: EncodedTask, planned: int, n_scores: int) -> list[EncodedTask]:
    """The pairs in parts of whole batches, as equal as can be.

    Args:
        pairs: The encoded task.
        planned: Pairs per batch where memory suffices.
        n_scores: Numbers in the sum of a part.
    """
    n_batches = -(-len(pairs) // planned)
    n_parts = min(n_batches, MOST, max(1, KEPT // (8 * n_scores)))
    bounds = [planned * (n * n_batches // n_parts) for n in range(n_parts + 1)]
    return [pairs.rows(slice(*ends)) for ends in pairwise(bounds)]


def sum_parts(
    adder: Adder, parts: Sequence[EncodedTask], size: int, stage: str | None, title: str
) -> tuple[Tensor, float, float]:
    """All that the adder gives for the parts; in a shard, NaN.

    Args:
        adder: Adds up batches.
        parts: From :func:`cut_into_parts`.
        size: Pairs per batch.
        stage: Name of the checkpoint; None for none.
        title: What is done, for people.
    """
    state = {
        "scores": adder.total.new_full((len(parts), *adder.total.shape), torch.nan),
        "rest": adder.total.new_full((len(parts), 2), torch.nan),
    }
    mine: Sequence[int] = range(len(parts))
    with Checkpoint(stage) if stage else nullcontext() as saved:
        if saved is not None:
            mine = saved.share(mine)
            state = saved.load() or state
        left = [n for n in mine if state["rest"][n].isnan().any()]
        counts = {n: -(-len(parts[n]) // size) for n in mine}
        n_all = sum(counts.values())
        done = n_all - sum(counts[n] for n in left)
        for n, batch, last in track(_batches(parts, left, size), title, total=n_all, done=done):
            adder.add(batch)
            if not last:
                continue
            state["scores"][n], state["rest"][n] = adder.take()
            if saved is not None:
                saved.keep(state)
    total, rest = torch.zeros_like(adder.total), adder.total.new_zeros(2)
    for scores, others in zip(state["scores"], state["rest"], strict=True):
        total += scores
        rest += others
    return total, float(rest[0]), float(rest[1])


def _batches(
    parts: Sequence[EncodedTask], left: Sequence[int], size: int
) -> Iterator[tuple[int, EncodedTask, bool]]:
    """Every batch of the parts that are left, with its part, and whether it is that one's last."""
    for n in left:
        n_batches = -(-len(parts[n]) // size)
        for i, batch in enumerate(parts[n].batches(size), start=1):
            yield n, batch, i == n_batches
