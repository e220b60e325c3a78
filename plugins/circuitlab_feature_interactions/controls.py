"""Controls: the numbers of dictionaries that nobody trained, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import Dictionary, Site, Tokens, track
from circuitlab_feature_interactions.baselines import ica, k_means, pca, random_directions
from circuitlab_feature_interactions.data import generator_of
from circuitlab_feature_interactions.evaluating import measure
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
    """What :func:`evaluating.measure` gives for baselines and for shuffled interactions.

    Args:
        model: The model.
        own: The set that is judged.
        batches: Prompts on which all are measured.
        fitting: Others, to which baselines are fitted.
        sites: Numbers of the set's own dictionaries; ``l0`` is matched.
        seed: Of all that is drawn.

    Returns:
        ``random-directions``, ``pca``, ``ica`` with ``sites`` and ``pairs``; ``k-means`` with the
        centred ``r2`` of each site, as its steps have no Jacobian; ``shuffled`` with ``pairs``.

    Raises:
        OptionError: there are too few tokens, or activations that do not vary.
    """
    names = sites_of(own.pairs)
    fitted, judged = (_values(model, names, part) for part in (fitting, batches))
    active = {site: max(1, round(sites[str(site)]["l0"])) for site in names}
    generator = generator_of(seed, 1)
    makers: dict[str, Callable[[Site], Dictionary]] = {
        "random-directions": lambda site: random_directions(
            fitted[site], own.dictionaries[site].n, active[site], generator
        ),
        "pca": lambda site: pca(fitted[site], active[site]),
        "ica": lambda site: ica(fitted[site], active[site], generator),
    }
    told: dict[str, Any] = {}
    for name, make in makers.items():
        told[name] = measure(model, own.pairs, {site: make(site) for site in names}, batches)
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
    null = measure(model, own.pairs, own.dictionaries, batches, shuffled=generator_of(seed, 2))
    told["shuffled"] = {"pairs": null["pairs"]}
    return told


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
