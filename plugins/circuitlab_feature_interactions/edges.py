"""Edge statistics: what latents of one site do to those of the next, over a data set.

Of the very many pairs of latents only those that are ever active together are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Contributions that vary less than this part of their size are all the same.
_FLAT = 1e-9


class SparseSums:
    """Sums by key, for the few keys that occur out of very many.

    Args:
        width: Numbers that are summed for each key.

    Attributes:
        keys: ``[m]``, rising, int64.
        sums: ``[m, width]``, float64.
    """

    def __init__(self, width: int) -> None:
        self.keys = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, width, dtype=torch.float64)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add ``values`` ``[n, width]`` to those of ``keys`` ``[n]``, which may repeat."""
        keys, values = total_by(keys, values)
        keys, values = keys.to(self.keys.device), values.to(self.keys.device)
        self.keys, self.sums = total_by(
            torch.cat([self.keys, keys]), torch.cat([self.sums, values])
        )

    def __len__(self) -> int:
        return len(self.keys)


def total_by(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Each key once, rising, ``[m]``, and the sum of its values, ``[m, width]``, float64."""
    unique, where = torch.unique(keys, return_inverse=True)
    sums = values.new_zeros(len(unique), values.shape[1], dtype=torch.float64)
    return unique, sums.index_add_(0, where, values.double())


@dataclass(frozen=True)
class Events:
    """Attributions of a batch, one entry for each source latent that acts on a target latent.

    Attributes:
        token: Number of the target's token in the batch, ``[m]``.
        target: Latent, ``[m]``.
        source: Latent, or the number of latents for the error, ``[m]``.
        value: Attribution ``J_ij z_j``, in the target latent's unit, ``[m]``; positive: the source
            raises the target.
        z_source: What the source latent is at its own token, ``[m]``.
        offset: Tokens from the source back from the target, ``[m]``.
    """

    token: Tensor
    target: Tensor
    source: Tensor
    value: Tensor
    z_source: Tensor
    offset: Tensor

    def joined(self, other: Events) -> Events:
        """These and others of the same tokens."""
        names = self.__dataclass_fields__
        return Events(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in names))


@dataclass(frozen=True)
class EdgeTable:
    """Edges from one site to the next, one row each, float64 where not said else.

    Attributes:
        target: Latent, ``[m]`` int64.
        source: Latent, ``[m]`` int64; the number of source latents stands for the error.
        n: Tokens at which both are active, int64.
        mean: Mean attribution over these tokens, as a share of the target's mean when active.
        mean_absolute: Mean of its size.
        sign_consistency: Share of these tokens at which it has the sign of the mean.
        linearity: R² of the least-squares line from the source's activation to its contribution;
            NaN where one of the two does not vary.
        offset: Mean of the tokens from the source to the target, weighted by size.
        local: Of the mean, what comes through no attention; NaN where it was not told apart.
    """

    target: Tensor
    source: Tensor
    n: Tensor
    mean: Tensor
    mean_absolute: Tensor
    sign_consistency: Tensor
    linearity: Tensor
    offset: Tensor
    local: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index: Tensor) -> EdgeTable:
        """The chosen edges."""
        return EdgeTable(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def mass(self) -> Tensor:
        """Sum of the sizes of all attributions, ``[m]``."""
        return self.mean_absolute * self.n


class EdgeSums:
    """Sums of attributions from one site to the next, whatever the batches.

    What one source latent does to a target at one token is one number: contributions from several
    positions are added up first, and so is the source's activation.

    Args:
        n_source: Source latents; the error counts as one more.
        n_target: Target latents.
    """

    #: n, R, |R|, positive, negative, z, z², zR, R², and of single positions |R| and |R| offset
    _WIDTH = 11

    def __init__(self, n_source: int, n_target: int) -> None:
        self.n_source, self.n_target = n_source, n_target
        self._pairs = SparseSums(self._WIDTH)
        self.active = torch.zeros(n_target, dtype=torch.float64)
        self.total = torch.zeros(n_target, dtype=torch.float64)

    def add_targets(self, index: Tensor, values: Tensor) -> None:
        """Add what target latents were, indices and values of one shape; 0 is not active."""
        index, values = index.flatten().cpu(), values.detach().flatten().double().cpu()
        self.active.index_add_(0, index, (values != 0).double())
        self.total.index_add_(0, index, values)

    def add(self, events: Events) -> None:
        """Add the attributions of a batch."""
        n_in = self.n_source + 1
        keys = (events.token * self.n_target + events.target) * n_in + events.source
        value = events.value.detach().double()
        size, z = value.abs(), events.z_source.detach().double()
        keys, sums = total_by(keys, torch.stack([value, z, size, size * events.offset], 1))
        r, z, size, shifted = sums.unbind(1)
        columns = (
            torch.ones_like(r), r, r.abs(), (r > 0).double(), (r < 0).double(),
            z, z * z, z * r, r * r, size, shifted,
        )  # fmt: skip
        self._pairs.add(keys % (self.n_target * n_in), torch.stack(columns, 1))

    @property
    def scale(self) -> Tensor:
        """Mean of each target latent where it is active, ``[n_target]``; 1 where it never was."""
        return torch.where(self.active > 0, self.total / self.active.clamp(min=1), 1.0)

    def table(self, local: EdgeSums | None = None) -> EdgeTable:
        """The statistics of every pair that was ever active together.

        Args:
            local: Sums of that part of the same attributions which comes through no attention.
        """
        n, r, size, positive, negative, z, zz, zr, rr, single, shifted = self._pairs.sums.unbind(1)
        target = self._pairs.keys // (self.n_source + 1)
        source = self._pairs.keys % (self.n_source + 1)
        scale = self.scale[target]
        agreeing = torch.where(r > 0, positive, torch.where(r < 0, negative, n - positive))
        linearity = _r2(n, z, r, zz, zr, rr)
        linearity[source == self.n_source] = torch.nan
        return EdgeTable(
            target,
            source,
            n.long(),
            r / n / scale,
            size / n / scale,
            agreeing / n,
            linearity,
            torch.where(single > 0, shifted / single.clamp(min=1e-300), 0.0),
            torch.full_like(r, torch.nan) if local is None else self._mean_in(local, scale),
        )

    def _mean_in(self, part: EdgeSums, scale: Tensor) -> Tensor:
        """Mean of a part of these attributions, over the same tokens, ``[m]``."""
        sums = torch.zeros(len(self._pairs), dtype=torch.float64)
        place = torch.searchsorted(self._pairs.keys, part._pairs.keys)
        sums[place] = part._pairs.sums[:, 1]
        return sums / self._pairs.sums[:, 0] / scale


def _r2(n: Tensor, x: Tensor, y: Tensor, xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """R² of the least-squares line from x to y, from sums; NaN where one of them does not vary."""
    spread_x, spread_y, common = xx - x * x / n, yy - y * y / n, xy - x * y / n
    varies = (spread_x > _FLAT * xx) & (spread_y > _FLAT * yy) & (n > 2)
    below = torch.where(varies, spread_x * spread_y, 1.0)
    return torch.where(varies, (common * common / below).clamp(0, 1), torch.nan)


def mass_curve(mass: Tensor) -> Tensor:
    """Share of the whole that the strongest 1, 2, … edges hold, ``[m]``, rising to 1."""
    falling = mass.sort(descending=True).values.cumsum(0)
    return falling / falling[-1].clamp(min=1e-300) if len(falling) else falling


def edges_holding(mass: Tensor, share: float) -> int:
    """How many of the strongest edges hold this share of the mass; 0 where there is none."""
    if not len(mass) or not bool(mass.any()):
        return 0
    return int((mass_curve(mass) < share - 1e-12).sum()) + 1
