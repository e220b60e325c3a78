"""Attention scores and replaced patterns, written out from their definitions to test against.

Splits are summed pair by pair from what the components of :mod:`oracles` wrote. Patterns are
replaced inside the stock attention of a plain Hugging Face model, so that everything after them is
the model's own. Nothing here is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

Parts = dict[str, Tensor]

#: Scores below this are a mask's.
MASKED = -1e30
_NAME = "attention-oracle"


# --- splits ---------------------------------------------------------------------------------------


def parts_of(module: Any, ids: Tensor, mask: Tensor, head: tuple[int, int]) -> tuple[Parts, Parts]:
    """What each part of the stream puts into a head's q and k, ``[batch, pos, d_head]`` each.

    GPT-2 only; its norms may be identities. The norm's scale is that of the whole stream.
    """
    with torch.no_grad():
        run = oracles.run(module, ids, mask)
    layer, number = head
    block = module.transformer.h[layer]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    written = {
        "token": module.transformer.wte(ids).detach(),
        "position": module.transformer.wpe(positions).detach(),
    }
    before = [name for name in run.outputs if name != "input" and int(name[1]) < layer]
    written |= {name: run.outputs[name] for name in before}
    zero = torch.zeros(module.config.n_embd, dtype=written["token"].dtype)
    constant = sum((module.transformer.h[n].attn.c_proj.bias for n in range(layer)), start=zero)
    written["attention-bias"] = constant.detach().expand_as(written["token"])
    stream = run.inputs[f"a{layer}.h{number}", "q"]
    found: list[Parts] = []
    d_head = module.config.n_embd // module.config.n_head
    for third in (0, 1):
        columns = slice(*(third * module.config.n_embd + (number + n) * d_head for n in (0, 1)))
        weight = block.attn.c_attn.weight.detach()[:, columns]
        bias = block.attn.c_attn.bias.detach()[columns]
        read = {
            name: _normed(block.ln_1, value, stream) @ weight for name, value in written.items()
        }
        shift = getattr(block.ln_1, "bias", None)
        read["bias"] = (bias if shift is None else shift.detach() @ weight + bias).expand_as(
            read["token"]
        )
        found.append(read)
    return found[0], found[1]


def _normed(norm: nn.Module, value: Tensor, stream: Tensor) -> Tensor:
    """A part of a stream as the norm of the whole stream leaves it, without the shift."""
    if not isinstance(norm, nn.LayerNorm):
        return value
    size = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return (value - value.mean(-1, keepdim=True)) / size * norm.weight.detach()


def scale_of(module: Any, layer: int) -> float:
    """What a layer multiplies its products by."""
    return float(module.transformer.h[layer].attn.scaling)


# --- replaced patterns ----------------------------------------------------------------------------


def argmax_row(scores: list[float]) -> list[float]:
    best = max(scores)
    tied = [score == best for score in scores]
    return [is_best / sum(tied) for is_best in tied]


def uniform_row(scores: list[float]) -> list[float]:
    return [1 / len(scores) for _ in scores]


def second_row(scores: list[float]) -> list[float]:
    if len(scores) == 1:
        return [1.0]
    first = scores.index(max(scores))
    others = [-math.inf if place == first else score for place, score in enumerate(scores)]
    return argmax_row(others)


def tempered_row(temperature: float) -> Any:
    def row(scores: list[float]) -> list[float]:
        sizes = [math.exp((score - max(scores)) / temperature) for score in scores]
        return [size / sum(sizes) for size in sizes]

    return row


ROWS = {"argmax": argmax_row, "uniform": uniform_row, "second": second_row}


def logits_under(
    module: Any, ids: Tensor, mask: Tensor, row: Any, heads: Collection[tuple[int, int]]
) -> Tensor:
    """Last logits ``[batch, vocab]`` when these heads attend by a rule for each query's scores.

    ``row`` maps the scores of the keys that a query sees to its attention.
    """

    def attend(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor, **given: Any
    ) -> tuple[Tensor, Tensor]:
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        scores = query @ key.transpose(-1, -2) * given["scaling"]
        if cap := given.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        scores = scores + added.to(query)
        pattern = scores.softmax(-1)
        for number in (head for n, head in heads if n == layer.layer_idx):
            pattern[:, number] = by_rows(scores[:, number], row)
        return (pattern @ value).transpose(1, 2), pattern

    with _attending(module, attend), torch.no_grad():
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        done = module(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    last: Tensor = done.logits[:, -1]
    return last


def by_rows(scores: Tensor, row: Any) -> Tensor:
    pattern = torch.zeros_like(scores)
    for batch, queries in enumerate(scores.tolist()):
        for query, found in enumerate(queries):
            seen = [key for key, score in enumerate(found) if score > MASKED] or [query]
            shares = row([found[key] for key in seen])
            pattern[batch, query, seen] = torch.tensor(shares, dtype=scores.dtype)
    return pattern


@contextmanager
def _attending(module: Any, attend: Any) -> Iterator[None]:
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    module.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        module.set_attn_implementation("eager")


def patterns(module: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The stock model's own attention by layer, ``[batch, n_heads, query, key]`` each."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        done = module(
            ids,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=False,
            output_attentions=True,
        )
    found: tuple[Tensor, ...] = done.attentions
    return found
