"""Blocks: a block's attention and MLP as differentiable functions, with what their Jacobians need.

The linear parts of norms before them are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import Site
from circuitlab_feature_interactions.attributions import gather_product
from circuitlab_feature_interactions.norms import NormBehind, Normed, StreamNorm

if TYPE_CHECKING:
    from circuitlab import TracedModel


@dataclass(frozen=True, eq=False, slots=True)
class MlpState:
    """An MLP at some streams.

    Attributes:
        normal: The normalised streams, ``[..., d]``.
        scale: ``[..., 1]``.
        hidden: What the maps ``w_in`` give, without biases, ``[..., maps * d_mlp]``.
        slope: Derivative of the hidden layer in what each map gives, ``[..., maps, d_mlp]``.
        behind: What its output projection gives, behind the norm there: what the MLP writes.
    """

    normal: Tensor
    scale: Tensor
    hidden: Tensor
    slope: Tensor
    behind: Normed

    @property
    def written(self) -> Tensor:
        """What the MLP writes, ``[..., d]``."""
        return self.behind.given

    def at_maps(self, gradient: Tensor) -> Tensor:
        """The gradient at what the maps give, ``[..., k, maps * d_mlp]``.

        Args:
            gradient: At the hidden layer, ``[..., k, d_mlp]``.
        """
        return (gradient[..., None, :] * self.slope[..., None, :, :]).flatten(-2)


class Mlp:
    """The MLP of a layer with its norms, differentiable in the stream.

    One linear map and a nonlinearity; or, gated, two side by side, ``φ(g) u`` with ``g`` of the
    first, whose derivatives in the two are ``φ'(g) u`` and ``φ(g)``.

    Raises:
        SiteError: its hidden layer is not told by the architecture.
        ModelError: a norm of it is none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        weights = model.weights.mlp(layer, dtype, behind=False)
        self.norm = StreamNorm.read(model, Site("mlp_in", layer))
        self.behind = NormBehind(model, Site("mlp_post", layer), dtype)
        self.w_in, self.b_in, self.b_out = weights.w_in, weights.b_in, weights.b_out
        self._gated = weights.gate is not None
        if weights.gate is not None and weights.gate_bias is not None:
            self.w_in = torch.cat([weights.gate, weights.w_in], 1)
            self.b_in = torch.cat([weights.gate_bias, weights.b_in])
        # Laid out as the products below read it.
        self.w_in_back, self.w_out = self.w_in.T.contiguous(), weights.w_out
        self.w_out_back = (weights.w_out * self.behind.gain).T.contiguous()
        self._activation = weights.activation

    def at(self, x: Tensor) -> MlpState:
        """The MLP at streams ``[..., d]``."""
        normal, scale = self.norm(x)
        hidden = normal @ self.w_in
        given = hidden + self.b_in
        gate, other = given.chunk(2, -1) if self._gated else (given, None)
        after, slope = with_slope(self._activation, gate)
        slopes = [slope] if other is None else [slope * other, after]
        after = after if other is None else after * other
        behind = self.behind(after @ self.w_out + self.b_out)
        return MlpState(normal, scale, hidden, torch.stack(slopes, -2), behind)

    def at_hidden(self, state: MlpState, readers: Tensor, index: Tensor) -> Tensor:
        """The gradient at the hidden layer of what reads the MLP's output, ``[..., k, d_mlp]``.

        Args:
            state: The MLP at some streams ``[..., d]``.
            readers: Directions, ``[n, d]``.
            index: Which of them, ``[..., k]``.
        """
        back = gather_product(readers, index, self.w_out_back)
        if not self.behind.there:
            return back
        # As NormBehind.pull_back, but each reader is multiplied once whatever the streams.
        read = functional.embedding(index, readers)
        along = read @ state.written[..., None] / readers.shape[1]
        normal = state.behind.normal.flatten(-2) @ self.w_out.T
        return (back - along * normal[..., None, :]) / state.behind.scale


def with_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function of each number alone and its derivative, both differentiable if ``x`` is."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        value = function(at)
        slope = torch.autograd.grad(value.sum(), at, create_graph=x.requires_grad)[0]
    return (value, slope) if x.requires_grad else (value.detach(), slope)


@dataclass(frozen=True, eq=False, slots=True)
class AttentionState:
    """A layer's attention at the streams of whole prompts.

    Attributes:
        normal: The normalised streams, ``[batch, pos, d]``.
        scale: ``[batch, pos, 1]``.
        ports: Queries, keys and values before biases and norms, side by side,
            ``[batch, pos, 3 d_z]``.
        queries: Queries behind their norm.
        keys: Keys behind theirs.
        q: Queries as they are compared, ``[batch, pos, n_heads, d_head]``.
        k: Keys, likewise.
        v: Values, likewise.
        pattern: ``[batch, n_heads, query, key]``.
        felt: How far each attends further for ``q · k``: the pattern times the score's derivative,
            same shape.
        z: ``[batch, pos, n_heads, d_head]``.
        turn: Rotation at each position, ``[batch, pos, d_head, d_head]``; None where there is none.
        behind: What its output projection gives, behind the norm there: what the attention writes.
    """

    normal: Tensor
    scale: Tensor
    ports: Tensor
    queries: Normed
    keys: Normed
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Tensor
    felt: Tensor
    z: Tensor
    turn: Tensor | None
    behind: Normed

    @property
    def written(self) -> Tensor:
        """What the attention writes, ``[batch, pos, d]``."""
        return self.behind.given


class Attention:
    """The attention of a layer with its norms, differentiable in the stream.

    Raises:
        ModelError: a norm of it is none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        heads = model.weights.folded(layer, dtype, behind=False)
        self.norm = StreamNorm.read(model, Site("resid_pre", layer))
        self.q_norm, self.k_norm, self.behind = (
            NormBehind(model, Site(kind, layer), dtype) for kind in ("q", "k", "z")
        )
        self.n_heads, self.d_head = model.n_heads, model.d_head
        self._score_scale, self._cap = heads.scale, model.architecture.score_softcap
        ports = (heads.q, heads.k, heads.v)
        self.weight = torch.cat([w.transpose(0, 1).flatten(1) for w in ports], 1)
        self.bias = torch.cat([b.flatten() for b in (heads.q_bias, heads.k_bias, heads.v_bias)])
        # The stream keeps its mean, which the folded output weights leave out.
        self.output = model.weights.heads(layer, "o").to(dtype).flatten(0, 1)
        self.output_bias = model.weights.attention_bias(layer).to(dtype)
        self._model, self._layer = model, layer

    def at(self, x: Tensor, mask: Tensor) -> AttentionState:
        """The attention at streams ``[batch, pos, d]`` of prompts with a mask ``[batch, pos]``."""
        normal, scale = self.norm(x)
        ports = normal @ self.weight
        read_q, read_k, read_v = (ports + self.bias).chunk(3, -1)
        queries, keys = self.q_norm(read_q), self.k_norm(read_k)
        turn = self._turn(mask, x.dtype)
        q, k = (rotate(self.by_head(part.given), turn) for part in (queries, keys))
        v = self.by_head(read_v)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self._score_scale
        slope: Tensor | float = self._score_scale
        if self._cap:
            capped = torch.tanh(scores / self._cap)
            scores, slope = self._cap * capped, slope * (1 - capped.square())
        # A padding token looks at itself; no real one reads it.
        seen = self._model.attention.seen(self._layer, mask)
        pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        felt = pattern * slope
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        behind = self.behind(z.flatten(2) @ self.output + self.output_bias)
        return AttentionState(
            normal, scale, ports, queries, keys, q, k, v, pattern, felt, z, turn, behind
        )

    def by_head(self, joined: Tensor) -> Tensor:
        """``[..., n_heads, d_head]`` of ``[..., n_heads * d_head]``."""
        return joined.view(*joined.shape[:-1], self.n_heads, self.d_head)

    def _turn(self, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        positions = torch.arange(mask.shape[1], device=mask.device)
        turns = self._model.weights.rotations(positions, dtype, self._layer)
        return None if turns is None else turns[(mask.cumsum(-1) - 1).clamp(min=0)]


def rotate(x: Tensor, turn: Tensor | None) -> Tensor:
    """Rotated queries or keys, ``[batch, pos, ..., d_head]``."""
    if turn is None:
        return x
    between = x.ndim - 4
    return x @ turn[(slice(None), slice(None), *[None] * between)]


class Block:
    """A whole block, from the residual stream before it to the one after it.

    Raises:
        SiteError: its MLP's hidden layer is not told by the architecture.
        ModelError: its norms are none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        self.attention = Attention(model, layer, dtype)
        self.mlp = Mlp(model, layer, dtype)
        self.parallel = model.architecture.parallel

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """The stream after the block, ``[batch, pos, d]``, from the one before it."""
        after = x + self.attention.at(x, mask).written
        return after + self.mlp.at(x if self.parallel else after).written
