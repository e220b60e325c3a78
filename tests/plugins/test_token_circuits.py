"""Circuits of tokens: known gates are named, and every part of the graph says what it must."""

from __future__ import annotations

import json
from typing import Any

import oracles
import pytest
import torch
from circuitlab_path_patching.tokens.ablation import token_ablation
from circuitlab_path_patching.tokens.effects import How, token_effects
from random_tasks import random_task

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

TASKS = {task.name: task for task in zoo.tasks()}


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return load_model((oracles.random_gpt2(2, 2, 16, vocab=40), None))


def scores(circuit: CircuitGraph, target: str = "logits") -> dict[str, float]:
    """Score of each effect on the target, by its source."""
    return {source: score for source, end, _, score in circuit.effects() if end == target}


def gates(circuit: CircuitGraph) -> list[tuple[str, tuple[str, ...]]]:
    return [(entry["type"], tuple(entry["members"])) for entry in circuit.graph["gates"]]


# --- known circuits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "interaction", "single", "joint", "words"),
    [
        ("gate-and", "AND", 1.0, -1.0, -1.0, "both are needed"),
        ("gate-or", "OR", -1.0, 0.0, -1.0, "either suffices"),
        ("gate-xor", "XOR", 2.0, -1.0, 0.0, "one without the other"),
    ],
)
def test_gates_of_hand_made_models_are_named(
    name: str, kind: str, interaction: float, single: float, joint: float, words: str
) -> None:
    """The two bits, by the gate's own table: 1 logit and its interaction of 1, -1 or ±2."""
    circuit = token_ablation(load_model(name), TASKS[name])
    assert gates(circuit) == [(kind, ("t1", "t2"))]
    assert circuit.nodes["gate1"]["interaction"] == pytest.approx(interaction, abs=1e-5)
    found = scores(circuit)
    assert found == pytest.approx(
        {"t0": 0, "t1": single, "t2": single, "t3": 0, "gate1": joint}, abs=1e-5
    )
    assert scores(circuit, "gate1") == pytest.approx({"t1": joint / 2, "t2": joint / 2}, abs=1e-5)
    assert words in circuit.graph["findings"]["interactions"]
    assert (circuit.graph["findings"]["tokens"] == "none matters alone") == (kind == "OR")
    redundant = [data["redundant"] for _, end, data in circuit.edges(data=True) if end == "gate1"]
    assert redundant == [kind == "OR"] * 2


def test_adding_is_no_gate() -> None:
    """Two bits that add up do together what they do alone."""
    circuit = token_ablation(load_model("gate-add"), TASKS["gate-add"])
    assert gates(circuit) == []
    assert scores(circuit)["t1"] == pytest.approx(-0.5, abs=1e-5)
    assert circuit.graph["findings"]["interactions"] == "none that is strong and sure"


@pytest.mark.parametrize("how", ["remove", "knock-out"])
def test_induction_needs_the_earlier_word_and_its_successor(how: How) -> None:
    """``c f m o l c f m``: the earlier m and the o after it; all else may go."""
    model = load_model("hand-induction")
    task = Task.from_pair("c f m o l c f m", "c f p o l c f m", "o", "f")
    circuit = token_ablation(model, task, how=how)
    found = scores(circuit)
    gate = found.pop("gate1")
    assert {name for name, score in found.items() if abs(score) > 1e-4} == {"t3", "t4"}
    assert max(found["t3"], found["t4"], gate) < -9
    assert gates(circuit) == [("AND", ("t3", "t4"))]
    assert circuit.graph["findings"]["left out"].startswith("t8: it is read there")


def test_trained_induction_needs_them_too() -> None:
    """In the trained model they matter most; the query is the last token and may be replaced."""
    model = load_model("induction")
    task = TASKS["induction"].take(1)
    words = task.pairs[0].clean.split()
    earlier = 1 + words.index(words[-1])
    found = scores(token_ablation(model, task, how="knock-out", order=1))
    assert set(list(found)[:2]) == {f"t{earlier}", f"t{earlier + 1}"}
    found = scores(token_ablation(model, task, how="replace", order=1))
    assert set(list(found)[:3]) == {f"t{earlier}", f"t{earlier + 1}", f"t{len(words)}"}


@pytest.mark.parametrize(
    ("name", "clean", "corrupt", "answer", "wrong", "cue"),
    [
        ("hand-induction", "c f g d c f h c", "a f g d a f h c", "f", "g", (1, 5)),
        (
            "induction", "sun key rain bag owl sun key fan hat sun",
            "sun bed rain bag owl sun bed fan hat sun", "key", "hat", (1, 6),
        ),
    ],
)  # fmt: skip
def test_repeated_cue_is_an_or(
    name: str, clean: str, corrupt: str, answer: str, wrong: str, cue: tuple[int, int]
) -> None:
    """No token of two equal cues matters alone, one of each together do: the strongest is OR."""
    model = load_model(name)
    task = Task.from_pair(clean, corrupt, answer, wrong)
    circuit = token_ablation(model, task, how="knock-out")
    found = scores(circuit)
    strongest = circuit.nodes["gate1"]
    assert strongest["gate"] == "OR"
    first, second = sorted(int(member[1:]) for member in strongest["members"])
    assert first - cue[0] in (0, 1)
    assert second - cue[1] in (0, 1)
    assert found["gate1"] < -10
    copies = [place + step for place in cue for step in (0, 1)]
    assert max(abs(found[f"t{place}"]) for place in copies) < 0.15 * abs(found["gate1"])


def test_larger_sets_are_of_tokens_that_matter_in_pairs() -> None:
    """Tokens of two cues do nothing alone; it is they, not BOS, that sets of three are made of."""
    model = load_model("hand-induction")
    task = Task.from_pair("c f g d c f h c", "a f g d a f h c", "f", "g")
    pairs = model.encode(task)
    effects = token_effects(model, pairs, how="knock-out", order=4, top=4)
    larger = {subset for subset in effects.scores if len(subset) > 2}
    assert {position + 9 for subset in larger for position in subset} == {1, 2, 5, 6}
    assert len(larger) == 5


def test_three_cues_are_found_as_one_gate() -> None:
    """Of three copies any one suffices: neither one nor two of them matter, three do."""
    model = load_model("hand-induction")
    task = Task.from_pair("c f g c f h c f d c", "a f g a f h a f d c", "f", "g")
    circuit = token_ablation(model, task, how="knock-out", order=3, top=10)
    found = scores(circuit)
    assert max(abs(found[f"t{place}"]) for place in (1, 2, 4, 5, 7, 8)) < 0.1
    triples = [members for kind, members in gates(circuit) if kind == "OR" and len(members) == 3]
    assert ("t2", "t5", "t8") in triples
    name = next(n for n, d in circuit.nodes(data=True) if d.get("members") == ["t2", "t5", "t8"])
    assert scores(circuit)[name] < -9
    assert circuit.nodes[name]["interaction"] < 0
    assert sum(scores(circuit, name).values()) == pytest.approx(scores(circuit)[name])
    assert "any one suffices" in circuit.graph["findings"]["interactions"]


# --- the graph ------------------------------------------------------------------------------------


def test_positions_count_from_the_end_where_lengths_differ(model: TracedModel) -> None:
    """A mean is over the pairs that have the token; the heat map has no value elsewhere."""
    task = random_task([6, 3, 5])
    circuit = token_ablation(model, task, how="remove", order=1)
    effects = token_effects(model, model.encode(task), how="remove", order=1)
    found = scores(circuit)
    assert set(found) == {"t-6", "t-5", "t-4", "t-3", "t-2"}
    single = effects.scores
    assert found["t-6"] == pytest.approx(float(single[(-6,)][0]))
    assert found["t-5"] == pytest.approx(float(single[(-5,)][[0, 2]].mean()))
    assert circuit.edges["t-5", "logits", ""]["n_pairs"] == 2
    assert circuit.nodes["t-5"]["position"] == -5
    assert "t-1 is the last one" in circuit.graph["warnings"][0]
    heatmap = circuit.graph["plots"][0]
    assert heatmap["rows"] == ["pair 1", "pair 2", "pair 3"]
    assert [value is None for value in heatmap["values"][1]] == [True, True, True, False, False]
    assert heatmap["values"][2][1] == pytest.approx(float(single[(-5,)][2]))
    assert heatmap["notes"][0][0] == str(task.pairs[0].clean[0])


def test_tokens_are_labelled_by_their_text(model: TracedModel) -> None:
    """The text of all pairs, or the most frequent one and examples of the others."""
    pairs = [PromptPair((5, a, 7, 8), (5, a, 9, 8), (1,), (2,)) for a in (11, 12, 12, 13)]
    circuit = token_ablation(model, Task("t", tuple(pairs)), order=1)
    assert circuit.nodes["t0"]["token"] == "5"
    assert "tokens" not in circuit.nodes["t0"]
    assert circuit.nodes["t1"]["token"] == "12"
    assert set(circuit.nodes["t1"]["tokens"]) == {"11", "12", "13"}
    assert circuit.graph["plots"][0]["columns"] == ["t0 5", "t1", "t2 7", "t3 8"]


def test_circuit_is_complete_and_repeatable(model: TracedModel) -> None:
    """It is valid, plain JSON, has intervals around its scores, and depends on the seed alone."""
    task = random_task([5] * 8)

    def trace(seed: int) -> CircuitGraph:
        torch.manual_seed(seed)
        return token_ablation(model, task, order=3, draws=2)

    circuit = trace(0)
    circuit.validate()
    assert json.loads(circuit.to_json()) == json.loads(trace(0).to_json())
    assert scores(circuit) != scores(trace(1))
    for source, _, data in circuit.in_edges("logits", data=True):
        low, high = data["interval"]
        assert low < data["score"] < high
        assert circuit.nodes[source]["kind"] in ("token", "gate")
    assert circuit.graph["ablation"] == "replace by corrupt token, else 2 draws"
    for entry in circuit.graph["gates"]:
        assert len(entry["table"]) == 2 ** len(entry["members"])


def test_one_pair_has_no_interval_and_a_repeated_one_none_of_its_own(model: TracedModel) -> None:
    """A pair that is told twice is no second observation."""
    one, other = random_task([5, 5]).pairs
    for pairs in ((one,), (one, one)):
        circuit = token_ablation(model, Task("t", pairs), how="remove")
        intervals = [data["interval"] for *_, data in circuit.in_edges("logits", data=True)]
        assert set(intervals) == {None}
    twice = token_ablation(model, Task("t", (one, other, other)), how="remove")
    once = token_ablation(model, Task("t", (one, other)), how="remove")
    intervals = [c.edges["t0", "logits", ""]["interval"] for c in (once, twice)]
    assert intervals[0] == pytest.approx(intervals[1])


def test_weak_tokens_are_not_kept(model: TracedModel) -> None:
    """What changes less than a hundredth of the largest effect is measured and not drawn."""
    circuit = token_ablation(load_model("gate-and"), TASKS["gate-and"])
    kept = {s for s, _, d in circuit.edges(data=True) if d.get("kind") == "total" and d["kept"]}
    assert kept == {"t1", "t2"}


def test_mixed_roles_are_told() -> None:
    """In prompts of many patterns the strongest position is another one in each."""
    model = load_model("induction")
    circuit = token_ablation(model, TASKS["induction"].take(8), how="knock-out", order=1)
    assert any("tokens play other parts" in warning for warning in circuit.graph["warnings"])
    circuit = token_ablation(load_model("greater-than"), TASKS["greater-than"].take(8), order=1)
    assert circuit.graph["warnings"] == []


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"order": 5}, "--order is 5; give 1 to 4"),
        ({"order": 0}, "--order is 0; give 1 to 4"),
        ({"top": 0}, "--top is 0; give 1 or more"),
        ({"draws": 0}, "--draws is 0; give 1 or more"),
        ({"batch_size": 0}, "--batch-size is 0; give 1 or more"),
        ({"how": "remove", "replacement": "5"}, "use it with --how replace"),
        ({"replacement": "40"}, "ids run from 0 to 39"),
        ({"replacement": "word"}, "is text, but the model has no tokenizer"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model: TracedModel, options: dict[str, Any], fact: str
) -> None:
    """The message says what fits."""
    with pytest.raises(OptionError) as caught:
        token_ablation(model, random_task([4]), **options)
    assert fact in str(caught.value)


def test_replacement_is_one_token() -> None:
    """A word of the vocabulary, or its id; nothing that is several tokens or unknown."""
    model = load_model("gate-and")
    off = model.tokens(["off"]).ids[0, -1]
    for replacement in ("off", f"#{off}"):
        circuit = token_ablation(model, TASKS["gate-and"], replacement=replacement)
        assert scores(circuit)["t1"] == pytest.approx(-1, abs=1e-5)
        assert circuit.graph["ablation"] == f"replace by token {replacement}"
    for text, fact in (("on off", "is 2 tokens, not one"), ("maybe", "is not in the vocabulary")):
        with pytest.raises(OptionError, match=fact):
            token_ablation(model, TASKS["gate-and"], replacement=text)
    nothing = token_ablation(model, TASKS["gate-and"], replacement="=")
    assert nothing.graph["findings"]["left out"].startswith("t3: there is no other token")


def test_nothing_to_ablate_is_refused(model: TracedModel) -> None:
    """A prompt of one token cannot lose it; the only token there is has none to replace it by."""
    task = Task("t", (PromptPair((5,), (6,), (1,), (2,)),))
    for how in ("remove", "knock-out"):
        with pytest.raises(TaskError, match="no token can be"):
            token_ablation(model, task, how=how)
    assert set(scores(token_ablation(model, task))) == {"t0"}
    padded = Task("t", (PromptPair((5, 5), (5, 5, 5), (1,), (2,)),), align="pad")
    with pytest.raises(OptionError, match="name one with --replacement"):
        token_ablation(model, padded)
