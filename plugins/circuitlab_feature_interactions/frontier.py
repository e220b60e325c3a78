"""Frontier: interactions of some dictionaries against those of others at equal reconstruction.

Dictionaries that reconstruct less have fewer interactions, penalty or not: with fewer active
latents there are fewer pairs. Hence settings are compared at equal reconstruction: the number of a
penalised setting with that of the independent ones at its very reconstruction, by a straight line
between the two neighbours on their frontier. Nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitlab_feature_interactions.intervals import draw_seeds

#: By what one setting beats another, beside its reconstruction.
EDGES = "edges_per_token"


@dataclass(frozen=True, eq=False)
class Drawn:
    """The numbers of one set of dictionaries in each draw of prompts.

    Attributes:
        setting: How it was trained, but for the seed; sets of one name are one group.
        base: The same without the penalty's own settings.
        penalised: Whether there was a penalty.
        seed: Of the training.
        numbers: By name, ``[draws]`` each; the first is the number itself.
    """

    setting: str
    base: str
    penalised: bool
    seed: int
    numbers: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Sets of one setting: means over seeds, drawn too.

    Attributes:
        setting: Its name.
        base: The same without the penalty's own settings.
        penalised: Whether there was a penalty.
        seeds: Of its sets.
        numbers: By name, ``[draws]`` each.
        by_seed: Of each set the numbers themselves.
    """

    setting: str
    base: str
    penalised: bool
    seeds: tuple[int, ...]
    numbers: Mapping[str, Tensor]
    by_seed: Sequence[Mapping[str, float]]


def group_sets(sets: Sequence[Drawn]) -> list[Group]:
    """Sets of the same settings together, in the order in which they come first."""
    found = []
    for setting in dict.fromkeys(one.setting for one in sets):
        own = [one for one in sets if one.setting == setting]
        names = [name for name in own[0].numbers if all(name in one.numbers for one in own)]
        seeds = tuple(one.seed for one in own)
        weights = draw_seeds(seeds)
        means = {
            name: (torch.stack([one.numbers[name] for one in own], 1) * weights).sum(1)
            for name in names
        }
        points = [{name: float(one.numbers[name][0]) for name in names} for one in own]
        first = own[0]
        found.append(Group(setting, first.base, first.penalised, seeds, means, points))
    return found


def frontier(groups: Sequence[Group], by: str) -> list[Group]:
    """The groups that no other beats, by rising reconstruction.

    A group is beaten by one that reconstructs as much or more with as few edges per token or fewer,
    one of the two strictly; all by the numbers on all prompts.

    Args:
        groups: Of one kind.
        by: Name of the number that says how much is reconstructed.
    """

    def place(group: Group) -> tuple[float, float]:
        return float(group.numbers[by][0]), float(group.numbers[EDGES][0])

    def beaten(group: Group) -> bool:
        kept, edges = place(group)
        others = (place(other) for other in groups)
        return any(k >= kept and e <= edges and (k, e) != (kept, edges) for k, e in others)

    return sorted((group for group in groups if not beaten(group)), key=place)


def at_reconstruction(
    wanted: Tensor, groups: Sequence[Group], by: str, names: Sequence[str]
) -> dict[str, Tensor]:
    """Numbers of the groups at a reconstruction, in each draw.

    In each draw the groups are put in order of their reconstruction, and a number is on the
    straight line between the two around the one that is wanted.

    Args:
        wanted: ``[draws]``.
        groups: At least one.
        by: Name of the number that says how much is reconstructed.
        names: Of the numbers to give.

    Returns:
        By name ``[draws]``; NaN where no group reconstructs so little, or none so much.
    """
    kept, order = torch.stack([group.numbers[by] for group in groups]).sort(dim=0, stable=True)
    left = ((kept <= wanted).sum(0) - 1).clamp(0, max(0, len(groups) - 2))[None]
    right = (left + 1).clamp(max=len(groups) - 1)
    start, end = kept.gather(0, left)[0], kept.gather(0, right)[0]
    share = (wanted - start) / (end - start).clamp(min=torch.finfo(kept.dtype).tiny)
    share = torch.where(end > start, share, 0.0)
    inside = (wanted >= kept[0]) & (wanted <= kept[-1])
    found = {}
    for name in names:
        values = torch.stack([group.numbers[name] for group in groups]).gather(0, order)
        low, high = values.gather(0, left)[0], values.gather(0, right)[0]
        found[name] = torch.where(inside, low + share * (high - low), torch.nan)
    return found


def differences(group: Group, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The group's numbers less the others' in each draw; of edges per token also the share."""
    found = {name: group.numbers[name] - values for name, values in others.items()}
    if EDGES in others:
        found[f"{EDGES}_share"] = found[EDGES] / others[EDGES]
    return found
