"""Norm growth: norms of streams, writes and weights against plain models and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import families
import numpy as np
import oracles
import pytest
import torch
from circuitlab_attention_heads.growing import norm_growth
from circuitlab_attention_heads.growth import (
    weight_norms,
)
from norm_oracles import EXACT, FAMILIES, TASK, geometric, grown, plain, plain_module, seen
from torch import nn

from circuitlab import (
    CircuitGraph,
    OptionError,
    PromptPair,
    Task,
    TaskError,
    TracedModel,
    load_model,
    zoo,
)
from circuitlab.testing import check_analysis

TASKS = {task.name: task for task in zoo.tasks()}

# --- what is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_plain_hidden_states(family: str) -> None:
    """Streams and writes of the stock model, prompt by prompt; first tokens left out."""
    module, n_layers = plain_module(family), 3
    growth = grown(module, batch_size=3).graph["growth"]
    by_prompt = [plain(module, pair.clean) for pair in TASK.pairs]
    for name, n_places in (("stream", n_layers + 1), ("attention", n_layers), ("mlp", n_layers)):
        expected = [
            geometric(
                [float(seen(row, family).norm()) for run in by_prompt for row in run[name][n][1:]]
            )
            for n in range(n_places)
        ]
        assert growth[name]["means"] == pytest.approx(expected, **FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_are_with_the_stream_that_is_added_to(family: str) -> None:
    """An MLP beside attention is added to what both read, one behind it to the sum."""
    module = plain_module(family)
    growth = grown(module).graph["growth"]
    by_prompt = [plain(module, pair.clean) for pair in TASK.pairs]
    for name in ("attention", "mlp"):
        for layer in range(3):
            cosines = []
            for run in by_prompt:
                before = run["stream"][layer]
                if name == "mlp" and family != "neox":
                    before = before + run["attention"][layer]
                for written, stream in zip(run[name][layer][1:], before[1:], strict=True):
                    a, b = seen(written, family), seen(stream, family)
                    cosines.append(float(a @ b / a.norm() / b.norm()))
            expected = math.fsum(cosines) / len(cosines)
            found = growth[name]["cosines"][layer]
            assert found == pytest.approx(expected, abs=FAMILIES[family]["rel"])


@pytest.mark.parametrize("family", ["gpt2", "no-norm", "llama", "neox"])
def test_the_mean_is_taken_off_where_norms_do(family: str) -> None:
    """LayerNorms do, RMSNorms and identities do not; one other norm among them is enough."""
    module = plain_module(family)
    assert families.unchecked(module).weights.centres == (family in ("gpt2", "neox"))
    if family == "gpt2":
        module.transformer.h[1].ln_1 = nn.RMSNorm(16).double()
        assert not families.unchecked(module).weights.centres


def test_weights_are_those_of_dense_products() -> None:
    """Frobenius norms of folded W_Q, W_K, W_O and of the d by d matrix W_V W_O."""
    module = plain_module("gpt2")
    found = weight_norms(load_model((module, None)))
    for layer, block in enumerate(module.requires_grad_(False).transformer.h):
        gain, weight = block.ln_1.weight, block.attn.c_attn.weight
        q, k, v = (
            (gain[:, None] * part - (gain[:, None] * part).mean(0)).split(8, 1)
            for part in weight.split(16, 1)
        )
        o = (block.attn.c_proj.weight - block.attn.c_proj.weight.mean(1, keepdim=True)).split(8)
        for head in range(2):
            dense = {"q": q[head], "k": k[head], "o": o[head], "ov": v[head] @ o[head]}
            for name, matrix in dense.items():
                assert float(found[name][layer, head]) == pytest.approx(
                    float(matrix.norm()), **EXACT
                )
        out = block.mlp.c_proj.weight - block.mlp.c_proj.weight.mean(1, keepdim=True)
        assert found["out"][layer].tolist() == [pytest.approx(float(out.norm()), **EXACT)]


def test_mlps_without_a_named_output_have_no_weight_norm() -> None:
    """Where the architecture does not name the projection nothing is said of it."""
    model = load_model((plain_module("gpt2"), None))
    known = norm_growth(model, TASK).graph
    bare = replace(model.architecture, mlp_output_projection="", d_mlp=0)
    graph = norm_growth(TracedModel(model._module, None, bare, name="toy"), TASK).graph
    assert known["growth"].keys() - graph["growth"].keys() == {"out"}
    assert "; W_out of MLPs ×" in known["findings"]["weights that write"]
    assert "W_out" not in graph["findings"]["weights that write"]
    assert graph["growth"]["stream"] == known["growth"]["stream"]


# --- closed forms --------------------------------------------------------------------------------


def scaled(n_layers: int, factor: float) -> nn.Module:
    """A model whose layers are all alike, but that what attention writes grows by a factor."""
    module = oracles.random_gpt2(n_layers, 2, 16, seed=2)
    first, *others = module.transformer.h
    with torch.no_grad():
        for layer, block in enumerate(others, 1):
            block.load_state_dict(first.state_dict())
            block.attn.c_proj.weight *= factor**layer
    return module


@pytest.mark.parametrize("factor", [1.045, 0.8])
def test_growth_of_weights_is_recovered(factor: float) -> None:
    """W_O times 1.045^layer: W_O and W_OV grow by 1.045, all others not at all."""
    growth = grown(scaled(8, factor)).graph["growth"]
    for name in ("ov", "o", "out", "q", "k"):
        rate, expected = growth[name]["rate"], factor if name in ("ov", "o") else 1
        assert rate["factor"] == pytest.approx(expected, abs=1e-6)
        low, high = rate["interval"]
        assert low - 1e-12 <= expected <= high + 1e-12
        assert high - low < 1e-6
        assert rate.get("fit", 1) == pytest.approx(1)
        assert ("fit" in rate) == (expected != 1)


def test_a_stream_to_which_nothing_is_written_does_not_grow() -> None:
    """All writes 0: rate exactly 1, all of the stream the input's, and no rate of writes."""
    module = oracles.random_gpt2(3, 2, 16, seed=2)
    with torch.no_grad():
        for block in module.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
    circuit = grown(module, top=40)
    growth = circuit.graph["growth"]
    assert growth["stream"]["rate"]["factor"] == 1
    assert growth["stream"]["rate"]["interval"] == [1, 1]
    assert growth["attention"]["means"] == growth["mlp"]["means"] == [None] * 3
    assert growth["attention"]["cosines"] == [None] * 3
    assert not {"rate", "bounds"} & growth["attention"].keys()
    assert set(circuit) == {"input", "logits"}
    assert [(e[0], e[3]) for e in circuit.effects()] == [("input", pytest.approx(1, abs=1e-12))]
    assert circuit.nodes["input"]["size"] == pytest.approx(
        {"layer 1": 1, "layer 2": 1, "logits": 1}, abs=1e-12
    )
    assert circuit.graph["findings"]["attenuation"] == "heads and MLPs write nothing"
    assert "weights that write" not in circuit.graph["findings"]
    assert {"q", "k"} == {"q", "k", "o", "ov", "out"} & growth.keys()
    with torch.no_grad():
        for block in module.transformer.h:
            block.attn.c_attn.weight.zero_()
    empty = grown(module).graph
    assert {"stream", "attention", "mlp"} == empty["growth"].keys()
    assert "weights that read" not in empty["findings"]
    assert "Weights by layer" not in [panel["title"] for panel in empty["plots"]]


def test_an_exponential_stream_is_recovered() -> None:
    """Every MLP writes 0.3 times a stream along which all is: 1.3 per layer, and shares so."""
    module = oracles.random_gpt2(4, 2, 16, layer_norm=False, activation="linear", seed=0)
    with torch.no_grad():
        for block in module.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj, block.mlp.c_fc):
                part.weight.zero_()
                part.bias.zero_()
            block.mlp.c_fc.weight[:, :16] = torch.eye(16)
            block.mlp.c_proj.weight[:16] = 0.3 * torch.eye(16)
    circuit = grown(module)
    growth = circuit.graph["growth"]
    for name in ("stream", "mlp"):
        rate = growth[name]["rate"]
        assert [rate["factor"], *rate["interval"], rate["fit"]] == pytest.approx([1.3] * 3 + [1])
    assert growth["mlp"]["cosines"] == pytest.approx([1] * 4)
    for layer in range(4):
        data, edge = circuit.nodes[f"m{layer}"], circuit.edges[f"m{layer}", "logits", ""]
        expected = 0.3 * 1.3 ** (layer - 4)
        assert [edge["score"], data["size"]["logits"]] == pytest.approx([expected] * 2)
        assert data["projection"] == pytest.approx(data["size"])
        for reader in range(layer + 1, 4):
            assert data["size"][f"layer {reader}"] == pytest.approx(0.3 * 1.3 ** (layer - reader))


def test_few_layers_have_no_interval() -> None:
    """Two layers make a rate without one, one layer makes none; findings say so."""
    two, one = (grown(plain_module("gpt2", n_layers)) for n_layers in (2, 1))
    assert "per layer (two layers, no interval)" in two.graph["findings"]["attention writes"]
    assert set(two.graph["growth"]["ov"]["rate"]) == {"factor"}
    assert "over its one layer" in one.graph["findings"]["residual stream"]
    assert "one layer, no rate" in one.graph["findings"]["attention writes"]
    assert not any("rate" in growth for growth in one.graph["growth"].values())


# --- the circuit ----------------------------------------------------------------------------------


def test_a_repeated_prompt_changes_no_norm() -> None:
    """Norms are of different prompts, whatever the corrupt ones are; lens and shares of pairs."""
    module, pair = plain_module("gpt2"), TASK.pairs[0]
    other = PromptPair(pair.clean, (9, *pair.corrupt[1:]), pair.answers, pair.wrong_answers)
    once = grown(module).graph
    twice = grown(module, Task("twice", (*TASK.pairs, other))).graph
    assert twice["growth"] == once["growth"]
    assert twice["method"] == once["method"]
    assert twice["lens"]["kl"]["mean"] != once["lens"]["kl"]["mean"]


def test_padding_changes_nothing() -> None:
    """Prompts of different length together give what each gives alone."""
    module = plain_module("gpt2")
    together = grown(module, batch_size=4)
    alone = [grown(module, Task("one", (pair,))) for pair in TASK.pairs]
    counts = [len(pair.clean) - 1 for pair in TASK.pairs]
    for name in ("stream", "attention", "mlp"):
        logs = np.array([np.log(one.graph["growth"][name]["means"]) for one in alone])
        expected = np.exp(np.average(logs, axis=0, weights=counts))
        assert together.graph["growth"][name]["means"] == pytest.approx(expected, **EXACT)
    for source, data in together.nodes(data=True):
        if source == "logits":
            continue
        sizes = [one.nodes[source]["size"]["logits"] for one in alone]
        assert data["size"]["logits"] == pytest.approx(np.average(sizes, weights=counts), **EXACT)
        scores = [one.edges[source, "logits", ""]["score"] for one in alone]
        score = together.edges[source, "logits", ""]["score"]
        assert score == pytest.approx(np.mean(scores), **EXACT)


def test_the_strongest_are_kept() -> None:
    """By absolute share, with top and threshold both."""
    module = plain_module("gpt2")
    everything = list(grown(module).effects())
    assert len(everything) == 10
    assert [*grown(module, top=3).effects()] == everything[:3]
    least = abs(everything[4][3])
    assert [*grown(module, threshold=least).effects()] == everything[:5]
    assert [*grown(module, threshold=least, top=2).effects()] == everything[:2]
    for wrong in ({"top": -1}, {"threshold": -0.1}):
        with pytest.raises(OptionError):
            grown(module, **wrong)


def test_prompts_of_one_token_are_refused() -> None:
    """Their only token is the first; with a longer prompt beside them the task is measured."""
    module = plain_module("gpt2")
    short = PromptPair((1,), (2,), (3,), (4,))
    with pytest.raises(TaskError, match=r"no clean prompt has a second token .* longer prompts"):
        grown(module, Task("short", (short,)))
    circuit = grown(module, Task("mixed", (short, TASK.pairs[0])))
    assert "5 tokens of 1 clean prompt," in circuit.graph["method"]


@pytest.mark.parametrize(
    "name", ["induction", "ioi-mini", "docstring-mini", "hand-induction", "gate-or"]
)
def test_bundled_models_are_measured(name: str) -> None:
    """One to three layers, with and without MLPs and norms: shares sum to 1, and files hold it."""
    circuit = norm_growth(load_model(name), TASKS[name], top="all")
    total = math.fsum(score for *_, score in circuit.effects()) + circuit.graph["bias_share"]
    assert total == pytest.approx(1, abs=1e-6)
    assert CircuitGraph.from_json(circuit.to_json()).graph == circuit.graph
    titles = [panel["title"] for panel in circuit.graph["plots"]]
    weights = [] if name == "gate-or" else ["Weights by layer"]
    assert titles == ["Norms by layer", "Logit lens", *weights, "What is left of a write"]
    assert "nan" not in " ".join(circuit.graph["findings"].values())


def test_the_contract_is_kept() -> None:
    """Padded prompts, any batch size, the same circuit twice."""
    assert check_analysis(norm_growth, options={"top": "all"}).number_of_edges() == 7
