"""Singular directions: what a head's OV circuit reads and writes, strongest first, as tokens.

W_OV = Σ s_k u_k v_k^T: what the stream has along u_k is written along v_k, times s_k. Read through
the embedding, u_k says for which tokens that is; through the unembedding, v_k says for which logits
(Millidge & Black 2022, "The singular value decompositions of transformer weight matrices are highly
interpretable"). The sign of a pair is arbitrary, so that both ends mean something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import norm_outliers
from circuitlab_attention_heads.head_names import Head
from circuitlab_attention_heads.vocabulary import read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel

#: Singular values nearer to one another than this share of themselves: their directions are any
#: of a plane.
EQUAL = 0.01
#: Readings that are 0 but for rounding, as a share of the largest.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class SingularDirections:
    """The strongest singular directions of one head's W_OV.

    Attributes:
        values: Singular values, falling, ``[n]``.
        shares: Of the squared norm of W_OV, ``[n]``.
        inputs: Unit vectors u_k, ``[n, d_model]``.
        outputs: Unit vectors v_k, ``[n, d_model]``.
    """

    values: Tensor
    shares: Tensor
    inputs: Tensor
    outputs: Tensor

    def arbitrary(self) -> bool:
        """Whether two of the values are so near that their directions are any of a plane."""
        return bool((self.values[:-1] - self.values[1:] <= EQUAL * self.values[:-1]).any())


@dataclass(frozen=True)
class Readings:
    """Singular directions as tokens.

    Attributes:
        inputs: Each token's embedding along u_k, ``[n, vocab]``; NaN where it is masked.
        outputs: Each token's logit for a write of v_k, less the mean of those not masked, likewise.
        masked: How many tokens are masked among inputs and among outputs, since their embedding or
            unembedding is unlike the others in size, see
            :func:`circuitlab_attention_heads.vocabulary.outliers`.
    """

    inputs: Tensor
    outputs: Tensor
    masked: tuple[int, int]

    def ends(self, side: str, row: int, n: int) -> tuple[list[int], list[int]]:
        """The tokens at both ends of a direction, see :func:`both_ends`.

        Args:
            side: ``inputs`` or ``outputs``.
            row: Which direction.
            n: How many tokens at each end.
        """
        return both_ends(getattr(self, side)[row], n)


@torch.no_grad()
def singular_directions(model: TracedModel, head: Head, n: int) -> SingularDirections:
    """The ``n`` strongest singular directions of W_OV = W_V W_O, norms folded in.

    By the QR decompositions of the two factors: what is decomposed is ``[d_head, d_head]``. Values
    that are rounding are left out, so that fewer may come back, none for a head that writes
    nothing. Of each pair of signs the one is taken in which the largest entry of u_k is positive.

    Raises:
        ModelError: a norm cannot be folded.
    """
    layer, number = head
    folded = model.weights.folded(layer, torch.float64)
    left, inner = torch.linalg.qr(folded.v[number])
    right, outer = torch.linalg.qr(folded.o[number].T)
    u, values, v = torch.linalg.svd(inner @ outer.T)
    real = values > len(values) * torch.finfo(torch.float64).eps * inner.norm() * outer.norm()
    squared = values.square().sum()
    kept = min(n, int(real.sum()))
    inputs, outputs = (left @ u).T[:kept], (right @ v.T).T[:kept]
    largest = inputs.abs().argmax(1, keepdim=True)
    sign = inputs.gather(1, largest).sign()
    values = values[:kept]
    return SingularDirections(values, values.square() / squared, sign * inputs, sign * outputs)


@torch.no_grad()
def read_directions(
    model: TracedModel, directions: SingularDirections, unembedding: Tensor
) -> Readings:
    """Read input directions through the embedding, output directions through the unembedding.

    Args:
        model: Any traced model.
        directions: Of one of its heads.
        unembedding: Centred, see :func:`circuitlab_attention_heads.ov.centred_unembedding`.
    """
    inputs = read_tokens(model, directions.inputs.T).T
    outputs = directions.outputs.to(unembedding) @ unembedding
    masks = norm_outliers(model.weights.embedding(model.dtype)), norm_outliers(unembedding.T)
    inputs = inputs.masked_fill(masks[0], torch.nan)
    outputs = outputs.masked_fill(masks[1], torch.nan)
    outputs = outputs - outputs.nanmean(1, keepdim=True)
    return Readings(inputs, outputs, (int(masks[0].sum()), int(masks[1].sum())))


def both_ends(values: Tensor, n: int) -> tuple[list[int], list[int]]:
    """Places of the ``n`` largest values above 0 of ``[width]``, and of the ``n`` smallest below.

    Outermost first; fewer where there are no more. NaN is no value, and what is rounding beside the
    largest is 0. Of equal values the first comes first.
    """
    known = values.nan_to_num(0.0)
    known = known.where(known.abs() > _ROUNDING * known.abs().max(), 0)

    def largest(signed: Tensor) -> list[int]:
        order = signed.argsort(descending=True, stable=True)[:n]
        places: list[int] = order[signed[order] > 0].tolist()
        return places

    return largest(known), largest(-known)
