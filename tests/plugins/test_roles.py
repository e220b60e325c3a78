"""Roles of heads: sequences by search, scores by loops, controls by enumeration, heads by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from circuitlab_attention_heads.roles import (
    RoleTable,
    attention,
    find_roles,
    key_weights,
)
from circuitlab_attention_heads.sequences import (
    Repeats,
    find_lengths,
    find_vocabulary,
    repeated_sequences,
)
from families import random_module, traced
from oracles import random_gpt2
from torch import Tensor, nn

from circuitlab import NumericsError, OptionError, Tokens, TracedModel, load_model
from circuitlab.zoo.network import finished, gpt2, parameters

ROLES = ["previous-token", "current-token", "first-token", "duplicate-token", "induction"]
OFFSETS = ["offset-2", "offset-3", "offset-4"]


def drawn(model: TracedModel, n: int = 64) -> Repeats:
    vocabulary = find_vocabulary(model)
    lengths = find_lengths(model, vocabulary, 4)
    assert lengths is not None
    return repeated_sequences(model, vocabulary, lengths, n=n, seed=0)


def written(sequences: list[list[int]], sizes: list[int], distances: tuple[int, int]) -> Repeats:
    """Sequences that end in a second copy of so many tokens, padded on the left by hand."""
    width = max(map(len, sequences))
    rows = [[-1] * (width - len(sequence)) + sequence for sequence in sequences]
    ids, mask = torch.tensor(rows).clamp(min=0), torch.tensor(rows) >= 0
    queries = torch.arange(width) >= width - torch.tensor(sizes)[:, None]
    found = [len(s) - 1 - s.index(s[-1]) for s in sequences]
    return Repeats(Tokens(ids, mask), queries, torch.tensor(found), distances)


def positional_model(*offsets: int, vocab: int = 40, n_positions: int = 32) -> Any:
    """One layer of two heads: the first attends ``offsets`` back by position alone."""
    width = vocab + n_positions
    module = gpt2(vocab, n_positions, n_layers=1, n_heads=2, d_model=2 * width, n_inner=1)
    for name in ("transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"):
        module.set_submodule(name, nn.Identity())
    weights = parameters(finished(module))
    for weight in weights.values():
        weight.zero_()
    weights["transformer.wte.weight"][:, :vocab] = torch.eye(vocab)
    weights["transformer.wpe.weight"][:, vocab:width] = torch.eye(n_positions)
    inputs = weights["transformer.h.0.attn.c_attn.weight"]
    for place, offset in product(range(n_positions), offsets):
        inputs[vocab + place, max(place - offset, 0)] = 40.0
        inputs[vocab + place, 2 * width + place] = 40.0
    return module


def scores(table: RoleTable, layer: int, head: int) -> dict[str, float]:
    return {name: one["score"] for name, one in table.of(layer, head)["role_scores"].items()}


# --- scores ---------------------------------------------------------------------------------------


def looped(pattern: Tensor, repeats: Repeats, role: str) -> list[tuple[float, float]]:
    """Score and control of each sequence for one head, by the definition, entry by entry."""
    least, most = repeats.distances
    found = []
    for row, one in enumerate(pattern):
        padding = int((~repeats.tokens.mask[row]).sum())
        distance = int(repeats.distance[row])
        others = [d for d in range(least, most + 1) if d != distance]
        score, control = [], []
        for column in repeats.queries[row].nonzero()[:, 0].tolist():
            t = column - padding
            offset = int(role[7:]) if role.startswith("offset-") else 0
            key, controls = {
                "previous-token": (t - 1, [t, t - 2]),
                "current-token": (t, [t - 1]),
                "first-token": (0, [1, 2, 3]),
                "duplicate-token": (t - distance, [t - d for d in others]),
                "induction": (t - distance + 1, [t - d + 1 for d in others]),
            }.get(role, (t - offset, [t - offset + 1, t - offset - 1]))
            score.append(float(one[column, padding + key]))
            control.append(sum(float(one[column, padding + c]) for c in controls) / len(controls))
        found.append((sum(score) / len(score), sum(control) / len(control)))
    return found


@pytest.mark.parametrize("role", [*ROLES, *OFFSETS])
def test_scores_are_those_of_loops(role: str) -> None:
    """Vectorised scores and controls are the means over queries and keys that define them."""
    repeats = drawn(load_model("induction"), n=16)
    n, width = repeats.queries.shape
    generator = torch.Generator().manual_seed(1)
    pattern = torch.rand(n, 3, width, width, generator=generator, dtype=torch.float64)
    found = attention(pattern, key_weights(repeats, role))
    for head in range(3):
        expected = torch.tensor(looped(pattern[:, head], repeats, role), dtype=torch.float64)
        assert torch.allclose(found[:, :, head].T, expected, atol=1e-14, rtol=0)


def test_one_sequence_by_hand() -> None:
    """First p A B C f f | A B C, read by a head that gives shares to 5, 4 and 1 back and to 0."""
    repeats = written([[0, 9, 1, 2, 3, 7, 8, 1, 2, 3]], [3], (4, 6))
    pattern = torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    for query in (7, 8, 9):
        for key, share in ((query - 5, 0.1), (query - 4, 0.2), (query - 1, 0.3), (0, 0.4)):
            pattern[0, 0, query, key] = share
    expected = {
        "previous-token": [0.3, 0.0],
        "current-token": [0.0, 0.3],
        # Of keys 1 to 3, query 7 gives 0.1 to 2 and 0.2 to 3, query 8 gives 0.1 to 3.
        "first-token": [0.4, 0.4 / 9],
        "duplicate-token": [0.1, 0.1],  # controls are 4 and 6 back: 0.2 and 0
        "induction": [0.2, 0.05],  # controls are 3 and 5 back: 0 and 0.1
    }
    for role, values in expected.items():
        found = attention(pattern, key_weights(repeats, role)).flatten().tolist()
        assert found == pytest.approx(values, abs=1e-15), role


def enumerated(sizes: range, seconds: range, distances: range) -> Repeats:
    """Every combination of segment length, place of the second copy and distance, once each."""
    sequences = []
    for size, second, distance in product(sizes, seconds, distances):
        words = list(range(second))
        sequences.append((words + words[second - distance :][:size], size))
    ends = (distances[0], distances[-1])
    return written([s for s, _ in sequences], [size for _, size in sequences], ends)


@pytest.mark.parametrize("role", ["duplicate-token", "induction"])
def test_position_alone_is_no_role(role: str) -> None:
    """Over all sequences, attention that knows positions alone scores as much as its control."""
    repeats = enumerated(range(3, 6), range(11, 14), range(6, 11))
    width = repeats.queries.shape[1]
    places = repeats.tokens.position_ids
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        table = torch.rand(width, width, generator=generator, dtype=torch.float64).softmax(-1)
        table = (table**20).tril()
        table = table / table.sum(-1, keepdim=True)
        pattern = table[places[:, :, None], places[:, None, :]] * repeats.tokens.mask[:, None, :]
        score, control = attention(pattern[:, None], key_weights(repeats, role)).mean(1)[:, 0]
        assert score > 0.01
        assert float(score) == pytest.approx(float(control), rel=1e-12)


def test_fixed_distances_would_name_a_positional_head() -> None:
    """Five back: induction where every repeat is six back, a fraction where distances vary."""
    width = range(11, 14)
    fixed = enumerated(range(3, 6), width, range(6, 7))
    fixed = Repeats(fixed.tokens, fixed.queries, fixed.distance, (6, 10))
    varied = enumerated(range(3, 6), width, range(6, 11))
    found = []
    for repeats in (fixed, varied):
        pattern = (repeats.offsets == 5).double()[:, None]
        found.append(
            attention(pattern, key_weights(repeats, "induction")).mean(1).flatten().tolist()
        )
    assert found[0] == [1.0, 0.0]
    assert found[1] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(("offset", "share"), [(6, 0.0), (9, 1 / 9), (12, 1 / 9)])
def test_positional_head_has_no_role(offset: int, share: float) -> None:
    """A head made to look further back than any offset role meets one of nine distances at best."""
    table = find_roles(load_model(positional_model(offset)))
    found = table.of(0, 0)
    assert "role" not in found
    assert found["n_eff"] == pytest.approx(1, abs=1e-5)
    assert max(scores(table, 0, 0).values()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("offset", "role"),
    [(0, "current-token"), (1, "previous-token"), (2, "offset-2"), (4, "offset-4")],
)
def test_offset_heads(offset: int, role: str) -> None:
    """A head made to look so many back has that role, entirely, and no other."""
    found = find_roles(load_model(positional_model(offset))).of(0, 0)
    assert found["roles"] == [role]
    assert found["role_scores"][role]["score"] == pytest.approx(1, abs=1e-5)


def test_first_token_head() -> None:
    """A head made to rest at the first position has role first-token."""
    found = find_roles(load_model(positional_model(1000))).of(0, 0)
    assert found["roles"] == ["first-token"]


def test_a_head_can_have_several_roles() -> None:
    """Half at t - 1 and half at t - 2, above the threshold each: both, and neither above 0.5."""
    model = load_model(positional_model(1, 2))
    found = find_roles(model).of(0, 0)
    assert sorted(found["roles"]) == ["offset-2", "previous-token"]
    assert found["role"] == found["roles"][0]
    for role in found["roles"]:
        one = found["role_scores"][role]
        assert one["score"] == pytest.approx(0.5, abs=1e-5)
        assert one["control"] == pytest.approx(0.25, abs=1e-5)
    assert found["n_eff"] == pytest.approx(2, abs=1e-4)
    assert "role" not in find_roles(model, threshold=0.6).of(0, 0)


# --- models ---------------------------------------------------------------------------------------


def test_hand_induction() -> None:
    """The known heads have their roles, the idle ones what uniform attention gives and no role."""
    model = load_model("hand-induction")
    table = find_roles(model)
    assert table.of(0, 0)["roles"] == ["previous-token"]
    assert table.of(1, 0)["roles"] == ["induction"]
    assert scores(table, 0, 0)["previous-token"] == pytest.approx(1, abs=1e-6)
    assert scores(table, 1, 0)["induction"] == pytest.approx(1, abs=1e-6)
    repeats = drawn(model)
    counts = [
        repeats.tokens.position_ids[row][repeats.queries[row]].double() + 1
        for row in range(len(repeats))
    ]
    uniform = float(torch.stack([(1 / count).mean() for count in counts]).mean())
    for layer in (0, 1):
        idle = table.of(layer, 1)
        assert "role" not in idle
        assert scores(table, layer, 1) == pytest.approx(
            dict.fromkeys([*ROLES, *OFFSETS], uniform), abs=1e-6
        )
        n_eff = float(torch.stack([count.mean() for count in counts]).mean())
        assert idle["n_eff"] == pytest.approx(n_eff, rel=1e-5)


def test_trained_induction() -> None:
    """One previous-token head in layer 0, induction heads alone in layer 1, others unnamed."""
    table = find_roles(load_model("induction"))
    roles = [[table.of(layer, head).get("role") for head in range(4)] for layer in (0, 1)]
    assert roles == [[None, None, None, "previous-token"], ["induction"] * 4]
    for head in range(4):
        assert table.of(1, head)["role_scores"]["induction"]["lo"] > 0.85


@pytest.mark.parametrize("name", ["hand-duplicate", "hand-duplicate-4096"])
def test_hand_duplicate(name: str) -> None:
    """The head that looks for its own word has that role alone; words off the circle rest."""
    model = load_model(name)
    table = find_roles(model)
    assert table.of(0, 0)["roles"] == ["duplicate-token"]
    found = scores(table, 0, 0)
    repeats = drawn(model)
    answers = torch.tensor(model.tokenizer.convert_tokens_to_ids(["no", "yes"]))
    off = torch.isin(repeats.tokens.ids, answers) & repeats.queries
    share = float((off.sum(1) / repeats.queries.sum(1)).mean())
    assert found["duplicate-token"] == pytest.approx(1 - share, abs=0.01)
    assert found["first-token"] == pytest.approx(share, abs=0.01)


def test_interval_is_over_sequences() -> None:
    """The mean lies in its interval; 9 times the sequences make it a third as wide, about."""
    model = load_model("induction")
    few, many = (
        find_roles(model, n_sequences=n).of(0, 2)["role_scores"]["previous-token"]
        for n in (32, 288)
    )
    for one in (few, many):
        assert one["lo"] < one["score"] < one["hi"]
    assert 2 < (few["hi"] - few["lo"]) / (many["hi"] - many["lo"]) < 4.5


def test_same_seed_same_roles() -> None:
    """The seed settles everything; the state of torch's own generator does not matter."""
    model = load_model("induction")
    torch.manual_seed(1)
    first = find_roles(model, seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert find_roles(model, seed=3) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert find_roles(model, seed=4) != first


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "neox", "mistral", "qwen3", "gemma2", "gemma3", "olmo2", "phi3"]
)
def test_padding_and_batches_change_nothing(family: str) -> None:
    """Every score is that of the plain module, which reads each sequence by itself, unpadded."""
    module: Any = random_gpt2(dtype=torch.float32) if family == "gpt2" else random_module(family)
    model = load_model(module) if family == "gpt2" else traced(module)
    whole, single = (find_roles(model, n_sequences=16, batch_size=size) for size in (None, 1))
    repeats = drawn(model, 16)
    assert not repeats.tokens.mask.all()
    rows = [repeats.tokens.ids[row][repeats.tokens.mask[row]] for row in range(len(repeats))]
    plain = [module(ids[None], output_attentions=True).attentions for ids in rows]
    width = repeats.queries.shape[1]
    for layer, head in product(range(model.n_layers), range(model.n_heads)):
        found = scores(whole, layer, head)
        assert found == pytest.approx(scores(single, layer, head), abs=1e-5)
        pattern = torch.zeros(len(rows), width, width)
        for row, patterns in enumerate(plain):
            start = width - len(rows[row])
            pattern[row, start:, start:] = patterns[layer][0, head]
        for role in (*ROLES, *OFFSETS):
            values = looped(pattern, repeats, role)
            mean = sum(score for score, _ in values) / len(values)
            assert found[role] == pytest.approx(mean, abs=1e-5)


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gate-and", "gate-xor"])
def test_gates_are_too_small(name: str) -> None:
    """Four positions hold no repeat: nothing is measured, and the finding says why."""
    table = find_roles(load_model(name))
    assert table.of(0, 0) == {}
    assert table.panels() == []
    assert table.findings() == {
        "roles": "not measured: prompts of 4 tokens from 5 words hold no segment twice at 4 "
        "distances or more"
    }


def test_smallest_model_is_measured() -> None:
    """Eleven positions and eight words: roles are found, without offsets that do not fit."""
    table = find_roles(load_model(positional_model(1, vocab=8, n_positions=11)))
    assert table.of(0, 0)["roles"] == ["previous-token"]
    assert set(scores(table, 0, 0)) <= {*ROLES, "predicted-token"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold 0 of a role"),
        ({"threshold": 1.5}, "threshold 1.5 of a role"),
        ({"max_offset": 0}, "largest offset 0"),
        ({"n_sequences": 15}, "15 sequences are too few"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """An option out of its range is named, with what may be given."""
    with pytest.raises(OptionError, match=message):
        find_roles(load_model("hand-induction"), **options)


def test_nonfinite_model_is_refused() -> None:
    """NaN in the stream is an error that says so, not a missing score."""
    module = random_gpt2(dtype=torch.float32)
    model = load_model(module)
    with torch.no_grad():
        module.transformer.h[1].mlp.c_proj.bias[0] = torch.nan
    with pytest.raises(NumericsError, match="not finite on random tokens"):
        find_roles(model)
