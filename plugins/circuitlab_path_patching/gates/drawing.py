"""Gates in a circuit: as components between their members and what reads them, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitlab import Edge
from circuitlab_path_patching.gates.types import denoising, noising
from circuitlab_path_patching.measures import effect_rows

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Interval, Mode
    from circuitlab_path_patching.effects import Setting
    from circuitlab_path_patching.gates.finding import Found
    from circuitlab_path_patching.gates.groups import Member
    from circuitlab_path_patching.measures import Row

#: Gates that are drawn, and groups of one kind that the result table names.
MAX_DRAWN, SHOWN = 6, 4

_SCORE = "; into a gate: of one member; out of it: of all"


def draw_gates(
    circuit: CircuitGraph, setting: Setting, found: Sequence[Found], effect: float | None
) -> None:
    """Add the gates that have a name, the first six that share no member.

    A gate of edges into one receiver stands before it, any other one before ``logits``. Those of
    edges out of one source stand behind what reads it.
    """
    drawn: set[Edge] = set()
    count = 0
    for number, one in enumerate(found, 1):
        for place, member in enumerate(one.group.members):
            for data in _effects_of(circuit, member):
                if one.redundant(place):
                    data["redundant"] = True
        edges = {edge for member in one.group.members for edge in member.edges}
        ends = one.group.ends()
        # What one component reads of others is told by the effects themselves, if it just adds up.
        plain = one.group.at_targets and one.gate.type == "ADD"
        room = count < MAX_DRAWN and drawn.isdisjoint(edges)
        if one.named and ends and room and not plain:
            _draw(circuit, setting, f"gate{number}", one, ends, effect)
            drawn |= edges
            count += 1
    if count:
        circuit.graph["score"] = f"{circuit.graph['score']}{_SCORE}"


def _draw(
    circuit: CircuitGraph,
    setting: Setting,
    name: str,
    one: Found,
    ends: list[str],
    effect: float | None,
) -> None:
    wiring = setting.model.wiring
    target, port = one.group.receiver or ("logits", "")
    for end in (*ends, target):
        if end not in circuit:
            kind, layer, head = wiring.component(end)
            circuit.add_component(
                end, kind=kind, layer=layer, **({} if head is None else {"head": head})
            )
    circuit.add_component(
        name,
        kind="gate",
        layer=max(wiring.component(end).layer for end in ends),
        gate=one.gate.type,
        members=one.group.names,
        interaction=one.interaction,
        interval=None if one.interval is None else list(one.interval),
        fit=one.gate.fit,
        support=one.gate.support,
        label=str(one.group),
    )
    *rows, joint = _rows(one, setting, effect)
    for place, (member, end, row) in enumerate(zip(one.group.members, ends, rows, strict=True)):
        redundant = one.redundant(place)
        circuit.add_effect(
            end, name, row.pop("score"), member=member.name, redundant=redundant, **row
        )
        if target == member.target or not member.target:
            for data in _effects_of(circuit, member):
                data["gate"] = name
    total = {} if one.group.receiver else {"kind": "total"}
    circuit.add_effect(name, target, joint.pop("score"), port=port, **total, **joint)


def _rows(one: Found, setting: Setting, effect: float | None) -> list[Row]:
    """Effect of each member alone and of all together, on the task's own pairs."""
    effects: dict[Mode, Tensor] = {}
    for mode, table in one.measured.own.items():
        f = table.values
        alone = noising(f) if mode == "noise" else denoising(f)
        effects[mode] = 0.0 - torch.cat([alone, (f[-1] - f[0])[None]])
    return effect_rows(effects, setting.pairs, effect, setting.seed)


def _effects_of(circuit: CircuitGraph, member: Member) -> list[dict[str, object]]:
    """Data of the circuit's effects that are this member's: its edges, or a node's total effect."""
    places = [tuple(edge) for edge in member.edges]
    if not member.target:
        places = [(member.source, "logits", "")]
    data = [circuit.edges[place] for place in places if circuit.has_edge(*place)]
    return [one for one in data if (one.get("kind") == "total") != bool(member.target)]


# --- in words -------------------------------------------------------------------------------------


def findings(found: Sequence[Found], effect: float | None) -> dict[str, str]:
    """Gates, redundancy and series, a sentence each."""
    gates = [_gate_words(one) for one in found if one.named]
    groups = f"{len(found)} group{'s' * (len(found) != 1)}"
    none = f"none with a name in {groups}" if found else "no groups to look in"
    words = {"gates": _listed(gates) or none}
    redundant = sorted((one for one in found if one.relation == "redundant"), key=_size)
    if redundant:
        words["redundancy"] = _listed([_redundancy_words(one, effect) for one in redundant])
    if series := [words for one in found for words in _series_words(one)]:
        words["composition"] = _listed(series)
    return words


def _size(one: Found) -> float:
    """Strongest first."""
    return -abs(one.joint)


def _listed(sentences: Sequence[str]) -> str:
    more = f"; {len(sentences) - SHOWN} more" if len(sentences) > SHOWN else ""
    return "; ".join(sentences[:SHOWN]) + more


def _gate_words(one: Found) -> str:
    crossed = ", told from crossed contrasts" * one.measured.crossed
    interval = _bounds(one.interval)
    return (
        f"{one.gate.type} {one.group}, interaction {one.interaction:+.2f}{interval}, "
        f"fit {one.gate.fit:.2f}{crossed}"
    )


def _redundancy_words(one: Found, effect: float | None) -> str:
    singles, joint = f"{one.singles:+.3g}", f"{one.joint:+.3g}"
    if effect is not None:
        shares = (round(one.singles / effect, 2) + 0.0, one.joint / effect)
        singles, joint = (f"{share:.2f}" for share in shares)
    return f"{one.group}: singles {singles} together, jointly {joint}"


def _series_words(one: Found) -> list[str]:
    """Nothing where nodes do not read one another."""
    tested = one.composition
    if tested is None or tested.serial is None:
        return []
    return [
        f"{one.group}: {tested.serial:.0%} of what they do together breaks with the edges between "
        f"them{_bounds(tested.interval)}"
    ]


def _bounds(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
