"""Reconstruction: what a dictionary keeps of a site's values and of the model's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import Interval, Tokens, ratio_interval
from circuitlab_feature_interactions.sparsity import mean_where_active

if TYPE_CHECKING:
    from circuitlab_feature_interactions.gathering import Activity


@dataclass(frozen=True, eq=False)
class SiteSums:
    """What was measured of one dictionary, by prompt; prompts in the order of the batches.

    Attributes:
        activity: Of its latents.
        spread: Tokens, squared errors, squares and sum about some point, ``[n_prompts, 3 + d]``.
        losses: As :func:`by_position` gives them, ``[6, n_prompts, pos]``.
    """

    activity: Activity
    spread: Tensor
    losses: Tensor

    @property
    def means(self) -> Tensor:
        """Mean of each latent where it is active, ``[n]``, float64; 0 where it never was."""
        stats = self.activity.stats
        return mean_where_active(self.activity.total, stats.densities, stats.tokens)

    def summary(self, *, per_position: bool = False) -> dict[str, Any]:
        """The :meth:`circuitlab.DictionaryStats.summary`, ``r2_interval``, and :class:`Losses`."""
        found = self.activity.stats.summary()
        positions = found.pop("positions")
        if "r2" in found and (ends := _r2_interval(self.spread)) is not None:
            found["r2_interval"] = list(ends)
        found["ce"] = Losses(*self.losses.sum(2)).summary()
        if per_position:
            for bucket in positions:
                part = self.losses[:, :, bucket["first"] : bucket["last"] + 1].sum(2)
                part = part[:, part[-1] > 0]
                if part.shape[1]:
                    bucket["ce"] = Losses(*part).summary()
            found["positions"] = positions
        return found

    def numbers(self, weights: Tensor) -> dict[str, Tensor]:
        """Reconstruction when prompts count so often, by name, each ``[resamples]``, float64.

        Args:
            weights: ``[resamples, n_prompts]``, float64.

        Returns:
            ``r2``, centred, about the mean of these prompts; ``ce`` and ``kl``, what is recovered
            of the loss and of the divergence, see :class:`Losses`, where zero in the site's place
            harms.
        """
        counts, missed, squares = (weights @ self.spread[:, :3]).unbind(1)
        moved = weights @ self.spread[:, 3:]
        found = {"r2": 1 - missed / (squares - moved.square().sum(1) / counts)}
        clean, rebuilt, kl, zero, kl_zero, _ = (weights @ self.losses.sum(2).T).unbind(1)
        for name, part, whole in (
            ("ce", zero - rebuilt, zero - clean),
            ("kl", kl_zero - kl, kl_zero),
        ):
            if bool((whole > 0).all()):
                found[name] = part / whole
        return found


@dataclass(frozen=True)
class Losses:
    """What a reconstruction in place of the site's value does to predictions, and what zero does.

    Sums over the predicted tokens of each prompt in nats, ``[n_prompts]``.

    Attributes:
        clean: Loss of the model.
        reconstructed: Loss with the reconstruction.
        kl_reconstructed: Divergence of its predictions from the model's, KL(model || changed).
        zero: Loss with zero.
        kl_zero: Divergence with zero.
        tokens: Number of predicted tokens.
    """

    clean: Tensor
    reconstructed: Tensor
    kl_reconstructed: Tensor
    zero: Tensor
    kl_zero: Tensor
    tokens: Tensor

    def summary(self) -> dict[str, Any]:
        """Means over tokens in nats, and what is recovered, with 95 % intervals over prompts.

        ``recovered``: (zero - reconstructed) / (zero - clean), left out where zero does not harm,
        as with a model that was never trained to predict these tokens; ``kl_recovered``: 1 -
        kl_reconstructed / kl_zero. Each token counts the same, whatever batch it was in.
        """
        found: dict[str, Any] = {"prompts": len(self.tokens), "tokens": int(self.tokens.sum())}
        for name in ("clean", "reconstructed", "zero", "kl_reconstructed", "kl_zero"):
            found[name] = float(getattr(self, name).sum() / self.tokens.sum())
        above, below = self.zero - self.reconstructed, self.zero - self.clean
        kept = self.kl_zero - self.kl_reconstructed
        for name, part, whole in (("", above, below), ("kl_", kept, self.kl_zero)):
            if float(whole.sum()) <= 0:
                continue
            found[f"{name}recovered"] = float(part.sum() / whole.sum())
            if (ends := ratio_interval(part, whole)) is not None:
                found[f"{name}recovered_interval"] = list(ends)
        return found


def token_losses(logits: Tensor, tokens: Tokens) -> Tensor:
    """Loss of the next token in nats, ``[batch, pos]``, float64; 0 where none is predicted."""
    losses = functional.cross_entropy(
        logits[:, :-1].double().transpose(1, 2), tokens.ids[:, 1:], reduction="none"
    )
    predicted = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    return functional.pad(losses * predicted, (0, 1))


def divergences(chances: Tensor, logits: Tensor, tokens: Tokens) -> Tensor:
    """KL divergence of ``logits`` from log-probabilities, in nats, as :func:`token_losses`."""
    found = functional.kl_div(logits.log_softmax(-1), chances, reduction="none", log_target=True)
    predicted = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    return functional.pad(found.double().sum(-1)[:, :-1] * predicted, (0, 1))


def by_position(losses: Tensor, tokens: Tokens) -> Tensor:
    """Numbers ``[m, batch, pos]``, and whether one is there, by the token's place in its prompt.

    Returns:
        ``[m + 1, batch, pos]``, float64, on the CPU: the first column is the first real token.
    """
    there = functional.pad(tokens.mask[:, 1:] & tokens.mask[:, :-1], (0, 1))
    both = torch.cat([losses, there[None].double()])
    found = torch.zeros_like(both)
    # Padding has nothing, and may add it to the first position.
    return found.scatter_add_(2, tokens.position_ids[None].expand_as(both), both).cpu()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Numbers ``[m, batch, pos]`` of several batches, one behind the other."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[2])) for part in parts], 1)


def prompt_sums(value: Tensor, written: Tensor, start: Tensor, tokens: Tokens) -> Tensor:
    """Of each prompt its tokens, errors, squares, and sum about ``start``, ``[batch, 3 + d]``."""
    mask = tokens.mask[..., None]
    moved = (value.double() - start) * mask
    missed = ((value.double() - written.double()) * mask).square().sum((1, 2))
    columns = (tokens.mask.sum(1).double(), missed, moved.square().sum((1, 2)))
    return torch.cat([torch.stack(columns, 1), moved.sum(1)], 1).cpu()


def _r2_interval(sums: Tensor) -> Interval | None:
    """Interval of centred R² over prompts; the mean of the activations is taken as known."""
    counts, missed, squares, moved = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
    mean = moved.sum(0) / counts.sum()
    spread = squares - 2 * moved @ mean + counts * mean.square().sum()
    ends = ratio_interval(missed, spread.clamp(min=0))
    return None if ends is None else (1 - ends[1], 1 - ends[0])
