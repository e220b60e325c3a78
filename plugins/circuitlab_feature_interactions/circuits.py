"""The analysis ``feature-interactions``: the circuit of latents that dictionaries give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import CircuitGraph, DictionaryInfo, OptionError, mean_intervals
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, read_set
from circuitlab_feature_interactions.drawing import Nodes, edge_data, panels
from circuitlab_feature_interactions.gathering import (
    COMPUTED,
    LOCAL,
    SKIP,
    Gathered,
    data_batches,
    gather,
)
from circuitlab_feature_interactions.grouping import group_latents, label_clusters
from circuitlab_feature_interactions.logits import (
    MetricEffects,
    metric_effects,
    removed_effects,
)
from circuitlab_feature_interactions.telling import (
    Selected,
    Setting,
    compare_sets,
    tell_kept_edges,
    tell_masses,
    verify_edges,
)

if TYPE_CHECKING:
    from circuitlab import Site, Task, TracedModel
    from circuitlab_feature_interactions.edges import EdgeTable

SCORE = (
    "mean attribution J z over tokens at which both latents are active, as a share of the target's "
    "mean when active (of the mean |metric| for logits); positive = the source raises the target"
)


def feature_interactions(
    model: TracedModel,
    task: Task,
    *,
    dictionaries: Path | None = None,
    data: Path | None = None,
    n_tokens: int = 4096,
    top: int | Literal["all"] = 60,
    min_coactivation: int = 20,
    verify: int = 50,
    cluster: Literal["none", "label", "group"] = "none",
    compare: Path | None = None,
    batch_size: int | None = None,
) -> CircuitGraph:
    """How latents of dictionaries make one another, and what they do to the task's metric.

    Statistics are over the task's distinct clean prompts and texts beside them.

    Args:
        model: Any traced model.
        task: Its metric is what the last latents act on.
        dictionaries: Folder of a set, as ``circuitlab dict train`` writes it.
        data: Texts; None takes the model's own corpus, where it has one.
        n_tokens: Tokens to gather over.
        top: Edges to keep, by size of the score; of those that the residual stream carries as many
            again.
        min_coactivation: Tokens at which both ends must be active.
        verify: Edges to ablate, a third each of the strongest, the middle, and the rest.
        cluster: Latents are grouped by phi, the correlation of being active: ``label`` puts the
            number of its group on each; ``group`` makes one node, of kind ``cluster``, of each
            group of a site, see :func:`circuitlab_feature_interactions.grouping.group_latents`.
        compare: Folder of several sets to compare this one with.
        batch_size: Prompts per pass; None chooses.

    Returns:
        Latents (``feature``), errors (``error``: what a dictionary misses, as one more source) and
        ``logits``. Edges have the port ``""`` for what the model computes and ``skip`` for what the
        residual stream carries, and the data of
        :func:`circuitlab_feature_interactions.drawing.edge_data`. ``graph["ablations"]`` has the
        ablated edges, whether in the circuit or not: what the source adds to the target through
        all ports, by attribution and ``exact``. ``graph["error_mass"]`` is the share of
        Σ |attribution| that comes out of errors, by pair; ``graph["dictionaries"]`` what
        :class:`circuitlab.DictionaryStats` says; ``graph["kept_edges"]`` the metric and the loss
        with the kept edges alone, see
        :class:`circuitlab_feature_interactions.ablations.KeptEdges`.

    Raises:
        OptionError: there are no dictionaries, or an option cannot be used.
        ModelError: the dictionaries do not belong to the model.
    """
    folder = _check(dictionaries, top, min_coactivation, verify)
    pairs, found = model.encode(task), read_set(folder, model)
    batches = data_batches(model, pairs, data, n_tokens, batch_size, _context(found))
    gathered = gather(model, found.pairs, found.dictionaries, batches)
    setting = Setting(model, pairs, batches, found, gathered, batch_size)
    selected = _select(gathered, top, min_coactivation)
    circuit = CircuitGraph(score=SCORE, method=_method(setting))
    nodes = Nodes(
        circuit, model, found.dictionaries, gathered.activity, model.weights.unembedding()[0]
    )
    for one in selected:
        _add_edges(nodes, one)
    effects = _add_logits(setting, nodes, selected)
    tell_masses(setting, circuit, selected)
    if verify:
        verify_edges(setting, circuit, selected, verify, min_coactivation)
    tell_kept_edges(setting, circuit, selected)
    tables = {str(one.interactions.pair): one.tables[COMPUTED] for one in selected}
    for panel in panels(tables, circuit):
        panel.add_to(circuit)
    if cluster == "label":
        label_clusters(setting, circuit)
    elif cluster == "group":
        group_latents(setting, circuit, effects, verify)
    if compare is not None:
        compare_sets(setting, circuit, folder, compare)
    circuit.graph["findings"] = setting.findings
    circuit.graph["warnings"] = _warnings(setting)
    return circuit


def _check(dictionaries: Path | None, top: int | str, least: int, verify: int) -> Path:
    """The folder, where the options can be used."""
    if dictionaries is None:
        raise OptionError(
            "--dictionaries is missing: latents come from dictionaries; train some with "
            "circuitlab dict train --output FOLDER, and give the folder"
        )
    for name, number, lowest in (("min-coactivation", least, 1), ("verify", verify, 0)):
        if number < lowest:
            raise OptionError(f"--{name} {number} is too small; give {lowest} or more")
    if top != "all" and (not isinstance(top, int) or top < 1):
        raise OptionError(f"--top {top} keeps no edge; give 1 or more, or all")
    return dictionaries


def _context(found: DictionarySet) -> int | None:
    """The longest prompt that every dictionary was trained on; None where none says."""
    known = [one.info.context_length for one in found.dictionaries.values()]
    return min((length for length in known if length is not None), default=None)


def _warnings(setting: Setting) -> list[str]:
    """How the dictionaries' training differs from this use, each sentence once."""
    longest = max(batch.mask.shape[1] for batch in setting.batches)
    use = DictionaryInfo(context_length=longest)
    found = [d.check_for(setting.model, use) for d in setting.found.dictionaries.values()]
    return list(dict.fromkeys(sentence for sentences in found for sentence in sentences))


def _method(setting: Setting) -> str:
    pairs = ", ".join(map(str, setting.found.pairs))
    return (
        f"Jacobian x activation across {pairs}, {setting.gathered.tokens} tokens; verified by "
        f"taking latents out"
    )


# --- the circuit ----------------------------------------------------------------------------------


def _select(gathered: Gathered, top: int | Literal["all"], least: int) -> list[Selected]:
    tables = []
    for one in gathered.interactions:
        by = {COMPUTED: one.sums[COMPUTED].table(one.sums.get(LOCAL))}
        tables.append(by | {SKIP: one.sums[SKIP].table()} if SKIP in one.sums else by)
    kept: list[dict[str, EdgeTable]] = [{} for _ in tables]
    for port in (COMPUTED, SKIP):
        having = [number for number, by in enumerate(tables) if port in by]
        if not having:
            continue
        sizes = [
            torch.where(by[port].n >= least, by[port].mean.abs(), 0.0)
            for by in (tables[number] for number in having)
        ]
        flat = torch.cat(sizes)
        order = flat.argsort(descending=True, stable=True)
        order = order[flat[order] > 0]
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order if top == "all" else order[:top]] = True
        for number, part in zip(having, torch.split(chosen, [*map(len, sizes)]), strict=True):
            kept[number][port] = tables[number][port].rows(part.nonzero()[:, 0])
    return [Selected(*parts) for parts in zip(gathered.interactions, tables, kept, strict=True)]


def _add_edges(nodes: Nodes, selected: Selected) -> None:
    pair = selected.interactions.pair
    for port, table in selected.kept.items():
        for row in range(len(table)):
            source = nodes.add(pair.source, int(table.source[row]))
            target = nodes.add(pair.target, int(table.target[row]))
            data = edge_data(table, row, port or pair.route)
            nodes.circuit.add_effect(source, target, float(table.mean[row]), port=port, **data)


def _add_logits(
    setting: Setting, nodes: Nodes, selected: Sequence[Selected]
) -> dict[Site, MetricEffects]:
    """Edges to the logits from those kept latents that no other pair of sites reads."""
    found: dict[Site, MetricEffects] = {}
    model, circuit = setting.model, nodes.circuit
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    read = {one.interactions.pair.source for one in selected}
    for one in selected:
        site = one.interactions.pair.target
        if site in read:
            continue
        dictionary = setting.found.dictionaries[site]
        latents = sorted({int(i) for table in one.kept.values() for i in table.target})
        latents = [*latents, dictionary.n]
        effects = metric_effects(model, setting.pairs, site, dictionary, setting.batch_size)
        found[site] = effects
        exact = removed_effects(model, setting.pairs, site, dictionary, latents, setting.batch_size)
        intervals = mean_intervals(effects.effects[:, latents].T)
        for latent, removed, interval in zip(latents, exact, intervals, strict=True):
            n = int(effects.active[:, latent].sum())
            data: dict[str, Any] = {"route": "logits", "n": n}
            data["exact"] = float(removed.mean()) / effects.unit
            if interval is not None:
                data["lo"], data["hi"] = (end / effects.unit for end in interval)
            if n:
                score = float(effects.effects[:, latent].mean()) / effects.unit
                circuit.add_effect(nodes.add(site, latent), "logits", score, **data)
    return found
