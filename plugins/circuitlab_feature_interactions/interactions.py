"""Interactions: the part of a model between two sites, and the attributions across it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitlab import ModelError, Tokens
from circuitlab_feature_interactions.attributions import Attributions
from circuitlab_feature_interactions.block_route import BlockRoute
from circuitlab_feature_interactions.mlp_route import MlpRoute
from circuitlab_feature_interactions.transcoder_route import TranscoderRoute

if TYPE_CHECKING:
    from circuitlab import TracedModel
    from circuitlab_feature_interactions.sites import Pair

__all__ = ["Attributions", "Route", "make_route"]

Route = MlpRoute | BlockRoute | TranscoderRoute

_ROUTES: dict[str, type[MlpRoute] | type[BlockRoute] | type[TranscoderRoute]] = {
    "mlp": MlpRoute,
    "block": BlockRoute,
    "transcoder": TranscoderRoute,
}

#: Largest difference to what the model itself computes, as a share of its largest number.
TOLERANCE = 1e-5
#: Tokens of the longer of the two prompts on which a route is tried.
_TRIED = 12


def make_route(model: TracedModel, pair: Pair, *, dtype: torch.dtype | None = None) -> Route:
    """The route across a pair of sites, tried on random prompts.

    Args:
        model: The model.
        pair: The pair; its route says through what.
        dtype: Type to compute in, that of the dictionaries; None: the model's, at least float32.

    Raises:
        ModelError: the route does not compute what the model does, or a norm cannot be folded.
        SiteError: an MLP's hidden layer is not told by the architecture.
    """
    dtype = dtype or torch.promote_types(model.dtype, torch.float32)
    route = _ROUTES[pair.route](model, pair.layer, dtype)
    _check(model, pair, route)
    return route


@torch.no_grad()
def _check(model: TracedModel, pair: Pair, route: Route) -> None:
    """Refuse a route that differs from the model, at prompts of two lengths.

    Raises:
        ModelError: it does.
    """
    length = min(_TRIED, model.n_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : length // 3] = False
    tokens = Tokens(ids * mask, mask).to(model.device)
    run = model.run(tokens, read=(pair.source, pair.target), logits="none")
    real, given = tokens.mask, run[pair.target].to(route.dtype)
    found = route(run[pair.source].to(route.dtype), real)
    largest = float(given[real].abs().max())
    apart = float((found - given)[real].abs().max())
    # Rounding of the model's own type is no difference.
    allowed = max(TOLERANCE, 16 * torch.finfo(model.dtype).eps)
    if not apart <= allowed * largest:
        raise ModelError(
            f"{pair.source} to {pair.target} of {model.name}, computed from its weights, differs "
            f"from the model by {apart:.2g} of {largest:.2g}; its architecture does more than a "
            f"norm, attention and an MLP, and interactions across it cannot be found"
        )
