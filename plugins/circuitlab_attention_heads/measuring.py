"""One pass over a task that measures all that is said of attention scores, head by head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import ModelError, OptionError, choose_batch_size, track
from circuitlab_attention_heads.head_names import Head, all_heads
from circuitlab_attention_heads.margins import Against, contest, split_margin
from circuitlab_attention_heads.replacing import Replacer
from circuitlab_attention_heads.scores import split_scores, stream_parts
from circuitlab_attention_heads.sharpness import (
    RULES,
    TEMPERATURES,
    Attention,
    Rule,
    sharpness,
    softmax,
    tempered,
    uniform,
)

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, TracedModel

#: Heads that are looked at one by one where none are named.
MOST_HEADS = 64
#: Pairs on which they are chosen, where there are more.
TRIED_PAIRS = 8
#: Last tokens of the first prompt whose patterns are kept, for a picture.
SHOWN_TOKENS = 40


@dataclass(frozen=True)
class HeadMeasures:
    """What was measured of one head; one column for each pair, float64, on the CPU.

    Attributes:
        names: The parts that its scores are split over.
        margin: At the query, ``[n_pairs]``, in score units.
        remainder: The part of it that is nobody's: minus the entropy of the rivals.
        by_query: ``[n_parts, n_pairs]``: the rest, split over the query's parts.
        by_key: The same, split over the keys' parts.
        both: ``[n_parts, n_parts]``: mean over pairs, the query's part, then the keys'.
        n_eff: Effective number of keys at the query, ``[n_pairs]``.
        top1: Largest attention at the query.
        everywhere: Mean ``n_eff``, ``top1`` and best score less second best, over all queries of
            all prompts that see two keys, ``[3]``.
        changes: Metric with the head's attention divided by a rule, less the clean metric; by rule,
            ``[n_pairs]`` each.
        pattern: Its attention on the first pair's last :data:`SHOWN_TOKENS` tokens, ``[query,
            key]``.
    """

    names: tuple[str, ...]
    margin: Tensor
    remainder: Tensor
    by_query: Tensor
    by_key: Tensor
    both: Tensor
    n_eff: Tensor
    top1: Tensor
    everywhere: Tensor
    changes: Mapping[str, Tensor]
    pattern: Tensor


@dataclass(frozen=True)
class Measured:
    """What was measured of a task.

    Attributes:
        heads: Of each head that was looked at, in the order they run.
        clean: The metric of each clean prompt, ``[n_pairs]``, float64.
        corrupt: Of each corrupt prompt.
        changes: As of a head, for several at once.
    """

    heads: Mapping[Head, HeadMeasures]
    clean: Tensor
    corrupt: Tensor
    changes: Mapping[str, Tensor]


def rules_of(temperatures: bool) -> dict[str, Rule]:
    """The rules that are tried, by name; temperatures are named by their number."""
    scan = {f"{t:g}": tempered(t) for t in TEMPERATURES} if temperatures else {}
    return RULES | scan


def query_offsets(pairs: EncodedTask, query: int) -> Tensor:
    """Where each clean prompt's query stands, counted from its end, ``[n_pairs]``; -1 is the last.

    Raises:
        OptionError: a prompt has no such position, or it sees no key but itself.
    """
    lengths = pairs.clean.mask.sum(-1)
    offsets = torch.full_like(lengths, query) if query < 0 else query - lengths
    for number, length, offset in zip(
        pairs.numbers, lengths.tolist(), offsets.tolist(), strict=True
    ):
        if not -length <= offset < 0:
            raise OptionError(
                f"--query {query}: the clean prompt of pair {number} has {length} tokens; give a "
                f"position that all prompts have"
            )
        if offset == -length:
            raise OptionError(
                f"--query {query}: in pair {number} it is the first token, which sees no key but "
                f"itself, so that there is nothing to prefer; give a later one"
            )
    return offsets


@torch.no_grad()
def choose_heads(model: TracedModel, pairs: EncodedTask, batch_size: int | None) -> list[Head]:
    """All heads; of more than :data:`MOST_HEADS`, those that need to look where they look.

    That is, whose attention, made uniform, changes the metric most: mean absolute change over the
    first :data:`TRIED_PAIRS` pairs.
    """
    heads = all_heads(model.wiring)
    if len(heads) <= MOST_HEADS:
        return heads
    tried = pairs.rows(slice(0, TRIED_PAIRS))
    changes: dict[Head, float] = defaultdict(float)
    for batch in tried.batches(choose_batch_size(model, tried, batch_size)):
        replacer = Replacer(model, batch)
        for layer in track(range(model.n_layers), f"choosing {MOST_HEADS} heads"):
            attention = replacer.attention(layer)
            for head in range(model.n_heads):
                score = replacer.alone(layer, head, attention, [uniform])[0]
                changes[layer, head] += float((score - replacer.clean).abs().sum())
    return sorted(sorted(heads, key=lambda head: (-changes[head], head))[:MOST_HEADS])


@torch.no_grad()
def measure(
    model: TracedModel,
    pairs: EncodedTask,
    heads: Sequence[Head],
    together: Sequence[Head],
    *,
    query: int = -1,
    against: Against = "second",
    temperatures: bool = False,
    batch_size: int | None = None,
) -> Measured:
    """Measure heads one by one, and those of ``together`` at once, on a task's clean prompts.

    Raises:
        OptionError: a prompt has no such query.
        ModelError: an attention is not a softmax of scaled products, or sees one position alone.
        NumericsError: an activation is not finite.
    """
    if 1 in model.architecture.sliding_windows:
        raise ModelError(
            f"layers of model {model.name!r} see one position alone, so that their heads have "
            f"nothing to prefer; attention scores need windows of 2 positions or more"
        )
    offsets, rules = query_offsets(pairs, query), rules_of(temperatures)
    size, numbers = choose_batch_size(model, pairs, batch_size), _by_layer(heads)
    pieces: dict[Head, list[_Piece]] = {head: [] for head in heads}
    whole: list[_Piece] = []

    def work() -> Iterator[tuple[_Batch, int]]:
        for start, batch in zip(range(0, len(pairs), size), pairs.batches(size), strict=True):
            ready = _Batch(model, batch, offsets[start : start + size], against, rules)
            whole.append(ready.together(_by_layer(together)))
            yield from ((ready, layer) for layer in numbers)

    total = -(-len(pairs) // size) * len(numbers)
    for ready, layer in track(work(), f"attention scores of {len(heads)} heads", total=total):
        for head, piece in ready.measured(layer, numbers[layer]).items():
            pieces[head].append(piece)
    both = _joined(whole)
    return Measured(
        {head: _of_head(pieces[head], rules) for head in heads},
        both["clean"],
        both["corrupt"],
        dict(zip(rules, both["changes"], strict=True)),
    )


@dataclass(frozen=True)
class _Piece:
    """What one batch gives of a head, or of several at once; the last axis is that of pairs."""

    names: tuple[str, ...]
    values: dict[str, Tensor]
    pattern: Tensor | None = None


class _Batch:
    """A batch of a task, with all that is the same for its layers."""

    def __init__(
        self,
        model: TracedModel,
        pairs: EncodedTask,
        offsets: Tensor,
        against: Against,
        rules: Mapping[str, Rule],
    ) -> None:
        self.model, self.against, self.rules = model, against, rules
        self.replacer = Replacer(model, pairs)
        self.parts = stream_parts(model, self.replacer.run)
        self.at = self.replacer.run.mask.shape[1] + offsets
        self.rows = torch.arange(len(pairs), device=self.at.device)

    def together(self, heads: Mapping[int, Sequence[int]]) -> _Piece:
        """What the metric is, and by how much each rule changes it."""
        replacer = self.replacer
        scores = torch.stack([replacer.together(heads, rule) for rule in self.rules.values()])
        values = {"clean": replacer.clean, "corrupt": replacer.corrupt}
        return _Piece((), values | {"changes": scores - replacer.clean})

    def measured(self, layer: int, heads: Sequence[int]) -> dict[Head, _Piece]:
        """What is measured of some heads of a layer."""
        attention = self.replacer.attention(layer)
        scores = attention.scores[self.rows, :, self.at]
        won, sharp = contest(scores, self.against), sharpness(scores)
        split = split_scores(self.model, self.replacer.run, self.parts, layer, self.at)
        parts, everywhere = split_margin(split, won.weights, self.at), _everywhere(attention)
        real = self.replacer.run.mask[0].nonzero().flatten()[-SHOWN_TOKENS:]
        pieces = {}
        for head in heads:
            changed = self.replacer.alone(layer, head, attention, list(self.rules.values()))
            values = {
                "margin": won.margin[:, head],
                "remainder": won.remainder[:, head],
                "by_query": parts.by_query[..., head],
                "by_key": parts.by_key[..., head],
                "both": parts.both[head, ..., None],
                "n_eff": sharp.n_eff[:, head],
                "top1": sharp.top1[:, head],
                "everywhere": everywhere[..., head],
                "changes": changed - self.replacer.clean,
            }
            pattern = softmax(attention.scores[0, head])[real][:, real]
            pieces[layer, head] = _Piece(split.names, values, pattern.double().cpu())
        return pieces


def _everywhere(attention: Attention) -> Tensor:
    """Sums of ``n_eff``, ``top1`` and margin over queries, and their number, ``[4, batch, heads]``.

    Padding tokens, and the first token of each prompt, see one key alone and do not count.
    """
    sharp = sharpness(attention.scores)
    wide = sharp.margin.isfinite()
    counted = (sharp.n_eff, sharp.top1, sharp.margin, torch.ones_like(sharp.margin))
    return torch.stack([torch.where(wide, values, 0).double().sum(-1) for values in counted])


def _by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    """Numbers of heads by their layer, layers in the order they run."""
    found: dict[int, list[int]] = defaultdict(list)
    for layer, head in sorted(heads):
        found[layer].append(head)
    return dict(found)


def _joined(pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    return {
        name: torch.cat([piece.values[name].double().cpu() for piece in pieces], -1)
        for name in pieces[0].values
    }


def _of_head(pieces: Sequence[_Piece], rules: Mapping[str, Rule]) -> HeadMeasures:
    values, first = _joined(pieces), pieces[0]
    assert first.pattern is not None
    sums = values["everywhere"].sum(-1)
    return HeadMeasures(
        first.names,
        values["margin"],
        values["remainder"],
        values["by_query"],
        values["by_key"],
        values["both"].sum(-1) / len(values["margin"]),
        values["n_eff"],
        values["top1"],
        sums[:3] / sums[3],
        dict(zip(rules, values["changes"], strict=True)),
        first.pattern,
    )
