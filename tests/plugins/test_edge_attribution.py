"""EAP and EAP-IG equal an oracle that differentiates a split model, edge by edge."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from circuitlab_edge_attribution.attribution import EdgeScores, edge_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    EncodedTask,
    NumericsError,
    OptionError,
    PromptPair,
    Task,
    TracedModel,
    edge_effects,
    load_model,
    zoo,
)
from circuitlab.ablation import Ablation
from circuitlab.patching import Edge

#: Two float32 computations of one sum, relative to the largest score.
FLOAT32 = 1e-5
FLOAT64 = 1e-11
ABLATIONS: tuple[Ablation, ...] = ("counterfactual", "zero", "mean")
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "eap"},
    {"method": "eap-ig", "ig_steps": 5, "ig_rule": "midpoint"},
    {"method": "eap-ig", "ig_steps": 3, "ig_rule": "left"},
)


def named(model: TracedModel, scores: Tensor) -> dict[Edge, float]:
    rows = {source: number for number, source in enumerate(model.wiring.sources)}
    columns = {tuple(receiver): number for number, receiver in enumerate(model.wiring.receivers)}
    return {e: float(scores[rows[e.source], columns[e[1:]]]) for e in model.wiring.edges}


def oracle(
    module: Any, pairs: EncodedTask, options: dict[str, Any], ablation: str
) -> dict[oracles.Edge, float]:
    mask = pairs.clean.mask.long()
    with torch.no_grad():
        reference = oracles.run(module, pairs.clean.ids, mask).logits[:, -1]

    def metric(logits: Tensor) -> Tensor:
        return pairs.score(logits, reference)

    score = oracles.eap
    if options["method"] == "eap-ig":
        steps, rule = options["ig_steps"], options["ig_rule"]
        score = partial(oracles.eap_ig, steps=steps, rule=rule)
    ids = pairs.clean.ids, pairs.corrupt.ids
    return score(module, *ids, metric, None, ablation, attention_mask=mask)


def compare(found: dict[Edge, float], expected: dict[oracles.Edge, float], share: float) -> None:
    assert set(found) == set(expected)
    largest = max(map(abs, expected.values()))
    assert largest > 1e-3
    for edge, value in expected.items():
        assert abs(found[Edge(*edge)] - value) < share * largest, edge


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {"seed": 0},
        {"seed": 1, "n_layers": 3, "n_heads": 4, "d_model": 32},
        {"seed": 2, "layer_norm": False},
        {"seed": 3, "mlp": False, "n_heads": 1},
    ],
    ids=["plain", "larger", "no norms", "no MLP"],
)
def test_scores_are_the_oracles(
    shape: dict[str, Any], ablation: Ablation, options: dict[str, Any]
) -> None:
    """All edges of a float32 model on a padded batch, whether batched by 1, 2 or all."""
    module = oracles.random_gpt2(dtype=torch.float32, **shape)
    model = load_model((module, None))
    pairs = model.encode(random_task([6, 3, 5], seed=shape["seed"]))
    expected = oracle(module.double(), pairs, options, ablation)
    module.float()
    for size in (1, 2, 8):
        scored = edge_scores(model, pairs, ablation=ablation, batch_size=size, **options)
        compare(named(model, scored.scores), expected, FLOAT32)


@pytest.mark.parametrize("metric", ["answer-log-prob", "kl-divergence"])
@pytest.mark.parametrize("options", METHODS[1:], ids=["midpoint", "left"])
def test_other_metrics(metric: str, options: dict[str, Any]) -> None:
    """Metrics that are not linear in the logits, in float64."""
    module = oracles.random_gpt2(seed=5)
    model = load_model((module, None))
    pairs = model.encode(random_task([4, 6], metric))
    scored = edge_scores(model, pairs, **options)
    compare(named(model, scored.scores), oracle(module, pairs, options, "counterfactual"), FLOAT64)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), data=st.data())
def test_padding_changes_no_score(lengths: list[int], data: st.DataObject) -> None:
    """Scores of a padded batch are the mean of those of each pair alone."""
    options = data.draw(st.sampled_from(METHODS))
    ablation = data.draw(st.sampled_from(["counterfactual", "zero"]))
    model = load_model((oracles.random_gpt2(seed=6), None))
    task = random_task(lengths, seed=data.draw(st.integers(0, 99)))
    together = edge_scores(model, model.encode(task), ablation=ablation, **options)
    alone = [
        edge_scores(model, model.encode(Task("one", (pair,))), ablation=ablation, **options)
        for pair in task.pairs
    ]
    mean = torch.stack([scored.scores for scored in alone]).mean(0)
    largest = float(mean.abs().max())
    assert float((together.scores - mean).abs().max()) <= 1e-10 * (1 + largest)
    effect = sum(scored.completeness.effect for scored in alone) / len(alone)
    assert abs(together.completeness.effect - effect) < 1e-10


def test_linear_model_has_exact_scores() -> None:
    """Where nothing bends between two ends, scores are effects and every cut carries all of it."""
    model = load_model((oracles.random_gpt2(layer_norm=False, mlp=False, seed=8), None))
    pairs = model.encode(random_task([1, 1, 1]))
    edges = model.wiring.edges
    exact = edge_effects(model, pairs, edges).mean(1)
    scored = edge_scores(model, pairs, method="eap")
    found = torch.tensor(list(named(model, scored.scores).values()), dtype=torch.float64)
    # With one token there is nothing to attend to: q and k do nothing, v and o are linear.
    assert float((found - exact).abs().max()) < FLOAT64 * float(exact.abs().max())
    for cut in scored.completeness.cuts.values():
        assert abs(cut - scored.completeness.effect) < 1e-10


# --- completeness ---------------------------------------------------------------------------------


def scored(
    n_steps: int = 5,
    ablation: Ablation = "counterfactual",
    layer_norm: bool = True,
    **options: Any,
) -> EdgeScores:
    model = load_model((oracles.random_gpt2(layer_norm=layer_norm, seed=9), None))
    pairs = model.encode(random_task([5, 4, 5]))
    return edge_scores(model, pairs, ig_steps=n_steps, ablation=ablation, **options)


def test_cuts_are_named_by_site() -> None:
    """One sum for each stream a block reads, and the last; without a corrupt run, the first."""
    names = ["resid_pre.0", "resid_mid.0", "resid_pre.1", "resid_mid.1", "resid_post.1"]
    assert list(scored().completeness.cuts) == names
    for ablation in ("zero", "mean"):
        assert list(scored(ablation=ablation).completeness.cuts) == ["resid_pre.0"]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_gap_closes_as_steps_grow(ablation: Ablation) -> None:
    """Integrated gradients account for the whole effect of the input in the limit."""
    gaps = []
    for n_steps in (8, 32, 128):
        # A norm turns around within a hair of the zero stream, where no midpoint stands.
        completeness = scored(n_steps, ablation, layer_norm=ablation != "zero").completeness
        gaps.append(abs(completeness.gap) / abs(completeness.effect))
    assert gaps[2] < gaps[1] < gaps[0]
    # The midpoint rule errs by the square of a step: 256 times less for steps 16 times shorter.
    assert 1e-6 < gaps[2] < gaps[0] / 100


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_explained_is_the_sum_out_of_input(options: dict[str, Any]) -> None:
    """What the scores explain is the sum over edges out of input; gap and share follow."""
    model = load_model((oracles.random_gpt2(seed=9), None))
    pairs = model.encode(random_task([5, 4, 5]))
    result = edge_scores(model, pairs, **options)
    completeness = result.completeness
    total = math.fsum(v for e, v in named(model, result.scores).items() if e.source == "input")
    assert abs(completeness.explained - total) < 1e-12
    assert completeness.gap == completeness.effect - completeness.explained
    assert completeness.share == completeness.explained / completeness.effect
    logits = [model.run(prompts).logits[:, -1] for prompts in (pairs.corrupt, pairs.clean)]
    corrupt, clean = (pairs.score(value, logits[1]) for value in logits)
    assert abs(completeness.effect - float((corrupt - clean).mean())) < 1e-12


def test_at_clean_is_the_last_step() -> None:
    """For EAP it is what is explained; for EAP-IG the explained sum at the step nearest clean."""
    eap = scored(method="eap").completeness
    assert abs(eap.at_clean - eap.explained) < 1e-12
    one = scored(1).completeness
    assert abs(one.at_clean - one.explained) < 1e-12
    near = scored(200).completeness
    assert abs(near.at_clean - eap.explained) < 0.05 * abs(eap.explained)
    assert abs(near.at_clean - near.explained) > 0.2 * abs(eap.explained)


# --- refusals and repeats -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"ig_steps": 0}, {"batch_size": 0}, {"batch_size": -3}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    """The option is named, with what to give."""
    model = load_model((oracles.random_gpt2(), None))
    with pytest.raises(OptionError, match=f"{next(iter(options))} is -?[0-9]; give 1 or more"):
        edge_scores(model, model.encode(random_task([3])), **options)  # type: ignore[arg-type]


def test_weight_that_is_not_finite() -> None:
    """A NaN among the weights stops the scoring; the site and the prompt are named."""
    module: Any = oracles.random_gpt2()
    model = load_model((module, None))
    module.transformer.wte.weight.data[3] = torch.nan
    pairs = (PromptPair((1, 2), (2, 1), (5,), (6,)), PromptPair((1, 3), (2, 1), (5,), (6,)))
    for options in METHODS:
        with pytest.raises(NumericsError, match=r"NaN at site resid_pre\.0, prompt 2"):
            edge_scores(model, model.encode(Task("bad", pairs)), **options)


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_twice_is_bitwise_equal(options: dict[str, Any]) -> None:
    """The same model, task and options give the same bits."""
    task = next(task for task in zoo.tasks() if task.name == "induction").take(8)
    first, again = (
        edge_scores(model, model.encode(task), **options)
        for model in (load_model("induction"), load_model("induction"))
    )
    assert torch.equal(first.scores, again.scores)
    assert first.completeness == again.completeness
