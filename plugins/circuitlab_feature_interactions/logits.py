"""Logits: what latents do to the task's metric, by gradients and by taking them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import choose_batch_size, track
from circuitlab_feature_interactions.sites import written_site

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Dictionary, EncodedTask, Site, TracedModel


@dataclass(frozen=True)
class MetricEffects:
    """What latents of a site add to the metric on clean prompts.

    Attributes:
        site: Where the latents are read.
        effects: Gradient times activation, summed over positions, of each pair and latent, the
            error last: ``[n_pairs, n + 1]``, float64, in the metric's unit; positive raises it.
        active: Whether a latent is active anywhere, same shape, bool.
        metric: The metric of each pair, ``[n_pairs]``, float64.
    """

    site: Site
    effects: Tensor
    active: Tensor
    metric: Tensor

    @property
    def unit(self) -> float:
        """Mean size of the metric, which effects are divided by; 1 where it is 0."""
        return float(self.metric.abs().mean()) or 1.0


def metric_effects(
    model: TracedModel,
    pairs: EncodedTask,
    site: Site,
    dictionary: Dictionary,
    batch_size: int | None = None,
) -> MetricEffects:
    """Gradient times activation of every latent of a site, through the rest of the model.

    The gradient is taken where the dictionary writes: of a transcoder at the MLP's output.
    """
    out = written_site(site, dictionary)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in track([*_batches(model, pairs, batch_size)], "attributing to logits"):
        metrics: list[Tensor] = []

        def metric(
            logits: Tensor, batch: EncodedTask = batch, kept: list[Tensor] = metrics
        ) -> Tensor:
            kept.append(batch.score(logits, logits.detach()))
            return kept[0]

        run = model.run(batch.clean, read=[site, out], gradient_of=metric, gradient_at=[out])
        found = _effects(dictionary, run[site], run[out], run.gradient(out), run.mask)
        parts.append((*found, metrics[0]))
    effects, active, scores = zip(*parts, strict=True)
    metric_values = torch.cat([score.detach().double().cpu() for score in scores])
    return MetricEffects(site, torch.cat(effects), torch.cat(active), metric_values)


@torch.no_grad()
def _effects(
    dictionary: Dictionary, x: Tensor, target: Tensor, gradient: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    index, values = dictionary.active(x)
    values = (values * mask[..., None]).double()
    slopes = (gradient.to(dictionary.W_d.dtype) @ dictionary.W_d.T).double()
    found = torch.zeros(len(x), dictionary.n + 1, dtype=torch.float64, device=x.device)
    active, latents = torch.zeros_like(found), index.flatten(1)
    found.scatter_add_(1, latents, (slopes.gather(2, index) * values).flatten(1))
    active.scatter_add_(1, latents, (values != 0).double().flatten(1))
    error = dictionary.error(x, target)
    found[:, -1] = ((error * gradient).double().sum(-1) * mask).sum(1)
    active[:, -1] = 1
    return found.cpu(), active.cpu() > 0


@torch.no_grad()
def removed_effects(
    model: TracedModel,
    pairs: EncodedTask,
    site: Site,
    dictionary: Dictionary,
    latents: Sequence[int],
    batch_size: int | None = None,
) -> Tensor:
    """metric(clean) − metric(latent taken out at every position), ``[n_latents, n_pairs]``.

    Float64; positive: the latent raises the metric. The number after the last latent stands for
    the error.
    """
    alone = [(latent,) for latent in latents]
    return removed_groups(model, pairs, site, dictionary, alone, batch_size)


@torch.no_grad()
def removed_groups(
    model: TracedModel,
    pairs: EncodedTask,
    site: Site,
    dictionary: Dictionary,
    groups: Sequence[Sequence[int]],
    batch_size: int | None = None,
) -> Tensor:
    """The same of latents that are taken out together, ``[n_groups, n_pairs]``."""
    columns: list[Tensor] = []
    out = written_site(site, dictionary)
    for batch in track([*_batches(model, pairs, batch_size)], "taking latents out"):
        run = model.run(batch.clean, read=[site, out])
        x, reference = run[site], run.logits[:, -1]
        clean, z = batch.score(reference, reference), dictionary.encode(x)
        rows = []
        for group in groups:
            latents = [latent for latent in group if latent != dictionary.n]
            base = run[out] if len(latents) == len(group) else dictionary.decode(z, x)
            changed = base - z[..., latents] @ dictionary.W_d[latents]
            logits = model.run(batch.clean, write={out: changed}).logits[:, -1]
            rows.append((clean - batch.score(logits, reference)).double().cpu())
        columns.append(torch.stack(rows) if rows else torch.zeros(0, len(batch)).double())
    return torch.cat(columns, 1)


def _batches(
    model: TracedModel, pairs: EncodedTask, batch_size: int | None
) -> Sequence[EncodedTask]:
    return list(pairs.batches(choose_batch_size(model, pairs, batch_size)))
