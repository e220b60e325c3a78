"""Direction families: ways to draw a direction in which an activation is pushed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, Site, SiteError
from circuitlab_activation_plateaus.walks.walking import clean

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from circuitlab import Dictionary, Task, TracedModel

#: Principal components that ``pca`` draws from.
COMPONENTS = 10
#: Singular directions of each weight matrix that ``weight-svd`` draws from.
SINGULAR = 4
#: A vector shorter than this part of the activations is rounding, and has no direction.
NEGLIGIBLE = 1e-5
#: Draws until two activations differ.
_TRIES = 100


@dataclass(frozen=True, eq=False)
class Normal:
    """A normal distribution.

    Attributes:
        mean: ``[d]``.
        root: ``[k, d]`` with ``root.T @ root`` the covariance.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> Normal:
        """Mean and covariance of ``[n, d]``, divided by n - 1; of any rank.

        Raises:
            OptionError: there are fewer than two values.
        """
        if len(values) < 2:
            raise OptionError(
                f"{len(values)} activations have no covariance; give more prompts, or longer ones"
            )
        mean = values.mean(0)
        root = torch.linalg.qr((values - mean) / (len(values) - 1) ** 0.5, mode="r").R
        return cls(mean, root)

    def sample(self, n: int, generator: Generator, *, centred: bool = False) -> Tensor:
        """``n`` independent draws, ``[n, d]``, less the mean if ``centred``."""
        drawn = gaussian((n, len(self.root)), generator, self.root) @ self.root
        return drawn if centred else drawn + self.mean


@dataclass(frozen=True, eq=False)
class Pool:
    """What directions and centres are drawn from.

    Attributes:
        model: Whose weights ``weight-svd`` reads.
        site: Where the activations stand and directions are added.
        activations: Real ones, ``[n, d]``, at least float32.
        dictionary: An autoencoder of the site.
        task: Whose mean difference is a direction.
    """

    model: TracedModel
    site: Site
    activations: Tensor
    dictionary: Dictionary | None = None
    task: Task | None = None

    @cached_property
    def normal(self) -> Normal:
        """Of the mean and the covariance of the activations.

        Raises:
            OptionError: there are fewer than two, or all are the same.
        """
        found = Normal.fit(self.activations)
        if float(found.root.norm()) <= NEGLIGIBLE * self.unit:
            raise _same(self)
        return found

    @cached_property
    def unit(self) -> float:
        """Mean norm of the activations, in which lengths are measured."""
        return float(self.activations.norm(dim=-1).mean())

    @cached_property
    def autoencoder(self) -> Dictionary:
        """The dictionary, checked.

        Raises:
            OptionError: there is none, or it is a transcoder.
            SiteError: it reads another site.
        """
        if self.dictionary is None:
            raise OptionError("there is no dictionary to draw from; give one (--dictionary FILE)")
        if self.dictionary.transcoder:
            raise OptionError(
                "a transcoder does not reconstruct what it reads; give an autoencoder"
            )
        reads, width = self.dictionary.info.reads, self.activations.shape[1]
        if reads is not None and _stream(reads) != _stream(self.site):
            raise SiteError(
                f"the dictionary reads {reads}, not {self.site}; give one of {self.site}, or "
                f"--site {reads}"
            )
        if self.dictionary.d_in != width:
            raise SiteError(
                f"the dictionary reads {self.dictionary.d_in} numbers, {self.site} has {width}; "
                f"it belongs to another model or site"
            )
        return self.dictionary.to(self.activations.device)

    @cached_property
    def active(self) -> tuple[Tensor, Tensor]:
        """Active latents of every activation: indices and values, ``[n, m]``; 0 is not active."""
        with torch.no_grad():
            return self.autoencoder.active(self.activations)

    @cached_property
    def alive(self) -> Tensor:
        """Latents that are active somewhere and write something, ``[n_alive]``.

        Raises:
            OptionError: there is none.
        """
        indices, values = self.active
        found: Tensor = torch.unique(indices[values > 0])
        found = found[self.autoencoder.W_d.detach()[found].norm(dim=-1) > 0]
        if not len(found):
            raise OptionError(
                "no latent of the dictionary is active on these activations; it belongs to other "
                "ones"
            )
        return found

    @cached_property
    def readers(self) -> Tensor:
        """See :func:`reader_directions`."""
        return reader_directions(self.model, self.site).to(self.activations)


#: From pool, base ``[n_rows, d]`` and generator to directions ``[n_rows, d]`` of any length.
Family = Callable[[Pool, "Tensor", "Generator"], "Tensor"]


def gaussian(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, the same ones on every device and in every type."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.to(like)


def whole(high: int, n: int, generator: Generator) -> Tensor:
    """``n`` whole numbers from 0 to ``high - 1``, on the generator's device."""
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def isotropic(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """Every direction is as likely as any other."""
    return gaussian(tuple(base.shape), generator, base)


def covariance(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """Normal, with the covariance of the activations and mean 0."""
    return pool.normal.sample(len(base), generator, centred=True)


def covariance_mixture(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """Difference of two normal activations, Lee & Heimersheim 2024 (arXiv:2410.12555).

    Directions are distributed as those of ``cov``: the mean cancels, and the difference of two
    normal vectors is normal. Other than ``target - base`` neither contains the base.
    """
    first, second = (pool.normal.sample(len(base), generator) for _ in range(2))
    return first - second


def real_mixture(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """Difference of two real activations, Lee & Heimersheim 2024 (arXiv:2410.12555)."""
    first = pool.activations[whole(len(pool.activations), len(base), generator)]
    return _other(pool, first, generator) - first


def towards_real(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """From the base to a real activation, Heimersheim & Mendel 2024.

    It contains minus the base, so a part of what it does is to shrink the base.
    """
    return _other(pool, base, generator) - base


def principal(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """One of the first :data:`COMPONENTS` principal components, with either sign."""
    _, spread, axes = torch.linalg.svd(pool.normal.root, full_matrices=False)
    axes = axes[: int((spread > NEGLIGIBLE * pool.unit).sum())][:COMPONENTS]
    return _signed(axes[whole(len(axes), len(base), generator)], generator)


def decoder_row(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """What a latent of the dictionary writes, of those active on some activation."""
    rows = pool.alive[whole(len(pool.alive), len(base), generator)]
    return pool.autoencoder.W_d.detach()[rows].to(base)


def dictionary_error(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """Reconstruction less base: the error that Gurnee 2024 calls pathological."""
    with torch.no_grad():
        drawn = -pool.autoencoder.error(base).to(base)
    return _refuse_rounding(pool, drawn, "the dictionary's error")


def mean_difference(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """Mean over the task's pairs of corrupt less clean activation, at the last position."""
    if pool.task is None:
        raise OptionError("family 'mean-difference' needs a task; give one, or leave it out")
    pairs = pool.model.encode(pool.task)
    less, more = (
        clean(pool.model, tokens, [pool.site])[pool.site].to(base).mean(0)
        for tokens in (pairs.clean, pairs.corrupt)
    )
    drawn = (more - less).expand(len(base), -1)
    return _refuse_rounding(pool, drawn, "the task's mean difference")


def weight_svd(pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """A singular direction of a weight matrix that reads the site next, with either sign."""
    return _signed(pool.readers[whole(len(pool.readers), len(base), generator)], generator)


FAMILIES: Mapping[str, Family] = {
    "iso": isotropic,
    "cov": covariance,
    "cov-mixture": covariance_mixture,
    "real-mixture": real_mixture,
    "towards-real": towards_real,
    "pca": principal,
    "dictionary": decoder_row,
    "dictionary-error": dictionary_error,
    "mean-difference": mean_difference,
    "weight-svd": weight_svd,
}


@torch.no_grad()
def reader_directions(model: TracedModel, site: Site, n: int = SINGULAR) -> Tensor:
    """Unit directions of the stream to which what reads it next responds most.

    The first ``n`` singular directions, norms folded in: of each head's QK circuit on the query's
    side (left) and on the key's (right), of each head's OV circuit on the side that it reads
    (left), and of the MLP's input and gate weights (left). Behind the last block: of the
    unembedding.

    Args:
        model: Any traced model.
        site: A whole residual stream, or what attention or MLP write to it.
        n: Directions of each matrix; those with singular values of 0 are left out.

    Returns:
        ``[n_directions, d_model]``, float64.

    Raises:
        OptionError: the site is not in the residual stream, or nothing reads it.
        SiteError: the MLP's maps are not known.
    """
    layer, middle = _next(model, site)
    found: list[Tensor] = []
    if layer == model.n_layers:
        found.append(_left(model.weights.unembedding(torch.float64)[0], n))
    else:
        if not middle:
            head = model.weights.folded(layer, torch.float64)
            found.append(_left_of_product(head.q, head.k.mT, n))
            found.append(_left_of_product(head.k, head.q.mT, n))
            found.append(_left_of_product(head.v, head.o, n))
        if not model.wiring.parallel or not middle:
            mlp = model.weights.mlp(layer, torch.float64)
            found += [_left(weight, n) for weight in (mlp.w_in, mlp.gate) if weight is not None]
    directions = torch.cat(found)
    if not len(directions):
        raise OptionError(f"nothing reads {site}: all weights are 0; leave out 'weight-svd'")
    return directions


def _next(model: TracedModel, site: Site) -> tuple[int, bool]:
    """Layer that reads a site next, and whether only its MLP does."""
    kind = _stream(site)
    if kind.kind in ("resid_mid", "attn_out") and kind.layer is not None:
        return (kind.layer + model.wiring.parallel, not model.wiring.parallel)
    if kind.kind == "embed":
        return 0, False
    if kind.kind == "mlp_out" and kind.layer is not None:
        return kind.layer + 1, False
    if kind.kind == "resid_pre" and kind.layer is not None:
        return kind.layer, False
    raise OptionError(
        f"family 'weight-svd' has no readers of {site}; give a site of the residual stream, such "
        f"as resid_pre.1"
    )


def _stream(site: Site) -> Site:
    """The same site, with the stream after a block named as the next one reads it."""
    if site.kind == "resid_post" and site.layer is not None:
        return Site("resid_pre", site.layer + 1)
    return site


def _left(weight: Tensor, n: int) -> Tensor:
    """First left singular directions ``[<= n, d]`` of ``[d, width]``."""
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    kept: Tensor = values.flip(0)[:n] > NEGLIGIBLE**2 * values.max()
    directions: Tensor = vectors.T.flip(0)[:n][kept]
    return directions


def _left_of_product(a: Tensor, b: Tensor, n: int) -> Tensor:
    """First left singular directions of ``a @ b`` of each head, ``[heads, d, k]``, ``[.., k, d]``.

    Two triangular factors of ``k`` rows have the singular values of the product.
    """
    outer, left = torch.linalg.qr(a)
    right = torch.linalg.qr(b.mT, mode="r").R
    inner, values, _ = torch.linalg.svd(left @ right.mT)
    directions: Tensor = (outer @ inner).mT[:, :n]
    return directions[values[:, :n] > NEGLIGIBLE * values.max()]


def _other(pool: Pool, given: Tensor, generator: Generator) -> Tensor:
    """For each row a real activation that is not the given one, ``[n_rows, d]``."""
    drawn = pool.activations[whole(len(pool.activations), len(given), generator)].to(given)
    for _ in range(_TRIES):
        equal = (drawn - given).norm(dim=-1) <= NEGLIGIBLE * pool.unit
        if not bool(equal.any()):
            return drawn
        again = whole(len(pool.activations), int(equal.sum()), generator)
        drawn[equal] = pool.activations[again].to(given)
    raise _same(pool)


def _refuse_rounding(pool: Pool, drawn: Tensor, what: str) -> Tensor:
    short = drawn.norm(dim=-1) <= NEGLIGIBLE * pool.unit
    if bool(short.any()):
        raise OptionError(
            f"{what} is 0 at {pool.site} in {int(short.sum())} of {len(short)} rows and has no "
            f"direction; leave the family out"
        )
    return drawn


def _signed(rows: Tensor, generator: Generator) -> Tensor:
    """Each row with a random sign."""
    return rows * (2 * whole(2, len(rows), generator) - 1).to(rows)[:, None]


def _same(pool: Pool) -> OptionError:
    return OptionError(
        f"the {len(pool.activations)} activations at {pool.site} are too much alike to tell "
        f"directions apart; give other prompts, or a later site"
    )
