"""Weights with norms folded in give what a plain model computes: heads, patterns, logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import oracles
import pytest
import torch
from families import FAMILIES, family_model, random_module, traced, unchecked
from random_tasks import random_task
from torch import Tensor, nn

from circuitlab import (
    Edge,
    ModelError,
    QualityError,
    Site,
    SiteError,
    TracedModel,
    build_circuit,
    edge_effects,
    zoo,
)
from circuitlab.checks import probe, require, run_checks

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
#: float64 sums of some dozen terms; and models whose norm works in float32 whatever their type.
EXACT, NORM32 = 1e-10, 1e-5
#: Softmax in float32, behind queries and keys that are as exact as their norm.
PATTERNS = {EXACT: 1e-6, NORM32: 1e-4}


def scaled_gpt2(**flags: bool) -> nn.Module:
    """A random GPT-2 that scales its scores in another way."""
    from transformers import GPT2LMHeadModel

    module: Any = oracles.random_gpt2(n_layers=3)
    config = module.config
    for flag, value in flags.items():
        setattr(config, flag, value)
    other = GPT2LMHeadModel(config).double().eval()
    other.load_state_dict(module.state_dict())
    return other


MODULES = {
    "gpt2": oracles.random_gpt2,
    "gpt2-no-norms": lambda: oracles.random_gpt2(layer_norm=False),
    "gpt2-by-layer": lambda: scaled_gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled": lambda: scaled_gpt2(scale_attn_weights=False),
    "hand-induction": lambda: zoo.load("hand-induction")[0].double(),
    **{name: lambda name=name: random_module(name, dtype=torch.float64) for name in FAMILIES},
}


@dataclass(frozen=True)
class Seen:
    """What a plain Hugging Face model computed, seen by hooks and its own outputs."""

    streams: list[Tensor]
    last_stream: Tensor
    heads: list[dict[str, Tensor]]
    patterns: list[Tensor]
    written: list[Tensor]
    logits: Tensor


@contextmanager
def watching(module: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of every submodule that takes and gives a tensor."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                kept[name] = given[0], output

        return keep

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    yield kept
    for handle in handles:
        handle.remove()


@cache
@torch.no_grad()
def case(name: str) -> tuple[TracedModel, Seen]:
    module: Any = MODULES[name]()
    with watching(module) as kept:
        done = module(IDS, output_attentions=True, output_hidden_states=True)
    n_layers = module.config.num_hidden_layers
    parts = "layers" if name in FAMILIES else "h"
    body = {"llama": "model", "llama-wide": "model", "qwen2": "model"}.get(name)
    body = body or ("gpt_neox" if name in FAMILIES else "transformer")
    output = {"gpt_neox": "attention.dense", "model": "self_attn.o_proj"}.get(body, "attn.c_proj")
    final = {"gpt_neox": "final_layer_norm", "model": "norm"}.get(body, "ln_f")
    blocks = [f"{body}.{parts}.{layer}." for layer in range(n_layers)]
    seen = Seen(
        streams=[*done.hidden_states[:-1]],
        last_stream=kept[f"{body}.{final}"][0],
        heads=[heads(module, kept, block) for block in blocks],
        patterns=[*done.attentions],
        written=[kept[block + output][1] for block in blocks],
        logits=done.logits,
    )
    return unchecked(module), seen


def heads(module: Any, kept: dict[str, tuple[Tensor, Tensor]], block: str) -> dict[str, Tensor]:
    """q, k and v of every head, ``[batch, pos, n_heads, d_head]``, as the families store them."""
    n_heads = module.config.num_attention_heads
    if block.startswith("transformer"):
        fused = kept[block + "attn.c_attn"][1].unflatten(-1, (3, n_heads, -1))
        return dict(zip("qkv", fused.unbind(2), strict=True))
    if block.startswith("gpt_neox"):
        fused = kept[block + "attention.query_key_value"][1].unflatten(-1, (n_heads, 3, -1))
        return dict(zip("qkv", fused.unbind(3), strict=True))
    n_kv = module.config.num_key_value_heads
    found = {}
    for port, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
        own = kept[f"{block}self_attn.{port}_proj"][1].unflatten(-1, (n, -1))
        found[port] = torch.stack([own[:, :, h // (n_heads // n)] for h in range(n_heads)], 2)
    return found


def tolerance(name: str) -> float:
    return NORM32 if name in ("llama", "llama-wide", "qwen2") else EXACT


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def read(model: TracedModel, layer: int, stream: Tensor) -> dict[str, Tensor]:
    """q, k and v by the folded weights, ``[batch, pos, n_heads, d_head]``."""
    folded = model.weights.folded(layer, torch.float64)
    plain = stream / model.weights.norm_scale(layer, stream)
    ports = (
        ("q", folded.q, folded.q_bias),
        ("k", folded.k, folded.k_bias),
        ("v", folded.v, folded.v_bias),
    )
    return {p: torch.einsum("bpd,hde->bphe", plain, w) + bias for p, w, bias in ports}


@pytest.mark.parametrize("name", MODULES)
def test_folded_heads_are_what_the_model_computes(name: str) -> None:
    """Queries, keys and values of every head; grouped ones belong to head h // group."""
    model, seen = case(name)
    for layer, stream in enumerate(seen.streams):
        found = read(model, layer, stream)
        for port in "qkv":
            assert apart(found[port], seen.heads[layer][port]) < tolerance(name)


@pytest.mark.parametrize("name", MODULES)
def test_scores_through_the_softmax_are_the_pattern(name: str) -> None:
    """Scaled, turned by their positions and masked, queries times keys give the attention."""
    model, seen = case(name)
    n_positions = IDS.shape[1]
    future = torch.ones(n_positions, n_positions, dtype=torch.bool).triu(1)
    turn = model.weights.rotations(torch.arange(n_positions), torch.float64)
    assert (turn is None) == (name not in FAMILIES)
    for layer, stream in enumerate(seen.streams):
        found = read(model, layer, stream)
        q, k = found["q"], found["k"]
        if turn is not None:
            q, k = (torch.einsum("bphe,pef->bphf", part, turn) for part in (q, k))
        table = torch.einsum("bihe,bjhe->bhij", q, k)
        table = model.weights.folded(layer, torch.float64).scale * table
        pattern = table.masked_fill(future, -torch.inf).softmax(-1)
        assert apart(pattern, seen.patterns[layer].double()) < PATTERNS[tolerance(name)]


@pytest.mark.parametrize("name", MODULES)
def test_folded_outputs_are_what_attention_writes(name: str) -> None:
    """Pattern times values times output, and the bias; less the mean where no reader sees it."""
    model, seen = case(name)
    for layer, written in enumerate(seen.written):
        folded = model.weights.folded(layer, torch.float64)
        values = seen.heads[layer]["v"]
        z = torch.einsum("bhij,bjhe->bihe", seen.patterns[layer].double(), values)
        found = torch.einsum("bihe,hed->bid", z, folded.o)
        expected = written - model.weights.attention_bias(layer)
        if name in ("gpt2", "gpt2-by-layer", "gpt2-unscaled", "neox", "neox-sequential"):
            expected = expected - expected.mean(-1, keepdim=True)
        assert apart(found, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-norms", "llama", "qwen2", "gemma"])
def test_folded_mlps_are_what_the_model_computes(name: str) -> None:
    """A stream over its norm's scale, through both maps, the gate and the nonlinearity."""
    made = MODULES.get(name, lambda: random_module(name, dtype=torch.float64))
    module: Any = made()
    model = unchecked(module)
    a = model.architecture
    with watching(module) as kept:
        module(IDS)
    for layer in range(a.n_layers):
        weights = model.weights.mlp(layer, torch.float64)
        assert (weights.gate is None) == name.startswith("gpt2")
        stream = kept[a.block(layer, a.mlp_norm)][0]
        found = weights(stream / model.weights.norm_scale(layer, stream))
        limit = EXACT if name.startswith("gpt2") else NORM32
        assert apart(found, kept[a.block(layer, a.mlp)][1]) < limit


def test_unnamed_mlps_are_refused() -> None:
    """Where the family does not say what the hidden layer is, the message names what to set."""
    with pytest.raises(SiteError, match=r"mlp_input_projection.*mlp_gate_projection"):
        family_model("neox").weights.mlp(0)


@pytest.mark.parametrize("name", MODULES)
def test_unembedding_gives_the_logits(name: str) -> None:
    """The last stream over its norm's scale, times the folded unembedding, and its bias."""
    model, seen = case(name)
    weight, bias = model.weights.unembedding(torch.float64)
    scale = model.weights.norm_scale(None, seen.last_stream)
    found = seen.last_stream / scale @ weight + bias
    assert apart(found, seen.logits) < tolerance(name)


@pytest.mark.parametrize("name", MODULES)
def test_embeddings_are_the_first_stream(name: str) -> None:
    """Tokens and, where there are any, learned positions."""
    model, seen = case(name)
    found, positions = model.weights.embedding(torch.float64)[IDS], model.weights.positions()
    assert (positions is None) == (name in FAMILIES)
    if positions is not None:
        wide = model.weights.positions(torch.float64)
        assert wide is not None
        found = found + wide[: IDS.shape[1]]
    assert apart(found, seen.streams[0]) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_rotations_depend_on_the_distance_alone(name: str) -> None:
    """R_i R_j^T is the same for all i - j; some columns of a partial rotation stand still."""
    model, _ = case(name)
    turn = model.weights.rotations(torch.tensor([2, 5, 9, 12]), torch.float64)
    assert turn is not None
    near, far = (turn[i + 1] @ turn[i].T for i in (0, 2))
    assert apart(near, far) < 1e-5  # cosines of float32
    assert apart(turn @ turn.mT, torch.eye(model.d_head).double().expand(4, -1, -1)) < 1e-6
    still = model.d_head - 2 if name.startswith("neox") else 0
    assert torch.equal(
        near[model.d_head - still :, model.d_head - still :], torch.eye(still).double()
    )
    assert float((near - torch.eye(model.d_head)).abs().max()) > 0.1


def test_scores_are_scaled_as_the_family_says() -> None:
    """GPT-2 may divide by the layer's number, or not divide at all."""
    plain, by_layer, unscaled = (
        unchecked(module).architecture
        for module in (
            oracles.random_gpt2(n_layers=3),
            MODULES["gpt2-by-layer"](),
            MODULES["gpt2-unscaled"](),
        )
    )
    layers = range(3)
    assert [plain.score_scale(n) for n in layers] == [8**-0.5] * 3
    assert [by_layer.score_scale(n) for n in layers] == [8**-0.5 / (n + 1) for n in layers]
    assert [unscaled.score_scale(n) for n in layers] == [1.0] * 3


# --- families as loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_pass_the_self_check(name: str) -> None:
    """Shared keys and values, rotary positions and parallel blocks are loaded like any model."""
    model = family_model(name)
    run = model.run([(3, 1, 4), (2, 6)], read=[Site(port, 0) for port in "qkv"])
    n_kv = {"llama": 2, "qwen2": 2, "llama-wide": 1}.get(name, 4)
    assert [run[Site(port, 0)].shape[2] for port in "qkv"] == [4, n_kv, n_kv]


@pytest.mark.parametrize("n_kv_heads", [0, 1, 4])
def test_wrong_groups_do_not_pass(n_kv_heads: int) -> None:
    """A model that shares 2 keys and values, and is said to share another number, is refused."""
    module = random_module("llama")
    plain, model = probe(module), unchecked(module)
    architecture = replace(model.architecture, n_kv_heads=n_kv_heads)
    wrong = TracedModel(module, None, architecture, name="toy")
    with pytest.raises(QualityError, match=r"carry nothing but their values|cannot be traced as"):
        require(wrong, run_checks(wrong, plain))


def test_gradients_of_shared_keys_are_refused() -> None:
    """Heads of a group have one key: a gradient there is no single head's, and none is made up."""
    with pytest.raises(ModelError, match=r"share 2 key and value heads.*path-patching"):
        build_circuit(family_model("llama"), random_task([5, 4]), allow_weak=True)


@torch.no_grad()
def test_edges_into_shared_keys_are_the_heads_own() -> None:
    """The key of one head is patched: the other head of its group keeps the clean one."""
    module: Any = random_module("llama")
    model, task = traced(module), random_task([6, 6])
    pairs = model.encode(task)
    attention, edge = module.model.layers[1].self_attn, Edge("input", "a1.h2", "k")
    with watching(module) as kept:
        module(pairs.clean.ids)
        stream = kept["model.layers.1.input_layernorm"][0]
    other, clean = (module.model.embed_tokens(part.ids) for part in (pairs.corrupt, pairs.clean))
    keys = attention.k_proj(module.model.layers[1].input_layernorm(stream + other - clean))

    def patched(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        z = given[0].clone()
        hook = attention.k_proj.register_forward_hook(lambda *_: keys)
        inner = attention.o_proj.register_forward_pre_hook(lambda _, seen: alone.append(seen[0]))
        handle.remove()
        module(pairs.clean.ids)
        hook.remove()
        inner.remove()
        z[..., 8:12] = alone[0][..., 8:12]
        return (z,)

    alone: list[Tensor] = []
    handle = attention.o_proj.register_forward_pre_hook(patched)
    logits = module(pairs.clean.ids).logits[:, -1]
    base = module(pairs.clean.ids).logits[:, -1]
    expected = pairs.score(logits, base) - pairs.score(base, base)
    found = edge_effects(model, pairs, [edge])[0]
    assert float(expected.abs().max()) > 1e-3
    assert float((found - expected).abs().max()) < 1e-4
