"""Sensitivity: how far along a direction an activation moves before the model's output answers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, track
from circuitlab_activation_plateaus.pushes.directions import (
    PERPENDICULAR,
    centres,
    directions,
    stream_activations,
)
from circuitlab_activation_plateaus.pushes.families import Pool
from circuitlab_activation_plateaus.pushes.panels import tell_sensitivities
from circuitlab_activation_plateaus.walks.paths import ray
from circuitlab_activation_plateaus.walks.walking import clean, walk

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Dictionary, Site, Task, Tokens, TracedModel
    from circuitlab_activation_plateaus.walks.pairs import Bank

#: Rounds in which the interval that holds the crossing is cut into quarters.
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How the output answers a family of directions from one kind of centre.

    Attributes:
        family: Name of the family.
        centre: Kind of the centres.
        alphas: Lengths, ``[n_steps]`` from 0, in units of the activations' mean norm.
        kl: KL(P at the centre || P at the length) in nats, ``[n_rows, n_steps]``, float64.
        crossing: Shortest length at which KL reaches the threshold, ``[n_rows]``, float64;
            infinite where it is beyond the longest.
        cosine: Of direction and centre, ``[n_rows]``; -1 only shrinks the centre.
        base: The centres, ``[n_rows, d]``.
        directions: Of length 1, ``[n_rows, d]``.
    """

    family: str
    centre: str
    alphas: Tensor
    kl: Tensor
    crossing: Tensor
    cosine: Tensor
    base: Tensor
    directions: Tensor

    @property
    def area(self) -> Tensor:
        """Mean KL over the lengths in nats, ``[n_rows]``: the area under the curve / its width."""
        return torch.trapezoid(self.kl, self.alphas) / self.alphas[-1]

    @property
    def median(self) -> float:
        """Median of ``crossing``; infinite where fewer than half of the rows cross."""
        ordered = self.crossing.sort().values.tolist()
        n = len(ordered)
        return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)


def sensitivities(
    model: TracedModel,
    tokens: Tokens,
    pool: Pool,
    *,
    families: Sequence[str],
    centers: Sequence[str] = ("real",),
    threshold: float = 0.1,
    reach: float = 3.0,
    steps: int = 31,
    position: int = -1,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[Sensitivity]:
    """Push the activation at a site along directions until the output answers.

    Row i runs in the context of prompt i; the activation at ``position`` is its centre plus alpha
    times a direction whose length is the activations' mean norm, the same for all families and
    centres. The output is compared with that at the centre itself. Where KL first reaches the
    threshold on the grid, the interval is cut three times into quarters; a crossing and return
    between two steps of the grid is not seen.

    A family draws the same numbers whichever others are asked for, and with ``-perp``.

    Args:
        model: Any traced model.
        tokens: ``n_rows`` prompts.
        pool: What directions and centres are drawn from, and the site.
        families: Names; see :func:`directions`.
        centers: Kinds; see :func:`centres`.
        threshold: KL in nats.
        reach: Longest alpha.
        steps: Points of the grid, both ends included.
        position: Where in the prompt, negative from the end.
        seed: Of all draws.
        batch_size: Steps per pass; chosen where None.

    Returns:
        One for each centre and family, in the order given.

    Raises:
        OptionError: an option is out of range, a name is unknown, or what it needs is missing.
        SiteError: the dictionary belongs to another site.
        NumericsError: logits are not finite.
    """
    if not (threshold > 0 and reach > 0):
        raise OptionError(
            f"threshold {threshold:g} and reach {reach:g} of directions: both must be above 0"
        )
    if steps < 2:
        raise OptionError(f"{steps} steps of directions make no curve; give 2 or more")
    if not families or not centers:
        raise OptionError("there is no family or no centre of directions; name one of each")
    real = clean(model, tokens, [pool.site], position)[pool.site].to(pool.activations)
    alphas = torch.linspace(0, reach, steps, dtype=torch.float64)
    # All is drawn before anything is measured, so that what cannot be drawn is refused at once.
    jobs = []
    for centre in centers:
        base = centres(centre, pool, real, _generator(seed, centre))
        for family in families:
            generator = _generator(seed, family.removesuffix(PERPENDICULAR))
            jobs.append((centre, family, base, directions(family, pool, base, generator)))
    found = []
    for centre, family, base, drawn in track(jobs, "directions"):
        rays = _Rays(model, tokens, pool, base, drawn, position, batch_size)
        kl = rays.kl(alphas.expand(len(base), -1))
        kl[:, 0] = 0  # The centre itself: what is measured is rounding.
        crossing = rays.crossing(alphas, kl, threshold)
        cosine = torch.cosine_similarity(drawn, base, dim=-1).double().cpu()
        found.append(Sensitivity(family, centre, alphas, kl, crossing, cosine, base, drawn))
    return found


class _Rays:
    """Rays from centres along directions, and how the output answers on them."""

    def __init__(
        self,
        model: TracedModel,
        tokens: Tokens,
        pool: Pool,
        base: Tensor,
        drawn: Tensor,
        position: int,
        batch_size: int | None,
    ) -> None:
        self.model, self.tokens, self.site = model, tokens, pool.site
        self.base, self.step = base, pool.unit * drawn
        self.position, self.batch_size = position, batch_size
        start = walk(
            model, tokens, self.site, base[:, None], position=position, batch_size=batch_size
        )
        self.start = start.logits[:, 0].double().log_softmax(-1)

    def kl(self, alphas: Tensor, rows: Tensor | None = None) -> Tensor:
        """KL(P at the centre || P) ``[n_rows, n]`` at the lengths ``[n_rows, n]`` of some rows."""
        chosen = torch.arange(len(self.base)) if rows is None else rows
        chosen = chosen.to(self.base.device)

        def divergence(logits: Tensor, row: Tensor) -> Tensor:
            start = self.start[chosen[row.to(chosen.device)]]
            apart = start - logits.double().log_softmax(-1)
            return (start.exp() * apart).sum(-1, keepdim=True).clamp(min=0)

        walks = walk(
            self.model,
            self.tokens.rows(chosen),
            self.site,
            ray(self.base[chosen], self.step[chosen], alphas.to(self.base.device)),
            t=alphas,
            position=self.position,
            batch_size=self.batch_size,
            reduce=divergence,
        )
        return walks.logits[..., 0].double().cpu()

    def crossing(self, alphas: Tensor, kl: Tensor, threshold: float) -> Tensor:
        """Where KL ``[n_rows, n_steps]`` first reaches the threshold; infinite where nowhere."""
        above = kl >= threshold
        result = torch.full((len(kl),), torch.inf, dtype=torch.float64)
        rows = above.any(-1).nonzero()[:, 0]
        if not len(rows):
            return result
        step = above[rows].int().argmax(-1)
        low, high = alphas[step - 1], alphas[step]
        below, over = kl[rows, step - 1], kl[rows, step]
        quarters = torch.arange(5, dtype=torch.float64) / 4
        for _ in range(_ROUNDS):
            places = low[:, None] + (high - low)[:, None] * quarters
            middle = self.kl(places[:, 1:-1], rows)
            values = torch.cat([below[:, None], middle, over[:, None]], 1)
            step = (values >= threshold).int().argmax(-1)
            line = torch.arange(len(rows))
            low, high = places[line, step - 1], places[line, step]
            below, over = values[line, step - 1], values[line, step]
        result[rows] = low + (high - low) * (threshold - below) / (over - below)
        return result


def add_directions(
    circuit: CircuitGraph,
    model: TracedModel,
    bank: Bank,
    site: Site,
    *,
    families: str = "iso,cov-mixture,real-mixture,towards-real",
    centers: str = "real,gaussian",
    task: Task | None = None,
    dictionary: Dictionary | None = None,
    activations: Tensor | None = None,
    threshold: float = 0.1,
    reach: float = 3.0,
    steps: int = 31,
    position: int = -1,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[Sensitivity]:
    """Measure direction families from centres in the contexts of ``bank.a``, and tell in a circuit.

    Puts into the circuit: ``graph["directions"]`` (plain JSON), a finding for each kind of centre
    and one on how it compares with real ones (a plateau is around real activations where others
    answer sooner), a :class:`circuitlab.Curves` panel for each kind of centre, and one
    :class:`circuitlab.TextTable`. A median or an end of its interval that lies beyond ``reach`` is
    not measured: it is left out of the data and written as ``> reach``.

    Args:
        circuit: What is added to.
        model: Any traced model.
        bank: Pairs; walks run in the context of ``bank.a``.
        site: A whole site as wide as the stream, without a position.
        families: Names separated by commas; see :func:`directions`.
        centers: Kinds separated by commas; see :func:`centres`.
        task: For ``mean-difference``.
        dictionary: An autoencoder of the site, for ``dictionary`` and ``dictionary-error``, and for
            centres of its latents.
        activations: Real ones to draw from, ``[n, d]``; those of all positions of the bank's
            prompts but the first where None.
        threshold: KL in nats.
        reach: Longest alpha, in units of the activations' mean norm.
        steps: Points of the grid.
        position: Where in the prompt, negative from the end.
        seed: Of draws and intervals.
        batch_size: Steps per pass; chosen where None.

    Raises:
        OptionError: an option is out of range, a name is unknown, or what it needs is missing.
        SiteError: the dictionary belongs to another site.
        NumericsError: logits are not finite.
    """
    if activations is None:
        activations = stream_activations(model, [bank.a, bank.b], site)
    pool = Pool(model, site, activations, dictionary, task)
    found = sensitivities(
        model,
        bank.a,
        pool,
        families=_names(families),
        centers=_names(centers),
        threshold=threshold,
        reach=reach,
        steps=steps,
        position=position,
        seed=seed,
        batch_size=batch_size,
    )
    tell_sensitivities(circuit, found, pool, threshold, seed)
    return found


def _names(text: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each name, so that draws do not depend on what else is drawn."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
