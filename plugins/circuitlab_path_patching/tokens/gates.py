"""Token gates: sets of tokens whose effect together is not the sum of their effects alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import mean_intervals
from circuitlab_path_patching.gates.types import (
    FLAT,
    Gate,
    classify,
    denoising,
    interaction,
    named_dividends,
    noising,
    shapley,
    table_rows,
)
from circuitlab_path_patching.tokens.estimates import Estimate, estimates

if TYPE_CHECKING:
    from circuitlab import CircuitGraph, EncodedTask
    from circuitlab_path_patching.tokens.effects import Subset, TokenEffects

#: Least size of an interaction that becomes a gate, as a share of the largest effect.
STRONG = 0.1
#: Gates of a circuit; what they leave out is counted.
MAX_GATES = 6
#: Members up to which a gate's whole table is kept.
MAX_TABLE = 4

_MEANING = {
    "AND": ("both are needed", "all are needed"),
    "OR": ("either suffices", "any one suffices"),
    "XOR": ("one without the other", "an odd number of them"),
    "MIXED": ("no one rule fits", "no one rule fits"),
}


@dataclass(frozen=True)
class TokenGate:
    """A set of tokens that interact.

    Attributes:
        members: Their positions from the end.
        gate: What they compute.
        interaction: What two of them do beyond each, the mean over all two, with the others both
            ablated and not: positive for AND, negative for OR, of tokens that help.
        joint: Score of ablating all of them.
        table: The metric in all mixtures, ``[2**k, n]``, of the pairs that have them all.
        shares: Shapley value of each member in the joint score; they sum to it.
    """

    members: Subset
    gate: Gate
    interaction: Estimate
    joint: Estimate
    table: Tensor
    shares: list[float]

    def sentence(self, names: Mapping[int, str]) -> str:
        """What it says, in one line."""
        members = [names[position] for position in self.members]
        kind = self.gate.type
        joined = f"{kind} of {', '.join(members)}" if kind == "MIXED" else f" {kind} ".join(members)
        meaning = _MEANING[kind][len(members) > 2]
        return (
            f"{joined}: {meaning} (interaction {self.interaction}, together {self.joint.mean:.3g}, "
            f"fit {self.gate.fit:.2f})"
        )


def effect_scale(effects: TokenEffects) -> float:
    """The largest mean effect, of a set of tokens or of the whole corrupt prompts, at least 0."""
    scale = abs(float((effects.corrupt - effects.clean).mean()))
    return max([scale, *(abs(effects.mean(subset)) for subset in effects.scores)])


def find_gates(
    effects: TokenEffects,
    pairs: EncodedTask,
    scores: Mapping[Subset, Estimate],
    dividends: Mapping[Subset, Estimate],
    seed: int,
) -> list[TokenGate]:
    """Sets with a strong and sure dividend, strongest first.

    Strong is a share of :func:`effect_scale`. Pairs are
    AND, OR, XOR or MIXED; a larger set is named only where one rule fits it, and a set within it of
    the same type says nothing new and is left out.

    Args:
        effects: What was measured.
        pairs: The task.
        scores: Mean score of each set.
        dividends: Mean dividend of each set of two or more.
        seed: Of the bootstrap that tells how sure a type is.
    """
    scale = effect_scale(effects)
    gates: list[TokenGate] = []
    for subset in sorted(dividends, key=lambda subset: (-len(subset), subset)):
        if abs(dividends[subset].mean) < STRONG * scale or not dividends[subset].sure:
            continue
        table = effects.table(subset)
        live = torch.ones(len(subset), table.shape[1], dtype=torch.bool)
        gate = classify(table, live, scale=scale, seed=seed)
        named = ("AND", "OR", "XOR") if len(subset) > 2 else ("AND", "OR", "XOR", "MIXED")
        within = any(set(subset) < set(g.members) and g.gate.type == gate.type for g in gates)
        if gate.type not in named or within:
            continue
        shares = [0.0 - share for share in shapley(table).mean(1).tolist()]
        members = combinations(range(len(subset)), 2)
        between = torch.stack([interaction(table, i, j) for i, j in members]).mean(0)
        values = torch.zeros_like(effects.clean).masked_scatter_(effects.has(subset), between)
        found = estimates({subset: values}, effects, pairs, seed)[subset]
        gates.append(TokenGate(subset, gate, found, scores[subset], table, shares))
    return sorted(gates, key=lambda gate: (-abs(dividends[gate.members].mean), gate.members))


def add_gates(
    circuit: CircuitGraph,
    gates: list[TokenGate],
    effects: TokenEffects,
    names: Mapping[int, str],
    target: str,
    seed: int,
) -> None:
    """Put the strongest gates between their members and what is measured.

    Their tables and dividends go into ``graph["gates"]``.
    """
    gap = float((effects.clean - effects.corrupt).mean())
    entries = []
    for number, found in enumerate(gates[:MAX_GATES], 1):
        name = f"gate{number}"
        members = [names[position] for position in found.members]
        circuit.add_component(
            name,
            kind="gate",
            layer=0,
            gate=found.gate.type,
            members=members,
            interaction=found.interaction.mean,
            interval=found.interaction.bounds,
            fit=found.gate.fit,
            support=found.gate.support,
        )
        for member, share in zip(members, found.shares, strict=True):
            # Where each member can stand in for the others, each is redundant.
            circuit.add_effect(member, name, share, redundant=found.gate.type == "OR")
        circuit.add_effect(name, target, found.joint.mean, interval=found.joint.bounds)
        entries.append({"name": name, **_entry(found, members, gap, seed)})
    circuit.graph["gates"] = entries


def _entry(found: TokenGate, members: list[str], gap: float, seed: int) -> dict[str, Any]:
    """A gate as data; noise and denoise are shares of the task's effect, where there is one."""
    table, gate = found.table, found.gate
    losses, gains = noising(table).mean(1), denoising(table).mean(1)
    entry: dict[str, Any] = {
        "type": gate.type,
        "members": members,
        "interaction": found.interaction.mean,
        "interval": found.interaction.bounds,
        "joint": found.joint.mean,
        "sum_of_singles": -float(losses.sum()) + 0.0,
        "redundancy": gate.redundancy,
        "fit": gate.fit,
        "support": gate.support,
    }
    if abs(gap) > FLAT * abs(found.joint.mean):
        entry["noise"] = (losses / gap).tolist()
        entry["denoise"] = (gains / gap).tolist()
    if len(members) <= MAX_TABLE:
        entry["table"] = table_rows(table, mean_intervals(table, seed))
        entry["dividends"] = named_dividends(table, members)
    return entry
