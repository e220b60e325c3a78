"""Pairs of sites whose dictionaries interact: across an MLP or a block, or from MLP to MLP."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from circuitlab import OptionError, Site, SiteError

if TYPE_CHECKING:
    from circuitlab import Dictionary, TracedModel

Route = Literal["mlp", "block", "transcoder"]

_NAME = re.compile(r"(mlp|block|resid|transcoder)(?:\.(\d{1,6}|all))?")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sites, a dictionary of each, and a part of the model between them.

    Attributes:
        source: What the first dictionary reads.
        target: What the second reads.
        route: ``mlp``: from the stream as the MLP reads it, before its norm, to what it writes.
            ``block``: from the residual stream before a block to the one after it. ``transcoder``:
            both dictionaries are transcoders, from what an MLP reads, before its norm, to what it
            writes; what the first writes goes into the stream and, past the attention between, to
            the second.
        layer: The block of the source, counted from 0.
    """

    source: Site
    target: Site
    route: Route
    layer: int

    def __str__(self) -> str:
        return f"{self.route}.{self.layer}"


def site_pairs(text: str, model: TracedModel) -> list[Pair]:
    """The pairs a text names, in the order of the layers.

    Args:
        text: ``mlp.0`` for one MLP and ``mlp`` for all; ``block.1`` for one block and ``block``,
            or ``resid``, for all; ``transcoder.0`` for transcoders of MLP 0 and MLP 1, and
            ``transcoder`` for those of all MLPs, each with the next; several with commas between
            them. Neighbouring pairs share the site between them, so each site has one dictionary.
        model: The model.

    Raises:
        OptionError: the text names no pair, or one twice, or both an autoencoder and a transcoder
            of a site.
        SiteError: the model has no such layer.
    """
    names = [part.strip() for part in text.split(",")]
    pairs = [make_pair(route, n, model) for name in names for route, n in _layers(name, model)]
    twice = sorted({str(pair) for pair in pairs if pairs.count(pair) > 1})
    if twice:
        raise OptionError(f"sites {text!r} name {', '.join(twice)} more than once; name each once")
    written_by(pairs)  # refused where a site would have two dictionaries
    return sorted(pairs, key=lambda pair: (pair.layer, pair.source))


def make_pair(route: Route, layer: int, model: TracedModel) -> Pair:
    """The pair across the MLP, or the whole block, of a layer, or from its MLP to the next.

    Raises:
        SiteError: the model has no such layer, or no MLP after it.
    """
    if route == "transcoder" and not 0 <= layer < model.n_layers - 1:
        raise SiteError(
            f"sites {route}.{layer} do not exist: {model.name} has {model.n_layers} MLPs, and "
            f"transcoder.N are those of MLP N and of the one after it"
        )
    if not 0 <= layer < model.n_layers:
        raise SiteError(
            f"sites {route}.{layer} do not exist: layers of {model.name} run from 0 to "
            f"{model.n_layers - 1}"
        )
    if route == "mlp":
        return Pair(Site("mlp_in", layer), Site("mlp_out", layer), route, layer)
    if route == "transcoder":
        return Pair(Site("mlp_in", layer), Site("mlp_in", layer + 1), route, layer)
    return Pair(_stream(layer, model), _stream(layer + 1, model), route, layer)


def sites_of(pairs: Iterable[Pair]) -> list[Site]:
    """Every site of the pairs once, in the order of execution: what dictionaries read."""
    return sorted({site for pair in pairs for site in (pair.source, pair.target)})


def written_by(pairs: Iterable[Pair]) -> dict[Site, Site]:
    """What the dictionary of each site writes: the site itself, or of a transcoder another.

    Raises:
        OptionError: a site would have both an autoencoder and a transcoder.
    """
    found: dict[Site, Site] = {}
    for pair in sorted(pairs, key=lambda pair: pair.source):
        for site in (pair.source, pair.target):
            written = Site("mlp_out", site.layer) if pair.route == "transcoder" else site
            if found.setdefault(site, written) != written:
                raise OptionError(
                    f"sites name both an autoencoder and a transcoder of {site}, and a set has one "
                    f"dictionary of a site; train them into two folders"
                )
    return dict(sorted(found.items()))


def written_site(site: Site, dictionary: Dictionary) -> Site:
    """What a dictionary of ``site`` writes: the site itself, or of a transcoder what it says.

    Raises:
        SiteError: a transcoder does not say it.
    """
    if not dictionary.transcoder:
        return site
    if dictionary.info.target is None or dictionary.info.writes is None:
        raise SiteError(
            f"the transcoder of {site} does not say what it writes; set dictionary.info = "
            f"DictionaryInfo(site='{site}', target='mlp_out.{site.layer}')"
        )
    return dictionary.info.writes


def pair_to_json(pair: Pair) -> dict[str, Any]:
    """A pair as plain JSON."""
    return {
        "route": pair.route,
        "layer": pair.layer,
        "source": str(pair.source),
        "target": str(pair.target),
    }


def _stream(depth: int, model: TracedModel) -> Site:
    """The residual stream after ``depth`` blocks, by the one name that it has here."""
    if depth < model.n_layers:
        return Site("resid_pre", depth)
    return Site("resid_post", model.n_layers - 1)


def _layers(name: str, model: TracedModel) -> list[tuple[Route, int]]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise OptionError(
            f"sites {name!r} are unknown; name mlp.LAYER, block.LAYER or transcoder.LAYER, or mlp, "
            f"block, transcoder for all layers"
        )
    routes: dict[str, Route] = {"mlp": "mlp", "transcoder": "transcoder"}
    route = routes.get(found[1], "block")
    # Of transcoders the last has none after it; a model of one layer is refused below.
    every = range(max(1, model.n_layers - (route == "transcoder")))
    layers = every if found[2] in (None, "all") else [int(found[2])]
    return [(route, layer) for layer in layers]
