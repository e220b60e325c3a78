"""The scan as a whole: a planted direction flips the answer, the circuit is what was measured."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import oracles
import pytest
import torch
from circuitlab_activation_plateaus.steering import scanning
from circuitlab_activation_plateaus.steering.circuits import reached, slope
from circuitlab_activation_plateaus.steering.scanning import Settings, injection_scan, scan
from random_tasks import random_task

from circuitlab import (
    CircuitGraph,
    OptionError,
    PromptPair,
    Task,
    TaskError,
    build_circuit,
    hookimpl,
    load_model,
    panels_of,
    read_circuit,
    zoo,
)
from circuitlab.registry import PluginInfo, Registry

TASKS = {task.name: task for task in zoo.tasks()}


def planted() -> tuple[Any, Task]:
    """A model in which one direction turns the answer, and a task of two tokens along it.

    Without norms, attention and MLPs: logit 1 less logit 2 is the stream's first number.
    """
    module: Any = oracles.random_gpt2(1, 2, 16, layer_norm=False, mlp=False, seed=2)
    with torch.no_grad():
        module.transformer.h[0].attn.c_proj.weight.zero_()
        module.transformer.h[0].attn.c_proj.bias.zero_()
        module.transformer.wpe.weight.zero_()
        module.transformer.wte.weight.zero_()
        module.transformer.wte.weight[10:20, 0] = 2.0
        module.transformer.wte.weight[20:30, 0] = -2.0
        module.transformer.wte.weight[10:30, 5] = 1.0
        module.lm_head.weight.zero_()
        module.lm_head.weight[1, 0] = 1.0
    pairs = tuple(PromptPair((i, i), (i, i + 10), (1,), (2,)) for i in range(10, 14))
    return module, Task("planted", pairs)


def run(task: Task, module: Any, **options: Any) -> CircuitGraph:
    return injection_scan(load_model((module, None)), task, **{"controls": 2} | options)


# --- what is found --------------------------------------------------------------------------------


def test_planted_direction_turns_the_answer() -> None:
    """The mean difference takes clean to corrupt at 1; the line is v · W, the answer flips at ½."""
    module, task = planted()
    circuit = run(task, module, site="resid_pre.0", unit="raw", low=-2, high=2, steps=9)
    data = circuit.graph["scan"]
    assert (data["coefficients"][0], data["coefficients"][-1]) == (-2.0, 2.0)
    for c, value in zip(data["coefficients"], data["total"]["mean"], strict=True):
        assert abs(value - (2.0 - 4.0 * c)) < 1e-9
    assert abs(data["flips"] - 0.5) < 1e-9
    assert data["slopes"] == pytest.approx({"measured": -4.0, "gradient": -4.0, "direct": -4.0})
    assert data["baselines"]["clean prompt"]["mean"] == pytest.approx(2.0)
    assert data["baselines"]["corrupt prompt"]["mean"] == pytest.approx(-2.0)
    assert [edge[:2] for edge in circuit.effects()] == [("injection", "logits")]
    edge = circuit.edges["injection", "logits", ""]
    assert edge["score"] == pytest.approx(-16.0)
    assert (edge["from"], edge["to"], edge["shape"]) == (-2.0, 2.0, "falling")
    assert edge["slope"] == pytest.approx(-4.0)
    assert edge["interval"] == pytest.approx([-16.0, -16.0])


def test_steering_corrupt_prompts_back() -> None:
    """The same direction, taken off, gives the corrupt prompts the clean answer."""
    module, task = planted()
    circuit = run(
        task, module, site="resid_pre.0", unit="raw", prompts="corrupt", low=-2, high=2, steps=9
    )
    data = circuit.graph["scan"]
    assert abs(data["flips"] + 0.5) < 1e-9
    assert data["total"]["mean"][2] == pytest.approx(2.0)


def test_unit_of_the_stream() -> None:
    """At 1 the mean norm of the stream is added; √5 here, of which all is along the answer."""
    module, task = planted()
    circuit = run(task, module, site="resid_pre.0", unit="stream", low=-1, high=1, steps=3)
    assert circuit.graph["scan"]["total"]["mean"][2] == pytest.approx(2.0 - math.sqrt(5.0))
    assert circuit.graph["scan"]["length"] == pytest.approx(math.sqrt(5.0))


def test_random_vectors_do_less() -> None:
    """Of the same length, drawn by the seed, and on average nearly nothing."""
    module, task = planted()
    options: Any = {"site": "resid_pre.0", "unit": "raw", "low": -1, "high": 1, "steps": 3}
    torch.manual_seed(3)
    circuit = run(task, module, controls=40, **options)
    largest = circuit.graph["scan"]["largest_change_by_control"]
    assert len(largest) == 40
    # A coordinate of a random unit vector of 16 is 1/4 in size: 4 logits become 1.
    assert math.sqrt(math.fsum(v * v for v in largest) / 40) == pytest.approx(1.0, rel=0.3)
    torch.manual_seed(3)
    again = run(task, module, controls=40, **options)
    assert again.graph["scan"] == circuit.graph["scan"]


def test_act_add_reaches_the_last_position_through_attention_alone() -> None:
    """Added from the front of a longer prompt, the vectors have no straight way to the logits."""
    module = oracles.random_gpt2(2, 2, 16, seed=4)
    task = random_task([5, 6])
    circuit = run(
        task, module, direction="act-add", towards="3 9", away="4 9", low=-2, high=2, steps=8
    )
    data = circuit.graph["scan"]
    assert (data["positions"], data["slopes"]["direct"]) == ("front", 0.0)
    assert "injection" not in circuit
    assert max(data["largest_change_by_control"]) > 0


# --- the circuit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_parts_sum_to_the_total(kind: str) -> None:
    """With all components kept, curve by curve; and each score is the range of its own."""
    if kind == "gpt2":
        model = load_model((oracles.random_gpt2(2, 2, 16, dtype=torch.float32), None))
    else:
        model = families.family_model(kind)
    task = random_task([6, 4, 3])
    circuit = injection_scan(model, task, steps=16, top="all", controls=1)
    data = circuit.graph["scan"]
    assert set(data["components"]) == {*model.wiring.sources, "biases", "injection"}
    curves = [part["mean"] for part in data["components"].values()]
    for row, total in enumerate(data["total"]["mean"]):
        assert abs(math.fsum(curve[row] for curve in curves) - total) < 1e-3
    assert data["gap"] < 1e-3
    x = data["coefficients"]
    for source, _, _, score in circuit.effects():
        mean, edge = data["components"][source]["mean"], circuit.edges[source, "logits", ""]
        assert abs(score) == pytest.approx(max(mean) - min(mean))
        start, end = mean[x.index(edge["from"])], mean[x.index(edge["to"])]
        assert (score, edge["from"] < edge["to"]) == (pytest.approx(end - start), score != 0)
        inner = next(at for at in range(len(x) - 1) if x[at] < 0 < x[at + 1])
        assert edge["slope"] == pytest.approx(
            (mean[inner + 1] - mean[inner]) / (x[inner + 1] - x[inner])
        )


def test_contract_of_circuit_and_panels() -> None:
    """Plain finite JSON, a star of components, a panel for the totals and one for each group."""
    model, task = load_model("induction"), TASKS["induction"].take(6)
    circuit = injection_scan(model, task, steps=24, low=-2, high=2, neurons=1, top=8, controls=1)
    circuit.validate()
    assert CircuitGraph.from_json(circuit.to_json()).graph == json.loads(json.dumps(circuit.graph))
    assert circuit.number_of_edges() == 8
    neurons = [name for name, kind in circuit.nodes(data="kind") if kind == "neuron"]
    titles = [panel.title for panel in panels_of(circuit)]
    groups = {d["group"] for *_, d in circuit.edges(data=True) if "group" in d}
    expected = ["Steering", *sorted(t for t in titles if t.startswith("Group"))]
    assert titles == expected + (["Neurons of m1"] if neurons else [])
    assert [int(t.split()[1].rstrip(":")) for t in titles if "Group" in t] == sorted(groups)
    assert all(circuit.nodes[name]["layer"] == 1 for name in neurons)
    assert {"direction", "steered", "random vectors", "slope at 0", "exactness"} <= set(
        circuit.graph["findings"]
    )
    lines = panels_of(circuit)[0].curves  # type: ignore[attr-defined]  # the first is Curves
    names = [line.name for line in lines]
    assert names[:4] == ["steered", "random vectors", "clean prompt", "corrupt prompt"]
    assert "gradient at 0" in names


def test_neurons_are_ranked_among_components() -> None:
    """By the range of their mean curve; their sum and the bias are the MLP."""
    module = oracles.random_gpt2(1, 2, 16, seed=4)
    model = load_model((module, None))
    found = injection_scan(
        model, random_task([4, 4]), steps=8, neurons=0, top="all", site="resid_pre.0", controls=1
    )
    neurons = [name for name in found if name.startswith("m0.n")]
    assert sorted(int(name[4:]) for name in neurons) == list(range(64))
    curves = found.graph["scan"]["components"]
    whole = curves["m0"]["mean"]
    summed = [math.fsum(curves[n]["mean"][row] for n in neurons) for row in range(8)]
    flat = [a - b for a, b in zip(whole, summed, strict=True)]
    # What is left is the bias over the norm's scale, which is one sign throughout.
    assert len({value > 0 for value in flat}) == 1
    few = injection_scan(
        model, random_task([4, 4]), steps=8, neurons=0, top=5, site="resid_pre.0", controls=1
    )
    strongest = [edge[0] for edge in found.effects()][:5]
    assert [edge[0] for edge in few.effects()] == strongest
    kept = injection_scan(
        model,
        random_task([4, 4]),
        steps=8,
        top="all",
        threshold=0.5,
        site="resid_pre.0",
        controls=1,
    )
    assert all(abs(edge[3]) >= 0.5 for edge in kept.effects())
    assert len(kept.edges) < len(model.wiring.sources) + 2


# --- curves ---------------------------------------------------------------------------------------


def test_reached_is_the_nearest_crossing() -> None:
    """Of a curve that is straight between its points."""
    x = [-4.0, -1.0, 1.0, 2.0, 6.0]
    assert reached(x, [3.0, -3.0, -2.0, 2.0, -2.0], 0.0) == pytest.approx(1.5)
    assert reached(x, [3.0, -3.0, -2.0, -2.0, -2.0], 0.0) == pytest.approx(-2.5)
    assert reached(x, [1.0, 1.0, 1.0, 1.0, 1.0], 0.0) is None
    assert reached(x, [0.0, 0.0, 0.0, 0.0, 0.0], 0.0) == 0.0


def test_slope_is_that_over_zero() -> None:
    """Between the points beside 0; at an end of the scan, to the next; outside there is none."""
    assert slope([-3.0, -1.0, 2.0, 4.0], [9.0, 1.0, 7.0, 9.0]) == 2.0
    assert slope([-1.0, 0.0, 1.0], [1.0, 5.0, 5.0]) == 2.0
    assert slope([0.0, 2.0], [1.0, 5.0]) == 2.0
    assert slope([-2.0, 0.0], [1.0, 5.0]) == 2.0
    assert slope([1.0, 2.0], [1.0, 5.0]) is None


# --- options and the command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "--steps 1 makes no curve"),
        ({"low": 2.0, "high": 2.0}, "nothing lies between"),
        ({"controls": 0}, "--controls 0"),
        ({"top": -1}, "--top -1"),
        ({"threshold": -1.0}, "--threshold -1"),
    ],
)
def test_settings_that_make_no_scan_are_refused(options: dict[str, Any], message: str) -> None:
    """Before a model is run."""
    with pytest.raises(OptionError, match=message):
        Settings(**options)


class Stub:
    """A plugin that offers the scan and nothing else."""

    @hookimpl
    def register_analyses(self, register: Any) -> None:
        def own(model: Any, task: Any, *, steps: int = 128, low: float = -10.0) -> CircuitGraph:
            return injection_scan(model, task, steps=steps, low=low, controls=1)

        register("injection-scan", own)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan is installed, whatever else is."""
    registry = Registry.load(["defaults"])
    registry.add(Stub(), PluginInfo("own", "own", "0"))
    monkeypatch.setattr(scanning, "build_circuit", partial(build_circuit, registry=registry))


@pytest.mark.usefixtures("registered")
def test_command_writes_circuit_and_plots(tmp_path: Path) -> None:
    """The same circuit with its provenance, and what it found by label."""
    model, paths = load_model("gate-and"), [tmp_path / "scan.json", tmp_path / "scan.plot.svg"]
    words: Any = {"clean": "on on =", "corrupt": "off off =", "answer": "yes", "wrong": "no"}
    told = scan(model, **words, steps=8, low=-4.0, output=paths[0], plot=paths[1])
    assert told["written"] == [str(path) for path in paths]
    json.dumps(told, allow_nan=False)
    circuit = read_circuit(paths[0])
    assert (circuit.graph["analysis"], circuit.graph["model"]) == ("injection-scan", "gate-and")
    assert circuit.graph["options"]["steps"] == 8
    assert circuit.graph["scan"]["coefficients"][0] == -4.0
    assert told["steered"] == circuit.graph["findings"]["steered"]
    assert "<svg" in paths[1].read_text("utf-8")
    own = scan(model, task="gate-and", steps=4, low=-4.0)
    assert own["direction"] == scan(model, steps=4, low=-4.0)["direction"]
    assert "written" not in own


@pytest.mark.usefixtures("registered")
def test_command_needs_one_whole_task(tmp_path: Path) -> None:
    """Not two, and not a part of one."""
    model = load_model("gate-and")
    with pytest.raises(OptionError, match="the task is given twice"):
        scan(model, task="gate-and", clean="on on =")
    with pytest.raises(OptionError, match="a pair also needs --answer --wrong"):
        scan(model, clean="on on =", corrupt="off off =")
    with pytest.raises(TaskError, match="no such file"):
        scan(model, task_file=tmp_path / "none.json")


def test_curves_rise_in_x() -> None:
    """Coefficients are evenly spaced, 128 from -10 to 10 where nothing else is asked for."""
    x = Settings().coefficients.tolist()
    assert (len(x), x[0], x[-1]) == (128, -10.0, 10.0)
    assert all(abs(b - a - 20 / 127) < 1e-12 for a, b in pairwise(x))
