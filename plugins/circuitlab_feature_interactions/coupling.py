"""Interactions of a pair of dictionaries as a number that training makes small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from circuitlab import Dictionary
from circuitlab_feature_interactions.activations import Batch
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.penalties import penalty
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import Pair

if TYPE_CHECKING:
    from circuitlab import TracedModel


class Interactions(Protocol):
    """How much the features of a pair interact at a batch; differentiable in both dictionaries."""

    def __call__(
        self,
        source: Dictionary,
        target: Dictionary,
        batch: Batch,
        scale: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """A scalar; ``scale`` is each target latent's mean where it is active, ``[n_target]``."""


def couple(model: TracedModel, pair: Pair, settings: TrainSettings) -> Interactions:
    """The interactions of a pair, as the settings penalise them.

    Raises:
        ModelError: what lies between the sites cannot be computed from the weights.
        SiteError: an MLP's hidden layer is not told by the architecture.
    """
    route, measure = make_route(model, pair), penalty(settings.interaction)

    def interactions(
        source: Dictionary,
        target: Dictionary,
        batch: Batch,
        scale: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        found = route.attributions(
            source,
            target,
            batch.values[pair.source],
            mask=batch.mask,
            rows=settings.rows,
            tokens=settings.tokens,
            generator=generator,
        )
        return measure(found, scale)

    return interactions
