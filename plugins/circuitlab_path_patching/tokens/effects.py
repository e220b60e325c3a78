"""Token effects: what happens to the metric, or a feature, without some of a prompt's tokens.

Tokens are named by their position from the end, ``-1`` for the last: prompts are padded on the
left, so it is the same in every batch. Scores are metric(ablated) - metric(clean): negative where
the tokens help. Ablated prompts are prompts of their own, so many share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from circuitlab import NumericsError, OptionError, TaskError, Tokens, track
from circuitlab_path_patching.features import Feature

if TYPE_CHECKING:
    from circuitlab import EncodedTask, TracedModel

How = Literal["remove", "replace", "knock-out"]
#: Positions from the end, ascending.
Subset = tuple[int, ...]

MAX_ORDER = 4
#: Bytes that the activations of one pass may take, when the batch size is not given.
MEMORY = 256 * 2**20


@dataclass(frozen=True)
class TokenEffects:
    """The effects of ablating tokens, alone and together.

    Attributes:
        how: How tokens were ablated.
        positions: Positions that could be ablated, from the end, ascending.
        able: Which token of which pair could be ablated, ``[n_pairs, width]``, bool.
        read_at: Position that the metric or feature is read at.
        scores: metric(ablated) - metric(clean) of each set of positions that was measured,
            ``[n_pairs]``, float64; 0 in pairs where the set could not be ablated.
        clean: Metric of the clean prompts, ``[n_pairs]``, float64.
        corrupt: Metric of the corrupt prompts, ``[n_pairs]``, float64.
    """

    how: How
    positions: Subset
    able: Tensor
    read_at: int
    clean: Tensor
    corrupt: Tensor
    scores: dict[Subset, Tensor] = field(default_factory=dict)

    def has(self, subset: Subset) -> Tensor:
        """Pairs in which the whole set could be ablated, ``[n_pairs]``, bool."""
        return self.able[:, list(subset)].all(1)

    def dividend(self, subset: Subset) -> Tensor:
        """What ablating the set does beyond all smaller sets within it, ``[n_pairs]``.

        The Harsanyi dividend of the scores: those of all sets within a set sum to its score. For
        two tokens that is score(both) - score(one) - score(other): negative where either suffices,
        positive where both are needed, for tokens that help. (Harsanyi 1963.)
        """
        signed = [
            self.scores[part] * (-1) ** (len(subset) - size)
            for size in range(1, len(subset) + 1)
            for part in combinations(subset, size)
        ]
        return torch.stack(signed).sum(0)

    def table(self, subset: Subset) -> Tensor:
        """The metric in all mixtures of a set, ``[2**k, n]``, over the ``n`` pairs that have it.

        Bit ``i`` of the row is 1 where the set's token ``i`` is as in the clean prompt.
        """
        pairs = self.has(subset)
        rows = []
        for row in range(1 << len(subset)):
            gone = tuple(p for bit, p in enumerate(subset) if not row >> bit & 1)
            rows.append((self.clean + self.scores[gone] if gone else self.clean)[pairs])
        return torch.stack(rows)

    def mean(self, subset: Subset) -> float:
        """Mean score of a set over the pairs in which it could be ablated."""
        return float(self.scores[subset][self.has(subset)].mean())


def ablate(tokens: Tokens, chosen: Tensor, how: How, new: Tensor | None = None) -> Tokens:
    """The prompts without the chosen tokens.

    Args:
        tokens: The prompts.
        chosen: ``[batch, pos]``, bool. What is read at a chosen token that was not replaced has no
            meaning.
        how: ``remove``: it is taken out and later tokens move forward, so that the second word
            becomes the first. ``replace``: another token stands there. ``knock-out``: no token can
            attend to it, at any layer (Geva et al. 2023, arXiv:2304.14767, cut the attention of
            some layers); everything else stays where it is, as if it had been removed and the
            others had kept their positions.
        new: Tokens to replace them, ``[batch, pos]``.
    """
    if how == "knock-out":
        return tokens.hiding(chosen)
    if how == "replace":
        assert new is not None
        return Tokens(torch.where(chosen, new, tokens.ids), tokens.mask, tokens.positions)
    kept = tokens.mask & ~chosen
    order = torch.argsort(kept.int(), dim=-1, stable=True)
    mask = kept.gather(1, order)
    return Tokens(tokens.ids.gather(1, order) * mask, mask)


def token_effects(
    model: TracedModel,
    pairs: EncodedTask,
    *,
    how: How = "replace",
    order: int = 2,
    top: int = 8,
    replacement: int | None = None,
    draws: int = 4,
    feature: Feature | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> TokenEffects:
    """Ablate the tokens of the clean prompts, one by one and together.

    A token after the one where the metric or feature is read cannot matter and is left out; that
    one itself can only be replaced.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        how: See :func:`ablate`. Tokens are replaced by the corrupt prompt's where that differs,
            else by draws from the task's own tokens.
        order: Size of the largest sets: 1 to 4. Single tokens and pairs of tokens are all
            measured; larger sets are those of the ``top`` tokens whose largest effect, alone or
            beyond that of one other, is strongest.
        top: How many.
        replacement: Id of the token that replaces all others.
        draws: Replacements that are drawn for a token, and averaged over, where they are drawn:
            other tokens that the task's prompts hold at other positions, all equally likely.
        feature: Measured in place of the task's metric.
        batch_size: Prompts per pass; None chooses by memory.
        seed: Of the draws.

    Raises:
        OptionError: an option is out of range, or there is nothing to replace tokens by.
        TaskError: no token can be ablated.
        NumericsError: the metric or the feature is not finite.
    """
    for name, value, most in (
        ("--order", order, MAX_ORDER), ("--top", top, None), ("--draws", draws, None),
        ("--batch-size", batch_size, None),
    ):  # fmt: skip
        if value is not None and not 1 <= value <= (most or value):
            raise OptionError(f"{name} is {value}; give 1 {f'to {most}' if most else 'or more'}")
    measure = _Measure(model, pairs, feature, batch_size)
    read_at = -1 if feature is None else feature.position
    width = pairs.clean.ids.shape[1]
    able = pairs.clean.mask.cpu() & (torch.arange(width) < width + read_at + (how == "replace"))
    drawn = torch.zeros_like(able)
    new = None
    if how == "replace":
        new, drawn, able = _replacements(model, pairs, able, replacement, draws, seed)
    positions = tuple(p for p in range(-width, 0) if able[:, p].any())
    if not positions:
        raise TaskError(
            f"task {pairs.task.name!r}: no token can be {_DONE[how]}, none stands before the one "
            f"that is read; use --how replace, or longer prompts"
        )
    clean, corrupt = measure.whole(pairs.clean), measure.whole(pairs.corrupt)
    effects = TokenEffects(how, positions, able, read_at, clean, corrupt)
    ablations = _Ablations(pairs.clean.to("cpu"), how, new, drawn)
    for size in range(1, order + 1):
        among = positions if size < 3 else _strongest(effects, top)
        sets = [s for s in combinations(among, size) if effects.has(s).any()]
        if sets:
            effects.scores.update(_scores(effects, sets, ablations, measure))
    return effects


_DONE = {"remove": "removed", "replace": "replaced", "knock-out": "knocked out"}


@dataclass(frozen=True)
class _Ablations:
    """How prompts are ablated.

    Attributes:
        new: What replaces each token in each draw, ``[draws, n_pairs, width]``.
        drawn: Where that differs between draws, ``[n_pairs, width]``, bool.
    """

    prompts: Tokens
    how: How
    new: Tensor | None
    drawn: Tensor

    @property
    def draws(self) -> int:
        return 1 if self.new is None else len(self.new)

    def __call__(self, rows: Tensor, columns: Tensor, draws: Tensor) -> Tokens:
        """Prompts ``rows [n]`` without the tokens ``columns [n, k]``, replaced by ``draws [n]``."""
        width = self.prompts.ids.shape[1]
        chosen = torch.zeros(len(rows), width, dtype=torch.bool).scatter_(1, columns, True)
        prompts = self.prompts.rows(rows).trimmed()
        start = width - prompts.ids.shape[1]
        new = None if self.new is None else self.new[draws, rows, start:]
        return ablate(prompts, chosen[:, start:], self.how, new)


class _Measure:
    """The metric or the feature of prompts that are variants of a task's clean ones."""

    def __init__(
        self,
        model: TracedModel,
        pairs: EncodedTask,
        feature: Feature | None,
        batch_size: int | None,
    ) -> None:
        self.model, self.feature = model, feature
        self.size = batch_size or _prompts_per_pass(model, pairs, feature)
        self.pairs, self._vocabulary = pairs.narrowed() if feature is None else (pairs, None)
        self._reference: Tensor | None = None
        if feature is None:
            logits = [self._logits(batch.clean) for batch in pairs.batches(self.size)]
            self._reference = torch.cat(logits)

    def whole(self, prompts: Tokens) -> Tensor:
        """Of one variant of each pair, ``[n_pairs]``, float64."""
        rows = torch.split(torch.arange(len(self.pairs)), self.size)
        return torch.cat([self(prompts.rows(part.tolist()).trimmed(), part) for part in rows])

    def __call__(self, prompts: Tokens, rows: Tensor) -> Tensor:
        """Of variants of the pairs ``rows``, ``[n]``, float64."""
        if self._reference is None:
            value = self._feature(prompts)
        else:
            batch = self.pairs.rows(rows.tolist())
            value = batch.score(self._logits(prompts), self._reference[rows])
        value = value.detach().double().cpu()
        if not torch.isfinite(value).all():
            pair = self.pairs.numbers[int(rows[~torch.isfinite(value)][0])]
            what = f"metric {self.pairs.metric.name}" if not self.feature else self.feature.name
            raise NumericsError(
                f"{what} is NaN or infinite in an ablated prompt of pair {pair}; "
                f"check the weights, or run in a wider type (--dtype float32)"
            )
        return value

    def _logits(self, prompts: Tokens) -> Tensor:
        run = self.model.run(prompts.to(self.model.device), vocabulary=self._vocabulary)
        return run.logits[:, -1]

    def _feature(self, prompts: Tokens) -> Tensor:
        assert self.feature is not None
        prompts = prompts.to(self.model.device)
        value = self.feature.value(self.model.run(prompts, read=self.feature.sites, logits="none"))
        if value.shape != (len(prompts),):
            raise OptionError(
                f"feature {self.feature.name!r} has shape {list(value.shape)} for {len(prompts)} "
                f"prompts; it must give one number per prompt, [{len(prompts)}]"
            )
        return value


def _scores(
    effects: TokenEffects, sets: Sequence[Subset], ablations: _Ablations, measure: _Measure
) -> dict[Subset, Tensor]:
    """Scores of sets of one size, the mean over draws."""
    columns = torch.tensor(sets) + effects.able.shape[1]
    having = effects.able[:, columns].all(-1)
    again = having & ablations.drawn[:, columns].any(-1)
    runs = torch.stack([having, *[again] * (ablations.draws - 1)])
    totals = torch.zeros(having.shape, dtype=torch.float64)
    words = {1: "single tokens", 2: "pairs of tokens"}.get(columns.shape[1], "sets of tokens")
    for part in track(torch.split(runs.nonzero(), measure.size), f"ablating {len(sets):,} {words}"):
        draw, row, number = part.T
        value = measure(ablations(row, columns[number], draw), row)
        totals.index_put_((row, number), value, accumulate=True)
    means = torch.where(having, totals / runs.sum(0).clamp(min=1) - effects.clean[:, None], 0.0)
    return dict(zip(sets, means.T, strict=True))


def _strongest(effects: TokenEffects, top: int) -> Subset:
    """The ``top`` positions of the largest effect, alone or beyond that of one other."""
    strength = dict.fromkeys(effects.positions, 0.0)
    for subset in effects.scores:
        size = abs(float(effects.dividend(subset)[effects.has(subset)].mean()))
        for position in subset:
            strength[position] = max(strength[position], size)
    ordered = sorted(effects.positions, key=lambda position: (-strength[position], position))
    return tuple(sorted(ordered[:top]))


def _replacements(
    model: TracedModel,
    pairs: EncodedTask,
    able: Tensor,
    replacement: int | None,
    draws: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What replaces each token, ``[draws, n_pairs, width]``; where it is drawn; where there is one.

    A token is never replaced by itself.
    """
    clean, corrupt = pairs.clean.to("cpu"), pairs.corrupt.to("cpu")
    if replacement is not None:
        new = torch.full_like(clean.ids, replacement)
        return new[None], torch.zeros_like(able), able & (clean.ids != replacement)
    differs = (clean.mask == corrupt.mask).all(1, keepdim=True) & (clean.ids != corrupt.ids)
    new = corrupt.ids.repeat(draws, 1, 1)
    drawn = able & ~differs
    able = able.clone()
    generator = torch.Generator().manual_seed(seed)
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    for column in drawn.any(0).nonzero()[:, 0].tolist():
        pool = _pool(clean, corrupt, column, special)
        own = clean.ids[:, column].contiguous()
        place = torch.searchsorted(pool, own)
        inside = torch.isin(own, pool)
        sizes = len(pool) - inside.long()
        able[:, column] &= differs[:, column] | (sizes > 0)
        if not len(pool) or not int(sizes.max()):
            continue
        random = torch.rand(draws, len(own), generator=generator, dtype=torch.float64)
        # Counting past the token itself leaves every other one equally likely.
        pick = (random * sizes).long()
        pick = (pick + (inside & (pick >= place))).clamp(max=len(pool) - 1)
        new[:, :, column] = torch.where(drawn[:, column], pool[pick], new[:, :, column])
    if not able.any():
        raise OptionError(
            "no token of the task's prompts can replace another; name one with --replacement"
        )
    return new, drawn & able, able


def _pool(clean: Tokens, corrupt: Tokens, column: int, special: set[int]) -> Tensor:
    """Ids that the prompts hold elsewhere, ascending; special ones only for want of others."""
    elsewhere = torch.arange(clean.ids.shape[1]) != column
    ids = torch.cat([part.ids[part.mask & elsewhere] for part in (clean, corrupt)])
    pool: Tensor = torch.unique(ids)
    plain = pool[~torch.isin(pool, torch.tensor(sorted(special), dtype=pool.dtype))]
    return plain if len(plain) else pool


def _prompts_per_pass(model: TracedModel, pairs: EncodedTask, feature: Feature | None) -> int:
    """Prompts whose activations in one block, and logits, fit in :data:`MEMORY`."""
    width = pairs.clean.ids.shape[1]
    narrow = feature is not None or pairs.metric.answers_only
    # The stream, q, k, v and the MLP's hidden layer; scores and pattern; logits and their softmax.
    numbers = width * (10 * model.d_model + 2 * model.n_heads * width)
    numbers += 0 if narrow else 4 * model.vocab_size
    return max(1, MEMORY // (numbers * model.dtype.itemsize))
