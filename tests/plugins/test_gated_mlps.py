"""Interactions across gated MLPs, SwiGLU and GEGLU: both factors of the product are seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.sites import make_pair
from families import family_model, random_module, silent
from interaction_oracles import (
    dense_attributions,
    gated_mlp,
    over_draws,
    pair_of_dictionaries,
    scattered,
)
from torch import Tensor

from circuitlab import ModelError, SiteError, TracedModel

F64 = torch.float64
FAMILIES = ("llama", "qwen2", "gemma")


def streams(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(n, 16, generator=generator, dtype=F64) + 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_model(family: str) -> None:
    """Written out in float64, the MLP is what the module gives in float32."""
    module = family_model(family)._module
    block = module.get_submodule("model.layers.1")
    x = streams(4)
    with torch.no_grad():
        given = block.mlp(block.post_attention_layernorm(x.float()))
    assert torch.allclose(gated_mlp(module, 1)(x).float(), given, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_error", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_is_the_jacobian(family: str, with_error: bool) -> None:
    """Active pairs of latents, behind an RMSNorm, to 1e-10 of a dense Jacobian; others are 0."""
    model = family_model(family)
    function = gated_mlp(model._module, 1)
    route = make_route(model, make_pair("mlp", 1, model), dtype=F64)
    source, target = pair_of_dictionaries("relu", 16)
    x = streams(4)
    assert torch.allclose(route(x, x[:, 0] > -9), function(x), rtol=1e-10)
    found = route.attributions(source, target, x, with_error=with_error)
    index = found.source_index[:, None].expand_as(found.values)
    wide = scattered(found.values, index, 13).transpose(1, 2)
    rows = found.target_index[:, None].expand(-1, 13, -1)
    given = scattered(wide, rows, 12).transpose(1, 2)[..., :-1]
    for n, row in enumerate(x):
        expected, _ = dense_attributions(function, source, target, row, at_input=with_error)
        assert (given[n] - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("draws", [{"rows": 2}, {"tokens": 3}, {"rows": 2, "tokens": 3}])
def test_sampling_is_unbiased(draws: dict[str, int]) -> None:
    """The mean over draws is the exact penalty, within 3 standard errors."""
    model = family_model("llama")
    route = make_route(model, make_pair("mlp", 1, model), dtype=F64)
    drawn, exact = over_draws(route, *pair_of_dictionaries("relu", 16), streams(6), "l1", draws)
    error = float(drawn.std()) / len(drawn) ** 0.5
    assert error > 0
    assert abs(float(drawn.mean()) - exact) < 3 * error


def test_unknown_mlps_are_refused() -> None:
    """A family that does not name its MLP's maps, and one that leaves the gate out."""
    model = silent(random_module("neox"))
    with pytest.raises(SiteError, match="mlp_input_projection"):
        make_route(model, make_pair("mlp", 0, model))
    model = family_model("llama")
    changed = replace(model.architecture, mlp_gate_projection="")
    gateless = TracedModel(model._module, None, changed, name="llama")
    with pytest.raises(ModelError, match="differs from the model"):
        make_route(gateless, make_pair("mlp", 0, gateless))
