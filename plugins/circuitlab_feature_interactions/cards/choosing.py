"""Choosing: which latents get a card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, track

if TYPE_CHECKING:
    from circuitlab import Dictionary, Site, Tokens, TracedModel

_TOP = re.compile(r"top:(\d{1,6})")
_NAMED = re.compile(r"(\S+?)\s*:\s*(\d{1,9}(?:\s*,\s*\d{1,9})*)")


def choose_latents(
    text: str,
    model: TracedModel,
    dictionaries: Mapping[Site, Dictionary],
    batches: Sequence[Tokens],
) -> list[tuple[Site, int]]:
    """The latents that a text names, in its order, or site by site the largest first.

    Args:
        text: ``mlp_in.0: 3, 17; mlp_out.0: 5``; or ``top:12``, of each site the 12 that write
            most: by the variance of ``z`` over tokens times the squared norm of the decoder row.
            Latents that never are active, or always the same, are not among them.
        model: The model.
        dictionaries: By site.
        batches: Prompts to measure the variance on.

    Raises:
        OptionError: the text names no latents, one twice, or one that is not there.
    """
    if found := _TOP.fullmatch(text.strip()):
        n = int(found[1])
        if n < 1:
            raise OptionError(f"--features {text!r} asks for no latents; give top:1 or more")
        return _largest(n, model, dictionaries, batches)
    sites = {str(site): site for site in dictionaries}
    chosen: list[tuple[Site, int]] = []
    for part in text.split(";"):
        named = _NAMED.fullmatch(part.strip())
        if named is None:
            raise OptionError(
                f"--features {text!r} names no latents; write top:12, or sites and latents as in "
                f"'{next(iter(sites))}: 3, 17'"
            )
        if named[1] not in sites:
            raise OptionError(
                f"--features: there is no dictionary of {named[1]!r}; there are those of "
                f"{', '.join(sites)}"
            )
        site = sites[named[1]]
        chosen += [(site, _index(number, site, dictionaries)) for number in named[2].split(",")]
    for site, latent in chosen:
        if chosen.count((site, latent)) > 1:
            raise OptionError(f"--features name latent {latent} of {site} twice; name it once")
    return chosen


def _index(text: str, site: Site, dictionaries: Mapping[Site, Dictionary]) -> int:
    latent, n = int(text), dictionaries[site].n
    if latent >= n:
        raise OptionError(f"--features: latents of {site} run from 0 to {n - 1}, not to {latent}")
    return latent


@torch.no_grad()
def _largest(
    n: int, model: TracedModel, dictionaries: Mapping[Site, Dictionary], batches: Sequence[Tokens]
) -> list[tuple[Site, int]]:
    sums = {
        site: torch.zeros(2, dictionary.n, dtype=torch.float64, device=model.device)
        for site, dictionary in dictionaries.items()
    }
    count = sum(int(tokens.mask.sum()) for tokens in batches)
    for tokens in track(batches, "ranking latents"):
        run = model.run(tokens, read=[*dictionaries], logits="none")
        for site, dictionary in dictionaries.items():
            index, values = dictionary.active(run[site].flatten(2)[tokens.mask])
            where, sizes = index.flatten(), values.flatten().double()
            sums[site][0].index_add_(0, where, sizes)
            sums[site][1].index_add_(0, where, sizes.square())
    chosen = []
    for site, dictionary in dictionaries.items():
        total, squares = sums[site]
        variance = squares / count - (total / count).square()
        sizes = variance * dictionary.W_d.detach().double().square().sum(1)
        order = sizes.argsort(descending=True, stable=True)[:n].tolist()
        chosen += [(site, latent) for latent in order if float(sizes[latent]) > 0]
    return chosen
