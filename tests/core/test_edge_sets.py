"""Sets of edges as masks, and the models and cases that brute force on GPT-2 does not reach."""

from __future__ import annotations

from random import Random
from typing import Any

import oracles
import pytest
import torch
from hooked_passes import Pass, Plain
from path_scores import TOLERANCES, small_model
from random_tasks import random_task
from torch import Tensor

from circuitlab import Edge, GraphError, Patcher, SiteError, TracedModel, load_model, patchers
from circuitlab.edge_sets import edge_masks

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return load_model((oracles.random_gpt2(3, 2, 16, seed=3), None))


def only(model: TracedModel, **how: Any) -> Patcher:
    (patcher,) = patchers(model, model.encode(random_task([6, 3, 5])), **how)
    return patcher


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def random_sets(model: TracedModel) -> list[set[Edge]]:
    rng, edges = Random(0), model.wiring.edges
    return [set(rng.sample(edges, len(edges) * share // 10)) for share in (1, 5, 9, 10)]


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_masks_are_sets(model: TracedModel, mode: Any) -> None:
    """A mask says which edges are patched, sources by receivers."""
    patcher, sets = only(model, mode=mode), random_sets(model)
    wiring = model.wiring
    masks = torch.zeros(len(sets), len(wiring.sources), len(wiring.receivers), dtype=torch.bool)
    for number, chosen in enumerate(sets):
        for edge in wiring.edges:
            column = [tuple(r) for r in wiring.receivers].index((edge.target, edge.port))
            masks[number, wiring.sources.index(edge.source), column] = edge in chosen
    assert torch.equal(edge_masks(wiring, sets), masks)
    assert largest(patcher.sets(masks) - patcher.sets(sets)) < TOLERANCE
    assert patcher.sets(masks[:0]).shape == (0, 3)


def test_sets_do_not_influence_one_another(model: TracedModel) -> None:
    """What sets have in common is computed once for all; alone each has the same score."""
    patcher, common = only(model), random_sets(model)[2]
    last = [edge for edge in model.wiring.edges if edge.target in ("logits", "m2")]
    sets = [common | {edge} for edge in last]
    for together in (sets, [common] * 3, [set[Edge]()] * 2):
        alone = torch.cat([patcher.sets([chosen]) for chosen in together])
        assert largest(patcher.sets(together) - alone) < TOLERANCE
    assert largest(patcher.sets(sets) - patcher.base_score) > 0.1


def test_a_component_that_nothing_reads_is_not_run(
    model: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every edge out of it patched, what goes into it is of no account."""
    patcher = only(model)
    removed = {edge for edge in model.wiring.edges if edge.target in ("logits", "m2")}
    expected = patcher.sets([removed])
    monkeypatch.setattr(Patcher, "attention", None)
    monkeypatch.setattr(Patcher, "mlp", None)
    removed |= {edge for edge in model.wiring.edges if edge.target in ("a2.h0", "a2.h1")}
    assert largest(patcher.sets([removed]) - expected) < TOLERANCE


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_attention_and_mlp_side_by_side(mode: Any) -> None:
    """An MLP does not read its own layer's heads: the stock GPT-NeoX under hooks says the same."""
    module, model = small_model("neox")
    assert model.wiring.parallel
    pairs = model.encode(random_task([6, 3, 5]))
    (patcher,) = patchers(model, pairs, mode=mode)
    plain = Plain(module)
    ids = [pairs.clean.ids, pairs.corrupt.ids]
    base, other = ids if mode == "noise" else ids[::-1]
    clean = Pass(plain).run(ids[0], pairs.clean.mask).logits
    outputs = Pass(plain).run(other, pairs.clean.mask).outputs
    sets = random_sets(model)
    for chosen, found in zip(sets, patcher.sets(sets), strict=True):
        mixes = {tuple(edge): outputs[edge.source] for edge in chosen}
        logits = Pass(plain, mixes=mixes).run(base, pairs.clean.mask).logits
        assert largest(found - pairs.score(logits, clean)) < TOLERANCES["neox"]
    assert largest(patcher.sets(sets) - patcher.base_score) > 0.1


def test_masks_of_another_model(model: TracedModel) -> None:
    """The shape, the type and the edge that is none are named."""
    patcher = only(model)
    masks = torch.zeros(1, len(model.wiring.sources), len(model.wiring.receivers))
    with pytest.raises(SiteError, match=r"type torch\.float32 and shape \[1, 10, 22\]; give bool"):
        patcher.sets(masks)
    with pytest.raises(SiteError, match=r"here \[n_sets, 10, 22\]"):
        patcher.sets(masks.bool()[:, :4])
    masks[0, -1, 0] = 1
    with pytest.raises(GraphError, match=r"edge m2 -> a0\.h0:q does not exist"):
        patcher.sets(masks.bool())
