"""Sharpness: among how many keys a head divides its attention, and other ways to divide it.

If softmax acts as an argmax, a head whose query looks at its best key alone does the same. Whether
it does is asked of the model by replacing the pattern; a rule below gives the replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from circuitlab import ModelError, Site

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Run, TracedModel

#: From scores ``[..., key]``, ``-inf`` where a key is not seen, to a pattern of the same shape.
Rule = Callable[["Tensor"], "Tensor"]

PORTS = ("q", "k", "v")
#: How far a recomputed z may be off, as a multiple of the type's rounding and the scores' size.
_ROUNDINGS = 256


@dataclass(frozen=True)
class Attention:
    """The heads of a layer at work.

    Attributes:
        scores: Before the softmax, capped where the model caps them, ``[batch, n_heads, query,
            key]``, at least float32; ``-inf`` where the query does not see the key. A padding token
            sees itself alone.
        values: ``[batch, n_heads, key, d_head]``.
    """

    scores: Tensor
    values: Tensor

    def z(self, pattern: Tensor) -> Tensor:
        """What the heads carry under a pattern, ``[batch, query, n_heads, d_head]``."""
        return (pattern @ self.values).transpose(1, 2)


def attention_of(model: TracedModel, run: Run, layer: int) -> Attention:
    """Scores and values of a layer, from a run that read its q, k and v."""
    dtype, attention = torch.promote_types(model.dtype, torch.float32), model.attention
    q, k, v = (attention.normed(layer, port, run[Site(port, layer)].to(dtype)) for port in PORTS)
    values = v.transpose(1, 2).repeat_interleave(model.n_heads // v.shape[2], 1)
    return Attention(attention.scores(layer, run.tokens, q, k), values)


def check_attention(model: TracedModel, run: Run, layer: int, attention: Attention) -> None:
    """Refuse a layer whose attention is not a softmax of these scores.

    Raises:
        ModelError: what it carried in the run, which read its z, is something else.
    """
    z = run[Site("z", layer)][run.mask].to(attention.scores.dtype)
    off = float((attention.z(softmax(attention.scores))[run.mask] - z).abs().max())
    # Some families take their softmax in float32 whatever the model's type.
    rounding = max(torch.finfo(t).eps for t in (model.dtype, torch.float32))
    scores = attention.scores
    size = 1 + float(scores.masked_fill(scores.isinf(), 0).abs().max())
    if not off <= _ROUNDINGS * rounding * size * float(z.abs().max()):
        raise ModelError(
            f"the attention of layer {layer} of model {model.name!r} is not the softmax of scaled "
            f"products of queries and keys (z is off by {off:.2g}): it has norms, windows, caps, "
            f"or rotations that the architecture of {model.architecture.family} does not name; its "
            f"scores cannot be split"
        )


# --- how a head may divide its attention ----------------------------------------------------------


def softmax(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The head's own pattern; sharper below temperature 1, flatter above: pattern^(1/T)."""
    return (scores / temperature).softmax(-1)


def argmax(scores: Tensor) -> Tensor:
    """All attention on the best key; keys that tie exactly share it, as softmax's limit does."""
    best = (scores == scores.amax(-1, keepdim=True)).to(scores.dtype)
    return best / best.sum(-1, keepdim=True)


def second(scores: Tensor) -> Tensor:
    """All attention on the second-best key; on the only one, where there is one."""
    first = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
    alone = scores.isfinite().sum(-1, keepdim=True) == 1
    return argmax(scores.masked_fill(first & ~alone, -torch.inf))


def uniform(scores: Tensor) -> Tensor:
    """The same attention on every key that is seen."""
    seen = scores.isfinite().to(scores.dtype)
    return seen / seen.sum(-1, keepdim=True)


#: The claim and its controls.
RULES: dict[str, Rule] = {"argmax": argmax, "uniform": uniform, "second": second}
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)


def tempered(temperature: float) -> Rule:
    """The rule of a temperature."""
    return partial(softmax, temperature=temperature)


# --- how sharp a pattern is -----------------------------------------------------------------------


@dataclass(frozen=True)
class Sharpness:
    """How sharp patterns are; every field has the shape of the scores without their keys.

    Attributes:
        n_eff: Effective number of keys, exp of the pattern's entropy: 1 for one key, n for n alike.
        top1: The largest attention, 0 to 1.
        margin: Best score less the second best; infinite where one key is seen.
    """

    n_eff: Tensor
    top1: Tensor
    margin: Tensor


def sharpness(scores: Tensor) -> Sharpness:
    """How sharp the softmax of scores ``[..., key]`` is; ``-inf`` where a key is not seen."""
    pattern = softmax(scores)
    two = scores.topk(min(2, scores.shape[-1]), -1).values
    return Sharpness(
        torch.special.entr(pattern).sum(-1).exp(),
        pattern.amax(-1),
        two[..., 0] - two[..., 1]
        if two.shape[-1] == 2
        else torch.full_like(two[..., 0], torch.inf),
    )
