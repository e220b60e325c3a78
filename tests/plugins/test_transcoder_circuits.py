"""Circuits of transcoders: measured, taken out and kept alone, against plain blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.ablations import KeptEdges, exact_effects, masked_targets
from circuitlab_feature_interactions.cards import measuring
from circuitlab_feature_interactions.circuits import feature_interactions
from circuitlab_feature_interactions.data import PromptStream, seed_of
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.evaluating import draw, measure_sites
from circuitlab_feature_interactions.gathering import COMPUTED, LOCAL, gather
from circuitlab_feature_interactions.logits import metric_effects, removed_effects
from circuitlab_feature_interactions.sites import Pair, site_pairs, sites_of
from feature_oracles import N, every_edge, prompts_of, random_dictionary, some_edges, unpadded
from oracles import random_gpt2
from path_scores import padded_pairs, small_model
from random_tasks import random_task
from torch import Tensor
from torch.nn import functional

from circuitlab import Dictionary, DictionaryInfo, Site, load_model
from circuitlab.testing import check_analysis, tiny_model


def transcoders(pairs: list[Pair], width: int = 16, k: int | None = 6) -> dict[Site, Dictionary]:
    """Random ones of every MLP of the pairs; they miss much, so that errors matter."""
    found = {}
    for seed, site in enumerate(sites_of(pairs)):
        one = random_dictionary(width, seed=seed, k=k)
        info = DictionaryInfo(site=str(site), target=f"mlp_out.{site.layer}", context_length=16)
        found[site] = Dictionary(
            one.W_e, one.b_e, one.W_d, one.b_d,
            k=k, transcoder=True, apply_b_dec_to_input=False, info=info,
        ).requires_grad_(False)  # fmt: skip
    return found


def plain_run(
    module: Any, ids: Tensor, written: dict[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """What MLPs read and wrote, and the logits, where some MLPs write something else."""
    read: dict[int, Tensor] = {}
    out: dict[int, Tensor] = {}
    handles = []
    for layer, block in enumerate(module.transformer.h):

        def before(_: Any, args: Any, layer: int = layer) -> None:
            read[layer] = args[0].detach()

        def after(_: Any, args: Any, value: Tensor, layer: int = layer) -> Tensor:
            out[layer] = written.get(layer, value).detach()
            return out[layer]

        handles.append(block.ln_2.register_forward_pre_hook(before))
        handles.append(block.mlp.register_forward_hook(after))
    logits = module(ids).logits.detach()
    for handle in handles:
        handle.remove()
    return read, out, logits


@torch.no_grad()
def test_reconstruction_and_loss_are_those_of_the_mlps_output() -> None:
    """Centred R² of what the MLP writes, and losses with it replaced there, prompt by prompt."""
    module, model = small_model("gpt2")
    pairs = site_pairs("transcoder.0", model)
    found = transcoders(pairs)
    tokens, alone = prompts_of(model)
    sums = measure_sites(model, sites_of(pairs), found, [tokens])
    for site, one in found.items():
        layer = site.layer or 0
        values, missed, losses = [], [], []
        for ids in alone:
            read, out, logits = plain_run(module, ids, {})
            made = one(read[layer])
            values.append(out[layer][0])
            missed.append((made - out[layer])[0])
            runs = [logits]
            runs += [plain_run(module, ids, {layer: y})[2] for y in (made, 0 * made)]
            losses.append(
                [functional.cross_entropy(r[0, :-1], ids[0, 1:], reduction="sum") for r in runs]
            )
        y = torch.cat(values)
        r2 = 1 - torch.cat(missed).square().sum() / (y - y.mean(0)).square().sum()
        told = sums[site].summary()
        assert told["r2"] == pytest.approx(float(r2))
        clean, made, zero = torch.tensor(losses).sum(0).tolist()
        n = sum(ids.shape[1] - 1 for ids in alone)
        assert told["ce"]["clean"] == pytest.approx(clean / n)
        assert told["ce"]["reconstructed"] == pytest.approx(made / n)
        assert told["ce"]["zero"] == pytest.approx(zero / n)


def test_direct_and_attention_are_all_that_is_gathered() -> None:
    """Sums over batches: the direct part is decoder times encoder, of the same token."""
    _, model = small_model("gpt2")
    pairs = site_pairs("transcoder.0", model)
    (one, other), found = sites_of(pairs), transcoders(pairs)
    tokens, _ = prompts_of(model)
    batches = [tokens.rows([0]), tokens.rows([1, 2])]
    gathered = gather(model, pairs, found, batches)
    run = model.run(tokens, read=[one, other, Site("mlp_out", 0)], logits="none")
    z, target = (found[site].encode(run[site])[tokens.mask] for site in (one, other))
    direct = (found[one].W_d @ found[other].W_e).T * z[:, None] * (target > 0)[..., None]
    sums = gathered.interactions[0].sums
    assert set(sums) == {COMPUTED, LOCAL}
    table = sums[COMPUTED].table(sums[LOCAL])
    scale = target.sum(0) / (target > 0).sum(0).clamp(min=1)
    for row in range(0, len(table), 7):
        i, j = int(table.target[row]), int(table.source[row])
        if j < N:
            expected = float(direct[:, i, j].sum() / table.n[row] / scale[i])
            assert float(table.local[row]) == pytest.approx(expected, abs=1e-9)
    stats = gathered.activity[one].stats.summary()
    y = run[Site("mlp_out", 0)][tokens.mask]
    missed = found[one].error(run[one], run[Site("mlp_out", 0)])[tokens.mask]
    r2 = 1 - float(missed.square().sum() / (y - y.mean(0)).square().sum())
    assert stats["r2"] == pytest.approx(r2)


@torch.no_grad()
@pytest.mark.parametrize("k", [6, None])
def test_ablations_are_those_of_a_loop(k: int | None) -> None:
    """A latent's own part, or the error, is taken out of what the MLP writes, by a plain model."""
    module, model = small_model("gpt2")
    (pair,) = pairs = site_pairs("transcoder.0", model)
    found = transcoders(pairs, k=k)
    reads, writes = found[pair.source], found[pair.target]
    tokens, alone = prompts_of(model)
    edges, scale = some_edges(40), torch.rand(N, dtype=torch.float64) + 0.5
    batches = [tokens.rows([0]), tokens.rows([1, 2])]
    measured = exact_effects(model, batches, pair, found, edges, scale)
    for row, (i, j) in enumerate(zip(edges.target.tolist(), edges.source.tolist(), strict=True)):
        changes = []
        for ids in alone:
            read, out, _ = plain_run(module, ids, {})
            z = reads.encode(read[0])
            on = torch.ones(ids.shape[1]).bool() if j == N else z[0, :, j] != 0
            less = reads(read[0]) if j == N else out[0] - z[0, :, j, None] * reads.W_d[j]
            after, _, _ = plain_run(module, ids, {0: less})
            old, new = (writes.encode(x[1])[0, :, i] for x in (read, after))
            seen = on.cumsum(0) > 0
            changes += [float(a - b) for a, b, s in zip(old, new, seen, strict=True) if s and a > 0]
        if changes:
            expected = sum(changes) / len(changes) / float(scale[i])
            assert float(measured[row]) == pytest.approx(expected, abs=1e-9)
        else:
            assert measured[row].isnan()
    assert measured.isfinite().sum() >= 10


# --- the kept edges alone -------------------------------------------------------------------------


def test_with_all_edges_the_model_is_what_it_was() -> None:
    """Over a chain of three MLPs; with no edge it is not."""
    _, model = small_model("gpt2", n_layers=3)
    pairs = site_pairs("transcoder", model)
    assert len(pairs) == 2
    tokens, _ = prompts_of(model)
    loss = KeptEdges(model, pairs, transcoders(pairs), every_edge(pairs)).loss([tokens])
    assert torch.allclose(loss.kept, loss.clean, atol=1e-9)
    assert (loss.none - loss.clean).abs().max() > 1e-3


@torch.no_grad()
def test_each_target_sees_its_kept_sources_alone() -> None:
    """Through a chain, by a plain model: latents made of kept ones make the next ones."""
    module, model = small_model("gpt2", n_layers=3)
    pairs = site_pairs("transcoder", model)
    found = transcoders(pairs)
    one, two, three = (found[site] for site in sites_of(pairs))
    _, alone = prompts_of(model)
    chosen = torch.rand(2, N, N, generator=torch.Generator().manual_seed(0)) < 0.4
    kept = [{i: frozenset(part[i].nonzero()[:, 0].tolist()) for i in range(N)} for part in chosen]
    task = padded_pairs(model)
    metric = KeptEdges(model, pairs, found, kept).metric(task)
    reference = model.run(task.clean).logits[:, -1]
    logits = []
    for ids in alone:
        read, out, _ = plain_run(module, ids, {})
        z = one.encode(read[0])
        missed = [d.error(read[n], out[n]) for n, d in enumerate((one, two, three))]
        second = torch.zeros(1, ids.shape[1], N).double()
        third = torch.zeros_like(second)
        for i in range(N):
            written = one.decode(z * chosen[0, i]) + missed[0]
            second[..., i] = two.encode(plain_run(module, ids, {0: written})[0][1])[..., i]
        for i in range(N):
            written = two.decode(second * chosen[1, i]) + missed[1]
            third[..., i] = three.encode(plain_run(module, ids, {1: written})[0][2])[..., i]
        ends = {1: two.decode(second) + missed[1], 2: three.decode(third) + missed[2]}
        logits.append(plain_run(module, ids, ends)[2][:, -1])
    expected = task.score(torch.cat(logits), reference)
    assert torch.allclose(metric.kept, expected, atol=1e-9)
    assert (metric.kept - metric.clean).abs().max() > 1e-3
    first = masked_targets(model, unpadded(alone[0]), pairs[0], found, kept[0], {})
    assert first.shape == (1, alone[0].shape[1], N)


# --- the metric -----------------------------------------------------------------------------------


@torch.no_grad()
def test_effects_on_the_metric_are_of_what_is_written() -> None:
    """Slopes are finite differences, removed latents plain runs, both at the MLP's output."""
    _, model = small_model("gpt2")
    pairs = site_pairs("transcoder.0", model)
    site, task = pairs[0].target, padded_pairs(model)
    dictionary, out = transcoders(pairs)[site], Site("mlp_out", 1)
    with torch.enable_grad():
        effects = metric_effects(model, task, site, dictionary)
    run = model.run(task.clean, read=[site, out])
    reference = run.logits[:, -1]
    z, error = dictionary.encode(run[site]), dictionary.error(run[site], run[out])
    latents = [*z.sum((0, 1)).topk(3).indices.tolist(), N]
    removed = removed_effects(model, task, site, dictionary, latents)
    clean = task.score(reference, reference)
    for number, latent in enumerate(latents):
        part = error if latent == N else z[..., latent, None] * dictionary.W_d[latent]

        def score(share: float, part: Tensor = part) -> Tensor:
            written = {out: run[out] + share * part}
            return task.score(model.run(task.clean, write=written).logits[:, -1], reference)

        slope = (score(1e-5) - score(-1e-5)) / 2e-5
        assert torch.allclose(effects.effects[:, latent], slope, atol=1e-7)
        assert torch.allclose(removed[number], clean - score(-1.0), atol=1e-9)


# --- the analysis ---------------------------------------------------------------------------------


def save(model: Any, folder: Path, **options: Any) -> Path:
    pairs = site_pairs("transcoder", model)
    found = transcoders(pairs, **options)
    folder.mkdir(exist_ok=True)
    write_set(DictionarySet(found, pairs, {}), folder)
    return folder


def test_the_circuit_tells_the_routes_apart(tmp_path: Path) -> None:
    """Every edge has a direct part and one through attention, which are all of its score."""
    _, model = small_model("gpt2")
    circuit = feature_interactions(
        model,
        random_task([6, 5, 4, 7]),
        dictionaries=save(model, tmp_path / "set"),
        top=12,
        min_coactivation=2,
        verify=6,
        n_tokens=1,
    )
    circuit.validate()
    edges = [data for _, target, data in circuit.edges(data=True) if target != "logits"]
    assert len(edges) == 12
    for data in edges:
        assert data["route"] == "transcoder"
        assert data["direct"] + data["through_attention"] == pytest.approx(data["score"])
    assert any(abs(data["through_attention"]) > 1e-3 for data in edges)
    ends = {circuit.nodes[s]["site"] for s, t in circuit.edges() if t == "logits"}
    assert ends == {"mlp_in.1"}
    assert set(circuit.graph["error_mass"]) == {"transcoder.0"}


def test_where_all_is_linear_ablations_say_the_same(tmp_path: Path) -> None:
    """No norms, an attention that writes nothing, latents always active: attributions are exact."""
    module: Any = random_gpt2(layer_norm=False)
    with torch.no_grad():
        module.transformer.h[1].attn.c_proj.weight.zero_()
    model = load_model((module, None))
    folder = save(model, tmp_path / "set", k=None)
    pairs = site_pairs("transcoder", model)
    found = transcoders(pairs, k=None)
    for number, one in enumerate(found.values()):
        one.b_e.add_(50.0 * 100**number)
    write_set(DictionarySet(found, pairs, {}), folder)
    circuit = feature_interactions(
        model,
        random_task([6, 5, 4, 7]),
        dictionaries=folder,
        min_coactivation=1,
        verify=30,
        n_tokens=1,
    )
    rows = circuit.graph["ablations"]
    assert len(rows) == 30
    for row in rows:
        assert row["exact"] == pytest.approx(row["attribution"], rel=1e-6, abs=1e-9)
    for _, target, data in circuit.edges(data=True):
        assert target == "logits" or data["through_attention"] == pytest.approx(0, abs=1e-12)


def test_cards_read_what_the_mlp_reads(tmp_path: Path) -> None:
    """A card's activation is the encoder's at the MLP's input, its lens that of what is written."""
    model = load_model("ioi-mini")
    pairs = site_pairs("transcoder.0", model)
    found = {site: one.float() for site, one in transcoders(pairs, model.d_model).items()}
    write_set(DictionarySet(found, pairs, {}), tmp_path / "set")
    told = measuring.card_data(
        model, dictionaries=tmp_path / "set", features="mlp_in.1: 3", n_tokens=100, seed=0
    )
    (card,) = [card["latent"] for card in told["cards"]]
    site = Site("mlp_in", 1)
    logits = found[site].W_d[3] @ model.weights.unembedding()[0]
    assert card["lens"]["raised"][0][0] == model.token_texts([int(logits.argmax())])[0]
    _, prompts = draw(PromptStream(model, None, None, seed_of(0, measuring._CARDS)), 100)
    values = [
        found[site].encode(model.run([ids.tolist()], read=[site], logits="none")[site])[..., 3]
        for ids in prompts
    ]
    assert card["top"]["value"] == pytest.approx(max(float(v.max()) for v in values), rel=1e-4)
    active = sum(int((v > 0).sum()) for v in values)
    assert card["density"]["active"] == active > 0


def test_the_analysis_keeps_the_contract(tmp_path: Path) -> None:
    """It passes what every analysis must, on padded prompts, with transcoders of that model."""
    folder = save(tiny_model(), tmp_path / "set")
    options = {"dictionaries": folder, "min_coactivation": 2, "verify": 6, "n_tokens": 1}
    assert check_analysis("feature-interactions", options=options).number_of_edges() > 0
