"""Examples: a feature's activations as a histogram, and tokens drawn from its whole range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import TracedModel, ratio_interval

if TYPE_CHECKING:
    from circuitlab_feature_interactions.cards.reading import Readings

#: Bars of the histogram, bins that examples are drawn from, and examples of each.
BARS, BINS, PER_BIN = 24, 5, 2
#: Tokens of an example before and after the one that is shown.
BEFORE, AFTER = 12, 6
#: A latent of this density is missed by fewer than this share of data sets that are large enough.
DENSITY, DELTA = 1e-4, 0.01


def density_facts(readings: Readings, values: Tensor) -> dict[str, Any]:
    """How often a feature is active.

    Args:
        readings: Of the prompts.
        values: The feature's, ``[n_tokens]``.

    Returns:
        ``tokens``; ``active``, how many of them it is active at; ``density``, their share, and its
        ``interval`` over prompts. Where it is silent, instead of these two ``below``, which its
        density is with confidence 0.99, and ``dead``: true, or ``"unknown"`` with fewer than
        ``tokens_needed`` tokens, at which a latent of density 0.0001 is silent with probability
        0.01.
    """
    n, on = len(values), values > 0
    active = int(on.sum())
    needed = math.ceil(math.log(DELTA) / math.log1p(-DENSITY))
    told: dict[str, Any] = {"tokens": n, "active": active, "tokens_needed": needed}
    if not active:
        told["below"] = -math.expm1(math.log(DELTA) / n)
        told["dead"] = n >= needed or "unknown"
        return told
    told["density"] = active / n
    ends = ratio_interval(readings.per_prompt(on), readings.per_prompt(torch.ones(n)))
    return told if ends is None else told | {"interval": list(ends)}


def histogram(values: Tensor) -> dict[str, Any]:
    """Counts of positive values in bars of equal width from 0 to the largest.

    Returns:
        ``edges``, one more than ``counts``. A bar holds what is above its lower edge, up to its
        upper one.
    """
    bars = bin_numbers(values, BARS)
    counts = torch.bincount(bars[bars >= 0], minlength=BARS)
    edges = (torch.arange(BARS + 1, dtype=torch.float64) * float(values.max()) / BARS).tolist()
    return {"edges": edges, "counts": counts.tolist()}


def bin_numbers(values: Tensor, n_bins: int) -> Tensor:
    """Which of the bins of equal width from 0 to the largest each value is in; -1 where not > 0."""
    found = (values.double() / float(values.max()) * n_bins).ceil().long() - 1
    return torch.where(values > 0, found.clamp(0, n_bins - 1), -1)


def draw_examples(
    model: TracedModel, readings: Readings, values: Tensor, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Tokens drawn at random from each bin of a feature's activations, the highest bin first.

    Each bin is as likely to be shown as the others, however few tokens it has: the largest
    activations alone make features look purer than they are (Bolukbasi et al. 2021,
    arXiv:2104.07143).

    Returns:
        Of each bin ``low`` (excluded), ``high``, ``tokens`` in it, and ``examples``: see
        :func:`excerpt`. Of different prompts where there are.
    """
    numbers, largest = bin_numbers(values, BINS), float(values.max())
    found = []
    for number in reversed(range(BINS)):
        inside = (numbers == number).nonzero().flatten()
        inside = inside[torch.randperm(len(inside), generator=generator)]
        found.append(
            {
                "low": largest * number / BINS,
                "high": largest * (number + 1) / BINS,
                "tokens": len(inside),
                "examples": [excerpt(model, readings, values, t) for t in _apart(readings, inside)],
            }
        )
    return found


def excerpt(model: TracedModel, readings: Readings, values: Tensor, token: int) -> dict[str, Any]:
    """A token in its text.

    Returns:
        ``prompt`` and ``position``, counted from 0; ``value`` there; ``first``, position of the
        first token that is shown; ``length`` of the prompt; ``texts`` and ``values`` of the tokens
        shown.
    """
    prompt, position = readings.place(token)
    ids, start = readings.prompts[prompt], int(readings.starts[prompt])
    first, last = max(0, position - BEFORE), min(len(ids), position + AFTER + 1)
    return {
        "prompt": prompt,
        "position": position,
        "value": float(values[token]),
        "first": first,
        "length": len(ids),
        "texts": model.token_texts(ids[first:last].tolist()),
        "values": values[start + first : start + last].tolist(),
    }


def _apart(readings: Readings, tokens: Tensor) -> list[int]:
    """The first few tokens, of different prompts if possible."""
    chosen: list[int] = []
    others: list[int] = []
    seen: set[int] = set()
    for token in tokens.tolist():
        prompt = readings.place(token)[0]
        (others if prompt in seen else chosen).append(token)
        seen.add(prompt)
        if len(chosen) == PER_BIN:
            break
    return [*chosen, *others][:PER_BIN]
