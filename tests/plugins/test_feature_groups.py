"""Groups of latents as nodes: every number is that of a loop over tokens and latents."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.ablations import exact_effects, group_effects
from circuitlab_feature_interactions.circuits import feature_interactions
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.gathering import COMPUTED, LOCAL, SKIP, TOTAL, gather
from circuitlab_feature_interactions.groups import Nodes, gather_groups
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.logits import metric_effects, removed_groups
from circuitlab_feature_interactions.sites import Pair, site_pairs, sites_of
from feature_oracles import N, dictionaries, prompts_of, run_from, some_edges, unpadded
from path_scores import small_model
from random_tasks import random_task

from circuitlab import CircuitGraph, Dictionary, DictionaryInfo, load_model
from circuitlab.zoo.superposition import PLANTED

#: Groups, latents alone, and the error; many latents are in none.
LATENTS = ((0, 3, 7, 12, 18), (5, 6, 8, 20, 22), (1, 2, 15), (9,), (N,))
SCALE = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
BIAS = 0.1


def random_nodes(pairs: list[Pair]) -> dict[Any, Nodes]:
    return {site: Nodes(LATENTS, SCALE) for site in sites_of(pairs)}


# --- sums over tokens -----------------------------------------------------------------------------


def looped(found: Any, name: str, n_positions: int) -> dict[tuple[int, int], dict[int, float]]:
    """What each node does to each other, at every token where two of their latents are active."""
    values, columns = found.values, range(found.source_index.shape[1])
    own = None if found.own is None else found.own.tolist()
    sums: dict[tuple[int, int], dict[int, float]] = {}
    whole = {COMPUTED: [found.values], TOTAL: [found.values]}.get(name, [])
    local = {LOCAL: [found.local], SKIP: [found.skip], TOTAL: [found.skip]}.get(name, [])
    for row, token in enumerate(found.token.tolist()):
        at = [(part, c, c) for part in whole for c in columns]
        at += [(part, n, c) for part in local for n, c in enumerate((own or [[]])[row])]
        for values, column, c in at:
            j, place = int(found.source_index[row, c]), token % n_positions
            if found.source_position is not None and int(found.source_position[row, c]) > place:
                continue
            for k, i in enumerate(found.target_index[row].tolist()):
                ends = [n for n, some in enumerate(LATENTS) if j in some]
                ends += [n for n, some in enumerate(LATENTS) if i in some]
                if len(ends) < 2 or not found.z_source[row, c] or not found.z_target[row, k]:
                    continue
                share = float(values[row, k, column]) / float(SCALE[i])
                at_tokens = sums.setdefault((ends[0], ends[1]), {})
                at_tokens[token] = at_tokens.get(token, 0.0) + share
    return sums


@torch.no_grad()
@pytest.mark.parametrize("sites", ["mlp.1", "block.1"])
def test_effects_between_groups_are_sums_at_each_token(sites: str) -> None:
    """Mean, size, signs and n, of each part, by a loop over tokens and pairs of latents."""
    _, model = small_model("gpt2")
    pairs = site_pairs(sites, model)
    found, (pair,) = dictionaries(pairs), pairs
    tokens, _ = prompts_of(model)
    gathered = gather(model, pairs, found, [tokens])
    (measured,), _ = gather_groups(
        model, gathered.interactions, found, random_nodes(pairs), [tokens]
    )
    x = model.run(tokens, read=[pair.source])[pair.source]
    route = make_route(model, pair, dtype=torch.float64)
    ends = found[pair.source], found[pair.target]
    attributions = route.attributions(*ends, x, mask=tokens.mask, with_error=True)
    assert set(measured.sums) == set(gathered.interactions[0].sums)
    checked = 0
    for name, sums in measured.sums.items():
        table, expected = sums.table(), looped(attributions, name, tokens.mask.shape[1])
        assert len(table) == len(expected)
        for row in range(len(table)):
            at = torch.tensor([*expected[int(table.source[row]), int(table.target[row])].values()])
            mean = float(at.double().mean())
            assert int(table.n[row]) == len(at)
            assert float(table.mean[row]) == pytest.approx(mean, rel=1e-5, abs=1e-7)
            assert float(table.mean_absolute[row]) == pytest.approx(float(at.abs().mean()), 1e-5)
            agreeing = ((at > 0) == (mean > 0)).double().mean()
            assert float(table.sign_consistency[row]) == pytest.approx(float(agreeing))
            checked += len(at) > 1
    assert checked >= 8


def test_groups_of_one_are_the_latents(tmp_path: Path) -> None:
    """The same table as of latents, where every node is one latent or the error."""
    _, model = small_model("gpt2")
    pairs = site_pairs("block", model)
    found = dictionaries(pairs)
    tokens, _ = prompts_of(model)
    before = gather(model, pairs, found, [tokens]).interactions
    alone = [(latent,) for latent in range(N + 1)]
    nodes = {site: Nodes(alone, torch.ones(N).double()) for site in found}
    for one in before:
        nodes[one.pair.target] = Nodes(alone, one.whole.scale)
    measured, activity = gather_groups(model, before, found, nodes, [tokens])
    for one, other in zip(before, measured, strict=True):
        for name, sums in one.sums.items():
            first, second = sums.table(), other.sums[name].table()
            assert torch.equal(first.n, second.n)
            for column in ("mean", "mean_absolute", "sign_consistency", "offset"):
                assert torch.allclose(getattr(first, column), getattr(second, column), atol=1e-12)
    run = model.run(tokens, read=list(found))
    for site, seen in activity.items():
        z = found[site].encode(run[site])[tokens.mask]
        assert torch.equal(seen.active[:-1], (z != 0).double().sum(0))
        assert seen.active[-1] == 0
        assert seen.tokens == int(tokens.mask.sum())


# --- planted features -----------------------------------------------------------------------------


def planted_dictionaries(pair: Pair) -> dict[Any, Dictionary]:
    """The true features of hand-planted, each less than it is by BIAS."""
    found = {}
    for site, side in ((pair.source, PLANTED.sources), (pair.target, PLANTED.targets)):
        rows = torch.tensor([*side.values()])
        bias = torch.full((len(rows),), -BIAS)
        found[site] = Dictionary(
            rows.T.contiguous(),
            bias,
            rows,
            torch.zeros(rows.shape[1]),
            apply_b_dec_to_input=True,
        )
        found[site].requires_grad_(False)
    return found


def planted_tokens(texts: list[str]) -> list[dict[str, float]]:
    """Intensities of words at each token but the first; the last word counts twice."""
    found = []
    for words in map(str.split, texts):
        for place in range(len(words)):
            seen = words[: place + 1]
            found.append({w: 2.0 if w == words[place] else 1.0 for w in seen})
    return found


def made(shown: dict[str, float]) -> dict[str, float]:
    """What the planted graph makes of features."""
    sums = dict.fromkeys(PLANTED.targets, 0.0)
    for (source, target), weight in PLANTED.edges.items():
        sums[target] += weight * shown.get(source, 0.0)
    return {target: max(value, 0.0) for target, value in sums.items()}


def latent(value: float) -> float:
    return max(value - BIAS, 0.0)


TEXTS = ["f3 f8 f14 f9", "f0 f1 f2 f5", "f12 f15 f7 f3", "f4 f6 f10 f11", "f13 f2 f8 f1"]
#: Groups of words and of what is made of them, as numbers.
SOURCES, TARGETS = ((0, 1, 2, 3), (8, 14), (5,)), ((0, 1, 2, 3, 4), (7, 9), (12, 13, 14, 15))


@torch.no_grad()
def test_planted_groups_do_what_the_graph_says() -> None:
    """Attributions, and taking a whole group out, in closed form from the planted graph."""
    model = load_model("hand-planted")
    (pair,) = site_pairs("mlp.0", model)
    found, batches = planted_dictionaries(pair), [model.tokens(TEXTS)]
    gathered = gather(model, [pair], found, batches)
    scale = gathered.interactions[0].whole.scale
    nodes = {pair.source: Nodes(SOURCES, torch.ones(16).double())}
    nodes[pair.target] = Nodes(TARGETS, scale)
    (measured,), _ = gather_groups(model, gathered.interactions, found, nodes, batches)
    table = measured.sums[COMPUTED].table()
    ends = [(one, other) for one in SOURCES for other in TARGETS]
    exact = group_effects(model, batches, pair, found, ends, scale).tolist()
    mean = {
        (SOURCES[j], TARGETS[i]): float(value)
        for j, i, value in zip(table.source, table.target, table.mean, strict=True)
    }
    words, gates, checked = [*PLANTED.sources], [*PLANTED.targets], 0
    for (sources, targets), taken in zip(ends, exact, strict=True):
        attributed, removed = [], []
        for shown in planted_tokens(TEXTS):
            z, before = {w: latent(v) for w, v in shown.items()}, made(shown)
            on = [i for i in targets if latent(before[gates[i]]) > 0]
            if not on or not any(z.get(words[j], 0.0) for j in sources):
                continue
            attributed.append(sum(
                PLANTED.edges.get((words[j], gates[i]), 0.0) * z.get(words[j], 0.0) / scale[i]
                for j in sources for i in on
            ))  # fmt: skip
            less = {w: v - z[w] * (words.index(w) in sources) for w, v in shown.items()}
            after = made(less)
            removed.append(sum(
                (latent(before[gates[i]]) - latent(after[gates[i]])) / scale[i] for i in targets
            ))  # fmt: skip
        assert bool(attributed) == ((sources, targets) in mean)
        if attributed:
            expected = sum(map(float, attributed)) / len(attributed)
            assert mean[sources, targets] == pytest.approx(expected, abs=1e-4)
            assert taken == pytest.approx(sum(map(float, removed)) / len(removed), abs=1e-4)
            checked += abs(expected) > 0.1
    assert checked >= 4


# --- ablations ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sites", ["mlp.1", "block.0"])
def test_groups_are_taken_out_together(sites: str) -> None:
    """As if each prompt ran alone, through a plain block, without any of a group's latents."""
    module, model = small_model("gpt2")
    (pair,) = site_pairs(sites, model)
    found = dictionaries([pair])
    reads, writes = found[pair.source], found[pair.target]
    tokens, alone = prompts_of(model)
    ends = [(one, other) for one in (*LATENTS, (4, N)) for other in LATENTS[:3]]
    measured = group_effects(
        model, [tokens.rows([0]), tokens.rows([1, 2])], pair, found, ends, SCALE
    )
    streams = [(ids, model.run(unpadded(ids), read=[pair.source])[pair.source]) for ids in alone]
    checked = 0
    for (sources, targets), value in zip(ends, measured.tolist(), strict=True):
        changes = []
        for ids, x in streams:
            z, less, on = reads.encode(x), x.clone(), torch.zeros(ids.shape[1]).bool()
            for j in sources:
                less = less - (x - reads(x) if j == N else z[0, :, j, None] * reads.W_d[j])
                on = on | (torch.ones_like(on) if j == N else z[0, :, j] != 0)
            old = writes.encode(run_from(module, pair, ids, x))[0]
            new = writes.encode(run_from(module, pair, ids, less))[0]
            for place in range(ids.shape[1]):
                seen = on[place] if pair.route == "mlp" else on[: place + 1].any()
                if seen and any(old[place, i] != 0 for i in targets):
                    change = sum((old[place, i] - new[place, i]) / SCALE[i] for i in targets)
                    changes.append(float(change))
        if not changes:
            assert math.isnan(value)
            continue
        assert value == pytest.approx(sum(changes) / len(changes), rel=1e-6, abs=1e-9)
        checked += 1
    assert checked >= 9


@torch.no_grad()
def test_edges_are_groups_of_one() -> None:
    """Ablating an edge is ablating a group of one latent, on a group of one."""
    _, model = small_model("gpt2")
    (pair,) = site_pairs("block.1", model)
    found, edges = dictionaries([pair]), some_edges(20)
    tokens, _ = prompts_of(model)
    ends = [((int(j),), (int(i),)) for j, i in zip(edges.source, edges.target, strict=True)]
    one = exact_effects(model, [tokens], pair, found, edges, SCALE)
    other = group_effects(model, [tokens], pair, found, ends, SCALE)
    assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@torch.no_grad()
def test_groups_leave_the_metric_together() -> None:
    """The metric without all latents of a group at once, the error among them or not."""
    _, model = small_model("gpt2")
    (pair,) = site_pairs("mlp.1", model)
    site, dictionary = pair.target, dictionaries([pair])[pair.target]
    task = model.encode(random_task([6, 5, 4, 7]))
    groups = [(2, 3, 11), (4, N), (N,)]
    found = removed_groups(model, task, site, dictionary, groups, batch_size=3)
    run = model.run(task.clean, read=[site])
    x, last = run[site], run.logits[:, -1]
    z = dictionary.encode(x)
    for group, values in zip(groups, found, strict=True):
        kept = z.clone()
        kept[..., [i for i in group if i != N]] = 0
        changed = kept @ dictionary.W_d + dictionary.b_d
        changed = changed if N in group else changed + (x - dictionary(x))
        logits = model.run(task.clean, write={site: changed}).logits[:, -1]
        expected = task.score(last, last) - task.score(logits, last)
        assert torch.allclose(values, expected.double(), atol=1e-9)


# --- the circuit ----------------------------------------------------------------------------------


def analyse(tmp_path: Path, sites: str, **options: Any) -> CircuitGraph:
    _, model = small_model("gpt2")
    pairs, found = site_pairs(sites, model), {}
    for site, one in dictionaries(pairs).items():
        info = DictionaryInfo(site=str(site), model=model.name, context_length=16)
        found[site] = one
        if sites == "transcoder":
            info = replace(info, target=f"mlp_out.{site.layer}")
            found[site] = Dictionary(
                one.W_e, one.b_e, one.W_d, one.b_d,
                k=one.k, transcoder=True, apply_b_dec_to_input=False,
            ).requires_grad_(False)  # fmt: skip
        found[site].info = info
    (tmp_path / sites).mkdir(exist_ok=True)
    write_set(DictionarySet(found, pairs, {}), tmp_path / sites)
    given: dict[str, Any] = {"top": 25, "min_coactivation": 2, "verify": 9, "n_tokens": 1}
    task = random_task([6, 5, 4, 7])
    return feature_interactions(
        model, task, **{"dictionaries": tmp_path / sites, **given, **options}
    )


@pytest.mark.parametrize("sites", ["mlp", "block", "transcoder"])
def test_a_group_stands_for_its_latents(tmp_path: Path, sites: str) -> None:
    """It has the effects that any of its latents had; the others are as they were."""
    plain, circuit = (analyse(tmp_path, sites, cluster=kind) for kind in ("none", "group"))
    circuit.validate()
    assert CircuitGraph.from_json(circuit.to_json()).to_json() == circuit.to_json()
    groups = {n: d for n, d in circuit.nodes(data=True) if d["kind"] == "cluster"}
    owner = {member: name for name, data in groups.items() for member in data["members"]}
    assert groups
    assert len(owner) == sum(data["n_members"] for data in groups.values()) >= 2 * len(groups)
    assert {owner.get(name, name) for name in plain} == set(circuit)
    for name, data in groups.items():
        assert name.startswith(f"{data['site']}.c")
        assert {plain.nodes[member]["site"] for member in data["members"]} == {data["site"]}
    wanted = {(owner.get(s, s), owner.get(t, t), port) for s, t, port in plain.edges}
    assert set(circuit.edges) == wanted
    for source, target, port, data in circuit.edges(keys=True, data=True):
        if not {source, target} & set(groups):
            assert data == plain.edges[source, target, port]
    rows = circuit.graph["group_ablations"]
    there = {(s, t) for s, t, _ in wanted if {s, t} & set(groups) and t != "logits"}
    assert len(rows) == min(9, len(there)) >= 8
    for row in rows:
        assert {row["source"], row["target"]} & set(groups)
    assert analyse(tmp_path, sites, cluster="group").to_json() == circuit.to_json()
    if sites != "block":
        for row in rows:
            score = circuit.edges[row["source"], row["target"], ""]["score"]
            assert row["attribution"] == pytest.approx(score)


def test_what_a_group_says_of_itself(tmp_path: Path) -> None:
    """Density, phi, tokens and effect on the metric, from plain runs."""
    circuit = analyse(tmp_path, "mlp.1", cluster="group")
    _, model = small_model("gpt2")
    pairs = site_pairs("mlp.1", model)
    found, task = dictionaries(pairs), model.encode(random_task([6, 5, 4, 7]))
    clean, checked = task.clean, 0
    run = model.run(clean, read=list(found))
    for name, node in circuit.nodes(data=True):
        if node["kind"] != "cluster":
            continue
        (site,) = (site for site in found if str(site) == node["site"])
        latents = [int(member.rpartition(".f")[2]) for member in node["members"]]
        every = found[site].encode(run[site])[clean.mask]
        z = every[:, latents]
        on = (z != 0).any(1)
        assert node["density"] == pytest.approx(float(on.double().mean()))
        phi = torch.corrcoef((z != 0).double().T)
        between = [float(phi[a, b]) for a, b in combinations(range(len(latents)), 2)]
        assert node["phi"] == pytest.approx(sum(between) / len(between))
        means = torch.stack([column[column != 0].mean() for column in z.T])
        value, ids = (z / means).sum(1), clean.ids[clean.mask]
        by_token = {int(t): float(value[(ids == t) & on].mean()) for t in set(ids[on].tolist())}
        best = sorted(by_token.items(), key=lambda item: (-item[1], item[0]))[:5]
        assert [text for text, _ in node["top_tokens"]] == [f"#{token}" for token, _ in best]
        if site == pairs[0].target:
            effects = metric_effects(model, task, site, found[site])
            data = circuit.edges[name, "logits", ""]
            sums = effects.effects[:, latents].sum(1)
            assert data["score"] == pytest.approx(float(sums.mean()) / effects.unit)
            removed = removed_groups(model, task, site, found[site], [latents])
            assert data["exact"] == pytest.approx(float(removed.mean()) / effects.unit)
            assert data["lo"] <= data["score"] <= data["hi"]
            checked += 1
    assert checked >= 1
