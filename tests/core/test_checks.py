"""The self-check passes models that are described rightly and refuses those that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from torch import nn

from circuitlab import Architecture, ModelError, Projection, QualityError, TracedModel, load_model
from circuitlab.architectures import gpt2
from circuitlab.checks import Check, probe, require, run_checks


def traced(module: Any, **changes: Any) -> TracedModel:
    """The module, described as GPT-2 but for these changes."""
    architecture = gpt2(module.config)
    assert architecture is not None
    return TracedModel(module, None, replace(architecture, **changes), name="toy")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", [{}, {"layer_norm": False}, {"mlp": False}, {"n_layers": 1}])
def test_sound_model_passes(shape: dict[str, Any], dtype: torch.dtype) -> None:
    """Every check holds, within the rounding of the model's own type."""
    module = oracles.random_gpt2(dtype=dtype, **shape)
    checks = run_checks(traced(module), probe(module))
    assert len({check.name for check in checks}) == len(checks) >= 7
    assert [check.name for check in checks if not check.passed] == []
    require(traced(module), checks)
    assert {check.tolerance for check in checks} == {256 * torch.finfo(dtype).eps}


def port(offset: int, stride: int = 8) -> Projection:
    return Projection("attn.c_attn", offset, stride)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"v": port(0)}, "heads carry nothing but their values: off by"),
        ({"k": port(32), "v": port(16)}, "heads carry nothing but their values: off by"),
        ({"d_head": 4, "n_heads": 4}, "cannot be traced as GPT-2|off by"),
        ({"mlp": "mlp.c_fc"}, "cannot be traced as GPT-2"),
        ({"attention_norm": "ln_2"}, "projected from the residual stream: off by"),
        ({"parallel": True}, "MLPs read the stream they are said to read: off by"),
        ({"mlp_output_projection": "attn.c_proj", "d_mlp": 16}, "layers are projected to: off by"),
        ({"mlp_output_projection": "mlp.act"}, "cannot be traced as GPT-2"),
        ({"d_mlp": 16}, r"reads 64 numbers, and the architecture of GPT-2 says d_mlp = 16"),
        ({"output_projection": "mlp.c_proj"}, "cannot be traced as GPT-2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_description_is_refused(changes: dict[str, Any], fact: str) -> None:
    """A description that does not fit the module fails a check, whatever part of it is wrong."""
    module = oracles.random_gpt2()
    model = traced(module, **changes)
    with pytest.raises(QualityError, match=fact):
        require(model, run_checks(model, probe(module)))


def test_an_mlp_that_goes_on_behind_its_projection_is_refused() -> None:
    """What is read at mlp_post must be all that the MLP writes, up to a linear map."""
    module: Any = oracles.random_gpt2()
    module.transformer.h[0].mlp.dropout = nn.Tanh()
    model = traced(module)
    with pytest.raises(QualityError, match="what their hidden layers are projected to: off by"):
        require(model, run_checks(model, probe(module)))
    without = traced(module, mlp_output_projection="", d_mlp=0)
    require(without, run_checks(without, probe(module)))


def test_model_that_pads_wrongly_is_refused() -> None:
    """If padding changes what a prompt gives, scores of padded batches would be wrong."""
    module: Any = oracles.random_gpt2()
    forward = module.transformer.forward

    def without_positions(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "position_ids": None})

    module.transformer.forward = without_positions
    model = traced(module)
    with pytest.raises(QualityError, match="padding changes nothing: off by"):
        require(model, run_checks(model, probe(module)))


def test_other_logits_are_refused() -> None:
    """Logits that differ from the plain module's stop everything, with difference and tolerance."""
    module: Any = oracles.random_gpt2()
    plain = probe(module)
    module.lm_head.weight.data[0] += 1e-3
    model = traced(module)
    message = (
        r"'toy' as traced \(GPT-2, torch.float64\) fails .*logits equal plain .* at most 5.7e-14"
    )
    with pytest.raises(QualityError, match=message):
        require(model, run_checks(model, plain))


def test_nan_is_no_pass() -> None:
    """A difference that is not a number is not a small one."""
    assert Check("x", 0.0, 0.0).passed
    assert Check("x", 1.0, 2.0).passed
    assert not Check("x", 2.0, 1.0).passed
    assert not Check("x", float("nan"), 1.0).passed


def test_probe_pads_and_leaves_the_random_state() -> None:
    """One of the two prompts is padded, the prompts are always the same, and nothing is drawn."""
    state = torch.get_rng_state()
    one, two = (probe(oracles.random_gpt2()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.tokens.ids, two.tokens.ids)
    assert torch.equal(one.logits, two.logits)
    assert one.tokens.mask.sum(1).tolist() == [6, 3]


def test_probe_fits_a_short_context() -> None:
    """A model that reads very few tokens is probed with as many."""
    module = oracles.random_gpt2(n_positions=3)
    assert probe(module).tokens.ids.shape == (2, 3)
    assert load_model((module, None)).n_positions == 3


class NoLogits(nn.Module):
    """Something that can be called but gives no logits."""

    def __init__(self, config: Any, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.config, self.answer = config, answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, **inputs: Any) -> Any:
        return self.answer(**inputs)


@pytest.mark.parametrize(
    "answer",
    [lambda input_ids, **_: input_ids, lambda input_ids: input_ids],
    ids=["no logits", "no mask"],
)
def test_module_that_is_no_language_model(answer: Callable[..., Any]) -> None:
    """A module that cannot be run as one is refused, with the remedy."""
    module = NoLogits(oracles.random_gpt2().config, answer)
    with pytest.raises(ModelError, match=r"NoLogits cannot be run .* AutoModelForCausalLM"):
        probe(module)


def test_architecture_says_where_modules_are() -> None:
    """Every path of the description exists in the module it describes."""
    module = oracles.random_gpt2(3)
    architecture = gpt2(module.config)
    assert isinstance(architecture, Architecture)
    for path in architecture.module_paths():
        module.get_submodule(path)
    with pytest.raises(AttributeError):
        module.get_submodule(architecture.block(3))
