"""Sparsity: how few interactions there are across a pair of sites, at a token and in all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab_feature_interactions.edges import SparseSums
from circuitlab_feature_interactions.intervals import draw_groups, group_prompts, interval_of

if TYPE_CHECKING:
    from circuitlab_feature_interactions.attributions import Attributions

#: An attribution counts as an edge from this share of the target latent's mean on.
TAU = 0.05
#: Edges whose share of the mass is told, and the share of the mass whose edges are counted.
TOP, HELD = 100, 0.9
#: Numbers that are made at a time.
_ROOM = 1 << 22
#: What is told without an interval: it grows with the number of prompts.
_COUNTED = ("edges",)


class Sparsity:
    """Sums over batches of a pair's attributions, as shares of the target latent's mean.

    For a block it is the computed part; of what the residual stream carries there is only the
    share.

    Args:
        n_source: Latents of the source dictionary.
        n_target: Latents of the target dictionary.
        scale: Mean of each target latent where it is active, ``[n_target]``; 0 where never.
        n_prompts: How many prompts there are in all.
        shuffled: Generator for a null: at each token the source latents change places at random
            among all of the dictionary's, so that sizes stay and the choice of pairs is chance.
    """

    #: tokens, edges, mass of latents, mass of latents and error, mass that the stream carries
    _WIDTH = 5

    def __init__(
        self,
        n_source: int,
        n_target: int,
        scale: Tensor,
        n_prompts: int,
        shuffled: torch.Generator | None = None,
    ) -> None:
        self.n_source, self.n_target = n_source, n_target
        self._scale, self._shuffled = torch.where(scale > 0, scale, torch.inf), shuffled
        self._pairs = SparseSums(1)
        self._groups, self._prompts = group_prompts(n_prompts), 0
        self._sums = torch.zeros(int(self._groups.max()) + 1, self._WIDTH, dtype=torch.float64)
        self._carries = False

    def add(self, found: Attributions, mask: Tensor) -> None:
        """Add the attributions ``[n, k_out, m]`` of a batch, without a sample.

        Args:
            found: They hold the error as a source.
            mask: True at the batch's real tokens, ``[batch, pos]``.
        """
        scale = self._scale.to(found.values.device, found.values.dtype)[found.target_index]
        sizes = (found.values.detach() / scale[..., None]).abs()
        source = found.source_index[:, None].expand_as(sizes)
        latent = source < self.n_source
        groups = self._groups[self._prompts + (found.token // mask.shape[1]).cpu()]
        self._prompts += len(mask)
        parts = [torch.ones_like(sizes), (sizes > TAU) & latent, sizes * latent, sizes]
        columns = [part.double().sum((1, 2)) for part in parts]
        columns[0] = torch.ones_like(columns[0])
        carried = torch.zeros_like(columns[0])
        if found.skip is not None:
            self._carries = True
            carried = (found.skip.detach() / scale[..., None]).abs().double().sum((1, 2))
        self._sums.index_add_(0, groups, torch.stack([*columns, carried], 1).cpu())
        if self._shuffled is not None:
            order = torch.rand(len(sizes), self.n_source, generator=self._shuffled).argsort(1)
            order = order.to(source.device)
            moved = order.gather(1, found.source_index.clamp(max=self.n_source - 1))
            source = moved[:, None].expand_as(sizes)
        keys = groups.to(source.device)[:, None, None] * self.n_target
        keys = (keys + found.target_index[..., None]) * self.n_source + source
        there = latent & (sizes > 0)
        self._pairs.add(keys[there], sizes[there][:, None])

    def numbers(self, weights: Tensor) -> dict[str, Tensor]:
        """How sparse the interactions are when groups of prompts count so often.

        Args:
            weights: ``[resamples, n_groups]``, float64.

        Returns:
            Of each name ``[resamples]``, float64. ``edges_per_token``, attributions above
            :data:`TAU` at a token; ``edges``, pairs of latents whose mean over tokens is above
            ``TAU`` over the number of tokens; ``edges_90``, the strongest that hold 90 % of the
            mass; ``top_share``, of the mass, what the 100 strongest hold; ``gini`` and ``hoyer`` of
            the pairs' means, over all pairs of latents, also those that never meet: 0 if all are
            the same, near 1 if few hold all; ``error_share``, of the mass, what comes from the
            source dictionary's error; ``skip_share``, for a block, of the mass of the computed and
            the carried part together, error in it, the carried. What has nothing to divide by is
            left out.
        """
        tokens, edges, latents, whole, carried = (weights @ self._sums).unbind(1)
        found = {"edges_per_token": edges / tokens} | self._pair_numbers(weights)
        if bool((whole > 0).all()):
            found["error_share"] = 1 - latents / whole
        if self._carries and bool((whole + carried > 0).all()):
            found["skip_share"] = carried / (whole + carried)
        return found

    def summary(self) -> dict[str, Any]:
        """``tokens`` and each of :meth:`numbers` on all prompts, plain JSON; with ``_interval``.

        Intervals are over prompts, 95 %; ``edges`` has none, as it grows with their number.
        """
        found: dict[str, Any] = {"tokens": int(self._sums[:, 0].sum())}
        for name, values in self.numbers(draw_groups(len(self._sums))).items():
            found[name] = int(values[0]) if name in ("edges", "edges_90") else float(values[0])
            if name not in _COUNTED and len(self._sums) > 1:
                ends = interval_of(values)
                found |= {} if ends is None else {f"{name}_interval": list(ends)}
        return found

    def _pair_numbers(self, weights: Tensor) -> dict[str, Tensor]:
        """Of :meth:`numbers` those that are of pairs of latents."""
        n_pairs = self.n_source * self.n_target
        groups, pairs = self._pairs.keys // n_pairs, self._pairs.keys % n_pairs
        seen, place = torch.unique(pairs, return_inverse=True)
        shape = (max(1, len(seen)), len(self._sums))
        masses = torch.sparse_coo_tensor(
            torch.stack([place, groups]), self._pairs.sums[:, 0], shape, check_invariants=True
        ).coalesce()
        parts: list[dict[str, Tensor]] = []
        for some in torch.split(weights, max(1, _ROOM // shape[0])):
            falling = torch.sparse.mm(masses, some.T).sort(0, descending=True).values
            total, held = falling.sum(0), falling.cumsum(0)
            part = {
                "edges": (falling > TAU).sum(0).double(),
                "edges_90": ((held < (HELD - 1e-12) * total).sum(0) + 1.0) * (total > 0),
            }
            if bool((total > 0).all()) and n_pairs > 1:
                part["top_share"] = held[min(TOP, len(held)) - 1] / total
                part["gini"] = _gini(falling.flip(0), n_pairs)
                part["hoyer"] = _hoyer(falling, n_pairs)
            parts.append(part)
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}


def gini(sizes: Tensor, n: int) -> float:
    """Gini's coefficient of ``n`` numbers: ``sizes``, none negative, and zeros.

    0 if all are the same, ``1 - 1/n`` if one is not 0 (Hurley & Rickard 2009, arXiv:0811.4706).
    """
    return float(_gini(sizes.double().sort().values, n))


def hoyer(sizes: Tensor, n: int) -> float:
    """Hoyer's sparseness of ``n`` numbers, ``sizes`` and zeros: 0 if all are alike, 1 if one is.

    ``(sqrt(n) - L1/L2) / (sqrt(n) - 1)``, Hoyer 2004 (JMLR 5).
    """
    return float(_hoyer(sizes.double(), n))


def mean_where_active(total: Tensor, densities: Tensor, tokens: int) -> Tensor:
    """Mean of each latent where it is active, ``[n]``, float64; 0 where it never was."""
    counts = (densities * tokens).round()
    return torch.where(counts > 0, total / counts.clamp(min=1), 0.0)


def _gini(rising: Tensor, n: int) -> Tensor:
    """Along the first dimension."""
    ranks = torch.arange(n - len(rising) + 1, n + 1, dtype=torch.float64, device=rising.device)
    return 2 * (ranks @ rising) / (n * rising.sum(0)) - (n + 1) / n


def _hoyer(sizes: Tensor, n: int) -> Tensor:
    """Along the first dimension."""
    ratio = sizes.abs().sum(0) / sizes.norm(dim=0)
    found: Tensor = (math.sqrt(n) - ratio) / (math.sqrt(n) - 1)
    return found
