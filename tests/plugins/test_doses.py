"""Dose–response: every dose against brute force, curves of known gates, and words for curves."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import oracles
import path_oracles
import pytest
import torch
from circuitlab_path_patching.doses import dose_response, response
from path_scores import TOLERANCES, Brute, gap, padded_pairs, small_model
from random_tasks import random_task

from circuitlab import CircuitGraph, OptionError, Task, TaskError, load_model, write_circuit, zoo
from circuitlab.testing import check_analysis

TASKS = {task.name: task for task in zoo.tasks()}
MODES = ("noise", "denoise")
GRID = [i / 10 for i in range(11)]


def curves(circuit: CircuitGraph) -> dict[tuple[str, str], dict[str, Any]]:
    return {(curve["node"], curve["mode"]): curve for curve in circuit.graph["doses"]["curves"]}


def gate(name: str, **options: Any) -> CircuitGraph:
    return dose_response(load_model(name), TASKS[name], **{"top": "all", "steps": 11} | options)


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mode"), [*product(TOLERANCES, MODES)], ids="-".join)
def test_each_dose_is_that_of_brute_force(family: str, mode: Any) -> None:
    """A source writes base + α (other - base) in a stock model under hooks, for every α."""
    module, model = small_model(family)
    task = random_task([6, 4, 3])
    pairs = model.encode(task)
    brute = Brute(module, pairs, mode)
    circuit = dose_response(
        model, task, mode=mode, low=-0.5, high=1.5, steps=5, top="all", batch_size=2
    )
    assert circuit.graph["doses"]["alphas"] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    found = curves(circuit)
    assert {name for name, _ in found} == set(model.wiring.sources)
    for source, number in product(model.wiring.sources, range(5)):
        base, other = brute.run.base.outputs[source], brute.run.other[source]
        alpha = circuit.graph["doses"]["alphas"][number]
        logits = brute.run.run(writes={source: base + alpha * (other - base)}).logits
        expected = brute.effect(logits).mean()
        assert abs(found[source, mode]["mean"][number] - expected) < TOLERANCES[family]


def test_positions_and_ablations_are_dosed_too() -> None:
    """One position at half of its mean."""
    module, model = small_model("gpt2")
    task = random_task([5, 5])
    pairs = model.encode(task)
    brute = Brute(module, pairs, "noise", "mean")
    circuit = dose_response(
        model, task, mode="noise", ablation="mean", positions=True, senders="m0", steps=3
    )
    where = torch.arange(5).expand(2, 5) == 2
    base, other = brute.run.base.outputs["m0"], brute.run.other["m0"]
    value = torch.where(where[..., None], base + 0.5 * (other - base), base)
    expected = brute.effect(brute.run.run(writes={"m0": value}).logits).mean()
    assert abs(curves(circuit)["m0[2]", "noise"]["mean"][1] - expected) < 1e-9


def test_a_full_dose_is_an_ordinary_patch() -> None:
    """Scores are those of patched nodes, the larger of two modes, and the curve ends there."""
    module, model = small_model("gpt2")
    task = random_task([6, 4, 3])
    pairs = padded_pairs(model)
    circuit = dose_response(model, task, steps=3, top="all")
    brutes = {mode: Brute(module, pairs, mode) for mode in MODES}
    for source in model.wiring.sources:
        full = {
            mode: float(b.effect(path_oracles.patched_node(b.run, source)).mean())
            for mode, b in brutes.items()
        }
        most = max(full, key=lambda mode: abs(full[mode]))
        node = circuit.nodes[source]
        assert node["score"] == pytest.approx(full[most], abs=1e-9)
        assert node["dose_mode"] == most
        found = curves(circuit)[source, most]
        assert found["mean"][-1] == pytest.approx(full[most], abs=1e-9)
        assert {k: node[k] for k in ("slope", "threshold", "shape")} == {
            k: found[k] for k in ("slope", "threshold", "shape")
        }
        data = circuit.edges[source, "logits", ""]
        assert (data["kind"], data["score"]) == ("total", node["score"])


def test_without_norms_the_direct_effect_is_linear() -> None:
    """The last MLP only reaches linear logits: each curve is its chord, beyond 0 and 1 too."""
    module = oracles.random_gpt2(2, 2, 16, layer_norm=False, seed=4)
    model = load_model((module, None))
    circuit = dose_response(
        model, random_task([5, 5, 5]), senders="m1", low=-1, high=2, steps=7, mode="noise"
    )
    (curve,) = circuit.graph["doses"]["curves"]
    alphas = torch.tensor(circuit.graph["doses"]["alphas"])
    full = circuit.nodes["m1"]["score"]
    assert gap(torch.tensor(curve["mean"]), full * alphas) < 1e-6 * abs(full)
    assert abs(full) > 1e-3
    assert (curve["shape"], curve["threshold"]) == ("linear", pytest.approx(0.5))
    assert curve["slope"] == pytest.approx(full)
    assert curve["steepest"] == pytest.approx(full)


# --- known gates ----------------------------------------------------------------------------------


def value(name: str, sums: list[float]) -> list[float]:
    """A gate's value at sums of its two bits, by its own formula."""
    one = zoo_gate(name)
    return [
        one.offset + sum(w * max(0.0, one.steepness * (s - t)) for t, w in one.neurons)
        for s in sums
    ]


def zoo_gate(name: str) -> Any:
    from circuitlab.zoo.hand import GATES

    return GATES[name]


@pytest.mark.parametrize("name", ["gate-and", "gate-or", "gate-add", "gate-jump"])
def test_gates_answer_every_dose_by_their_formula(name: str) -> None:
    """One bit is 2 - α or α of the sum, both bits 2 - 2α or 2α; kinks of the MLP are met."""
    circuit = gate(name, steps=41)
    alphas = circuit.graph["doses"]["alphas"]
    found = curves(circuit)
    for node, mode in product(("a0.h0", "input"), MODES):
        weight = 1 if node == "a0.h0" else 2
        sums = [2 - weight * a if mode == "noise" else weight * a for a in alphas]
        # Noise: what is lost of the clean value; denoise: the corrupt value less what is gained.
        start = value(name, sums[:1])[0]
        sign = 1 if mode == "noise" else -1
        expected = [sign * (v - start) for v in value(name, sums)]
        assert found[node, mode]["mean"] == pytest.approx(expected, abs=2e-3), (node, mode)


@pytest.mark.parametrize(
    ("name", "node", "mode", "shape", "threshold"),
    [
        ("gate-add", "a0.h0", "noise", "linear", 0.5),
        ("gate-and", "a0.h0", "noise", "linear", 0.5),
        ("gate-and", "a0.h0", "denoise", "mixed", None),
        ("gate-jump", "a0.h0", "noise", "threshold", 2 - 1.57025),
        ("gate-jump", "input", "noise", "saturating", (2 - 1.57025) / 2),
        ("gate-jump", "input", "denoise", "threshold", 1.57025 / 2),
        ("gate-or", "a0.h0", "denoise", "threshold", 0.37025),
        ("gate-or", "a0.h0", "noise", "none", None),
        ("gate-or", "input", "noise", "threshold", 1 - 0.37025 / 2),
    ],
)
def test_gates_have_known_shapes_and_thresholds(
    name: str, node: str, mode: str, shape: str, threshold: float | None
) -> None:
    """A step stands where the gate's formula says, to within a step of the grid."""
    found = curves(gate(name, steps=101))[node, mode]
    assert found["shape"] == shape
    if threshold is None:
        assert found["threshold"] is None
    else:
        assert found["threshold"] == pytest.approx(threshold, abs=0.006)


def test_a_jump_is_steep_where_its_gradient_is_flat() -> None:
    """gate-jump: no slope at 0, and all of its effect in one step of the grid."""
    node = gate("gate-jump").nodes["a0.h0"]
    assert node["slope"] == pytest.approx(0, abs=1e-3)
    assert node["steepest"] == pytest.approx(-10, abs=0.05)
    assert node["score"] == pytest.approx(-1, abs=1e-3)


# --- words for curves -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shape", "half"),
    [
        (lambda a: -3 * a, "linear", 0.5),
        (lambda a: -3 * a + 0.3 * a * (1 - a), "linear", 0.526),
        (lambda a: -(a**3), "threshold", 0.5 ** (1 / 3)),
        (lambda a: 1 - (1 - a) ** 3, "saturating", 1 - 0.5 ** (1 / 3)),
        (lambda a: float(a >= 0.45), "threshold", 0.45),
        (lambda a: float(a >= 0.1), "saturating", 0.05),
        (lambda a: 0.5 * (a >= 0.1) + 0.5 * (a >= 1), "mixed", 0.1),
        (lambda a: a + 0.8 * (a == 0.5), "mixed", None),
        (lambda a: 0.0, "none", None),
        (lambda a: a * (1 - a), "mixed", None),
    ],
)
def test_shapes(function: Any, shape: str, half: float | None) -> None:
    """Curves that bear out each word, of either sign."""
    effects = [function(a) for a in GRID]
    for sign in (1, -1):
        found = response(GRID, [sign * effect for effect in effects])
        assert found.shape == shape
        assert found.slope == pytest.approx(10 * sign * (effects[1] - effects[0]))
        if half is None:
            assert found.threshold is None
        else:
            assert found.threshold == pytest.approx(half, abs=0.02)


def test_only_the_way_from_0_to_1_has_a_shape() -> None:
    """What is extrapolated beyond counts for the steepest step alone."""
    alphas = [-1.0, 0.0, 0.5, 1.0, 2.0]
    found = response(alphas, [7.0, 0.0, 1.0, 2.0, -9.0])
    assert (found.shape, found.threshold, found.slope) == ("linear", 0.5, 2.0)
    assert found.steepest == -11.0


def test_the_area_between_curve_and_chord_decides() -> None:
    """a ** p has 1/2 - 1/(p + 1) below its chord: 0.05 at p = 11/9."""
    fine = [i / 1000 for i in range(1001)]
    for power, shape in ((11 / 9 - 0.01, "linear"), (11 / 9 + 0.01, "threshold")):
        assert response(fine, [a**power for a in fine]).shape == shape


# --- the circuit ----------------------------------------------------------------------------------


def test_bands_are_intervals_over_pairs() -> None:
    """They hold the mean, are 0 wide at dose 0 and where there is but one pair."""
    _, model = small_model("gpt2")
    circuit = dose_response(model, random_task([6, 4, 3, 5]), steps=3)
    wide = 0.0
    for curve in circuit.graph["doses"]["curves"]:
        for low, mean, high in zip(curve["lo"], curve["mean"], curve["hi"], strict=True):
            assert low <= mean <= high
        assert (curve["lo"][0], curve["hi"][0]) == (0, 0)
        wide = max(wide, curve["hi"][2] - curve["lo"][2])
    assert wide > 0.01
    (curve, _) = dose_response(model, random_task([4]), steps=3, top=1).graph["doses"]["curves"]
    assert curve["lo"] == curve["mean"] == curve["hi"]


def test_curves_are_drawn_and_named(tmp_path: Any) -> None:
    """Strongest first; what the table says of them; a picture comes of the same data."""
    circuit = gate("gate-add", top=2, senders="a0.0, m0")
    doses = circuit.graph["doses"]
    assert doses["alphas"] == GRID
    names = ["m0 noise", "m0 denoise", "a0.h0 noise", "a0.h0 denoise"]
    assert [curve["name"] for curve in doses["curves"]] == names
    assert doses["what"] == "effect on logit-difference"
    said = "-1, linear, half of it at α = 0.5; slope -1 at 0, steepest -1"
    assert circuit.graph["findings"]["m0 noise"] == said
    write_circuit(circuit, tmp_path / "doses.plot.svg")
    drawn = (tmp_path / "doses.plot.svg").read_text("utf-8")
    assert "m0 noise" in drawn
    single = gate("gate-add", top=1, senders="m0", mode="noise").graph["doses"]["curves"]
    assert [curve["name"] for curve in single] == ["m0"]


def test_the_contract_is_kept() -> None:
    """Padded prompts, any batch size, the same circuit twice."""
    assert check_analysis(dose_response_with_options).number_of_edges() == 7


def dose_response_with_options(
    model: Any, task: Task, *, steps: int = 3, batch_size: int = 4
) -> CircuitGraph:
    """Dose–response."""
    return dose_response(model, task, steps=steps, batch_size=batch_size)


def test_what_cannot_be_swept() -> None:
    """Ranges without a dose, runs that do not exist, prompts whose positions do not correspond."""
    _, model = small_model("gpt2")
    task = random_task([4, 4])
    with pytest.raises(OptionError, match="--steps 1 makes no curve; give 2 or more"):
        dose_response(model, task, steps=1)
    with pytest.raises(OptionError, match="--low 1 --high 1: no dose lies between"):
        dose_response(model, task, low=1)
    for grid in ({"steps": 2}, {"low": 2.0, "high": 3.0}):
        with pytest.raises(OptionError, match="no dose lies between 0 and 1"):
            dose_response(model, task, **grid)
    with pytest.raises(OptionError, match="ablation zero has no such run"):
        dose_response(model, task, ablation="zero")
    with pytest.raises(OptionError, match="--top -1"):
        dose_response(model, task, top=-1)
    odd = replace(Task.from_pair((1, 2, 3), (1, 2), 3, 4), align="pad")
    with pytest.raises(TaskError, match="do not correspond"):
        dose_response(model, odd)
