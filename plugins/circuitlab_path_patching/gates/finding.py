"""Gates: groups of a circuit's edges and nodes whose members act as AND, OR, ADD or XOR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import mean_intervals
from circuitlab_path_patching.effects import measure
from circuitlab_path_patching.gates.composition import Composition, composition
from circuitlab_path_patching.gates.groups import Group, find_groups, parse_groups
from circuitlab_path_patching.gates.mixtures import Measured, Table, joint_effects, measure_groups
from circuitlab_path_patching.gates.types import (
    FLAT,
    Gate,
    classify,
    denoising,
    interaction,
    named_dividends,
    noising,
    table_rows,
)
from circuitlab_path_patching.measures import stronger, sure_effect
from circuitlab_path_patching.patches import node_patch

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Interval, Mode
    from circuitlab_path_patching.effects import Setting

Relation = Literal["redundant", "synergistic", "additive"]

#: Groups that are measured of those that are found: those of largest joint effect.
MAX_GROUPS = 12
#: Least share of the joint effect by which a group is redundant or synergistic, and least share of
#: the task's effect by which two members of a larger group are a gate of their own.
STRONG = 0.1
#: Tables closer than this share of the task's effect are of one gate, seen at two places.
SAME = 1e-3
#: Share of their effect that runs between nodes from which they are no gate but a chain.
SERIAL = 0.5


@dataclass(frozen=True)
class Found:
    """What is known of a group.

    Attributes:
        measured: Its tables.
        gates: Its gate in each mode.
        mode: The mode that speaks for it: ``noise``, unless only ``denoise`` shows anything.
        interaction: Of two members, the mean over all twos that are live, in metric units.
        interval: Of ``interaction``; None for one pair.
        relation: What all members together do, against the sum of what each one alone does when it
            turns corrupt: ``redundant`` for more, ``synergistic`` for less; None where the joint
            effect is flat, or the opposite of what single members do.
        composition: Of nodes some of which read others.
    """

    measured: Measured
    gates: Mapping[Mode, Gate]
    mode: Mode
    interaction: float
    interval: Interval | None
    relation: Relation | None
    composition: Composition | None = None

    @property
    def group(self) -> Group:
        """Its members."""
        return self.measured.group

    @property
    def gate(self) -> Gate:
        """The gate in the mode that speaks for it."""
        return self.gates[self.mode]

    @property
    def table(self) -> Table:
        """The table in the mode that speaks for it."""
        return self.measured.tables[self.mode]

    @property
    def joint(self) -> float:
        """Effect of all members together in that table, negative helps."""
        return float((self.table.values[0] - self.table.values[-1]).mean())

    @property
    def singles(self) -> float:
        """Sum of the effects of each member alone turned corrupt, in that table."""
        return -float(noising(self.table.values).mean(1).sum()) + 0.0

    @property
    def chain(self) -> bool:
        """Whether members pass on the same thing, one after the other; that is no gate.

        Then breaking any one breaks all, and restoring any one restores all; or, of nodes, half of
        what they do runs through the edges between them.
        """
        types = [self.gates[mode].type for mode in ("noise", "denoise") if mode in self.gates]
        serial = self.composition.serial if self.composition else None
        return types == ["AND", "OR"] or (serial is not None and serial >= SERIAL)

    @property
    def named(self) -> bool:
        """Whether it is a gate with a name; a sum whose parts do not sum up is none."""
        if self.gate.type == "ADD" and self.relation in ("redundant", "synergistic"):
            return False
        return self.gate.type in ("AND", "OR", "ADD", "XOR") and not self.chain

    def redundant(self, place: int) -> bool:
        """Whether the others stand in for half or more of what a member of the group does."""
        f = self.table.values
        lost, gained = (float(rows[place].mean()) for rows in (noising(f), denoising(f)))
        return self.relation == "redundant" and abs(lost) <= abs(gained) / 2


def add_gates(
    setting: Setting, circuit: CircuitGraph, *, automatic: bool, groups: str | None
) -> None:
    """Measure groups of a circuit's edges and nodes, and put what they compute into it.

    ``graph["gates"]`` lists them all; of type ``SERIES`` are those of :attr:`Found.chain`. Those
    called AND, OR, ADD or XOR are also components of kind ``gate``. An arrow into a gate has the
    effect of its member, the arrow out of it the effect of all members together. An effect that an
    arrow into a gate stands for names it as ``gate``; one that others can stand in for has
    ``redundant``. ``graph["findings"]`` says it in words.

    Args:
        setting: How to measure.
        circuit: What to look in.
        automatic: Look for groups in the circuit; the twelve of largest joint effect are measured.
            A member of an AND gate does nothing by itself in mode ``denoise``, nor one of an OR
            gate in mode ``noise``: for both to be found, both modes are needed.
        groups: Groups that are named, see :func:`.groups.parse_groups`.

    Raises:
        OptionError: ``groups`` cannot be read or is not in the model.
        NumericsError: an activation is not finite.
    """
    from circuitlab_path_patching.gates.drawing import draw_gates, findings

    wiring = setting.model.wiring
    named = parse_groups(groups, wiring) if groups else []
    change = setting.change()
    scale = float(change.square().mean().sqrt())
    found = [
        _judged(setting, one, scale)
        for one in measure_groups(setting, list(dict.fromkeys(named)), FLAT * scale)
    ]
    if automatic:
        candidates = [g for g in _candidates(setting, circuit, FLAT * scale) if g not in named]
        found = _different(found, [*_automatic(setting, candidates, scale)], scale)
    effect = sure_effect(change)
    entries = [
        _entry(f"gate{number}", one, effect, setting.seed) for number, one in enumerate(found, 1)
    ]
    draw_gates(circuit, setting, found, effect)
    circuit.graph["gates"] = [entry | {"drawn": entry["name"] in circuit} for entry in entries]
    circuit.graph["findings"] = circuit.graph.get("findings", {}) | findings(found, effect)


# --- groups that are looked for -------------------------------------------------------------------


def _candidates(setting: Setting, circuit: CircuitGraph, least: float) -> list[Group]:
    """Groups found in the circuit, those of largest joint effect."""
    model, wiring = setting.model, setting.model.wiring
    present = {name.partition("[")[0] for name in circuit}
    names = [name for name in wiring.sources if name in present]
    totals = stronger(measure(setting, [node_patch(model, name) for name in names])).tolist()
    groups = find_groups(circuit, wiring, dict(zip(names, totals, strict=True)), least)
    if len(groups) <= MAX_GROUPS:
        return groups
    sets = [[edge for member in group.members for edge in member.edges] for group in groups]
    effects = {
        mode: joint_effects(setting, sets, mode, f"{len(groups)} groups") for mode in setting.modes
    }
    joint = stronger(effects).abs().tolist()
    # To six digits, so that rounding errors do not choose between groups that are alike.
    kept = sorted(range(len(groups)), key=lambda n: (-float(f"{joint[n]:.5e}"), n))[:MAX_GROUPS]
    return [groups[number] for number in sorted(kept)]


def _automatic(setting: Setting, groups: Sequence[Group], scale: float) -> Iterator[Found]:
    """These groups, and two members of a larger one that are a gate by themselves."""
    least = FLAT * scale
    measured = measure_groups(setting, groups, least)
    apart = [
        one.group.subset(places)
        for one in measured
        for places in _twos(one)
        if one.subset(places).apart(least)
    ]
    new = [group for group in dict.fromkeys(apart) if group not in groups][:MAX_GROUPS]
    for one in [*measured, *measure_groups(setting, new, least)]:
        found = _judged(setting, one, scale)
        yield found
        if found.gate.type == "MIXED":
            yield from _within(setting, one, scale)


def _within(setting: Setting, measured: Measured, scale: float) -> Iterator[Found]:
    """Twos that interact strongly, each member in one at most."""
    twos = [_judged(setting, measured.subset(places), scale) for places in _twos(measured)]
    used: set[str] = set()
    for one in sorted(twos, key=lambda one: -abs(one.interaction)):
        strong = abs(one.interaction) >= STRONG * scale and _sure(one.interval)
        if strong and one.gate.type in ("AND", "OR", "XOR") and used.isdisjoint(one.group.names):
            used.update(one.group.names)
            yield one


def _twos(measured: Measured) -> Iterator[tuple[int, ...]]:
    """All twos of a group that has more members."""
    size = len(measured.group)
    return combinations(range(size), 2) if size > 2 else iter(())


def _different(first: list[Found], more: list[Found], scale: float) -> list[Found]:
    """``first``, and of the others what is not the same gate seen at another place.

    What is patched further up or down along the same way has the same tables.
    """
    kept = list(first)
    for one in more:
        if not any(_alike(one.measured, other.measured, SAME * scale) for other in kept):
            kept.append(one)

    def rank(one: Found) -> tuple[bool, bool, bool, float]:
        size = max(abs(one.joint), abs(one.interaction))
        adds = one.named and one.gate.type == "ADD"
        return not one.named, adds, one.relation != "redundant", -float(f"{size:.5e}")

    return first + sorted(kept[len(first) :], key=rank)


def _alike(one: Measured, other: Measured, least: float) -> bool:
    """Whether all tables are the same."""
    return all(
        table.values.shape == other.tables[mode].values.shape
        and bool(((table.values - other.tables[mode].values).abs() <= least).all())
        for mode, table in one.tables.items()
    )


# --- what a group is ------------------------------------------------------------------------------


def _judged(setting: Setting, measured: Measured, scale: float) -> Found:
    seed, group = setting.seed, measured.group
    gates = {
        mode: classify(
            table.values[:, table.distinct], table.live[:, table.distinct], scale=scale, seed=seed
        )
        for mode, table in measured.tables.items()
    }
    shown = [mode for mode, gate in gates.items() if gate.type != "INERT"]
    mode = shown[0] if shown else next(iter(gates))
    table = measured.tables[mode]
    between, distinct = _interactions(table)
    return Found(
        measured,
        gates,
        mode,
        interaction=float(between.mean()) if len(between) else 0.0,
        interval=mean_intervals(between[None, distinct], seed)[0] if distinct else None,
        relation=_relation(table, FLAT * scale, seed),
        composition=composition(setting, group, mode, least=FLAT * scale)
        if group.of_nodes and group.internal()
        else None,
    )


def _interactions(table: Table) -> tuple[Tensor, list[int]]:
    """Mean interaction of the members that are live together, of each pair that has two of them.

    Also which of these repeat no earlier pair.
    """
    columns = (table.live.sum(0) >= 2).nonzero()[:, 0].tolist()
    total = torch.zeros(table.values.shape[1], dtype=torch.float64)
    count = torch.zeros_like(total)
    for i, j in combinations(range(len(table.live)), 2):
        both = table.live[i] & table.live[j]
        total += torch.where(both, interaction(table.values, i, j), 0.0)
        count += both
    distinct = [place for place, column in enumerate(columns) if column in table.distinct]
    return total[columns] / count[columns], distinct


def _relation(table: Table, least: float, seed: int) -> Relation | None:
    f = table.values
    joint, singles = f[-1] - f[0], noising(f).sum(0)
    mean = float(joint.mean())
    if abs(mean) <= least or float(singles.mean()) / mean < -STRONG:
        return None
    excess = (joint - singles) * (1.0 if mean > 0 else -1.0)
    interval = mean_intervals(excess[None, list(table.distinct)], seed)[0]
    if abs(float(excess.mean())) < STRONG * abs(mean) or not _sure(interval):
        return "additive"
    return "redundant" if float(excess.mean()) > 0 else "synergistic"


def _sure(interval: Interval | None) -> bool:
    """Whether an interval, where there is one, leaves 0 out."""
    return interval is None or interval[0] > 0 or interval[1] < 0


def _entry(name: str, one: Found, effect: float | None, seed: int) -> dict[str, Any]:
    """A group as data; effects negative where they help, ``noise`` and ``denoise`` shares."""
    group, gate, f = one.group, one.gate, one.table.values
    tables = one.measured.tables
    effects = {
        "noise": -noising(tables.get("noise", one.table).values).mean(1) + 0.0,
        "denoise": -denoising(tables.get("denoise", one.table).values).mean(1) + 0.0,
    }
    entry: dict[str, Any] = {
        "name": name,
        "type": "SERIES" if one.chain else gate.type,
        "types": {mode: found.type for mode, found in one.gates.items()},
        "background": "clean" if one.mode == "noise" else "corrupt",
        "crossed": one.measured.crossed,
        "group": str(group),
        "members": group.names,
        "interaction": one.interaction,
        "interval": None if one.interval is None else list(one.interval),
        "joint": one.joint,
        "sum_of_singles": one.singles,
        "redundancy": None if one.relation is None else 1 - one.singles / one.joint,
        "relation": one.relation,
        "fit": gate.fit,
        "support": gate.support,
        "n_pairs": gate.n_pairs,
        "dividends": named_dividends(f, group.names),
        "table": table_rows(f, mean_intervals(f[:, one.table.distinct], seed)),
    }
    for mode, values in effects.items():
        entry[f"{mode}_effect"] = values.tolist()
        if effect is not None:
            entry[mode] = (values / effect + 0.0).tolist()
    if one.composition is not None:
        entry["composition"] = one.composition.to_json()
    return entry
