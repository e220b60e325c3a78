"""Gradients at what receivers read, on every family, against autograd through the stock model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, random_module, unchecked
from family_oracles import receiver_gradients
from torch import Tensor, nn

from circuitlab import ModelError, Run, Site, Tokens, TracedModel

#: Two float32 computations of one gradient, relative to the largest.
FLOAT32 = 2e-5
PROMPTS = [(3, 1, 4, 1, 5, 9), (2, 6, 5), (3, 5, 8, 9, 7)]


def metric(logits: Tensor) -> Tensor:
    return (logits[:, 3] - logits[:, 5]) * logits[:, 7].tanh()


def differentiated(model: TracedModel, tokens: Tokens, **how: Any) -> Run:
    return model.run(tokens, gradient_of=metric, gradient_at=model.receiver_sites, **how)


def gaps(model: TracedModel, module: nn.Module) -> dict[str, float]:
    """Largest difference at each receiver, relative to the largest gradient of its port or kind."""
    tokens = model.tokens(PROMPTS)
    found = torch.cat([g for _, g in model.receiver_gradients(differentiated(model, tokens))])
    expected = receiver_gradients(module, tokens.ids, tokens.mask.long(), metric)
    assert list(expected) == [tuple(receiver) for receiver in model.wiring.receivers]
    largest: dict[tuple[str, str], float] = {}
    for (target, port), value in expected.items():
        key = (target.partition(".")[0], port)
        largest[key] = max(largest.get(key, 0.0), float(value.abs().max()))
    assert min(largest.values()) > 1e-3
    return {
        f"{target}:{port}": float((own - value).abs().max())
        / largest[target.partition(".")[0], port]
        for ((target, port), value), own in zip(expected.items(), found, strict=True)
    }


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradients_are_autograds(family: str) -> None:
    """Each head's own, also where keys, values or a norm are shared, and with padding."""
    module = random_module(family).requires_grad_(False)
    found = gaps(unchecked(module), module)
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize("port", ["q", "k"])
def test_a_layer_norm_of_all_heads(port: str) -> None:
    """Queries or keys of all heads normed together by a LayerNorm, which takes off their mean."""
    module: Any = random_module("olmo2").requires_grad_(False)
    for layer in module.model.layers:
        attention = layer.self_attn
        width = getattr(attention, f"{port}_norm").weight.numel()
        norm = nn.LayerNorm(width).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            nn.init.normal_(norm.weight, 1.0, 0.5)
            nn.init.normal_(norm.bias)
        setattr(attention, f"{port}_norm", norm)
    found = gaps(unchecked(module), module)
    assert max(found.values()) < FLOAT32, found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attention_is_the_models(family: str) -> None:
    """z from queries, keys and values, with windows, caps, norms, rotations and padding."""
    model = unchecked(random_module(family))
    tokens = model.tokens(PROMPTS)
    sites = [Site(kind, layer) for layer in range(2) for kind in ("q", "k", "v", "z")]
    run = model.run(tokens, read=sites, logits="none")
    for layer in range(2):
        values = {port: run[Site(port, layer)] for port in "qkv"}
        normed = [model.attention.normed(layer, port, value) for port, value in values.items()]
        z, real = model.attention.z(layer, tokens, *normed), run[Site("z", layer)]
        gap = (z - real)[tokens.mask].abs().max()
        assert float(gap) < 1e-5 * float(real.abs().max())


def test_several_runs_are_averaged() -> None:
    """Runs at several inputs give the mean of what each gives."""
    model = unchecked(random_module("olmo2"))
    tokens, start = model.tokens(PROMPTS), Site("resid_pre", 0)
    clean = model.run(tokens, read=[start])
    runs = [
        differentiated(model, tokens, write={start: share * clean[start]})
        for share in (1.0, 0.5, 0.2)
    ]
    together = model.receiver_gradients(*runs)
    for found, *each in zip(together, *map(model.receiver_gradients, runs), strict=True):
        expected = torch.stack([own for _, own in each]).mean(0)
        assert float((found[1] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_receivers_of_one_stream_sum_to_its_gradient() -> None:
    """Heads that share a key are charged with what reaches it, and together with all of it."""
    for family in ("llama-wide", "gemma2", "qwen3", "olmo2"):
        model = unchecked(random_module(family))
        start = Site("resid_pre", 0)
        run = model.run(
            model.tokens(PROMPTS), gradient_of=metric, gradient_at=[start, *model.receiver_sites]
        )
        total = torch.cat([g for _, g in model.receiver_gradients(run)]).sum(0)
        gap = (total - run.gradient(start)).abs().max()
        assert float(gap) < 1e-5 * float(total.abs().max())


def test_half_precision_is_scored_in_float32() -> None:
    """Gradients of a bfloat16 model are near those of the same weights in float32."""
    half = unchecked(random_module("qwen3", dtype=torch.bfloat16))
    whole = unchecked(random_module("qwen3", dtype=torch.bfloat16).float())
    found, expected = (
        torch.cat([g for _, g in m.receiver_gradients(differentiated(m, m.tokens(PROMPTS)))])
        for m in (half, whole)
    )
    assert found.dtype == expected.dtype == torch.float32
    alike = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert float(alike) > 0.98


@pytest.mark.parametrize(
    "wrong", [{"score_scales": (1.0, 1.0)}, {"rotary": ""}, {"sliding_windows": (2, 2)}]
)
def test_a_wrong_description_is_refused(wrong: dict[str, Any]) -> None:
    """Gradients of shared keys rest on the description, so it is held against the run's own z."""
    model = unchecked(random_module("llama"))
    other = replace(model.architecture, **wrong)
    bad = TracedModel(random_module("llama"), None, other, name="toy")
    run = differentiated(bad, bad.tokens(PROMPTS))
    with pytest.raises(ModelError, match=r"layer 0 attends otherwise than .* Llama says: off by"):
        list(bad.receiver_gradients(run))


def test_only_heads_that_share_are_differentiated_at_z() -> None:
    """Models whose heads have keys of their own take their gradients where they always did."""
    plain, shared = (unchecked(random_module(family)) for family in ("neox", "llama"))
    assert {site.kind for site in plain.receiver_sites} == {"q", "k", "v", "mlp_in", "resid_post"}
    assert {site.kind for site in shared.receiver_sites} - {
        s.kind for s in plain.receiver_sites
    } == {"z"}
