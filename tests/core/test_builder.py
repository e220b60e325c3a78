"""build_circuit: provenance, refusals, and errors that name the plugin which did wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx
import nnsight
import pytest
import torch
import transformers

import circuitlab
from circuitlab import (
    CircuitGraph,
    OptionError,
    PluginError,
    PromptPair,
    Task,
    TaskError,
    TracedModel,
    build_circuit,
    hookimpl,
)
from circuitlab.registry import PluginInfo, Registry
from circuitlab.testing import tiny_model, toy_task


def drawing(model: TracedModel, task: Task, *, size: float = 1.0) -> CircuitGraph:
    """A score that is drawn at random."""
    circuit = CircuitGraph(metric="my own")
    circuit.add_component("m0", kind="mlp", layer=0)
    circuit.add_component("logits", kind="logits", layer=2)
    circuit.add_effect("m0", "logits", size * float(torch.rand(())))
    return circuit


def counting(model: TracedModel, task: Task | None = None) -> CircuitGraph:
    """The number of tasks, which may be 0."""
    circuit = CircuitGraph(score="number of tasks")
    circuit.add_component("m0", kind="mlp", layer=0)
    circuit.add_component("logits", kind="logits", layer=2)
    circuit.add_effect("m0", "logits", float(task is not None))
    return circuit


def registry_of(function: Callable[..., Any]) -> Registry:
    class Plugin:
        @hookimpl
        def register_analyses(self, register: Callable[..., None]) -> None:
            register("own", function)

    registry = Registry.load()
    registry.add(Plugin(), PluginInfo("own-plugin", "circuitlab-own", "0.1"))
    return registry


def build(function: Callable[..., Any] = drawing, **options: Any) -> CircuitGraph:
    settings: dict[str, Any] = {"allow_weak": True, "registry": registry_of(function)}
    return build_circuit(tiny_model(), toy_task(), "own", **(settings | options))


def test_provenance_says_where_the_circuit_came_from() -> None:
    """Model, task, analysis, options, seed and versions stand in the circuit, as plain JSON."""
    task, model = toy_task(), tiny_model()
    graph = build(size=2.0, seed=5).graph
    expected = {
        "analysis": "own",
        "plugin": "own-plugin",
        "options": {"size": 2.0},
        "model": model.name,
        "family": "GPT-2",
        "n_layers": 2,
        "n_heads": 2,
        "d_model": 16,
        "parallel": False,
        "task": "toy",
        "task_digest": task.digest,
        "n_pairs": 5,
        "pairs_digest": [pair.digest for pair in task.pairs],
        "seed": 5,
        "dtype": "float32",
        "device": "cpu",
        "versions": {
            "circuitlab": circuitlab.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
            "networkx": networkx.__version__,
        },
    }
    assert {key: graph[key] for key in expected} == expected
    assert graph["metric"] == "my own"
    assert graph["baseline"]["n_pairs"] == 5
    assert graph["seconds"] >= 0
    assert json.loads(json.dumps(graph)) == graph


def test_defaults_are_written_too() -> None:
    """Options that were not given stand in the circuit with the value they had."""
    assert build().graph["options"] == {"size": 1.0}


def test_seed_decides_what_is_drawn() -> None:
    """One seed, one circuit; another seed, another; and the caller's random state is left alone."""
    state = torch.get_rng_state()
    scores = [next(build(seed=seed).effects())[3] for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_task_can_be_changed_at_the_door() -> None:
    """Metric, number of pairs and alignment replace the task's own."""
    options = {"verify": 0, "allow_weak": True}
    circuit = build_circuit(
        tiny_model(), toy_task(), metric="answer-log-prob", n_pairs=2, **options
    )
    assert (circuit.graph["metric"], circuit.graph["n_pairs"]) == ("answer-log-prob", 2)
    uneven = Task("uneven", (*toy_task().pairs, PromptPair((1, 2), (3,), (4,), (5,))))
    with pytest.raises(TaskError, match="differ in length"):
        build_circuit(tiny_model(), uneven, **options)
    uneven = replace(uneven, pairs=uneven.pairs[::-1])
    circuit = build_circuit(tiny_model(), uneven, align="drop", **options)
    assert circuit.graph["n_pairs"] == 5
    assert circuit.graph["pairs_digest"] == [pair.digest for pair in uneven.pairs[1:]]
    assert any("pair 1: left out" in warning for warning in circuit.graph["warnings"])


def test_bundled_model_knows_its_task() -> None:
    """A bundled model needs no task; its own is used, and named."""
    circuit = build_circuit("gate-add", verify=0)
    assert (circuit.graph["model"], circuit.graph["task"]) == ("gate-add", "gate-add")


def test_task_that_is_not_there() -> None:
    """No task, and a name that is none, are answered with the tasks there are; they work."""
    with pytest.raises(TaskError, match="has no task of its own; name one") as caught:
        build_circuit(tiny_model())
    assert "--task-file" in str(caught.value)
    with pytest.raises(TaskError, match="task 'gate-ad' does not exist"):
        build_circuit("gate-add", "gate-ad")


def test_weak_effect_establishes_nothing() -> None:
    """When the effect is within its noise, the circuit says that it is not established."""
    pairs = toy_task().pairs[:2]
    both = Task(
        "both",
        (*pairs, *(PromptPair(p.corrupt, p.clean, p.answers, p.wrong_answers) for p in pairs)),
    )
    with pytest.raises(TaskError, match="--allow-weak"):
        build_circuit(tiny_model(), both)
    circuit = build_circuit(tiny_model(), both, allow_weak=True)
    assert circuit.graph["verdict"] == "not established"
    assert "within its own noise" in circuit.graph["verdict_reason"]
    assert circuit.graph["completeness"]["share"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": 1.0}, "analysis 'own' has no option 'sise'; its options are size"),
        ({"size": "1"}, "size='1' is not a finite number"),
        ({"size": math.inf}, "size=inf is not a finite number"),
        ({"n_pairs": 0}, "cannot take 0 pairs"),
    ],
)
def test_option_that_does_not_fit(options: dict[str, Any], message: str) -> None:
    """A wrong option is refused before the model is loaded or run."""
    with pytest.raises(OptionError, match=message):
        build(**options)


def dividing(model: TracedModel, task: Task) -> CircuitGraph:
    """Divides by zero."""
    raise ZeroDivisionError("by 0\nlong story")


def leaving(model: TracedModel, task: Task) -> CircuitGraph:
    """Ends the process."""
    raise SystemExit(3)


def plain(model: TracedModel, task: Task) -> Any:
    """Returns another kind of graph."""
    return networkx.MultiDiGraph()


def cyclic(model: TracedModel, task: Task) -> CircuitGraph:
    """Returns a cycle."""
    circuit = drawing(model, task)
    circuit.add_effect("logits", "m0", 1.0)
    return circuit


def unmeasured(model: TracedModel, task: Task) -> CircuitGraph:
    """Adds a NaN."""
    circuit = drawing(model, task)
    circuit.add_effect("m0", "logits", math.nan)
    return circuit


def unplain(model: TracedModel, task: Task) -> CircuitGraph:
    """Keeps a tensor."""
    circuit = drawing(model, task)
    circuit.nodes["m0"]["mean"] = torch.zeros(2)
    return circuit


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (dividing, r"failed: ZeroDivisionError: by 0 \(test_builder\.py, line \d+\)$"),
        (leaving, r"failed: SystemExit: 3 \(test_builder\.py, line \d+\)$"),
        (plain, "returned MultiDiGraph, not a CircuitGraph"),
        (cyclic, "made a bad circuit: the circuit has a cycle"),
        (unmeasured, "made a bad circuit: effect m0 → logits has score nan"),
        (unplain, "made a bad circuit: component 'm0' has data"),
    ],
)
def test_plugin_that_does_wrong_is_named(function: Callable[..., Any], message: str) -> None:
    """Whatever an analysis does, the answer is one PluginError with its name and its plugin's."""
    with pytest.raises(PluginError, match=f"analysis 'own' of plugin 'own-plugin' {message}"):
        build(function)


def refusing(model: TracedModel, task: Task) -> CircuitGraph:
    """Refuses the task."""
    raise TaskError("this task cannot be used here")


def test_refusal_of_a_plugin_stays_its_own() -> None:
    """An error that a plugin raises on purpose reaches the user as it is."""
    with pytest.raises(TaskError, match=r"^this task cannot be used here$"):
        build(refusing)


def test_unknown_analysis() -> None:
    """An analysis that is not installed is answered with those that are."""
    with pytest.raises(PluginError, match=r"'eap' is not installed; .*edge-attribution"):
        build_circuit("gate-add", analysis="eap")


def test_a_task_may_be_left_out_where_none_is_needed() -> None:
    """Without a task there is no baseline, nor a fact about a task; with one there are both."""
    registry = registry_of(counting)
    alone = build_circuit(tiny_model(), None, "own", registry=registry)
    assert [score for *_, score in alone.effects()] == [0.0]
    of_a_task = {"task", "task_digest", "n_pairs", "pairs_digest", "metric", "baseline"}
    assert not of_a_task & alone.graph.keys()
    given = build(counting)
    assert [score for *_, score in given.effects()] == [1.0]
    assert (given.graph["task"], given.graph["baseline"]["n_pairs"]) == ("toy", 5)


def test_settings_of_a_task_that_is_not_there_are_refused() -> None:
    """Nothing that was asked for is ignored."""
    registry = registry_of(counting)
    with pytest.raises(TaskError, match="metric and n_pairs belong to a task, and there is none"):
        build_circuit(
            tiny_model(), None, "own", registry=registry, metric="kl-divergence", n_pairs=2
        )
    with pytest.raises(TaskError, match="has no task of its own"):
        build_circuit(tiny_model(), None, "own", registry=registry_of(drawing))
