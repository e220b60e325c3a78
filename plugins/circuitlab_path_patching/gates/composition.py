"""Composition against parallel: whether nodes of a group work on one another's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuitlab import OptionError, distinct_rows, ratio_interval
from circuitlab_path_patching.gates.mixtures import joint_effects

if TYPE_CHECKING:
    from circuitlab import Mode
    from circuitlab_path_patching.effects import Setting
    from circuitlab_path_patching.gates.groups import Group


@dataclass(frozen=True)
class Composition:
    """What edges within a group of nodes carry of its effect.

    Three sets of edges are patched, each by itself: *internal*, from one member to another;
    *bypass*, the other edges out of the members that another one reads; *joint*, all edges out of
    all members. Where members work in series, breaking the internal edges alone breaks what the
    group does; where they work in parallel, it breaks nothing.

    Attributes:
        serial: internal / joint: 1 in series, 0 in parallel; outside of that where the internal
            edges do more than the group, or the opposite. None where the joint effect is flat.
        interval: Of ``serial``, 95 %; None for one pair, or where a resample has no joint effect.
        internal: Effect in metric units, negative helps; ``bypass`` and ``joint`` likewise.
    """

    serial: float | None
    interval: tuple[float, float] | None
    internal: float
    bypass: float
    joint: float

    def to_json(self) -> dict[str, Any]:
        """What a circuit says of it."""
        return {
            "serial": self.serial,
            "interval": None if self.interval is None else list(self.interval),
            "internal": self.internal,
            "bypass": self.bypass,
            "joint": self.joint,
        }


def composition(setting: Setting, group: Group, mode: Mode, *, least: float = 0.0) -> Composition:
    """Test a group of nodes, breaking the clean run or, in mode ``denoise``, restoring the corrupt.

    Args:
        setting: How to measure.
        group: Two nodes or more.
        mode: Which run.
        least: A joint effect of this size or less is flat.

    Raises:
        OptionError: a member of the group is an edge.
        NumericsError: an activation is not finite.
    """
    if not group.of_nodes:
        raise OptionError(
            f"group {str(group)!r} has edges; whether its members work in series is asked of nodes"
        )
    internal = group.internal()
    read, inside = {edge.source for edge in internal}, set(internal)
    every = [edge for member in group.members for edge in member.edges]
    bypass = [edge for edge in every if edge.source in read and edge not in inside]
    values = joint_effects(setting, [internal, bypass, every], mode, "series or parallel")
    means = values.mean(1).tolist()
    if abs(means[2]) <= least:
        return Composition(None, None, *means)
    sign = -1.0 if means[2] < 0 else 1.0
    distinct = values[:, distinct_rows(setting.pairs)] * sign
    bounds = ratio_interval(distinct[0], distinct[2], setting.seed)
    return Composition(means[0] / means[2] + 0.0, bounds, *means)
