"""What each published protocol measures: walks between activations, and pushes of centres."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import Curve, OptionError, Site
from circuitlab_activation_plateaus.pushes.directions import centres, directions, stream_activations
from circuitlab_activation_plateaus.pushes.families import Pool
from circuitlab_activation_plateaus.pushes.sensitivity import sensitivities
from circuitlab_activation_plateaus.walks.bundle import bands
from circuitlab_activation_plateaus.walks.medians import median_interval
from circuitlab_activation_plateaus.walks.paths import lerp, ray, slerp
from circuitlab_activation_plateaus.walks.responses import apart, d_rel, d_sym, kl, speed
from circuitlab_activation_plateaus.walks.summaries import summarise
from circuitlab_activation_plateaus.walks.walking import clean, walk

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Dictionary, Interval, TracedModel
    from circuitlab_activation_plateaus.walks.pairs import Bank
    from circuitlab_activation_plateaus.walks.walking import Walks

#: Steps of a path between two activations, as in both papers.
STEPS = 50
#: Lengths of a push, and the longest, in units of the activations' mean norm.
LENGTHS, REACH = 21, 2.0
#: KL in nats that counts as an answer.
THRESHOLD = 0.1


@dataclass(frozen=True)
class Number:
    """A summary of a protocol: median over pairs, and its 95 % interval.

    Attributes:
        name: What of: a site, a family of directions, a centre; and which number.
        value: Infinite where it lies beyond the longest push.
        interval: Its ends, infinite likewise; None for a single pair.
        n: Pairs that it is of.
    """

    name: str
    value: float
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class Measured:
    """What a protocol gave.

    Attributes:
        x: Places of the curves, ``[n_x]``.
        x_label: What x is.
        y_label: What the curves are.
        curves: Means over pairs with 95 % intervals.
        numbers: Its summaries.
        note: What could not be done as published; empty where nothing.
    """

    x: list[float]
    x_label: str
    y_label: str
    curves: list[Curve]
    numbers: list[Number]
    note: str = ""


@dataclass(frozen=True)
class Job:
    """What a protocol is run on.

    Attributes:
        model: Any traced model.
        bank: Pairs of the protocol's kind.
        site: What is replaced, for protocols that leave it open.
        dictionary: An autoencoder of the site, for those that use one.
        seed: Of draws and intervals.
        batch_size: Steps per pass; None chooses.
    """

    model: TracedModel
    bank: Bank
    site: Site
    dictionary: Dictionary | None
    seed: int
    batch_size: int | None

    @property
    def final(self) -> Site:
        """The stream that the unembedding reads."""
        return Site("resid_post", self.model.n_layers - 1)

    @property
    def first(self) -> Site:
        """The stream after the first layer."""
        one = self.model.n_layers == 1
        return self.final if one else Site("resid_pre", 1)


# --- paths between two activations ----------------------------------------------------------------


def janiak(job: Job) -> Measured:
    """Stable regions: relative distance of the final stream on a straight line."""
    if job.model.n_layers < 2:
        raise OptionError(
            "protocol 'janiak' writes after the first layer and reads after the last, and the "
            "model has one; use --protocol shinkle"
        )
    walks = _between(job, job.first, lerp, [job.final])
    rows = apart(walks.read[job.final]) & apart(walks.points)
    return _of_paths(job, walks, {"final stream": (job.final, rows)}, d_rel)


def shinkle(job: Job) -> Measured:
    """Mechanisms: symmetric distance at every site after the walked one, on the arc."""
    sites = {str(site): site for site in _later(job)}
    walks = _between(job, job.site, slerp, list(sites.values()))
    places = {
        name: (site, apart(walks.read[site]) & apart(walks.points)) for name, site in sites.items()
    }
    places["logits"] = (Site("logits"), apart(walks.logits) & apart(walks.points))
    return _of_paths(job, walks, places, d_sym)


def _later(job: Job) -> list[Site]:
    """Sites of the paper that come after the walked one and exist here."""
    kinds = ["attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post"]
    if not job.model.architecture.d_mlp:
        kinds.remove("mlp_post")
    if job.model.wiring.parallel:
        kinds.remove("resid_mid")
    layers = range(job.model.n_layers)
    return [site for layer in layers for kind in kinds if (site := Site(kind, layer)) > job.site]


def _between(
    job: Job, site: Site, path: Callable[[Tensor, Tensor, Tensor], Tensor], read: Sequence[Site]
) -> Walks:
    a, b = (clean(job.model, side, [site])[site] for side in (job.bank.a, job.bank.b))
    t = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=a.device)
    points = path(a, b, t)
    return walk(job.model, job.bank.a, site, points, t=t, read=read, batch_size=job.batch_size)


def _of_paths(
    job: Job,
    walks: Walks,
    places: Mapping[str, tuple[Site, Tensor]],
    distance: Callable[[Tensor], Tensor],
) -> Measured:
    """Curves and numbers at some sites, each of the pairs whose values differ there."""
    t, curves, numbers = walks.t[0], [], []
    for name, (site, rows) in places.items():
        if not rows.any():
            continue
        values = (walks.logits if site.kind == "logits" else walks.read[site])[rows]
        response = distance(values)
        curves.append(_curve(name, response, job.seed))
        told = summarise(t, response, speed(t, values))
        numbers.append(number(f"{name}: max slope", told.max_slope, job.seed))
        numbers.append(number(f"{name}: width, 10 to 90 %", told.width, job.seed))
    if not curves:
        raise OptionError(
            "the outputs of no pair differ; give another --site, or a task with other prompts"
        )
    moved = apart(walks.points)
    curves.append(_curve("the site itself", distance(walks.points[moved]), job.seed))
    label = "distance from A / distance of A and B" if distance is d_rel else "share of the way"
    return Measured(t.tolist(), "t, from A to B", label, curves, numbers)


# --- pushes from real and synthetic activations ---------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Push:
    """Centres pushed along directions: the final stream and KL by length, where it moves at all."""

    stream: Tensor
    divergence: Tensor


def _pool(job: Job, site: Site) -> Pool:
    found = stream_activations(job.model, [job.bank.a, job.bank.b], site)
    return Pool(job.model, site, found, job.dictionary)


def _lengths() -> Tensor:
    return torch.linspace(0, REACH, LENGTHS, dtype=torch.float64)


def _push(job: Job, pool: Pool, centre: str, family: str) -> _Push:
    generator = torch.Generator().manual_seed(job.seed)
    real = clean(job.model, job.bank.a, [pool.site])[pool.site].to(pool.activations)
    base = centres(centre, pool, real, generator)
    drawn = pool.unit * directions(family, pool, base, generator)
    lengths = _lengths().to(base.device)
    walks = walk(
        job.model,
        job.bank.a,
        pool.site,
        ray(base, drawn, lengths),
        t=lengths,
        read=[job.final],
        batch_size=job.batch_size,
    )
    stream = walks.read[job.final]
    moved = apart(stream)
    if not moved.any():
        raise OptionError(
            f"the final stream answers no push at {pool.site}; give other --pairs, or an earlier "
            f"--site"
        )
    return _Push(stream[moved], kl(walks.logits[moved]))


def _far(values: Tensor) -> Tensor:
    """Distance from the first step, ``[n_rows, n_steps]``, float64."""
    far: Tensor = (values - values[:, :1]).double().norm(dim=-1)
    return far


def heimersheim(job: Job) -> Measured:
    """Plateaus around real and around normal activations, and directions towards real ones."""
    pool = _pool(job, job.site)
    curves, numbers = [], []
    for centre, family in (("real", "iso"), ("gaussian", "iso"), ("real", "towards-real")):
        push = _push(job, pool, centre, family)
        name = f"{centre}, {family}"
        curves.append(_curve(name, push.divergence, job.seed))
        far = _far(push.stream)
        share = far[:, LENGTHS // 2] / far[:, -1]
        numbers.append(number(f"{name}: L2 half / full", share, job.seed))
        numbers.append(number(f"{name}: KL at full length", push.divergence[:, -1], job.seed))
    return _of_pushes(pool, curves, numbers, "KL from the centre's prediction, nats")


def lee(job: Job) -> Measured:
    """Families of directions that do not contain minus the base."""
    pool = _pool(job, job.site)
    families = ["iso", "cov-mixture", "real-mixture"]
    families += [] if job.dictionary is None else ["dictionary", "dictionary-error"]
    found = sensitivities(
        job.model,
        job.bank.a,
        pool,
        families=families,
        threshold=THRESHOLD,
        reach=REACH,
        steps=LENGTHS,
        seed=job.seed,
        batch_size=job.batch_size,
    )
    curves, numbers = [], []
    for each in found:
        curves.append(_curve(each.family, each.kl, job.seed))
        length = f"{each.family}: length to {THRESHOLD:g} nats"
        numbers.append(number(length, each.crossing, job.seed))
        numbers.append(number(f"{each.family}: KL at full length", each.kl[:, -1], job.seed))
    label = "KL from the untouched prediction, nats"
    return _of_pushes(pool, curves, numbers, label, _without(job, "its directions"))


def giglemiani(job: Job) -> Measured:
    """Synthetic activations: how sudden is the way from each kind of centre to a real one."""
    pool = _pool(job, job.first)
    kinds = ["real", "gaussian"]
    kinds += [] if job.dictionary is None else ["dictionary-bag", "dictionary-structured"]
    lengths, curves, numbers = _lengths(), [], []
    for kind in kinds:
        far = _far(_push(job, pool, kind, "towards-real").stream)
        curves.append(_curve(kind, far, job.seed))
        slope = far.diff(dim=-1).amax(-1) / (lengths[1] - lengths[0]).to(far)
        numbers.append(number(f"{kind}: max slope of L2", slope, job.seed))
        told = summarise(lengths, far / far[:, -1:])
        numbers.append(number(f"{kind}: flat at the centre, share", told.flat_start, job.seed))
    label = "L2 distance of the final stream"
    return _of_pushes(pool, curves, numbers, label, _without(job, "its centres"))


def _without(job: Job, what: str) -> str:
    return f"no dictionary was given: {what} are left out" if job.dictionary is None else ""


def _of_pushes(
    pool: Pool,
    curves: list[Curve],
    numbers: list[Number],
    y_label: str,
    note: str = "",
) -> Measured:
    x_label = f"length of the push at {pool.site}, in mean norms ({pool.unit:.3g})"
    return Measured(_lengths().tolist(), x_label, y_label, curves, numbers, note)


# --- numbers and curves ---------------------------------------------------------------------------


def _curve(name: str, values: Tensor, seed: int) -> Curve:
    mean, lo, hi = bands(values, seed)
    return Curve(name=name, mean=mean, lo=lo, hi=hi)


def number(name: str, values: Tensor, seed: int) -> Number:
    """Median and interval of one number per pair, ``[n_pairs]``, some of them perhaps infinite."""
    ordered, n = values.double().cpu().sort().values.tolist(), len(values)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Number(name, median, median_interval(values, seed), n)
