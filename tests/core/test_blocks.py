"""Models that no plugin describes: their stream between blocks, against plain hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from families import plain
from random_tasks import random_task
from torch import Tensor, nn

from circuitlab import ModelError, OptionError, Site, Tokens, TracedModel, build_circuit, load_model
from circuitlab.blocks import blocks_only
from circuitlab.checks import probe, require, run_checks
from circuitlab.remote.skeleton import make_skeleton

CLOSE = {"rtol": 2e-4, "atol": 2e-5}
#: Blocks that give a tensor (OPT), or a tuple (GPT-J, BLOOM); BLOOM takes no positions; OPT's
#: embedding is narrower than its stream; Cohere scales its logits; Mamba has no attention.
NAMES = ("opt", "bloom", "gptj", "cohere", "mamba")


@cache
def plain_module(name: str) -> Any:
    import transformers as t

    size: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    wide = size | {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    short = wide | {"max_position_embeddings": 32, "pad_token_id": 0}
    configs: dict[str, Callable[[], Any]] = {
        "opt": lambda: t.OPTConfig(**short, ffn_dim=24, word_embed_proj_dim=8),
        "bloom": lambda: t.BloomConfig(**size, hidden_size=16, n_layer=3, n_head=4),
        "gptj": lambda: t.GPTJConfig(
            **size, n_embd=16, n_layer=3, n_head=4, n_positions=32, rotary_dim=4
        ),
        "cohere": lambda: t.CohereConfig(**short, intermediate_size=24),
        "mamba": lambda: t.MambaConfig(**size, hidden_size=16, num_hidden_layers=3),
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        module = t.AutoModelForCausalLM.from_config(configs[name]()).eval()
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@cache
def traced(name: str) -> tuple[TracedModel, Tokens]:
    model = load_model((plain_module(name), None))
    return model, model.tokens([(3, 1, 4, 1, 5), (2, 6, 5), (3, 5, 8, 9)])


def blocks_of(module: Any) -> list[nn.Module]:
    """Where each of these families keeps its blocks."""
    kind = module.config.model_type
    if kind == "opt":
        return list(module.model.decoder.layers)
    if kind == "mamba":
        return list(module.backbone.layers)
    return list(module.model.layers if kind == "cohere" else module.transformer.h)


@contextmanager
def hook(block: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Hands what a block gives to ``change`` and puts what it returns there."""

    def after(_: Any, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        new = change(whole)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_read_and_written(name: str) -> None:
    """resid_post of each block is what a hook sees, and a value written goes on from there."""
    (model, tokens), module = traced(name), plain_module(name)
    sites = [Site("resid_post", n) for n in range(3)]
    run = model.run(tokens, read=[*sites, Site("resid_pre", 1)], logits="all")
    assert torch.equal(run.logits, plain(module, tokens))
    assert torch.equal(run[Site("resid_pre", 1)], run[sites[0]])
    value = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    for site, block in zip(sites, blocks_of(module), strict=True):
        seen: list[Tensor] = []
        with hook(block, lambda whole, seen=seen: seen.append(whole.clone())):
            plain(module, tokens)
        assert torch.equal(run[site], seen[0])
        with hook(block, lambda whole: value):
            expected = plain(module, tokens)
        whole = model.run(tokens, write={site: value}, logits="all").logits
        torch.testing.assert_close(whole[tokens.mask], expected[tokens.mask], **CLOSE)
        short = model.run(tokens, write={site: value}, vocabulary=torch.tensor([3, 9])).logits
        torch.testing.assert_close(short, expected[:, -1:, [3, 9]], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_stream(name: str) -> None:
    """A gradient at resid_post is autograd's."""
    (model, tokens), module = traced(name), plain_module(name)

    def difference(logits: Tensor) -> Tensor:
        return logits[:, 3] - logits[:, 5]

    kept: list[Tensor] = []

    def keep(whole: Tensor) -> Tensor:
        kept.append(whole.detach().requires_grad_(True))
        return kept[0]

    with hook(blocks_of(module)[0], keep):
        logits = module(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            position_ids=tokens.position_ids,
            use_cache=False,
        ).logits
    (expected,) = torch.autograd.grad(difference(logits[:, -1]).sum(), kept)
    site = Site("resid_post", 0)
    run = model.run(tokens, gradient_of=difference, gradient_at=[site])
    torch.testing.assert_close(run.gradient(site), expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_patched_exactly(name: str) -> None:
    """Scores of whole blocks and of streams are those of hooks that put the other run's values."""
    module = plain_module(name)
    model, _ = traced(name)
    task = random_task([5, 5, 5])
    pairs = model.encode(task)
    other: dict[int, Tensor] = {}
    given: dict[int, Tensor] = {}
    blocks = blocks_of(module)
    for tokens, kept in ((pairs.clean, given), (pairs.corrupt, other)):
        run = model.run(tokens, read=[Site("resid_pre", 0)])
        kept[-1] = run[Site("resid_pre", 0)]
        for n, block in enumerate(blocks):
            with hook(block, lambda whole, kept=kept, n=n: kept.update({n: whole.clone()})):
                plain(module, tokens)
    clean = plain(module, pairs.clean)

    def effect(n: int, change: Tensor) -> float:
        with hook(blocks[n], lambda whole: whole + change):
            logits = plain(module, pairs.clean)
        scores = pairs.score(logits[:, -1], clean[:, -1]) - pairs.score(clean[:, -1], clean[:, -1])
        return float(scores.mean())

    options = {"top": "all", "mode": "noise", "allow_weak": True}
    found = build_circuit(model, task, "path-patching", scope="nodes", **options)
    for n in range(3):
        written = (other[n] - other[n - 1]) - (given[n] - given[n - 1])
        score = found.edges[f"block{n}", "logits", ""]["score"]
        assert score == pytest.approx(effect(n, written), rel=1e-3, abs=1e-4)
    found = build_circuit(model, task, "path-patching", scope="residual", **options)
    for position in range(5):
        change = torch.zeros_like(given[0])
        change[:, position] = (other[0] - given[0])[:, position]
        score = found.edges[f"resid_pre.1[{position}]", "logits", ""]["score"]
        assert score == pytest.approx(effect(0, change), rel=1e-3, abs=1e-4)


def test_what_is_inside_a_block_is_refused() -> None:
    """Sites, weights, wiring and components of a block are refused by name, with the remedy."""
    model, tokens = traced("opt")
    asked: list[Callable[[], Any]] = [
        lambda: model.run(tokens, read=[Site("z", 0)]),
        lambda: model.run(tokens, write={Site("mlp_out", 0): torch.zeros(())}),
        lambda: model.run(tokens, read=[Site("resid_mid", 0)]),
        lambda: model.wiring,
        lambda: model.weights.unembedding(),
        lambda: model.weights.positions(),
        lambda: model.weights.rotations(torch.arange(3)),
        lambda: model.weights.norm_scale(None, torch.ones(16)),
        lambda: model.weights.centres,
    ]
    for ask in asked:
        with pytest.raises(ModelError, match=r"'opt': only the stream .* adapt_architecture"):
            ask()
    assert "blocks alone" in repr(model)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_found_without_weights(name: str) -> None:
    """A module on torch's meta device, as for a model on a host, is described as the real one."""
    module = plain_module(name)
    skeleton = make_skeleton(copy.deepcopy(module.config))
    assert next(skeleton.parameters()).is_meta
    assert blocks_only(skeleton) == blocks_only(module)


def test_walks_hold_nothing_of_blocks() -> None:
    """activation-plateaus walks the stream between blocks, and refuses to hold what is in them."""
    model, _ = traced("opt")
    task, options = random_task([5, 5, 5]), {"pairs": "task", "steps": 3, "controls": 0}
    with pytest.raises(OptionError, match="known; give --freeze none"):
        build_circuit(model, task, "activation-plateaus", allow_weak=True, **options)
    found = build_circuit(
        model, task, "activation-plateaus", allow_weak=True, freeze="none", **options
    )
    assert list(found.nodes) == ["logits"]
    read = [each["site"] for each in found.graph["layers"]["sites"]]
    assert read == ["walked", "resid_post.1", "resid_post.2", "logits"]


def test_blocks_that_are_not_what_they_seem_are_refused() -> None:
    """A list whose modules do not hand a stream on, or a model that padding changes."""
    import transformers as t

    config = t.XLMConfig(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2, causal=True, pad_index=0)
    with pytest.raises(ModelError, match="a list of 2 blocks was looked for"):
        blocks_only(t.AutoModelForCausalLM.from_config(config))
    module: Any = plain_module.__wrapped__("opt")  # one that nobody else uses
    forward = module.model.decoder.forward
    module.model.decoder.forward = lambda **given: forward(**{**given, "attention_mask": None})
    model = TracedModel(module, None, blocks_only(module), name="toy")
    with pytest.raises(ModelError, match="padding changes nothing: off by"):
        require(model, run_checks(model, probe(module)))
