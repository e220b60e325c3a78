"""The fall-back: circuits rebuilt from exact effects, and held against two joint patches."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
from circuitlab_edge_attribution import fall_back
from circuitlab_edge_attribution.attribution import edge_scores
from circuitlab_edge_attribution.fall_back import exact_circuit, joint_shares
from torch import Tensor

from circuitlab import (
    CircuitGraph,
    Edge,
    EncodedTask,
    TracedModel,
    build_circuit,
    circuit_of,
    load_model,
    zoo,
)
from circuitlab.testing import tiny_model, toy_task
from circuitlab.zoo.hand import GATES


def task_of(name: str) -> Any:
    return next(task for task in zoo.tasks() if task.name == name)


def loaded(name: str, n_pairs: int = 4) -> tuple[Any, TracedModel, EncodedTask]:
    module, _ = zoo.load(name)
    model = load_model(name)
    return module, model, model.encode(task_of(name).take(n_pairs))


@pytest.mark.parametrize("name", ["gate-xor", "gate-jump", "hand-induction"])
def test_exact_effects_find_what_gradients_miss(name: str) -> None:
    """The known edges with their exact effects, established by the joint patches too."""
    circuit = build_circuit(name, fall_back="exact")
    assert {effect[:3] for effect in circuit.effects()} == zoo.known_edges(name, sense="effective")
    assert circuit.graph["verdict"] == "established by exact patching"
    assert "verdict_reason" not in circuit.graph
    assert circuit.graph["fall_back"]["reason"].startswith("the scores explain ")
    assert circuit.graph["fall_back"]["patched"] == circuit.graph["n_edges_total"]
    assert circuit.graph["method"].startswith("exact patching of ")
    assert circuit.graph["joint_check"]["removed"] == pytest.approx(1, abs=1e-3)
    assert circuit.graph["joint_check"]["spared"] == pytest.approx(1, abs=1e-3)
    # What gradients said is still told.
    assert circuit.graph["completeness"]["share"] < 0.5
    if name in GATES:
        alone = {"gate-xor": -0.5, "gate-jump": -1.0}[name]
        for source, _, _, score in circuit.effects():
            assert score == pytest.approx(-1.0 if source == "m0" else alone, abs=1e-5)


def test_either_of_two_edges_stays_unknown_to_single_ones() -> None:
    """In gate-or no bit does anything alone: with all others patched nothing is left."""
    circuit = build_circuit("gate-or", fall_back="exact")
    assert {effect[:3] for effect in circuit.effects()} == {("m0", "logits", "")}
    assert circuit.graph["joint_check"] == pytest.approx({"removed": 1.0, "spared": 0.0}, abs=1e-5)
    assert circuit.graph["verdict"] == "not established"
    reason = circuit.graph["verdict_reason"]
    assert "with all other edges patched 0% of the effect is left" in reason
    assert reason.endswith("run circuitlab trace path-patching --mode both --gates")
    remedy = build_circuit("gate-or", analysis="path-patching", mode="both", gates=True)
    bits = {("a0.h0", "m0", ""), ("a0.h1", "m0", "")}
    assert bits <= {effect[:3] for effect in remedy.effects()}


def test_sound_scores_are_left_alone() -> None:
    """Where the scores pass, the option changes nothing; without it failures are only told."""
    plain, asked = (build_circuit("gate-add", fall_back=word) for word in ("none", "exact"))
    assert "fall_back" not in asked.graph
    assert list(plain.effects()) == list(asked.effects())
    assert "fall_back" not in build_circuit("gate-jump").graph


def test_joint_shares_are_brute_force() -> None:
    """Both shares equal those of an oracle that patches the sets of edges in one forward pass."""
    module, model, pairs = loaded("ioi-mini")
    circuit = circuit_of(model.wiring, edge_scores(model, pairs).scores, top=30)
    inside = {Edge(*effect[:3]) for effect in circuit.effects()}
    mask = pairs.clean.mask.long()

    def metric(logits: Tensor) -> Tensor:
        return pairs.score(logits, logits)

    def patched(edges: set[Edge]) -> float:
        found = oracles.patched_metric(
            module, pairs.clean.ids, pairs.corrupt.ids, metric, edges, attention_mask=mask
        )
        return float(found.mean())

    every = set(model.wiring.edges)
    clean, corrupt = patched(set()), patched(every)
    removed, spared = joint_shares(circuit, model, pairs, "counterfactual", None)
    effect = corrupt - clean
    assert removed == pytest.approx((patched(inside) - clean) / effect, abs=1e-4)
    assert spared == pytest.approx(1 - (patched(every - inside) - clean) / effect, abs=1e-4)


def failing(model: TracedModel, pairs: EncodedTask) -> tuple[CircuitGraph, Tensor]:
    scores = edge_scores(model, pairs).scores
    circuit = circuit_of(model.wiring, scores)
    circuit.graph.update(verdict="not established", verdict_reason="a test", method="eap-ig")
    return circuit, scores


def test_candidates_where_not_all_edges_are_affordable() -> None:
    """Half by score, half between strong components; what was not patched is not in the circuit."""
    module, model, pairs = loaded("ioi-mini")
    failed, scores = failing(model, pairs)
    work = len(pairs) * pairs.clean.ids.shape[1] * model.n_parameters
    circuit = exact_circuit(
        failed, model, pairs, scores, ablation="counterfactual", top="all", threshold=None,
        batch_size=None, affordable=40.5 * work,
    )  # fmt: skip
    assert circuit.number_of_edges() == circuit.graph["fall_back"]["patched"] == 40
    (warning,) = circuit.graph["warnings"]
    assert warning.startswith("222 of 262 edges were not patched and are not in the circuit")
    strongest = {effect[:3] for effect in failed.top(20).effects()}
    kept = {effect[:3] for effect in circuit.effects()}
    assert strongest <= kept
    exact = oracles.exact_effects(
        module, pairs.clean.ids, pairs.corrupt.ids, lambda logits: pairs.score(logits, logits),
        kept, attention_mask=pairs.clean.mask.long(),
    )  # fmt: skip
    for source, target, port, score in circuit.effects():
        assert score == pytest.approx(exact[source, target, port], abs=1e-3)
    nodes = node_oracle(module, model, pairs)
    nodes["logits"] = float("inf")
    others = sorted(
        (min(nodes[e.source], nodes[e.target]) for e in set(model.wiring.edges) - strongest),
        reverse=True,
    )
    chosen = sorted((min(nodes[s], nodes[t]) for s, t, _ in kept - strongest), reverse=True)
    assert chosen == pytest.approx(others[: len(chosen)], abs=1e-3)


def node_oracle(module: Any, model: TracedModel, pairs: EncodedTask) -> dict[str, float]:
    """Absolute effect of a component: all its edges patched at once."""
    mask = pairs.clean.mask.long()

    def metric(logits: Tensor) -> Tensor:
        return pairs.score(logits, logits)

    def patched(source: str) -> float:
        edges = [edge for edge in model.wiring.edges if edge.source == source]
        found = oracles.patched_metric(
            module, pairs.clean.ids, pairs.corrupt.ids, metric, edges, attention_mask=mask
        )
        return float(found.mean())

    clean = patched("")
    return {source: abs(patched(source) - clean) for source in model.wiring.sources}


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations_fall_back_too(ablation: str) -> None:
    """The effect is then that of the ablated input, and both shares are of it."""
    model = load_model(tiny_model())
    pairs = model.encode(toy_task())
    failed, scores = failing(model, pairs)
    circuit = exact_circuit(
        failed, model, pairs, scores, ablation=ablation, top=5, threshold=None, batch_size=2
    )  # type: ignore[arg-type]
    assert circuit.number_of_edges() == 5
    assert set(circuit.graph["joint_check"]) == {"removed", "spared"}
    # All edges patched do what ablating the input does; nothing patched spares everything.
    whole = circuit_of(model.wiring, scores, top="all")
    everything = joint_shares(whole, model, pairs, ablation, None)  # type: ignore[arg-type]
    assert everything[1] == pytest.approx(1.0)


def test_a_threshold_of_the_joint_check_is_fixed() -> None:
    """Half of the effect, as for the scores."""
    assert fall_back.LEAST_JOINT == 0.5


def test_screen_says_what_was_done(lab: Any) -> None:
    """What patching showed, the fall-back and the joint check, each on a line."""
    done = lab("trace", "--model", "gate-jump", "--fall-back", "exact")
    assert done.code == 0
    lines = dict(line.split(": ", 1) for line in done.out.splitlines() if ": " in line)
    assert lines["agreement"].startswith("by 13 patched edges, sign right for 20% of edges, ")
    assert lines["missed edges"].startswith("4 of 12 outside the circuit do as much as its ")
    assert lines["fall-back"].startswith("scores failed (the scores explain 0% of the effect); ")
    assert lines["joint check"] == (
        "patching the circuit removes 100% of the effect, patching all other edges leaves 100%"
    )
    assert lines["circuit"] == "established by exact patching"
    resolved = lab("trace", "--model", "gate-jump", "--ig-rule", "adaptive", "--json")
    assert resolved.json["provenance"]["jumps"] == []
    assert "13 of 13 edges in 13 runs" in done.err
