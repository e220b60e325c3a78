"""The analysis ``attention-scores``: against sums written out, known heads and trained ones."""

from __future__ import annotations

import json
from typing import Any

import oracles
import pytest
import torch
from attention_oracles import ROWS, logits_under, parts_of, patterns, scale_of, tempered_row
from circuitlab_attention_heads import measuring
from circuitlab_attention_heads.measuring import query_offsets
from circuitlab_attention_heads.scoring import attention_scores
from families import family_model
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    CircuitGraph,
    EncodedTask,
    OptionError,
    PromptPair,
    Task,
    TracedModel,
    load_model,
    mean_intervals,
    zoo,
)
from circuitlab.testing import check_analysis

LENGTHS = [6, 4, 3, 5]
TASKS = {task.name: task for task in zoo.tasks()}
RULES = ("argmax", "uniform", "second")


def random_model(seed: int = 1) -> tuple[Any, TracedModel]:
    module = oracles.random_gpt2(2, seed=seed)
    return module, load_model((module, None))


def bundled(name: str, **options: Any) -> CircuitGraph:
    return attention_scores(load_model(name), TASKS[name], **options)


def changes(module: Any, pairs: EncodedTask, row: Any, heads: Any) -> Tensor:
    ids, mask = pairs.clean.ids, pairs.clean.mask.long()
    plain, changed = (logits_under(module, ids, mask, row, each) for each in ([], heads))
    return pairs.score(changed, plain) - pairs.score(plain, plain)


def margins(module: Any, pairs: EncodedTask, head: tuple[int, int]) -> tuple[list[str], Tensor]:
    """The last query's margin over the second key, ``[query part, key part, pair]``."""
    ids, mask = pairs.clean.ids, pairs.clean.mask.long()
    queries, keys = parts_of(module, ids, mask, head)
    best = patterns(module, ids, mask)[head[0]][:, head[1], -1].topk(2, -1).indices
    rows = torch.arange(len(ids))
    q, k = (torch.stack(list(each.values())) for each in (queries, keys))
    moved = k[:, rows, best[:, 0]] - k[:, rows, best[:, 1]]
    return [*queries], torch.einsum("apd,bpd->abp", q[:, :, -1], moved) * scale_of(module, head[0])


# --- the circuit ----------------------------------------------------------------------------------


def test_contract() -> None:
    """The analysis does what is expected of every analysis."""
    circuit = check_analysis("attention-scores")
    assert circuit.number_of_edges() > 0


def test_edges_are_mean_contributions_with_their_intervals() -> None:
    """Row sums into q, column sums into k, of sums written out; padded, in batches of 3."""
    module, model = random_model()
    task = random_task(LENGTHS)
    pairs = model.encode(task)
    circuit = attention_scores(model, task, top="all", batch_size=3)
    seen = set()
    for head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        names, expected = margins(module, pairs, head)
        target = f"a{head[0]}.h{head[1]}"
        for port, sums in (("q", expected.sum(1)), ("k", expected.sum(0))):
            values = dict(zip(names, sums, strict=True))
            own = circuit.nodes[target]["bias"][port]
            biases = values.pop("bias") + values.pop("attention-bias")
            assert own == pytest.approx(float(biases.mean()), abs=1e-9)
            parts = {part: values.pop(part) for part in ("token", "position")}
            for source, value in {"input": sum(parts.values()), **values}.items():
                data = circuit.edges[source, target, port]
                assert data["score"] == pytest.approx(float(value.mean()), abs=1e-9)
                interval = mean_intervals(value[None], torch.initial_seed())[0]
                assert data["interval"] == pytest.approx(list(interval), abs=1e-9)
                seen.add((source, target, port))
            data = circuit.edges["input", target, port]
            for part, value in parts.items():
                assert data[part] == pytest.approx(float(value.mean()), abs=1e-9)
    assert seen == {edge[:3] for edge in circuit.effects()}


@pytest.mark.parametrize("against", ["second", "rest"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edges_biases_and_remainder_sum_to_the_margin(family: str, against: Any) -> None:
    """On each side, for each head."""
    model = random_model()[1] if family == "gpt2" else family_model(family)
    circuit = attention_scores(model, random_task(LENGTHS), against=against, top="all")
    for name, data in circuit.nodes(data=True):
        for port in "qk" if data["kind"] == "head" else "":
            edges = circuit.in_edges(name, keys=True, data="score")
            total = sum(score for *_, key, score in edges if key == port)
            total += data["bias"][port] + data["remainder"]
            assert total == pytest.approx(data["margin"], abs=1e-4 if family == "llama" else 1e-9)
    assert ("token" in circuit.edges["input", "a1.h0", "q"]) == (family == "gpt2")


def test_nodes_say_how_sharp_heads_are_and_what_replacing_them_does() -> None:
    """Against the stock model's patterns, and its runs with each head's rows replaced."""
    module, model = random_model()
    task = random_task(LENGTHS)
    pairs = model.encode(task)
    circuit = attention_scores(model, task, batch_size=2)
    ids, mask = pairs.clean.ids, pairs.clean.mask.long()
    stock = patterns(module, ids, mask)
    wide = pairs.clean.mask & (mask.cumsum(-1) > 1)
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        data, pattern = circuit.nodes[f"a{layer}.h{head}"], stock[layer][:, head]
        n_eff, two = torch.special.entr(pattern).sum(-1).exp(), pattern.topk(2, -1).values
        logs = two.log()
        lead = logs[..., 0] - logs[..., 1]
        assert data["n_eff"] == pytest.approx(float(n_eff[:, -1].mean()), abs=1e-9)
        assert data["top1"] == pytest.approx(float(two[:, -1, 0].mean()), abs=1e-9)
        assert data["margin"] == pytest.approx(float(lead[:, -1].mean()), abs=1e-9)
        everywhere = {"n_eff": n_eff, "top1": two[..., 0], "margin": lead}
        for name, values in everywhere.items():
            expected = float(values[wide].mean())
            assert data["everywhere"][name] == pytest.approx(expected, abs=1e-9)
        for rule in RULES:
            change = changes(module, pairs, ROWS[rule], [(layer, head)])
            assert data[f"{rule}_change"] == pytest.approx(float(change.mean()), abs=1e-9)
            interval = mean_intervals(change[None], torch.initial_seed())[0]
            assert data[f"{rule}_interval"] == pytest.approx(list(interval), abs=1e-9)


def test_all_heads_are_replaced_together() -> None:
    """The graph has the change of the stock model with all rows replaced; or of the heads named."""
    module, model = random_model()
    task = random_task(LENGTHS)
    pairs = model.encode(task)
    for heads, chosen in ((None, [(0, 0), (0, 1), (1, 0), (1, 1)]), ("a1.*", [(1, 0), (1, 1)])):
        found = attention_scores(model, task, heads=heads).graph["replacements"]
        assert found["heads"] == [f"a{layer}.h{head}" for layer, head in chosen]
        for rule in RULES:
            change = changes(module, pairs, ROWS[rule], chosen)
            assert found[rule]["change"] == pytest.approx(float(change.mean()), abs=1e-9)


def test_what_is_retained_is_a_share_of_the_tasks_effect() -> None:
    """1 + change / (clean - corrupt) where that is above 0, and nothing where it is not."""
    model = load_model("induction")
    task = TASKS["induction"].take(16)
    found = attention_scores(model, task).graph["replacements"]
    pairs = model.encode(task)
    clean, corrupt = (model.run(part).logits[:, -1] for part in (pairs.clean, pairs.corrupt))
    effect = float((pairs.score(clean, clean) - pairs.score(corrupt, clean)).double().mean())
    for rule in RULES:
        share = 1 + found[rule]["change"] / effect
        assert found[rule]["retained"] == pytest.approx(share, abs=1e-5)
        low, high = found[rule]["retained_interval"]
        assert low <= share <= high
    turned = Task(
        "turned",
        tuple(PromptPair(p.corrupt, p.clean, p.answers, p.wrong_answers) for p in task.pairs),
    )
    found = attention_scores(model, turned).graph["replacements"]
    assert "retained" not in found["argmax"]


def test_strongest_pairs_of_parts() -> None:
    """A node keeps the five pairs that do most, the query's part first."""
    module, model = random_model()
    task = random_task(LENGTHS)
    circuit = attention_scores(model, task, batch_size=2)
    names, expected = margins(module, model.encode(task), (1, 1))
    means = expected.mean(-1)
    order = means.abs().flatten().argsort(descending=True)[:5].tolist()
    kept = circuit.nodes["a1.h1"]["strongest_pairs"]
    assert [tuple(each[:2]) for each in kept] == [
        (names[i // len(names)], names[i % len(names)]) for i in order
    ]
    assert [each[2] for each in kept] == pytest.approx(means.flatten()[order].tolist(), abs=1e-9)


def test_a_pair_told_twice_is_no_further_evidence() -> None:
    """Means weigh it double, intervals do not know of it."""
    _, model = random_model()
    task = random_task(LENGTHS)
    twice = Task("twice", (*task.pairs, task.pairs[0]))
    one, other = (attention_scores(model, each, top="all") for each in (task, twice))
    for source, target, port, score in one.effects():
        edge, again = one.edges[source, target, port], other.edges[source, target, port]
        assert again["interval"] == pytest.approx(edge["interval"], abs=1e-9)
        assert abs(again["score"] - score) > 1e-6


def test_a_single_pair_has_no_interval() -> None:
    """And no key of one anywhere."""
    _, model = random_model()
    circuit = attention_scores(model, random_task([5]))
    assert not any("interval" in data for *_, data in circuit.edges(data=True))
    assert "interval" not in json.dumps([*circuit.nodes(data=True)])
    assert "[" not in circuit.graph["findings"]["argmax"]


# --- known heads ----------------------------------------------------------------------------------


def test_hand_induction_is_its_known_edges_and_its_argmax() -> None:
    """Queries and keys of the mechanism make the margins, and attention is its argmax exactly."""
    circuit = bundled("hand-induction", top="all")
    found = {edge[:3] for edge in circuit.effects() if edge[3]}
    known = zoo.known_edges("hand-induction", sense="mechanism")
    assert found == {edge for edge in known if edge[2] in ("q", "k")}
    together = circuit.graph["replacements"]
    assert together["argmax"] == {
        "change": 0.0,
        "interval": [0.0, 0.0],
        "retained": 1.0,
        "retained_interval": [1.0, 1.0],
    }
    assert abs(together["uniform"]["retained"]) < 0.01
    for name in ("a0.h0", "a1.h0"):
        node = circuit.nodes[name]
        assert node["n_eff"] == node["top1"] == 1
        assert (node["argmax_change"], node["margin"]) == (0, pytest.approx(400))
    # The induction head compares letters; the other looks one back, by position alone.
    assert circuit.edges["input", "a1.h0", "q"]["token"] == pytest.approx(400)
    assert circuit.edges["input", "a0.h0", "k"]["position"] == pytest.approx(400)


def test_trained_induction_heads_are_sharp_and_read_the_previous_token_head() -> None:
    """They look at less than 2 keys, for what a0.h3 wrote; argmax keeps most, controls nothing."""
    circuit = bundled("induction")
    for head in range(4):
        node = circuit.nodes[f"a1.h{head}"]
        assert node["n_eff"] < 2
        assert node["argmax_retained"] > 0.97
        assert circuit.edges["a0.h3", f"a1.h{head}", "k"]["interval"][0] > 1
    together = circuit.graph["replacements"]
    assert together["argmax"]["retained_interval"][0] > 0.75
    assert together["uniform"]["retained_interval"][1] < 0.2
    assert together["second"]["retained_interval"][1] < 0.2
    assert "8 heads at once" in circuit.graph["findings"]["argmax"]


# --- options --------------------------------------------------------------------------------------


def test_query_counts_from_the_start_or_the_end() -> None:
    """In prompts of several lengths each has its own column."""
    _, model = random_model()
    task = random_task(LENGTHS)
    pairs = model.encode(task)
    assert query_offsets(pairs, -2).tolist() == [-2] * 4
    assert query_offsets(pairs, 2).tolist() == [-4, -2, -1, -3]
    single = Task("one", task.pairs[1:2])
    one, other = (attention_scores(model, single, query=query) for query in (2, -2))
    assert list(one.effects()) == list(other.effects())
    assert list(one.effects()) != list(attention_scores(model, single).effects())


@pytest.mark.parametrize(
    ("query", "fact"),
    [
        (3, r"--query 3: the clean prompt of pair 3 has 3 tokens"),
        (-4, r"--query -4: in pair 2 it is the first token"),
        (-7, r"--query -7: the clean prompt of pair 1 has 6 tokens"),
        (0, r"--query 0: in pair 1 it is the first token, which sees no key but itself"),
    ],
)
def test_a_query_that_is_not_there_is_refused(query: int, fact: str) -> None:
    """So is one that sees a single key; the message names the pair."""
    with pytest.raises(OptionError, match=fact):
        attention_scores(random_model()[1], random_task(LENGTHS), query=query)


def test_top_and_threshold_cut_edges_not_heads() -> None:
    """The strongest stay, with all heads that were looked at."""
    _, model = random_model()
    task = random_task(LENGTHS)
    every = list(attention_scores(model, task, top="all").effects())
    assert list(attention_scores(model, task, top=3).effects()) == every[:3]
    least = abs(every[4][3])
    cut = attention_scores(model, task, threshold=least)
    assert list(cut.effects()) == every[:5]
    assert {"a0.h0", "a0.h1", "a1.h0", "a1.h1"} <= set(cut)
    with pytest.raises(OptionError, match="--top -1"):
        attention_scores(model, task, top=-1)


def test_heads_named_alone_are_looked_at() -> None:
    """No other head has data or edges into it."""
    _, model = random_model()
    circuit = attention_scores(model, random_task(LENGTHS), heads="a1.1")
    assert {target for _, target, *_ in circuit.effects()} == {"a1.h1"}
    assert [name for name, data in circuit.nodes(data=True) if "n_eff" in data] == ["a1.h1"]
    assert "the head, all attention" in circuit.graph["findings"]["argmax"]


def test_of_many_heads_those_that_need_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose attention, made uniform, changes the first pairs most; the rest only together."""
    module, model = random_model()
    task = random_task(LENGTHS)
    pairs = model.encode(task)
    sizes = {
        f"a{layer}.h{head}": float(
            changes(module, pairs.rows([0, 1]), ROWS["uniform"], [(layer, head)]).abs().mean()
        )
        for layer in range(2)
        for head in range(2)
    }
    monkeypatch.setattr(measuring, "MOST_HEADS", 2)
    monkeypatch.setattr(measuring, "TRIED_PAIRS", 2)
    circuit = attention_scores(model, task)
    assert {name for name, data in circuit.nodes(data=True) if "n_eff" in data} == set(
        sorted(sizes, key=lambda name: -sizes[name])[:2]
    )
    assert len(circuit.graph["replacements"]["heads"]) == 4
    assert "2 of 4 heads" in circuit.graph["warnings"][0]


def test_temperatures() -> None:
    """Curves of the change at each temperature: the stock model's, and 0 at 1."""
    module, model = random_model()
    task = random_task(LENGTHS)
    circuit = attention_scores(model, task, temperatures=True)
    panel = next(plot for plot in circuit.graph["plots"] if plot["kind"] == "curves")
    assert list(panel["x"]) == [0.25, 0.5, 1.0, 2.0, 4.0]
    curves = {curve["name"]: curve["mean"] for curve in panel["curves"]}
    heads = {"together": [(0, 0), (0, 1), (1, 0), (1, 1)], "a1.h1": [(1, 1)]}
    for name, chosen in heads.items():
        for temperature, found in zip(panel["x"], curves[name], strict=True):
            row = tempered_row(temperature)
            expected = float(changes(module, model.encode(task), row, chosen).mean())
            assert found == pytest.approx(expected, abs=1e-9)
    assert curves["together"][2] == pytest.approx(0, abs=1e-9)


# --- plots ----------------------------------------------------------------------------------------


def test_panels_show_what_was_measured() -> None:
    """Replacements, margins of each pair, one margin's parts, and patterns on the first prompt."""
    module, model = random_model()
    task = random_task(LENGTHS)
    pairs = model.encode(task)
    circuit = attention_scores(model, task, against="rest")
    plots = circuit.graph["plots"]
    assert [plot["kind"] for plot in plots] == ["bars", "histogram", "bars", *["heatmap"] * 4]
    bars = {bar["name"]: bar["value"] for bar in plots[0]["bars"]}
    assert bars["together, second"] == circuit.graph["replacements"]["second"]["change"]
    assert bars["a1.h0, argmax"] == circuit.nodes["a1.h0"]["argmax_change"]
    assert all(len(values) == len(pairs) for values in plots[1]["series"].values())
    head = plots[2]["title"].removeprefix("Margin of ")
    node = circuit.nodes[head]
    assert plots[2]["reference"] == node["margin"]
    for side in ("query", "keys"):
        parts = [bar["value"] for bar in plots[2]["bars"] if bar["name"].startswith(side)]
        assert sum(parts) + node["remainder"] == pytest.approx(node["margin"], abs=1e-9)
    stock = patterns(module, pairs.clean.ids[:1], pairs.clean.mask[:1].long())
    for plot in plots[3:]:
        layer, number = (int(part[-1]) for part in plot["title"].split()[1].split("."))
        assert tuple(plot["rows"]) == tuple(plot["columns"]) == pairs.tokens_text[0]
        for query, row in enumerate(plot["values"]):
            expected = stock[layer][0, number, query, : query + 1].tolist()
            assert row[: query + 1] == pytest.approx(expected, abs=1e-9)
            assert row[query + 1 :] == [None] * (5 - query)


def test_the_metric_may_look_at_all_logits() -> None:
    """With KL divergence the clean metric is 0, and shares are of what the corrupt prompt loses."""
    _, model = random_model()
    circuit = attention_scores(model, random_task(LENGTHS, "kl-divergence"))
    for rule in RULES:
        found = circuit.graph["replacements"][rule]
        assert found["change"] < 0
        assert found["retained"] < 1
