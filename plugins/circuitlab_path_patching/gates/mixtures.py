"""Mixtures: the metric with each member of a group clean or corrupt, in every combination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from circuitlab import distinct_rows, track
from circuitlab_path_patching.gates.groups import Group, group_of

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Edge, EncodedTask, Mode, Patcher
    from circuitlab_path_patching.effects import Setting

#: A source whose other output differs by less, as a share of its own, is not live.
LIVE = 1e-6
#: A member that changes the metric by less, as a share of what is said to be least, is not live.
FAINT = 0.01
#: Other prompts that a clean prompt is crossed with, at most.
CROSSINGS = 4


def mixtures(setting: Setting, members: Sequence[Edge | str], *, mode: Mode) -> Tensor:
    """The metric in all mixtures of edges, or of nodes, which are all of their out-edges.

    In mode ``noise`` everything else runs from the clean prompt, in ``denoise`` from the corrupt
    one. Members that differ from that carry their other run's output; the other members, and all
    else, carry what is recomputed. (Those of one group of nodes may read each other.)

    Returns:
        ``[2**k, n_pairs]``, float64: bit i of the row is set where member i carries its clean
        value.

    Raises:
        OptionError: there are no members, more than 8, or two that share an edge; or mode
            ``denoise`` with another ablation than ``counterfactual``.
        GraphError: the model has no such member.
        NumericsError: an activation is not finite.
    """
    group = group_of(members, setting.model.wiring)
    return measure_tables(setting, [group], mode)[0].values


@dataclass(frozen=True)
class Table:
    """What :func:`mixtures` measures.

    Attributes:
        values: ``[2**k, n_pairs]``, float64.
        live: Whether a member's two values differ, ``[k, n_pairs]``; in what
            :func:`measure_groups` gives, and the metric with them, in any state of the others.
        distinct: Columns that repeat no earlier pair.
    """

    values: Tensor
    live: Tensor
    distinct: tuple[int, ...]

    def moving(self, least: float) -> Tensor:
        """Which members change the metric by more, in any state of the others, ``[k, n_pairs]``."""
        moved = []
        for i in range(len(self.live)):
            halves = self.values.view(-1, 2, 1 << i, self.values.shape[1])
            moved.append((halves[:, 1] - halves[:, 0]).abs().amax((0, 1)) > least)
        return torch.stack(moved)

    def subset(self, places: Sequence[int], mode: Mode) -> Table:
        """The table of some of the members; the others are as everything else is."""
        rest = sum(1 << i for i in range(len(self.live)) if i not in places)
        rows = [
            (rest if mode == "noise" else 0)
            + sum(1 << place for bit, place in enumerate(places) if row >> bit & 1)
            for row in range(1 << len(places))
        ]
        return replace(self, values=self.values[rows], live=self.live[list(places)])


#: A group's table in each mode.
Tables = Mapping["Mode", Table]


@dataclass(frozen=True)
class Measured:
    """A group and its tables.

    Attributes:
        group: The group.
        own: For each mode the table of the task's own pairs.
        tables: What the gate is told from: ``own``, or crossed contrasts where ``own`` cannot tell.
    """

    group: Group
    own: Tables
    tables: Tables

    @property
    def crossed(self) -> bool:
        """Whether the gate is told from crossed contrasts, see :func:`measure_groups`."""
        return self.own is not self.tables

    def apart(self, least: float) -> bool:
        """Whether two members move the metric, but no two in the same of the task's pairs."""
        return _apart(self.own, least)

    def subset(self, places: Sequence[int]) -> Measured:
        """The same of some of the members."""
        tables = {mode: table.subset(places, mode) for mode, table in self.tables.items()}
        own = {mode: table.subset(places, mode) for mode, table in self.own.items()}
        return Measured(self.group.subset(places), own, tables if self.crossed else own)


def measure_groups(setting: Setting, groups: Sequence[Group], least: float) -> list[Measured]:
    """All mixtures of all groups, in the modes of the setting.

    Where two members change the metric, but never in the same pair, the pairs say nothing of what
    these do together. Then the clean prompt of a pair is run against the clean prompt of another
    one of the same length, and scored by the answers of the first: *crossed* contrasts. Of up to
    four such partners, each pair takes the one in which most members change the metric.

    Args:
        setting: How to measure.
        groups: What to measure.
        least: A smaller change of the metric is none.

    Raises:
        NumericsError: an activation is not finite.
    """
    own = _tables(setting, groups, least)
    tables = [*own]
    apart = [number for number, found in enumerate(own) if _apart(found, least)]
    if apart and setting.ablation == "counterfactual":
        chosen = [groups[number] for number in apart]
        for number, crossed in zip(apart, _crossed(setting, chosen, least), strict=True):
            tables[number] = crossed or own[number]
    return [Measured(*parts) for parts in zip(groups, own, tables, strict=True)]


def measure_tables(setting: Setting, groups: Sequence[Group], mode: Mode) -> list[Table]:
    """The mixture tables of groups in one mode."""
    rows = setting.model.wiring.source_rows
    values: list[list[Tensor]] = [[] for _ in groups]
    live: list[Tensor] = []
    for patcher in setting.patchers(mode):
        live.append(_live(patcher).cpu())
        for number, group in enumerate(track(groups, f"mixtures of {len(groups)} groups, {mode}")):
            values[number].append(patcher.sets(_sets(group, mode)).cpu())
    return [
        Table(
            torch.cat(parts, 1),
            torch.cat([_live_members(group, part, rows) for part in live], 1),
            tuple(distinct_rows(setting.pairs)),
        )
        for group, parts in zip(groups, values, strict=True)
    ]


def joint_effects(
    setting: Setting, sets: Sequence[Sequence[Edge]], mode: Mode, stage: str
) -> Tensor:
    """Effects ``[n_sets, n_pairs]`` of sets of edges patched together; negative helps."""
    sign = 1 if mode == "noise" else -1
    return torch.cat(
        [
            (sign * (patcher.sets(sets) - patcher.base_score)).cpu()
            for patcher in track(setting.patchers(mode), f"{stage}, {mode}")
        ],
        1,
    )


def _sets(group: Group, mode: Mode) -> list[list[Edge]]:
    """What is patched in each mixture: the members that are not as the base run is."""
    base = int(mode == "noise")
    return [
        [edge for i, m in enumerate(group.members) if (row >> i & 1) != base for edge in m.edges]
        for row in range(1 << len(group))
    ]


def _live(patcher: Patcher) -> Tensor:
    """Which sources write something else in the other run, ``[n_sources, batch]``."""
    outputs = patcher.model.source_outputs(patcher.base)
    live: Tensor = patcher.difference.flatten(2).norm(dim=2) > LIVE * outputs.flatten(2).norm(dim=2)
    return live


def _live_members(group: Group, live: Tensor, rows: Mapping[str, int]) -> Tensor:
    """Which members carry something else in the other run, ``[k, batch]``."""
    sources = [sorted({rows[edge.source] for edge in m.edges}) for m in group.members]
    return torch.stack([live[chosen].any(0) for chosen in sources])


def _tables(setting: Setting, groups: Sequence[Group], least: float) -> list[Tables]:
    """The mixture tables of groups in each mode."""
    if not groups:
        return []
    found: dict[Mode, list[Table]] = {
        mode: [
            replace(table, live=table.live & table.moving(FAINT * least))
            for table in measure_tables(setting, groups, mode)
        ]
        for mode in setting.modes
    }
    return [{mode: tables[n] for mode, tables in found.items()} for n in range(len(groups))]


def _movers(tables: Tables, least: float) -> Tensor:
    """Members that move the metric, in either mode, ``[k, n_pairs]``."""
    return torch.stack([table.moving(least) for table in tables.values()]).any(0)


def _apart(tables: Tables, least: float) -> bool:
    """Whether two members move the metric, but no two in the same pair."""
    moving = _movers(tables, least)
    return int(moving.any(1).sum()) >= 2 and not bool((moving.sum(0) >= 2).any())


def _crossed(setting: Setting, groups: Sequence[Group], least: float) -> list[Tables | None]:
    """Tables of crossed contrasts of the pairs in which two members move; None if there are none.

    See :func:`measure_groups`.
    """
    pairs = setting.pairs
    orders = [_partners(pairs, offset) for offset in range(1, min(CROSSINGS, len(pairs) - 1) + 1)]
    tried = [
        _tables(
            replace(setting, pairs=replace(pairs, corrupt=pairs.clean.rows(order))), groups, least
        )
        for order in orders
    ]
    found: list[Tables | None] = []
    for number in range(len(groups)):
        tables = [part[number] for part in tried]
        movers = [_movers(part, least).sum(0).tolist() for part in tables]
        chosen: list[tuple[int, int]] = []
        for row, counts in enumerate(zip(*movers, strict=True)):
            if max(counts) >= 2:
                chosen.append((counts.index(max(counts)), row))
        found.append(_columns(tables, chosen) if chosen else None)
    return found


def _columns(tables: Sequence[Tables], chosen: Sequence[tuple[int, int]]) -> Tables:
    """One table of columns ``(table, column)``."""
    result: dict[Mode, Table] = {}
    for mode in tables[0]:
        parts = [part[mode] for part in tables]
        distinct = [n for n, (which, row) in enumerate(chosen) if row in parts[which].distinct]
        result[mode] = Table(
            torch.stack([parts[which].values[:, row] for which, row in chosen], 1),
            torch.stack([parts[which].live[:, row] for which, row in chosen], 1),
            tuple(distinct),
        )
    return result


def _partners(pairs: EncodedTask, offset: int) -> list[int]:
    """For each pair another one whose clean prompt is as long, so many places further on."""
    alike: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(pairs.clean.mask.sum(1).tolist()):
        alike[length].append(row)
    found = list(range(len(pairs)))
    for rows in alike.values():
        for place, row in enumerate(rows):
            found[row] = rows[(place + offset) % len(rows)]
    return found
