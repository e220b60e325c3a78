"""Evaluating: how good dictionaries are, with intervals, and how sparse what is between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    Interval,
    OptionError,
    Site,
    Tokens,
    ratio_interval,
    track,
)
from circuitlab_feature_interactions.data import PromptStream, pad, seed_of
from circuitlab_feature_interactions.dictionary_sets import read_set
from circuitlab_feature_interactions.gathering import Activity
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.sites import Pair, sites_of
from circuitlab_feature_interactions.sparsity import Sparsity, mean_where_active

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Tokens, padding included, that go through the model at a time, and numbers of their logits.
_PASS, _LOGITS = 2048, 1 << 25
#: Prompts of the corpus are drawn with the seed and this, which no training draws with.
_EVALUATION = 1_000_003


def evaluate_dictionaries(
    model: TracedModel,
    *,
    dictionaries: Path,
    data: Path | None = None,
    n_tokens: int = 20_000,
    per_position: bool = False,
    controls: bool = False,
    independent: Path | None = None,
    context_length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a set of dictionaries on fresh prompts.

    Args:
        model: The model they are of.
        dictionaries: Folder of the set, as ``circuitlab dict train`` wrote it.
        data: File of texts; None for the model's own corpus.
        n_tokens: At least so many tokens, as far as a file has them.
        per_position: Numbers by position too: 0, 1, 2 to 3, 4 to 7, and so on.
        controls: The same numbers of random directions, PCA, ICA and k-means at the same number of
            active latents, and of shuffled interactions.
        independent: Folder of another set, such as one trained without a penalty, to be measured
            on the same prompts.
        context_length: Most tokens of a prompt; None: as many as the model reads.
        seed: Of prompts and controls.

    Returns:
        Plain JSON: ``tokens``, ``prompts``, ``warnings``; ``sites``, see :func:`measure_sites`;
        ``pairs``, see :class:`Sparsity`; with controls, ``controls``: by name the same.

    Raises:
        OptionError: ``n_tokens`` is below 1, or too few for the controls.
        ModelError: there is no set in the folder, or the model has no corpus.
        SiteError: the model has no such site.
        TaskError: the texts cannot be read.
    """
    if n_tokens < 1:
        raise OptionError(f"--n-tokens {n_tokens} is too small; give 1 or more")
    stream = PromptStream(model, data, context_length, seed_of(seed, _EVALUATION))
    own = read_set(dictionaries, model, DictionaryInfo(**stream.facts()))
    fresh, rows = draw(stream, n_tokens)
    batches = _batches(rows, model)
    measured = measure(model, own.pairs, own.dictionaries, batches, per_position=per_position)
    told: dict[str, Any] = {
        "tokens": sum(map(len, rows)),
        "prompts": len(rows),
        "warnings": list(own.warnings),
        **measured,
    }
    others: dict[str, Any] = {}
    if independent is not None:
        other = read_set(independent, model, DictionaryInfo(**stream.facts()))
        others["independent"] = measure(
            model, other.pairs, other.dictionaries, batches, per_position=per_position
        )
        told["warnings"] += [f"control: {text}" for text in other.warnings]
    if controls:
        from circuitlab_feature_interactions.controls import measure_controls

        _, rows = draw(stream, n_tokens, first=fresh)
        others |= measure_controls(
            model, own, batches, _batches(rows, model), measured["sites"], seed=seed
        )
    return told | ({"controls": others} if others else {})


def draw(stream: PromptStream, n_tokens: int, *, first: int = 0) -> tuple[int, list[Tensor]]:
    """Prompts from the ``first`` on with at least so many tokens, and the number after them.

    A file is not begun again, unless ``first`` is past its end.
    """
    rows: list[Tensor] = []
    number = first if stream.repeats is None else first % stream.repeats
    while n_tokens > 0 and number != stream.repeats:
        rows.append(stream[number].long())
        n_tokens, number = n_tokens - len(rows[-1]), number + 1
    return number, rows


def measure(
    model: TracedModel,
    pairs: Sequence[Pair],
    dictionaries: Mapping[Site, Dictionary],
    batches: Sequence[Tokens],
    *,
    per_position: bool = False,
    shuffled: torch.Generator | None = None,
) -> dict[str, Any]:
    """``sites`` and ``pairs`` of dictionaries on these prompts, plain JSON."""
    sites, scales = measure_sites(
        model, sites_of(pairs), dictionaries, batches, per_position=per_position
    )
    return {
        "sites": sites,
        "pairs": measure_pairs(model, pairs, dictionaries, scales, batches, shuffled=shuffled),
    }


@torch.no_grad()
def measure_sites(
    model: TracedModel,
    sites: Sequence[Site],
    dictionaries: Mapping[Site, Dictionary],
    batches: Sequence[Tokens],
    *,
    per_position: bool = False,
) -> tuple[dict[str, Any], dict[Site, Tensor]]:
    """Reconstruction, sparsity and loss of each dictionary; and the mean of each latent.

    Returns:
        By site, the :meth:`circuitlab.DictionaryStats.summary`, and beside it ``r2_interval`` and
        ``ce``: see :class:`Losses`; and where it is active the mean of each latent, ``[n]``.
    """
    activity = {site: Activity(dictionaries[site]) for site in sites}
    spreads: dict[Site, list[Tensor]] = {site: [] for site in sites}
    losses: dict[Site, list[Tensor]] = {site: [] for site in sites}
    starts: dict[Site, Tensor] = {}
    for tokens in track(batches, "measuring dictionaries"):
        run = model.run(tokens, read=sites, logits="all")
        clean = token_losses(run.logits, tokens)
        chances = run.logits.log_softmax(-1)
        for site in sites:
            dictionary, value = dictionaries[site], run[site].flatten(2)
            activity[site].add(dictionary, value, tokens, model.vocab_size)
            written = dictionary(value)
            start = starts.setdefault(site, value[tokens.mask].double().mean(0))
            spreads[site].append(_prompt_sums(value, written, start, tokens))
            changed = [clean]
            for new in (written.view(run[site].shape), torch.zeros_like(run[site])):
                logits = model.run(tokens, write={site: new}, logits="all").logits
                changed += [token_losses(logits, tokens), divergences(chances, logits, tokens)]
            losses[site].append(_by_position(torch.stack(changed), tokens))
    told = {
        str(site): _site_numbers(
            activity[site], torch.cat(spreads[site]), _joined(losses[site]), per_position
        )
        for site in sites
    }
    means = {
        site: mean_where_active(one.total, one.stats.densities, one.stats.tokens)
        for site, one in activity.items()
    }
    return told, means


@torch.no_grad()
def measure_pairs(
    model: TracedModel,
    pairs: Sequence[Pair],
    dictionaries: Mapping[Site, Dictionary],
    scales: Mapping[Site, Tensor],
    batches: Sequence[Tokens],
    *,
    shuffled: torch.Generator | None = None,
) -> dict[str, Any]:
    """:meth:`Sparsity.summary` of each pair, by its name."""
    told = {}
    for pair in pairs:
        source, target = dictionaries[pair.source], dictionaries[pair.target]
        route = make_route(model, pair, dtype=source.W_e.dtype)
        sums = Sparsity(source.n, target.n, scales[pair.target].to(model.device), shuffled)
        for tokens in track(batches, f"attributing {pair}"):
            x = model.run(tokens, read=[pair.source], logits="none")[pair.source]
            sums.add(route.attributions(source, target, x, mask=tokens.mask, with_error=True))
        told[str(pair)] = sums.summary()
    return told


@dataclass(frozen=True)
class Losses:
    """What a reconstruction in place of the site's value does to predictions, and what zero does.

    Sums over the predicted tokens of each prompt in nats, ``[n_prompts]``.

    Attributes:
        clean: Loss of the model.
        reconstructed: Loss with the reconstruction.
        kl_reconstructed: Divergence of its predictions from the model's, KL(model || changed).
        zero: Loss with zero.
        kl_zero: Divergence with zero.
        tokens: Number of predicted tokens.
    """

    clean: Tensor
    reconstructed: Tensor
    kl_reconstructed: Tensor
    zero: Tensor
    kl_zero: Tensor
    tokens: Tensor

    def summary(self) -> dict[str, Any]:
        """Means over tokens in nats, and what is recovered, with 95 % intervals over prompts.

        ``recovered``: (zero - reconstructed) / (zero - clean), left out where zero does not harm,
        as with a model that was never trained to predict these tokens; ``kl_recovered``: 1 -
        kl_reconstructed / kl_zero. Each token counts the same, whatever batch it was in.
        """
        found: dict[str, Any] = {"prompts": len(self.tokens), "tokens": int(self.tokens.sum())}
        for name in ("clean", "reconstructed", "zero", "kl_reconstructed", "kl_zero"):
            found[name] = float(getattr(self, name).sum() / self.tokens.sum())
        above, below = self.zero - self.reconstructed, self.zero - self.clean
        kept = self.kl_zero - self.kl_reconstructed
        for name, part, whole in (("", above, below), ("kl_", kept, self.kl_zero)):
            if float(whole.sum()) <= 0:
                continue
            found[f"{name}recovered"] = float(part.sum() / whole.sum())
            if (ends := ratio_interval(part, whole)) is not None:
                found[f"{name}recovered_interval"] = list(ends)
        return found


def token_losses(logits: Tensor, tokens: Tokens) -> Tensor:
    """Loss of the next token in nats, ``[batch, pos]``, float64; 0 where none is predicted."""
    losses = functional.cross_entropy(
        logits[:, :-1].double().transpose(1, 2), tokens.ids[:, 1:], reduction="none"
    )
    predicted = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    return functional.pad(losses * predicted, (0, 1))


def divergences(chances: Tensor, logits: Tensor, tokens: Tokens) -> Tensor:
    """KL divergence of ``logits`` from log-probabilities, in nats, as :func:`token_losses`."""
    found = functional.kl_div(logits.log_softmax(-1), chances, reduction="none", log_target=True)
    predicted = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    return functional.pad(found.double().sum(-1)[:, :-1] * predicted, (0, 1))


def _by_position(losses: Tensor, tokens: Tokens) -> Tensor:
    """Numbers ``[m, batch, pos]``, and whether one is there, by the token's place in its prompt.

    Returns:
        ``[m + 1, batch, pos]``, float64, on the CPU: the first column is the first real token.
    """
    there = functional.pad(tokens.mask[:, 1:] & tokens.mask[:, :-1], (0, 1))
    both = torch.cat([losses, there[None].double()])
    found = torch.zeros_like(both)
    # Padding has nothing, and may add it to the first position.
    return found.scatter_add_(2, tokens.position_ids[None].expand_as(both), both).cpu()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    width = max(part.shape[2] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[2])) for part in parts], 1)


def _prompt_sums(value: Tensor, written: Tensor, start: Tensor, tokens: Tokens) -> Tensor:
    """Of each prompt its tokens, errors, squares, and sum about ``start``, ``[batch, 3 + d]``."""
    mask = tokens.mask[..., None]
    moved = (value.double() - start) * mask
    missed = ((value.double() - written.double()) * mask).square().sum((1, 2))
    columns = (tokens.mask.sum(1).double(), missed, moved.square().sum((1, 2)))
    return torch.cat([torch.stack(columns, 1), moved.sum(1)], 1).cpu()


def _r2_interval(sums: Tensor) -> Interval | None:
    """Interval of centred R² over prompts; the mean of the activations is taken as known."""
    counts, missed, squares, moved = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
    mean = moved.sum(0) / counts.sum()
    spread = squares - 2 * moved @ mean + counts * mean.square().sum()
    ends = ratio_interval(missed, spread.clamp(min=0))
    return None if ends is None else (1 - ends[1], 1 - ends[0])


def _site_numbers(
    activity: Activity, sums: Tensor, losses: Tensor, per_position: bool
) -> dict[str, Any]:
    found = activity.stats.summary()
    positions = found.pop("positions")
    if "r2" in found and (ends := _r2_interval(sums)) is not None:
        found["r2_interval"] = list(ends)
    found["ce"] = Losses(*losses.sum(2)).summary()
    if per_position:
        for bucket in positions:
            part = losses[:, :, bucket["first"] : bucket["last"] + 1].sum(2)
            part = part[:, part[-1] > 0]
            if part.shape[1]:
                bucket["ce"] = Losses(*part).summary()
        found["positions"] = positions
    return found


def _batches(rows: Sequence[Tensor], model: TracedModel) -> list[Tokens]:
    """Prompts of like length together."""
    ordered = sorted(rows, key=len)
    size = max(1, min(_PASS, _LOGITS // model.vocab_size) // len(ordered[-1]))
    return [pad(ordered[i : i + size], model.device) for i in range(0, len(ordered), size)]
