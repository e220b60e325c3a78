"""Attention: what heads make of queries, keys and values, as the architecture describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from circuitlab.norms import in_type

if TYPE_CHECKING:
    from circuitlab.architectures import Architecture
    from circuitlab.prompts import Tokens


class Attention:
    """The attention of a model's layers, computed from its description.

    Autograd goes through, and each head may have keys and values of its own where the model shares
    them.
    """

    def __init__(self, module: nn.Module, architecture: Architecture) -> None:
        self._module = module
        self._architecture = architecture

    def norm(self, layer: int, port: str) -> nn.Module | None:
        """The norm behind the projection of a port q, k or v; None where there is none."""
        a = self._architecture
        path = {"q": a.q_norm, "k": a.k_norm}.get(port, "")
        return self._module.get_submodule(a.block(layer, path)) if path else None

    def joint(self, layer: int, port: str) -> bool:
        """Whether that norm takes all heads side by side (OLMo 2), and not each alone (Qwen 3)."""
        norm, d_head = self.norm(layer, port), self._architecture.d_head
        return norm is not None and any(p.numel() != d_head for p in norm.parameters())

    def normed(self, layer: int, port: str, value: Tensor) -> Tensor:
        """Projections ``[batch, pos, n_heads, d_head]`` behind their norm, if they have one."""
        norm = self.norm(layer, port)
        if norm is None:
            return value
        apply = in_type(norm, value.dtype)
        if self.joint(layer, port):
            return apply(value.flatten(2)).view_as(value)
        return apply(value)

    def z(self, layer: int, tokens: Tokens, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Z of a layer from queries, keys and values behind their norms.

        Args:
            layer: The layer.
            tokens: The prompts, ``[batch, pos]``.
            q: ``[batch, pos, n_heads, d_head]``, before any rotation.
            k: The same, or with fewer heads, each of which serves a group of queries.
            v: As ``k``.

        Returns:
            ``[batch, pos, n_heads, d_head]``, in the type of ``q``.
        """
        pattern = self.scores(layer, tokens, q, k).softmax(-1)
        v = v.repeat_interleave(self._architecture.n_heads // v.shape[2], 2)
        return torch.einsum("bhqk,bkhd->bqhd", pattern, v)

    def scores(self, layer: int, tokens: Tokens, q: Tensor, k: Tensor) -> Tensor:
        """What the softmax of a layer is taken of: scaled, turned, capped and masked.

        Args:
            layer: The layer.
            tokens: The prompts, ``[batch, pos]``.
            q: Behind their norm, as of :meth:`z`.
            k: Likewise.

        Returns:
            ``[batch, n_heads, query, key]``; ``-inf`` where the query does not see the key. What is
            padded sees itself too.
        """
        a = self._architecture
        q, k = (self._rotated(layer, tokens, x) for x in (q, k))
        k = k.repeat_interleave(a.n_heads // k.shape[2], 2)
        scores = a.score_scale(layer) * torch.einsum("bqhd,bkhd->bhqk", q, k)
        if a.score_softcap:
            scores = a.score_softcap * torch.tanh(scores / a.score_softcap)
        return scores.masked_fill(~self.seen(layer, tokens.mask), -torch.inf)

    def seen(self, layer: int, mask: Tensor) -> Tensor:
        """Which keys the queries of a layer see, ``[batch, 1, query, key]``; itself each does.

        Args:
            layer: The layer.
            mask: True at real tokens, ``[batch, pos]``.
        """
        windows = self._architecture.sliding_windows
        place = torch.arange(mask.shape[1], device=mask.device)
        back = place[:, None] - place
        window = (windows[layer] if windows else 0) or len(place)
        return (back >= 0) & (back < window) & mask[:, None, None] | (back == 0)

    def _rotated(self, layer: int, tokens: Tokens, x: Tensor) -> Tensor:
        """Queries or keys turned by their position, where the model has rotary embeddings."""
        a = self._architecture
        if not a.rotary:
            return x
        kind = a.rotary_kinds[layer : layer + 1]
        cos, sin = self._module.get_submodule(a.rotary)(x, tokens.position_ids, *kind)
        turning, rest = x.tensor_split([cos.shape[-1]], -1)
        first, second = turning.chunk(2, -1)
        turned = turning * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]
        return torch.cat([turned, rest], -1)
