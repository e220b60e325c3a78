"""Composition of heads from their weights: dense products, sampled rotations, compiled heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from circuitlab_attention_heads.composition import compositions
from circuitlab_attention_heads.shared_directions import shared_directions
from composition_oracles import dense_gpt2, dense_llama, dense_scores
from families import random_module, unchecked
from oracles import random_gpt2
from random_tasks import random_task
from torch import Tensor

from circuitlab import OptionError, TracedModel, load_model

N_LAYERS, N_HEADS, D_MODEL, D_HEAD = 3, 2, 16, 8
N = N_LAYERS * N_HEADS


def same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def gpt2(**settings: Any) -> tuple[Any, TracedModel]:
    module = random_gpt2(N_LAYERS, N_HEADS, D_MODEL, **settings).requires_grad_(False)
    return module, load_model((module, None))


# --- raw scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [True, False], ids=["norms", "no-norms"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_scores_and_norms_are_those_of_dense_products(
    layer_norm: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """All three ports of all pairs, and each head's norms; NaN where a head is not read."""
    module, model = gpt2(layer_norm=layer_norm, dtype=dtype)
    found, heads = compositions(model), dense_gpt2(module)
    expected = dense_scores(heads, N_HEADS)
    assert int(expected["k"].isfinite().sum()) == 12
    for port in ("q", "k", "v"):
        assert same(found.raw[port], expected[port], tolerance)
        chance = (D_MODEL - layer_norm) ** -0.5
        assert same(found.times_chance(port), expected[port] / chance, tolerance)
    for norms, name in ((found.ov_norms, "ov"), (found.qk_norms, "q")):
        assert same(norms, torch.stack([head.norm() for head in heads[name]]), tolerance)


def test_a_port_alone_gives_the_same() -> None:
    """What is asked for does not change with what else is asked for."""
    _, model = gpt2()
    every = compositions(model)
    for port in ("q", "k", "v"):
        alone = compositions(model, ports=(port,))
        assert set(alone.raw) == set(alone.z) == {port}
        assert torch.equal(alone.raw[port].nan_to_num(), every.raw[port].nan_to_num())
        assert torch.equal(alone.qk_norms, every.qk_norms)


def test_folded_weights_are_the_same_model_and_compose_the_same() -> None:
    """With norms folded into the weights the logits stay, and so does every score."""
    module, model = gpt2()
    other, _ = gpt2()
    with torch.no_grad():
        for layer, block in enumerate(other.transformer.h):
            folded = model.weights.folded(layer, torch.float64)
            ports = ((folded.q, folded.q_bias), (folded.k, folded.k_bias))
            ports = (*ports, (folded.v, folded.v_bias))
            weights = [weight.transpose(0, 1).flatten(1) for weight, _ in ports]
            block.attn.c_attn.weight.copy_(torch.cat(weights, 1))
            block.attn.c_attn.bias.copy_(torch.cat([bias.flatten() for _, bias in ports]))
            block.attn.c_proj.weight.copy_(folded.o.flatten(0, 1))
            block.ln_1.weight.fill_(1)
            block.ln_1.bias.zero_()
    ids = torch.arange(12).view(2, 6)
    assert torch.allclose(other(ids).logits, module(ids).logits, rtol=0, atol=1e-12)
    found, expected = compositions(load_model((other, None))), compositions(model)
    for port in ("q", "k", "v"):
        assert same(found.raw[port], expected.raw[port], 1e-12)


def set_head(module: Any, layer: int, head: int, **weights: Tensor) -> None:
    """Write q, k, v ``[d_model, d_head]`` or o ``[d_head, d_model]`` into a GPT-2."""
    attention, start = module.transformer.h[layer].attn, head * D_HEAD
    with torch.no_grad():
        for name, weight in weights.items():
            if name == "o":
                attention.c_proj.weight[start : start + D_HEAD] = weight
            else:
                first = "qkv".index(name) * D_MODEL + start
                attention.c_attn.weight[:, first : first + D_HEAD] = weight


def test_orthogonal_heads_score_nothing_and_matched_heads_a_known_value() -> None:
    """A head that writes where another reads scores √(d / d_head) × chance, elsewhere 0."""
    module = random_gpt2(2, N_HEADS, D_MODEL, layer_norm=False)
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, dtype=torch.float64))[0]
    here, there = basis[:, :D_HEAD], basis[:, D_HEAD:]
    set_head(module, 0, 0, v=there, o=here.T)
    set_head(module, 1, 0, q=here, k=there, v=there, o=here.T)
    found = compositions(load_model((module, None)))
    expected = {"q": math.sqrt(D_MODEL / D_HEAD), "k": 0.0, "v": 0.0}
    for port, score in expected.items():
        assert abs(float(found.times_chance(port)[0, 2]) - score) < 1e-12


def test_idle_heads_have_no_score() -> None:
    """A head that writes nothing, or only the mean that every norm takes off, scores nothing."""
    module, model = gpt2()
    before = compositions(model)
    set_head(module, 0, 0, o=torch.zeros(D_HEAD, D_MODEL))
    set_head(module, 0, 1, o=torch.randn(D_HEAD, 1, dtype=torch.float64).expand(-1, D_MODEL))
    set_head(module, 2, 1, q=torch.zeros(D_MODEL, D_HEAD))
    found = compositions(model)
    for port in ("q", "k", "v"):
        gone = torch.zeros(N, N, dtype=torch.bool)
        gone[:2] = True
        gone[:, 5] |= port != "v"
        expected = before.raw[port].masked_fill(gone, math.nan)
        assert same(found.raw[port], expected, 1e-12)
        assert torch.equal(found.z[port].isnan(), expected.isnan())


def test_one_layer_has_no_pairs() -> None:
    """Heads of one layer do not read one another."""
    found = compositions(load_model((random_gpt2(1), None)))
    assert all(bool(found.raw[port].isnan().all()) for port in ("q", "k", "v"))
    assert bool((found.ov_norms > 0).all())


# --- rotary embeddings and shared keys ------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_rotary_models_compose_at_a_distance(offset: int) -> None:
    """W_QK of a query so many tokens after its key has the rotation in it; keys are shared."""
    module = random_module("llama", 3, dtype=torch.float64)
    found = compositions(unchecked(module), offset=offset)
    expected = dense_scores(dense_llama(module, offset), 4)
    for port in ("q", "k", "v"):
        assert same(found.raw[port], expected[port], 1e-6)  # its rotations are made in float32
        assert same(found.times_chance(port), expected[port] * D_MODEL**0.5, 1e-6)


def test_distance_is_nothing_without_rotary_embeddings() -> None:
    """Without rotations every distance gives the same; before its key a query never stands."""
    _, model = gpt2()
    far, near = compositions(model, offset=5), compositions(model)
    assert torch.equal(far.raw["q"].nan_to_num(), near.raw["q"].nan_to_num())
    with pytest.raises(OptionError, match="offset -1"):
        compositions(model, offset=-1)


# --- chance ---------------------------------------------------------------------------------------


def rotations(n: int, size: int) -> Tensor:
    """Haar rotations and reflections, ``[n, size, size]``."""
    q, r = torch.linalg.qr(torch.randn(n, size, size, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


@pytest.mark.parametrize("layer_norm", [True, False], ids=["norms", "no-norms"])
def test_chance_and_z_are_those_of_sampled_rotations(layer_norm: bool) -> None:
    """One head turned at random, within what norms let pass: mean and spread of the square."""
    module, model = gpt2(layer_norm=layer_norm)
    found, heads = compositions(model), dense_gpt2(module)
    size = D_MODEL - layer_norm
    assert found.dimensions == size
    basis = torch.eye(D_MODEL, dtype=torch.float64)
    if layer_norm:
        mean = torch.ones(D_MODEL, 1, dtype=torch.float64)
        basis = torch.linalg.svd(mean)[0][:, 1:]
    torch.manual_seed(0)
    turned = rotations(4000, size)
    for port, name in (("q", "q"), ("k", "k"), ("v", "ov")):
        left, right = heads["ov"][0] @ basis, basis.T @ heads[name][3]
        squares = (left @ turned @ right).square().sum((1, 2))
        squares = squares / (left.norm() * right.norm()) ** 2
        spread = squares.std()
        assert abs(float(squares.mean()) - 1 / size) < 4 * spread / 4000**0.5
        z = (found.raw[port][0, 3] ** 2 - 1 / size) / spread
        # The spread of 4,000 draws is itself known to some percent: these squares have light tails.
        assert float(z / found.z[port][0, 3]) == pytest.approx(1, abs=0.08)


def test_z_in_the_plane_is_exact() -> None:
    """In two dimensions the mean over all rotations and reflections is a sum over angles."""
    module = random_gpt2(2, 1, 2, layer_norm=False).requires_grad_(False)
    found, heads = compositions(load_model((module, None))), dense_gpt2(module)
    angles = torch.arange(16, dtype=torch.float64) * math.pi / 8
    rows = [
        torch.stack([angles.cos(), angles.sin()], -1),
        torch.stack([-angles.sin(), angles.cos()], -1),
    ]
    turns = torch.stack(rows, -2)
    every = torch.cat([turns, turns * torch.tensor([1.0, -1.0], dtype=torch.float64)])
    for port, name in (("q", "q"), ("k", "k"), ("v", "ov")):
        left, right = heads["ov"][0], heads[name][1]
        squares = (left @ every @ right).square().sum((1, 2)) / (left.norm() * right.norm()) ** 2
        assert float(squares.mean()) == pytest.approx(1 / 2, abs=1e-12)
        z = (found.raw[port][0, 1] ** 2 - 1 / 2) / squares.std(correction=0)
        assert float(found.z[port][0, 1]) == pytest.approx(float(z), rel=1e-10)


def test_a_head_that_every_rotation_leaves_alone_has_no_z() -> None:
    """Where the null has no spread there is nothing to divide by, and the score is chance."""
    module = random_gpt2(2, 1, D_MODEL, layer_norm=False)
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        module.transformer.h[0].attn.c_attn.weight[:, 2 * D_MODEL :] = eye
        module.transformer.h[0].attn.c_proj.weight.copy_(eye)
    found = compositions(load_model((module, None)))
    assert float(found.times_chance("q")[0, 1]) == pytest.approx(1, abs=1e-12)
    assert bool(found.z["q"].isnan().all())


# --- shared directions ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["f64", "f16"])
@pytest.mark.parametrize(("family", "expected"), [("llama", False), ("neox", True)])
def test_whose_norms_take_the_mean_off(family: str, expected: bool, dtype: torch.dtype) -> None:
    """LayerNorm does, RMSNorm and no norm do not, in half precision too."""
    model = unchecked(random_module(family, 2, dtype=dtype))
    assert model.weights.centres == expected
    assert not gpt2(layer_norm=False)[1].weights.centres


def brute_directions(module: Any, model: TracedModel, n: int) -> tuple[Tensor, float]:
    """Right singular vectors of the inputs of layers at real tokens, and their share of them."""
    rows = []
    for pair in random_task([6, 4, 3]).pairs:
        states = module(torch.tensor([pair.clean]), output_hidden_states=True).hidden_states
        for state in states[: model.n_layers]:
            plain = state[0] - state[0].mean(-1, keepdim=True)
            rows.append(plain / plain.norm(dim=-1, keepdim=True))
    _, values, vectors = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    squares = values.square()
    return vectors[:n], float(squares[:n].sum() / squares.sum())


def test_shared_directions_are_those_of_plain_passes() -> None:
    """Padded prompts in batches give the subspace that each prompt alone gives."""
    module, model = gpt2()
    pairs = model.encode(random_task([6, 4, 3]))
    for size in (None, 1, 2):
        found, share = shared_directions(model, pairs, 3, batch_size=size)
        expected, part = brute_directions(module, model, 3)
        assert torch.allclose(found.T @ found, expected.T @ expected, rtol=0, atol=1e-10)
        assert share == pytest.approx(part, abs=1e-12)


def test_share_of_planted_directions() -> None:
    """One massive direction in every embedding holds nearly all of the squared length."""
    module, model = gpt2()
    direction = torch.randn(D_MODEL, dtype=torch.float64)
    direction -= direction.mean()
    with torch.no_grad():
        module.transformer.wpe.weight.add_(1e4 * direction)
    found, share = shared_directions(model, model.encode(random_task([6, 4])), 1)
    assert share > 0.999
    assert abs(abs(float(found[0] @ direction / direction.norm())) - 1) < 1e-6


def test_scores_without_directions_are_dense_products_of_what_is_left() -> None:
    """Both factors lose the directions, and chance loses as many dimensions."""
    module, model = gpt2()
    directions, _ = shared_directions(model, model.encode(random_task([6, 4])), 3)
    found = compositions(model, directions=directions)
    kept = torch.eye(D_MODEL, dtype=torch.float64) - directions.T @ directions
    expected = dense_scores(dense_gpt2(module), N_HEADS, kept)
    assert found.dimensions == D_MODEL - 1 - 3
    for port in ("q", "k", "v"):
        assert same(found.raw[port], expected[port], 1e-10)
        assert same(found.times_chance(port), expected[port] * 12**0.5, 1e-10)


def test_heads_that_share_only_the_direction_have_no_score_without_it() -> None:
    """A head that reads or writes nothing but a removed direction is idle: rounding no score."""
    module, model = gpt2(layer_norm=False)
    pairs = model.encode(random_task([6, 4]))
    directions, _ = shared_directions(model, pairs, 1)
    one = torch.randn(1, D_HEAD, dtype=torch.float64)
    set_head(module, 2, 0, q=directions.T @ one)
    set_head(module, 0, 1, o=one.T @ directions)
    found = compositions(model, directions=directions)
    assert bool(found.raw["q"][:4, 4].isnan().all())
    assert all(bool(found.raw[port][1].isnan().all()) for port in ("q", "k", "v"))
    assert bool(found.raw["v"][[0, 2, 3], 4].isfinite().all())


def test_no_more_directions_than_the_stream_has() -> None:
    """Directions that no prompt uses would be arbitrary ones."""
    _, model = gpt2()
    pairs = model.encode(random_task([2]))
    for n in (-1, 0, 7, D_MODEL):
        with pytest.raises(OptionError, match=f"--remove-directions {n}"):
            shared_directions(model, pairs, n)
