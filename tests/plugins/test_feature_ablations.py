"""Ablations of latents and kept edges alone: against plain blocks, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from circuitlab_feature_interactions.ablations import (
    KeptEdges,
    Recovery,
    agreement,
    exact_effects,
    masked_targets,
    sample_edges,
)
from circuitlab_feature_interactions.sites import site_pairs
from feature_oracles import (
    N,
    dictionaries,
    every_edge,
    prompts_of,
    run_from,
    some_edges,
    unpadded,
)
from path_scores import padded_pairs, small_model
from torch.nn import functional

from circuitlab import rank_correlation

# --- ablations ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("sites", "k"), [("mlp.1", 6), ("block.0", 6), ("block.1", None)])
def test_ablations_are_those_of_a_loop(sites: str, k: int | None) -> None:
    """Latents are taken out of padded prompts as if each were run alone, by a plain block."""
    module, model = small_model("gpt2")
    (pair,) = site_pairs(sites, model)
    found = dictionaries([pair], k)
    reads, writes = found[pair.source], found[pair.target]
    tokens, alone = prompts_of(model)
    edges = some_edges(60)
    scale = torch.rand(N, dtype=torch.float64) + 0.5
    measured = exact_effects(
        model, [tokens.rows([0]), tokens.rows([1, 2])], pair, found, edges, scale
    )
    streams = [(ids, model.run(unpadded(ids), read=[pair.source])[pair.source]) for ids in alone]
    for row, (i, j) in enumerate(zip(edges.target.tolist(), edges.source.tolist(), strict=True)):
        changes = []
        for ids, x in streams:
            z = reads.encode(x)
            on = torch.ones(ids.shape[1]).bool() if j == N else z[0, :, j] != 0
            less = reads(x) if j == N else x - z[0, :, j, None] * reads.W_d[j]
            old = writes.encode(run_from(module, pair, ids, x))[0, :, i]
            new = writes.encode(run_from(module, pair, ids, less))[0, :, i]
            for place in range(ids.shape[1]):
                seen = on[place] if pair.route == "mlp" else on[: place + 1].any()
                if seen and old[place] != 0:
                    changes.append(float(old[place] - new[place]))
        if changes:
            expected = sum(changes) / len(changes) / float(scale[i])
            assert float(measured[row]) == pytest.approx(expected, abs=1e-9)
        else:
            assert measured[row].isnan()
    assert measured.isfinite().sum() >= 10


def test_latents_that_leave_the_selection_count_in_full() -> None:
    """A latent that falls out of the TopK when another is taken out has lost all of itself."""
    _, model = small_model("gpt2")
    (pair,) = site_pairs("mlp.0", model)
    found = dictionaries([pair], k=1)
    tokens, _ = prompts_of(model)
    run = model.run(tokens, read=[pair.source, pair.target])
    x, reads, writes = run[pair.source], found[pair.source], found[pair.target]
    less = reads.decode(torch.zeros_like(reads.encode(x))) + reads.error(x)
    after = model.run(tokens, write={pair.source: less}, read=[pair.target])[pair.target]
    z, old, new = reads.encode(x), writes.encode(run[pair.target]), writes.encode(after)
    left = ((old > 0) & (new == 0)).any(-1) & tokens.mask
    assert left.any()
    row, place = left.nonzero()[0].tolist()
    i, j = int(old[row, place].argmax()), int(z[row, place].argmax())
    edges = some_edges(1, error=False)
    edges.target[0], edges.source[0] = i, j
    scale = torch.ones(N, dtype=torch.float64)
    one = exact_effects(model, [tokens.rows([row])], pair, found, edges, scale)
    where = (z[row, :, j] > 0) & (old[row, :, i] > 0) & tokens.mask[row]
    expected = (old[row, :, i] - new[row, :, i])[where].mean()
    assert float(one) == pytest.approx(float(expected))


def test_samples_hold_every_stratum() -> None:
    """A third of the strongest, then those up to 95 % of the mass, then the rest; each once."""
    sizes = torch.cat([torch.full((10,), 10.0), torch.full((40,), 1.0), torch.full((50,), 0.01)])
    strata = sample_edges(sizes, 12)
    assert strata["strongest"] == [0, 1, 2, 3]
    assert len(strata["middle"]) == len(strata["bottom"]) == 4
    # 140.5 in all: 10 of size 10 and 34 of size 1 hold 95 %.
    assert all(4 <= edge < 44 for edge in strata["middle"])
    assert all(edge >= 44 for edge in strata["bottom"])
    assert sample_edges(sizes, 12) == strata
    every = sample_edges(sizes, 100)
    assert sorted(edge for edges in every.values() for edge in edges) == list(range(100))


def test_samples_of_few_edges_are_all_of_them() -> None:
    """Whatever the strata are short of."""
    for sizes in (torch.tensor([1.0, 0.0]), torch.zeros(3), torch.tensor([4.0])):
        found = sample_edges(sizes, 9)
        assert sorted(e for edges in found.values() for e in edges) == list(range(len(sizes)))


def test_agreement_by_hand() -> None:
    """Two of four signs, ranks and slope; what was not measured is left out."""
    scores = torch.tensor([3.0, -1.0, 2.0, 0.0, 5.0])
    exact = torch.tensor([6.0, -2.0, -1.0, 0.0, float("nan")])
    found = agreement(scores, exact)
    assert found is not None
    assert (found.n, found.sign) == (4, 0.5)
    assert found.slope == pytest.approx((18 + 2 - 2) / (9 + 1 + 4))
    # Ranks 3 0 2 1 and 3 0 1 2: squared differences sum to 2, of 4 things.
    assert found.rank == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert agreement(scores[-1:], exact[-1:]) is None


def test_rank_correlation_with_ties() -> None:
    """Ties share their mean rank: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4."""
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    ranks = torch.tensor([[1.0, 2.5, 2.5, 4.0], [1.0, 2.0, 3.0, 4.0]])
    assert rank_correlation(a, b) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert rank_correlation(torch.ones(3), torch.arange(3.0)) is None


# --- the kept edges alone -------------------------------------------------------------------------


@pytest.mark.parametrize("sites", ["mlp", "block", "mlp.1"])
def test_with_all_edges_the_loss_is_the_models(sites: str) -> None:
    """And it is the plain cross-entropy of each prompt alone."""
    module, model = small_model("gpt2")
    pairs = site_pairs(sites, model)
    tokens, alone = prompts_of(model)
    loss = KeptEdges(model, pairs, dictionaries(pairs), every_edge(pairs)).loss([tokens])
    for row, ids in enumerate(alone):
        logits = module(ids).logits[0, :-1].detach()
        expected = functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert float(loss.clean[row]) == pytest.approx(float(expected))
        assert int(loss.weights[row]) == ids.shape[1] - 1
    assert torch.allclose(loss.kept, loss.clean, atol=1e-9)
    assert (loss.none - loss.clean).abs().max() > 1e-3
    assert loss.mean("clean")[0] == pytest.approx(float(loss.clean.sum() / loss.weights.sum()))


def test_with_all_edges_the_metric_is_the_models() -> None:
    """In batches too; with no edge it is that of reconstructions without latents."""
    _, model = small_model("gpt2")
    (pair,) = pairs = site_pairs("block.1", model)
    found, task = dictionaries(pairs), padded_pairs(model)
    metric = KeptEdges(model, pairs, found, every_edge(pairs)).metric(task, batch_size=2)
    run = model.run(task.clean, read=[pair.source, pair.target])
    reference = run.logits[:, -1]
    assert torch.allclose(metric.clean, task.score(reference, reference))
    assert torch.allclose(metric.kept, metric.clean)
    reads, writes = found[pair.source], found[pair.target]
    bare = reads.b_d + reads.error(run[pair.source])
    out = model.run(task.clean, write={pair.source: bare}, read=[pair.target])[pair.target]
    written = writes(out) + writes.error(run[pair.target])
    logits = model.run(task.clean, write={pair.target: written}).logits[:, -1]
    assert torch.allclose(metric.none, task.score(logits, reference))


def test_what_is_recovered() -> None:
    """The share of what no edges lose, for what is better high and better low."""
    clean, kept, none, ones = (torch.tensor(v).double() for v in ([4, 6], [3, 4], [0, 2], [1, 1]))
    high = Recovery(clean, kept, none, ones, higher=True)
    low = Recovery(-clean, -kept, -none, ones, higher=False)
    for one in (high, low):
        share = one.recovered()
        assert share is not None
        assert share[0] == pytest.approx(5 / 8)
        assert share[1] == pytest.approx((0.5, 0.75))
    assert Recovery(none, kept, clean, ones, higher=True).recovered() is None
    assert high.mean("kept")[0] == pytest.approx(3.5)


@pytest.mark.parametrize("sites", ["mlp.0", "block.1"])
def test_each_target_sees_its_kept_sources_alone(sites: str) -> None:
    """One run for each target, by a plain block on one prompt at a time."""
    module, model = small_model("gpt2")
    (pair,) = site_pairs(sites, model)
    found = dictionaries([pair])
    reads, writes = found[pair.source], found[pair.target]
    tokens, alone = prompts_of(model)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(N, N, generator=generator) < 0.4
    kept = {i: frozenset(chosen[i].nonzero()[:, 0].tolist()) for i in range(0, N, 2)}
    z_kept = masked_targets(model, tokens, pair, found, kept, {})
    for row, ids in enumerate(alone):
        x = model.run(unpadded(ids), read=[pair.source])[pair.source]
        z = reads.encode(x)
        for i in range(N):
            on = chosen[i].double() if i in kept else torch.zeros(N).double()
            part = reads.decode(z * on) + reads.error(x)
            expected = writes.encode(run_from(module, pair, ids, part))[0, :, i]
            assert torch.allclose(z_kept[row, -ids.shape[1] :, i], expected, atol=1e-9)
