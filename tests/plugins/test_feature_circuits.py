"""The analysis feature-interactions: what is in its circuit, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.ablations import (
    KeptEdges,
)
from circuitlab_feature_interactions.circuits import feature_interactions
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.gathering import COMPUTED, SKIP, data_batches, gather
from circuitlab_feature_interactions.logits import metric_effects, removed_effects
from circuitlab_feature_interactions.sites import site_pairs, sites_of
from feature_oracles import (
    N,
    dictionaries,
    random_dictionary,
)
from oracles import random_gpt2
from path_scores import small_model
from random_tasks import random_task

from circuitlab import (
    CircuitGraph,
    DictionaryInfo,
    OptionError,
    Site,
    TracedModel,
    load_model,
    panels_of,
    zoo,
)
from circuitlab.testing import check_analysis, tiny_model


def save(
    model: TracedModel, sites: str, folder: Path, *, on: float = 0.0, k: int | None = 6
) -> Path:
    """Random dictionaries as a set; ``on`` is added to encoders' biases, to later ones more."""
    pairs = site_pairs(sites, model)
    found = {}
    for number, (site, one) in enumerate(dictionaries(pairs, k).items()):
        one.info = DictionaryInfo(site=str(site), model=model.name, context_length=16)
        one.b_e.add_(on * 100**number)
        found[site] = one
    folder.mkdir(exist_ok=True)
    write_set(DictionarySet(found, pairs, {}), folder)
    return folder


def analyse(tmp_path: Path, sites: str = "mlp", **options: Any) -> CircuitGraph:
    _, model = small_model("gpt2")
    folder = save(model, sites, tmp_path / sites)
    given: dict[str, Any] = {"top": 12, "min_coactivation": 2, "verify": 6, "n_tokens": 1}
    task = random_task([6, 5, 4, 7])
    return feature_interactions(model, task, **{"dictionaries": folder, **given, **options})


@pytest.mark.parametrize("sites", ["mlp", "block"])
def test_the_circuit_holds_the_strongest_edges(tmp_path: Path, sites: str) -> None:
    """Their scores are the means that were gathered, and it survives a file."""
    circuit = analyse(tmp_path, sites)
    circuit.validate()
    again = CircuitGraph.from_json(circuit.to_json())
    assert list(again.effects()) == list(circuit.effects())
    _, model = small_model("gpt2")
    pairs = site_pairs(sites, model)
    task = model.encode(random_task([6, 5, 4, 7]))
    batches = data_batches(model, task, None, 1, None)
    gathered = gather(model, pairs, dictionaries(pairs), batches)
    for port in (COMPUTED, SKIP):
        scores = [
            float(score)
            for one in gathered.interactions
            if port in one.sums
            for table in [one.sums[port].table()]
            for score in table.mean[table.n >= 2].tolist()
        ]
        best = sorted(map(abs, scores), reverse=True)[:12]
        shown = [abs(s) for _, t, p, s in circuit.effects() if t != "logits" and p == port]
        assert shown == pytest.approx(best)
        assert len(best) == (12 if port == COMPUTED or sites == "block" else 0)


@pytest.mark.parametrize("sites", ["mlp", "block"])
def test_only_the_last_latents_have_edges_to_the_logits(tmp_path: Path, sites: str) -> None:
    """Each is gradient times activation, over the mean size of the metric."""
    circuit = analyse(tmp_path, sites)
    _, model = small_model("gpt2")
    pairs = site_pairs(sites, model)
    last = {"mlp": ["mlp_out.0", "mlp_out.1"], "block": ["resid_post.1"]}[sites]
    effects = {
        str(site): metric_effects(model, model.encode(random_task([6, 5, 4, 7])), site, one)
        for site, one in dictionaries(pairs).items()
    }
    edges = [(s, d) for s, t, d in circuit.edges(data=True) if t == "logits"]
    assert {circuit.nodes[name]["site"] for name, _ in edges} == set(last)
    for name, data in edges:
        node = circuit.nodes[name]
        one = effects[node["site"]]
        mean = one.effects[:, node.get("index", N)].mean() / one.metric.abs().mean()
        assert data["score"] == pytest.approx(float(mean))
        assert data["lo"] <= data["score"] <= data["hi"]
        site = Site(*node["site"].split(".")[:1], node["layer"])
        latents, task = [node.get("index", N)], model.encode(random_task([6, 5, 4, 7]))
        exact = removed_effects(model, task, site, dictionaries(pairs)[site], latents)
        assert data["exact"] == pytest.approx(float(exact.mean() / one.metric.abs().mean()))


def test_nodes_say_what_latents_are(tmp_path: Path) -> None:
    """Density, activations and tokens, by a loop over prompts; the logit lens by hand."""
    circuit = analyse(tmp_path)
    _, model = small_model("gpt2")
    found = dictionaries(site_pairs("mlp", model))
    clean = model.encode(random_task([6, 5, 4, 7])).clean
    run = model.run(clean, read=list(found))
    weight, _ = model.weights.unembedding(torch.float64)
    checked = 0
    for _, node in circuit.nodes(data=True):
        if node["kind"] != "feature":
            continue
        (site,) = (site for site in found if str(site) == node["site"])
        z = found[site].encode(run[site])[clean.mask][:, node["index"]]
        ids = clean.ids[clean.mask]
        assert node["density"] == pytest.approx(float((z != 0).double().mean()))
        assert node["max_activation"] == pytest.approx(float(z.max()))
        assert node["mean_activation"] == pytest.approx(float(z[z != 0].mean()))
        by_token = {int(t): float(z[(ids == t) & (z != 0)].mean()) for t in set(ids[z != 0])}
        best = sorted(by_token.items(), key=lambda item: (-item[1], item[0]))[:5]
        assert [name for name, _ in node["top_tokens"]] == [f"#{token}" for token, _ in best]
        lens = found[site].W_d[node["index"]] @ weight
        assert node["logit_lens"][0][0] == f"#{int(lens.argmax())}"
        checked += 1
    assert checked >= 5


def test_where_all_is_linear_ablations_say_the_same(tmp_path: Path) -> None:
    """No norm, linear MLPs, latents that are always active: an attribution is what it does."""
    module = random_gpt2(layer_norm=False, activation="linear")
    model = load_model((module, None))
    folder = save(model, "mlp.0", tmp_path / "set", on=50.0, k=None)
    task = random_task([6, 5, 4, 7])
    circuit = feature_interactions(
        model, task, dictionaries=folder, min_coactivation=1, verify=30, n_tokens=1
    )
    rows = circuit.graph["ablations"]
    assert len(rows) == 30
    assert {row["stratum"] for row in rows} == {"strongest", "middle", "bottom"}
    for row in rows:
        assert row["exact"] == pytest.approx(row["attribution"], rel=1e-6, abs=1e-9)
    words = "sign right for 100% of 30 edges, rank correlation 1.00, effect per attribution 1.00"
    assert circuit.graph["findings"]["ablated edges"] == words


def test_metric_and_loss_are_those_of_the_kept_edges(tmp_path: Path) -> None:
    """Targets are made of the latents from which an edge is in the circuit."""
    circuit = analyse(tmp_path, "mlp")
    _, model = small_model("gpt2")
    pairs = site_pairs("mlp", model)
    kept: list[dict[int, set[int]]] = [{}, {}]
    for source, target in circuit.edges():
        one, other = circuit.nodes[source], circuit.nodes[target]
        if target != "logits" and one["kind"] == "feature":
            kept[other["layer"]].setdefault(other["index"], set()).add(one["index"])
    chosen = [{i: frozenset(j) for i, j in part.items()} for part in kept]
    task = model.encode(random_task([6, 5, 4, 7]))
    edges = KeptEdges(model, pairs, dictionaries(pairs), chosen)
    for label, expected in (("metric", edges.metric(task)), ("loss", edges.loss([task.clean]))):
        if label not in circuit.graph["kept_edges"]:
            # Random models may do worse than chance.
            assert "no better than chance" in circuit.graph["findings"]["loss with kept edges"]
            assert expected.mean("clean")[0] >= math.log(model.vocab_size)
            continue
        found = circuit.graph["kept_edges"][label]
        for name in ("clean", "kept", "none"):
            assert found[name]["value"] == pytest.approx(expected.mean(name)[0])
            assert found[name]["lo"] <= found[name]["value"] <= found[name]["hi"]


def test_the_mass_of_errors_is_that_of_their_edges(tmp_path: Path) -> None:
    """The share of Σ |attribution|, where every edge is in the circuit."""
    circuit = analyse(tmp_path, "mlp", top="all", min_coactivation=1)
    for pair, layer in (("mlp.0", 0), ("mlp.1", 1)):
        mass = {True: 0.0, False: 0.0}
        for source, target, data in circuit.edges(data=True):
            if target != "logits" and circuit.nodes[target]["site"] == f"mlp_out.{layer}":
                error = circuit.nodes[source]["kind"] == "error"
                mass[error] += data["mean_absolute"] * data["n"]
        share = mass[True] / sum(mass.values())
        assert circuit.graph["error_mass"][pair] == pytest.approx(share)
        assert 0 < share < 1


def test_clusters_and_other_sets_are_there_when_asked_for(tmp_path: Path) -> None:
    """Every latent gets a group; a panel has a point for each set."""
    _, model = small_model("gpt2")
    save(model, "mlp.0", tmp_path / "other", k=3)
    circuit = analyse(tmp_path, "mlp.0", cluster="label", compare=tmp_path)
    groups = [d["cluster"] for _, d in circuit.nodes(data=True) if d["kind"] == "feature"]
    assert set(groups) == set(range(max(groups) + 1))
    plain = analyse(tmp_path, "mlp.0")
    assert not any("cluster" in data for _, data in plain.nodes(data=True))
    assert len(panels_of(circuit)) == len(panels_of(plain)) + 1
    points = panels_of(circuit)[-1].to_json()["points"]
    assert [point["name"] for point in points] == ["mlp.0, L0 6", "other, L0 3"]


def test_the_same_options_give_the_same_circuit(tmp_path: Path) -> None:
    """Also with clusters, and with another batch size up to rounding."""
    first, second, small = (
        analyse(tmp_path, cluster="label", batch_size=size) for size in (None, None, 1)
    )
    assert first.to_json() == second.to_json()
    for one, other in zip(first.effects(), small.effects(), strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3])


def test_a_bundled_model_brings_texts(tmp_path: Path) -> None:
    """In float32: at least as many tokens as asked for, beside the task's own."""
    model = load_model("hand-induction")
    task = next(task for task in zoo.tasks() if task.name == "hand-induction")
    sizes = {"width": model.d_model, "n": N}
    pairs = site_pairs("block.0", model)
    found = {}
    for seed, site in enumerate(sites_of(pairs)):
        found[site] = random_dictionary(**sizes, seed=seed).float()
        found[site].info = DictionaryInfo(site=str(site), context_length=4)
    (tmp_path / "set").mkdir()
    write_set(DictionarySet(found, pairs, {}), tmp_path / "set")
    circuit = feature_interactions(
        model, task, dictionaries=tmp_path / "set", n_tokens=900, verify=3, top=5
    )
    tokens = circuit.graph["dictionaries"]["resid_pre.0"]["tokens"]
    assert tokens >= 900
    assert any("4 tokens per prompt" in text for text in circuit.graph["warnings"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dictionaries": None}, "circuitlab dict train"),
        ({"top": 0}, "--top 0"),
        ({"min_coactivation": 0}, "--min-coactivation 0"),
        ({"verify": -1}, "--verify -1"),
        ({"n_tokens": 0}, "--n-tokens 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"compare": Path("nowhere")}, "--compare 'nowhere'"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Offender, fact and remedy."""
    with pytest.raises(OptionError, match=message):
        analyse(tmp_path, "mlp.0", **options)


def test_the_analysis_keeps_the_contract(tmp_path: Path) -> None:
    """It passes what every analysis must, on padded prompts, with dictionaries of that model."""
    folder = save(tiny_model(), "mlp", tmp_path / "set")
    options = {"dictionaries": folder, "min_coactivation": 2, "verify": 6, "n_tokens": 1}
    circuit = check_analysis("feature-interactions", options=options)
    assert circuit.number_of_edges() > 0
