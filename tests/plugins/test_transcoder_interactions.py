"""Interactions of neighbouring MLPs' transcoders: along the stream and through attention."""

from __future__ import annotations

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
    dense_positions,
    dense_transcoded,
    gpt2_attention,
    gpt2_mlp,
    pair_of_dictionaries,
    pair_of_transcoders,
    scattered,
)
from oracles import random_gpt2
from torch import Tensor

from circuitlab import Dictionary, OptionError, TracedModel, load_model

F64 = torch.float64
N = 10


def model_and_route(**options: Any) -> tuple[Any, Any, Any]:
    """A random GPT-2, float64, as module and as model, and the route from its MLP 0 to MLP 1."""
    module = random_gpt2(n_positions=12, **options)
    model = load_model((module, None))
    return module, model, make_route(model, make_pair("transcoder", 0, model))


def streams(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, 16, generator=generator, dtype=F64) + 0.5


def by_hand(module: Any, source: Any, target: Any, x: Tensor, at_input: bool) -> Any:
    attention = gpt2_attention(module, 1)
    return dense_transcoded(
        gpt2_mlp(module, 0),
        lambda stream: stream + attention(stream),
        source,
        target,
        x,
        at_input=at_input,
    )


# --- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "skip"])
def test_closed_form_is_the_jacobian(kind: str, layer_norm: bool, with_error: bool) -> None:
    """The dense Jacobian at every pair of positions; its local part is decoder times encoder."""
    module, _, route = model_and_route(layer_norm=layer_norm)
    skip = kind == "skip"
    source, target = pair_of_transcoders("relu" if skip else kind, 16, N, skip=skip)
    x = streams(5)
    found = route.attributions(source, target, x[None], with_error=with_error)
    expected, z = by_hand(module, source, target, x, with_error)
    limit = 1e-10 * float(expected.detach().abs().max())
    given = dense_positions(found, 5)[..., :-1]
    assert (given - expected).abs().max() < limit
    assert expected[4, :, :4].abs().max() > 1e6 * limit
    assert torch.allclose(scattered(found.z_target, found.target_index, N), z)
    gain = (z > 0) * (1 if target.r_mag is None else target.r_mag.exp())
    along = torch.einsum("jd,di,pi,pj->pij", source.W_d, target.W_e, gain, source.encode(x))
    local = dense_positions(found, 5, found.local)[..., :-1]
    for t in range(5):
        assert (local[t, :, t] - along[t]).abs().max() < limit
        assert not local[t, :, :t].any()
    assert found.skip is None


def test_errors_are_sources_at_every_position() -> None:
    """The last latent stands for what the transcoder misses of the MLP, position by position."""
    module, _, route = model_and_route()
    source, target = pair_of_transcoders("topk", 16, N)
    x = streams(4)
    given = dense_positions(route.attributions(source, target, x[None], with_error=True), 4)
    written = gpt2_mlp(module, 0)(x)
    error = source.error(x, written).detach()

    def latents(share: Tensor) -> Tensor:
        stream = x + written + share[:, None] * error
        return target.encode(stream + gpt2_attention(module, 1)(stream))

    expected: Any = torch.func.jacrev(latents)(torch.zeros(4, dtype=F64))
    assert (given[..., -1] - expected).abs().max() < 1e-10 * expected.abs().max()


def test_padding_is_nothing() -> None:
    """A padded prompt's attributions are those of the prompt alone."""
    _, _, route = model_and_route()
    source, target = pair_of_transcoders("relu", 16, N)
    x = streams(2, 6)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    x[1, :2] = 0
    found = route.attributions(source, target, x, mask=mask, with_error=True)
    alone = route.attributions(source, target, x[1:, 2:], with_error=True)
    assert found.token.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    padded = dense_positions(found, 6)[6:]
    assert not padded[:, :, :2].any()
    assert torch.allclose(padded[:, :, 2:], dense_positions(alone, 4), atol=1e-12)


def family(name: str) -> TracedModel:
    """A model of a family whose MLP is known."""
    model = family_model(name)
    if not name.startswith("neox"):
        return model
    parts = {"mlp_input_projection": "mlp.dense_h_to_4h", "mlp_activation": "mlp.act"}
    return TracedModel(model._module, None, replace(model.architecture, **parts), name=name)


@pytest.mark.parametrize("name", ["neox", "neox-sequential", "llama"])
def test_other_families(name: str) -> None:
    """Rotary positions and gates; in parallel blocks no attention is between, and all is direct."""
    model = family(name)
    # Made only if it computes what the model, in float32, does.
    route = make_route(model, make_pair("transcoder", 0, model), dtype=F64)
    source, target = pair_of_transcoders("relu", 16, N)
    x = streams(4)
    mask = torch.ones(1, 4, dtype=torch.bool)
    at = route.attention

    def beside(stream: Tensor) -> Tensor:
        read = x if name == "neox" else stream
        return stream + at.at(read[None], mask).written[0]

    found = route.attributions(source, target, x[None], with_error=True)
    given = dense_positions(found, 4)[..., :-1]
    expected, _ = dense_transcoded(
        lambda x: route.mlp.at(x).written, beside, source, target, x, at_input=True
    )
    assert (given - expected).abs().max() < 1e-10 * expected.abs().max()
    ahead = given[3, :, :3].abs().max()
    assert ahead == 0 if name == "neox" else ahead > 1e-3


def test_relu_mlps_are_their_own_transcoders() -> None:
    """Without norms an MLP of ReLUs is a transcoder: no error, and edges are weight products."""
    module, model, route = model_and_route(layer_norm=False, activation="relu")
    pair = []
    for layer in (0, 1):
        mlp = module.transformer.h[layer].mlp
        parts = (mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias)
        pair.append(Dictionary(*parts, transcoder=True, apply_b_dec_to_input=False))
    sites = [make_pair("mlp", layer, model) for layer in (0, 1)]
    tokens = model.tokens([[5, 6, 7, 8], [4, 2]])
    read = [site for one in sites for site in (one.source, one.target)]
    run = model.run(tokens, read=read, logits="none")
    for site, one in zip(sites, pair, strict=True):
        missed = one.error(run[site.source], run[site.target])[tokens.mask]
        assert missed.abs().max() < 1e-12
    found = route.attributions(*pair, run[sites[0].source], mask=tokens.mask, with_error=True)
    z = [one.encode(run[site.source])[tokens.mask] for site, one in zip(sites, pair, strict=True)]
    weights = module.transformer.h[0].mlp.c_proj.weight @ module.transformer.h[1].mlp.c_fc.weight
    expected = weights.T * z[0][:, None] * (z[1] > 0)[..., None]
    local = dense_positions(found, 4, found.local)
    own = (tokens.ids.shape[1] - tokens.mask.flip(1).long().cumsum(1).flip(1))[tokens.mask]
    given = local[torch.arange(len(local)), :, own]
    assert torch.allclose(given[..., :-1], expected, atol=1e-12)
    assert dense_positions(found, 4)[..., -1].abs().max() < 1e-9


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
    source, target = pair_of_transcoders("relu", 16, N)
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


@pytest.mark.parametrize("measure", ["l1", "log", "l1l2", "hoyer", "group"])
def test_gauge(measure: str) -> None:
    """Rescaled latents, on both sides, have the same penalty."""
    _, _, route = model_and_route()
    pair, x, totals = pair_of_transcoders("relu", 16, N), streams(2, 5), []
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(N, generator=generator, dtype=F64).exp() for _ in pair]
    other = [
        Dictionary(
            d.W_e * by, d.b_e * by, d.W_d / by[:, None], d.b_d,
            transcoder=True, apply_b_dec_to_input=False,
        )
        for d, by in zip(pair, factors, strict=True)
    ]  # fmt: skip
    for source, target in (pair, other):
        found = route.attributions(source, target, x)
        z = scattered(found.z_target, found.target_index, N)
        mean = z.sum(0) / (z > 0).sum(0).clamp(min=1) + (z.sum(0) == 0)
        totals.append(penalty(measure)(found, mean).item())
    assert totals[0] > 0
    assert totals[1] == pytest.approx(totals[0], rel=1e-9)


def test_gradients_reach_both_transcoders() -> None:
    """Gradients in every parameter are those of finite differences."""
    _, _, route = model_and_route()
    source, target = pair_of_transcoders("relu", 16, N)
    x, scale = streams(1, 3), torch.ones(N, dtype=F64)

    def loss() -> Tensor:
        return penalty("log")(route.attributions(source, target, x), scale)

    assert_gradients(loss, source, target)


# --- the model and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_route_is_the_models_own(dtype: torch.dtype) -> None:
    """From what an MLP reads the route computes what the next one reads, padding aside."""
    model = load_model((random_gpt2(dtype=dtype), None))
    pair = make_pair("transcoder", 0, model)
    tokens = model.tokens([[5, 6, 7, 8, 9, 3], [4, 2, 1]])
    run = model.run(tokens, read=(pair.source, pair.target), logits="none")
    read = make_route(model, pair)(run[pair.source], tokens.mask)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    apart = (read - run[pair.target])[tokens.mask].abs().max()
    assert apart < limit * run[pair.target].abs().max()


def test_autoencoders_are_refused() -> None:
    """Between MLPs interact transcoders; an autoencoder, or another width, is named."""
    _, _, route = model_and_route()
    source, target = pair_of_transcoders("relu", 16, N)
    with pytest.raises(OptionError, match="source dictionary is an autoencoder"):
        route.attributions(pair_of_dictionaries("relu", 16)[0], target, streams(1, 3))
    with pytest.raises(OptionError, match="target dictionary reads 5 numbers"):
        route.attributions(source, pair_of_transcoders("relu", 5)[1], streams(1, 3))
    with pytest.raises(OptionError, match="no whole prompts"):
        route.attributions(source, target, streams(3))
