"""Margins: by how much a head prefers the key it looks at, and which components make it so.

The softmax does not see what is added to all keys of a query alike, so a raw score says little. A
margin is what it does see: the score of a key less that of the second best, or less the log-sum-exp
of all the others, which is the log-odds of the key in the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab_attention_heads.scores import ScoreParts

Against = Literal["second", "rest"]


@dataclass(frozen=True)
class Contest:
    """A margin as a weighted sum of scores: ``margin = Σ_j weights_j score_j + remainder``.

    Attributes:
        margin: ``[batch, n_heads]``, in score units.
        weights: ``[batch, n_heads, pos]``: 1 for the key, together -1 for its rivals; 0 where
            nothing is seen.
        remainder: ``[batch, n_heads]``: minus the entropy of the rivals' softmax, in nats; 0 where
            there is one rival.
    """

    margin: Tensor
    weights: Tensor
    remainder: Tensor


def contest(scores: Tensor, against: Against = "second", key: Tensor | None = None) -> Contest:
    """The margin of a key over its rivals.

    With p the softmax over the rivals and H its entropy, ``logsumexp_j s_j = Σ_j p_j s_j + H``
    exactly, so the margin over the rest is linear in the scores up to H.

    Args:
        scores: ``[batch, n_heads, pos]``, ``-inf`` where a key is not seen; two are, at least.
        against: ``second`` is the best of the other keys, ``rest`` all of them.
        key: Column of the key, ``[batch, n_heads]``; the best one if left out. The margin of
            another key is below 0.
    """
    best = scores.argmax(-1) if key is None else key
    chosen = torch.nn.functional.one_hot(best, scores.shape[-1]).bool()
    rivals = scores.masked_fill(chosen, -torch.inf)
    if against == "second":
        most = rivals.argmax(-1)
        share = torch.nn.functional.one_hot(most, scores.shape[-1]).to(scores.dtype)
        entropy = torch.zeros_like(scores[..., 0])
    else:
        share = rivals.softmax(-1)
        entropy = torch.special.entr(share).sum(-1)
    weights = chosen.to(scores.dtype) - share
    seen = scores.masked_fill(scores.isinf(), 0)
    return Contest((weights * seen).sum(-1) - entropy, weights, -entropy)


@dataclass(frozen=True)
class MarginParts:
    """A margin, less its remainder, split over the parts of the query and those of the keys.

    Attributes:
        by_query: ``[n_parts, batch, n_heads]``: what each part of the query does with whole keys.
        by_key: Same shape: what each part of the keys does with the whole query. Both sum to the
            margin less its remainder: two views of one number.
        both: ``[n_heads, n_parts, n_parts]``, the query's part, then the keys'; sum over prompts.
    """

    by_query: Tensor
    by_key: Tensor
    both: Tensor


def split_margin(parts: ScoreParts, weights: Tensor, at: Tensor) -> MarginParts:
    """Split a margin.

    What adds the same to every key, as a head's own b_K does where no rotation turns it, gives
    exactly 0: every key is taken less the query's own token's.

    Not so under a soft cap, which feels what is added to all keys. There each score r counts as
    ``m r`` with ``m = c tanh(r / c) / r`` frozen, as a norm's scale is: the parts still sum to the
    margin of the capped scores, exactly.

    Args:
        parts: The split scores.
        weights: Of :class:`Contest`.
        at: Column of each prompt's query, ``[batch]``.
    """
    rows = torch.arange(len(at), device=at.device)
    if parts.softcap:
        keys, weights = parts.keys, weights * _capped_share(parts, weights != 0)
    else:
        keys = parts.keys - parts.keys[:, rows, at][:, :, None]
    keys = torch.einsum("bhp,nbphd->nbhd", weights, keys)
    return MarginParts(
        torch.einsum("nbhd,bhd->nbh", parts.queries, keys.sum(0)),
        torch.einsum("bhd,nbhd->nbh", parts.queries.sum(0), keys),
        torch.einsum("abhd,nbhd->han", parts.queries, keys),
    )


def _capped_share(parts: ScoreParts, used: Tensor) -> Tensor:
    """What the soft cap leaves of each score, as a factor, ``[batch, n_heads, pos]``; 1 at 0."""
    scores = torch.einsum("bhd,bphd->bhp", parts.queries.sum(0), parts.keys.sum(0))
    scaled = scores.where(used, 0) / parts.softcap
    return torch.where(scaled == 0, 1, torch.tanh(scaled) / scaled.where(scaled != 0, 1))
