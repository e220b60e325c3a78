"""Sequences with a segment that comes twice: by search, by counting, and where none fits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from circuitlab_attention_heads.roles import find_roles, key_weights, role_names
from circuitlab_attention_heads.sequences import (
    Repeats,
    Vocabulary,
    find_lengths,
    find_vocabulary,
    repeated_sequences,
)
from oracles import random_gpt2

from circuitlab import TracedModel, load_model


def drawn(model: TracedModel, n: int = 64, max_offset: int = 4) -> Repeats:
    vocabulary = find_vocabulary(model)
    lengths = find_lengths(model, vocabulary, max_offset)
    assert lengths is not None
    return repeated_sequences(model, vocabulary, lengths, n=n, seed=0)


@pytest.mark.parametrize("name", ["induction", "hand-induction", "ids_model", "bos_model"])
def test_sequences_hold_what_they_promise(name: str, request: pytest.FixtureRequest) -> None:
    """A second copy follows; all else is unique and ordinary, and BOS is as the model has it."""
    model = load_model(request.getfixturevalue(name) if "_" in name else name)
    tokenizer = model.tokenizer
    repeats = drawn(model)
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    for row in range(len(repeats)):
        mask = repeats.tokens.mask[row]
        sequence = repeats.tokens.ids[row][mask].tolist()
        queries = repeats.queries[row][mask].nonzero()[:, 0].tolist()
        before, copy = sequence[: queries[0]], sequence[queries[0] :]
        assert queries == list(range(len(before), len(sequence)))
        assert len(set(before)) == len(before) <= model.n_positions - len(copy)
        padding = len(mask) - len(sequence)
        earlier = (repeats.earlier[row][mask] - padding)[queries].tolist()
        assert earlier == [before.index(token) for token in copy]
        assert earlier == [query - int(repeats.distance[row]) for query in queries]
        begins = tokenizer is not None and name != "ids_model"
        assert (sequence[0] in special) == begins
        assert not special & set(sequence[1:])
    assert (repeats.earlier[~repeats.queries] == -1).all()


def test_lengths_and_distances_vary() -> None:
    """All distances are equally frequent; segments, places and prefixes have many lengths."""
    repeats = drawn(load_model("induction"), n=90)
    least, most = repeats.distances
    counts = Counter(repeats.distance.tolist())
    assert counts == dict.fromkeys(range(least, most + 1), 90 / (most + 1 - least))
    lengths, sizes = repeats.tokens.mask.sum(1), repeats.queries.sum(1)
    prefixes = lengths - sizes - repeats.distance
    assert [len(set(part.tolist())) >= 4 for part in (sizes, lengths - sizes, prefixes)] == [
        True
    ] * 3


def test_distance_tells_nothing_of_place_or_length() -> None:
    """Drawn often, each length of segment and place of the second copy goes with each distance."""
    model = load_model("hand-induction")
    repeats = drawn(model, n=4000)
    sizes = repeats.queries.sum(1)
    place = repeats.tokens.mask.sum(1) - sizes
    kinds = torch.stack([sizes, place], 1)
    for kind in {tuple(kind) for kind in kinds.tolist()}:
        counts = Counter(repeats.distance[(kinds == torch.tensor(kind)).all(1)].tolist())
        n, m = sum(counts.values()), repeats.distances[1] - repeats.distances[0] + 1
        # chi-squared with m - 1 degrees of freedom: mean m - 1, variance 2 (m - 1)
        chi = sum((counts[d] - n / m) ** 2 for d in range(*repeats.distances)) * m / n
        assert chi < m - 1 + 5 * (2 * (m - 1)) ** 0.5


@pytest.mark.parametrize("n_positions", range(11, 20))
@pytest.mark.parametrize("max_offset", [1, 4, 30])
def test_no_two_roles_share_a_key(n_positions: int, max_offset: int) -> None:
    """However short the sequences, at every query each role has one key, and all are different."""
    model = load_model(random_gpt2(vocab=30, n_positions=n_positions, dtype=torch.float32))
    repeats = drawn(model, n=16, max_offset=max_offset)
    keys = torch.stack([key_weights(repeats, role)[0] for role in role_names(repeats, max_offset)])
    assert ((keys > 0).sum(-1) == repeats.queries).all()
    assert (keys > 0).sum(0).max() == 1


@pytest.mark.parametrize(
    ("n_positions", "n_words", "bos", "fits"),
    [
        (11, 99, 0, True),
        (10, 99, 0, False),
        (99, 7, 0, True),
        (99, 6, 0, False),
        (99, 8, None, True),
        (99, 7, None, False),
    ],
)
def test_where_sequences_begin_to_fit(
    n_positions: int, n_words: int, bos: int | None, fits: bool
) -> None:
    """Ten tokens after the first, of at least seven words, are enough; less is refused."""
    model: Any = SimpleNamespace(n_positions=n_positions)
    lengths = find_lengths(model, Vocabulary(bos, torch.arange(n_words)), 4)
    assert (lengths is not None) == fits


def test_ids_model_begins_with_a_word(ids_model: Path) -> None:
    """Without a tokenizer the first token is any, and the facts say so."""
    assert find_roles(load_model(ids_model)).facts["begins_with_bos"] is False
    assert find_roles(load_model("induction")).facts["begins_with_bos"] is True
