"""Scores and margins split over components: against sums written out pair by pair."""

from __future__ import annotations

from itertools import product
from typing import Any

import oracles
import pytest
import torch
from attention_oracles import parts_of, patterns, scale_of
from circuitlab_attention_heads.margins import MarginParts, contest, split_margin
from circuitlab_attention_heads.replacing import Replacer
from circuitlab_attention_heads.scores import BIASES, INPUTS, ScoreParts, split_scores, stream_parts
from families import ALL_FAMILIES, random_module, traced
from random_tasks import random_task
from torch import Tensor

from circuitlab import TracedModel, load_model

#: Lengths of prompts; all but the first are padded.
LENGTHS = [6, 4, 3]


def inverse_scaled() -> Any:
    """A random GPT-2 whose layers divide their scores by their number."""
    module = oracles.random_gpt2(3, seed=2)
    module.config.scale_attn_by_inverse_layer_idx = True
    for number, block in enumerate(module.transformer.h, 1):
        block.attn.scaling /= number
    return module


MODULES = {
    "gpt2": lambda: oracles.random_gpt2(3, seed=1),
    "float32": lambda: oracles.random_gpt2(3, seed=1, dtype=torch.float32),
    "no-norms": lambda: oracles.random_gpt2(layer_norm=False, seed=3),
    "inverse-scaled": inverse_scaled,
}


class Case:
    """A module, traced, and a padded batch that it ran."""

    def __init__(self, module: Any, model: TracedModel | None = None) -> None:
        self.module = module
        self.model = model or load_model((module, None))
        self.replacer = Replacer(self.model, self.model.encode(random_task(LENGTHS)))
        self.run = self.replacer.run
        self.ids, self.mask = self.run.tokens.ids, self.run.mask.long()
        self.rows = torch.arange(len(LENGTHS))

    def split(self, layer: int, at: Tensor) -> ScoreParts:
        parts = stream_parts(self.model, self.run)
        return split_scores(self.model, self.run, parts, layer, at)

    def scores(self, layer: int, at: Tensor) -> Tensor:
        return self.replacer.attention(layer).scores[self.rows, :, at]

    def margins(
        self, layer: int, at: Tensor, against: Any, key: Tensor | None = None
    ) -> tuple[Any, MarginParts]:
        won = contest(self.scores(layer, at), against, key)
        return won, split_margin(self.split(layer, at), won.weights, at)

    def pattern(self, layer: int, at: Tensor) -> Tensor:
        """The stock model's attention of one query a prompt, ``[batch, n_heads, key]``."""
        return patterns(self.module, self.ids, self.mask)[layer][self.rows, :, at]


def summed(split: ScoreParts) -> Tensor:
    """The whole score of every key, masked or not, ``[batch, n_heads, pos]``."""
    return torch.einsum("bhd,bphd->bhp", split.queries.sum(0), split.keys.sum(0))


def last_but(n: int) -> Tensor:
    return torch.full((len(LENGTHS),), max(LENGTHS) - 1 - n)


def families() -> Any:
    return pytest.mark.parametrize("family", ALL_FAMILIES)


def family_case(family: str) -> Case:
    module = random_module(family)
    return Case(module, traced(module))


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_each_pair_of_parts_is_the_product_written_out(name: str) -> None:
    """Every part of the query with every part of the key, for all layers, heads, queries, keys."""
    case = Case(MODULES[name]())
    tolerance = 1e-5 if name == "float32" else 1e-10
    for layer, back in product(range(case.model.n_layers), (0, 1)):
        at = last_but(back)
        split = case.split(layer, at)
        for head in range(case.model.n_heads):
            queries, keys = parts_of(case.module, case.ids, case.mask, (layer, head))
            assert tuple(queries) == split.names
            q, k = (torch.stack(list(each.values())) for each in (queries, keys))
            expected = torch.einsum("abd,nbpd->anbp", q[:, case.rows, at], k)
            expected *= scale_of(case.module, layer)
            for column in range(int(at[0]) + 1):
                real = case.run.mask[:, column]
                key = split.keys[:, :, column, head]
                found = torch.einsum("abd,nbd->anb", split.queries[..., head, :], key)
                gap = (found - expected[..., column])[..., real].abs().max()
                assert gap < tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize("name", MODULES)
def test_parts_sum_to_the_models_own_scores(name: str) -> None:
    """The softmax of their sums is the stock model's pattern, padding masked."""
    case = Case(MODULES[name]())
    for layer in range(case.model.n_layers):
        whole = summed(case.split(layer, last_but(0)))
        whole = whole.masked_fill(~case.run.mask[:, None], -torch.inf)
        gap = (whole.softmax(-1) - case.pattern(layer, last_but(0))).abs().max()
        assert gap < (1e-5 if name == "float32" else 1e-10)


@families()
def test_parts_sum_to_the_scores_of_rotated_and_grouped_heads(family: str) -> None:
    """So they do with rotary embeddings, shared keys, other norms and parallel blocks."""
    case = family_case(family)
    for layer in range(case.model.n_layers):
        split = case.split(layer, last_but(0))
        whole = summed(split)
        assert split.softcap == (2 if family.startswith("gemma2") else 0)
        if split.softcap:
            whole = 2 * torch.tanh(whole / 2)
        seen = case.run.mask[:, None].expand_as(whole)
        if family == "mistral" or (family in ("gemma2", "gemma3") and layer == 0):
            seen = seen & (torch.arange(max(LENGTHS)) > max(LENGTHS) - 4)
        whole = whole.masked_fill(~seen, -torch.inf)
        assert (whole.softmax(-1) - case.pattern(layer, last_but(0))).abs().max() < 2e-5
        assert split.names[:1] == ("input",)


@families()
@pytest.mark.parametrize("against", ["second", "rest"])
def test_parts_sum_to_the_margins_of_every_family(family: str, against: Any) -> None:
    """Those of the stock model's log attentions: windows, caps and normed queries make no gap."""
    case = family_case(family)
    for layer in range(case.model.n_layers):
        won, parts = case.margins(layer, last_but(0), against)
        logs = case.pattern(layer, last_but(0)).double().log()
        best = logs.topk(2, -1).values
        margin = best[..., 0] - best[..., 1]
        if against == "rest":
            others = logs.scatter(-1, logs.argmax(-1, keepdim=True), -torch.inf)
            margin = best[..., 0] - others.logsumexp(-1)
        assert (won.margin - margin).abs().max() < 2e-3
        for found in (parts.by_query.sum(0), parts.by_key.sum(0)):
            assert (found + won.remainder - won.margin).abs().max() < 1e-4
        whole = parts.both.sum((1, 2))
        assert (whole - (won.margin - won.remainder).sum(0)).abs().max() < 1e-3


def test_a_part_under_a_cap_is_what_the_cap_leaves_of_its_score() -> None:
    """Each part of a capped score r is its own times c tanh(r / c) / r, key by key."""
    case = family_case("gemma2")
    at = last_but(0)
    for layer in range(case.model.n_layers):
        split = case.split(layer, at)
        won = contest(case.scores(layer, at))
        parts = split_margin(split, won.weights, at)
        for row, head in product(range(len(LENGTHS)), range(4)):
            total = torch.zeros(len(split.names))
            for column in won.weights[row, head].nonzero().flatten().tolist():
                by_key = split.keys[:, row, column, head] @ split.queries[:, row, head].sum(0)
                score = by_key.sum()
                left = 2 * torch.tanh(score / 2) / score
                total += won.weights[row, head, column] * left * by_key
            assert torch.allclose(parts.by_key[:, row, head], total, atol=1e-5)


def test_input_is_its_token_and_its_position() -> None:
    """Where positions are learned, the two replace the input and sum to it."""
    case = Case(MODULES["gpt2"]())
    parts = stream_parts(case.model, case.run)
    outputs = case.model.source_outputs(case.run)
    assert parts.names == (*INPUTS, *case.model.wiring.sources[1:])
    assert torch.allclose(parts.outputs[:2].sum(0), outputs[0], atol=1e-12)
    assert torch.equal(parts.outputs[2:], outputs[1:])
    expected = case.module.transformer.wte(case.ids) * case.run.mask[..., None]
    assert torch.allclose(parts.outputs[0], expected, atol=1e-12)


# --- margins --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_margin_over_the_second_is_the_difference_of_log_attentions(name: str) -> None:
    """And both sides' parts, and all pairs of parts, sum to it."""
    case = Case(MODULES[name]())
    tolerance = 1e-4 if name == "float32" else 1e-9
    for layer, back in product(range(case.model.n_layers), (0, 1)):
        at = last_but(back)
        won, parts = case.margins(layer, at, "second")
        best = case.pattern(layer, at).topk(2, -1).values.log()
        margin = best[..., 0] - best[..., 1]
        for found in (won.margin, parts.by_query.sum(0), parts.by_key.sum(0)):
            assert (found - margin).abs().max() < tolerance
        assert (parts.both.sum((1, 2)) - margin.sum(0)).abs().max() < tolerance
        assert torch.equal(won.remainder, torch.zeros_like(margin))


@pytest.mark.parametrize("name", MODULES)
def test_margin_over_the_rest_is_the_log_odds(name: str) -> None:
    """And the parts sum to it less the remainder, which is the rivals' entropy."""
    case = Case(MODULES[name]())
    tolerance = 1e-4 if name == "float32" else 1e-9
    for layer in range(case.model.n_layers):
        at = last_but(0)
        won, parts = case.margins(layer, at, "rest")
        pattern = case.pattern(layer, at)
        logs = pattern.log()
        rest = logs.scatter(-1, pattern.argmax(-1, keepdim=True), -torch.inf)
        # 1 less an attention near 1 would be rounding.
        odds = logs.amax(-1) - rest.logsumexp(-1)
        entropy = torch.special.entr(rest.softmax(-1)).sum(-1)
        assert (won.margin - odds).abs().max() < tolerance
        assert (won.remainder + entropy).abs().max() < tolerance
        for found in (parts.by_query.sum(0), parts.by_key.sum(0)):
            assert (found - entropy - odds).abs().max() < tolerance


@pytest.mark.parametrize("against", ["second", "rest"])
def test_each_part_of_a_margin_is_that_of_the_keys_one_by_one(against: Any) -> None:
    """A part of the keys does what it does to the key, less what it does to its rivals."""
    case = Case(MODULES["gpt2"]())
    at = last_but(0)
    for layer, head in product(range(3), range(2)):
        _, parts = case.margins(layer, at, against)
        queries, keys = parts_of(case.module, case.ids, case.mask, (layer, head))
        scores = case.pattern(layer, at)[:, head].log()
        total = torch.zeros(len(queries), len(keys), dtype=torch.float64)
        for row in range(len(LENGTHS)):
            seen = case.run.mask[row].nonzero().flatten().tolist()
            best = max(seen, key=lambda column: float(scores[row, column]))
            rivals = {column: float(scores[row, column].exp()) for column in seen if column != best}
            if against == "second":
                rivals = {max(rivals, key=lambda column: rivals[column]): 1.0}
            part = torch.stack(list(keys.values()))
            reference = sum(share * part[:, row, c] for c, share in rivals.items())
            moved = part[:, row, best] - reference / sum(rivals.values())
            query = torch.stack(list(queries.values()))[:, row, at[row]] * scale_of(
                case.module, layer
            )
            pairs = query @ moved.T
            assert torch.allclose(parts.by_query[:, row, head], pairs.sum(1), atol=1e-9)
            assert torch.allclose(parts.by_key[:, row, head], pairs.sum(0), atol=1e-9)
            total += pairs
        assert torch.allclose(parts.both[head], total, atol=1e-9)


def test_margin_of_a_chosen_key() -> None:
    """It is over the best of the others, and below 0 where that is better."""
    case = Case(MODULES["gpt2"]())
    at = last_but(0)
    pattern = case.pattern(1, at).log()
    second = pattern.topk(2, -1).indices[..., 1]
    for against in ("second", "rest"):
        won, parts = case.margins(1, at, against, second)
        own = pattern.gather(-1, second[..., None])[..., 0]
        others = pattern.scatter(-1, second[..., None], -torch.inf)
        rivals = others.amax(-1) if against == "second" else others.logsumexp(-1)
        assert torch.allclose(won.margin, own - rivals, atol=1e-9)
        assert (won.margin < 0).all()
        assert torch.allclose(parts.by_key.sum(0) + won.remainder, own - rivals, atol=1e-9)


@pytest.mark.parametrize("against", ["second", "rest"])
def test_a_heads_own_key_bias_does_nothing_to_a_margin(against: Any) -> None:
    """Its part is exactly 0, and another one leaves every other part as it is."""
    module = MODULES["gpt2"]()
    before = Case(module).margins(1, last_but(0), against)[1]
    with torch.no_grad():
        module.transformer.h[1].attn.c_attn.bias[16:32] += torch.randn(16) * 5
    after = Case(module).margins(1, last_but(0), against)[1]
    for parts in (before, after):
        assert torch.equal(parts.by_key[-1], torch.zeros_like(parts.by_key[-1]))
        assert torch.equal(parts.both[..., -1], torch.zeros_like(parts.both[..., -1]))
    assert torch.allclose(before.by_query, after.by_query, atol=1e-10)
    assert torch.allclose(before.by_key, after.by_key, atol=1e-10)


def test_a_key_bias_that_is_rotated_does_count() -> None:
    """Turned by each key's position it is no constant, and sums are right with it alone."""
    case = family_case("qwen2")
    won, parts = case.margins(1, last_but(0), "second")
    assert parts.by_key[-1].abs().min() > 1e-3
    assert torch.allclose(parts.by_key.sum(0), won.margin, atol=1e-4)


def test_a_query_bias_counts() -> None:
    """It prefers keys whatever the query is."""
    case = Case(MODULES["gpt2"]())
    _, parts = case.margins(1, last_but(0), "second")
    assert BIASES[1] == "bias"
    assert parts.by_query[-1].abs().min() > 1e-4


def test_a_prompt_is_split_as_it_is_alone() -> None:
    """Padding and neighbours change nothing."""
    case = Case(MODULES["gpt2"]())
    _, parts = case.margins(2, last_but(0), "rest")
    for row, length in enumerate(LENGTHS):
        alone = Case(case.module)
        pairs = case.model.encode(random_task(LENGTHS)).rows([row])
        alone.replacer, alone.rows = Replacer(case.model, pairs), torch.arange(1)
        alone.run = alone.replacer.run
        _, own = alone.margins(2, torch.tensor([length - 1]), "rest")
        assert torch.allclose(own.by_query[:, 0], parts.by_query[:, row], atol=1e-10)
        assert torch.allclose(own.by_key[:, 0], parts.by_key[:, row], atol=1e-10)
