"""Controls: which of traced circuits, and of graphs that should fail, does the verdict let by?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random

import pytest
import torch

import circuitlab
from circuitlab import CircuitGraph, PromptPair, Task, TracedModel, zoo
from circuitlab.baseline import measure
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.completeness import complement
from circuitlab.evaluation.evidence import evaluate_circuit
from circuitlab.evaluation.faithfulness import faithfulness
from circuitlab.evaluation.kept import kept_edges
from circuitlab.evaluation.random_circuits import random_control
from circuitlab.evaluation.stability import stability
from circuitlab.evaluation.verdict import Verdict, verdict
from circuitlab.registry import Registry
from circuitlab.zoo.drawing import new_pairs

#: The bundled models, and of each another of the same layers and heads that does another task.
OTHER = {"ioi-mini": "docstring-mini", "induction": "greater-than"}
#: Edges of a circuit that is no larger than it need be.
TOP = {"ioi-mini": 40, "induction": 20}
#: Pairs that circuits are found on, pairs they are scored on, random circuits beside each.
FOUND_ON, SCORED_ON, N_RANDOM = 32, 32, 24


@cache
def model_of(name: str) -> TracedModel:
    return circuitlab.load_model(name)


@cache
def tasks_of(name: str) -> tuple[Task, Task]:
    """Pairs to find a circuit on, and new ones to score it on."""
    task = Registry.load().task(name)
    avoid = {pair.digest for pair in task.pairs}
    held_out = new_pairs(name, SCORED_ON, avoid=avoid, seed=0)
    return task.take(FOUND_ON), replace(task, pairs=held_out)


@cache
def runs_on(name: str) -> CircuitRuns:
    model = model_of(name)
    return CircuitRuns(model, model.encode(tasks_of(name)[1]))


def judged(
    name: str, circuit: CircuitGraph, found_on: Task, scored_on: Task | None = None
) -> Verdict:
    """The verdict on a circuit, as found on one task and scored on another, all of it measured."""
    model = model_of(name)
    runs = CircuitRuns(model, model.encode(scored_on)) if scored_on else runs_on(name)
    kept = kept_edges(circuit, model.wiring)
    metric = runs.metric([kept, complement(runs, kept)])
    own, rest = (faithfulness(part, runs.whole, runs.empty) for part in metric)
    of_pairs = Registry.load().analysis("edge-attribution").pair_scores
    assert of_pairs is not None
    scores = of_pairs(model, model.encode(found_on))
    base = measure(model, runs.pairs)
    return verdict(
        accuracy=base.accuracy,
        chance=base.chance,
        faithfulness=own,
        control=None if own.value is None else random_control(runs, kept, own.value, n=N_RANDOM),
        complement=rest,
        stability=stability(model.wiring, kept, scores, top=len(kept)),
        size=len(kept) / model.wiring.n_edges,
        independent=True,
    )


def shuffled(pairs: Sequence[PromptPair]) -> tuple[PromptPair, ...]:
    """Pairs whose corrupt prompts and answers belong to other clean prompts of the same length."""
    rng, found = Random(0), list[PromptPair]()
    for n_words in sorted({len(str(pair.clean).split()) for pair in pairs}):
        same = [pair for pair in pairs if len(str(pair.clean).split()) == n_words]
        rng.shuffle(same)
        found += [
            PromptPair(pair.clean, other.corrupt, other.answers, other.wrong_answers)
            for pair, other in zip(same, [*same[1:], same[0]], strict=True)
            if pair is not other and pair.clean != other.corrupt
        ]
    return tuple(found)


@pytest.mark.parametrize("name", OTHER)
def test_traced_circuit_is_supported(name: str) -> None:
    """A circuit traced on some pairs and scored on others passes every rule."""
    task = tasks_of(name)[0]
    circuit = circuitlab.build_circuit(model_of(name), task, top=TOP[name], verify=0)
    found = judged(name, circuit, task)
    assert found.word == "supported", found.reasons


def test_circuit_that_is_too_large_is_partly_supported() -> None:
    """With 40 of 110 edges of induction, most random circuits do the task too, and that is said."""
    task = tasks_of("induction")[0]
    circuit = circuitlab.build_circuit(model_of("induction"), task, top=40, verify=0)
    found = judged("induction", circuit, task)
    assert found.word == "partly supported"
    assert [one.name for one in found.criteria if not one.met] == ["telling"]


@pytest.mark.parametrize("name", OTHER)
def test_random_graph_is_not_supported(name: str) -> None:
    """As many edges by scores that are noise are no better than random circuits of their kind."""
    model = model_of(name)
    noise = torch.randn(len(model.wiring.sources), len(model.wiring.receivers))
    circuit = circuitlab.circuit_of(model.wiring, noise, top=40)
    found = judged(name, circuit, tasks_of(name)[0])
    assert found.word == "not supported"
    assert "random circuits" in {one.name for one in found.criteria if not one.met}


@pytest.mark.parametrize("name", OTHER)
def test_circuit_of_another_task_is_not_supported(name: str) -> None:
    """A circuit of another task, on a model of the same layers and heads, does not do this one."""
    other = OTHER[name]
    circuit = circuitlab.build_circuit(model_of(other), tasks_of(other)[0], verify=0)
    for size in ("n_layers", "n_heads"):
        assert circuit.graph[size] == getattr(model_of(name), size)
    found = judged(name, circuit, tasks_of(name)[0])
    assert found.word == "not supported"
    assert "random circuits" in {one.name for one in found.criteria if not one.met}


@pytest.mark.parametrize("name", OTHER)
def test_circuit_before_training_is_not_supported(name: str) -> None:
    """A circuit of the same task found before the model learned it does not do the task."""
    untrained = (zoo.untrained(name), zoo.tokenizer(name))
    task = tasks_of(name)[0]
    circuit = circuitlab.build_circuit(untrained, task, allow_weak=True, verify=0)
    found = judged(name, circuit, task)
    assert found.word == "not supported"
    assert "random circuits" in {one.name for one in found.criteria if not one.met}


@pytest.mark.parametrize("name", OTHER)
def test_circuit_of_shuffled_labels_is_not_supported(name: str) -> None:
    """Where answers and corrupt prompts belong to others, the model does not do the task."""
    found_on, scored_on = (
        replace(task, name="shuffled", pairs=shuffled(task.pairs)) for task in tasks_of(name)
    )
    circuit = circuitlab.build_circuit(model_of(name), found_on, allow_weak=True, verify=0)
    found = judged(name, circuit, found_on, scored_on)
    assert found.word == "not supported"
    assert "task" in {one.name for one in found.criteria if not one.met}


def test_evaluate_says_the_same() -> None:
    """The whole evaluation finds a random graph and a circuit of shuffled labels not supported."""
    model, whole = model_of("ioi-mini"), Registry.load().task("ioi-mini")
    noise = torch.randn(len(model.wiring.sources), len(model.wiring.receivers))
    graph = circuitlab.circuit_of(model.wiring, noise, top=40)
    mixed = replace(whole, name="shuffled", pairs=shuffled(whole.pairs))
    circuit = circuitlab.build_circuit(model, mixed, allow_weak=True, verify=0)
    for one, task in ((graph, whole), (circuit, mixed)):
        assert evaluate_circuit(one, model, task, quick=True).verdict == "not supported"


def test_shuffled_labels_do_not_hide_the_machinery() -> None:
    """Scored on true pairs, edges found with shuffled labels keep what the traced ones keep.

    Edges are ranked by absolute score, and those that carry names to the logits move the metric
    whoever's names it asks for. That a circuit is found says nothing of the labels it was found by.
    """
    model, (task, _) = model_of("ioi-mini"), tasks_of("ioi-mini")
    mixed = replace(task, name="shuffled", pairs=shuffled(task.pairs))
    kept = [
        kept_edges(circuitlab.build_circuit(model, one, allow_weak=True, verify=0), model.wiring)
        for one in (task, mixed)
    ]
    runs = runs_on("ioi-mini")
    traced, of_mixed = (faithfulness(m, runs.whole, runs.empty) for m in runs.metric(kept))
    assert traced.value is not None
    assert of_mixed.value == pytest.approx(traced.value, abs=0.1)
    assert traced.value > 0.6
