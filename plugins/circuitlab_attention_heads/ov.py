"""The OV circuit: what one head writes for the tokens it looks at, read as logits.

A head that attends to a token adds ``token / σ W_V W_O`` to the stream, and directly to the logits
that times W_U (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits). Norms are
folded in; logits are centred, since a softmax does not see what all of them share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab_attention_heads.head_names import Head
from circuitlab_attention_heads.vocabulary import read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel

#: An unembedding of more weights than this is read in float32: in float64 it takes gigabytes.
_LARGE = 2**26


@dataclass(frozen=True)
class OVCircuit:
    """The OV circuit of one head in factors, so that no table of all tokens is ever made.

    Attributes:
        token_values: What the head reads of each token through V, before its norm divides by its
            scale σ: ``[vocab, d_head]``.
        written: What each coordinate of the head puts into the logits, before the final norm
            divides: ``[d_head, vocab]``, centred.
        v_bias: b_V with the shift of the norm, ``[d_head]``: the head writes it whatever it looks
            at.
    """

    token_values: Tensor
    written: Tensor
    v_bias: Tensor

    def logits(self, tokens: Tensor) -> Tensor:
        """What the head adds to the logits when it looks at a token alone, ``[n, vocab]``.

        Args:
            tokens: Ids, ``[n]``.

        Returns:
            Centred, without b_V; to be divided by both norms' scales.
        """
        return self.token_values[tokens].to(self.written) @ self.written

    def constant(self) -> Tensor:
        """What b_V adds to the logits, ``[vocab]``; to be divided by the final norm's scale."""
        return self.v_bias.to(self.written) @ self.written


@torch.no_grad()
def ov_circuit(model: TracedModel, head: Head, unembedding: Tensor) -> OVCircuit:
    """The OV circuit of a head.

    Args:
        model: Any traced model.
        head: Layer and number.
        unembedding: Of :func:`centred_unembedding`.

    Raises:
        ModelError: a norm cannot be folded.
    """
    layer, number = head
    folded = model.weights.folded(layer, torch.float64)
    return OVCircuit(
        read_tokens(model, folded.v[number]),
        folded.o[number].to(unembedding) @ unembedding,
        folded.v_bias[number],
    )


@torch.no_grad()
def centred_unembedding(model: TracedModel) -> Tensor:
    """The folded unembedding less its mean over the vocabulary, ``[d_model, vocab]``.

    float64, or float32 where the unembedding is large.

    Raises:
        ModelError: the final norm cannot be folded.
    """
    large = model.d_model * model.vocab_size > _LARGE
    weight, _ = model.weights.unembedding(torch.float32 if large else torch.float64)
    return weight - weight.mean(-1, keepdim=True)
