"""Scores of single pairs: their mean are the analysis's scores, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import random_gpt2
from torch import Tensor

import circuitlab
from circuitlab import CircuitGraph, EncodedTask, OptionError, PromptPair, Task, TracedModel
from circuitlab.registry import Registry

IDS = ([5, 9, 3, 7, 2], [4, 8, 1], [6, 6, 2, 9])


def random_task() -> tuple[TracedModel, Task]:
    """A random GPT-2 and three pairs of different length, so that prompts are padded."""
    model = circuitlab.load_model(random_gpt2())
    pairs = tuple(
        PromptPair(ids, [*ids[:1], ids[1] + 1, *ids[2:]], [10 + n], [20 + n])
        for n, ids in enumerate(IDS)
    )
    return model, Task("random", pairs)


def of_each_pair(name: str, model: TracedModel, pairs: EncodedTask, **options: Any) -> Tensor:
    analysis = Registry.load().analysis(name)
    assert analysis.pair_scores is not None
    scores: Tensor = analysis.pair_scores(model, pairs, **options)
    return scores


def matrix(circuit: CircuitGraph, model: TracedModel) -> Tensor:
    columns = {tuple(receiver): n for n, receiver in enumerate(model.wiring.receivers)}
    scores = torch.zeros(len(model.wiring.sources), len(columns), dtype=torch.float64)
    for source, target, port, score in circuit.effects():
        scores[model.wiring.source_rows[source], columns[target, port]] = score
    return scores


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("edge-attribution", {"method": "eap"}),
    ("edge-attribution", {"method": "eap", "ablation": "zero"}),
    ("edge-attribution", {"ablation": "mean"}),
    ("edge-attribution", {"ig_steps": 7, "ig_rule": "left"}),
    ("edge-attribution", {"ig_rule": "adaptive", "ig_steps": 3}),
    ("path-patching", {}),
    ("path-patching", {"mode": "denoise"}),
    ("path-patching", {"mode": "noise", "ablation": "mean"}),
    ("path-patching", {"senders": "a0.*, input", "receivers": "m1, logits", "mode": "noise"}),
]


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_mean_over_pairs_is_the_analysis(name: str, options: dict[str, Any]) -> None:
    """Every edge: the mean over pairs is the score the analysis gives, in one batch or in three."""
    model, task = random_task()
    circuit = circuitlab.build_circuit(model, task, name, top="all", allow_weak=True, **options)
    known = matrix(circuit, model)
    for size in ("auto", 1):
        given = circuit.graph["options"] | {"batch_size": size}
        scores = of_each_pair(name, model, model.encode(task), **given)
        assert scores.dtype == torch.float32
        assert scores.shape == (3, *known.shape)
        assert (scores.double().mean(0) - known).abs().max() <= 1e-5 * known.abs().max()


@pytest.mark.parametrize(
    ("name", "options"), [("edge-attribution", {"ig_steps": 3}), ("path-patching", {})], ids=str
)
def test_each_pair_has_what_it_has_alone(name: str, options: dict[str, Any]) -> None:
    """A pair's scores in a task of three are its scores in a task of one."""
    model, task = random_task()
    together = of_each_pair(name, model, model.encode(task), mode="noise", **options)
    for row, pair in enumerate(task.pairs):
        alone = Task("alone", (pair,))
        scores = of_each_pair(name, model, model.encode(alone), mode="noise", **options)
        assert (together[row] - scores[0]).abs().max() <= 1e-5 * scores.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-3 * together.abs().max()


def test_jumps_are_shared_out_pair_by_pair() -> None:
    """On gate-jump rule adaptive gives each pair the jump that gradients miss."""
    model = circuitlab.load_model("gate-jump")
    task = Registry.load().task("gate-jump")
    scores = of_each_pair("edge-attribution", model, model.encode(task), ig_rule="adaptive")
    circuit = circuitlab.build_circuit(model, task, top="all", ig_rule="adaptive")
    assert (scores.double().mean(0) - matrix(circuit, model)).abs().max() <= 1e-5
    assert scores[:, 0].sum(1).tolist() == pytest.approx([-1.0] * len(scores), abs=0.01)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("edge-attribution", {"fall_back": "exact"}),
        ("edge-attribution", {"ig_steps": 0}),
        ("edge-attribution", {"method": "eap", "ig_rule": "adaptive"}),
        ("path-patching", {"scope": "nodes"}),
        ("path-patching", {"senders": "a9.h9"}),
    ],
    ids=str,
)
def test_what_has_no_pair_scores_is_refused(name: str, options: dict[str, Any]) -> None:
    """Options with which no pair has scores of its own are refused, and so are bad ones."""
    model, task = random_task()
    with pytest.raises(OptionError):
        of_each_pair(name, model, model.encode(task), **options)
