"""Blocks: a block's attention and MLP as differentiable functions, with what their Jacobians need.

The norms' linear parts are folded into the weights. With n the normalised stream, of which the mean
is taken off where the norm does so, and s its scale, the Jacobian of n is ``(1 - n n^T / d) / s``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Size of the stream on which a norm is tried.
_TRIED = 8


@dataclass(frozen=True, slots=True)
class StreamNorm:
    """The part of a norm that is not linear: its mean and its scale.

    Attributes:
        centred: Whether the mean is taken off.
        scaled: Whether the stream is divided by its size.
        epsilon: What is added to the mean square.
    """

    centred: bool
    scaled: bool
    epsilon: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised stream ``[..., d]``, its gain left out, and its scale ``[..., 1]``."""
        if not self.scaled:
            return x, torch.ones_like(x[..., :1])
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        return x / scale, scale

    def along(self, normal: Tensor, directions: Tensor) -> Tensor:
        """How much directions ``[..., k, d]`` point along streams ``[..., d]``, ``[..., k]``.

        ``n . direction / d``: the share of a direction that the norm takes out again.
        """
        if not self.scaled:
            return torch.zeros_like(directions[..., 0])
        return (directions @ normal[..., None])[..., 0] / normal.shape[-1]

    def pull_back(self, normal: Tensor, scale: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at streams, from that at what the norm gives; ``[..., k, d]`` both."""
        taken = self.along(normal, gradient)[..., None] * normal[..., None, :]
        return (gradient - taken) / scale[..., None, :]


def read_stream_norm(model: TracedModel, layer: int) -> StreamNorm:
    """What a layer's norm does to a stream, found by trying it."""
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(_TRIED, model.d_model, generator=generator, dtype=torch.float64)
    tried = tried.to(model.device)

    def scale(x: Tensor) -> Tensor:
        return model.weights.norm_scale(layer, x)

    size = scale(tried)
    scaled = not torch.allclose(scale(100 * tried), size, rtol=1e-3)
    centred = scaled and torch.allclose(scale(tried + 10), size, rtol=1e-3)
    return StreamNorm(centred, scaled, float(scale(torch.zeros_like(tried[:1]))) ** 2)


@dataclass(frozen=True, eq=False, slots=True)
class MlpState:
    """An MLP at some streams.

    Attributes:
        normal: The normalised streams, ``[..., d]``.
        scale: ``[..., 1]``.
        hidden: What the maps ``w_in`` give, without biases, ``[..., maps * d_mlp]``.
        slope: Derivative of the hidden layer in what each map gives, ``[..., maps, d_mlp]``.
        written: What the MLP writes, ``[..., d]``.
    """

    normal: Tensor
    scale: Tensor
    hidden: Tensor
    slope: Tensor
    written: Tensor

    def at_maps(self, gradient: Tensor) -> Tensor:
        """The gradient at what the maps give, ``[..., k, maps * d_mlp]``.

        Args:
            gradient: At the hidden layer, ``[..., k, d_mlp]``.
        """
        return (gradient[..., None, :] * self.slope[..., None, :, :]).flatten(-2)


class Mlp:
    """The MLP of a layer with its norm, differentiable in the stream.

    One linear map and a nonlinearity; or, gated, two side by side, ``φ(g) u`` with ``g`` of the
    first, whose derivatives in the two are ``φ'(g) u`` and ``φ(g)``.

    Raises:
        SiteError: its hidden layer is not told by the architecture.
        ModelError: its norm is none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        self.norm = read_stream_norm(model, layer)
        weights = model.weights.mlp(layer, dtype)
        self.w_in, self.b_in, self.b_out = weights.w_in, weights.b_in, weights.b_out
        self._gated = weights.gate is not None
        if weights.gate is not None and weights.gate_bias is not None:
            self.w_in = torch.cat([weights.gate, weights.w_in], 1)
            self.b_in = torch.cat([weights.gate_bias, weights.b_in])
        # Laid out as the products below read it.
        self.w_in_back, self.w_out = self.w_in.T.contiguous(), weights.w_out
        self.w_out_back = weights.w_out.T.contiguous()
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
        written = after @ self.w_out + self.b_out
        return MlpState(normal, scale, hidden, torch.stack(slopes, -2), written)


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
        ports: Queries, keys and values before their biases, side by side, ``[batch, pos, 3 d_z]``.
        q: Queries as they are compared, ``[batch, pos, n_heads, d_head]``.
        k: Keys, likewise.
        v: Values, likewise.
        pattern: ``[batch, n_heads, query, key]``.
        z: ``[batch, pos, n_heads, d_head]``.
        turn: Rotation at each position, ``[batch, pos, d_head, d_head]``; None where there is none.
        written: What the attention writes, ``[batch, pos, d]``.
    """

    normal: Tensor
    scale: Tensor
    ports: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Tensor
    z: Tensor
    turn: Tensor | None
    written: Tensor


class Attention:
    """The attention of a layer with its norm, differentiable in the stream.

    Raises:
        ModelError: its norm is none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        self.norm = read_stream_norm(model, layer)
        heads = model.weights.folded(layer, dtype)
        self.n_heads, self.d_head, self.score_scale = model.n_heads, model.d_head, heads.scale
        ports = (heads.q, heads.k, heads.v)
        self.weight = torch.cat([w.transpose(0, 1).flatten(1) for w in ports], 1)
        self.bias = torch.cat([b.flatten() for b in (heads.q_bias, heads.k_bias, heads.v_bias)])
        # The stream keeps its mean, which the folded output weights leave out.
        self.output = model.weights.heads(layer, "o").to(dtype).flatten(0, 1)
        self.output_bias = model.weights.attention_bias(layer).to(dtype)
        self._weights = model.weights

    def at(self, x: Tensor, mask: Tensor) -> AttentionState:
        """The attention at streams ``[batch, pos, d]`` of prompts with a mask ``[batch, pos]``."""
        normal, scale = self.norm(x)
        ports = normal @ self.weight
        q, k, v = (self.by_head(part) for part in (ports + self.bias).chunk(3, -1))
        turn = self._turn(mask, x.dtype)
        q, k = rotate(q, turn), rotate(k, turn)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.score_scale
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        # A padding token looks at itself; no real one reads it.
        seen = torch.ones_like(itself).tril() & mask[:, None, None, :] | itself
        pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        written = z.flatten(2) @ self.output + self.output_bias
        return AttentionState(normal, scale, ports, q, k, v, pattern, z, turn, written)

    def by_head(self, joined: Tensor) -> Tensor:
        """``[..., n_heads, d_head]`` of ``[..., n_heads * d_head]``."""
        return joined.view(*joined.shape[:-1], self.n_heads, self.d_head)

    def _turn(self, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        turns = self._weights.rotations(torch.arange(mask.shape[1], device=mask.device), dtype)
        return None if turns is None else turns[(mask.cumsum(-1) - 1).clamp(min=0)]


def rotate(x: Tensor, turn: Tensor | None, *, back: bool = False) -> Tensor:
    """Rotated queries or keys, ``[batch, pos, ..., d_head]``; ``back`` undoes it."""
    if turn is None:
        return x
    turn = turn.transpose(-1, -2) if back else turn
    between = x.ndim - 4
    turn = turn[(slice(None), slice(None), *[None] * between)]
    return x @ turn


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
