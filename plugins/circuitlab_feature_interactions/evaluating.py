"""Evaluating: how good dictionaries are, with intervals, and how sparse what is between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    ModelError,
    OptionError,
    Site,
    Tokens,
    track,
)
from circuitlab_feature_interactions.data import PromptStream, pad, seed_of
from circuitlab_feature_interactions.dictionary_sets import read_set
from circuitlab_feature_interactions.gathering import Activity
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.reconstruction import (
    SiteSums,
    by_position,
    divergences,
    joined,
    prompt_sums,
    token_losses,
)
from circuitlab_feature_interactions.retraining import train_again
from circuitlab_feature_interactions.sites import Pair, sites_of, written_site
from circuitlab_feature_interactions.sparsity import Sparsity

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Tokens, padding included, that go through the model at a time, and numbers of their logits.
_PASS, _LOGITS = 2048, 1 << 25
#: Prompts of the corpus are drawn with the seed and this, which no training draws with.
EVALUATION = 1_000_003


def evaluate_dictionaries(
    model: TracedModel,
    *,
    dictionaries: Path,
    data: Path | None = None,
    n_tokens: int = 20_000,
    per_position: bool = False,
    controls: bool = False,
    independent: Path | Literal["train"] | None = None,
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
            active latents, of shuffled interactions, and of dictionaries trained alike on the model
            with new weights.
        independent: Folder of another set, such as one trained without a penalty, to be measured
            on the same prompts; ``train``: trains this set again, without a penalty.
        context_length: Most tokens of a prompt; None: as many as the model reads.
        seed: Of prompts and controls.

    Returns:
        Plain JSON: ``tokens``, ``prompts``, ``warnings``; ``sites``, see
        :meth:`reconstruction.SiteSums.summary`; ``pairs``, see :meth:`sparsity.Sparsity.summary`;
        with controls, ``controls``: by name the same. Intervals are over prompts.

    Raises:
        OptionError: ``n_tokens`` is below 1, or too few for the controls; or the set cannot be
            trained again.
        ModelError: there is no set in the folder, or the model has no corpus.
        SiteError: the model has no such site.
        TaskError: the texts cannot be read.
    """
    if n_tokens < 1:
        raise OptionError(f"--n-tokens {n_tokens} is too small; give 1 or more")
    stream = PromptStream(model, data, context_length, seed_of(seed, EVALUATION))
    own = read_set(dictionaries, model, DictionaryInfo(**stream.facts()))
    fresh, rows = draw(stream, n_tokens)
    batches = make_batches(rows, model)
    measured = measure(model, own.pairs, own.dictionaries, batches).summary(
        per_position=per_position
    )
    told: dict[str, Any] = {
        "tokens": sum(map(len, rows)),
        "prompts": len(rows),
        "warnings": list(own.warnings),
        **measured,
    }
    others: dict[str, Any] = {}
    if independent is not None:
        if independent == "train":
            other = train_again(model, own, data, interaction="none")
        else:
            other = read_set(independent, model, DictionaryInfo(**stream.facts()))
        found = measure(model, other.pairs, other.dictionaries, batches)
        others["independent"] = found.summary(per_position=per_position)
        told["warnings"] += [f"control: {text}" for text in other.warnings]
    if controls:
        from circuitlab_feature_interactions.controls import measure_controls, measure_fresh

        _, rows = draw(stream, n_tokens, first=fresh)
        others |= measure_controls(
            model, own, batches, make_batches(rows, model), measured["sites"], seed=seed
        )
        try:
            others["new-weights"] = measure_fresh(model, own, data, batches).summary()
        except (ModelError, OptionError) as error:
            told["warnings"].append(f"no control with new weights: {error}")
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


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums over prompts, from which all numbers of a set of dictionaries come.

    Attributes:
        sites: By site.
        pairs: By pair.
    """

    sites: Mapping[Site, SiteSums]
    pairs: Mapping[Pair, Sparsity]

    def summary(self, *, per_position: bool = False) -> dict[str, Any]:
        """``sites`` and ``pairs``: :meth:`SiteSums.summary`, :meth:`Sparsity.summary` by name."""
        return {
            "sites": {
                str(site): sums.summary(per_position=per_position)
                for site, sums in self.sites.items()
            },
            "pairs": {str(pair): sums.summary() for pair, sums in self.pairs.items()},
        }


def measure(
    model: TracedModel,
    pairs: Sequence[Pair],
    dictionaries: Mapping[Site, Dictionary],
    batches: Sequence[Tokens],
    *,
    shuffled: torch.Generator | None = None,
) -> Measured:
    """Sums of dictionaries on these prompts."""
    sites = measure_sites(model, sites_of(pairs), dictionaries, batches)
    return Measured(
        sites, measure_pairs(model, pairs, dictionaries, sites, batches, shuffled=shuffled)
    )


@torch.no_grad()
def measure_sites(
    model: TracedModel,
    sites: Sequence[Site],
    dictionaries: Mapping[Site, Dictionary],
    batches: Sequence[Tokens],
) -> dict[Site, SiteSums]:
    """Reconstruction, sparsity and loss of each dictionary, by the site that it reads.

    A transcoder is judged by what it writes: that is reconstructed, and its loss is with the
    transcoder's output in the MLP's place.
    """
    targets = {site: written_site(site, dictionaries[site]) for site in sites}
    activity = {site: Activity(dictionaries[site]) for site in sites}
    spreads: dict[Site, list[Tensor]] = {site: [] for site in sites}
    losses: dict[Site, list[Tensor]] = {site: [] for site in sites}
    starts: dict[Site, Tensor] = {}
    for tokens in track(batches, "measuring dictionaries"):
        run = model.run(tokens, read=[*sites, *targets.values()], logits="all")
        clean = token_losses(run.logits, tokens)
        chances = run.logits.log_softmax(-1)
        for site, target in targets.items():
            dictionary, value = dictionaries[site], run[target].flatten(2)
            read = run[site].flatten(2)
            activity[site].add(dictionary, read, tokens, model.vocab_size, value)
            written = dictionary(read)
            start = starts.setdefault(site, value[tokens.mask].double().mean(0))
            spreads[site].append(prompt_sums(value, written, start, tokens))
            changed = [clean]
            for new in (written.view(run[target].shape), torch.zeros_like(run[target])):
                logits = model.run(tokens, write={target: new}, logits="all").logits
                changed += [token_losses(logits, tokens), divergences(chances, logits, tokens)]
            losses[site].append(by_position(torch.stack(changed), tokens))
    return {
        site: SiteSums(activity[site], torch.cat(spreads[site]), joined(losses[site]))
        for site in sites
    }


@torch.no_grad()
def measure_pairs(
    model: TracedModel,
    pairs: Sequence[Pair],
    dictionaries: Mapping[Site, Dictionary],
    sites: Mapping[Site, SiteSums],
    batches: Sequence[Tokens],
    *,
    shuffled: torch.Generator | None = None,
) -> dict[Pair, Sparsity]:
    """Interactions across each pair; ``sites`` gives the mean of each latent."""
    found = {}
    n_prompts = sum(len(tokens.mask) for tokens in batches)
    for pair in pairs:
        source, target = dictionaries[pair.source], dictionaries[pair.target]
        route = make_route(model, pair, dtype=source.W_e.dtype)
        scale = sites[pair.target].means.to(model.device)
        sums = Sparsity(source.n, target.n, scale, n_prompts, shuffled)
        for tokens in track(batches, f"attributing {pair}"):
            x = model.run(tokens, read=[pair.source], logits="none")[pair.source]
            attributions = route.attributions(source, target, x, mask=tokens.mask, with_error=True)
            sums.add(attributions, tokens.mask)
        found[pair] = sums
    return found


def make_batches(rows: Sequence[Tensor], model: TracedModel) -> list[Tokens]:
    """Prompts of like length together, each batch padded on the left."""
    ordered = sorted(rows, key=len)
    size = max(1, min(_PASS, _LOGITS // model.vocab_size) // len(ordered[-1]))
    return [pad(ordered[i : i + size], model.device) for i in range(0, len(ordered), size)]
