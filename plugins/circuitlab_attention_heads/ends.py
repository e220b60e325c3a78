"""Ends: how the embedding composes with a head, and the head with the unembedding.

The same number as for two heads (:mod:`circuitlab_attention_heads.composition`): the norm of the
product over the product of the norms, where 1 × chance is what unrelated weights have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.qk import NEGLIGIBLE, rotation
from circuitlab_attention_heads.vocabulary import embedding_rows, read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import HeadWeights, TracedModel

#: Source, target and port.
Effect: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True)
class _Writer:
    """A random vector that is written to the stream.

    Attributes:
        seen: Its second moment as a map ``[d_model, n]`` sees it, ``[n, n]``.
        size: Its mean squared norm.
    """

    seen: Callable[[Tensor], Tensor]
    size: float


@dataclass(frozen=True)
class _Reader:
    """A product of two matrices that reads the stream.

    Attributes:
        first: ``[d_model, n]``.
        gram: The second times its transpose, ``[n, n]``.
    """

    first: Tensor
    gram: Tensor

    def share(self, writer: _Writer) -> float:
        """Squared norm of the product with a writer over the product of the squared norms."""
        size = float((self.first.T @ self.first * self.gram).sum()) * writer.size
        return float((writer.seen(self.first) * self.gram).sum()) / size if size > 0 else 0.0


@torch.no_grad()
def end_compositions(
    model: TracedModel,
    head: Head,
    unembedding: Tensor,
    *,
    through: Head | None = None,
    offset: int = 0,
) -> dict[Effect, float]:
    """Compositions of ``input``, and of an earlier head, with a head, and of it with ``logits``.

    ``input`` writes a random token's embedding, less the mean over tokens, and with learned
    positions a random position's, less theirs: what all have in common tells nothing apart.

    Args:
        model: Any traced model.
        head: Layer and number.
        unembedding: Centred, see :func:`circuitlab_attention_heads.ov.centred_unembedding`.
        through: An earlier head.
        offset: Positions from the key to the query; only rotary embeddings look at it.

    Returns:
        The score × chance of each (source, target, port). Those that are 0 are left out.

    Raises:
        OptionError: no prompt is as long as the offset.
        ModelError: a norm cannot be folded.
    """
    (layer, number), name = head, head_name(head)
    folded, turn = model.weights.folded(layer, torch.float64), rotation(model, layer, offset)
    w_q, w_k, w_v, w_o = (part[number] for part in (folded.q, folded.k, folded.v, folded.o))
    turned = (w_q, w_k) if turn is None else (w_q @ turn, w_k @ turn.T)
    readers = {
        "q": _Reader(turned[0], w_k.T @ w_k),
        "k": _Reader(turned[1], w_q.T @ w_q),
        "v": _Reader(w_v, w_o @ w_o.T),
    }
    mean_off = model.weights.centres
    writers = {"input": _input(model, mean_off)}
    if through is not None:
        earlier = model.weights.folded(through[0], torch.float64)
        writers[head_name(through)] = _head(earlier, through[1])
    shares = {
        (source, name, port): reader.share(writer)
        for source, writer in writers.items()
        for port, reader in readers.items()
    }
    shares[name, "logits", ""] = _unembedded(w_v, w_o, unembedding)
    dimensions = model.d_model - mean_off
    return {
        effect: (share * dimensions) ** 0.5
        for effect, share in shares.items()
        if share > NEGLIGIBLE**2
    }


def _input(model: TracedModel, mean_off: bool) -> _Writer:
    """A random token and, where positions are learned, a random position."""
    positions = model.weights.positions(torch.float64)

    def seen(weight: Tensor) -> Tensor:
        gram = _covariance(read_tokens(model, weight))
        return gram if positions is None else gram + _covariance(positions @ weight)

    parts = [embedding_rows(model), *([] if positions is None else [[positions]])]
    return _Writer(seen, sum(_spread(rows, mean_off) for rows in parts))


def _head(heads: HeadWeights, number: int) -> _Writer:
    """What a head writes of a vector in which nothing stands out."""
    v, o = heads.v[number], heads.o[number]
    gram = v.T @ v

    def seen(weight: Tensor) -> Tensor:
        inner = o @ weight
        return inner.T @ gram @ inner

    return _Writer(seen, float((gram * (o @ o.T)).sum()))


def _unembedded(w_v: Tensor, w_o: Tensor, unembedding: Tensor) -> float:
    """The share of a head and the unembedding; all tokens by all tokens are never made."""
    written = (w_o.to(unembedding) @ unembedding).double()
    gram = w_v.T @ w_v
    size = float((gram * (w_o @ w_o.T)).sum()) * float(unembedding.norm()) ** 2
    return float((gram * (written @ written.T)).sum()) / size if size > 0 else 0.0


def _covariance(rows: Tensor) -> Tensor:
    """Of the columns of ``[n, width]``, ``[width, width]``."""
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def _spread(parts: Iterable[Tensor], mean_off: bool) -> float:
    """Mean squared distance of vectors from their mean, as a norm sees it that takes off a mean."""
    count, squares, total = 0, 0.0, torch.zeros(())
    for rows in parts:
        plain = rows - rows.mean(-1, keepdim=True) if mean_off else rows
        count, total = count + len(plain), total.to(plain) + plain.sum(0)
        squares += float(plain.square().sum())
    return squares / count - float((total / count).square().sum())
