"""Prompting: what other prompts do to the logit difference, to set beside what steering does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitlab import TaskError, choose_batch_size
from circuitlab_activation_plateaus.steering.vectors import prompt_of

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Tokens, TracedModel
    from circuitlab_activation_plateaus.steering.injecting import Readout
    from circuitlab_activation_plateaus.steering.vectors import Prompts


def baselines(
    model: TracedModel,
    pairs: EncodedTask,
    read: Readout,
    *,
    prompts: Prompts = "clean",
    prefix: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """The logit difference of every pair without any steering, ``[n_prompts]`` each, by label.

    Args:
        model: Any traced model.
        pairs: The task.
        read: Its logit difference.
        prompts: Which prompts are steered; the ``prefix`` is put before these.
        prefix: Text, put before each prompt as it is, with no space between; token ids for a model
            without a tokenizer.
        batch_size: Pairs per pass; None chooses by memory.

    Returns:
        ``clean prompt``, ``corrupt prompt``, and ``prompt prefix`` where one is given.

    Raises:
        TaskError: a prompt with its prefix cannot be encoded.
        NumericsError: an activation is not finite.
    """
    tokens = {"clean prompt": pairs.clean, "corrupt prompt": pairs.corrupt}
    if prefix is not None:
        tokens["prompt prefix"] = prefixed(model, pairs, prompts, prefix)
    size = choose_batch_size(model, pairs, batch_size)
    return {label: _answered(model, part, read, size) for label, part in tokens.items()}


def prefixed(model: TracedModel, pairs: EncodedTask, prompts: Prompts, prefix: str) -> Tokens:
    """The prompts of every pair with a prefix before them.

    Raises:
        TaskError: one of them cannot be encoded, or is too long.
    """
    before = prompt_of(model, prefix, "--prompt-prefix")
    found: list[str | tuple[int, ...]] = []
    for number, own in zip(pairs.numbers, _own(pairs, prompts), strict=True):
        prompt = getattr(pairs.task.pairs[number - 1], prompts)
        if isinstance(prompt, str) and isinstance(before, str):
            found.append(before + prompt)
        elif isinstance(before, str):
            found.append((*_ids(model, before), *own))
        else:
            found.append((*before, *own))
    try:
        return model.tokens(found)
    except TaskError as error:
        raise TaskError(f"--prompt-prefix {prefix!r}: {error}") from error


def _own(pairs: EncodedTask, prompts: Prompts) -> list[tuple[int, ...]]:
    """Token ids of each prompt, without padding."""
    tokens: Tokens = getattr(pairs, prompts)
    rows = zip(tokens.ids, tokens.mask, strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in rows]


def _ids(model: TracedModel, text: str) -> tuple[int, ...]:
    tokens = model.tokens([text])
    return tuple(tokens.ids[0].tolist())


@torch.no_grad()
def _answered(model: TracedModel, tokens: Tokens, read: Readout, size: int) -> Tensor:
    starts = range(0, len(tokens), size)
    rows = [slice(start, start + size) for start in starts]
    runs = [model.run(tokens.rows(part), vocabulary=read.tokens) for part in rows]
    each = [read.of(run.logits[:, -1], part) for run, part in zip(runs, rows, strict=True)]
    return torch.cat(each)
