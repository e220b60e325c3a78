"""Penalties: how much latents interact, as one number to be made small.

Every penalty but ``group`` is a mean over tokens, so some of them estimate it without bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from circuitlab import OptionError
from circuitlab_feature_interactions.attributions import Attributions

Kind = Literal["l1", "l1l2", "hoyer", "log", "group", "frobenius"]
Penalty = Callable[[Attributions, Tensor], Tensor]

#: Attributions below this share of the target's mean count little for ``log``.
_SMALL = 0.3
#: Keeps gradients of roots finite where there is nothing.
_TINY = 1e-12
#: Share of the running mean of ``group`` that a step of a training leaves as it is. Of 64 tokens a
#: step, of a dictionary at rest, the value is then 5 % too small; without a running mean, 64 %.
DECAY = 0.99
#: Most pairs of latents whose running means are kept.
_MOST_PAIRS = 1 << 28


def penalty(kind: str) -> Penalty:
    """The penalty of a kind, a function of attributions and of the target latents' scale.

    With ``R`` the attributions as shares of the target latent's mean
    (:meth:`Attributions.normalised`), the mean over tokens, with i its active target latents, of:

    * ``l1``: Σ_ij |R_ij|; Farnik et al. 2025 (arXiv:2502.18147), there of the Jacobian.
    * ``log``: Σ_ij log(1 + R_ij² / ε²), ε = 0.3.
    * ``l1l2``: Σ_ij |R_ij| / √(Σ_ij R_ij²), from 1 to the root of the number of pairs. Here, and
      for ``hoyer``, ``R`` is in the target stream's unit, each row times the norm of the target's
      decoder row: a quotient gains by making rows unequal, which a scale without gradient undoes
      at the next step, without end.
    * ``hoyer``: 1 less Hoyer's sparseness (Hoyer 2004, JMLR 5), from 0, one pair, to 1, all active
      pairs alike.
    * ``frobenius``: Σ_ij J_ij², of the Jacobian itself. A control: it does not prefer few
      interactions to many, is the same for all orthogonal dictionaries, and is not invariant to
      the latents' scale.

    ``group`` is Σ_ij √(mean over tokens of |R_ij|), which wants few pairs in the whole data set,
    not at each token. Of one batch it underestimates that, the more the fewer tokens; with a
    running mean (:class:`GroupPenalty`) that becomes small.

    Sampled tokens leave all but ``group`` without bias. Sampled rows leave ``l1``, ``log`` and
    ``frobenius`` so; in ``l1l2`` and ``hoyer`` both sums are estimated without bias, their quotient
    is not.

    Returns:
        A function of attributions and ``target_scale`` ``[n_target]``, the mean of each target
        latent where it is active, which gets no gradient. It gives a scalar.

    Raises:
        OptionError: the kind is unknown.
    """
    if kind == "group":
        return GroupPenalty()
    if kind not in _TOKENS:
        raise OptionError(f"penalty {kind!r} is unknown; give {', '.join(get_args(Kind))}")
    of_tokens = _TOKENS[kind]
    return lambda attributions, target_scale: of_tokens(attributions, target_scale).mean()


def unit_of(kind: str, k: int, n: int) -> float:
    """What a penalty is divided by in training, so that one strength serves for all ``k``.

    About what it is where each active target latent has one source: ``k`` for ``l1`` and ``log``,
    √k for ``l1l2``, √(n k) for ``group``; 1 for ``hoyer``, which has no unit.

    Args:
        kind: Of :func:`penalty`.
        k: Target latents that are active at a token, or aimed at.
        n: Target latents in all.
    """
    units = {"l1": float(k), "log": float(k), "l1l2": math.sqrt(k), "group": math.sqrt(n * k)}
    return units.get(kind, 1.0)


def decay_for(n_target: int, n_source: int) -> float:
    """The decay of the running mean of ``group`` in training; 0 for too many pairs of latents."""
    return DECAY if n_target * (n_source + 1) <= _MOST_PAIRS else 0.0


class GroupPenalty:
    """Σ_ij √(mean over tokens of |R_ij|), with a running mean over batches.

    Only pairs that occur in a batch are touched. Without a running mean the root is taken of the
    batch's own mean. With one, the value and its gradient are those of the linear approximation at
    the running mean, ``√m + (|R| - m) / (2 √m)``, which is unbiased once the mean has settled; the
    mean takes a number for each pair of latents.

    Args:
        decay: Share of the running mean that a batch leaves as it is; 0 for none.

    Raises:
        OptionError: ``decay`` is not from 0 to below 1.
    """

    def __init__(self, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise OptionError(f"decay is {decay:g}; give 0, or a number below 1")
        self.decay = decay
        self._mean: Tensor | None = None
        self._weight = 0.0

    def __call__(self, attributions: Attributions, target_scale: Tensor) -> Tensor:
        """The penalty, a scalar.

        Raises:
            OptionError: a running mean of so many pairs does not fit into memory.
        """
        pairs, means = pair_means(attributions, attributions.normalised(target_scale).abs())
        if not self.decay:
            roots: Tensor = (means + _TINY).sqrt() - _TINY**0.5
            return roots.sum()
        running = self._update(attributions, pairs, means.detach())
        slope = 0.5 / (running[pairs] + _TINY).sqrt()
        # Pairs that are not in the batch have lost half their root, too.
        linear: Tensor = (means * slope).sum()
        return 0.5 * running.sqrt().sum() + linear

    def state(self) -> dict[str, Tensor]:
        """The running mean, ``[n_target * (n_source + 1)]``, and its weight; nothing at first."""
        if self._mean is None:
            return {}
        return {"mean": self._mean, "weight": torch.tensor(self._weight, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        if state:
            self._mean, self._weight = state["mean"].clone(), float(state["weight"])

    def _update(self, attributions: Attributions, pairs: Tensor, means: Tensor) -> Tensor:
        """The running mean of every pair with this batch in it, ``[n_target * n_source]``."""
        n_pairs = attributions.n_target * (attributions.n_source + 1)
        if n_pairs > _MOST_PAIRS:
            raise OptionError(
                f"a running mean of {n_pairs} pairs of latents is too large; use fewer latents, or "
                f"no running mean (decay 0)"
            )
        if self._mean is None:
            self._mean = means.new_zeros(n_pairs)
        self._mean = self._mean.to(means)
        self._mean *= self.decay
        self._mean[pairs] += (1 - self.decay) * means
        self._weight = self.decay * self._weight + 1 - self.decay
        return self._mean / self._weight


def pair_means(attributions: Attributions, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens of ``sizes`` ``[n, k_out, m]`` for each pair of latents that occurs.

    Returns:
        ``target * (n_source + 1) + source`` of each pair, rising, and its mean; the tokens at which
        a pair is not active count as 0.
    """
    keys = attributions.target_index[..., None] * (attributions.n_source + 1)
    keys = keys + attributions.source_index[:, None]
    weighted = sizes * attributions.scale[:, None, None]
    there = sizes.detach() > 0
    pairs, where = torch.unique(keys[there], return_inverse=True)
    sums = sizes.new_zeros(len(pairs)).index_add(0, where, weighted[there])
    return pairs, sums / len(sizes)


def _l1(found: Attributions, target_scale: Tensor) -> Tensor:
    return found.normalised(target_scale).abs().sum((1, 2)) * found.scale


def _log(found: Attributions, target_scale: Tensor) -> Tensor:
    shares = found.normalised(target_scale) / _SMALL
    return (1 + shares.square()).log().sum((1, 2)) * found.scale


def _frobenius(found: Attributions, _: Tensor) -> Tensor:
    z = found.z_source[:, None]
    jacobian = torch.where(z > 0, found.values / torch.where(z > 0, z, 1.0), 0.0)
    return jacobian.square().sum((1, 2)) * found.scale


def _quotient(found: Attributions) -> Tensor:
    """L1 norm over L2 norm of each token's rows, ``[n]``; 0 where there is nothing."""
    written = found.values * found.target_norm[..., None]
    rows = found.rows_stand_for
    squares = written.square().sum((1, 2)) * rows
    return written.abs().sum((1, 2)) * rows / (squares + _TINY).sqrt()


def _l1l2(found: Attributions, _: Tensor) -> Tensor:
    return _quotient(found) * found.scale / found.rows_stand_for


def _hoyer(found: Attributions, _: Tensor) -> Tensor:
    # What fills a batch up to its most active token is no latent.
    sources = (found.z_source.detach() > 0).sum(-1)
    targets = (found.z_target.detach() > 0).sum(-1) * found.rows_stand_for
    root = (sources * targets).clamp(min=2).sqrt()
    sparse = (_quotient(found) - 1) / (root - 1)
    something = (found.values.detach() != 0).any(-1).any(-1)
    return torch.where(something, sparse, 0.0) * found.scale / found.rows_stand_for


_TOKENS: dict[str, Penalty] = {
    "l1": _l1,
    "l1l2": _l1l2,
    "hoyer": _hoyer,
    "log": _log,
    "frobenius": _frobenius,
}
