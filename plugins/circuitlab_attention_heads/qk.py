"""The QK circuit: what makes one head look where it looks, read from its weights.

A stream that is the sum of a token's and a position's embedding gives the query i and the key j
the score (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits)

    s_ij = scale · (x_i / σ_i W_Q + b_Q) R_i R_j^T (x_j / σ_j W_K + b_K)^T,    x = token + position

and multiplied out it falls into blocks: token × token, token × position, position × token,
position × position, and terms with a bias. Norms are folded into W_Q and W_K; σ is what they divide
by. R is there with rotary embeddings only.

Norms of queries and keys (Qwen 3) divide both by a scale of their own, at each token, and a soft
cap bends the sum (Gemma 2): both come after the tables here, which have the gain of such norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import ModelError, OptionError
from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.vocabulary import read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel

#: Differences that count as none, as a share of the largest score: a table is a sum of few terms.
NEGLIGIBLE = 1e-9

Block = tuple[str, str]


@dataclass(frozen=True)
class QKCircuit:
    """The QK circuit of one head in factors, so that no table of all tokens is ever made.

    Queries and keys are those of a stream that the norm has not yet divided by its scale σ.

    Attributes:
        token_queries: What each token asks for, ``[vocab, d_head]``, float64, as all of these.
        token_keys: What each token offers, same shape.
        position_queries: ``[n_positions, d_head]``; None without learned positions.
        position_keys: Same shape.
        q_bias: b_Q with the shift of the norm, ``[d_head]``. It needs no division by σ.
        k_bias: Likewise b_K.
        turn: ``R_i R_j^T`` of the offset i - j that was asked for, ``[d_head, d_head]``; None
            without rotary embeddings.
        scale: What scores are multiplied by.
    """

    token_queries: Tensor
    token_keys: Tensor
    position_queries: Tensor | None
    position_keys: Tensor | None
    q_bias: Tensor
    k_bias: Tensor
    turn: Tensor | None
    scale: float

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores ``[n_queries, n_keys]`` of queries and keys ``[n, d_head]``."""
        turned = queries if self.turn is None else queries @ self.turn
        return torch.matmul(turned, keys.T) * self.scale

    def blocks(self, tokens: Tensor, positions: Tensor) -> Mapping[Block, Tensor]:
        """The terms of a score by what the query and the key bring to it.

        The score of token t at position i for token u at position j, where the stream is the
        embedding, is ``tt[t,u]/σσ' + tp[t,j]/σσ' + pt[i,u]/σσ' + pp[i,j]/σσ'`` plus ``bt[u]/σ' +
        bp[j]/σ'``, plus ``tb[t]/σ + pb[i]/σ + bb``. These last three are the same for all keys
        and cancel in the softmax, unless the head has rotary embeddings: then they depend on the
        offset.

        Args:
            tokens: Ids, ``[n_tokens]``; queries and keys alike.
            positions: ``[n_positions]``; without learned positions there are no blocks of them.

        Returns:
            For (query, key) of ``token``, ``position`` and ``bias``: ``[n_query, n_key]``, where
            the bias is one row or column. In units of the score, before the division by σ.
        """
        queries = {"token": self.token_queries[tokens], "bias": self.q_bias[None]}
        keys = {"token": self.token_keys[tokens], "bias": self.k_bias[None]}
        if self.position_queries is not None and self.position_keys is not None:
            queries["position"] = self.position_queries[positions]
            keys["position"] = self.position_keys[positions]
        return {(q, k): self.scores(queries[q], keys[k]) for q in queries for k in keys}

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the token × token table, without its zeros: ``[d_head]``, complex.

        The table ``A B^T`` has as non-zero eigenvalues those of ``B^T A``.
        """
        turned = self.token_queries if self.turn is None else self.token_queries @ self.turn
        values: Tensor = torch.linalg.eigvals(self.scale * self.token_keys.T @ turned)
        return values

    def matching(self) -> float | None:
        """How much tokens look for themselves: Σ λ / Σ |λ| of the table, from -1 to 1.

        1: each token scores highest with itself, as in a duplicate-token head; about 0: tokens
        look for others. The division by σ is left out. None where the table is 0.
        """
        values = self.eigenvalues()
        size = float(values.abs().sum())
        # Of a table of a lower rank, some eigenvalues are rounding, and of rank 0 all.
        most = float(self.token_queries.norm() * self.token_keys.norm()) * abs(self.scale)
        return float(values.sum().real) / size if size > NEGLIGIBLE * most else None

    def best_keys(self, tokens: Tensor) -> tuple[int, int]:
        """How often the best key of a token, among all tokens, is the token itself.

        Args:
            tokens: Ids of the queries, ``[n]``.

        Returns:
            For how many tokens no other key scores as high as the token itself, and for how many
            some key scores higher than another: the others look for nothing.
        """
        own = deciding = 0
        for token in tokens.tolist():
            row = self.scores(self.token_queries[token : token + 1], self.token_keys)[0]
            spread = float(row.max() - row.min())
            if spread <= NEGLIGIBLE * float(row.abs().max()):
                continue
            deciding += 1
            others = torch.cat([row[:token], row[token + 1 :]])
            own += bool(row[token] - others.max() > NEGLIGIBLE * spread)
        return own, deciding


@torch.no_grad()
def qk_circuit(
    model: TracedModel, head: Head, *, through: Head | None = None, offset: int = 0
) -> QKCircuit:
    """The QK circuit of a head.

    Args:
        model: Any traced model.
        head: Layer and number.
        through: An earlier head: keys are then read from what this head writes of each token and
            position, through its OV circuit. Where it looks at the token before, as in induction,
            the table says which tokens are looked for *behind* which (Olsson et al. 2022,
            arXiv:2209.11895). Its own norm's division by σ is left out too, and its b_V: that adds
            the same to every key.
        offset: Positions from the key to the query; only rotary embeddings look at it.

    Raises:
        OptionError: ``through`` is in no earlier layer, or no prompt is as long as the offset.
        ModelError: a norm cannot be folded, or learned positions and rotary embeddings meet.
    """
    layer, number = head
    folded = model.weights.folded(layer, torch.float64)
    w_q, w_k = folded.q[number], folded.k[number]
    if through is not None:
        if through[0] >= layer:
            raise OptionError(
                f"--through {head_name(through)} writes nothing that {head_name(head)} reads; give "
                f"a head of a layer before {layer}"
            )
        earlier = model.weights.folded(through[0], torch.float64)
        w_k = earlier.v[through[1]] @ (earlier.o[through[1]] @ w_k)
    positions, turn = model.weights.positions(torch.float64), rotation(model, layer, offset)
    if positions is not None and turn is not None:
        raise ModelError(
            f"model {model.name!r} has learned positions and rotary embeddings; their blocks of "
            f"scores depend on both and cannot be read one by one"
        )
    return QKCircuit(
        read_tokens(model, w_q),
        read_tokens(model, w_k),
        None if positions is None else positions @ w_q,
        None if positions is None else positions @ w_k,
        folded.q_bias[number],
        folded.k_bias[number],
        turn,
        folded.scale,
    )


def rotation(model: TracedModel, layer: int, offset: int) -> Tensor | None:
    """``R_i R_j^T`` of a layer, i - j = ``offset``, ``[d_head, d_head]``; None without rotary.

    Raises:
        OptionError: no prompt is as long as the offset, or it is negative.
    """
    if not 0 <= offset < model.n_positions:
        raise OptionError(
            f"--offsets {offset}: a query stands 0 to {model.n_positions - 1} positions behind its "
            f"key; give such numbers"
        )
    ends = torch.tensor([0, offset], device=model.device)
    turns = model.weights.rotations(ends, torch.float64, layer)
    return None if turns is None else turns[1] @ turns[0].T
