"""Interactions of a pair of dictionaries as a number that training makes small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from circuitlab import Dictionary
from circuitlab_feature_interactions.activations import Batch
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.penalties import (
    GroupPenalty,
    decay_for,
    penalty,
    unit_of,
)
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import Pair

if TYPE_CHECKING:
    from circuitlab import TracedModel


class Interactions(Protocol):
    """How much the features of a pair interact at a batch; differentiable in both dictionaries.

    Attributes:
        note: What the user should know of how they are measured; empty if nothing.
    """

    note: str

    def __call__(
        self,
        source: Dictionary,
        target: Dictionary,
        batch: Batch,
        scale: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """A scalar; ``scale`` is each target latent's mean where it is active, ``[n_target]``."""

    def state(self) -> Mapping[str, Tensor]:
        """What it remembers of earlier batches, by name."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""


class Coupling:
    """The interactions of a pair, as the settings penalise them, in the penalty's unit.

    Raises:
        ModelError: what lies between the sites cannot be computed from the weights.
        SiteError: an MLP's hidden layer is not told by the architecture.
    """

    def __init__(self, model: TracedModel, pair: Pair, settings: TrainSettings) -> None:
        n = settings.n_latents(model.d_model)
        self._pair, self._settings, self._route = pair, settings, make_route(model, pair)
        kind = settings.interaction
        self.note, decay = "", decay_for(n, n)
        if kind == "group" and not decay:
            self.note = (
                f"{pair}: {n} times {n} pairs of latents are too many for a running mean; group is "
                f"taken of each step's own tokens and underestimates"
            )
        self._measure = GroupPenalty(decay) if kind == "group" else penalty(kind)
        self._unit = unit_of(kind, settings.k, n)

    def __call__(
        self,
        source: Dictionary,
        target: Dictionary,
        batch: Batch,
        scale: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The penalty at a batch, or at what the estimator draws of it."""
        found = self._route.attributions(
            source,
            target,
            batch.values[self._pair.source],
            mask=batch.mask,
            rows=self._settings.rows,
            tokens=self._settings.tokens,
            generator=generator,
        )
        return self._measure(found, scale) / self._unit

    def state(self) -> Mapping[str, Tensor]:
        """The running mean of ``group``; else nothing."""
        return self._measure.state() if isinstance(self._measure, GroupPenalty) else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        if isinstance(self._measure, GroupPenalty):
            self._measure.load(state)
