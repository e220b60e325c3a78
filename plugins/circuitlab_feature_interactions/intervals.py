"""Intervals: how far numbers move when other prompts, and other seeds, are drawn.

Prompts are drawn in groups, as many as before, with replacement, and the same draws serve every
number and every set of dictionaries, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuitlab import Interval
from circuitlab_feature_interactions.data import generator_of

#: Draws; most groups of prompts.
RESAMPLES, GROUPS = 1000, 200
_ENDS = (0.025, 0.975)


def group_prompts(n_prompts: int) -> Tensor:
    """The group of each prompt, ``[n_prompts]``: its own, or a random one of :data:`GROUPS`."""
    order = torch.randperm(n_prompts, generator=generator_of(0, n_prompts))
    return order % GROUPS


def draw_prompts(n_prompts: int) -> Tensor:
    """How often each draw has each prompt, ``[1 + RESAMPLES, n_prompts]``, float64.

    The first row has each prompt once: it gives the numbers themselves.
    """
    groups = group_prompts(n_prompts)
    return draw_groups(min(n_prompts, GROUPS))[:, groups]


def draw_groups(n: int) -> Tensor:
    """The same for ``n`` groups, ``[1 + RESAMPLES, n]``."""
    return torch.cat([torch.ones(1, n, dtype=torch.float64), _counts(n, n, generator_of(1, n))])


def draw_seeds(seeds: Sequence[int]) -> Tensor:
    """Weight of each seed in each draw, ``[1 + RESAMPLES, n]``, rows of sum 1.

    Of n seeds n - 1 are drawn, with replacement: the mean of n draws would vary too little, by the
    factor ``(n - 1) / n`` (Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans).
    The same seeds are drawn alike.
    """
    n = len(seeds)
    even = torch.full((1, n), 1 / n, dtype=torch.float64)
    if n == 1:
        return even.expand(1 + RESAMPLES, 1)
    drawn = _counts(n, n - 1, generator_of(2, *sorted(seeds))) / (n - 1)
    ranks = torch.tensor(seeds).argsort().argsort()
    return torch.cat([even, drawn[:, ranks]])


def interval_of(values: Tensor) -> Interval | None:
    """95 % interval of a number from its draws, ``[1 + RESAMPLES]``, the first the number itself.

    Percentiles, moved by as much as the draws' mean is off the number: fewer distinct prompts show
    fewer pairs of latents, so that draws of a Gini coefficient lie above it. None where more than
    5 % of the draws have no number.
    """
    drawn = values[1:][values[1:].isfinite()]
    if len(drawn) < 0.95 * (len(values) - 1) or not bool(values[0].isfinite()):
        return None
    moved = drawn - drawn.mean() + values[0]
    low, high = torch.quantile(moved, moved.new_tensor(_ENDS)).tolist()
    return low, high


def _counts(n: int, draws: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(n, (RESAMPLES, draws), generator=generator)
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
