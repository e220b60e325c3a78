"""The engine against brute force: sets of edges, nodes, streams, both modes."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import oracles
import pytest
import torch
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    Edge,
    EncodedTask,
    GraphError,
    OptionError,
    Patcher,
    Site,
    SiteError,
    TracedModel,
    edge_effects,
    edge_sets,
    load_model,
    patchers,
)
from circuitlab.ablation import Ablation

TOLERANCE = 1e-9
METRICS = ("logit-difference", "answer-log-prob", "kl-divergence")


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(3, 2, 16, seed=3)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


def only(model: TracedModel, pairs: EncodedTask, **how: Any) -> Patcher:
    (patcher,) = patchers(model, pairs, **how)
    return patcher


def brute_sets(
    module: Any, pairs: EncodedTask, sets: list[set[Edge]], mode: str, ablation: str
) -> Tensor:
    """``[n_sets, batch]``: each set patched in a forward pass of its own."""
    mask = pairs.clean.mask.long()
    base, other = pairs.clean.ids, pairs.corrupt.ids
    if mode == "denoise":
        base, other = other, base
    with torch.no_grad():
        reference = oracles.run(module, pairs.clean.ids, mask).logits[:, -1]
    metric = partial(pairs.score, reference=reference)
    return torch.stack(
        [
            oracles.patched_metric(
                module, base, other, metric, chosen, ablation=ablation, attention_mask=mask
            )
            for chosen in sets
        ]
    )


def random_sets(model: TracedModel, seed: int) -> list[set[Edge]]:
    rng = Random(seed)
    edges = model.wiring.edges
    sizes = (0, 1, 2, 5, 20, len(edges) // 2, len(edges))
    return [set(rng.sample(edges, size)) for size in sizes]


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize(
    ("mode", "ablation"),
    [
        ("noise", "counterfactual"),
        ("denoise", "counterfactual"),
        ("noise", "zero"),
        ("noise", "mean"),
    ],
)
@pytest.mark.parametrize("metric", METRICS)
def test_sets_equal_brute_force(
    module: Any, model: TracedModel, mode: Any, ablation: Ablation, metric: str
) -> None:
    """No edge, one, some, half, all of them: the metric of a split model with these replaced."""
    pairs = model.encode(random_task([6, 3, 5], metric))
    patcher = only(model, pairs, mode=mode, ablation=ablation)
    for seed in range(2):
        sets = random_sets(model, seed)
        expected = brute_sets(module, pairs, sets, mode, ablation)
        assert largest(patcher.sets(sets) - expected) < TOLERANCE
        # The empty set is the base run; all edges, with nothing recomputed, the other.
        assert largest(expected[0] - patcher.base_score) < TOLERANCE
        if ablation == "counterfactual":
            assert largest(expected[-1] - patcher.other_score) < TOLERANCE
    assert largest(expected - expected[0]) > 0.1


def test_few_sets_at_a_time(model: TracedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few sets fit into memory, their scores are those of all at once."""
    patcher = only(model, model.encode(random_task([5, 4])))
    sets = random_sets(model, 5)
    expected = patcher.sets(sets)
    monkeypatch.setattr(edge_sets, "SET_MEMORY", 0)
    assert largest(patcher.sets(sets) - expected) < TOLERANCE
    assert patcher.sets([]).shape == (0, 2)


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_a_set_of_one_is_that_edge(model: TracedModel, mode: Any) -> None:
    """Two algorithms, one number: a single edge and a set of one."""
    patcher = only(model, model.encode(random_task([6, 4])), mode=mode)
    edges = model.wiring.edges[::3]
    assert largest(patcher.sets([[edge] for edge in edges]) - patcher.edges(edges)) < TOLERANCE


@pytest.mark.parametrize("metric", METRICS)
def test_denoising_is_noising_with_the_prompts_exchanged(
    module: Any, model: TracedModel, metric: str
) -> None:
    """Clean outputs into the corrupt run, scored as the clean run is; negative helps."""
    pairs = model.encode(random_task([6, 3], metric))
    edges = list(model.wiring.edges[::4])
    effects = edge_effects(model, pairs, edges, mode="denoise")
    expected = brute_sets(
        module, pairs, [set(), *({edge} for edge in edges)], "denoise", "counterfactual"
    )
    assert largest(effects - (expected[0] - expected[1:])) < TOLERANCE


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_a_node_is_all_edges_out_of_it(model: TracedModel, mode: Any) -> None:
    """A source's output changed where it joins the stream: all of its edges patched together."""
    patcher = only(model, model.encode(random_task([6, 4])), mode=mode)
    for row, source in enumerate(model.wiring.sources):
        whole = patcher.scores(model.joins(source), patcher.difference[row][None])
        assert largest(whole - patcher.sets([patcher.out_edges(source)])) < TOLERANCE, source


def test_the_whole_stream_replaced_is_the_other_run(model: TracedModel) -> None:
    """Every source's difference added at a stream: what follows is the other run."""
    patcher = only(model, model.encode(random_task([6, 4])))
    other = only(model, model.encode(random_task([6, 4])), mode="denoise")
    for layer in range(model.n_layers):
        for kind in ("resid_pre", "resid_mid", "resid_post"):
            site = Site(kind, layer)
            change = other.stream(site) - patcher.stream(site)
            assert largest(patcher.scores(site, change[None]) - patcher.other_score) < TOLERANCE


def test_one_component_recomputed(model: TracedModel) -> None:
    """Heads and MLPs that read all of the other run's stream write what they do there."""
    pairs = model.encode(random_task([6, 4]))
    patcher, other = only(model, pairs), only(model, pairs, mode="denoise")
    rows = model.wiring.source_rows
    for layer in range(model.n_layers):
        change = (
            other.stream(Site("resid_pre", layer)) - patcher.stream(Site("resid_pre", layer))
        )[None]
        z = patcher.attention(layer, dict.fromkeys("qkv", change))
        each = change[:, None].expand(-1, model.n_heads, -1, -1, -1)
        assert largest(patcher.attention(layer, dict.fromkeys("qkv", each)) - z) < TOLERANCE
        mask = pairs.clean.mask[None, :, :, None]
        for head in range(model.n_heads):
            written = patcher.head_output(layer, head, z[:, :, :, head]) * mask
            assert largest(written[0] - patcher.difference[rows[f"a{layer}.h{head}"]]) < TOLERANCE
        heard = other.stream(Site("resid_mid", layer)) - patcher.stream(Site("resid_mid", layer))
        answer = patcher.mlp(layer, heard[None])[0] * mask[0]
        assert largest(answer - patcher.difference[rows[f"m{layer}"]]) < TOLERANCE


def test_what_cannot_be_patched(model: TracedModel) -> None:
    """Wrong modes, sites, sources and edges are named."""
    pairs = model.encode(random_task([4]))
    patcher = only(model, pairs)
    with pytest.raises(OptionError, match="ablation zero has no such run"):
        patchers(model, pairs, mode="denoise", ablation="zero")
    with pytest.raises(SiteError, match=r"mlp_out\.0 is not the residual stream"):
        patcher.scores(Site("mlp_out", 0), patcher.difference[:1])
    with pytest.raises(GraphError, match="'logits' writes nothing"):
        model.joins("logits")
    with pytest.raises(GraphError, match=r"a2\.h0 -> a1\.h1:q does not exist"):
        patcher.sets([[Edge("a2.h0", "a1.h1", "q")]])
    with pytest.raises(GraphError, match=r"receiver a1\.h1 does not exist"):
        patcher.sets([[Edge("a0.h0", "a1.h1")]])
