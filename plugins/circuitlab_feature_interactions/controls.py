"""Controls: the numbers of dictionaries that nobody trained, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import Dictionary, Site, Tokens, track
from circuitlab_feature_interactions.baselines import ica, k_means, pca, random_directions
from circuitlab_feature_interactions.data import generator_of
from circuitlab_feature_interactions.evaluating import Measured, measure
from circuitlab_feature_interactions.retraining import settings_of, train_again
from circuitlab_feature_interactions.sites import sites_of

if TYPE_CHECKING:
    from circuitlab import TracedModel
    from circuitlab_feature_interactions.dictionary_sets import DictionarySet

#: Most tokens that baselines are fitted to, and most clusters.
_FITTED, _CLUSTERS = 8192, 256

ICA_CAVEAT = "as many components as dimensions, no more; features at few tokens are not found"


@torch.no_grad()
def measure_controls(
    model: TracedModel,
    own: DictionarySet,
    batches: Sequence[Tokens],
    fitting: Sequence[Tokens],
    sites: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """What :func:`evaluating.measure` finds of baselines and of shuffled interactions.

    Args:
        model: The model.
        own: The set that is judged.
        batches: Prompts on which all are measured.
        fitting: Others, to which baselines are fitted.
        sites: Numbers of the set's own dictionaries; ``l0`` is matched.
        seed: Of all that is drawn.

    Returns:
        ``random-directions``, ``pca``, ``ica`` with ``sites`` and ``pairs``; ``k-means`` with the
        centred ``r2`` of each site, as its steps have no Jacobian; ``shuffled`` with ``pairs``. Of
        transcoders the last alone: the others rebuild what they read, not what an MLP makes of it.

    Raises:
        OptionError: there are too few tokens, or activations that do not vary.
    """
    null = measure(model, own.pairs, own.dictionaries, batches, shuffled=generator_of(seed, 2))
    shuffled = {"shuffled": {"pairs": null.summary()["pairs"]}}
    if any(dictionary.transcoder for dictionary in own.dictionaries.values()):
        return shuffled
    names = sites_of(own.pairs)
    fitted, judged = (_values(model, names, part) for part in (fitting, batches))
    active = {site: max(1, round(sites[str(site)]["l0"])) for site in names}
    generator = generator_of(seed, 1)
    told: dict[str, Any] = {
        name: measure(model, own.pairs, made, batches).summary()
        for name, made in _baselines(own, fitted, active, generator)
    }
    told["ica"]["caveat"] = ICA_CAVEAT
    told["k-means"] = {"sites": {}}
    for site in names:
        n = max(1, min(own.dictionaries[site].n, _CLUSTERS, len(fitted[site]) // 4))
        clusters = k_means(fitted[site], n, generator, stages=active[site])
        told["k-means"]["sites"][str(site)] = {
            "r2": centred_r2(judged[site], clusters.reconstruct(judged[site])),
            "clusters": n,
            "l0": active[site],
        }
    return told | shuffled


@torch.no_grad()
def measure_baselines(
    model: TracedModel,
    own: DictionarySet,
    batches: Sequence[Tokens],
    fitting: Sequence[Tokens],
    *,
    seed: int = 0,
) -> dict[str, Measured]:
    """Random directions, PCA and ICA, with as many active latents as a set has, by name.

    Args:
        model: The model.
        own: The set.
        batches: Prompts to measure on.
        fitting: Others, to which they are fitted.
        seed: Of all that is drawn.

    Returns:
        Of transcoders none.

    Raises:
        OptionError: there are too few tokens, or activations that do not vary.
    """
    if any(dictionary.transcoder for dictionary in own.dictionaries.values()):
        return {}
    fitted = _values(model, sites_of(own.pairs), fitting)
    active = {
        site: max(1, round(float((own.dictionaries[site].encode(x) > 0).sum(1).double().mean())))
        for site, x in fitted.items()
    }
    return {
        name: measure(model, own.pairs, made, batches)
        for name, made in _baselines(own, fitted, active, generator_of(seed, 1))
    }


def _baselines(
    own: DictionarySet,
    fitted: Mapping[Site, Tensor],
    active: Mapping[Site, int],
    generator: torch.Generator,
) -> Iterator[tuple[str, dict[Site, Dictionary]]]:
    """Name and dictionaries of each kind that can be traced."""
    makers: dict[str, Callable[[Site], Dictionary]] = {
        "random-directions": lambda site: random_directions(
            fitted[site], own.dictionaries[site].n, active[site], generator
        ),
        "pca": lambda site: pca(fitted[site], active[site]),
        "ica": lambda site: ica(fitted[site], active[site], generator),
    }
    for name, make in makers.items():
        yield name, {site: make(site) for site in fitted}


def measure_fresh(
    model: TracedModel, own: DictionarySet, data: Path | None, batches: Sequence[Tokens]
) -> Measured:
    """Dictionaries trained alike, on the same texts, of the model with new weights; and on it.

    What they show as well as the model's own comes from the architecture and the texts, not from
    what the model has learned. Penalised ones are penalised here too.

    Args:
        model: The model.
        own: The set whose settings and seed are taken; the seed is that of the weights too.
        data: File of the texts it was trained on; None for the model's corpus.
        batches: Prompts to measure on.

    Raises:
        ModelError: the model's family does not say how its weights begin.
        OptionError: the set cannot be trained again.
    """
    fresh = model.reinitialised(settings_of(own).seed)
    found = train_again(fresh, own, data)
    return measure(fresh, found.pairs, found.dictionaries, batches)


def centred_r2(x: Tensor, reconstruction: Tensor) -> float:
    """1 - squared errors / squared distances from the mean, sums over tokens ``[tokens, d]``."""
    values = x.double()
    missed = (values - reconstruction.double()).square().sum()
    return float(1 - missed / (values - values.mean(0)).square().sum())


def _values(
    model: TracedModel, sites: Sequence[Site], batches: Sequence[Tokens]
) -> dict[Site, Tensor]:
    """Up to a number of real tokens' activations at each site, ``[tokens, width]``."""
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    left = _FITTED
    for tokens in track(batches, "reading activations"):
        run = model.run(tokens, read=sites, logits="none")
        for site in sites:
            value = run[site].flatten(2)[tokens.mask][:left]
            found[site].append(value.to(torch.promote_types(value.dtype, torch.float32)))
        left -= int(tokens.mask.sum())
        if left <= 0:
            break
    return {site: torch.cat(parts) for site, parts in found.items()}
