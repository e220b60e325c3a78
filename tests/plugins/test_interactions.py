"""Interactions across an MLP: the closed form against dense Jacobians, estimators and penalties."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.attributions import Attributions
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.penalties import GroupPenalty, penalty
from circuitlab_feature_interactions.sites import make_pair
from dictionary_oracles import KINDS, random_dictionary
from interaction_oracles import (
    assert_gradients,
    dense_attributions,
    gpt2_mlp,
    over_draws,
    pair_of_dictionaries,
    scattered,
)
from oracles import random_gpt2
from torch import Tensor

from circuitlab import Dictionary, ModelError, OptionError, Site, load_model

F64 = torch.float64
SUMS, QUOTIENTS = ("l1", "log", "frobenius"), ("l1l2", "hoyer")


def model_and_route(**options: Any) -> tuple[Any, Any, Any]:
    """A random GPT-2, float64, as module and as model, and the route across its MLP 1."""
    module = random_gpt2(n_positions=12, **options)
    model = load_model((module, None))
    return module, model, make_route(model, make_pair("mlp", 1, model))


def streams(n: int = 7, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, 16, generator=generator, dtype=F64) + 0.5


def dense(found: Attributions) -> Tensor:
    """All pairs of latents of each token, ``[n, n_target, n_source + 1]``."""
    n, k, _ = found.values.shape
    index = found.source_index[:, None].expand_as(found.values)
    wide = scattered(found.values, index, found.n_source + 1).transpose(1, 2)
    index = found.target_index[:, None].expand(n, wide.shape[1], k)
    return scattered(wide, index, found.n_target).transpose(1, 2)


def made(values: Tensor, **changed: Any) -> Attributions:
    """Attributions ``[n, k_out, k_in]`` of latents 0, 1, … at every token."""
    n, k_out, k_in = values.shape
    facts: dict[str, Any] = {
        "target_index": torch.arange(k_out).expand(n, -1),
        "z_target": torch.ones(n, k_out, dtype=F64),
        "source_index": torch.arange(k_in).expand(n, -1),
        "z_source": torch.ones(n, k_in, dtype=F64),
        "token": torch.arange(n),
        "scale": torch.ones(n, dtype=F64),
        "rows_stand_for": torch.ones(n, dtype=F64),
        "target_norm": torch.ones(n, k_out, dtype=F64),
        "n_target": k_out,
        "n_source": k_in,
    }
    return Attributions(values, **{**facts, **changed})


# --- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_is_the_jacobian(kind: str, layer_norm: bool, with_error: bool) -> None:
    """Attributions of active latents are those of a dense Jacobian; all others are 0 there."""
    module, _, route = model_and_route(layer_norm=layer_norm)
    source, target = pair_of_dictionaries(kind, 16)
    x = streams()
    found = route.attributions(source, target, x, with_error=with_error)
    given = dense(found)
    for n, row in enumerate(x):
        expected, z = dense_attributions(
            gpt2_mlp(module, 1), source, target, row, at_input=with_error
        )
        assert (given[n, :, :-1] - expected).abs().max() < 1e-10 * expected.abs().max()
        assert torch.allclose(scattered(found.z_target, found.target_index, 12)[n], z)
    assert bool(given[..., -1].any()) == with_error


def test_the_error_is_one_more_source() -> None:
    """Its attribution is the derivative along what the dictionary misses."""
    module, _, route = model_and_route()
    source, target = pair_of_dictionaries("topk", 16)
    x = streams()
    given = dense(route.attributions(source, target, x, with_error=True))[..., -1]
    error = source.error(x).detach()

    def latents(t: Tensor) -> Tensor:
        return target.encode(gpt2_mlp(module, 1)(x + t * error))

    expected: Any = torch.func.jacrev(latents)(torch.tensor(0.0, dtype=F64))
    assert (given - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_other_nonlinearities(activation: str) -> None:
    """The slope is that of the model's own activation."""
    module, _, route = model_and_route(activation=activation)
    source, target = pair_of_dictionaries("topk", 16)
    x = streams(2)
    given = dense(route.attributions(source, target, x))[..., :-1]
    for n, row in enumerate(x):
        expected, _ = dense_attributions(gpt2_mlp(module, 1), source, target, row, at_input=False)
        assert (given[n] - expected).abs().max() < 1e-10 * expected.abs().max()


def test_gradients_reach_both_dictionaries() -> None:
    """Gradients of a penalty in every parameter are those of finite differences."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("relu", 16, n=6)
    x, scale = streams(3), torch.ones(6, dtype=F64)

    def loss() -> Tensor:
        return penalty("log")(route.attributions(source, target, x), scale)

    assert_gradients(loss, source, target)


def test_masked_tokens_are_left_out() -> None:
    """Tokens of whole prompts are those of the same tokens alone, padding aside."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("topk", 16)
    x = streams(8).view(2, 4, 16)
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    found = route.attributions(source, target, x, mask=mask)
    alone = route.attributions(source, target, x[mask])
    assert found.token.tolist() == [0, 1, 2, 3, 6, 7]
    assert torch.equal(found.values, alone.values)


# --- estimators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "draws"),
    [
        *[(kind, {"rows": rows, "tokens": 3}) for kind in SUMS for rows in (1, 2)],
        *[(kind, {"rows": 2}) for kind in SUMS],
        *[(kind, {"tokens": 3}) for kind in (*SUMS, *QUOTIENTS)],
    ],
)
def test_sampling_is_unbiased(kind: str, draws: dict[str, int]) -> None:
    """The mean over draws is the exact penalty, within 3 standard errors."""
    _, _, route = model_and_route()
    drawn, exact = over_draws(route, *pair_of_dictionaries("relu", 16), streams(6), kind, draws)
    error = float(drawn.std()) / len(drawn) ** 0.5
    assert error > 0
    assert abs(float(drawn.mean()) - exact) < 3 * error


def test_as_many_rows_as_are_active_is_exact() -> None:
    """Rows that are drawn among few active latents are all of them, each for itself."""
    _, _, route = model_and_route()
    source, target = pair_of_dictionaries("relu", 16, n=30)
    x = torch.cat([streams(), torch.zeros(1, 16, dtype=F64)])
    scale = torch.ones(30, dtype=F64)
    exact = route.attributions(source, target, x)
    n_active = (exact.z_target > 0).sum(-1)
    assert n_active.min() < n_active.max()
    drawn = route.attributions(source, target, x, rows=int(n_active.max()))
    assert torch.equal(drawn.scale, torch.ones(8, dtype=F64))
    fewer = int(n_active.min())
    drawn = route.attributions(source, target, x, rows=fewer)
    assert torch.equal(drawn.scale * fewer, n_active.double())
    drawn = route.attributions(source, target, x, rows=int(n_active.max()))
    one, other = (penalty("l1")(found, scale).item() for found in (drawn, exact))
    assert one == pytest.approx(other)


# --- gauge ----------------------------------------------------------------------------------------


def rescaled(dictionary: Dictionary, factors: Tensor) -> Dictionary:
    """The same function with latents times factors."""
    d = dictionary
    changed = {"r_mag": d.r_mag, "b_mag": d.b_mag, "threshold": d.threshold}
    w_e, b_e = d.W_e * factors, d.b_e * factors
    if d.threshold is not None:
        changed["threshold"] = d.threshold * factors
    if d.b_mag is not None:
        changed["b_mag"] = d.b_mag * factors
    changed = {name: value for name, value in changed.items() if value is not None}
    w_d = d.W_d / factors[:, None]
    return Dictionary(w_e, b_e, w_d, d.b_d, apply_b_dec_to_input=False, **changed)


def means(found: Attributions) -> Tensor:
    """Mean of each target latent where it is active."""
    z = scattered(found.z_target, found.target_index, found.n_target)
    return z.sum(0) / (z > 0).sum(0).clamp(min=1) + (z.sum(0) == 0)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
@pytest.mark.parametrize("measure", ["l1", "log", *QUOTIENTS, "group"])
def test_gauge(kind: str, measure: str) -> None:
    """Rescaled latents, on both sides, have the same penalty: nothing is won by it."""
    _, _, route = model_and_route()
    pair = pair_of_dictionaries(kind, 16)
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(12, generator=generator, dtype=F64)).exp() for _ in pair]
    x, totals = streams(), []
    for source, target in (pair, [rescaled(*both) for both in zip(pair, factors, strict=True)]):
        found = route.attributions(source, target, x)
        totals.append(penalty(measure)(found, means(found)).item())
    assert totals[0] > 0
    assert totals[1] == pytest.approx(totals[0], rel=1e-9)


# --- penalties ------------------------------------------------------------------------------------


def l1l2(r: list[float]) -> float:
    return sum(map(abs, r)) / math.sqrt(sum(v * v for v in r))


_BY_HAND: dict[str, Callable[[list[float]], float]] = {
    "l1": lambda r: sum(map(abs, r)),
    "l1l2": l1l2,
    "hoyer": lambda r: 1 - (math.sqrt(len(r)) - l1l2(r)) / (math.sqrt(len(r)) - 1),
    "log": lambda r: sum(math.log(1 + (v / 0.3) ** 2) for v in r),
}


@pytest.mark.parametrize("kind", _BY_HAND)
def test_penalty_by_hand(kind: str) -> None:
    """Weighted mean over tokens of what the formula says of shares of the scale."""
    values = streams(6).view(2, 3, 16)[..., :4]
    scale, weight = torch.tensor([1.0, 2.0, 0.5], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    expected = sum(
        w * _BY_HAND[kind]([v / s for s, row in zip([1, 2, 0.5], token, strict=True) for v in row])
        for w, token in zip([1, 3], values.tolist(), strict=True)
    )
    norms = (1 / scale).expand(2, -1)
    given = penalty(kind)(made(values, scale=weight, target_norm=norms), scale)
    assert float(given) == pytest.approx(expected / 2, rel=1e-6)


def test_frobenius_is_of_the_jacobian() -> None:
    """The control leaves out what latents are, and what their scale is."""
    values, z = torch.tensor([[[2.0, 6.0]]], dtype=F64), torch.tensor([[2.0, 3.0]], dtype=F64)
    given = penalty("frobenius")(made(values, z_source=z), torch.full((1,), 7.0, dtype=F64))
    assert float(given) == pytest.approx(1 + 4)


def test_group_by_hand() -> None:
    """The root of each pair's mean over tokens, added up; pairs that meet only sometimes count."""
    values = torch.tensor([[[1.0, -2.0]], [[3.0, 0.0]]], dtype=F64)
    index = torch.tensor([[0, 1], [1, 0]])
    given = penalty("group")(made(values, source_index=index), torch.full((1,), 2.0, dtype=F64))
    # shares: pair 0 has .5 and 0, pair 1 has 1 and 1.5
    assert float(given) == pytest.approx(0.25**0.5 + 1.25**0.5, abs=1e-5)


def test_running_group_has_the_gradient_of_the_whole() -> None:
    """With a settled mean, gradients of batches average to that of the whole data set's penalty."""
    values = torch.rand(40, 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64) ** 3
    ones, share = torch.ones(2, dtype=F64), torch.ones((), dtype=F64, requires_grad=True)
    whole = penalty("group")(made(values * share), ones)
    expected = torch.autograd.grad(whole, share)[0]
    running, found = GroupPenalty(0.999), []
    for _ in range(20):
        found = []
        for batch in values.split(4):
            total = running(made(batch * share), ones)
            found.append((total.item(), torch.autograd.grad(total, share)[0].item()))
    total, gradient = (sum(part) / len(part) for part in zip(*found, strict=True))
    singles = [penalty("group")(made(batch), ones).item() for batch in values.split(4)]
    assert total == pytest.approx(whole.item(), rel=0.01)
    assert gradient == pytest.approx(expected.item(), rel=0.01)
    assert sum(singles) / len(singles) < 0.97 * whole.item()


@pytest.mark.parametrize("kind", [*SUMS, *QUOTIENTS, "group"])
def test_penalty_of_nothing_is_nothing(kind: str) -> None:
    """Where nothing is active the penalty and its gradient are 0, not NaN."""
    share = torch.ones((), dtype=F64, requires_grad=True)
    nothing = torch.zeros(2, 3, 4, dtype=F64) * share
    none = {"z_source": torch.zeros(2, 4, dtype=F64), "z_target": torch.zeros(2, 3, dtype=F64)}
    total = penalty(kind)(made(nothing, **none), torch.ones(3, dtype=F64))
    assert total.item() == 0
    assert torch.autograd.grad(total, share)[0].item() == 0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [({"rows": 0}, "0 target latents"), ({"tokens": 0}, "0 tokens are too few")],
)
def test_too_few_are_refused(options: dict[str, int], fact: str) -> None:
    """A draw of nothing is refused."""
    _, _, route = model_and_route()
    with pytest.raises(OptionError, match=fact):
        route.attributions(*pair_of_dictionaries("topk", 16), streams(), **options)


def test_unfit_dictionaries_are_refused() -> None:
    """Another width, another type and a transcoder are refused, by name."""
    _, _, route = model_and_route()
    fit, narrow = random_dictionary(d_in=16), random_dictionary(d_in=5)
    single = random_dictionary(d_in=16, dtype=torch.float32)
    with pytest.raises(OptionError, match="target dictionary reads 5 numbers"):
        route.attributions(fit, narrow, streams())
    with pytest.raises(OptionError, match=r"source dictionary is torch\.float32"):
        route.attributions(single, fit, streams())
    with pytest.raises(OptionError, match="is a transcoder"):
        route.attributions(random_dictionary(d_in=16, form="transcoder"), fit, streams())


def test_the_type_of_the_dictionaries_can_be_given() -> None:
    """The remedy of the message about types works."""
    _, model, _ = model_and_route()
    route = make_route(model, make_pair("mlp", 1, model), dtype=torch.float32)
    pair = pair_of_dictionaries("topk", 16, dtype=torch.float32)
    assert route.attributions(*pair, streams()).values.dtype == torch.float32


@pytest.mark.parametrize(("name", "decay"), [("l3", 0.0), ("group", 1.0)])
def test_unknown_penalties_are_refused(name: str, decay: float) -> None:
    """A kind that is not there, and a running mean that never forgets, are refused."""
    with pytest.raises(OptionError):
        penalty(name) if decay == 0 else GroupPenalty(decay)


def test_a_model_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A route that does not compute what the model does is refused when it is made."""
    _, model, _ = model_and_route()
    weights = model.weights.mlp(1, F64)
    monkeypatch.setattr(type(model.weights), "mlp", lambda *_, **__: weights)
    pair = make_pair("mlp", 0, model)
    with pytest.raises(ModelError, match=r"mlp_in\.0 to mlp_out\.0"):
        make_route(model, pair)
    assert pair.source == Site("mlp_in", 0)
