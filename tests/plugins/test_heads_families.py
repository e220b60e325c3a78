"""Analyses of heads on every family: against dense matrices and hooks on plain models."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from circuitlab_attention_heads import (
    attention_heads,
    attention_scores,
    head_circuits,
    norm_growth,
)
from circuitlab_attention_heads.composition import compositions
from circuitlab_attention_heads.copying import copied_share, copying
from circuitlab_attention_heads.growth import weight_norms
from circuitlab_attention_heads.sequences import (
    find_lengths,
    find_vocabulary,
    repeated_sequences,
)
from circuitlab_attention_heads.suppression import find_predictions, measure
from composition_oracles import dense_scores
from dense_heads import Dense, divisor, gain_of
from families import ALL_FAMILIES, family_model, random_module, traced, unchecked
from folded_oracles import POST_NORMS, watching
from random_tasks import random_task
from torch import Tensor

from circuitlab import ModelError, Site

HEADS = list(product(range(2), range(4)))
TASK = random_task([6, 5])
#: What stands in a part of a family that others do not have.
NEW = ("qwen3", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "mistral")

families = pytest.mark.parametrize("family", ALL_FAMILIES)


@families
def test_compositions_are_those_of_dense_products(family: str) -> None:
    """All ports, gains of norms behind folded in, keys four positions before their queries."""
    module = random_module(family)
    dense = [Dense(module, head) for head in HEADS]
    products = [head.qk(4) for head in dense]
    heads = {"ov": [head.ov for head in dense], "q": products, "k": [qk.T for qk in products]}
    found, expected = compositions(unchecked(module), offset=4), dense_scores(heads, 4)
    for port in "qkv":
        assert torch.allclose(found.raw[port], expected[port], rtol=1e-4, equal_nan=True)


@families
def test_copying_is_that_of_the_full_circuit(family: str) -> None:
    """Eigenvalues of W_E W_OV W_U, and how often a token raises its own logit most."""
    module = random_module(family)
    model = unchecked(module)
    scores, shares = copying(model).scores, copied_share(model, HEADS, top=1, n_tokens=40)
    for row, head in enumerate(HEADS):
        dense = Dense(module, head)
        circuit = dense.tokens @ dense.ov @ dense.unembedding
        values = torch.linalg.eigvals(circuit)
        expected = float(values.sum().real / values.abs().sum())
        assert float(scores[head]) == pytest.approx(expected, abs=1e-4)
        first = circuit.argmax(1) == torch.arange(40)
        assert float(shares[row]) == pytest.approx(float(first.double().mean()), abs=1e-12)


@families
def test_norms_of_weights_are_those_of_dense_matrices(family: str) -> None:
    """Of W_Q, W_K, W_O, W_OV, and of the MLP's output with the gain of a norm behind it."""
    module: Any = random_module(family)
    found = weight_norms(unchecked(module))
    for layer, number in HEADS:
        dense = Dense(module, (layer, number))
        matrices = {"q": dense.weight("q"), "k": dense.weight("k"), "o": dense.o, "ov": dense.ov}
        for name, matrix in matrices.items():
            expected = float(matrix.norm())
            assert float(found[name][layer, number]) == pytest.approx(expected, rel=1e-5)
    assert ("out" in found) == (family != "mixtral")
    if family in POST_NORMS:
        for layer, block in enumerate(module.model.layers):
            gain = gain_of(block.post_feedforward_layernorm)
            expected = float((block.mlp.down_proj.weight.detach().double() * gain[:, None]).norm())
            assert float(found["out"][layer]) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", *POST_NORMS])
def test_direct_effects_are_those_of_what_heads_write(family: str) -> None:
    """A head's share of the normed sum over the final scale, on the predicted token's logit."""
    module: Any = random_module(family)
    model = traced(module)
    vocabulary = find_vocabulary(model)
    lengths = find_lengths(model, vocabulary, 4)
    assert lengths is not None
    repeats = repeated_sequences(model, vocabulary, lengths, n=16, seed=0)
    reader, predictions = find_predictions(model, repeats, [slice(0, 16)])
    kinds = product(("pattern", "z"), (0, 1))
    sites = [Site("resid_post", 1), *(Site(kind, layer) for kind, layer in kinds)]
    run = model.run(repeats.tokens, read=sites, logits="none")
    for layer in (0, 1):
        found = measure(model, run, repeats, reader, predictions, slice(0, 16), layer)
        places = predictions.places[layer].tolist()
        offsets = [q - place for row in places for q, place in enumerate(row) if place >= 0]
        for row, ids in enumerate(repeats.tokens.ids):
            start = len(ids) - int(repeats.tokens.mask[row].sum())
            writes, unembedding = written(module, ids[start:], layer)
            effects = []
            for query, place in enumerate(places[row]):
                # The control is what a query gives to places at other queries' offsets.
                others = [o for o in offsets if o != query - place and query - start - o > 0]
                if place >= 0 and others:
                    effects.append(writes[:, query - start] @ unembedding[:, ids[place]])
            mean = torch.stack(effects).mean(0) if effects else torch.full((4,), torch.nan)
            assert found.effect[row].tolist() == pytest.approx(mean.tolist(), abs=1e-4, nan_ok=True)
        assert int(found.effect.isfinite().sum()) > 8


def written(module: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What heads add to the stream over the final scale, ``[head, pos, d_model]``; and W_U."""
    dense = [Dense(module, (layer, head)) for head in range(4)]
    with watching(module) as kept:
        module(ids[None])
    z = kept[f"model.layers.{layer}.self_attn.o_proj"][0][0].double().unflatten(-1, (4, -1))
    parts = torch.stack([z[:, head] @ dense[head].o for head in range(4)])
    if dense[0].behind is not None:
        given = kept[f"model.layers.{layer}.post_attention_layernorm"][0][0].double()
        parts = parts / divisor(dense[0].behind, given)
    return parts / divisor(dense[0].final, kept["model.norm"][0][0].double()), dense[0].unembedding


@families
def test_edges_into_heads_sum_to_their_margins(family: str) -> None:
    """Into q, and into k: with the biases and the remainder they are the margin."""
    circuit = attention_scores(family_model(family), TASK, top="all")
    heads = [name for name in circuit.nodes if name.startswith("a1")]
    assert len(heads) == 4
    for name, port in product(heads, "qk"):
        data = circuit.nodes[name]
        edges = [
            d["score"]
            for s, t, p, d in circuit.edges(keys=True, data=True)
            if (t, p) == (name, port)
        ]
        total = sum(edges) + data["bias"][port] + data["remainder"]
        assert total == pytest.approx(data["margin"], abs=1e-4)


def test_a_window_of_one_position_is_refused() -> None:
    """Such a head sees itself alone: there is no second key, and no margin."""
    model = traced(random_module("mistral", sliding_window=1))
    with pytest.raises(ModelError, match="see one position alone"):
        attention_scores(model, TASK)


@pytest.mark.parametrize("family", NEW)
def test_analyses_run_and_say_what_they_leave_out(family: str) -> None:
    """Composition, one head's circuits and norms; captions name norms and caps that come after."""
    model = family_model(family)
    assert attention_heads(model, TASK, top=4, roles=False).number_of_edges() == 4
    assert norm_growth(model, TASK).graph["growth"]["stream"]["means"]
    circuit = head_circuits(model, TASK, head="a1.h2", through="a0.h1")
    captions = " ".join(plot.get("caption", "") for plot in circuit.graph["plots"])
    assert ("Before the norm of queries and keys" in captions) == (
        family in ("qwen3", "gemma3", "olmo2")
    )
    assert ("what attention writes." in captions) == (family in POST_NORMS)
    assert ("cap of scores and of logits." in captions) == (family == "gemma2")
    assert ("cap of logits." in captions) == (family == "gemma3")
