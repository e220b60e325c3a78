"""Logit lens: what a model would answer if the residual stream of a layer were its last.

The final norm, with the scale of that stream, and the unembedding are applied to each layer's
stream (nostalgebraist 2020, "interpreting GPT: the logit lens").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch

from circuitlab import Site, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Run, TracedModel

#: Logits that one pass gives at most.
LOGITS = 2**25


@dataclass(frozen=True)
class Lens:
    """What each layer's stream predicts after the last token of clean prompts, float64.

    Rows are ``resid_pre`` of each layer, then the model's own answer: ``[n_layers + 1, n_pairs]``.

    Attributes:
        kl: KL(model's answer ‖ the layer's), in nats; 0 in the last row.
        metric: The task's metric.
        right: 1 where a right answer is above every wrong one, or above every other token where the
            task names no wrong ones; else 0.
    """

    kl: Tensor
    metric: Tensor
    right: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The pairs of several batches."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts], 1) for name in names))


def logit_lens(model: TracedModel, batch: EncodedTask, run: Run) -> Lens:
    """The lens on every layer.

    The model itself applies its norm and unembedding, so that nothing of them has to be known.

    Args:
        model: The model.
        batch: Some pairs.
        run: A run of their clean prompts that read ``resid_pre`` of every layer.

    Raises:
        NumericsError: logits are not finite.
    """
    final = run.logits[:, -1]
    answer = final.double().log_softmax(-1)
    rows = []
    for logits in _layers(model, run):
        kl = (answer.exp() * (answer - logits.double().log_softmax(-1))).sum(-1)
        rows.append((kl, batch.score(logits, final), right(batch, logits)))
    rows.append((torch.zeros_like(answer[:, 0]), batch.score(final, final), right(batch, final)))
    return Lens(*(torch.stack(part).double().cpu() for part in zip(*rows, strict=True)))


def _layers(model: TracedModel, run: Run) -> Iterator[Tensor]:
    """Logits ``[batch, vocab]`` of each layer's stream; as many at once as memory allows."""
    last = Tokens(run.tokens.ids[:, -1:], run.tokens.mask[:, -1:])
    ends = [run[Site("resid_pre", layer)][:, -1:] for layer in range(model.n_layers)]
    step = max(1, LOGITS // (len(last) * model.vocab_size))
    for start in range(0, len(ends), step):
        some = ends[start : start + step]
        written = {Site("resid_post", model.n_layers - 1): torch.cat(some)}
        logits = model.run(last.repeat(len(some)), write=written).logits[:, -1]
        yield from torch.split(logits, len(last))


def right(batch: EncodedTask, logits: Tensor) -> Tensor:
    """Whether a right answer is above every wrong one, of ``[batch, vocab]``.

    Where the task names no wrong answers, whether no other token is above it.
    """
    best = _at(logits, batch.answers.right).amax(-1)
    if batch.answers.wrong.shape[-1]:
        return best > _at(logits, batch.answers.wrong).amax(-1)
    return best >= logits.amax(-1)


def _at(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits of some tokens of each prompt; minus infinity where there are fewer."""
    return logits.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
