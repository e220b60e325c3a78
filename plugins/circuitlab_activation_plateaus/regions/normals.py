"""Normals: where walks cross from one region into another, and which way the border faces there.

A crossing is found by halving the step in which the region changes; the normal of the border is the
gradient, at the crossing, of the margin between the two regions with respect to what was injected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import track
from circuitlab_activation_plateaus.walks.paths import Path
from circuitlab_activation_plateaus.walks.walking import STREAMS

if TYPE_CHECKING:
    from circuitlab import Run, Site, Tokens, TracedModel
    from circuitlab_activation_plateaus.regions.finding import Regions

#: From rows ``[n]`` and places t ``[n]`` to logits ``[n, vocab]``.
Evaluate = Callable[[Tensor, Tensor], Tensor]
#: From logits ``[m, vocab]`` and the numbers of the crossings they belong to ``[m]`` to ``[m]``.
Margin = Callable[[Tensor, Tensor], Tensor]

#: Times the step of a crossing is halved.
HALVINGS = 10
#: Half the length of path over which a slope is measured.
REACH = 1e-3
#: Roundings of the largest logit that a difference of two margins may be off by.
ROUNDINGS = 16
#: Share of the measured slope that a gradient must have to give a normal: at a jump it has none.
LEAST_SHARE = 0.5
#: Random directions that matches are held against, and the share of them below the number given.
RANDOM, SURE = 200, 0.95


class Walkers:
    """Prompts whose last activation at a site moves along a path, each from its own end to another.

    Attributes:
        a: Starts, ``[n_rows, d]``.
        b: Ends, ``[n_rows, d]``.
    """

    def __init__(
        self,
        model: TracedModel,
        tokens: Tokens,
        site: Site,
        path: Path,
        ends: tuple[Tensor, Tensor],
        batch_size: int | None = None,
    ) -> None:
        self.a, self.b = ends
        self._model, self._tokens, self._site, self._path = model, tokens, site, path
        size = tokens.ids.shape[1] * model.d_model * model.dtype.itemsize
        most = STREAMS.get(model.device.type, STREAMS["cuda"]) // size
        self._at_once = batch_size or max(1, most)
        rows = torch.arange(len(tokens), device=model.device)
        parts = [
            model.run(tokens.rows(part), read=[site], logits="none")[site]
            for part in torch.split(rows, self._at_once)
        ]
        self._clean = torch.cat(parts)

    def points(self, rows: Tensor, t: Tensor) -> Tensor:
        """Points of the walks ``rows`` at the places ``t``, ``[n, d]``, float64."""
        return self._path(self.a[rows].double(), self.b[rows].double(), t[:, None])[:, 0]

    def logits(self, rows: Tensor, t: Tensor) -> Tensor:
        """Logits there, ``[n, vocab]``, at least float32."""
        found = [self._run(*part).logits[:, -1] for part in self._parts(rows, t)]
        return torch.cat(found).to(torch.promote_types(self._model.dtype, torch.float32))

    def gradients(self, rows: Tensor, t: Tensor, margin: Margin) -> Tensor:
        """Gradient of a margin with respect to the point, ``[n, d]``, at least float32.

        Args:
            rows: ``[n]``.
            t: ``[n]``.
            margin: What is differentiated.
        """
        found, first = [], 0
        for part, places in self._parts(rows, t):
            which = torch.arange(first, first + len(part), device=part.device)
            first += len(part)
            run = self._run(part, places, _of(margin, which))
            found.append(run.gradient(self._site)[:, -1].flatten(1))
        return torch.cat(found).to(torch.promote_types(self._model.dtype, torch.float32))

    def _parts(self, rows: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = (torch.split(values, self._at_once) for values in (rows, t))
        return list(zip(*parts, strict=True))

    def _run(
        self, rows: Tensor, t: Tensor, margin: Callable[[Tensor], Tensor] | None = None
    ) -> Run:
        part = self._tokens.rows(rows).trimmed()
        whole = self._clean[rows, -part.ids.shape[1] :]
        whole[:, -1] = self.points(rows, t).view_as(whole[:, -1]).to(whole)
        at = [] if margin is None else [self._site]
        return self._model.run(part, write={self._site: whole}, gradient_of=margin, gradient_at=at)


@dataclass(frozen=True, eq=False)
class Crossings:
    """Where walks go from one region into another, ``m`` of them, by row and place.

    Attributes:
        rows: Walk, ``[m]``.
        t: Place on it, ``[m]``, float64.
        before: Region that is left, ``[m]``.
        after: Region that is entered, ``[m]``.
        width: Length of path within which the change was found, ``[m]``.
    """

    rows: Tensor
    t: Tensor
    before: Tensor
    after: Tensor
    width: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def find_crossings(
    regions: Regions, t: Tensor, labels: Tensor, evaluate: Evaluate, halvings: int = HALVINGS
) -> Crossings:
    """The crossings between the steps of walks, each to ``2 ** -halvings`` of its step or better.

    Where a third region lies between those of two steps, both its borders are found; a region that
    a walk enters and leaves again between two steps of one region is not seen.

    Args:
        regions: What tells states apart.
        t: Steps, ``[n_rows, n_steps]``, rising.
        labels: Regions there, ``[n_rows, n_steps]``.
        evaluate: The walks' logits at other places.
        halvings: Times each step is halved.
    """
    rows, steps = (labels[:, 1:] != labels[:, :-1]).nonzero(as_tuple=True)
    low, end = t[rows, steps].double(), t[rows, steps + 1].double()
    before, last = labels[rows, steps], labels[rows, steps + 1]
    found = []
    while len(rows):
        start, high, after = low, end, last
        for _ in track(range(halvings), "finding crossings"):
            middle = (low + high) / 2
            here = regions.assign(evaluate(rows, middle))
            stays = here == before
            low = torch.where(stays, middle, low)
            high = torch.where(stays, high, middle)
            after = torch.where(stays, after, here)
        found.append(_located(regions, evaluate, rows, (low, high), before, after))
        # What was entered may be another region than that of the next step: go on from there.
        more = (after != last) & (high < end) & (high > start)
        rows, low, end = rows[more], high[more], end[more]
        before, last = after[more], last[more]
    if not found:
        empty = rows.new_zeros(0)
        return Crossings(empty, t.new_zeros(0).double(), empty, empty, t.new_zeros(0).double())
    parts = [torch.cat(part) for part in zip(*found, strict=True)]
    order = sorted(range(len(parts[0])), key=lambda i: (int(parts[0][i]), float(parts[1][i])))
    return Crossings(*(part[order] for part in parts))


@dataclass(frozen=True, eq=False)
class Facing:
    """How borders are crossed, one entry per crossing.

    Attributes:
        slope: Growth of the margin per length of path, measured, ``[m]``; nats. What is within
            rounding of the gradient's part is that part.
        share: The gradient's part of it, ``[m]``: 1 where the output is smooth, 0 at a jump.
        normals: Unit gradient of the margin towards the region entered, ``[m, d]``; 0 where the
            gradient gives less than half of the slope, and so no normal.
    """

    slope: Tensor
    share: Tensor
    normals: Tensor

    @property
    def known(self) -> Tensor:
        """Which crossings have a normal, ``[m]``."""
        return self.normals.any(-1)


def face(regions: Regions, crossings: Crossings, walkers: Walkers) -> Facing:
    """Slope and normal at each crossing."""
    rows, t, both = crossings.rows, crossings.t, (crossings.before, crossings.after)
    if not len(rows):
        none = t.new_zeros(0)
        return Facing(none, none, t.new_zeros(0, walkers.a.shape[1]))
    sides = [(t - REACH).clamp(min=0), (t + REACH).clamp(max=1)]
    logits = [walkers.logits(rows, at) for at in sides]
    under, over = (regions.margin(at, *both).double() for at in logits)
    length = sides[1] - sides[0]
    measured = (over - under) / length
    largest = torch.stack([at.abs().amax(-1) for at in logits]).amax(0).double()
    rounding = ROUNDINGS * torch.finfo(logits[0].dtype).eps * largest / length

    def margin(logits: Tensor, which: Tensor) -> Tensor:
        return regions.margin(logits, *(part[which] for part in both))

    gradients = walkers.gradients(rows, t, margin).double()
    motion = walkers.points(rows, sides[1]) - walkers.points(rows, sides[0])
    along = (gradients * motion).sum(-1) / length
    beyond = measured - along
    slope = along + beyond.sign() * (beyond.abs() - rounding).clamp(min=0)
    slope = torch.where(along.isfinite(), slope, measured)
    share = torch.where(slope > 0, along / slope, 0.0)
    norms = gradients.norm(dim=-1, keepdim=True)
    kept = (share >= LEAST_SHARE)[:, None] & (norms > 0) & norms.isfinite()
    return Facing(slope, share, torch.where(kept, gradients / norms, 0.0))


@dataclass(frozen=True, eq=False)
class Directions:
    """Named directions that normals are held against.

    Attributes:
        name: What they are.
        vectors: ``[n, d]``; their length does not count.
        label: From the numbers of some to their names.
    """

    name: str
    vectors: Tensor
    label: Callable[[Sequence[int]], list[str]]

    def cosines(self, vectors: Tensor) -> Tensor:
        """Cosines with vectors ``[m, d]``, ``[m, n]``; 0 for a direction of length 0."""
        return torch.nn.functional.normalize(vectors.to(self._units), dim=-1) @ self._units.T

    @cached_property
    def _units(self) -> Tensor:
        return torch.nn.functional.normalize(self.vectors, dim=-1)

    def match(self, normal: Tensor, n: int) -> list[tuple[str, float]]:
        """The ``n`` directions with the largest |cos| to a normal ``[d]``, with their cosines."""
        cosines = self.cosines(normal[None])[0]
        best = cosines.abs().argsort(descending=True, stable=True)[:n].tolist()
        return list(zip(self.label(best), cosines[best].tolist(), strict=True))

    def chance(self, seed: int = 0) -> float:
        """The largest |cos| that 95 % of random directions stay below."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(RANDOM, self.vectors.shape[1], generator=generator)
        largest = self.cosines(drawn.to(self.vectors.device)).abs().amax(1)
        return float(torch.quantile(largest.double(), SURE))


def token_directions(model: TracedModel) -> Directions:
    """What each token's logit reads of the last stream, less the mean over the vocabulary."""
    weight, _ = model.weights.unembedding(torch.float32)
    vectors = (weight - weight.mean(1, keepdim=True)).T
    return Directions("unembedding", vectors, lambda chosen: model.token_texts(list(chosen)))


def _of(margin: Margin, which: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: margin(logits, which)


def _located(
    regions: Regions,
    evaluate: Evaluate,
    rows: Tensor,
    ends: tuple[Tensor, Tensor],
    before: Tensor,
    after: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The crossings, each where a straight line between its two sides has margin 0."""
    low, high = ends
    under, over = (regions.margin(evaluate(rows, at), before, after).double() for at in ends)
    part = torch.where(over > under, -under / (over - under), 0.5).clamp(0, 1)
    return rows, low + part * (high - low), before, after, high - low
