"""Baselines: what generic directions and clusterings explain of the same activations.

Directions are dictionaries like any other, with ``topk`` and the same number of active latents, so
that the same numbers can be had of them. Two latents of opposite sign stand for each direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from circuitlab import Dictionary, DictionaryInfo, OptionError

#: Directions in which the activations vary by less than this share of their most are left out.
_FLAT = 1e-6
_ROUNDS = 200
_SETTLED = 1e-7


def random_directions(x: Tensor, n: int, k: int, generator: torch.Generator) -> Dictionary:
    """``n`` random unit directions about the mean of ``x`` ``[tokens, d]``; ``k`` are active.

    Szegedy et al. 2013 (arXiv:1312.6199): random directions look meaningful too.

    Raises:
        OptionError: ``k`` or ``n`` is below 1.
    """
    _check(k, n)
    w = torch.randn(n, x.shape[-1], generator=generator, dtype=torch.float64)
    w = w / w.norm(dim=1, keepdim=True)
    return _dictionary(w.T, w, _mean(x), k, x)


def pca(x: Tensor, k: int) -> Dictionary:
    """The principal components of ``x`` ``[tokens, d]``; the ``k`` largest scores are active.

    With as many active as there are components the reconstruction is exact.

    Raises:
        OptionError: ``k`` is below 1, or ``x`` does not vary.
    """
    axes, _, mean = _principal(x)
    _check(k, len(axes))
    return _dictionary(*_both_signs(axes.T, axes), mean, k, x)


def ica(x: Tensor, k: int, generator: torch.Generator) -> Dictionary:
    """The independent components of ``x`` ``[tokens, d]``; the ``k`` largest are active.

    FastICA, symmetric, with tanh (Hyvärinen 1999, IEEE Trans. Neural Networks 10). There are as
    many components as dimensions that vary, not more: features in superposition, and features that
    are active at few tokens, are out of its reach.

    Raises:
        OptionError: ``k`` is below 1, or ``x`` does not vary.
    """
    axes, spread, mean = _principal(x)
    _check(k, len(axes))
    white = (x.detach().double().cpu() - mean) @ axes.T / spread
    n = len(axes)
    turned = _orthogonal(torch.randn(n, n, generator=generator, dtype=torch.float64))
    for _ in range(_ROUNDS):
        found = (white @ turned.T).tanh()
        slopes = (1 - found.square()).mean(0)
        new = _orthogonal(found.T @ white / len(white) - slopes[:, None] * turned)
        moved = 1 - (new * turned).sum(1).abs().min()
        turned = new
        if moved < _SETTLED:
            break
    read, written = (axes.T / spread) @ turned.T, turned @ (spread[:, None] * axes)
    norms = written.norm(dim=1)
    return _dictionary(*_both_signs(read * norms, written / norms[:, None]), mean, k, x)


@dataclass(frozen=True, eq=False)
class Clustering:
    """Clusters of clusters: each stage clusters what those before it leave.

    With one stage it is k-means; with k stages k clusters are active at each token, as many as
    latents of a dictionary with ``topk``.

    Attributes:
        centres: ``[stages, n, d]``, float64.
    """

    centres: Tensor

    def reconstruct(self, x: Tensor) -> Tensor:
        """Sum of the nearest centres, ``[tokens, d]``, float64, of ``x`` ``[tokens, d]``."""
        left = x.detach().double()
        for centres in self.centres.to(x.device):
            left = left - centres[torch.cdist(left, centres).argmin(1)]
        return x.detach().double() - left


def k_means(
    x: Tensor, n: int, generator: torch.Generator, *, stages: int = 1, rounds: int = 30
) -> Clustering:
    """``n`` clusters of ``x`` ``[tokens, d]`` in each stage, by Lloyd's rounds from k-means++.

    Raises:
        OptionError: there are fewer tokens than clusters, or no cluster or stage.
    """
    if not 1 <= n <= len(x) or stages < 1:
        raise OptionError(
            f"{n} clusters in {stages} stages of {len(x)} tokens cannot be made; give 1 or more of "
            f"each, and at most as many clusters as tokens"
        )
    left, found = x.detach().double().cpu(), []
    for _ in range(stages):
        centres = _spread_out(left, n, generator)
        for _ in range(rounds):
            nearest = torch.cdist(left, centres).argmin(1)
            sums = torch.zeros_like(centres).index_add(0, nearest, left)
            counts = torch.bincount(nearest, minlength=n)[:, None]
            new = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
            if torch.equal(new, centres):
                break
            centres = new
        left = left - centres[torch.cdist(left, centres).argmin(1)]
        found.append(centres)
    return Clustering(torch.stack(found))


def _spread_out(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Rows of ``x`` to begin with, each drawn by its squared distance from those before it."""
    chosen = [x[int(torch.randint(len(x), (), generator=generator))]]
    distances = (x - chosen[0]).square().sum(1)
    for _ in range(n - 1):
        weights = distances if bool((distances > 0).any()) else torch.ones_like(distances)
        chosen.append(x[int(torch.multinomial(weights, 1, generator=generator))])
        distances = torch.minimum(distances, (x - chosen[-1]).square().sum(1))
    return torch.stack(chosen)


def _principal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Axes ``[n, d]`` and their standard deviations ``[n]``, falling, and the mean; float64."""
    mean = _mean(x)
    values = x.detach().double().cpu() - mean
    variances, axes = torch.linalg.eigh(values.T @ values / len(values))
    kept = variances > _FLAT**2 * variances[-1].clamp(min=0)
    if not bool((variances[kept] > 0).any()):
        raise OptionError(
            f"{len(x)} tokens of activations do not vary; give more tokens, or another site"
        )
    return axes.T[kept].flip(0), variances[kept].sqrt().flip(0), mean


def _orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix)
    nearest: Tensor = u @ v
    return nearest


def _mean(x: Tensor) -> Tensor:
    return x.detach().double().mean(0).cpu()


def _both_signs(read: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([read, -read], 1), torch.cat([written, -written])


def _dictionary(read: Tensor, written: Tensor, mean: Tensor, k: int, x: Tensor) -> Dictionary:
    found = Dictionary(
        *(part.to(x.dtype) for part in (read, torch.zeros(read.shape[1]), written, mean)),
        apply_b_dec_to_input=True,
        k=min(k, read.shape[1]),
        info=DictionaryInfo(),
    ).to(x.device)
    return found.requires_grad_(False)


def _check(k: int, n: int) -> None:
    if k < 1 or n < 1:
        raise OptionError(f"{k} active of {n} directions cannot be; give 1 or more")
