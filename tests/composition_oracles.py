"""Compositions by ``d_model x d_model`` products, one pair of heads at a time, to test against.

Nothing here is shared with the code under test: norms are folded by hand from a module's own
weights. Row vectors: a head carries ``x @ W_OV``. Heads are by layer, then by number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def dense_gpt2(module: Any) -> dict[str, list[Tensor]]:
    """W_OV, and W_QK seen from the query's and the key's side, of each head, ``[d, d]``, folded."""
    config = module.config
    d, width = config.n_embd, config.n_embd // config.n_head
    normed = not isinstance(module.transformer.ln_f, nn.Identity)
    eye = torch.eye(d, dtype=torch.float64)
    centre = eye - torch.ones_like(eye) / d if normed else eye
    heads: dict[str, list[Tensor]] = {"ov": [], "q": [], "k": []}
    for block in module.transformer.h:
        fold = centre @ torch.diag(block.ln_1.weight.double()) if normed else eye
        joint, out = block.attn.c_attn.weight.double(), block.attn.c_proj.weight.double()
        for start in range(0, d, width):
            q, k, v = (joint[:, n * d + start : n * d + start + width] for n in range(3))
            heads["ov"].append(fold @ v @ out[start : start + width] @ centre)
            heads["q"].append(fold @ q @ k.T @ fold.T)
            heads["k"].append(fold @ k @ q.T @ fold.T)
    return heads


def dense_llama(module: Any, offset: int) -> dict[str, list[Tensor]]:
    """The same of a Llama: RMSNorm, grouped keys, each pair of columns turned by offset x rate."""
    c = module.config
    width, group = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    angles = offset * 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    turn = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)], 0)
    heads: dict[str, list[Tensor]] = {"ov": [], "q": [], "k": []}
    for block in module.model.layers:
        gain, a = block.input_layernorm.weight.double()[:, None], block.self_attn
        for head in range(c.num_attention_heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            q, k, v = (
                gain * part.weight.double()[rows].T
                for part, rows in ((a.q_proj, own), (a.k_proj, shared), (a.v_proj, shared))
            )
            heads["ov"].append(v @ a.o_proj.weight.double()[:, own].T)
            heads["q"].append(q @ turn @ k.T)
            heads["k"].append(k @ turn.T @ q.T)
    return heads


def dense_scores(
    heads: dict[str, list[Tensor]], n_heads: int, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """‖W_OV1 X2‖ / (‖W_OV1‖ ‖X2‖) for X2 = W_QK, W_QK^T, W_OV; NaN where head 2 is not later.

    Args:
        heads: As above.
        n_heads: Heads in a layer.
        kept: A projection ``[d, d]`` of the stream between the two; None is all of it.
    """
    n = len(heads["ov"])
    between = torch.eye(len(heads["ov"][0]), dtype=torch.float64) if kept is None else kept
    scores = {}
    for port, name in (("q", "q"), ("k", "k"), ("v", "ov")):
        table = torch.full((n, n), math.nan, dtype=torch.float64)
        for one in range(n):
            for two in range(n_heads * (one // n_heads + 1), n):
                left, right = heads["ov"][one], heads[name][two]
                sizes = (left @ between).norm() * (between @ right).norm()
                table[one, two] = (left @ between @ right).norm() / sizes
        scores[port] = table
    return scores
