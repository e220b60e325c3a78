"""Interactions on every family: norms behind, of queries and keys, caps, windows, rotations."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.penalties import penalty
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import make_pair
from circuitlab_feature_interactions.training import train
from family_blocks import FAMILIES, StockBlock, family_pair
from interaction_oracles import (
    assert_gradients,
    dense_attributions,
    dense_positions,
    dense_transcoded,
    pair_of_dictionaries,
    pair_of_transcoders,
    scattered,
)
from torch import Tensor

F64 = torch.float64
N, N_TOKENS = 10, 5
#: Rotations and a norm's small number are read off modules that compute them in float32.
EXACT = 1e-9
#: Families in which something stands behind a projection, bends scores, or hides keys.
MORE = ("mistral", "qwen3", "gemma2", "gemma3", "olmo2")


@cache
def case(family: str) -> tuple[Any, Any]:
    return family_pair(family)


def stock(family: str, layer: int) -> StockBlock:
    return StockBlock(case(family)[0], family, layer, N_TOKENS)


def route(family: str, kind: str, layer: int) -> Any:
    model = case(family)[1]
    pair = make_pair(kind, layer, model)  # type: ignore[arg-type]  # one of three
    return make_route(model, pair, dtype=F64)


def streams(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, 16, generator=generator, dtype=F64) + 0.5


def assert_close(given: Tensor, expected: Tensor) -> None:
    expected = expected.detach()
    assert expected.abs().max() > 1e-2
    assert (given - expected).abs().max() < EXACT * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_model(family: str) -> None:
    """The parts make the block, and the block is what the model runs, to float32's rounding."""
    module, _ = case(family)
    x = streams(N_TOKENS)
    for layer in range(2):
        block = stock(family, layer)
        with torch.no_grad():
            attended = block.attention(x)
            read = x if family == "neox" else x + attended
            assert_close(x + attended + block.mlp(read), block.whole(x))
            run = module(
                torch.arange(1, 1 + N_TOKENS)[None], output_hidden_states=True, use_cache=False
            )
            if layer == 0:
                after = block.whole(run.hidden_states[0][0])
                assert torch.allclose(after, run.hidden_states[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_across_an_mlp(family: str, with_error: bool) -> None:
    """Attributions of active pairs are those of a dense Jacobian; all others are 0 there."""
    source, target = pair_of_dictionaries("relu", 16, n=N)
    x, mlp, of = streams(3), stock(family, 1).mlp, route(family, "mlp", 1)
    assert_close(of(x, x[:, 0] > -9), mlp(x))
    found = of.attributions(source, target, x, with_error=with_error)
    index = found.source_index[:, None].expand_as(found.values)
    wide = scattered(found.values, index, N + 1).transpose(1, 2)
    rows = found.target_index[:, None].expand(-1, N + 1, -1)
    given = scattered(wide, rows, N).transpose(1, 2)[..., :-1]
    for n, row in enumerate(x):
        expected, z = dense_attributions(mlp, source, target, row, at_input=with_error)
        assert_close(given[n], expected)
        assert torch.allclose(scattered(found.z_target, found.target_index, N)[n], z)


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_across_a_block(family: str, with_error: bool) -> None:
    """At every pair of positions what is computed and what is carried is the dense Jacobian."""
    source, target = pair_of_dictionaries("relu", 16, n=N)
    layer = int(with_error)
    x, block = streams(N_TOKENS), stock(family, layer)
    of = route(family, "block", layer)
    found = of.attributions(source, target, x[None], with_error=with_error)
    expected, z = dense_attributions(block.whole, source, target, x, at_input=with_error)
    given = sum(dense_positions(found, N_TOKENS, part) for part in (None, found.skip))
    assert isinstance(given, Tensor)
    assert_close(given[..., :-1], expected)
    assert torch.allclose(scattered(found.z_target, found.target_index, N), z)
    # Mistral sees 3 positions, and so does layer 0 of Gemma 2 and 3.
    short = family == "mistral" or (family in ("gemma2", "gemma3") and layer == 0)
    window = 3 if short else N_TOKENS
    last = expected.detach()[-1].abs().amax((0, 2)) > 0
    assert last.tolist() == [N_TOKENS - n <= window for n in range(N_TOKENS)]


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_between_transcoders(family: str, with_error: bool) -> None:
    """Along the stream and through the attention between: the dense Jacobian."""
    source, target = pair_of_transcoders("relu", 16, N)
    x, mlp = streams(N_TOKENS), stock(family, 0).mlp
    parallel = family == "neox"
    attention = stock(family, 0 if parallel else 1).attention

    def between(stream: Tensor) -> Tensor:
        return stream + attention(x if parallel else stream)

    found = route(family, "transcoder", 0).attributions(
        source, target, x[None], with_error=with_error
    )
    expected, _ = dense_transcoded(mlp, between, source, target, x, at_input=with_error)
    assert_close(dense_positions(found, N_TOKENS)[..., :-1], expected)


@pytest.mark.parametrize("kind", ["block", "transcoder"])
@pytest.mark.parametrize("family", MORE)
def test_padding_is_nothing(family: str, kind: str) -> None:
    """A padded prompt's attributions are those of the prompt alone, windows and turns included."""
    make = pair_of_transcoders if kind == "transcoder" else pair_of_dictionaries
    source, target = make("relu", 16, N)
    x = streams(2, 6)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    x[1, :2] = 0
    of = route(family, kind, 0)
    found = of.attributions(source, target, x, mask=mask, with_error=True)
    alone = of.attributions(source, target, x[1:, 2:], with_error=True)
    padded = dense_positions(found, 6)[6:]
    assert not padded[:, :, :2].any()
    assert torch.allclose(padded[:, :, 2:], dense_positions(alone, 4), atol=1e-7)


@pytest.mark.parametrize("kind", ["mlp", "block", "transcoder"])
@pytest.mark.parametrize("family", MORE)
def test_gradients_of_a_penalty(family: str, kind: str) -> None:
    """In every parameter of both dictionaries they are those of finite differences."""
    make = pair_of_transcoders if kind == "transcoder" else pair_of_dictionaries
    source, target = make("relu", 16, N)
    of, x, scale = route(family, kind, 0), streams(1, 4), torch.ones(N, dtype=F64)
    assert_gradients(
        lambda: penalty("log")(of.attributions(source, target, x), scale), source, target
    )


@pytest.mark.parametrize(("family", "pair"), [("gemma3", "block.1"), ("olmo2", "transcoder.0")])
def test_a_penalty_makes_interactions_fewer(family: str, pair: str, tmp_path: Path) -> None:
    """Training under a strong one ends with a third fewer, across a block and between MLPs."""
    model, texts = case(family)[1], tmp_path / "texts.jsonl"
    ids = torch.randint(0, 40, (64, 6), generator=torch.Generator().manual_seed(0))
    texts.write_text("\n".join(map(str, ids.tolist())))
    ends = []
    for strength in (1e-12, 1.0):
        settings = TrainSettings(
            sites=pair, strength=strength, data=texts, steps=40, batch_tokens=64, k=3, expansion=1
        )
        found = train(model, settings, tmp_path / str(strength))
        ends.append(found.info["history"][f"interactions {pair}"][-1])
    assert ends[1] < 0.67 * ends[0]
