"""DictionaryStats: how well a dictionary reconstructs, and how often its latents are active."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from circuitlab.errors import NumericsError, OptionError, SiteError

#: Positions at which a bucket begins, after 0.
_EDGES = [1 << power for power in range(31)]


def tokens_needed(density: float, delta: float = 0.01) -> int:
    """Tokens after which silence is evidence: fewer than ``delta`` of active latents are missed.

    A latent that is active with probability ``density`` at a token is silent at ``n`` of them with
    probability ``(1 - density) ** n``. At 0.0001 and 0.01 this takes 46,050 tokens.

    Raises:
        OptionError: ``density`` or ``delta`` is not between 0 and 1.
    """
    for name, value in (("density", density), ("delta", delta)):
        if not 0 < value < 1:
            raise OptionError(f"{name} is {value}; give a number between 0 and 1")
    return math.ceil(math.log(delta) / math.log1p(-density))


@dataclass
class _Sums:
    """Sums over tokens, float64."""

    tokens: int
    mean: Tensor  # of the targets, [d_out]
    spread: float  # squared distances of the targets from their mean
    missed: float  # squared errors of the reconstruction
    bias: Tensor  # errors of the reconstruction, [d_out]
    active: int
    fired: Tensor  # tokens at which each latent is active, [n]
    eps: float  # coarseness of the targets' type

    @classmethod
    def of(cls, target: Tensor, reconstruction: Tensor, fired: Tensor) -> _Sums:
        """Sums of some tokens, ``[tokens, d_out]``."""
        values = target.double()
        mean = values.mean(0)
        error = reconstruction.double() - values
        return cls(
            len(values),
            mean,
            float((values - mean).square().sum()),
            float(error.square().sum()),
            error.sum(0),
            int(fired.sum()),
            fired,
            torch.finfo(target.dtype).eps,
        )

    def __add__(self, other: _Sums) -> _Sums:
        """Both together; the spread is about the common mean, whatever the offset."""
        tokens, apart = self.tokens + other.tokens, other.mean - self.mean
        between = float(apart.square().sum()) * self.tokens * other.tokens / tokens
        return _Sums(
            tokens,
            self.mean + apart * (other.tokens / tokens),
            self.spread + other.spread + between,
            self.missed + other.missed,
            self.bias + other.bias,
            self.active + other.active,
            self.fired + other.fired,
            max(self.eps, other.eps),
        )

    def summary(self, density: float, delta: float) -> dict[str, Any]:
        needed = tokens_needed(density, delta)
        known = self.tokens >= needed
        found: dict[str, Any] = {"tokens": self.tokens}
        size = self.spread + self.tokens * float(self.mean.square().sum())
        # Where all targets are the same up to rounding, there is nothing to explain.
        if self.spread > (4 * self.eps) ** 2 * size:
            found["r2"] = 1 - self.missed / self.spread
            found["bias"] = float(self.bias.square().sum()) / self.tokens / self.spread
        found["l0"] = self.active / self.tokens
        found["dead"] = {
            "share": float((self.fired == 0).double().mean()) if known else "unknown",
            "density": density,
            "delta": delta,
            "tokens_needed": needed,
        }
        return found


class DictionaryStats:
    """Sums over batches of what a dictionary gives, and what follows from them.

    Each number is that of all tokens at once, however they were split into batches, in all and by
    position: 0, 1, 2 to 3, 4 to 7, and so on.

    Args:
        n: Number of latents.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._buckets: dict[int, _Sums] = {}

    def add(
        self,
        target: Tensor,
        z: Tensor | tuple[Tensor, Tensor],
        reconstruction: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            target: What was to be reconstructed, ``[batch, pos, d_out]``; of an autoencoder, what
                it read.
            z: Latents, ``[batch, pos, n]``, or what :meth:`Dictionary.active` gives.
            reconstruction: ``[batch, pos, d_out]``.
            positions: Position of each token in its prompt, ``[batch, pos]``; left out, they are
                counted from each prompt's first real token.
            mask: ``[batch, pos]``, True where a token is real; left out, all are.

        Raises:
            SiteError: shapes that do not fit together.
            NumericsError: a value is not finite.
        """
        shape = target.shape[:2]
        active = (z[1] if isinstance(z, tuple) else z) != 0
        real = torch.ones(shape, dtype=torch.bool) if mask is None else mask
        places = real.long().cumsum(1) - 1 if positions is None else positions
        wanted = [target.shape == reconstruction.shape, target.ndim == 3]
        wanted += [tensor.shape[:2] == shape for tensor in (active, real, places)]
        wanted.append(isinstance(z, tuple) or z.shape[-1] == self.n)
        if not all(wanted):
            raise SiteError(
                f"targets {list(target.shape)}, latents {list(active.shape)} and reconstructions "
                f"{list(reconstruction.shape)} do not fit; give [batch, pos, ...], {self.n} latents"
            )
        real, places = real.to(target.device), places.to(target.device)
        edges = torch.tensor(_EDGES, device=target.device)
        buckets = torch.bucketize(places, edges, right=True).where(real, -1)
        for bucket in sorted(set(buckets[real].tolist())):
            here = buckets == bucket
            if isinstance(z, tuple):
                fired = torch.bincount(z[0][here][active[here]], minlength=self.n)
            else:
                fired = active[here].sum(0)
            found = _Sums.of(target[here].detach(), reconstruction[here].detach(), fired)
            if not math.isfinite(found.spread + found.missed):
                raise NumericsError(
                    "targets or reconstructions of the dictionary hold NaN or infinity; check the "
                    "model's activations, or run it in a wider type (--dtype float32)"
                )
            earlier = self._buckets.get(bucket)
            self._buckets[bucket] = found if earlier is None else earlier + found

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return sum(sums.tokens for sums in self._buckets.values())

    @property
    def densities(self) -> Tensor:
        """Share of tokens at which each latent is active, ``[n]``, float64.

        Raises:
            OptionError: nothing was added.
        """
        return self._total().fired.double() / self.tokens

    def summary(self, *, density: float = 1e-4, delta: float = 0.01) -> dict[str, Any]:
        """What the sums say, as plain JSON values.

        Args:
            density: A latent that is active less often than this counts as dead.
            delta: Share of latents of that density that may be called dead by chance.

        Returns:
            ``tokens``; ``r2``, 1 - sum of squared errors / sum of squared distances of the targets
            from their mean: 1 is perfect, 0 no better than the mean, and a constant added to target
            and reconstruction changes nothing; ``bias``, the part of the unexplained that the
            reconstruction's mean error makes up, in the same unit; ``l0``, active latents per
            token; ``dead``, with the ``share`` of latents that were never active, ``unknown`` with
            fewer than ``tokens_needed`` tokens; ``positions``, the same by position, ``first`` to
            ``last``, about the mean of these positions. Where targets do not vary, ``r2`` and
            ``bias`` are left out.

        Raises:
            OptionError: nothing was added, or ``density`` or ``delta`` is not between 0 and 1.
        """
        total = self._total().summary(density, delta)
        total["positions"] = [
            {"first": first, "last": max(2 * first - 1, 0)} | sums.summary(density, delta)
            for bucket, sums in sorted(self._buckets.items())
            for first in [1 << bucket >> 1]
        ]
        return total

    def _total(self) -> _Sums:
        if not self._buckets:
            raise OptionError("no token was added; add a batch first")
        return reduce(_Sums.__add__, self._buckets.values())
