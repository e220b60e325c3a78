"""Sparsity: how few interactions there are across a pair of sites, at a token and in all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab_feature_interactions.edges import SparseSums, edges_holding

if TYPE_CHECKING:
    from circuitlab_feature_interactions.attributions import Attributions

#: An attribution counts as an edge from this share of the target latent's mean on.
TAU = 0.05


class Sparsity:
    """Sums over batches of a pair's attributions, as shares of the target latent's mean.

    For a block it is the computed part; what the residual stream carries is left out.

    Args:
        n_source: Latents of the source dictionary.
        n_target: Latents of the target dictionary.
        scale: Mean of each target latent where it is active, ``[n_target]``; 0 where never.
        shuffled: Generator for a null: at each token the source latents change places at random
            among all of the dictionary's, so that sizes stay and the choice of pairs is chance.
    """

    def __init__(
        self, n_source: int, n_target: int, scale: Tensor, shuffled: torch.Generator | None = None
    ) -> None:
        self.n_source, self.n_target = n_source, n_target
        self._scale, self._shuffled = torch.where(scale > 0, scale, torch.inf), shuffled
        self._pairs = SparseSums(1)
        self._tokens, self._edges = 0, 0
        self._mass = torch.zeros(2, dtype=torch.float64)

    def add(self, found: Attributions) -> None:
        """Add attributions ``[n, k_out, m]`` that hold the error as a source, and no sample."""
        scale = self._scale.to(found.values.device, found.values.dtype)
        sizes = (found.values.detach() / scale[found.target_index][..., None]).abs()
        source = found.source_index[:, None].expand_as(sizes)
        latent = source < self.n_source
        self._tokens += len(sizes)
        self._edges += int(((sizes > TAU) & latent).sum())
        self._mass += torch.stack([sizes[latent].double().sum(), sizes.double().sum()]).cpu()
        if self._shuffled is not None:
            order = torch.rand(len(sizes), self.n_source, generator=self._shuffled).argsort(1)
            order = order.to(source.device)
            moved = order.gather(1, found.source_index.clamp(max=self.n_source - 1))
            source = moved[:, None].expand_as(sizes)
        keys = found.target_index[..., None] * self.n_source + source
        there = latent & (sizes > 0)
        self._pairs.add(keys[there], sizes[there][:, None])

    def summary(self) -> dict[str, Any]:
        """What the sums say, as plain JSON values.

        Returns:
            ``tokens``; ``edges_per_token``, attributions above :data:`TAU` at a token; ``edges``,
            pairs of latents whose mean over tokens is above ``TAU`` over the number of tokens;
            ``edges_90``, the strongest that hold 90 % of the mass; ``gini`` and ``hoyer`` of the
            pairs' means, over all pairs of latents, also those that never meet: 0 if all are the
            same, near 1 if few hold all; ``error_share``, of the mass, what comes from the source
            dictionary's error. Shares are left out where there is no mass.
        """
        means = self._pairs.sums[:, 0] / max(1, self._tokens)
        found: dict[str, Any] = {
            "tokens": self._tokens,
            "edges_per_token": self._edges / max(1, self._tokens),
            "edges": int((means * self._tokens > TAU).sum()),
            "edges_90": edges_holding(means, 0.9),
        }
        n_pairs = self.n_source * self.n_target
        if len(means) and n_pairs > 1:
            found |= {"gini": gini(means, n_pairs), "hoyer": hoyer(means, n_pairs)}
        if (whole := float(self._mass[1])) > 0:
            found["error_share"] = 1 - float(self._mass[0]) / whole
        return found


def gini(sizes: Tensor, n: int) -> float:
    """Gini's coefficient of ``n`` numbers: ``sizes``, none negative, and zeros.

    0 if all are the same, ``1 - 1/n`` if one is not 0 (Hurley & Rickard 2009, arXiv:0811.4706).
    """
    rising = sizes.double().sort().values
    ranks = torch.arange(n - len(rising) + 1, n + 1, dtype=torch.float64)
    return float(2 * (ranks * rising.cpu()).sum() / (n * rising.sum()) - (n + 1) / n)


def hoyer(sizes: Tensor, n: int) -> float:
    """Hoyer's sparseness of ``n`` numbers, ``sizes`` and zeros: 0 if all are alike, 1 if one is.

    ``(sqrt(n) - L1/L2) / (sqrt(n) - 1)``, Hoyer 2004 (JMLR 5).
    """
    values = sizes.double()
    ratio = float(values.abs().sum() / values.norm())
    return (math.sqrt(n) - ratio) / (math.sqrt(n) - 1)


def mean_where_active(total: Tensor, densities: Tensor, tokens: int) -> Tensor:
    """Mean of each latent where it is active, ``[n]``, float64; 0 where it never was."""
    counts = (densities * tokens).round()
    return torch.where(counts > 0, total / counts.clamp(min=1), 0.0)
