"""The analysis head-circuits: its tables against dense matrices, known heads, and bad options."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from circuitlab_attention_heads.reading import head_circuits
from circuitlab_attention_heads.tables import LEAST
from dense_heads import Dense, divisor
from families import family_model, random_module, traced, unchecked
from random_tasks import random_task
from torch import Tensor

from circuitlab import CircuitGraph, ModelError, OptionError, PromptPair, Task, load_model, zoo
from circuitlab.testing import check_analysis, tiny_model, toy_task

TASKS = {task.name: task for task in zoo.tasks()}
TASK = random_task([6, 4, 5])


def bundled(name: str, head: str, **options: Any) -> CircuitGraph:
    return head_circuits(load_model(name), TASKS[name], head=head, **options)


def panel(circuit: CircuitGraph, start: str) -> dict[str, Any]:
    """The one panel whose title begins so."""
    found = [p for p in circuit.graph["plots"] if p["title"].startswith(start)]
    assert len(found) == 1
    return found[0]  # type: ignore[no-any-return]


def values(panel: dict[str, Any]) -> Tensor:
    rows = [[float("nan") if v is None else v for v in row] for row in panel["values"]]
    return torch.tensor(rows, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


# --- contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"head": "a1.h0"}, {"head": "a1.h1", "through": "a0.h0"}])
def test_contract(options: dict[str, Any]) -> None:
    """It does what CircuitLab expects of every analysis."""
    circuit = check_analysis(head_circuits, options=options)
    assert "no sign" in circuit.graph["score"]


def test_a_circuit_is_input_head_and_logits() -> None:
    """Edges are compositions, with a task also shares, which each add up to the input's."""
    circuit = head_circuits(tiny_model(), toy_task(), head="a1.h1", through="a0.h0")
    assert set(circuit) == {"input", "a0.h0", "a1.h1", "logits"}
    ports = {(s, t, p) for s, t, p, _ in circuit.effects()}
    sources = {(s, "a1.h1", p) for s in ("input", "a0.h0") for p in "qkv"}
    assert ports == sources | {("a1.h1", "logits", "")}
    details = circuit.graph["head_circuit"]
    shares, parts = torch.tensor(details["scores_shares"]), details["parts"]
    own = [parts.index("token"), parts.index("position")]
    edge = circuit.edges["input", "a1.h1", "q"]
    assert edge["share"] == pytest.approx(float(shares[own].sum()), rel=1e-6)
    edge = circuit.edges["a0.h0", "a1.h1", "k"]
    assert edge["share"] == pytest.approx(float(shares[:, parts.index("a0.h0")].sum()), rel=1e-6)
    edge = circuit.edges["input", "a1.h1", "v"]
    assert edge["share"] == pytest.approx(sum(details["values_shares"][n] for n in own), rel=1e-6)


# --- tables ---------------------------------------------------------------------------------------


def test_tables_of_layer_0_are_divided_by_each_tokens_scale() -> None:
    """QK of tokens and positions, and OV, by dense matrices; means over the other side."""
    module = oracles.random_gpt2()
    model, dense = load_model((module, None)), Dense(module, (0, 1))
    circuit = head_circuits(model, TASK, head="a0.h1", tokens="#3,#17,#8")
    tokens = dense.tokens[[3, 17, 8]]
    inverse = 1 / divisor(dense.norm, tokens[:, None] + dense.positions[:6])[..., 0]
    each, at = inverse.mean(1), inverse.mean(0)
    table = values(panel(circuit, "QK circuit of a0.h1: tokens"))
    key_only = dense.scale * dense.bias("q") @ dense.weight("k").T @ tokens.T * each
    expected = tokens @ dense.qk() @ tokens.T * each[:, None] * each
    assert apart(table, torch.cat([key_only[None], expected])) < 1e-10
    assert panel(circuit, "QK circuit of a0.h1: tokens")["rows"] == ["any: b_Q", "#3", "#17", "#8"]
    expected = dense.positions[:6] @ dense.qk() @ dense.positions[:6].T * at[:, None] * at
    found = values(panel(circuit, "QK circuit of a0.h1: positions"))
    assert bool((found.isnan() == torch.ones(6, 6).triu(1).bool()).all())
    assert apart(found.nan_to_num(), expected.tril()) < 1e-10
    with torch.no_grad():
        last = []
        hook = dense.final.register_forward_pre_hook(lambda _, x: last.append(x[0][0, -1]))
        for pair in TASK.pairs:
            module(torch.tensor([pair.clean]))
        hook.remove()
    final = (1 / divisor(dense.final, torch.stack(last))).mean()
    expected = each[:, None] * tokens @ dense.ov @ dense.unembedding * final
    assert apart(values(panel(circuit, "OV circuit")), expected[:, [3, 17, 8]]) < 1e-10
    for row, output in zip(expected, circuit.graph["head_circuit"]["outputs"], strict=True):
        order = row.argsort(descending=True).tolist()
        assert [text for text, _ in output["largest"]] == [f"#{t}" for t in order[:8]]
        assert [text for text, _ in output["smallest"]] == [f"#{t}" for t in order[:-9:-1]]
        assert output["largest"][0][1] == pytest.approx(float(row.max()), rel=1e-9)
    constant = dense.bias("v") @ dense.o @ dense.unembedding * final
    assert circuit.graph["head_circuit"]["constant"]["smallest"][0] == pytest.approx(
        [f"#{int(constant.argmin())}", float(constant.min())]
    )


def test_tables_of_later_layers_are_divided_by_mean_scales() -> None:
    """1/σ over the prompts, and without a task nothing; both say so."""
    module = oracles.random_gpt2()
    model, dense, earlier = load_model((module, None)), Dense(module, (1, 0)), Dense(module, (0, 1))
    options: dict[str, Any] = {"head": "a1.h0", "through": "a0.h1", "tokens": "#3,#17,#8"}
    tokens = dense.tokens[[3, 17, 8]]
    plain = tokens @ dense.qk() @ earlier.ov.T @ tokens.T
    start = "QK circuit of a1.h0 through a0.h1: tokens"
    without = panel(head_circuits(model, None, **options), start)
    assert apart(values(without)[1:], plain) < 1e-10
    assert without["caption"].startswith("Before the norms divide")
    streams: dict[int, list[Tensor]] = {0: [], 1: []}
    with torch.no_grad():
        for pair in TASK.pairs:
            done = module(torch.tensor([pair.clean]), output_hidden_states=True)
            for layer, found in streams.items():
                found.append(done.hidden_states[layer][0])
    own, before = (
        (1 / divisor(norm, torch.cat(streams[layer]))).mean()
        for norm, layer in ((dense.norm, 1), (earlier.norm, 0))
    )
    circuit = head_circuits(model, TASK, **options)
    found = panel(circuit, start)
    assert apart(values(found)[1:], plain * own * own * before) < 1e-10
    assert "mean scale on the task's prompts" in found["caption"]
    assert found["column_label"] == "key: what a0.h1 wrote of it"


def test_directions_are_listed_with_both_ends() -> None:
    """Read and written tokens of each direction, as many as asked for."""
    module = oracles.random_gpt2()
    dense = Dense(module, (1, 1))
    circuit = head_circuits(load_model((module, None)), TASK, head="a1.h1", svd=2, top_tokens=3)
    directions = circuit.graph["head_circuit"]["directions"]
    u, size, v = torch.linalg.svd(dense.ov)
    assert [each["value"] for each in directions] == pytest.approx(size[:2].tolist(), rel=1e-9)
    for k, direction in enumerate(directions):
        ends = {}
        for side, reading in (
            ("reads", dense.tokens @ u[:, k]),
            ("writes", v[k] @ dense.unembedding),
        ):
            order = reading.argsort(descending=True).tolist()
            ends[side] = [[f"#{t}" for t in part] for part in (order[:3], order[:-4:-1])]
        found = {
            side: [[text for text, _ in direction[side][end]] for end in ("largest", "smallest")]
            for side in ("reads", "writes")
        }
        # The sign of a pair is arbitrary, and common to both sides.
        assert found in (ends, {side: both[::-1] for side, both in ends.items()})
    assert len(panel(circuit, "Singular directions")["rows"]) == 4
    none = head_circuits(load_model((module, None)), TASK, head="a1.h1", svd=0)
    assert "directions" not in none.graph["findings"]
    assert not [p for p in none.graph["plots"] if p["title"].startswith("Singular")]


def test_shares_are_drawn_where_there_are_any() -> None:
    """Rows and columns of parts that decide something; all cells that are left add up to 1."""
    circuit = head_circuits(tiny_model(), toy_task(), head="a1.h0")
    shares = torch.tensor(circuit.graph["head_circuit"]["scores_shares"])
    drawn = values(panel(circuit, "What decides where a1.h0 looks"))
    assert float(drawn.sum()) == pytest.approx(1.0, abs=shares.numel() * LEAST)
    assert "bias" not in panel(circuit, "What decides where a1.h0 looks")["columns"]
    assert circuit.graph["findings"]["scores"].startswith("variation over keys, query × key: ")


# --- rotary models --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "neox"])
def test_rotary_models_have_tables_by_offset(family: str) -> None:
    """One of tokens for each offset, and the mean scores of all offsets with the biases."""
    module = random_module(family)
    model, dense = traced(module), Dense(module, (0, 1))
    circuit = head_circuits(model, TASK, head="a0.h1", tokens="#3,#17,#8", offsets="0, 4")
    tokens = dense.tokens[[3, 17, 8]]
    inverse = 1 / divisor(dense.norm, tokens)
    for offset in (0, 4):
        found = values(panel(circuit, f"QK circuit of a0.h1: tokens, offset {offset}"))
        expected = tokens @ dense.qk(offset) @ tokens.T * inverse * inverse.T
        assert apart(found[1:], expected) < 1e-5
    curves = panel(circuit, "QK circuit of a0.h1: offsets")
    assert curves["x"] == list(range(16))
    normal = tokens * inverse
    q, k = normal @ dense.weight("q"), normal @ dense.weight("k")
    for curve in curves["curves"]:
        for offset, mean in zip(curves["x"], curve["mean"], strict=True):
            turn = dense.scale * dense.turn(offset)
            table = q @ turn @ k.T
            biases = dense.bias("q") @ turn @ (k + dense.bias("k")).T + q @ turn @ dense.bias("k")
            expected = {
                "same token": table.diagonal().mean(),
                "other tokens": table[~torch.eye(3, dtype=torch.bool)].mean(),
                "biases": biases.mean(),
            }[curve["name"]]
            assert mean == pytest.approx(float(expected), abs=1e-4)
    assert [curve["name"] for curve in curves["curves"]] == ["same token", "other tokens", "biases"]
    assert "at offset 0" in circuit.graph["findings"]["QK"]


def test_rotary_models_look_one_back_if_nothing_is_said() -> None:
    """Offset 1; positions have no table of their own."""
    circuit = head_circuits(family_model("llama"), TASK, head="a1.h2", through="a0.h0")
    titles = [p["title"] for p in circuit.graph["plots"]]
    assert "QK circuit of a1.h2 through a0.h0: tokens, offset 1" in titles
    assert not [title for title in titles if title.endswith("positions")]


# --- known heads ----------------------------------------------------------------------------------


def test_the_compiled_induction_head_is_read() -> None:
    """Through a0.h0 each letter looks for itself; the letter it looks at is written."""
    circuit = bundled("hand-induction", "a1.h0", through="a0.h0")
    node = circuit.nodes["a1.h0"]
    assert node["matching"] == pytest.approx(1.0, abs=1e-9)
    assert node["best_keys"] == [16, 16]
    letters = [o for o in circuit.graph["head_circuit"]["outputs"] if len(o["token"]) == 1]
    assert len(letters) == 16
    assert all([text for text, _ in o["largest"]] == [o["token"]] for o in letters)
    table = panel(circuit, "QK circuit of a1.h0 through a0.h0: tokens")
    scores, size = values(table), len(table["columns"])
    of_letters = torch.tensor([len(text) == 1 for text in table["columns"]])
    assert apart(scores, 400.0 * torch.eye(size).double() * of_letters) < 1e-6
    found = circuit.graph["findings"]
    assert found["QK through a0.h0"] == (
        "same-token matching +1.00, of -1 to 1; the token itself is the best key of 16 of 16 tokens"
    )
    assert found["scores"] == "variation over keys, query × key: token × a0.h0 100%"
    assert found["OV"] == "of 16 tokens 16 raise their own logit most, 0 lower it most"
    assert found["directions"].endswith("single directions are arbitrary")
    ports = {(s, p) for s, t, p, _ in circuit.effects() if t == "a1.h0"}
    assert ports == {("input", "q"), ("input", "v"), ("a0.h0", "k")}
    assert circuit.edges["a0.h0", "a1.h0", "k"]["share"] == pytest.approx(1.0)
    assert circuit.edges["a1.h0", "logits", ""]["share"] == pytest.approx(1.0)


def test_the_compiled_previous_token_head_is_read() -> None:
    """Position i scores with i - 1; tokens say nothing to one another, and nothing is made up."""
    circuit = bundled("hand-induction", "a0.h0")
    table = values(panel(circuit, "QK circuit of a0.h0: positions"))
    expected = torch.zeros_like(table)
    for place in range(len(table)):
        expected[place, max(place - 1, 0)] = 400.0
    assert apart(table.nan_to_num(), expected) < 1e-6
    found = circuit.graph["findings"]
    assert found["QK"] == "no token scores higher with one token than with another"
    assert found["scores"] == "variation over keys, query × key: position × position 100%"
    assert found["OV"] == "it writes nothing to the logits directly"
    assert "matching" not in circuit.nodes["a0.h0"]
    assert circuit.nodes["a0.h0"]["best_keys"] == [0, 0]


def test_an_idle_head_is_told_as_idle() -> None:
    """No edges, no numbers, and words that say why."""
    circuit = bundled("hand-induction", "a0.h1")
    assert circuit.number_of_edges() == 0
    found = circuit.graph["findings"]
    assert found["scores"] == "the same for all keys on the task's prompts"
    assert found["OV"] == "it writes nothing to the logits directly"
    assert "directions" not in found


def test_the_trained_induction_head_is_read() -> None:
    """Through the previous-token head, tokens look for themselves, and are written."""
    circuit = bundled("induction", "a1.h1", through="a0.h3")
    node = circuit.nodes["a1.h1"]
    own, deciding = node["best_keys"]
    assert own >= 0.75 * deciding > 0
    assert node["matching"] > 0.9
    other = bundled("induction", "a1.h1", through="a0.h2").nodes["a1.h1"]["best_keys"]
    assert other[0] < own
    into = {s: score for s, t, p, score in circuit.effects() if (t, p) == ("a1.h1", "k")}
    assert into["a0.h3"] > into["input"]


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_clean_prompts() -> None:
    """Each once, in the order of the prompts, without padding; at most 24."""
    pairs = [
        PromptPair((5, 9, 5, 7), (5, 9, 6, 7), (1,), (2,)),
        PromptPair((9, 3), (8, 3), (1,), (2,)),
    ]
    circuit = head_circuits(tiny_model(), Task("short", tuple(pairs)), head="a0.h0")
    assert circuit.graph["head_circuit"]["tokens"] == ["#5", "#9", "#7", "#3"]
    many = [
        PromptPair(tuple(range(n, n + 14)), tuple(range(n + 1, n + 15)), (1,), (2,))
        for n in (1, 14)
    ]
    circuit = head_circuits(tiny_model(), Task("long", tuple(many)), head="a0.h0")
    assert circuit.graph["head_circuit"]["tokens"] == [f"#{n}" for n in range(1, 25)]


def test_one_token_is_enough() -> None:
    """Tables of one cell, and curves without other tokens."""
    for model in (tiny_model(), family_model("qwen2")):
        circuit = head_circuits(model, None, head="a0.h0", tokens="#7")
        assert circuit.graph["head_circuit"]["tokens"] == ["#7"]
        assert "share" not in circuit.edges["input", "a0.h0", "q"]
        assert "scores" not in circuit.graph["findings"]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--head is missing: .* name one of a0.h0 … a1.h1"),
        ({"head": "m0"}, r"--head 'm0' is no head of this model; give one of a0.h0 … a1.h1"),
        ({"head": "a7.h0"}, "--head 'a7.h0' is no head"),
        ({"head": "a1.h0", "through": "input"}, "--through 'input' is no head"),
        ({"head": "a1.h0", "through": "a1.h1"}, "--through a1.h1 writes nothing that a1.h0 reads"),
        ({"head": "a1.h0", "offsets": "1"}, "--offsets 1: this model has no rotary embeddings"),
        ({"head": "a1.h0", "tokens": "#77"}, "--tokens '#77' is no token"),
        ({"head": "a1.h0", "svd": -1}, "--svd -1 --top-tokens 8: nothing can be shown"),
        ({"head": "a1.h0", "top_tokens": 0}, "--svd 4 --top-tokens 0: nothing can be shown"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """The message names the option and what to give."""
    with pytest.raises(OptionError, match=message):
        head_circuits(tiny_model(), toy_task(), **options)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ("1,x", "--offsets '1,x' is no list"),
        ("-1", "is no list"),
        ("1,16", "--offsets 16: a query"),
    ],
)
def test_bad_offsets_are_refused(offsets: str, message: str) -> None:
    """Whole numbers that a prompt can hold."""
    with pytest.raises(OptionError, match=message):
        head_circuits(family_model("llama"), TASK, head="a1.h0", offsets=offsets)


def test_tokens_are_needed_and_not_too_many() -> None:
    """Without a task they must be named; a table holds 64."""
    with pytest.raises(OptionError, match="--tokens is missing, and there is no task"):
        head_circuits(tiny_model(), None, head="a0.h0")
    module = oracles.random_gpt2(vocab=100)
    named = ",".join(f"#{n}" for n in range(65))
    with pytest.raises(OptionError, match="--tokens names 65 tokens, a table shows 64"):
        head_circuits(load_model((module, None)), None, head="a0.h0", tokens=named)


def test_a_model_that_is_not_as_described_is_refused_without_a_task_too() -> None:
    """Its first stream is looked at on the named tokens."""
    module: Any = oracles.random_gpt2()
    module.transformer.drop = torch.nn.Softsign()
    with pytest.raises(ModelError, match="does not read the sum of token and position embeddings"):
        head_circuits(unchecked(module), None, head="a0.h0", tokens="#1,#2")
