"""What a run refuses, and how it says where a number went wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from circuitlab import NumericsError, Site, SiteError, TaskError, TracedModel, load_model

PROMPTS = [(1, 2, 3, 4), (5, 6)]


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return load_model((oracles.random_gpt2(), None))


def first(logits: Tensor) -> Tensor:
    return logits[:, 0]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("q", 2), r"q\.2 does not exist: layers run from 0 to 1"),
        (Site("resid_pre", -1), "layers run from 0 to 1"),
        (Site("z", 0, head=2), r"z\.0\.h2 does not exist: heads run from 0 to 1"),
        (Site("logits"), "read as run.logits"),
    ],
    ids=str,
)
def test_site_that_does_not_exist(model: TracedModel, site: Site, message: str) -> None:
    """A site outside the model is refused by reads, writes and gradients, with its sizes."""
    for arguments in (
        {"read": [site]},
        {"write": {site: torch.zeros(())}},
        {"gradient_of": first, "gradient_at": [site]},
    ):
        with pytest.raises(SiteError, match=message):
            model.run(PROMPTS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("site", "shape", "message"),
    [
        (Site("z", 0), (2, 4, 3, 8), r"\[batch, pos, n_heads, d_head\], here \[2, 4, 2, 8\]"),
        (Site("resid_pre", 1), (3, 4, 16), r"shape \[3, 4, 16\]; .* here \[2, 4, 16\]"),
        (Site("mlp_out", 0, position=4), (16,), "the prompts have 4 positions"),
        (Site("mlp_out", 0, position=-5), (16,), "the prompts have 4 positions"),
        (Site("pattern", 0), (), "cannot be written"),
    ],
    ids=str,
)
def test_write_that_does_not_fit(
    model: TracedModel, site: Site, shape: tuple[int, ...], message: str
) -> None:
    """A tensor of the wrong shape, a position that is not there, and the pattern are refused."""
    with pytest.raises(SiteError, match=message):
        model.run(PROMPTS, write={site: torch.zeros(shape)})


def test_gradient_of_needs_gradient_at(model: TracedModel) -> None:
    """The two are given together."""
    with pytest.raises(SiteError, match="give both or neither"):
        model.run(PROMPTS, gradient_of=first)
    with pytest.raises(SiteError, match="give both or neither"):
        model.run(PROMPTS, gradient_at=[Site("q", 0)])


def test_site_that_was_not_kept(model: TracedModel) -> None:
    """A run asked for what it did not keep names the argument that keeps it, and that works."""
    site = Site("mlp_out", 1)
    with pytest.raises(SiteError, match=r"mlp_out\.1 was not kept; name it in run\(\.\.\., read="):
        model.run(PROMPTS)[site]
    with pytest.raises(SiteError, match=r"name it in run\(\.\.\., gradient_at="):
        model.run(PROMPTS, read=[site]).gradient(site)
    run = model.run(PROMPTS, read=[site], gradient_of=first, gradient_at=[site])
    assert run[site].shape == run.gradient(site).shape == (2, 4, 16)


def test_position_that_is_not_there(model: TracedModel) -> None:
    """A read at a position outside the prompts is refused, as a write is."""
    run = model.run(PROMPTS, read=[Site("q", 0)])
    for position in (4, -5):
        with pytest.raises(SiteError, match="the prompts have 4 positions"):
            run[Site("q", 0, position=position)]
    assert torch.equal(run[Site("q", 0, position=-4)], run[Site("q", 0, position=0)])


def test_prompts_that_do_not_fit(model: TracedModel) -> None:
    """Prompts are checked at the door of a run too."""
    with pytest.raises(TaskError, match="prompt 2"):
        model.run([(1, 2), (1, 40)])
    with pytest.raises(TaskError, match="there are no prompts"):
        model.run([])


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("transformer.h.1.mlp.c_proj", r"mlp_out\.1"),
        ("transformer.h.0.attn.c_attn", r"q\.0"),
        ("transformer.h.1.attn.c_proj", r"attn_out\.1"),
        ("transformer.h.0.ln_1", r"q\.0"),
        ("lm_head", "logits"),
    ],
)
@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinity|NaN")])
def test_weight_that_is_not_finite(path: str, site: str, value: float, word: str) -> None:
    """A bad weight is blamed on the first site that shows it, whatever comes after."""
    module: Any = oracles.random_gpt2()
    model = load_model((module, None))
    module.get_submodule(path).weight.data[0] = value
    with pytest.raises(NumericsError, match=rf"^({word}) at site {site}, prompt 1 of the batch"):
        model.run(PROMPTS)


def test_prompt_that_is_not_finite() -> None:
    """When only one prompt goes wrong, that one is named; the others run on without it."""
    module: Any = oracles.random_gpt2()
    model = load_model((module, None))
    module.transformer.wte.weight.data[6] = torch.nan
    with pytest.raises(NumericsError, match=r"^NaN at site resid_pre\.0, prompt 2 of the batch"):
        model.run(PROMPTS)
    model.run(PROMPTS[:1])


def test_written_value_that_is_not_finite(model: TracedModel) -> None:
    """A NaN that was written is found where it was written."""
    with pytest.raises(NumericsError, match=r"NaN at site z\.1, prompt 1"):
        model.run(PROMPTS, write={Site("z", 1, head=1): torch.tensor(torch.nan)})


def test_attention_that_keeps_no_patterns() -> None:
    """Fused attention has no patterns to read; the message says what to call, all else works."""
    module = oracles.random_gpt2()
    module.set_attn_implementation("sdpa")
    fused = load_model((module, None))
    assert fused.run(PROMPTS, read=[Site("z", 1)])[Site("z", 1)].shape[0] == 2
    with pytest.raises(SiteError, match=r"kind 'sdpa' keeps no patterns; call .*'eager'"):
        fused.run(PROMPTS, read=[Site("pattern", 1)])


def test_gradient_that_is_not_finite(model: TracedModel) -> None:
    """A finite metric with an infinite slope is refused; the place nearest to it is named."""

    def steep(logits: Tensor) -> Tensor:
        fine, flat = first(logits).split(1)
        return torch.cat([fine, (0 * flat).sqrt()])

    with pytest.raises(
        NumericsError,
        match=r"at transformer\.h\.1\.mlp \(output\), prompt 2 of the batch, holds NaN",
    ):
        model.run(PROMPTS, gradient_of=steep, gradient_at=[Site("mlp_out", 1)])


def test_verbose_flag_is_not_nnsights() -> None:
    """A program that has -v or --verbose of its own does not switch nnsight's debugging on."""
    code = "import circuitlab.tracing, nnsight; print(nnsight.CONFIG.APP.DEBUG)"
    command = [sys.executable, "-c", code, "-v", "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
