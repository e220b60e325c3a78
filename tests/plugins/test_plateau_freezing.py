"""Component freeze: each part held at an end, against a plain model under hooks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.sharpness.freezing import NOTHING, Freezer, Part, parts_after
from families import random_module, silent, traced
from freeze_oracles import Plain
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from circuitlab import ModelError, OptionError, Site, Tokens, TracedModel, load_model

N_STEPS = 4
FAMILIES = ("gpt2", "llama", "qwen2", "neox", "neox-sequential")


def gpt2(n_layers: int = 3, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=30, n_positions=12, n_embd=16, n_layer=n_layers, n_head=2,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return module


@cache
def pair(family: str) -> tuple[nn.Module, TracedModel]:
    if family == "gpt2":
        module: Any = gpt2()
        return module, load_model(module)
    module = random_module(family, 2)
    known = traced(module)
    if not family.startswith("neox"):
        return module, known
    named = replace(
        known.architecture, mlp_input_projection="mlp.dense_h_to_4h", mlp_activation="mlp.act"
    )
    return module, TracedModel(module, None, named, name="toy")


def prompts(vocab: int = 30) -> Tokens:
    """A prompt of 5 tokens and one of 3, padded on the left."""
    ids = torch.randint(1, vocab, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2] = False
    return Tokens(ids * mask, mask)


def points(d_model: int) -> Tensor:
    return torch.randn(2, N_STEPS, d_model, generator=torch.Generator().manual_seed(2))


def by_hooks(
    module: nn.Module, model: TracedModel, layer: int, names: tuple[str, ...], end: int
) -> Tensor:
    """Centred logits with parts held at an end, one prompt at a time."""
    plain, tokens, found = Plain(module, model.architecture), prompts(), []
    for row, way in enumerate(points(model.d_model)):
        ids = tokens.ids[row][tokens.mask[row]]
        _, free = plain.walk(ids, layer, way, {})
        hold = {name: free[name][-end] for name in names}
        found.append(plain.walk(ids, layer, way, hold)[0])
    return torch.stack(found)


def members(part: Part, parts: list[Part]) -> tuple[str, ...]:
    """The oracle's names of what a part holds."""
    kinds = {"all attention": "attention", "all MLPs": "mlp", "all norms": "norm"}
    if part.kind != "all":
        return (part.name,)
    return tuple(other.name for other in parts if other.kind == kinds[part.name])


@pytest.mark.parametrize("family", FAMILIES)
def test_held_walks_are_those_of_hooks(family: str) -> None:
    """Every part after the site, at A's and at B's value, gives the logits that hooks give."""
    module, model = pair(family)
    site = Site("resid_pre", 1)
    parts = parts_after(model, site)
    freezer = Freezer(model, prompts(), site, points(model.d_model), parts)
    free = freezer.walk(NOTHING, 0)
    assert torch.allclose(free, by_hooks(module, model, 1, (), 0), atol=2e-4)
    for part in parts:
        for end in (0, 1):
            found = freezer.walk(part, end)
            expected = by_hooks(module, model, 1, members(part, parts), end)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=part.name)
            # Nothing is held at its own end; elsewhere it matters.
            assert torch.allclose(found[:, -end], free[:, -end], atol=2e-4)
            assert (found - free).abs().max() > 1e-3, part.name


def test_parts_after_a_site() -> None:
    """Parts are those that run after the site, in order, and sums of more than one of a kind."""
    model = pair("gpt2")[1]
    assert [part.name for part in parts_after(model, Site("resid_mid", 1))] == [
        "m1.norm", "m1", "a2.norm", "a2.h0", "a2.h1", "a2", "m2.norm", "m2", "logits.norm",
        "all MLPs", "all norms",
    ]  # fmt: skip
    same = [parts_after(model, Site(*site)) for site in (("resid_post", 1), ("resid_pre", 2))]
    assert same[0] == same[1]
    assert [part.name for part in parts_after(model, Site("resid_post", 2), ["ln"])] == [
        "logits.norm"
    ]
    heads = parts_after(model, Site("resid_pre", 2), ["heads"])
    assert [(part.kind, part.layer, part.head) for part in heads] == [
        ("head", 2, 0), ("head", 2, 1),
    ]  # fmt: skip


def test_last_stream_has_its_norm_alone() -> None:
    """A walk of the last stream: with the final norm held, logits are linear in the points."""
    _, model = pair("gpt2")
    site = Site("resid_post", 2)
    parts = parts_after(model, site)
    way = torch.lerp(*torch.randn(2, 2, 1, 16), torch.linspace(0, 1, 5)[None, :, None])
    held = Freezer(model, prompts(), site, way, parts).walk(parts[0], 0)
    middle = (held[:, 0] + held[:, -1]) / 2
    assert torch.allclose(held[:, 2], middle, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "kinds", "words"),
    [
        (Site("resid_pre", 0), ["attn", "gates"], "'gates' is no part"),
        (Site("resid_post", 2), ["attn", "mlp"], "runs after site resid_post.2"),
        (Site("z", 1), ["mlp"], "not of z.1"),
    ],
)
def test_what_cannot_be_held_is_refused(site: Site, kinds: list[str], words: str) -> None:
    """Unknown kinds, sites after which nothing runs, and sites that are no stream are errors."""
    with pytest.raises(OptionError, match=words):
        parts_after(pair("gpt2")[1], site, kinds)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_norm_that_is_not_known_is_refused(family: str) -> None:
    """Where an MLP's own scale or its maps are not known, its norm cannot be held."""
    module: Any = gpt2(1) if family == "gpt2" else random_module("neox", 1)
    if family == "gpt2":
        module.transformer.h[0].ln_1 = nn.Identity()
    model = traced(module) if family == "gpt2" else silent(module)
    site = Site("resid_pre", 0)
    parts = {part.name: part for part in parts_after(model, site, ["ln"])}
    freezer = Freezer(model, prompts(), site, points(16), list(parts.values()))
    with pytest.raises(ModelError, match=r"MLP of layer 0|the MLP's hidden layer"):
        freezer.walk(parts["m0.norm"], 0)
    assert torch.isfinite(freezer.walk(parts["a0.norm"], 0)).all()
