"""Estimates: means over the pairs that a set of tokens was ablated in, and how sure they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from circuitlab import distinct_rows, mean_intervals

if TYPE_CHECKING:
    from circuitlab import EncodedTask
    from circuitlab_path_patching.tokens.effects import Subset, TokenEffects


class Estimate(NamedTuple):
    """A mean over pairs and its 95 % interval; None where there is no second pair."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def bounds(self) -> list[float] | None:
        """The interval as a circuit holds it."""
        return None if self.interval is None else list(self.interval)

    @property
    def sure(self) -> bool:
        """Whether it is not 0, as far as the interval says where there is one."""
        low, high = self.interval or (self.mean, self.mean)
        return low > 0 or high < 0

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"


def estimates(
    values: Mapping[Subset, Tensor], effects: TokenEffects, pairs: EncodedTask, seed: int
) -> dict[Subset, Estimate]:
    """Mean of each set's values ``[n_pairs]`` over the pairs that have the set.

    A pair that repeats an earlier one counts in the mean and not in the interval.
    """
    distinct = torch.zeros(len(pairs), dtype=torch.bool)
    distinct[distinct_rows(pairs)] = True
    alike: dict[tuple[bool, ...], list[Subset]] = defaultdict(list)
    for subset in values:
        alike[tuple(effects.has(subset).tolist())].append(subset)
    found: dict[Subset, Estimate] = {}
    for having, subsets in alike.items():
        among = torch.tensor(having)
        table = torch.stack([values[subset] for subset in subsets])
        means = table[:, among].mean(1).tolist()
        intervals = mean_intervals(table[:, among & distinct], seed)
        found.update(zip(subsets, map(Estimate, means, intervals), strict=True))
    return {subset: found[subset] for subset in values}
