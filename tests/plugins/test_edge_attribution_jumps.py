"""The adaptive path: ramps are resolved, jumps are found, owned and shared out exactly."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import oracles
import pytest
import torch
from circuitlab_edge_attribution import ig_path
from circuitlab_edge_attribution import jumps as jumps_module
from circuitlab_edge_attribution.attribution import EdgeScores, edge_scores
from random_tasks import random_task
from torch import Tensor, nn

from circuitlab import (
    Edge,
    EncodedTask,
    OptionError,
    PromptPair,
    Task,
    TracedModel,
    build_circuit,
    edge_effects,
    load_model,
    zoo,
)
from circuitlab.testing import tiny_model, toy_task
from circuitlab.zoo.compiling import compile_model


class JumpReLU(nn.Module):
    """x where x > threshold, else 0; one threshold per unit."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


class Step(nn.Module):
    """1 where x > 0, else 0: no gradient anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype) + 0 * x


class Ramp(nn.Module):
    """A step of the given width."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.width).clamp(0, 1)


def adaptive(model: TracedModel, pairs: EncodedTask, **options: Any) -> EdgeScores:
    return edge_scores(model, pairs, ig_rule="adaptive", **options)


def named(model: TracedModel, scores: Tensor) -> dict[Edge, float]:
    wiring = model.wiring
    columns = {tuple(receiver): n for n, receiver in enumerate(wiring.receivers)}
    return {e: float(scores[wiring.source_rows[e.source], columns[e[1:]]]) for e in wiring.edges}


# --- ramps ----------------------------------------------------------------------------------------

HALVES = {
    Edge("m0", "logits"): -1.0,
    Edge("a0.h0", "m0"): -0.5,
    Edge("a0.h1", "m0"): -0.5,
    Edge("input", "a0.h0", "v"): -0.5,
    Edge("input", "a0.h1", "v"): -0.5,
}


@pytest.mark.parametrize("name", ["gate-or", "gate-xor", "gate-jump"])
def test_ramp_of_a_gate_is_resolved(name: str) -> None:
    """The two bits share the gate's change equally, by symmetry, and the scores add up."""
    circuit = build_circuit(name, ig_rule="adaptive")
    assert circuit.graph["completeness"]["share"] == pytest.approx(1, abs=0.01)
    assert circuit.graph["jumps"] == []
    assert circuit.graph["method"] == "eap-ig, 5 steps, adaptive"
    for source, target, port, score in circuit.effects():
        assert score == pytest.approx(HALVES[Edge(source, target, port)], abs=0.005)
    assert circuit.number_of_edges() == len(HALVES)


def test_resolved_scores_are_judged_like_any() -> None:
    """The right circuit of XOR and of the jump is established; OR's edges do nothing alone."""
    for name in ("gate-xor", "gate-jump", "hand-induction"):
        circuit = build_circuit(name, ig_rule="adaptive")
        assert {e[:3] for e in circuit.effects()} == zoo.known_edges(name, sense="effective")
        assert circuit.graph["verdict"] == "established"
    blind = build_circuit("gate-or", ig_rule="adaptive")
    assert blind.graph["verdict"] == "not established"
    assert blind.graph["verdict_reason"] == "patching confirms only 33% of the strongest scores"


def test_smooth_model_needs_no_more_points() -> None:
    """Where midpoints suffice the scores are theirs; elsewhere the gap becomes small."""
    model = load_model((oracles.random_gpt2(layer_norm=False, mlp=False, seed=8), None))
    pairs = model.encode(random_task([1, 1, 1]))
    plain, added = edge_scores(model, pairs), adaptive(model, pairs)
    assert torch.allclose(plain.scores, added.scores, rtol=0, atol=1e-12)
    bent = load_model((oracles.random_gpt2(seed=9), None))
    pairs = bent.encode(random_task([5, 4, 5]))
    few = edge_scores(bent, pairs, ig_steps=2).completeness
    more = adaptive(bent, pairs, ig_steps=2)
    assert abs(few.gap) > 0.05 * abs(few.effect)
    assert abs(more.completeness.gap) < 0.02 * abs(few.gap)
    assert more.jumps == ()
    dense = edge_scores(bent, pairs, ig_steps=400)
    largest = float(dense.scores.abs().max())
    assert float((more.scores - dense.scores).abs().max()) < 0.02 * largest


def test_padding_and_batches_change_nothing() -> None:
    """Pairs are refined each for itself, whatever they are batched with."""
    model = load_model((oracles.random_gpt2(seed=4), None))
    pairs = model.encode(random_task([6, 3, 5], seed=4))
    one, two, all_ = (adaptive(model, pairs, ig_steps=2, batch_size=n) for n in (1, 2, 3))
    for other in (two, all_):
        assert torch.allclose(one.scores, other.scores, rtol=0, atol=1e-10)
        assert abs(one.completeness.at_clean - other.completeness.at_clean) < 1e-10


# --- jumps ----------------------------------------------------------------------------------------


def one_unit(threshold: float) -> tuple[TracedModel, EncodedTask]:
    """One MLP unit that reads 0.2 on the corrupt prompt and 2.0 on the clean one, and is the logit.

    Everything else is silent: the metric is JumpReLU of what the one unit reads.
    """
    module: Any = oracles.random_gpt2(n_layers=1, layer_norm=False)
    for parameter in module.parameters():
        parameter.data.zero_()
    block, gpt2 = module.transformer.h[0], module.transformer
    gpt2.wte.weight.data[3, 0], gpt2.wte.weight.data[4, 0] = 2.0, 0.2
    block.mlp.c_fc.weight.data[0, 0] = 1.0
    block.mlp.c_proj.weight.data[0, 1] = 1.0
    module.lm_head.weight.data[7, 1] = 1.0
    block.mlp.act = JumpReLU(torch.tensor(threshold, dtype=torch.float64))
    model = load_model((module, None))
    return model, model.encode(Task("one", (PromptPair((1, 3), (1, 4), (7,), (8,)),)))


def test_gap_of_a_jump_is_its_threshold_and_the_correction_closes_it() -> None:
    """Integrated gradients miss theta, exactly; corrected, the score is the exact effect."""
    model, pairs = one_unit(1.0)
    plain = edge_scores(model, pairs, ig_steps=90)
    # No point of 90 lies within rounding of the crossing at (1 - 0.2) / 1.8 = 40 / 90.
    assert plain.completeness.effect == pytest.approx(-2.0)
    assert plain.completeness.gap == pytest.approx(-1.0)
    found = adaptive(model, pairs)
    (jump,) = found.jumps or ()
    assert (jump.pair, jump.component, jump.shared) == (1, "m0", True)
    assert jump.alpha == pytest.approx(0.8 / 1.8, abs=2e-6)
    assert jump.size == pytest.approx(-1.0, abs=1e-5)
    edge = Edge("input", "m0")
    exact = float(edge_effects(model, pairs, [edge]).mean())
    assert exact == pytest.approx(-2.0)
    scores = named(model, found.scores)
    assert scores[edge] == pytest.approx(exact, abs=1e-5)
    assert abs(found.completeness.gap) < 1e-5
    relu = adaptive(*one_unit(0.0))
    assert relu.jumps == ()
    assert named(model, relu.scores)[edge] == pytest.approx(0.2 - 2.0, abs=1e-5)


def jumping(layer: int, seed: int) -> tuple[Any, TracedModel, EncodedTask]:
    """A random GPT-2 of two layers with norms, in which some units of one MLP jump by 0.3."""
    module: Any = oracles.random_gpt2(seed=seed)
    thresholds = torch.zeros(module.transformer.h[layer].mlp.c_fc.bias.shape[0])
    thresholds[::16] = 0.3
    module.transformer.h[layer].mlp.act = JumpReLU(thresholds.double())
    model = load_model((module, None))
    return module, model, model.encode(random_task([4], seed=seed))


def oracle_shares(module: Any, pairs: EncodedTask, alpha: float, layer: int) -> dict[Any, float]:
    """Each edge's part in what moves the jumping unit, by differentiating that unit's input."""
    ids = pairs.clean.ids
    start, end = (
        {k: v.detach() for k, v in oracles.run(module, i).outputs.items()}
        for i in (pairs.corrupt.ids, ids)
    )
    embedding = start["input"] + alpha * (end["input"] - start["input"])
    with torch.no_grad():
        plain = oracles.run(module, ids, embedding=embedding)
    pushes = {key: torch.zeros_like(value).requires_grad_() for key, value in plain.inputs.items()}
    run = oracles.run(module, ids, pushes=pushes, embedding=embedding)
    block = module.transformer.h[layer]
    units = block.mlp.c_fc(block.ln_2(run.inputs[f"m{layer}", ""]))[0, :, ::16]
    # The unit that jumps is the one that stands on its threshold.
    distance = (units.detach() - 0.3).abs()
    assert float(distance.min()) < 1e-5 < 1e-3 < float(distance.flatten().sort().values[1])
    gradients = torch.autograd.grad(
        units.flatten()[distance.argmin()], list(pushes.values()), materialize_grads=True
    )
    slope = dict(zip(pushes, gradients, strict=True))
    parts = {
        (s, t, p): float(((start[s] - end[s]) * slope[t, p]).sum())
        for s, t, p in oracles.edges_of(module)
    }
    whole = math.fsum(part for (source, _, _), part in parts.items() if source == "input")
    return {edge: part / whole for edge, part in parts.items()}


@pytest.mark.parametrize(("layer", "seed"), [(0, 3), (0, 9), (1, 3), (1, 4)])
def test_jump_of_a_real_model_is_found_and_shared_out(
    layer: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the MLP that has it; the scores differ from the gradient's by size times the shares."""
    monkeypatch.setattr(ig_path, "TOLERANCE", 1e-3)
    monkeypatch.setattr(ig_path, "EXTRA", 4096)
    module, model, pairs = jumping(layer, seed)
    found = adaptive(model, pairs)
    jumps = found.jumps or ()
    assert jumps
    assert abs(found.completeness.gap) < 0.02 * abs(found.completeness.effect)
    missed = math.fsum(abs(jump.size) for jump in jumps)
    assert missed > 0.05 * abs(found.completeness.effect)
    for jump in jumps:
        assert jump.component == f"m{layer}"
        assert jump.shared
        sides = [metric_at(module, pairs, jump.alpha + side) for side in (-2e-6, 2e-6)]
        assert jump.size == pytest.approx(sides[0] - sides[1], abs=1e-3)
    expected = dict.fromkeys(named(model, found.scores), 0.0)
    for jump in jumps:
        for edge, share in oracle_shares(module, pairs, jump.alpha, layer).items():
            expected[Edge(*edge)] += jump.size * share
    monkeypatch.setattr(jumps_module, "MOST_EDGES", 0)
    without = adaptive(model, pairs)
    assert [jump.shared for jump in without.jumps or ()] == [False] * len(jumps)
    owed = named(model, found.scores - without.scores)
    largest = max(map(abs, expected.values()))
    for edge, value in expected.items():
        assert owed[edge] == pytest.approx(value, abs=2e-3 * largest), edge


@torch.no_grad()
def metric_at(module: Any, pairs: EncodedTask, alpha: float) -> float:
    clean, corrupt = (
        oracles.run(module, ids).outputs["input"] for ids in (pairs.clean.ids, pairs.corrupt.ids)
    )
    embedding = corrupt + alpha * (clean - corrupt)
    logits = oracles.run(module, pairs.clean.ids, embedding=embedding).logits[:, -1]
    return float(pairs.score(logits, logits))


def test_jump_is_the_limit_of_a_ramp() -> None:
    """Ever steeper ramps, which gradients resolve, have scores that go to the step's."""

    def scores(act: nn.Module) -> EdgeScores:
        module: Any = oracles.random_gpt2(seed=6)
        mlp = module.transformer.h[1].mlp
        mlp.c_fc.weight.data[:, 1:] = 0  # one unit alone
        mlp.act = act
        model = load_model((module, None))
        return adaptive(model, model.encode(random_task([4], seed=7)))

    step = scores(Step())
    assert {jump.component for jump in step.jumps or ()} == {"m1"}
    assert all(jump.shared for jump in step.jumps or ())
    largest = float(step.scores.abs().max())
    errors = []
    for width in (1e-1, 1e-2, 1e-3):
        ramp = scores(Ramp(width))
        assert ramp.jumps == ()
        errors.append(float((ramp.scores - step.scores).abs().max()) / largest)
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 0.02


def test_step_gate_has_two_equal_sources() -> None:
    """gate-jump with a true step: no gradient at all, and the same scores as its ramp's."""
    module, tokenizer = compile_model("gate-jump")
    mlp: Any = module.transformer.h[0].mlp
    mlp.c_fc.weight.data[:, 1] = 0  # without the second ReLU, which ends the ramp
    mlp.c_fc.bias.data[1] = -1.0
    mlp.act = Step()
    model = load_model((module, tokenizer))
    task = next(task for task in zoo.tasks() if task.name == "gate-jump")
    circuit = build_circuit(model, task, ig_rule="adaptive")
    (jump,) = circuit.graph["jumps"]
    assert (jump["component"], jump["shared"], jump["pair"]) == ("m0", True, 1)
    assert jump["alpha"] == pytest.approx(1.57 / 2, abs=1e-5)
    assert jump["size"] == pytest.approx(-1.0)
    for source, target, port, score in circuit.effects():
        assert score == pytest.approx(HALVES[Edge(source, target, port)], abs=1e-3)
    assert circuit.graph["verdict"] == "established"
    plain = build_circuit(model, task)
    assert plain.graph["completeness"]["explained"] == 0
    assert "jumps" not in plain.graph


def test_jump_of_a_head_is_reported_and_shared_with_nobody() -> None:
    """A softmax too sharp to resolve is a jump at its head; the circuit says what is missing."""
    module, tokenizer = compile_model("hand-induction")
    attention: Any = module.transformer.h[1].attn.c_attn
    attention.weight.data[:, : 2 * module.config.n_embd] *= 300
    model = load_model((module, tokenizer))
    task = next(task for task in zoo.tasks() if task.name == "hand-induction").take(2)
    circuit = build_circuit(model, task, ig_rule="adaptive", allow_weak=True)
    jumps = circuit.graph["jumps"]
    assert {jump["component"] for jump in jumps} == {"a1.h0"}
    assert {jump["pair"] for jump in jumps} == {1, 2}
    assert not any(jump["shared"] for jump in jumps)
    (warning,) = [text for text in circuit.graph["warnings"] if "jumps of the metric" in text]
    assert "at a1.h0, belong to no edge's score" in warning
    assert circuit.graph["verdict"] == "not established"
    exact = build_circuit(
        model, task, ig_rule="adaptive", allow_weak=True, fall_back="exact"
    )  # the remedy
    assert exact.graph["verdict"] == "established by exact patching"


def test_jump_that_cannot_be_shared_is_reason_enough_to_fall_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the effect is explained and confirmed, and yet the scores lack the other half."""
    monkeypatch.setattr(jumps_module, "MOST_EDGES", 0)
    model, _ = one_unit(1.0)
    task = Task("one", (PromptPair((1, 3), (1, 4), (7,), (8,)),))
    lacking, exact = (
        build_circuit(model, task, ig_rule="adaptive", fall_back=word) for word in ("none", "exact")
    )
    assert lacking.graph["verdict"] == "established"
    assert lacking.edges["input", "m0", ""]["score"] == pytest.approx(-1.0, abs=1e-5)
    assert exact.edges["input", "m0", ""]["score"] == pytest.approx(-2.0, abs=1e-5)
    assert exact.graph["fall_back"]["reason"] == "jumps belong to no edge's score"
    assert exact.graph["verdict"] == "established by exact patching"


def test_points_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a pair's points are used up its gap stays, and the circuit says so; more steps help."""
    monkeypatch.setattr(ig_path, "EXTRA", 16)
    few = build_circuit("gate-jump", ig_rule="adaptive")
    assert few.graph["jumps"] == []
    assert few.graph["completeness"]["share"] < 0.1
    (warning,) = [text for text in few.graph["warnings"] if "adaptive" in text]
    assert "more bends and jumps than its points resolve, pairs: 1" in warning
    many = build_circuit("gate-jump", ig_rule="adaptive", ig_steps=400)
    assert many.graph["completeness"]["share"] == pytest.approx(1, abs=0.02)
    monkeypatch.undo()
    enough = build_circuit("gate-jump", ig_rule="adaptive")
    assert not any("adaptive" in text for text in enough.graph["warnings"])


# --- refusals -------------------------------------------------------------------------------------


def test_adaptive_needs_a_path_and_fine_steps() -> None:
    """EAP has no path; half precision cannot take small steps along it."""
    with pytest.raises(OptionError, match="method eap has none; use --method eap-ig"):
        build_circuit("gate-add", method="eap", ig_rule="adaptive")
    module: Any = tiny_model()._module
    half = load_model((module.to(torch.bfloat16), None))
    with pytest.raises(OptionError, match="bfloat16 does not resolve; run in a wider type"):
        build_circuit(half, toy_task(), ig_rule="adaptive", allow_weak=True)
