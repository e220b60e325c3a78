"""Hidden tokens: nothing attends to them, and everything else is as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import random_task
from torch import Tensor

from circuitlab import Site, Tokens, TracedModel, load_model

#: float64 sums of some hundred terms, taken in another order.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(3, 2, 16)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


@pytest.fixture(scope="module")
def tokens(model: TracedModel) -> Tokens:
    """Four prompts, two of them padded."""
    return model.tokens([(3, 1, 4, 1, 5, 9), (2, 6, 5), (3, 5, 8, 9, 7), (9, 7, 9, 3, 2, 3)])


def chosen(*positions: list[int]) -> Tensor:
    mask = torch.zeros(len(positions), 6, dtype=torch.bool)
    for row, columns in enumerate(positions):
        mask[row, columns] = True
    return mask


#: In each prompt: its first token; none; one within; several.
HIDDEN = chosen([0], [], [3], [0, 1, 4])


@torch.no_grad()
def test_hidden_key_has_score_minus_infinity(
    module: Any, model: TracedModel, tokens: Tokens
) -> None:
    """The run is that of attention written by hand, with -inf at the hidden keys."""
    gpt2 = module.transformer
    embedding = gpt2.wte(tokens.ids) + gpt2.wpe(tokens.position_ids)
    by_hand = oracles.run(module, tokens.ids, tokens.mask & ~HIDDEN, embedding=embedding)
    logits = model.run(tokens.hiding(HIDDEN)).logits[:, -1]
    assert (logits - model.run(tokens).logits[:, -1]).abs().amax(1)[[0, 2, 3]].min() > 1e-3
    assert (logits - by_hand.logits[:, -1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_hiding_is_leaving_out_without_moving(
    module: Any, model: TracedModel, tokens: Tokens
) -> None:
    """The plain model gives the same for each prompt alone, its hidden tokens taken out."""
    logits = model.run(tokens.hiding(HIDDEN)).logits[:, -1]
    for row in range(len(tokens)):
        seen = tokens.mask[row] & ~HIDDEN[row]
        plain = module(
            input_ids=tokens.ids[row, seen][None],
            position_ids=tokens.position_ids[row, seen][None],
        )
        assert (plain.logits[0, -1] - logits[row]).abs().max() < TOLERANCE


def test_nobody_attends_to_a_hidden_token(model: TracedModel, tokens: Tokens) -> None:
    """No other token's attention goes there, at any head of any layer."""
    for layer in range(model.n_layers):
        site = Site("pattern", layer)
        pattern = model.run(tokens.hiding(HIDDEN), read=[site])[site]
        seen = tokens.mask & ~HIDDEN
        rows = pattern.transpose(1, 2)[seen]
        keys = HIDDEN[:, None].expand(-1, 6, -1)[seen]
        assert rows.masked_select(keys[:, None]).abs().max() == 0
        assert (rows.sum(-1) - 1).abs().max() < TOLERANCE


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_positions_go_along(data: st.DataObject) -> None:
    """However a batch is taken apart or put on, each token keeps its position."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    mask = torch.stack([torch.arange(8) >= 8 - length for length in lengths])
    tokens = Tokens(torch.arange(mask.numel()).view(mask.shape) * mask, mask)
    hidden = data.draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel()))
    ones = tokens.hiding(torch.tensor(hidden).view(mask.shape))
    assert torch.equal(ones.position_ids, tokens.position_ids)
    position = dict(zip(ones.ids[ones.mask].tolist(), ones.position_ids[ones.mask], strict=True))
    picked = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    for other in (ones.rows(picked), ones.trimmed(), ones.repeat(2), ones.to("cpu")):
        assert other.ids.shape == other.mask.shape == other.position_ids.shape
        for token, place in zip(
            other.ids[other.mask].tolist(), other.position_ids[other.mask], strict=True
        ):
            assert place == position[token]
    assert int(ones.trimmed().mask.sum()) == len(position)


def test_pairs_keep_hidden_tokens(model: TracedModel) -> None:
    """Rows of a task whose clean prompts hide a token still hide it, and nothing moves."""
    pairs = model.encode(random_task([6, 3, 5]))
    hidden = pairs.clean.mask & (torch.arange(6) == 4)
    row = replace(pairs, clean=pairs.clean.hiding(hidden)).rows([2]).clean
    assert row.mask.tolist() == [[True, True, True, False, True]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4]]
