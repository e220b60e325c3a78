"""Weights with norms folded in give what a plain model computes: heads, patterns, logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from families import ALL_FAMILIES, FAMILIES, family_model, random_module, traced, unchecked
from folded_oracles import (
    IDS,
    MODULES,
    NORM32,
    PATTERNS,
    POST_NORMS,
    apart,
    case,
    read,
    rotary,
    tolerance,
    watching,
    window,
)
from random_tasks import random_task
from torch import Tensor, nn

from circuitlab import (
    Edge,
    ModelError,
    QualityError,
    Site,
    SiteError,
    TracedModel,
    edge_effects,
)
from circuitlab.checks import probe, require, run_checks


@pytest.mark.parametrize("name", MODULES)
def test_folded_heads_are_what_the_model_computes(name: str) -> None:
    """Queries, keys and values of every head; grouped ones belong to head h // group."""
    model, seen = case(name)
    for layer in range(model.n_layers):
        found = read(model, layer, seen)
        for port in "qkv":
            assert apart(found[port], seen.heads[layer][port]) < tolerance(name)


@pytest.mark.parametrize("name", MODULES)
def test_scores_through_the_softmax_are_the_pattern(name: str) -> None:
    """Scaled, turned by their positions, capped and masked, queries times keys give it."""
    model, seen = case(name)
    places = torch.arange(IDS.shape[1])
    back = places[:, None] - places
    for layer in range(model.n_layers):
        turn = model.weights.rotations(places, torch.float64, layer)
        assert (turn is None) == (not rotary(name))
        found = read(model, layer, seen)
        q, k = found["q"], found["k"]
        if turn is not None:
            q, k = (torch.einsum("bphe,pef->bphf", part, turn) for part in (q, k))
        table = torch.einsum("bihe,bjhe->bhij", q, k)
        table = model.weights.folded(layer, torch.float64).scale * table
        if name.startswith("gemma2"):
            table = 2 * torch.tanh(table / 2)
        hidden = (back < 0) | (back >= window(name, layer))
        pattern = table.masked_fill(hidden, -torch.inf).softmax(-1)
        assert apart(pattern, seen.patterns[layer]) < PATTERNS[tolerance(name)]


@pytest.mark.parametrize("name", MODULES)
def test_folded_outputs_are_what_attention_writes(name: str) -> None:
    """Pattern times values times output, and the bias; less the mean where no reader sees it."""
    model, seen = case(name)
    for layer, written in enumerate(seen.written):
        folded = model.weights.folded(layer, torch.float64)
        values = seen.heads[layer]["v"]
        z = torch.einsum("bhij,bjhe->bihe", seen.patterns[layer], values)
        scale = model.weights.scale_behind(Site("z", layer), z)
        assert bool((scale == 1).all()) == (name not in POST_NORMS)
        found = torch.einsum("bihe,hed->bid", z, folded.o) / scale
        expected = written - model.weights.attention_bias(layer)
        if name in ("gpt2", "gpt2-by-layer", "gpt2-unscaled", "neox", "neox-sequential"):
            expected = expected - expected.mean(-1, keepdim=True)
        assert apart(found, expected) < (1e-5 if name in POST_NORMS else 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-norms", *sorted({*ALL_FAMILIES} - {"mixtral"})])
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
        assert (weights.gate is None) == name.startswith(("gpt2", "neox"))
        stream = kept[a.block(layer, "mlp" if name == "olmo2" else a.mlp_norm)][0]
        normed = stream / model.weights.norm_scale(layer, stream)
        hidden = weights.hidden(normed)
        assert apart(hidden, kept[a.block(layer, a.mlp_output_projection)][0]) < tolerance(name)
        found = weights(normed) / model.weights.scale_behind(Site("mlp_post", layer), hidden)
        last = "post_feedforward_layernorm" if name in POST_NORMS else "mlp"
        assert apart(found, kept[a.block(layer, last)][1]) < tolerance(name)


@torch.no_grad()
def test_experts_are_no_folded_mlp() -> None:
    """A router and experts are no one map and nonlinearity, and are refused by name."""
    with pytest.raises(SiteError, match="architecture of Mixtral names no output projection"):
        unchecked(random_module("mixtral")).weights.mlp(0)


def test_unnamed_mlps_are_refused() -> None:
    """Where the family does not say what the hidden layer is, the message names what to set."""
    module = random_module("neox")
    silent = replace(unchecked(module).architecture, mlp_input_projection="", mlp_activation="")
    model = TracedModel(module, None, silent, name="toy")
    with pytest.raises(SiteError, match=r"mlp_input_projection.*mlp_gate_projection"):
        model.weights.mlp(0)


@pytest.mark.parametrize("name", MODULES)
def test_unembedding_gives_the_logits(name: str) -> None:
    """The last stream over its scale, times the folded unembedding, and its bias; then the cap."""
    model, seen = case(name)
    weight, bias = model.weights.unembedding(torch.float64)
    scale = model.weights.norm_scale(None, seen.last_stream)
    found = seen.last_stream / scale @ weight + bias
    if name.startswith(("gemma2", "gemma3")):
        found = 5 * torch.tanh(found / 5)
    assert apart(found, seen.logits) < tolerance(name)


@pytest.mark.parametrize("name", MODULES)
def test_embeddings_are_the_first_stream(name: str) -> None:
    """Tokens, times what the family multiplies them by, and learned positions if there are any."""
    model, seen = case(name)
    found, positions = model.weights.embedding(torch.float64)[IDS], model.weights.positions()
    assert (positions is None) == (rotary(name))
    if positions is not None:
        wide = model.weights.positions(torch.float64)
        assert wide is not None
        found = found + wide[: IDS.shape[1]]
    assert apart(found, seen.streams[0]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_multiplied_embeddings_are_rounded_as_in_a_run(dtype: torch.dtype) -> None:
    """Gemma multiplies by sqrt(d_model), of 20 no number of bfloat16, in the model's own type."""
    module: Any = random_module("gemma", hidden_size=20, dtype=dtype)
    stream = module(IDS, output_hidden_states=True).hidden_states[0]
    found = unchecked(module).weights.embedding(torch.float64)[IDS]
    assert torch.equal(found, stream.double())
    assert not torch.equal(found, module.model.embed_tokens.weight.double()[IDS])


def test_embeddings_are_multiplied_as_the_description_says() -> None:
    """Where the model does it beside the module; the plain table is left as it is."""
    model = unchecked(random_module("llama"))
    plain = model.weights.embedding()
    architecture = replace(model.architecture, embed_scale=3.0)
    scaled = TracedModel(model._module, None, architecture, name="toy").weights.embedding()
    assert torch.equal(scaled, 3 * plain)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_rotations_depend_on_the_distance_alone(name: str) -> None:
    """R_i R_j^T is the same for all i - j; some columns of a partial rotation stand still."""
    model, _ = case(name)
    turn = model.weights.rotations(torch.tensor([2, 5, 9, 12]), torch.float64, 1)
    assert turn is not None
    near, far = (turn[i + 1] @ turn[i].T for i in (0, 2))
    assert apart(near, far) < 1e-5  # cosines of float32
    assert apart(turn @ turn.mT, torch.eye(model.d_head).double().expand(4, -1, -1)) < 1e-6
    still = model.d_head - 2 if name.startswith("neox") else 0
    assert torch.equal(
        near[model.d_head - still :, model.d_head - still :], torch.eye(still).double()
    )
    assert float((near - torch.eye(model.d_head)).abs().max()) > 0.1


def test_layers_that_turn_differently_are_named() -> None:
    """Gemma 3 turns by one base where it sees a window and by another elsewhere."""
    weights, places = case("gemma3")[0].weights, torch.arange(6)
    with pytest.raises(ModelError, match="turn queries and keys in different ways; name the layer"):
        weights.rotations(places)
    near, far = (weights.rotations(places, torch.float64, layer) for layer in (0, 1))
    assert near is not None
    assert far is not None
    for turn, base in ((near, 9.0), (far, 99.0)):
        angles = places[:, None] * base ** -torch.tensor([0.0, 0.5]).double()
        assert apart(turn.diagonal(0, 1, 2)[:, :2], angles.cos()) < 1e-6
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        weights.rotations(places, layer=2)


def test_turned_columns_may_grow() -> None:
    """YaRN multiplies cosine and sine by 0.1 ln(factor) + 1 (Peng et al. 2023, 2309.00071)."""
    turn = case("qwen3-yarn")[0].weights.rotations(torch.arange(6), torch.float64)
    assert turn is not None
    size = (0.1 * torch.tensor(4.0).log().double() + 1).square()
    assert apart(turn @ turn.mT, size * torch.eye(6).double().expand(6, -1, -1)) < 1e-6


@torch.no_grad()
def test_the_scale_behind_is_that_of_formulas() -> None:
    """The root mean square of what is projected: of each head, of all heads, of their sum."""
    values = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    weights = case("qwen3")[0].weights
    found = weights.scale_behind(Site("q", 1), values)
    expected = (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert apart(found, expected) < NORM32
    assert torch.equal(weights.scale_behind(Site("v", 1), values), torch.ones_like(found))
    assert torch.equal(weights.scale_behind(Site("z", 1), values), torch.ones(2, 5, 1).double())
    weights = case("olmo2")[0].weights
    values = values[..., :2, :4]
    expected = (values.square().mean((-1, -2), keepdim=True) + 1e-6).sqrt().expand(-1, -1, 2, -1)
    assert apart(weights.scale_behind(Site("k", 1), values), expected) < NORM32
    with pytest.raises(SiteError, match="no norm stands behind site"):
        weights.scale_behind(Site("attn_out", 1), values)


@pytest.mark.parametrize("path", ["self_attn.q_norm", "post_attention_layernorm"])
def test_a_norm_behind_that_is_no_rms_norm_is_not_folded(path: str) -> None:
    """A LayerNorm behind a projection takes off a mean of what is not yet there; refused."""
    module = random_module("olmo2", dtype=torch.float64)
    block: Any = module.get_submodule("model.layers.1")
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, nn.LayerNorm(16).double())
    with pytest.raises(ModelError, match=rf"layers\.1\.{path} of class LayerNorm stands behind"):
        unchecked(module).weights.folded(1)


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
