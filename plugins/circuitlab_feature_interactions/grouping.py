"""Grouping: latents of a circuit that are active together, numbered or drawn as one node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import mean_intervals
from circuitlab_feature_interactions.ablations import agreement, group_effects, sample_edges
from circuitlab_feature_interactions.clusters import CoActivation, communities
from circuitlab_feature_interactions.drawing import TOKENS, edge_data
from circuitlab_feature_interactions.gathering import COMPUTED, LOCAL, SKIP
from circuitlab_feature_interactions.groups import NodeActivity, Nodes, gather_groups
from circuitlab_feature_interactions.logits import removed_groups

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Site
    from circuitlab_feature_interactions.ablations import Latents
    from circuitlab_feature_interactions.gathering import Interactions
    from circuitlab_feature_interactions.logits import MetricEffects
    from circuitlab_feature_interactions.telling import Setting

#: What the score of an edge is, between groups and single latents.
SCORE = (
    "mean sum of J z over tokens at which latents of both ends are active, as shares of the "
    "targets' means when active (of the mean |metric| for logits); positive = the source raises"
)


def label_clusters(setting: Setting, circuit: CircuitGraph) -> None:
    """Put ``cluster`` on the latents of a circuit: those of one number are active together."""
    chosen = _features(setting, circuit)
    groups = communities(_count(setting, chosen).phi())
    for (name, _, _), group in zip(chosen, groups, strict=True):
        circuit.nodes[name]["cluster"] = group
    setting.findings["clusters"] = (
        f"{len(set(groups))} of {len(groups)} latents, by Louvain on phi of being active"
    )


def group_latents(
    setting: Setting, circuit: CircuitGraph, effects: Mapping[Site, MetricEffects], verify: int
) -> None:
    """Make one node of latents of a site that are active together, and measure its effects.

    A group has an effect where one of its latents has one in the circuit; the effect is of all its
    latents, as in :func:`circuitlab_feature_interactions.groups.gather_groups`, and ``exact``, to
    logits, of all of them taken out together.

    Args:
        setting: What the circuit was made of.
        circuit: With single latents; those of a group give way to it. Gets
            ``graph["group_ablations"]``, like ``ablations``.
        effects: On the metric, of sites with edges to the logits.
        verify: Effects of groups to ablate.
    """
    groups = find_groups(setting, circuit)
    chosen = _features(setting, circuit)
    told = f"{len(groups)} groups of 2 or more latents of a site that are active together"
    inside = sum(len(group.latents) for group in groups)
    setting.findings["clusters"] = f"{told}, {inside} of {len(chosen)} latents"
    if not groups:
        return
    circuit.graph["score"] = SCORE
    nodes, names = _nodes(setting, circuit, groups)
    model, found, batches = setting.model, setting.found, setting.batches
    before = setting.gathered.interactions
    measured, activity = gather_groups(model, before, found.dictionaries, nodes, batches)
    owner = {name: group.name for group in groups for name in group.members}
    wanted = _replace(setting, circuit, groups, owner, activity, names)
    ends: set[tuple[str, str]] = set()
    for one in measured:
        ends |= _add_effects(circuit, one, names, wanted)
    _add_logits(setting, circuit, groups, effects, wanted)
    if verify:
        _verify(setting, circuit, measured, nodes, names, ends, verify)


# --- the groups -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Latents of a site that stand as one node.

    Attributes:
        name: ``mlp_out.0.c3``, counted from 0 at each site.
        site: Where.
        latents: Rising.
        members: Their names.
        phi: Mean correlation of being active of two of them.
    """

    name: str
    site: Site
    latents: Latents
    members: tuple[str, ...]
    phi: float


def find_groups(setting: Setting, circuit: CircuitGraph) -> list[Group]:
    """Groups of two or more latents of a circuit, site by site; see :func:`communities`."""
    chosen = sorted(_features(setting, circuit), key=lambda one: one[1:])
    phi = _count(setting, chosen).phi()
    found = []
    for site in setting.found.dictionaries:
        places = [place for place, (_, other, _) in enumerate(chosen) if other == site]
        inside = phi[places][:, places]
        together: dict[int, list[int]] = {}
        for place, number in enumerate(communities(inside)):
            together.setdefault(number, []).append(place)
        some = [members for members in together.values() if len(members) > 1]
        for number, members in enumerate(some):
            listed = [chosen[places[member]] for member in members]
            n, block = len(members), inside[members][:, members]
            between = float((block.sum() - block.diagonal().sum()) / (n * (n - 1)))
            latents, names = tuple(one[2] for one in listed), tuple(one[0] for one in listed)
            found.append(Group(f"{site}.c{number}", site, latents, names, between))
    return found


def _features(setting: Setting, circuit: CircuitGraph) -> list[tuple[str, Site, int]]:
    """Name, site and number of each latent of a circuit."""
    sites = {str(site): site for site in setting.found.dictionaries}
    return [
        (name, sites[data["site"]], data["index"])
        for name, data in circuit.nodes(data=True)
        if data["kind"] == "feature"
    ]


def _count(setting: Setting, chosen: Sequence[tuple[str, Site, int]]) -> CoActivation:
    """How often latents are active together."""
    sites = list(setting.found.dictionaries)
    counts = CoActivation(len(chosen))
    for tokens in setting.batches:
        run = setting.model.run(tokens, read=sites, logits="none")
        active = torch.zeros(*tokens.mask.shape, len(chosen), dtype=torch.bool)
        for site in sites:
            columns = [n for n, (_, other, _) in enumerate(chosen) if other == site]
            latents = [chosen[n][2] for n in columns]
            z = setting.found.dictionaries[site].encode(run[site])
            active[..., columns] = (z[..., latents] != 0).cpu()
        counts.add(active[tokens.mask.cpu()])
    return counts


def _nodes(
    setting: Setting, circuit: CircuitGraph, groups: Sequence[Group]
) -> tuple[dict[Site, Nodes], dict[Site, list[str]]]:
    """Groups, latents in none, and errors: by site, and their names in the same order."""
    inside = {name for group in groups for name in group.members}
    nodes, names = {}, {}
    for site, dictionary in setting.found.dictionaries.items():
        of_site = [group for group in groups if group.site == site]
        alone = [
            (name, (data.get("index", dictionary.n),))
            for name, data in circuit.nodes(data=True)
            if data.get("site") == str(site) and name not in inside
        ]
        latents = [*(group.latents for group in of_site), *(latent for _, latent in alone)]
        names[site] = [*(group.name for group in of_site), *(name for name, _ in alone)]
        activity = setting.gathered.activity[site]
        count = (activity.stats.densities * activity.stats.tokens).round().clamp(min=1)
        mean = activity.total / count
        nodes[site] = Nodes(latents, torch.where(mean > 0, mean, 1.0))
    return nodes, names


# --- the circuit ----------------------------------------------------------------------------------


def _replace(
    setting: Setting,
    circuit: CircuitGraph,
    groups: Sequence[Group],
    owner: Mapping[str, str],
    activity: Mapping[Site, NodeActivity],
    names: Mapping[Site, Sequence[str]],
) -> set[tuple[str, str, str]]:
    """Put groups in the place of their latents; the effects that they are to have."""
    wanted = {
        (owner.get(source, source), owner.get(target, target), port)
        for source, target, port in circuit.edges
        if source in owner or target in owner
    }
    circuit.remove_nodes_from(owner)
    for group in groups:
        seen, number = activity[group.site], names[group.site].index(group.name)
        top = seen.top_tokens(number, TOKENS)
        texts = setting.model.token_texts([token for token, _ in top])
        circuit.add_component(
            group.name,
            kind="cluster",
            layer=group.site.layer or 0,
            site=str(group.site),
            members=list(group.members),
            n_members=len(group.members),
            density=float(seen.active[number]) / seen.tokens,
            phi=group.phi,
            top_tokens=[[text, value] for text, (_, value) in zip(texts, top, strict=True)],
            role=" ".join(text.strip() or text for text in texts[:3]),
        )
    return wanted


def _add_effects(
    circuit: CircuitGraph,
    one: Interactions,
    names: Mapping[Site, Sequence[str]],
    wanted: set[tuple[str, str, str]],
) -> set[tuple[str, str]]:
    """Add the effects across a pair of sites, and give their ends."""
    ends: set[tuple[str, str]] = set()
    for port in (COMPUTED, SKIP):
        if port not in one.sums:
            continue
        local = one.sums.get(LOCAL) if port == COMPUTED else None
        table = one.sums[port].table(local)
        for row, source, target in _named(one, table.source, table.target, names):
            if (source, target, port) in wanted:
                data = edge_data(table, row, port or one.pair.route)
                circuit.add_effect(source, target, float(table.mean[row]), port=port, **data)
                ends.add((source, target))
    return ends


def _named(
    one: Interactions, sources: Tensor, targets: Tensor, names: Mapping[Site, Sequence[str]]
) -> Iterator[tuple[int, str, str]]:
    """Row, and names of both ends."""
    for row, (j, i) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
        yield row, names[one.pair.source][j], names[one.pair.target][i]


def _add_logits(
    setting: Setting,
    circuit: CircuitGraph,
    groups: Sequence[Group],
    effects: Mapping[Site, MetricEffects],
    wanted: set[tuple[str, str, str]],
) -> None:
    for site, found in effects.items():
        some = [g for g in groups if g.site == site and (g.name, "logits", "") in wanted]
        latents = [group.latents for group in some]
        dictionary = setting.found.dictionaries[site]
        exact = removed_groups(
            setting.model, setting.pairs, site, dictionary, latents, setting.batch_size
        )
        for group, removed in zip(some, exact, strict=True):
            columns = list(group.latents)
            sums = found.effects[:, columns].sum(1)
            data: dict[str, Any] = {"route": "logits"}
            data["n"] = int(found.active[:, columns].any(1).sum())
            data["exact"] = float(removed.mean()) / found.unit
            if (interval := mean_intervals(sums[None])[0]) is not None:
                data["lo"], data["hi"] = (end / found.unit for end in interval)
            circuit.add_effect(group.name, "logits", float(sums.mean()) / found.unit, **data)


def _verify(
    setting: Setting,
    circuit: CircuitGraph,
    measured: Sequence[Interactions],
    nodes: Mapping[Site, Nodes],
    names: Mapping[Site, Sequence[str]],
    ends: set[tuple[str, str]],
    n: int,
) -> None:
    """Ablate a sample of the groups' effects: all latents of a source are taken out together."""
    # An ablation sees what is computed and what the stream carries in one.
    tables = []
    for one in measured:
        table = one.whole.table()
        rows = [row for row, *both in _named(one, table.source, table.target, names)
                if tuple(both) in ends]  # fmt: skip
        tables.append(table.rows(torch.tensor(rows, dtype=torch.int64)))
    starts = torch.tensor([0, *map(len, tables)]).cumsum(0).tolist()
    strata = sample_edges(torch.cat([table.mean.abs() for table in tables]), n)
    stratum = {row: name for name, rows in strata.items() for row in rows}
    scores, exact = [], []
    sampled: list[dict[str, Any]] = []
    for one, table, start in zip(measured, tables, starts, strict=False):
        chosen = [row for row in sorted(stratum) if start <= row < start + len(table)]
        edges = table.rows(torch.tensor(chosen, dtype=torch.int64) - start)
        pair, scale = one.pair, nodes[one.pair.target].scale
        latents = [
            (nodes[pair.source].latents[j], nodes[pair.target].latents[i])
            for j, i in zip(edges.source.tolist(), edges.target.tolist(), strict=True)
        ]
        found = group_effects(
            setting.model, setting.batches, pair, setting.found.dictionaries, latents, scale
        )
        scores.append(edges.mean)
        exact.append(found)
        for row, source, target in _named(one, edges.source, edges.target, names):
            if not bool(found[row].isfinite()):
                continue
            effect = {"attribution": float(edges.mean[row]), "exact": float(found[row])}
            named = {"source": source, "target": target, "stratum": stratum[chosen[row]]}
            sampled.append({**named, **effect})
    circuit.graph["group_ablations"] = sampled
    agreed = agreement(torch.cat(scores), torch.cat(exact)) if scores else None
    if agreed is not None:
        setting.findings["ablated groups"] = agreed.text()
