"""What is said of a feature circuit: masses, ablations, loss, other dictionaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, distinct_rows
from circuitlab_feature_interactions.ablations import (
    KeptEdges,
    Recovery,
    agreement,
    exact_effects,
    sample_edges,
)
from circuitlab_feature_interactions.dictionary_sets import SET, DictionarySet, read_set
from circuitlab_feature_interactions.drawing import (
    Compared,
    comparison,
    edges_per_target,
    latent_name,
)
from circuitlab_feature_interactions.gathering import COMPUTED, Gathered, Interactions, gather

if TYPE_CHECKING:
    from circuitlab import CircuitGraph, EncodedTask, Interval, Tokens, TracedModel
    from circuitlab_feature_interactions.edges import EdgeTable

#: Prompts on which the kept edges alone are run.
LOSS_PROMPTS = 64


@dataclass(frozen=True)
class Selected:
    """Edges of a pair of sites that are in the circuit.

    Attributes:
        interactions: All that was gathered.
        tables: All edges that were ever active together, by port.
        kept: Those in the circuit, by port.
    """

    interactions: Interactions
    tables: dict[str, EdgeTable]
    kept: dict[str, EdgeTable]

    @property
    def together(self) -> dict[int, frozenset[int]]:
        """Source latents of each target latent, through any port; errors left out."""
        found: dict[int, set[int]] = {}
        n_source = self.interactions.sums[COMPUTED].n_source
        for table in self.kept.values():
            for target, source in zip(table.target.tolist(), table.source.tolist(), strict=True):
                if source != n_source:
                    found.setdefault(target, set()).add(source)
        return {target: frozenset(sources) for target, sources in found.items()}


@dataclass
class Setting:
    """What an analysis works on.

    Attributes:
        model: Any traced model.
        pairs: The task.
        batches: Prompts.
        found: The dictionaries.
        gathered: Statistics over the prompts.
        batch_size: Pairs or prompts per pass; None chooses.
        findings: Label and one line, for the screen.
    """

    model: TracedModel
    pairs: EncodedTask
    batches: Sequence[Tokens]
    found: DictionarySet
    gathered: Gathered
    batch_size: int | None
    findings: dict[str, str] = field(default_factory=dict)


def tell_masses(setting: Setting, circuit: CircuitGraph, selected: Sequence[Selected]) -> None:
    """Reconstruction by site, and how much goes through errors and through the kept edges."""
    circuit.graph["dictionaries"] = {
        str(site): activity.stats.summary() for site, activity in setting.gathered.activity.items()
    }
    shares = {}
    for one in selected:
        table, sums = one.tables[COMPUTED], one.interactions.sums[COMPUTED]
        whole = float(table.mass.sum())
        if whole == 0:
            continue
        name = str(one.interactions.pair)
        shares[name] = float(table.mass[table.source == sums.n_source].sum()) / whole
        held = float(one.kept[COMPUTED].mass.sum()) / whole
        setting.findings[f"interactions {name}"] = (
            f"{len(one.kept[COMPUTED])} of {len(table)} edges hold {held:.0%} of the mass; "
            f"{shares[name]:.0%} of it comes out of the dictionary's error"
        )
    circuit.graph["error_mass"] = shares


def verify_edges(
    setting: Setting, circuit: CircuitGraph, selected: Sequence[Selected], n: int, least: int
) -> None:
    """Ablate a sample of ``n`` of the edges whose ends were together ``least`` times; compare."""
    # An ablation sees what is computed and what the stream carries in one.
    tables = [one.interactions.whole.table() for one in selected]
    tables = [table.rows((table.n >= least).nonzero()[:, 0]) for table in tables]
    ends = torch.tensor([0, *map(len, tables)]).cumsum(0).tolist()
    strata = sample_edges(torch.cat([table.mean.abs() for table in tables]), n)
    stratum = {row: name for name, rows in strata.items() for row in rows}
    scores, exact, sampled = [], [], []
    for one, table, start in zip(selected, tables, ends, strict=False):
        chosen = [row for row in sorted(stratum) if start <= row < start + len(table)]
        if not chosen:
            continue
        edges = table.rows(torch.tensor(chosen) - start)
        pair, scale = one.interactions.pair, one.interactions.whole.scale
        measured = exact_effects(
            setting.model, setting.batches, pair, setting.found.dictionaries, edges, scale
        )
        scores.append(edges.mean)
        exact.append(measured)
        for row, number in enumerate(chosen):
            sampled.append(_ablated(setting, one, edges, row, float(measured[row])))
            sampled[-1]["stratum"] = stratum[number]
    circuit.graph["ablations"] = sampled
    agreed = agreement(torch.cat(scores), torch.cat(exact)) if scores else None
    if agreed is not None:
        setting.findings["ablated edges"] = agreed.text()


def _ablated(
    setting: Setting, one: Selected, edges: EdgeTable, row: int, effect: float
) -> dict[str, str | float]:
    """An ablated edge as plain JSON, in the unit of scores."""
    pair, dictionaries = one.interactions.pair, setting.found.dictionaries
    ends = ((pair.source, edges.source), (pair.target, edges.target))
    source, target = (latent_name(site, int(i[row]), dictionaries[site].n) for site, i in ends)
    return {
        "source": source,
        "target": target,
        "attribution": float(edges.mean[row]),
        "exact": effect,
    }


def tell_kept_edges(setting: Setting, circuit: CircuitGraph, selected: Sequence[Selected]) -> None:
    """The task's metric and the loss with the kept edges alone.

    The loss is of at most :data:`LOSS_PROMPTS` prompts. A model that was trained to predict some
    positions only may do worse than chance over all: then the loss is left out.
    """
    pairs, kept = [one.interactions.pair for one in selected], [one.together for one in selected]
    edges = KeptEdges(setting.model, pairs, setting.found.dictionaries, kept)
    distinct = setting.pairs.rows(distinct_rows(setting.pairs))
    recovery = {"metric": edges.metric(distinct, setting.batch_size)}
    batches, missing = [], LOSS_PROMPTS
    for batch in setting.batches:
        if batch.mask.shape[1] > 1 and missing > 0:
            batches.append(batch.rows(slice(0, missing)))
            missing -= len(batches[-1])
    if batches:
        recovery["loss"] = edges.loss(batches)
    chance = math.log(setting.model.vocab_size)
    for name, one in recovery.items():
        if name == "loss" and one.mean("clean")[0] >= chance:
            setting.findings["loss with kept edges"] = (
                f"not measured: over all positions the model's own is {one.mean('clean')[0]:.2f} "
                f"nats per token, no better than chance, {chance:.2f}"
            )
            continue
        circuit.graph.setdefault("kept_edges", {})[name] = _recovery(one)
        setting.findings[f"{name} with kept edges"] = _said(one)


def _recovery(one: Recovery) -> dict[str, dict[str, float]]:
    """Means and share as plain JSON."""
    found = {name: _with_ends(*one.mean(name)) for name in ("clean", "kept", "none")}
    recovered = one.recovered()
    return found if recovered is None else found | {"recovered": _with_ends(*recovered)}


def _said(one: Recovery) -> str:
    """Means and share in words."""
    kept, none, clean = (one.mean(name)[0] for name in ("kept", "none", "clean"))
    words = f"{kept:.3f}, with no edge {none:.3f}, with all {clean:.3f}"
    recovered = one.recovered()
    if recovered is None:
        return f"{words}: the model does no better with edges than without"
    words += f"; recovered {recovered[0]:.0%}"
    if recovered[1] is not None:
        words += f", 95 % interval {recovered[1][0]:.0%} to {recovered[1][1]:.0%}"
    return f"{words} ({len(one.clean)} prompts)"


def _with_ends(value: float, interval: Interval | None) -> dict[str, float]:
    ends = {} if interval is None else {"lo": interval[0], "hi": interval[1]}
    return {"value": value, **ends}


def compare_sets(setting: Setting, circuit: CircuitGraph, own: Path, folder: Path) -> None:
    """A panel of this set and all sets in a folder, each over the same prompts."""
    try:
        others = sorted(path.parent for path in folder.glob(f"*/{SET}"))
    except OSError as error:
        raise OptionError(f"--compare '{folder}' cannot be read: {error}") from error
    others = [path for path in others if path.resolve() != own.resolve()]
    if not others:
        raise OptionError(
            f"--compare '{folder}' holds no other sets; give a folder with a set in each of its "
            f"folders"
        )
    sets = [_compared(own.name, setting.gathered)]
    for path in others:
        found = read_set(path, setting.model)
        gathered = gather(setting.model, found.pairs, found.dictionaries, setting.batches)
        sets.append(_compared(path.name, gathered))
    comparison(sets).add_to(circuit)


def _compared(name: str, gathered: Gathered) -> Compared:
    summaries = [activity.stats.summary() for activity in gathered.activity.values()]
    r2 = [one["r2"] for one in summaries if "r2" in one]
    l0 = sum(one["l0"] for one in summaries) / len(summaries)
    tables = [one.sums[COMPUTED].table() for one in gathered.interactions]
    return Compared(name, sum(r2) / max(1, len(r2)), l0, edges_per_target(tables))
