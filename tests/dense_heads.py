"""Heads as dense matrices, written down from the parameters of plain Hugging Face models.

Nothing here is shared with the code under test: norms are folded by their formulas, matrices are
d_model x d_model and tables vocab x vocab.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from circuitlab_attention_heads.head_names import Head
from torch import Tensor, nn


class Dense:
    """One head of a GPT-2, GPT-NeoX, Llama or its kin, in float64, row vectors from the left.

    Gains of norms behind a projection are in its weight; their scales are not.
    """

    def __init__(self, module: nn.Module, head: Head) -> None:
        self.module: Any = module
        self.layer, self.head = head
        config = self.module.config
        self.kind = config.model_type
        self.n_heads, self.d_model = config.num_attention_heads, config.hidden_size
        self.d_head = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.body: Any = getattr(
            module, {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(self.kind, "model")
        )
        self.block: Any = (self.body.h if self.kind == "gpt2" else self.body.layers)[self.layer]
        if self.kind == "gpt2":
            self.norm, self.final = self.block.ln_1, self.body.ln_f
            self.attention, self.embed = self.block.attn, self.body.wte
            self.output = self.attention.c_proj.weight
        elif self.kind == "gpt_neox":
            self.norm, self.final = self.block.input_layernorm, self.body.final_layer_norm
            self.attention, self.embed = self.block.attention, self.body.embed_in
            self.output = self.attention.dense.weight.T
        else:
            self.norm = getattr(self.block, "input_layernorm", nn.Identity())
            self.final = self.body.norm
            self.attention, self.embed = self.block.self_attn, self.body.embed_tokens
            self.output = self.attention.o_proj.weight.T

    # --- embeddings -------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> Tensor:
        weight: Tensor = self.embed.weight.detach().double()
        return weight * 4 if self.kind.startswith("gemma") else weight

    @cached_property
    def positions(self) -> Tensor:
        return self.body.wpe.weight.detach().double()

    @cached_property
    def unembedding(self) -> Tensor:
        """Folded, centred over the vocabulary."""
        folded = fold(self.final, self.module.lm_head.weight.detach().double().T)
        return folded - folded.mean(1, keepdim=True)

    # --- the head ---------------------------------------------------------------------------------

    def raw(self, port: str) -> tuple[Tensor, Tensor]:
        """Weight ``[d_model, d_head]`` and bias of q, k or v as they are stored."""
        h, d, n = self.head, self.d_head, self.n_heads
        if self.kind == "gpt2":
            start = "qkv".index(port) * self.d_model + h * d
            fused: Any = self.attention.c_attn
            weight, bias = fused.weight, fused.bias
        elif self.kind == "gpt_neox":
            start = (3 * h + "qkv".index(port)) * d
            fused = self.attention.query_key_value
            weight, bias = fused.weight.T, fused.bias
        else:
            counts = [n, *[self.module.config.num_key_value_heads] * 2]
            own = counts["qkv".index(port)]
            start = h // (n // own) * d
            if self.kind == "phi3":
                start += sum(counts[: "qkv".index(port)]) * d
            made: Any = getattr(self.attention, f"{'qkv' if self.kind == 'phi3' else port}_proj")
            weight, bias = made.weight.T, made.bias
        part = slice(start, start + d)
        none = torch.zeros(d, dtype=torch.float64)
        return (
            weight[:, part].detach().double(),
            none if bias is None else bias[part].detach().double(),
        )

    def weight(self, port: str) -> Tensor:
        return fold(self.norm, self.raw(port)[0]) * self.gain(port)

    def bias(self, port: str) -> Tensor:
        weight, bias = self.raw(port)
        shift = getattr(self.norm, "bias", None)
        return self.gain(port) * (
            bias if shift is None else bias + shift.detach().double() @ weight
        )

    def gain(self, port: str) -> Tensor:
        """Of the norm of queries or keys, ``[d_head]``; ones where there is none."""
        norm = getattr(self.attention, f"{port}_norm", None)
        if norm is None:
            return torch.ones(self.d_head, dtype=torch.float64)
        rows = gain_of(norm).view(-1, self.d_head)
        return rows[self.head * len(rows) // self.n_heads]

    @cached_property
    def o(self) -> Tensor:
        """Centred where the family's norms all take the mean off."""
        rows = slice(self.head * self.d_head, (self.head + 1) * self.d_head)
        weight = self.output.detach().double()[rows]
        if self.behind is not None:
            weight = weight * gain_of(self.behind)
        centred = isinstance(self.norm, nn.LayerNorm)
        return weight - weight.mean(1, keepdim=True) if centred else weight

    @property
    def behind(self) -> Any:
        """The norm of what the attention gives."""
        if not hasattr(self.block, "post_feedforward_layernorm"):
            return None
        return self.block.post_attention_layernorm

    @cached_property
    def scale(self) -> float:
        if self.kind in ("gemma2", "gemma3_text"):
            return 1 / 3
        return float(self.d_head**-0.5)

    def turn(self, offset: int) -> Tensor:
        """What stands between W_Q and W_K^T: rotary positions ``offset`` apart, or nothing."""
        unit = torch.eye(self.d_head, dtype=torch.float64)
        if self.kind == "gpt2":
            return unit
        wide = torch.zeros(1, 1, dtype=torch.float64)
        kind = [self.module.config.layer_types[self.layer]] if self.kind == "gemma3_text" else []
        found = self.body.rotary_emb(wide, torch.tensor([[offset, 0]]), *kind)
        cos, sin = (p[0] for p in found)

        def turned(rows: Tensor, place: int) -> Tensor:
            width = cos.shape[-1]
            first, still = rows[:, :width], rows[:, width:]
            half = torch.cat([-first[:, width // 2 :], first[:, : width // 2]], 1)
            return torch.cat([first * cos[place] + half * sin[place], still], 1)

        return turned(unit, 0) @ turned(unit, 1).T

    def qk(self, offset: int = 0) -> Tensor:
        """``[d_model, d_model]``, with the scale."""
        return self.scale * self.weight("q") @ self.turn(offset) @ self.weight("k").T

    @cached_property
    def ov(self) -> Tensor:
        """``[d_model, d_model]``."""
        return self.weight("v") @ self.o


def gain_of(norm: nn.Module) -> Tensor:
    """What a norm multiplies by; Gemma stores what is added to 1."""
    weight: Any = norm.weight
    return weight.detach().double() + ("Gemma" in type(norm).__name__)


def fold(norm: nn.Module, weight: Tensor) -> Tensor:
    """A map of what a norm gives as one of the stream over the norm's scale."""
    if isinstance(norm, nn.Identity):
        return weight
    folded = torch.diag(gain_of(norm)) @ weight
    if isinstance(norm, nn.LayerNorm):
        d = len(folded)
        folded = (torch.eye(d) - torch.ones(d, d) / d).double() @ folded
    return folded


def divisor(norm: nn.Module, stream: Tensor) -> Tensor:
    """σ by the norm's formula, ``[..., 1]``."""
    if isinstance(norm, nn.Identity):
        return torch.ones_like(stream[..., :1])
    if isinstance(norm, nn.LayerNorm):
        return (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return (stream.square().mean(-1, keepdim=True) + eps).sqrt()
