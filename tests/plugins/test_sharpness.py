"""Sharpness of patterns, and patterns replaced: against rows written out and the stock model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import attention_oracles
import oracles
import pytest
import torch
from attention_oracles import ROWS, logits_under, patterns, tempered_row
from circuitlab_attention_heads.head_names import all_heads, parse_heads
from circuitlab_attention_heads.replacing import Replacer
from circuitlab_attention_heads.sharpness import (
    RULES,
    Rule,
    argmax,
    second,
    sharpness,
    softmax,
    tempered,
    uniform,
)
from families import ALL_FAMILIES, random_module, traced
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    EncodedTask,
    ModelError,
    OptionError,
    Site,
    TracedModel,
    Wiring,
    load_model,
    zoo,
)

#: Lengths of prompts; all but the first are padded.
LENGTHS = [6, 4, 3]
TOLERANCES = {"gpt2": 1e-9} | dict.fromkeys(ALL_FAMILIES, 1e-4)


def modules(family: str) -> tuple[Any, TracedModel]:
    if family == "gpt2":
        module = oracles.random_gpt2(3, seed=1)
        return module, load_model((module, None))
    module = random_module(family)
    return module, traced(module)


def padded(model: TracedModel, metric: str = "logit-difference") -> EncodedTask:
    return model.encode(random_task(LENGTHS, metric))


def oracle_scores(module: Any, pairs: EncodedTask, row: Any, heads: Any) -> Tensor:
    ids, mask = pairs.clean.ids, pairs.clean.mask.long()
    plain = logits_under(module, ids, mask, row, [])
    return pairs.score(logits_under(module, ids, mask, row, heads), plain).double()


def grouped(heads: list[tuple[int, int]]) -> dict[int, list[int]]:
    return {layer: [head for n, head in heads if n == layer] for layer in {n for n, _ in heads}}


# --- how sharp ------------------------------------------------------------------------------------


def test_sharpness_of_known_patterns() -> None:
    """n keys alike count as n; two as their entropy says; one key, or a great lead, as 1."""
    scores = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [math.log(0.9), math.log(0.1), -math.inf, -math.inf],
            [2.0, -math.inf, -math.inf, -math.inf],
            [-math.inf, 500.0, 0.0, 0.0],
        ],
        dtype=torch.float64,
    )
    found = sharpness(scores)
    two = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert found.n_eff.tolist() == pytest.approx([4, two, 1, 1])
    assert found.top1.tolist() == pytest.approx([0.25, 0.9, 1, 1])
    assert found.margin.tolist() == pytest.approx([0, math.log(9), math.inf, 500])


def test_rules_are_those_written_out() -> None:
    """Random scores of which some are not seen; every rule gives rows that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 6, dtype=torch.float64, generator=generator) * 3
    hidden = torch.rand(40, 6, generator=generator) < 0.4
    hidden[:, 2] = False
    # Exact ties for the best key, and a single key.
    scores[:10, 1] = scores[:10, 2] = 20
    hidden[10:12], hidden[10:12, 2] = True, False
    scores = scores.masked_fill(hidden, -torch.inf)
    rules: dict[str, tuple[Rule, Any]] = {name: (RULES[name], ROWS[name]) for name in RULES}
    rules |= {f"{t}": (tempered(t), tempered_row(t)) for t in (0.25, 1.0, 4.0)}
    for rule, row in rules.values():
        expected = attention_oracles.by_rows(scores[None], row)[0]
        assert torch.allclose(rule(scores), expected, atol=1e-12)
        assert torch.allclose(rule(scores).sum(-1), torch.ones(40, dtype=torch.float64))


def test_a_temperature_is_a_power_of_the_pattern() -> None:
    """pattern^(1/T), made to sum to 1; 1 is the pattern itself, 0 the argmax."""
    scores = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pattern = scores.softmax(-1)
    for temperature in (0.25, 0.5, 2.0, 4.0):
        power = pattern ** (1 / temperature)
        found = tempered(temperature)(scores)
        assert torch.allclose(found, power / power.sum(-1, keepdim=True), atol=1e-12)
    assert torch.equal(tempered(1.0)(scores), pattern)
    assert torch.allclose(tempered(1e-6)(scores), argmax(scores), atol=1e-12)
    assert torch.allclose(tempered(1e9)(scores), uniform(scores), atol=1e-8)


def test_the_second_key_is_never_the_first() -> None:
    """But where one key alone is seen."""
    scores = torch.tensor([[3.0, 3.0, 1.0], [2.0, -math.inf, -math.inf]])
    assert second(scores).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("family", TOLERANCES)
def test_the_softmax_of_scores_is_the_stock_pattern(family: str) -> None:
    """At every real query, with rotations, shared keys and padding."""
    module, model = modules(family)
    pairs = padded(model)
    replacer = Replacer(model, pairs)
    stock = patterns(module, pairs.clean.ids, pairs.clean.mask.long())
    for layer, expected in enumerate(stock):
        found = softmax(replacer.attention(layer).scores).transpose(1, 2)[pairs.clean.mask]
        gap = (found - expected.transpose(1, 2)[pairs.clean.mask]).abs().max()
        assert gap < TOLERANCES[family]


def test_another_attention_is_refused() -> None:
    """One whose rotations the architecture does not name, and one that divides by its layer."""
    module, llama = modules("llama")
    unturned = replace(llama.architecture, rotary="")
    replacer = Replacer(TracedModel(module, None, unturned, name="unturned"), padded(llama))
    with pytest.raises(ModelError, match=r"layer 0 .* not the softmax of scaled products"):
        replacer.attention(0)
    module, model = modules("gpt2")
    module.transformer.h[1].attn.scaling /= 2
    replacer = Replacer(model, padded(model))
    replacer.attention(0)
    with pytest.raises(ModelError, match="layer 1"):
        replacer.attention(1)


# --- patterns replaced ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOLERANCES)
def test_one_head_by_a_rule_is_that_of_the_stock_model(family: str) -> None:
    """For each head and rule: the stock model with that row of attention, padding and all."""
    module, model = modules(family)
    pairs = padded(model)
    replacer = Replacer(model, pairs)
    rows = ROWS | {"tempered": tempered_row(0.5)}
    rules = [*RULES.values(), tempered(0.5)]
    for layer, head in all_heads(model.wiring):
        found = replacer.alone(layer, head, replacer.attention(layer), rules)
        for name, score in zip(rows, found, strict=True):
            expected = oracle_scores(module, pairs, rows[name], [(layer, head)])
            assert (score - expected).abs().max() < TOLERANCES[family]


@pytest.mark.parametrize("family", TOLERANCES)
@pytest.mark.parametrize("chosen", ["a*.*", "a1.*, a0.h1", "a0.h0"])
def test_heads_together_see_what_the_changed_run_gives_them(family: str, chosen: str) -> None:
    """The stock model with all their rows replaced at once, each by its scores in that run."""
    module, model = modules(family)
    pairs = padded(model)
    replacer = Replacer(model, pairs)
    heads = parse_heads(chosen, model.wiring)
    for name, rule in RULES.items():
        found = replacer.together(grouped(heads), rule)
        expected = oracle_scores(module, pairs, ROWS[name], heads)
        assert (found - expected).abs().max() < TOLERANCES[family]


def test_later_patterns_are_not_those_of_the_clean_run() -> None:
    """Best keys of the clean run, kept while earlier layers change, give another metric."""
    _, model = modules("gpt2")
    pairs = padded(model)
    replacer = Replacer(model, pairs)
    frozen = {
        Site("z", layer): found.z(argmax(found.scores))
        for layer in range(model.n_layers)
        for found in [replacer.attention(layer)]
    }
    logits = model.run(pairs.clean, write=frozen).logits[:, -1]
    kept = pairs.score(logits, model.run(pairs.clean).logits[:, -1])
    found = replacer.together(grouped(all_heads(model.wiring)), argmax)
    assert (found - kept).abs().max() > 0.1


@pytest.mark.parametrize("metric", ["logit-difference", "answer-log-prob", "kl-divergence"])
def test_metrics_are_those_of_the_task(metric: str) -> None:
    """Clean, corrupt and changed, for metrics of all logits too."""
    module, model = modules("gpt2")
    pairs = padded(model, metric)
    replacer = Replacer(model, pairs)
    plain = model.run(pairs.clean).logits[:, -1]
    corrupt = model.run(pairs.corrupt).logits[:, -1]
    assert torch.allclose(replacer.clean, pairs.score(plain, plain), atol=1e-9)
    assert torch.allclose(replacer.corrupt, pairs.score(corrupt, plain), atol=1e-9)
    expected = oracle_scores(module, pairs, ROWS["uniform"], [(1, 0)])
    found = replacer.alone(1, 0, replacer.attention(1), [uniform])[0]
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("family", TOLERANCES)
def test_temperature_one_changes_nothing(family: str) -> None:
    """The clean metric, for one head and for all."""
    _, model = modules(family)
    replacer = Replacer(model, padded(model))
    together = replacer.together(grouped(all_heads(model.wiring)), tempered(1.0))
    assert (together - replacer.clean).abs().max() < TOLERANCES[family]
    for layer, head in all_heads(model.wiring):
        alone = replacer.alone(layer, head, replacer.attention(layer), [tempered(1.0)])
        assert (alone - replacer.clean).abs().max() < TOLERANCES[family]


def test_a_saturated_head_is_its_argmax() -> None:
    """On hand-induction nothing changes, not by a bit; uniform attention takes the task away."""
    model = load_model("hand-induction")
    task = next(task for task in zoo.tasks() if task.name == "hand-induction")
    replacer = Replacer(model, model.encode(task))
    heads = grouped(all_heads(model.wiring))
    assert torch.equal(replacer.together(heads, argmax), replacer.clean)
    assert (replacer.together(heads, uniform) - replacer.clean).max() < -5


# --- names ----------------------------------------------------------------------------------------


def test_names_of_heads() -> None:
    """With or without h, whole layers, whole models, each head once and in order."""
    wiring = Wiring(2, 3)
    assert parse_heads("a1.h0, a0.2", wiring) == [(0, 2), (1, 0)]
    assert parse_heads("a1.*,a1.1", wiring) == [(1, 0), (1, 1), (1, 2)]
    assert parse_heads("a*.h2", wiring) == [(0, 2), (1, 2)]
    assert parse_heads("a*.*", wiring) == list(product(range(2), range(3)))


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "'' is no head"),
        ("m0", "'m0' is no head"),
        ("a0.h1,", "'' is no head"),
        ("a0.h1 a1.h1", "'a0.h1 a1.h1' is no head"),
        ("a2.h0", "no head a2.h0; layers run from 0 to 1, heads from 0 to 2"),
        ("a*.h7", "no head a\\*.h7"),
    ],
)
def test_names_of_no_head_are_refused(text: str, fact: str) -> None:
    """The message has the list, the name and how heads are written or counted."""
    with pytest.raises(OptionError, match=fact):
        parse_heads(text, Wiring(2, 3))
