"""The analysis of heads: compiled and trained models, cuts, effects by brute force, panels."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
from circuitlab_attention_heads.composing import attention_heads, rank_correlation
from circuitlab_attention_heads.composition import compositions
from circuitlab_attention_heads.copying import copied_share, copying
from circuitlab_attention_heads.shared_directions import shared_directions
from families import family_model
from random_tasks import random_task

from circuitlab import (
    CircuitGraph,
    OptionError,
    TaskError,
    TracedModel,
    build_circuit,
    load_model,
    zoo,
)
from circuitlab.testing import check_analysis

TASKS = {task.name: task for task in zoo.tasks()}


def random_model(
    n_layers: int = 3, n_heads: int = 2, d_model: int = 16, vocab: int = 40
) -> tuple[Any, TracedModel]:
    module = oracles.random_gpt2(n_layers, n_heads, d_model, vocab=vocab).requires_grad_(False)
    return module, load_model((module, None))


def scores_of(circuit: CircuitGraph) -> dict[tuple[str, str, str], float]:
    return {(s, t, p): score for s, t, p, score in circuit.effects()}


def panel(circuit: CircuitGraph, title: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [p for p in circuit.graph["plots"] if p["title"] == title]
    assert len(found) == 1
    return found[0]


# --- known models ---------------------------------------------------------------------------------


def test_compiled_heads_compose_only_where_they_are_wired() -> None:
    """In the induction head that is written down, one wire joins two heads: through the key."""
    circuit = attention_heads(load_model("hand-induction"), top="all")
    scores = scores_of(circuit)
    assert {edge for edge, score in scores.items() if score} == {("a0.h0", "a1.h0", "k")}
    assert set(scores) == {("a0.h0", "a1.h0", port) for port in "qkv"}
    assert circuit.nodes["a0.h0"]["role"] == "previous-token"
    assert circuit.nodes["a1.h0"]["role"] == "induction"
    assert circuit.nodes["a1.h0"]["copying"] == pytest.approx(1, abs=1e-6)
    # Of 19 tokens 16 are words; the three special ones are read by no head.
    assert circuit.nodes["a1.h0"]["copied"] == 16 / 19
    assert "copying" not in circuit.nodes["a0.h0"]
    kept = attention_heads(load_model("hand-induction"))
    assert list(scores_of(kept)) == [("a0.h0", "a1.h0", "k")]
    assert kept.graph["findings"]["Q-composition"].startswith("none")


def test_trained_induction_heads_read_the_previous_token_head_through_their_keys() -> None:
    """Of all heads that write to their keys it is first, well above chance, and matters most."""
    circuit = attention_heads(load_model("induction"), TASKS["induction"], top="all", effects=True)
    roles = {name: data.get("role") for name, data in circuit.nodes(data=True)}
    before = [name for name, role in roles.items() if role == "previous-token"]
    after = [name for name, role in roles.items() if role == "induction"]
    assert len(before) == 1
    assert len(after) == 4
    scores = scores_of(circuit)
    keys = [edge for edge in scores if edge[2] == "k"]
    wires = [(before[0], name, "k") for name in after]
    assert set(keys[:4]) == set(wires)
    assert min(scores[wire] for wire in wires) > 1.8
    assert min(circuit.edges[wire]["z"] for wire in wires) > 10
    exact = {edge: circuit.edges[edge]["exact"] for edge in keys}
    assert set(sorted(keys, key=exact.__getitem__)[:4]) == set(wires)
    assert circuit.graph["agreement"]["k"]["rank_correlation"] > 0.4
    assert all(circuit.nodes[name]["copying"] > 0.85 for name in after)


# --- what is in the circuit -----------------------------------------------------------------------


def test_edges_and_nodes_hold_what_was_computed() -> None:
    """Scores, raw scores, z, scores without shared directions, copying and norms."""
    _, model = random_model(vocab=300)
    task = random_task([6, 4])
    torch.manual_seed(5)
    circuit = attention_heads(model, task, top="all", remove_directions=2, roles=False)
    found = compositions(model)
    directions, share = shared_directions(model, model.encode(task), 2)
    without = compositions(model, directions=directions)
    assert circuit.number_of_edges() == circuit.graph["composition"]["n_pairs"] == 36
    assert circuit.graph["n_edges_total"] == 36
    for source, target, port, data in circuit.edges(keys=True, data=True):
        (l1, h1), (l2, h2) = (
            (circuit.nodes[n]["layer"], circuit.nodes[n]["head"]) for n in (source, target)
        )
        at = (2 * l1 + h1, 2 * l2 + h2)
        assert data["score"] == float(found.times_chance(port)[at])
        assert data["composition"] == float(found.raw[port][at])
        assert data["z"] == float(found.z[port][at])
        assert data["without_shared"] == float(without.times_chance(port)[at])
    scores = copying(model).scores
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    shares, others = (copied_share(model, heads, top=5, seed=seed).tolist() for seed in (5, 0))
    assert shares != others
    for row, (layer, head) in enumerate(heads):
        data = circuit.nodes[f"a{layer}.h{head}"]
        assert (data["kind"], data["layer"], data["head"]) == ("head", layer, head)
        assert data["copying"] == float(scores[layer, head])
        assert data["copied"] == shares[row]
        assert data["ov_norm"] == float(found.ov_norms[row])
        assert data["qk_norm"] == float(found.qk_norms[row])
        assert "role_scores" not in data
    assert circuit.graph["shared_directions"]["share"] == share
    assert circuit.graph["composition"]["chance"] == pytest.approx(15**-0.5)
    assert circuit.graph["copied"] == {"top": 5, "n_tokens": 256, "chance": 5 / 300}


def test_effects_are_those_of_brute_force() -> None:
    """Each kept edge has its exact effect, one hooked pass per edge, and the two are compared."""
    module, model = random_model(2)
    task = random_task([6, 6, 6])
    circuit = attention_heads(model, task, effects=True, roles=False, batch_size=2)
    pairs = model.encode(task)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return pairs.score(logits, logits).double()

    edges = list(scores_of(circuit))
    assert len(edges) == 12
    expected = oracles.exact_effects(module, pairs.clean.ids, pairs.corrupt.ids, metric, edges)
    for edge in edges:
        data = circuit.edges[edge]
        assert data["exact"] == pytest.approx(expected[edge], abs=1e-9)
        assert data["interval"][0] <= data["exact"] <= data["interval"][1]
    scores = [circuit.edges[edge]["score"] for edge in edges]
    value = rank_correlation(scores, [abs(expected[edge]) for edge in edges])
    assert circuit.graph["agreement"]["all"] == {"rank_correlation": value, "n_edges": 12}
    points = panel(circuit, "weights and behaviour")["points"]
    assert {(p["x"], p["y"]) for p in points} == {
        (data["score"], data["exact"]) for *_, data in circuit.edges(data=True)
    }


def test_rank_correlation() -> None:
    """Spearman's: ties share their ranks, order alone counts, nothing from nothing."""
    assert rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / 22.5**0.5)
    assert rank_correlation([1, 2, 3], [1e3, 1e6, 1e9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 2, 3], [7, 7, 7]) is None


def test_top_and_threshold_cut_by_score() -> None:
    """What is kept is the strongest, and heads without a kept edge are left out."""
    _, model = random_model()
    every = list(attention_heads(model, top="all", roles=False).effects())
    assert all(a[3] >= b[3] for a, b in pairwise(every))
    assert list(attention_heads(model, top=5, roles=False).effects()) == every[:5]
    least = (every[8][3] + every[9][3]) / 2
    for top, n in (("all", 9), (40, 9), (3, 3)):
        circuit = attention_heads(model, top=top, threshold=least, roles=False)
        assert list(circuit.effects()) == every[:n]
        assert set(circuit) == {end for edge in every[:n] for end in edge[:2]}
    only = attention_heads(model, ports="k", top="all", roles=False)
    assert list(only.effects()) == [edge for edge in every if edge[2] == "k"]
    assert attention_heads(model, top=0, roles=False).number_of_nodes() == 0


def test_ties_at_the_cut_are_told() -> None:
    """Two readers with the same weights score the same; which is kept is said to be chance."""
    module, _ = random_model(2)
    attention, width = module.transformer.h[1].attn, 8
    for start in (0, 16, 32):
        weight = attention.c_attn.weight[:, start : start + width]
        attention.c_attn.weight[:, start + width : start + 2 * width] = weight
    circuit = attention_heads(load_model((module, None)), ports="q", top=1, roles=False)
    assert circuit.number_of_edges() == 1
    assert "2 edges tie at the cut" in circuit.graph["warnings"][0]


def test_heads_with_a_role_stay_without_an_edge() -> None:
    """Roles alone bring a head in, at the threshold that is asked for."""
    model = load_model("induction")
    circuit = attention_heads(model, top=0)
    assert circuit.number_of_edges() == 0
    assert {data["role"] for _, data in circuit.nodes(data=True)} >= {"induction"}
    fewer = attention_heads(model, top=0, role_threshold=0.95)
    assert 0 < fewer.number_of_nodes() < circuit.number_of_nodes()


# --- without a task, other models -----------------------------------------------------------------


def test_no_task_is_needed() -> None:
    """Weights and random tokens are enough; what runs prompts says that it needs some."""
    _, model = random_model()
    circuit = build_circuit(model, None, "attention-heads")
    assert circuit.number_of_edges() == 36
    assert "baseline" not in circuit.graph
    with pytest.raises(TaskError, match=r"--remove-directions and --effects run .* name one"):
        build_circuit(model, None, "attention-heads", remove_directions=1, effects=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": -1}, "--top -1"),
        ({"threshold": -0.5}, "--threshold -0.5"),
        ({"remove_directions": -1}, "--remove-directions -1"),
        ({"remove_directions": 16}, "--remove-directions 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    """Out of range is refused, with what is in range."""
    _, model = random_model()
    with pytest.raises(OptionError, match=message):
        attention_heads(model, random_task([6, 4]), roles=False, **options)


def test_one_layer_composes_nothing() -> None:
    """A model of one layer has copying, and a warning in place of edges."""
    circuit = attention_heads(load_model("gate-and"), roles=False)
    assert circuit.number_of_edges() == 0
    assert "nothing to compose" in circuit.graph["warnings"][0]
    assert "copying" in circuit.graph["findings"]


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_other_families(family: str) -> None:
    """Shared keys, rotary embeddings, RMSNorm and parallel blocks pass through, and it is said."""
    model = family_model(family)
    torch.manual_seed(0)
    circuit = attention_heads(model, random_task([6, 4]), remove_directions=2)
    assert circuit.number_of_edges() == 40
    assert circuit.graph["composition"]["n_pairs"] == 48
    assert circuit.graph["composition"]["dimensions"] == 16 - (family == "neox")
    assert "rotary embeddings at distance 0" in circuit.graph["method"]


def test_contract_with_every_option() -> None:
    """The conformance kit, with effects and without shared directions."""
    options = {"effects": True, "remove_directions": 3, "role_threshold": 0.3}
    circuit = check_analysis("attention-heads", options=options)
    assert all("exact" in data for *_, data in circuit.edges(data=True))


# --- panels ---------------------------------------------------------------------------------------


def test_panels_show_what_was_measured() -> None:
    """Heat maps by port, copying by layer and head, eigenvalues / the largest of each head."""
    _, model = random_model()
    circuit = attention_heads(model, top="all", roles=False)
    scores = scores_of(circuit)
    for port in "qkv":
        shown = panel(circuit, f"{port.upper()}-composition")
        assert shown["rows"] == ["a0.h0", "a0.h1", "a1.h0", "a1.h1"]
        assert shown["columns"] == ["a1.h0", "a1.h1", "a2.h0", "a2.h1"]
        for source, row in zip(shown["rows"], shown["values"], strict=True):
            for target, value in zip(shown["columns"], row, strict=True):
                assert value == scores.get((source, target, port))
    table = copying(model)
    assert panel(circuit, "copying")["values"] == table.scores.tolist()
    points = panel(circuit, "eigenvalues of OV circuits")["points"]
    assert len(points) == 6 * 8
    for name in {point["kind"] for point in points}:
        own = [abs(complex(p["x"], p["y"])) for p in points if p["kind"] == name]
        assert max(own) == pytest.approx(1)


def test_heat_maps_of_many_heads_show_the_strongest() -> None:
    """Of more than 40 writers or readers those with the largest scores, in forward order."""
    _, model = random_model(2, 48, 48)
    circuit = attention_heads(model, ports="v", top="all", roles=False)
    shown = panel(circuit, "V-composition")
    assert len(shown["rows"]) == len(shown["columns"]) == 40
    assert "At most 40" in shown["caption"]
    scores = scores_of(circuit)
    best = {name: max(v for (s, *_), v in scores.items() if s == name) for name in shown["rows"]}
    assert list(best) == sorted(best, key=lambda name: int(name.removeprefix("a0.h")))
    left_out = {source for source, *_ in scores} - set(best)
    assert max(v for (s, *_), v in scores.items() if s in left_out) <= min(best.values())
    assert all(math.isfinite(value) for row in shown["values"] for value in row)
