"""Pairs of sites whose dictionaries interact: across an MLP, or across a whole block."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from circuitlab import OptionError, Site, SiteError

if TYPE_CHECKING:
    from circuitlab import TracedModel

Route = Literal["mlp", "block"]

_NAME = re.compile(r"(mlp|block|resid)(?:\.(\d{1,6}|all))?")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sites with a part of the model between them.

    Attributes:
        source: What that part reads.
        target: What it writes.
        route: ``mlp``: from the stream as the MLP reads it, before its norm, to what it writes.
            ``block``: from the residual stream before a block to the one after it.
        layer: The block, counted from 0.
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
            or ``resid``, for all; several with commas between them. Neighbouring blocks share the
            site between them, so each site has one dictionary.
        model: The model.

    Raises:
        OptionError: the text names no pair, or one twice.
        SiteError: the model has no such layer.
    """
    names = [part.strip() for part in text.split(",")]
    pairs = [make_pair(route, n, model) for name in names for route, n in _layers(name, model)]
    twice = sorted({str(pair) for pair in pairs if pairs.count(pair) > 1})
    if twice:
        raise OptionError(f"sites {text!r} name {', '.join(twice)} more than once; name each once")
    return sorted(pairs, key=lambda pair: (pair.layer, pair.source))


def make_pair(route: Route, layer: int, model: TracedModel) -> Pair:
    """The pair across the MLP, or the whole block, of a layer.

    Raises:
        SiteError: the model has no such layer.
    """
    if not 0 <= layer < model.n_layers:
        raise SiteError(
            f"sites {route}.{layer} do not exist: layers of {model.name} run from 0 to "
            f"{model.n_layers - 1}"
        )
    if route == "mlp":
        return Pair(Site("mlp_in", layer), Site("mlp_out", layer), route, layer)
    return Pair(_stream(layer, model), _stream(layer + 1, model), route, layer)


def sites_of(pairs: Iterable[Pair]) -> list[Site]:
    """Every site of the pairs once, in the order of execution."""
    return sorted({site for pair in pairs for site in (pair.source, pair.target)})


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
            f"sites {name!r} are unknown; name mlp.LAYER, block.LAYER, or mlp, block for all layers"
        )
    route: Route = "mlp" if found[1] == "mlp" else "block"
    layers = range(model.n_layers) if found[2] in (None, "all") else [int(found[2])]
    return [(route, layer) for layer in layers]
