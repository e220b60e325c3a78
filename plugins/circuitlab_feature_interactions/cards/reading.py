"""Reading: one number per token, of a latent or of a random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import NumericsError, track
from circuitlab_feature_interactions.data import pad

if TYPE_CHECKING:
    from circuitlab import Dictionary, Site, Tokens, TracedModel

#: Tokens, padding included, that go through the model at a time.
_PASS = 2048


@dataclass(frozen=True, eq=False)
class Feature:
    """What is read at a token, and what it writes.

    Attributes:
        site: Where.
        dictionary: Of the site.
        latent: Its latent.
        direction: ``[width]``, of norm 1, which is read in place of the latent; or None.
        threshold: What the direction's product with the activation must exceed.
    """

    site: Site
    dictionary: Dictionary
    latent: int
    direction: Tensor | None = None
    threshold: float = 0.0

    def read(self, x: Tensor) -> Tensor:
        """The activation, ``[...]``, at least 0, of ``x`` ``[..., width]``."""
        if self.direction is None:
            return self.dictionary.encode(x)[..., self.latent]
        return (self.projected(x) - self.threshold).relu()

    def projected(self, x: Tensor) -> Tensor:
        """The product with the direction, ``[...]``."""
        assert self.direction is not None
        return x.to(self.direction.dtype) @ self.direction

    @property
    def written(self) -> Tensor:
        """What an activation of 1 writes, ``[width]``."""
        return self.dictionary.W_d[self.latent] if self.direction is None else self.direction


@dataclass(frozen=True, eq=False)
class Readings:
    """What features read at all tokens of some prompts.

    Attributes:
        prompts: Ids of each prompt, on the CPU.
        starts: Where each begins among all tokens, and where the last one ends, ``[n + 1]``.
        values: ``[n_features, n_tokens]``, on the CPU, at least float32.
    """

    prompts: Sequence[Tensor]
    starts: Tensor
    values: Tensor

    def place(self, token: int) -> tuple[int, int]:
        """Number of the prompt that a token is in, and its position there."""
        prompt = int(torch.searchsorted(self.starts, token, right=True)) - 1
        return prompt, token - int(self.starts[prompt])

    def per_prompt(self, values: Tensor) -> Tensor:
        """Sums of ``[n_tokens]`` over each prompt, float64."""
        ends = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))[self.starts]
        return ends[1:] - ends[:-1]


def prompt_batches(prompts: Sequence[Tensor], device: torch.device) -> list[Tokens]:
    """Prompts in their order, as many at a time as a pass takes."""
    size = max(1, _PASS // max(map(len, prompts)))
    return [pad(prompts[i : i + size], device) for i in range(0, len(prompts), size)]


@torch.no_grad()
def read_features(
    model: TracedModel, features: Sequence[Feature], prompts: Sequence[Tensor]
) -> Readings:
    """The features at every token of the prompts; of directions the product, no threshold taken.

    Raises:
        NumericsError: one is not finite.
    """
    sites = sorted({feature.site for feature in features})
    parts = []
    for tokens in track(prompt_batches(prompts, model.device), "reading features"):
        run = model.run(tokens, read=sites, logits="none")
        real = {site: run[site].flatten(2)[tokens.mask] for site in sites}
        parts.append(_columns(features, real).cpu())
    values = torch.cat(parts, 1)
    for feature, row in zip(features, values, strict=True):
        if not torch.isfinite(row).all():
            raise NumericsError(
                f"activations at {feature.site} of {model.name} hold NaN or infinity; run the "
                f"model in a wider type (--dtype float32)"
            )
    lengths = torch.tensor([0, *map(len, prompts)])
    return Readings(prompts, lengths.cumsum(0), values)


def _columns(features: Sequence[Feature], real: dict[Site, Tensor]) -> Tensor:
    """``[n_features, n]``; each dictionary encodes once."""
    encoded: dict[Site, Tensor] = {}
    rows = []
    for feature in features:
        x = real[feature.site]
        if feature.direction is not None:
            rows.append(feature.projected(x))
            continue
        if feature.site not in encoded:
            encoded[feature.site] = feature.dictionary.encode(x)
        rows.append(encoded[feature.site][:, feature.latent])
    return torch.stack([row.double() for row in rows])


@torch.no_grad()
def read_last(model: TracedModel, feature: Feature, batches: Sequence[Tokens]) -> Tensor:
    """A feature at the last token of each prompt, ``[n]``, float64, on the CPU."""
    parts = []
    for tokens in batches:
        run = model.run(tokens, read=[feature.site], logits="none")
        parts.append(feature.read(run[feature.site].flatten(2)[:, -1]).double().cpu())
    return torch.cat(parts)
