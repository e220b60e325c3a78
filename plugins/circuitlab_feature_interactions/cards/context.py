"""Context: what a feature's activation owes to the tokens before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import Tokens, ratio_interval
from circuitlab_feature_interactions.cards.reading import Feature, prompt_batches, read_last
from circuitlab_feature_interactions.data import pad

if TYPE_CHECKING:
    from circuitlab import TracedModel
    from circuitlab_feature_interactions.cards.reading import Readings

#: Tokens of the context that are ablated, draws that replace each, tokens that are set alone.
ABLATED, DRAWS, ALONE = 24, 8, 64
_PASS = 2048


def token_ablations(
    model: TracedModel,
    feature: Feature,
    prompt: Tensor,
    pool: Tensor,
    generator: torch.Generator,
    *,
    bos: bool,
) -> dict[str, Any]:
    """A feature at a prompt's last token, with one earlier token changed at a time.

    Args:
        model: The model.
        feature: What is read.
        prompt: Ids, ``[n]``.
        pool: Ids that take the place of others, drawn as often as they stand here, ``[m]``.
        generator: For the draws.
        bos: Whether the prompt begins with BOS, which is left as it is.

    Returns:
        ``value`` as it is; ``first``, position of the first token shown, and ``texts`` from there
        on; as long as these ``replaced``: the mean over draws; ``removed``: without the token, so
        that those before it move nearer; ``hidden``: no later token attends to it, and all keep
        their positions. None for BOS; of the last token only ``replaced`` is there.
    """
    n = len(prompt)
    first = max(0, n - 1 - ABLATED)
    places = range(max(first, int(bos)), n)
    context = [place for place in places if place < n - 1]
    replaced = [_with(prompt, place, new) for place in places for new in _draws(pool, generator)]
    removed = [torch.cat([prompt[:place], prompt[place + 1 :]]) for place in context]
    whole = pad([prompt], model.device)
    values: dict[str, dict[int, float]] = {
        "replaced": dict(zip(places, _means(model, feature, replaced), strict=True)),
        "removed": dict(zip(context, _read(model, feature, removed), strict=True)),
        "hidden": dict(zip(context, _hidden(model, feature, whole, context), strict=True)),
    }
    told: dict[str, Any] = {
        "value": float(read_last(model, feature, [whole])),
        "first": first,
        "texts": model.token_texts(prompt[first:].tolist()),
    }
    for name, found in values.items():
        told[name] = [found.get(place) for place in range(first, n)]
    return told


def context_dependence(
    model: TracedModel,
    feature: Feature,
    readings: Readings,
    values: Tensor,
    generator: torch.Generator,
    *,
    bos: bool,
) -> dict[str, Any]:
    """How much of a feature's activation is left without the tokens before.

    Args:
        model: The model.
        feature: What is read.
        readings: Of the prompts.
        values: The feature's at their tokens, ``[n_tokens]``.
        generator: Draws the tokens, among those at which it is active and that have a context.
        bos: Whether prompts begin with BOS, which is no context and stays.

    Returns:
        ``tokens`` drawn; and where there are any, ``alone`` and ``hidden``, each ``score`` and
        ``interval``: 1 - sum of activations without context / sum in context. 0: the token alone
        decides; 1: nothing is left; below 0: context makes it smaller. Alone, a token is moved to
        the beginning; hidden, it stays where it is, and attends to none before it.
    """
    starts = torch.zeros_like(values, dtype=torch.bool)
    for offset in range(1 + int(bos)):
        firsts = readings.starts[:-1] + offset
        starts[firsts[firsts < readings.starts[1:]]] = True
    active = ((values > 0) & ~starts).nonzero().flatten()
    active = active[torch.randperm(len(active), generator=generator)[:ALONE]]
    told: dict[str, Any] = {"tokens": len(active)}
    if not len(active):
        return told
    prompts = [until(readings, token) for token in active.tolist()]
    whole = values[active].double()
    kept = int(bos)
    alone = [torch.cat([prompt[:kept], prompt[-1:]]) for prompt in prompts]
    hidden = []
    for tokens in prompt_batches(prompts, model.device):
        chosen = tokens.mask & (tokens.position_ids >= kept)
        chosen[:, -1] = False
        hidden.append(tokens.hiding(chosen))
    found = {
        "alone": torch.tensor(_read(model, feature, alone), dtype=torch.float64),
        "hidden": read_last(model, feature, hidden),
    }
    for name, left in found.items():
        told[name] = {"score": 1 - float(left.sum() / whole.sum())}
        if (ends := ratio_interval(left, whole)) is not None:
            told[name]["interval"] = [1 - ends[1], 1 - ends[0]]
    return told


def until(readings: Readings, token: int) -> Tensor:
    """The prompt that a token is in, up to that token."""
    prompt, position = readings.place(token)
    return readings.prompts[prompt][: position + 1]


def _with(prompt: Tensor, place: int, token: int) -> Tensor:
    changed = prompt.clone()
    changed[place] = token
    return changed


def _draws(pool: Tensor, generator: torch.Generator) -> list[int]:
    return pool[torch.randint(len(pool), (DRAWS,), generator=generator)].tolist()


def _means(model: TracedModel, feature: Feature, prompts: list[Tensor]) -> list[float]:
    values = torch.tensor(_read(model, feature, prompts), dtype=torch.float64)
    return values.view(-1, DRAWS).mean(1).tolist()


def _read(model: TracedModel, feature: Feature, prompts: list[Tensor]) -> list[float]:
    """The feature at the last token of each prompt."""
    if not prompts:
        return []
    return read_last(model, feature, prompt_batches(prompts, model.device)).tolist()


def _hidden(model: TracedModel, feature: Feature, whole: Tokens, places: list[int]) -> list[float]:
    """The feature at the last token with each place hidden in turn."""
    size = max(1, _PASS // whole.ids.shape[1])
    found: list[float] = []
    for i in range(0, len(places), size):
        part = torch.tensor(places[i : i + size], device=whole.ids.device)
        chosen = torch.arange(whole.ids.shape[1], device=part.device) == part[:, None]
        found += read_last(model, feature, [whole.repeat(len(part)).hiding(chosen)]).tolist()
    return found
