"""The baseline equals plain runs of the module, and tasks with nothing to explain are refused."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from circuitlab import EncodedTask, PromptPair, Task, TaskError, TracedModel, load_model
from circuitlab.baseline import Baseline, check, measure

VOCAB = 40


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(seed=2)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


def encoded(model: TracedModel, n_pairs: int = 6, metric: str = "logit-difference") -> EncodedTask:
    """Pairs of 2 to 4 tokens, with one or two right and wrong answers."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(n_pairs):
        clean, corrupt = torch.randint(0, VOCAB, (2, 2 + number % 3), generator=generator).tolist()
        right, wrong = (number, 20 + number)[: 1 + number % 2], (30, 31)[: 1 + number // 3]
        pairs.append(PromptPair(tuple(clean), tuple(corrupt), right, wrong))
    return model.encode(Task("toy", tuple(pairs), metric))


def plain(module: Any, prompt: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(torch.tensor([prompt])).logits[0, -1]
    return logits


def test_scores_are_those_of_plain_runs(module: Any, model: TracedModel) -> None:
    """Each pair's metric is that of the plain module run on each prompt alone."""
    pairs = encoded(model)
    found = measure(model, pairs)
    for row, pair in enumerate(pairs.task.pairs):
        for prompt, score in ((pair.clean, found.clean), (pair.corrupt, found.corrupt)):
            logits = plain(module, prompt)
            right, wrong = (logits[list(ids)].mean() for ids in (pair.answers, pair.wrong_answers))
            assert abs(float(score[row] - (right - wrong))) < 1e-11
    assert found.effect == float((found.corrupt - found.clean).mean())


def test_accuracy_is_counted_by_hand(module: Any, model: TracedModel) -> None:
    """Right means: above all wrong answers; with none, above every other token."""
    pairs = encoded(model)
    right = 0
    for pair in pairs.task.pairs:
        logits = plain(module, pair.clean)
        best = max(float(logits[i]) for i in pair.answers)
        right += best > max(float(logits[i]) for i in pair.wrong_answers)
    assert measure(model, pairs).accuracy == right / 6
    chances = [len(p.answers) / (len(p.answers) + len(p.wrong_answers)) for p in pairs.task.pairs]
    assert abs(measure(model, pairs).chance - sum(chances) / 6) < 1e-12

    clean = (1, 2, 3)
    best_token = int(plain(module, clean).argmax())
    for answer, accuracy in ((best_token, 1.0), ((best_token + 1) % VOCAB, 0.0)):
        task = Task("open", (PromptPair(clean, (4, 5, 6), (answer,)),), "answer-log-prob")
        found = measure(model, model.encode(task))
        assert (found.accuracy, found.chance) == (accuracy, 1 / VOCAB)


def baseline(*changes: float, accuracy: float = 1.0) -> Baseline:
    change = torch.tensor(changes, dtype=torch.float64)
    return Baseline(torch.ones_like(change), 1 + change, accuracy, 0.5)


def test_interval_is_the_bootstrap() -> None:
    """About the mean plus and minus two standard errors; the same for the same seed."""
    generator = torch.Generator().manual_seed(1)
    changes = (torch.randn(200, generator=generator, dtype=torch.float64) - 2).tolist()
    measured = baseline(*changes)
    low, high = measured.interval() or (0.0, 0.0)
    error = float(torch.tensor(changes, dtype=torch.float64).std()) / 200**0.5
    assert abs(low - (measured.effect - 1.96 * error)) < 0.3 * error
    assert abs(high - (measured.effect + 1.96 * error)) < 0.3 * error
    assert measured.interval() == (low, high) != measured.interval(seed=1)


def test_interval_that_is_undefined() -> None:
    """One pair has no interval, equal pairs have no width; both are said in words."""
    assert baseline(-1.0).interval() is None
    assert baseline(-1.0).to_json()["interval"] == "undefined (1 pair)"
    assert baseline(-1.0, -1.0, -1.0).to_json()["interval"] == "undefined (zero variance)"
    spread = baseline(-1.0, -2.0, -3.0).to_json()
    low, high = spread["interval"]
    assert low < spread["effect"] < high
    assert (spread["n_pairs"], spread["effect"]) == (3, -2.0)


def test_repeated_pairs_are_no_further_evidence(model: TracedModel) -> None:
    """The interval of a task is that of its distinct pairs."""
    pairs = encoded(model).task.pairs
    once, thrice = (
        measure(model, model.encode(Task("toy", pairs * n, "logit-difference"))) for n in (1, 3)
    )
    assert thrice.interval() == pytest.approx(once.interval(), abs=1e-12)
    assert len(thrice.clean) == 18


def test_no_gap_is_refused(model: TracedModel) -> None:
    """A metric that no corruption changes leaves nothing to explain."""
    pairs = encoded(model, 3)
    with pytest.raises(TaskError, match="metric gap is 0 for every pair of task 'toy'"):
        check(baseline(0.0, 0.0, 0.0), pairs, allow_weak=True)


def test_pairs_without_gap_are_named(model: TracedModel) -> None:
    """Pairs that tell nothing are listed by their number in the task."""
    measured = baseline(-1.0, 0.0, -1.1, -1.2, -0.9, -1.3)
    warnings = check(measured, encoded(model), allow_weak=False)
    assert any("gap is 0 for pairs 2: they tell nothing" in warning for warning in warnings)


def test_effect_within_its_noise(model: TracedModel) -> None:
    """An interval that holds 0 stops; the remedy that is named goes on, with a loud warning."""
    weak = baseline(-1.0, 1.1, -0.9)
    with pytest.raises(TaskError, match=r"95 % interval holds 0.*go on with --allow-weak"):
        check(weak, encoded(model, 3), allow_weak=False)
    (warning,) = check(weak, encoded(model, 3), allow_weak=True)
    assert warning.startswith("WEAK TASK")
    assert check(baseline(-1.0, -1.1, -0.9), encoded(model, 3), allow_weak=False) == []


@pytest.mark.parametrize(("accuracy", "warned"), [(0.5, True), (0.2, True), (0.51, False)])
def test_model_that_does_not_do_the_task(model: TracedModel, accuracy: float, warned: bool) -> None:
    """Accuracy at or below chance is said before anything is explained."""
    measured = baseline(-1.0, -1.1, -0.9, accuracy=accuracy)
    warnings = check(measured, encoded(model, 3), allow_weak=False)
    assert any("does not do the task" in warning for warning in warnings) == warned


def test_one_pair_has_no_interval(model: TracedModel) -> None:
    """One pair is explained, and that it is one is said."""
    (warning,) = check(baseline(-1.0), encoded(model, 1), allow_weak=False)
    assert "1 pair" in warning
