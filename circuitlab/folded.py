"""Weights with norms folded in: heads and MLPs as plain maps of the normalised stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The heads of one layer with the norm that feeds them folded in; row vectors from the left.

    With ``σ`` the norm's scale at a position (:meth:`Weights.norm_scale`), a head reads a residual
    stream ``x`` as ``q = x / σ @ W_q + b_q``, likewise k and v. Its score of query i and key j is
    ``scale * q_i @ R_i @ R_j^T @ k_j`` with ``R`` of :meth:`Weights.rotations`, and it writes
    ``pattern @ v @ W_o``.

    Norms behind a projection have their gain folded in too; q and k, where they are normed, and
    what is written, where a norm stands behind the attention, are still to be divided by
    :meth:`Weights.scale_behind`. Caps of scores and windows are the architecture's
    ``score_softcap`` and ``sliding_windows``, and no weights.

    Attributes:
        q: ``[n_heads, d_model, d_head]``.
        k: Same shape; with grouped queries each head has its group's own.
        v: Likewise.
        o: ``[n_heads, d_head, d_model]``; centred where every norm of the model centres, so that
            nothing that is written is lost when it is read.
        q_bias: ``[n_heads, d_head]``.
        k_bias: Same shape. It adds the same to every key's score and so cancels in the softmax,
            but for what rotary embeddings turn of it.
        v_bias: Same shape. It writes ``v_bias @ o`` whatever the head looks at.
        scale: ``1 / sqrt(d_head)``, unless the architecture says else.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """An MLP of one hidden layer with the norm that feeds it folded in; row vectors from the left.

    With ``σ`` the norm's scale (:meth:`Weights.norm_scale`) it reads a stream ``x`` and writes
    ``activation(x / σ @ w_in + b_in) @ w_out + b_out``. A gated MLP, as SwiGLU and GEGLU (Shazeer
    2020, arXiv:2002.05202), writes
    ``(activation(x / σ @ gate + gate_bias) * (x / σ @ w_in + b_in)) @ w_out + b_out``. Where a norm
    stands behind the MLP its gain is folded in, and what is written is still to be divided by
    :meth:`Weights.scale_behind` of the hidden layer.

    Attributes:
        w_in: ``[d_model, d_mlp]``.
        b_in: ``[d_mlp]``.
        activation: Of each number alone; any shape.
        w_out: ``[d_mlp, d_model]``.
        b_out: ``[d_model]``.
        gate: ``[d_model, d_mlp]``; None where no gate multiplies the hidden layer.
        gate_bias: ``[d_mlp]``; None without a gate.
    """

    w_in: Tensor
    b_in: Tensor
    activation: Callable[[Tensor], Tensor]
    w_out: Tensor
    b_out: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None

    def __call__(self, normed: Tensor) -> Tensor:
        """What it writes, ``[..., d_model]``, at streams ``x / σ`` of that shape."""
        return self.hidden(normed) @ self.w_out + self.b_out

    def hidden(self, normed: Tensor) -> Tensor:
        """Its hidden layer, ``[..., d_mlp]``, at streams ``x / σ``: the site ``mlp_post``."""
        hidden = normed @ self.w_in + self.b_in
        if self.gate is None or self.gate_bias is None:
            return self.activation(hidden)
        return self.activation(normed @ self.gate + self.gate_bias) * hidden
