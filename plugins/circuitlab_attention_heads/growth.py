"""Norm growth: how large the residual stream, what is written to it, and the weights are by layer.

In trained transformers the norm of the residual stream often grows by about the same factor from
layer to layer, 1.045 on average in GPT-2 XL (Heimersheim & Turner 2023, "Residual stream norms grow
exponentially over the forward pass"). So do norms of weights that write to it, while those that
read it stay much as they are (Millidge & Winsor 2023, "Basic facts about language model
internals").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch

from circuitlab import Interval, Site, ratio_interval

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Run, TracedModel

#: A line through this many layers fits whatever they are, and has no interval.
EXACT = 2
_LEVEL = 0.95


@dataclass(frozen=True)
class Rate:
    """How fast norms grow: a straight line through their logarithms by layer, least squares.

    Attributes:
        factor: From a layer to the next, exp(slope): 1.045 is 4.5 % more, 1 no growth.
        interval: 95 %; None for two layers.
        fit: R², the share of the variance of the logarithms that the line explains; None for two
            layers, and where all are the same.
    """

    factor: float
    interval: Interval | None
    fit: float | None


@dataclass(frozen=True)
class Growth:
    """Norms by layer.

    Attributes:
        means: Geometric mean at each place; None where nothing is written.
        bounds: Their 95 % intervals over prompts; None where there is none.
        rate: None for a single layer.
    """

    means: list[float | None]
    bounds: list[Interval | None]
    rate: Rate | None


@dataclass(frozen=True)
class TokenNorms:
    """L2 norms at the tokens of some prompts, float64, as norms see vectors: see :func:`visible`.

    The first token of each prompt is left out: it often is an attention sink, many times as large
    as all others.

    Attributes:
        stream: At ``resid_pre`` of each layer and at the end, ``[n_layers + 1, n_tokens]``.
        attention: Of what attention writes, biases included, ``[n_layers, n_tokens]``.
        mlp: Of what the MLP writes, same shape.
        attention_cosine: Of the attention's write with the stream that it is added to; 0 where
            either is 0.
        mlp_cosine: The same of the MLP's.
        prompt: Row of each token's prompt, ``[1, n_tokens]``.
    """

    stream: Tensor
    attention: Tensor
    mlp: Tensor
    attention_cosine: Tensor
    mlp_cosine: Tensor
    prompt: Tensor

    def cosines(self, name: str) -> list[float | None]:
        """Mean cosine of each layer's write with the stream, over tokens where it writes anything.

        Args:
            name: ``attention`` or ``mlp``.
        """
        some, cosines = getattr(self, name) > 0, getattr(self, f"{name}_cosine")
        counts = some.sum(1)
        means = ((cosines * some).sum(1) / counts.clamp(min=1)).tolist()
        return [mean if count else None for mean, count in zip(means, counts.tolist(), strict=True)]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The tokens of several batches."""
        return cls(
            *(torch.cat([getattr(part, field.name) for part in parts], 1) for field in fields(cls))
        )


def sites(model: TracedModel) -> list[Site]:
    """What :func:`token_norms` needs read."""
    kinds = ("resid_pre", "attn_out", "mlp_in", "mlp_out")
    within = [Site(kind, layer) for layer in range(model.n_layers) for kind in kinds]
    return [*within, Site("resid_post", model.n_layers - 1)]


def visible(vectors: Tensor, *, centred: bool) -> Tensor:
    """Vectors of the residual stream as norms see them, float64: less their mean if ``centred``."""
    wide = vectors.double()
    return wide - wide.mean(-1, keepdim=True) if centred else wide


def later_tokens(run: Run) -> Tensor:
    """Where tokens are real and not the first of their prompt, ``[batch, pos]``."""
    return run.mask & (run.mask.cumsum(-1) > 1)


def streams(model: TracedModel, run: Run, *, centred: bool) -> Tensor:
    """The stream at ``resid_pre`` of each layer and at the end, ``[n_layers + 1, batch, pos, d]``.

    Of a run that read :func:`sites`; as norms see it, float64.
    """
    before = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    read = [run[site] for site in (*before, Site("resid_post", model.n_layers - 1))]
    return visible(torch.stack(read), centred=centred)


def token_norms(
    model: TracedModel,
    run: Run,
    stream: Tensor,
    where: Tensor,
    prompts: Tensor,
    *,
    centred: bool,
) -> TokenNorms:
    """Norms at some tokens of a run that read :func:`sites`.

    Args:
        model: The model.
        run: The run.
        stream: What :func:`streams` gives of it.
        where: Tokens, ``[batch, pos]`` bool.
        prompts: Row of each prompt in the task, ``[batch]``.
        centred: See ``Weights.centres``.
    """

    def at(kind: str) -> Tensor:
        read = torch.stack([run[Site(kind, layer)][where] for layer in range(model.n_layers)])
        return visible(read, centred=centred)

    before, attention, mlp = stream[:, where], at("attn_out"), at("mlp_out")
    parts = (
        before.norm(dim=-1),
        attention.norm(dim=-1),
        mlp.norm(dim=-1),
        _cosine(attention, before[:-1]),
        _cosine(mlp, at("mlp_in")),
        prompts.to(where.device)[:, None].expand_as(where)[where][None],
    )
    return TokenNorms(*(part.cpu() for part in parts))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of vectors in the last dimension; 0 where either is 0."""
    cosines: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return cosines.nan_to_num()


def growth_of_tokens(norms: Tensor, prompts: Tensor, seed: int = 0) -> Growth:
    """How norms at tokens grow; intervals by bootstrap over prompts.

    Only tokens count that have a norm above 0 at every place that has any.

    Args:
        norms: ``[n_places, n_tokens]``; places one layer apart.
        prompts: Row of each token's prompt, ``[n_tokens]``.
        seed: Of the bootstrap.
    """
    alive = (norms > 0).any(1)
    used = (norms[alive] > 0).all(0)
    means: list[float | None] = [None] * len(norms)
    bounds: list[Interval | None] = [None] * len(norms)
    places = alive.nonzero().flatten().tolist()
    if not places or not bool(used.any()):
        return Growth(means, bounds, None)
    logs = norms[alive][:, used].log()
    counts = torch.bincount(prompts[used]).double()
    some = counts > 0

    def interval(values: Tensor) -> Interval | None:
        """Of the exponential of the mean over tokens of ``[n_tokens]``."""
        sums = torch.zeros_like(counts).index_add_(0, prompts[used], values)
        found = ratio_interval(sums[some], counts[some], seed)
        return None if found is None else (math.exp(found[0]), math.exp(found[1]))

    for place, values in zip(places, logs, strict=True):
        means[place] = math.exp(float(values.mean()))
        bounds[place] = interval(values)
    line = growth_rate(means)
    if line is None or line.interval is None:
        return Growth(means, bounds, line)
    # The slope is linear in the logarithms, so that of the mean is the mean of the tokens' own.
    slopes = _weights(places) @ logs
    return Growth(means, bounds, Rate(line.factor, interval(slopes), line.fit))


def growth_rate(norms: Sequence[float | None]) -> Rate | None:
    """The rate at which norms grow, with the t-interval of the regression.

    Args:
        norms: Of each layer, in order; None or 0 where there is none: such a layer is left out.

    Returns:
        None where fewer than two layers are left.
    """
    places = [layer for layer, norm in enumerate(norms) if norm]
    if len(places) < EXACT:
        return None
    logs = torch.tensor([norms[place] for place in places], dtype=torch.float64).log()
    logs = logs - logs.mean()
    weights = _weights(places)
    slope = float(weights @ logs)
    if len(places) == EXACT:
        return Rate(math.exp(slope), None, None)
    at = torch.tensor(places, dtype=torch.float64)
    left = float((logs - slope * (at - at.mean())).square().sum())
    total = float(logs.square().sum())
    free = len(places) - 2
    half = t_quantile(free) * math.sqrt(left / free) * float(weights.norm())
    fit = 1 - left / total if total > torch.finfo(torch.float64).eps else None
    return Rate(math.exp(slope), (math.exp(slope - half), math.exp(slope + half)), fit)


def t_quantile(freedom: int) -> float:
    """How many standard errors a two-sided 95 % interval reaches, by Student's t distribution.

    With ``t = sqrt(freedom) tan(angle)`` the probability between -t and t is a finite sum of powers
    of cos(angle) (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4), which rises with the angle.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        term = math.sin(angle) * (math.cos(angle) if freedom % 2 else 1)
        total = 0.0
        for power in range(2 + freedom % 2, freedom + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power - 1) / power
        if freedom % 2:
            total = (angle + total) * 2 / math.pi
        low, high = (angle, high) if total < _LEVEL else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def weight_norms(model: TracedModel) -> dict[str, Tensor]:
    """Frobenius norms of weights by layer, as norms see what they write, float64.

    Returns:
        Of each head, ``[n_layers, n_heads]``: ``q`` and ``k``, which read, norms folded in; ``o``,
        which writes; ``ov``, the product ``W_V W_O``, by the Gram matrices of its factors. Of the
        MLP, ``[n_layers, 1]``: ``out``, which writes; only where the architecture names it.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("ov", "o", "out", "q", "k")}
    centred = model.weights.centres
    for layer in range(model.n_layers):
        heads = model.weights.folded(layer, torch.float64)
        grams = (heads.v.mT @ heads.v) * (heads.o @ heads.o.mT)
        found["ov"].append(grams.sum((1, 2)).clamp(min=0).sqrt())
        for name, weight in (("o", heads.o), ("q", heads.q), ("k", heads.k)):
            found[name].append(weight.norm(dim=(1, 2)))
        if model.architecture.mlp_output_projection:
            weight = _written_by_mlp(model, layer)
            found["out"].append(visible(weight, centred=centred).norm()[None])
    return {name: torch.stack(norms).cpu() for name, norms in found.items() if norms}


def _written_by_mlp(model: TracedModel, layer: int) -> Tensor:
    """The MLP's output projection, the gain of a norm behind it folded in, ``[d_mlp, d_model]``."""
    if model.architecture.mlp_post_norm:
        return model.weights.mlp(layer, torch.float64).w_out
    return next(model.weights.reading(Site("mlp_post", layer)))


def growth_of_weights(norms: Tensor) -> Growth:
    """How norms ``[n_layers, n]`` grow, by the geometric mean of each layer; zeros are left out."""
    means = []
    for row in norms:
        kept = row[row > 0]
        means.append(math.exp(float(kept.log().mean())) if len(kept) else None)
    return Growth(means, [None] * len(means), growth_rate(means))


def _weights(places: Sequence[int]) -> Tensor:
    """What least squares multiplies each place's value by to give the slope, float64."""
    at = torch.tensor(places, dtype=torch.float64)
    at = at - at.mean()
    return at / at.square().sum()
