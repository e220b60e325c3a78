"""Interactions across a whole block: every position, attention, MLP and skip, by brute force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.penalties import penalty
from circuitlab_feature_interactions.sites import make_pair
from dictionary_oracles import KINDS
from families import family_model
from interaction_oracles import (
    assert_gradients,
    dense_attributions,
    dense_positions,
    gpt2_block,
    gpt2_mlp,
    pair_of_dictionaries,
    scattered,
)
from oracles import random_gpt2
from torch import Tensor

from circuitlab import ModelError, OptionError, TracedModel, load_model

F64 = torch.float64
N = 10


def model_and_route(**options: Any) -> tuple[Any, Any, Any]:
    """A random GPT-2, float64, as module and as model, and the route across its block 1."""
    module = random_gpt2(n_positions=12, **options)
    model = load_model((module, None))
    return module, model, make_route(model, make_pair("block", 1, model))


def streams(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, 16, generator=generator, dtype=F64) + 0.5


def by_hand(module: Any, source: Any, target: Any, x: Tensor, at_input: bool) -> dict[str, Tensor]:
    """The whole attributions of one prompt, and its skip and MLP parts, by autograd."""
    function = gpt2_block(module, 1)
    whole, z = dense_attributions(function, source, target, x, at_input=at_input)
    latents, active = source.encode(x), (z > 0).to(z.dtype)
    stream = x if at_input else source.decode(latents)
    gain = active if target.r_mag is None else active * target.r_mag.exp()
    encoder = target.W_e * gain[:, None]  # [pos, d, N]
    skip = torch.einsum("pdi,jd,pj->pij", encoder, source.W_d, latents)
    middle = function(stream) - gpt2_mlp_at(module, stream)
    slopes: Any = torch.stack([torch.func.jacrev(gpt2_mlp(module, 1))(row) for row in middle])
    mlp = torch.einsum("pei,ped,jd,pj->pij", encoder, slopes, source.W_d, latents)
    return {"whole": whole, "skip": skip, "mlp": mlp, "z": z}


def gpt2_mlp_at(module: Any, stream: Tensor) -> Tensor:
    """What the MLP writes in a whole block that begins with a stream."""
    written: list[Tensor] = []
    hook = module.transformer.h[1].mlp.register_forward_hook(lambda *a: written.append(a[2]))
    gpt2_block(module, 1)(stream)
    hook.remove()
    return written[0]


# --- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_is_the_jacobian(kind: str, layer_norm: bool, with_error: bool) -> None:
    """Computed part plus skip is the dense Jacobian, at every pair of positions; parts agree."""
    module, _, route = model_and_route(layer_norm=layer_norm)
    source, target = pair_of_dictionaries(kind, 16, n=N)
    x = streams(5)
    found = route.attributions(source, target, x[None], with_error=with_error)
    expected = by_hand(module, source, target, x, with_error)
    limit = 1e-10 * float(expected["whole"].detach().abs().max())
    computed = dense_positions(found, 5)[..., :-1]
    skip, mlp = (dense_positions(found, 5, part)[..., :-1] for part in (found.skip, found.local))
    assert (computed + skip - expected["whole"]).abs().max() < limit
    for name, part in (("skip", skip), ("mlp", mlp)):
        for t in range(5):
            assert (part[t, :, t] - expected[name][t]).abs().max() < limit
            assert not part[t, :, :t].any()
    assert expected["whole"][4, :, :4].abs().max() > 1e6 * limit
    assert torch.allclose(scattered(found.z_target, found.target_index, N), expected["z"])


def test_errors_are_sources_at_every_position() -> None:
    """The last latent stands for the error: the derivative along it, position by position."""
    module, _, route = model_and_route()
    source, target = pair_of_dictionaries("topk", 16, n=N)
    x = streams(4)
    found = route.attributions(source, target, x[None], with_error=True)
    given = (dense_positions(found, 4) + dense_positions(found, 4, found.skip))[..., -1]
    error = source.error(x).detach()

    def latents(share: Tensor) -> Tensor:
        return target.encode(gpt2_block(module, 1)(x + share[:, None] * error))

    expected: Any = torch.func.jacrev(latents)(torch.zeros(4, dtype=F64))
    assert (given - expected).abs().max() < 1e-10 * expected.abs().max()


def test_padding_is_nothing() -> None:
    """A padded prompt's attributions are those of the prompt alone."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("relu", 16, n=N)
    x = streams(2, 6)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    x[1, :2] = 0
    found = route.attributions(source, target, x, mask=mask)
    alone = route.attributions(source, target, x[1:, 2:])
    assert found.token.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    padded = dense_positions(found, 6)[6:]
    assert not padded[:, :, :2].any()
    assert torch.allclose(padded[:, :, 2:], dense_positions(alone, 4), atol=1e-12)
    assert torch.equal(found.scale, torch.ones(10, dtype=F64))


def neox(parallel: bool) -> TracedModel:
    """A GPT-NeoX whose MLP is known."""
    model = family_model("neox" if parallel else "neox-sequential")
    parts = {"mlp_input_projection": "mlp.dense_h_to_4h", "mlp_activation": "mlp.act"}
    changed = replace(model.architecture, **parts)
    return TracedModel(model._module, None, changed, name="neox")


@pytest.mark.parametrize("family", ["neox", "neox-sequential", "llama", "qwen2", "gemma"])
def test_rotary_parallel_and_gated_blocks(family: str) -> None:
    """Rotated queries and keys, an MLP beside the attention, and gates: differentiated exactly."""
    model = neox(family == "neox") if family.startswith("neox") else family_model(family)
    # Made only if it computes what the model, in float32, does.
    route = make_route(model, make_pair("block", 1, model), dtype=F64)
    source, target = pair_of_dictionaries("relu", 16, n=N)
    x = streams(4)
    mask = torch.ones(1, 4, dtype=torch.bool)

    def function(stream: Tensor) -> Tensor:
        return route(stream[None], mask)[0]

    found = route.attributions(source, target, x[None])
    given = dense_positions(found, 4) + dense_positions(found, 4, found.skip)
    expected, _ = dense_attributions(function, source, target, x, at_input=False)
    assert (given[..., :-1] - expected).abs().max() < 1e-10 * expected.abs().max()


# --- estimators, gauge, gradients -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "draws"),
    [
        ("l1", {"rows": 2}),
        ("log", {"tokens": 3}),
        ("l1l2", {"tokens": 3}),
        ("l1", {"rows": 1, "tokens": 20}),
    ],
)
def test_sampling_is_unbiased(kind: str, draws: dict[str, int]) -> None:
    """Over prompts of unequal length the mean over draws is the exact penalty, within 3 s.e."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("relu", 16, n=N)
    x, scale = streams(3, 18), torch.linspace(0.5, 1.5, N, dtype=F64)
    mask = torch.arange(18) >= torch.tensor([[0], [15], [9]])
    measure, generator = penalty(kind), torch.Generator().manual_seed(5)

    def value(**options: Any) -> Tensor:
        found = route.attributions(source, target, x, mask=mask, generator=generator, **options)
        return measure(found, scale)

    with torch.no_grad():
        exact, drawn = value(), torch.stack([value(**draws) for _ in range(100)])
    error = float(drawn.std()) / 10
    assert error > 0
    assert abs(float(drawn.mean() - exact)) < 3 * error


def test_gradients_reach_both_dictionaries() -> None:
    """Gradients in every parameter are those of finite differences."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("relu", 16, n=N)
    x, scale = streams(1, 3), torch.ones(N, dtype=F64)

    def loss() -> Tensor:
        found = route.attributions(source, target, x)
        assert found.skip is not None
        return penalty("log")(found, scale) + found.skip.square().sum()

    assert_gradients(loss, source, target)


# --- the model and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_block_is_the_models_own(dtype: torch.dtype) -> None:
    """From the stream before a block the route computes the stream after it, padding aside."""
    model = load_model((random_gpt2(dtype=dtype), None))
    pair = make_pair("block", 0, model)
    tokens = model.tokens([[5, 6, 7, 8, 9, 3], [4, 2, 1]])
    run = model.run(tokens, read=(pair.source, pair.target), logits="none")
    after = make_route(model, pair)(run[pair.source], tokens.mask)
    real = tokens.mask
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert (after - run[pair.target])[real].abs().max() < limit * run[pair.target].abs().max()


def test_a_model_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not all of the block are noticed when the route is made."""
    _, model, _ = model_and_route()
    monkeypatch.setattr(
        type(model.weights), "attention_bias", lambda *_: torch.zeros(16, dtype=F64)
    )
    with pytest.raises(ModelError, match=r"resid_pre\.1 to resid_post\.1"):
        make_route(model, make_pair("block", 1, model))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda x, mask: (x[0], mask[0]), "no whole prompts"),
        (lambda x, mask: (x, mask[:, 1:]), "no whole prompts"),
        (lambda x, mask: (x, mask & False), "no token of these prompts is real"),
    ],
)
def test_unfit_prompts_are_refused(change: Callable[..., Any], fact: str) -> None:
    """Shuffled tokens, a mask of another shape, and prompts of nothing are refused."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("topk", 16, n=N)
    x, mask = change(streams(2, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(OptionError, match=fact):
        route.attributions(source, target, x, mask=mask)
