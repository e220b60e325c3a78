"""Exact effects of edges equal brute force: one forward pass of a split model for each edge."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    CircuitLabError,
    EncodedTask,
    GraphError,
    NumericsError,
    PromptPair,
    Task,
    TaskError,
    TracedModel,
    edge_effects,
    load_model,
    memory,
)
from circuitlab.ablation import Ablation
from circuitlab.wiring import Edge

#: float64 sums of some hundred terms after norms that amplify what is small.
TOLERANCE = 1e-9
ABLATIONS: tuple[Ablation, ...] = ("counterfactual", "zero", "mean")


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(2, 2, 16, seed=7)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


def brute_force(
    module: Any, pairs: EncodedTask, ablation: str, edges: list[Edge] | None = None
) -> dict[oracles.Edge, float]:
    mask = pairs.clean.mask.long()
    with torch.no_grad():
        reference = oracles.run(module, pairs.clean.ids, mask).logits[:, -1]
    return oracles.exact_effects(
        module,
        pairs.clean.ids,
        pairs.corrupt.ids,
        partial(score, pairs, reference=reference),
        edges,
        ablation,
        attention_mask=mask,
    )


def score(pairs: EncodedTask, logits: Tensor, reference: Tensor) -> Tensor:
    return pairs.score(logits, reference)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("metric", ["logit-difference", "kl-divergence"])
def test_all_edges_equal_brute_force(
    module: Any, model: TracedModel, ablation: Ablation, metric: str
) -> None:
    """Every edge of the model, on a padded batch, in every batch size: the oracle's effect."""
    pairs = model.encode(random_task([6, 3, 5, 6], metric))
    edges = model.wiring.edges
    expected = brute_force(module, pairs, ablation)
    assert len(edges) == len(expected) == model.wiring.n_edges
    for size in (1, 3, None):
        effects = edge_effects(model, pairs, edges, ablation=ablation, batch_size=size)
        assert effects.shape == (len(edges), 4)
        assert effects.dtype == torch.float64
        for edge, effect in zip(edges, effects.mean(1).tolist(), strict=True):
            assert abs(effect - expected[edge]) < TOLERANCE, (edge, size)
    assert max(map(abs, expected.values())) > 0.1


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), seed=st.integers(0, 50))
def test_padding_changes_no_effect(model: TracedModel, lengths: list[int], seed: int) -> None:
    """A pair has the same effects in a padded batch as alone."""
    task = random_task(lengths, seed=seed)
    edges = model.wiring.edges[::5]
    together = edge_effects(model, model.encode(task), edges)
    for column, pair in enumerate(task.pairs):
        alone = edge_effects(model, model.encode(Task("one", (pair,))), edges)
        assert float((together[:, column] - alone[:, 0]).abs().max()) < TOLERANCE


def test_order_and_repeats_of_edges(model: TracedModel) -> None:
    """Effects come in the order of the edges, repeated ones too; no edges give no rows."""
    pairs = model.encode(random_task([4, 4]))
    edges = model.wiring.edges
    effects = dict(zip(edges, edge_effects(model, pairs, edges), strict=True))
    mixed = [edges[-1], edges[3], edges[-1], edges[17], edges[0]]
    for edge, row in zip(mixed, edge_effects(model, pairs, mixed), strict=True):
        assert float((row - effects[edge]).abs().max()) < TOLERANCE
    assert edge_effects(model, pairs, []).shape == (0, 2)


def test_little_memory_gives_the_same(model: TracedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few edges fit into one pass, the effects are those of all at once."""
    pairs = model.encode(random_task([5, 4, 5]))
    edges = model.wiring.edges
    expected = edge_effects(model, pairs, edges)
    for n_rows in (0, 1, 3):
        monkeypatch.setitem(memory.PATCHES, "cpu", n_rows * 3 * 5 * 16 * 8)
        found = edge_effects(model, pairs, edges)
        assert float((found - expected).abs().max()) < TOLERANCE


def test_patching_does_not_run_what_is_before(module: Any, model: TracedModel) -> None:
    """Edges into the last layer run the last layer alone, once for many edges."""
    pairs = model.encode(random_task([4, 4]))
    edges = [edge for edge in model.wiring.edges if edge.target == "m1"]
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, block in enumerate(module.transformer.h)
    ]
    try:
        edge_effects(model, pairs, edges)
    finally:
        for handle in handles:
            handle.remove()
    # One clean and one corrupt pass of the whole model, one patched pass of the last block.
    assert (ran.count(0), ran.count(1)) == (2, 3)


@pytest.mark.parametrize(
    "edge",
    [
        Edge("m1", "a1.h0", "q"),
        Edge("a1.h0", "a1.h1", "v"),
        Edge("a0.h0", "a1.h0"),
        Edge("a0.h0", "m1", "q"),
        Edge("a0.h0", "a0.h0", "q"),
        Edge("logits", "m1"),
        Edge("input", "m2"),
        Edge("a7.h0", "m1"),
    ],
    ids=str,
)
def test_edge_that_does_not_exist(model: TracedModel, edge: Edge) -> None:
    """An edge against the order, through a wrong port or of no component is named."""
    pairs = model.encode(random_task([4]))
    with pytest.raises(GraphError, match=f"edge {edge.source} -> {edge.target}.* does not exist"):
        edge_effects(model, pairs, [Edge("input", "m0"), edge])


def test_uneven_prompts_cannot_be_swapped(model: TracedModel) -> None:
    """Counterfactual outputs need aligned prompts; each remedy that is named works."""
    pairs = (PromptPair((1, 2, 3), (4, 5), (1,), (2,)), PromptPair((1, 2), (3, 4), (1,), (2,)))
    edge = [Edge("input", "m0")]
    padded = model.encode(Task("uneven", pairs, align="pad"))
    message = "use --align drop, or --ablation zero or mean"
    with pytest.raises(TaskError, match=message) as caught:
        edge_effects(model, padded, edge)
    assert isinstance(caught.value, CircuitLabError)
    for ablation in ("zero", "mean"):
        assert edge_effects(model, padded, edge, ablation=ablation).shape == (1, 2)
    dropped = model.encode(Task("uneven", pairs, align="drop"))
    assert edge_effects(model, dropped, edge).shape == (1, 1)


def test_weight_that_is_not_finite() -> None:
    """A NaN among the weights stops the patching and is named."""
    module: Any = oracles.random_gpt2()
    model = load_model((module, None))
    module.transformer.h[1].mlp.c_fc.bias.data[2] = torch.nan
    with pytest.raises(NumericsError, match=r"NaN at site mlp_out\.1, prompt 1"):
        edge_effects(model, model.encode(random_task([4])), [Edge("input", "m0")])
