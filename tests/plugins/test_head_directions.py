"""Singular directions, tokens unlike the others, and how the ends of a head compose."""

from __future__ import annotations

from functools import cache
from typing import Any

import oracles
import pytest
import torch
from circuitlab_attention_heads.directions import (
    Readings,
    both_ends,
    read_directions,
    singular_directions,
)
from circuitlab_attention_heads.ends import end_compositions
from circuitlab_attention_heads.ov import centred_unembedding
from circuitlab_attention_heads.vocabulary import read_tokens, token_ids
from dense_heads import Dense
from families import FAMILIES, random_module, unchecked
from torch import Tensor

from circuitlab import OptionError, TracedModel, load_model, norm_outliers

HEAD, EARLIER = (1, 1), (0, 1)
MODULES = {
    "gpt2": oracles.random_gpt2,
    "gpt2-no-norms": lambda: oracles.random_gpt2(layer_norm=False),
    **{name: lambda name=name: random_module(name, dtype=torch.float64) for name in FAMILIES},
}


@cache
def case(name: str) -> tuple[Any, TracedModel]:
    module = MODULES[name]()
    return module, unchecked(module)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-norms", "llama-wide", "neox"])
def test_directions_are_those_of_the_dense_product(name: str) -> None:
    """Values, shares, and directions up to their common sign."""
    module, model = case(name)
    dense = Dense(module, HEAD)
    u, values, v = torch.linalg.svd(dense.ov)
    found = singular_directions(model, HEAD, 3)
    assert apart(found.values, values[:3]) < 1e-10
    assert apart(found.shares, values[:3].square() / dense.ov.square().sum()) < 1e-10
    for k in range(3):
        signs = [float(found.inputs[k] @ u[:, k]), float(found.outputs[k] @ v[k])]
        assert signs[0] * signs[1] == pytest.approx(1.0, abs=1e-9)
        assert abs(signs[0]) == pytest.approx(1.0, abs=1e-9)
        assert float(found.inputs[k].max()) == float(found.inputs[k].abs().max())
    assert not found.arbitrary()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_all_directions_make_up_the_circuit(name: str) -> None:
    """Σ s u v^T is W_OV, and no direction beyond d_head is made up."""
    module, model = case(name)
    dense = Dense(module, HEAD)
    found = singular_directions(model, HEAD, 99)
    assert len(found.values) == dense.d_head
    assert float(found.shares.sum()) == pytest.approx(1.0)
    whole = torch.einsum("k,kd,ke->de", found.values, found.inputs, found.outputs)
    assert apart(whole, dense.ov) < 1e-10


def test_directions_are_read_as_tokens() -> None:
    """Input directions along embeddings, outputs as centred logits; what is unlike is masked."""
    module: Any = oracles.random_gpt2()
    module.transformer.wte.weight.data[[5, 11]] *= torch.tensor([[1e-4], [1e4]])
    module.lm_head.weight.data[7] *= 300
    model, dense = load_model((module, None)), Dense(module, HEAD)
    found = singular_directions(model, HEAD, 2)
    readings = read_directions(model, found, centred_unembedding(model))
    assert readings.masked == (2, 1)
    assert readings.inputs.isnan().nonzero()[:, 1].tolist() == [5, 11] * 2
    assert readings.outputs.isnan().nonzero()[:, 1].tolist() == [7, 7]
    inputs, outputs = dense.tokens @ found.inputs.T, found.outputs @ dense.unembedding
    kept = [t for t in range(40) if t not in (5, 11)]
    assert apart(readings.inputs[:, kept], inputs.T[:, kept]) < 1e-10
    kept = [t for t in range(40) if t != 7]
    outputs = outputs - outputs[:, kept].mean(1, keepdim=True)
    assert apart(readings.outputs[:, kept], outputs[:, kept]) < 1e-10
    order = sorted(kept, key=lambda token: -float(outputs[1, token]))
    assert readings.ends("outputs", 1, 3) == (order[:3], order[:-4:-1])


def test_an_idle_head_has_no_directions() -> None:
    """What is left of a head that writes nothing is rounding; none of it is shown."""
    module: Any = oracles.random_gpt2()
    module.transformer.h[1].attn.c_proj.weight.data[8:16] = 0
    found = singular_directions(load_model((module, None)), HEAD, 4)
    assert found.values.tolist() == []
    assert found.inputs.shape == (0, 16)
    assert not found.arbitrary()


def test_equal_values_have_arbitrary_directions() -> None:
    """A head that copies a plane has no direction of its own in it."""
    module: Any = oracles.random_gpt2(layer_norm=False)
    attention = module.transformer.h[1].attn
    attention.c_attn.weight.data[:, 40:48] = torch.eye(16)[:, :8]
    attention.c_proj.weight.data[8:16] = torch.eye(16)[8:]
    model = load_model((module, None))
    assert singular_directions(model, HEAD, 2).arbitrary()
    assert not singular_directions(model, HEAD, 1).arbitrary()


def test_both_ends_leave_out_what_says_nothing() -> None:
    """The largest above 0 and the smallest below; no NaN, no rounding."""
    values = torch.tensor([1.0, torch.nan, 5.0, -2.0, 3.0, 1e-9, -1e-9])
    assert both_ends(values, 2) == ([2, 4], [3])
    assert both_ends(-values, 9) == ([3], [2, 4, 0])
    assert both_ends(torch.full((3,), torch.nan), 2) == ([], [])
    assert both_ends(torch.zeros(3), 2) == ([], [])
    assert Readings(values[None], values[None], (1, 1)).ends("inputs", 0, 1) == ([2], [3])


# --- vocabulary -----------------------------------------------------------------------------------


def test_outliers_are_unlike_in_size() -> None:
    """Much longer, much shorter, or nothing at all; not the ends of an ordinary spread."""
    rows = torch.randn(400, 50, generator=torch.Generator().manual_seed(1))
    assert not norm_outliers(rows).any()
    rows[[3, 50]], rows[7] = rows[[3, 50]] * 40, 0
    rows[9] /= 40
    assert norm_outliers(rows).nonzero().flatten().tolist() == [3, 7, 9, 50]
    assert norm_outliers(rows.half()).nonzero().flatten().tolist() == [3, 7, 9, 50]
    alike = torch.nn.functional.normalize(rows + 1, dim=1)
    assert not norm_outliers(alike).any()
    alike[4] *= 1.1
    assert not norm_outliers(alike).any()
    assert norm_outliers(torch.zeros(3, 2)).all()


def test_tokens_are_found_by_text_or_number() -> None:
    """Each once, in the order given; text only where there is a tokenizer."""
    words = load_model("hand-induction")
    ids = token_ids(words, "c,a,#4,c")
    assert words.token_texts(ids) == ["c", "a", words.token_texts([4])[0]]
    _, numbers = case("gpt2")
    assert token_ids(numbers, "#7, 3") == [7, 3]
    assert numbers.token_texts([7, 3]) == ["#7", "#3"]


@pytest.mark.parametrize(
    ("bundled", "text", "message"),
    [
        (True, "a,zebra", "--tokens 'zebra' is not in the vocabulary"),
        (True, "a b", "--tokens 'a b' is 2 tokens, not one"),
        (True, "", "--tokens '' is 0 tokens, not one"),
        (True, "#999", "--tokens '#999' is no token: ids run from 0 to "),
        (False, "40", "--tokens '40' is no token: ids run from 0 to 39"),
        (False, "#99999999999", "ids run from 0 to 39"),
        (False, "cat", "--tokens 'cat' is text, but the model has no tokenizer"),
    ],
)
def test_what_is_no_token_is_refused(bundled: bool, text: str, message: str) -> None:
    """The message says why, and what to give."""
    model = load_model("hand-induction") if bundled else case("gpt2")[1]
    with pytest.raises(OptionError, match=f"{message}.*give the text of single tokens, or #ID"):
        token_ids(model, text)


# --- compositions of the ends ---------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-norms", "qwen2", "neox"])
def test_ends_compose_as_dense_matrices_do(name: str, offset: int) -> None:
    """‖A B‖ √d / ‖A‖‖B‖ of embedding, earlier head and unembedding, everything centred."""
    module, model = case(name)
    dense, earlier = Dense(module, HEAD), Dense(module, EARLIER)
    found = end_compositions(
        model, HEAD, centred_unembedding(model), through=EARLIER, offset=offset
    )
    layer_norm = name in ("gpt2", "neox")
    tokens = dense.tokens - dense.tokens.mean(0)
    rows = [tokens / len(tokens) ** 0.5]
    if name not in FAMILIES:
        positions = dense.positions - dense.positions.mean(0)
        rows.append(positions / len(positions) ** 0.5)
    written = torch.cat(rows)
    if layer_norm:
        written = written - written.mean(1, keepdim=True)
    qk = dense.qk(offset)
    dimensions = 16 - layer_norm

    def expected(writer: Tensor, reader: Tensor) -> float:
        share = (writer @ reader).norm() / writer.norm() / reader.norm()
        return float(share * dimensions**0.5)

    readers = {"q": qk, "k": qk.T, "v": dense.ov}
    for source, writer in (("input", written), ("a0.h1", earlier.ov)):
        for port, reader in readers.items():
            answer = expected(writer, reader)
            assert found.pop((source, "a1.h1", port)) == pytest.approx(answer, rel=1e-5)
    answer = expected(dense.ov, dense.unembedding)
    assert found.pop(("a1.h1", "logits", "")) == pytest.approx(answer, rel=1e-9)
    assert found == {}


def test_unrelated_ends_compose_by_chance() -> None:
    """1 is what random weights have, on average."""
    scores = []
    for seed in range(6):
        model = load_model((oracles.random_gpt2(d_model=32, vocab=200, seed=seed), None))
        scores += end_compositions(model, HEAD, centred_unembedding(model)).values()
    assert torch.tensor(scores).mean() == pytest.approx(1.0, abs=0.05)


def test_an_idle_end_has_no_composition() -> None:
    """A head that writes nothing does not compose with what it would write to."""
    module: Any = oracles.random_gpt2()
    module.transformer.h[1].attn.c_proj.weight.data[8:16] = 0
    model = load_model((module, None))
    found = end_compositions(model, HEAD, centred_unembedding(model))
    assert set(found) == {("input", "a1.h1", "q"), ("input", "a1.h1", "k")}


def test_tokens_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows at once."""
    module, model = case("gpt2")
    weight = Dense(module, HEAD).weight("v")
    whole = read_tokens(model, weight)
    monkeypatch.setattr("circuitlab_attention_heads.vocabulary._ROWS", 7)
    assert torch.equal(read_tokens(model, weight), whole)
