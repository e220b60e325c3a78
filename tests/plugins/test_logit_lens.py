"""Logit lens: what each layer would answer, against a plain model's hidden states."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import families
import oracles
import pytest
import torch
from circuitlab_attention_heads import lens as lens_module
from circuitlab_attention_heads.growing import norm_growth
from circuitlab_attention_heads.lens import logit_lens
from random_tasks import random_task
from torch import Tensor, nn

from circuitlab import PromptPair, Site, Task, TracedModel, build_circuit, load_model, zoo

LENGTHS = [6, 4, 3, 6]
TASKS = {task.name: task for task in zoo.tasks()}


def module_of(family: str) -> Any:
    if family in ("gpt2", "no-norm"):
        return oracles.random_gpt2(3, 2, 16, layer_norm=family == "gpt2", seed=1)
    return families.random_module(family, 3)


def traced(module: Any) -> TracedModel:
    gpt2 = module.config.model_type == "gpt2"
    return load_model((module, None)) if gpt2 else families.traced(module)


def plain_lens(module: Any, prompt: tuple[int, ...]) -> list[Tensor]:
    """Logits of each layer's stream at the last token, then the model's own, ``[vocab]`` each."""
    kind = module.config.model_type
    body = module.transformer if kind == "gpt2" else getattr(module, "gpt_neox", module.base_model)
    norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(kind, "norm")
    unembed = module.get_output_embeddings()
    with torch.no_grad():
        done = module(torch.tensor([prompt]), output_hidden_states=True)
        rows = [unembed(getattr(body, norm)(state))[0, -1] for state in done.hidden_states[:-1]]
    return [*rows, done.logits[0, -1]]


def log_probs(logits: Tensor) -> list[float]:
    values = logits.tolist()
    top = max(values)
    total = top + math.log(math.fsum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def divergence(answer: Tensor, other: Tensor) -> float:
    """KL between the next-token distributions of two rows of logits, token by token."""
    both = zip(log_probs(answer), log_probs(other), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in both)


@pytest.mark.parametrize("metric", ["logit-difference", "answer-log-prob", "kl-divergence"])
@pytest.mark.parametrize("family", ["gpt2", "no-norm", "neox", "llama"])
def test_the_lens_is_that_of_plain_hidden_states(
    family: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Final norm and unembedding on the hidden states of each prompt alone; prompts are padded."""
    # Two layers of three prompts in one pass, then the third.
    monkeypatch.setattr(lens_module, "LOGITS", 2 * 3 * 40)
    module, task = module_of(family), random_task(LENGTHS, metric)
    lens = norm_growth(traced(module), task, batch_size=3).graph["lens"]
    rows = [plain_lens(module, pair.clean) for pair in task.pairs]
    exact = family in ("gpt2", "no-norm")
    for layer in range(4):
        kl = [divergence(row[-1], row[layer]) for row in rows]
        scores, hits = [], []
        for pair, row in zip(task.pairs, rows, strict=True):
            right, wrong = int(pair.answers[0]), int(pair.wrong_answers[0])
            values = {
                "logit-difference": float(row[layer][right] - row[layer][wrong]),
                "answer-log-prob": log_probs(row[layer])[right],
                "kl-divergence": -divergence(row[-1], row[layer]),
            }
            scores.append(values[metric])
            hits.append(float(row[layer][right] > row[layer][wrong]))
        for name, values_of in (("kl", kl), ("metric", scores), ("accuracy", hits)):
            expected = math.fsum(values_of) / len(values_of)
            assert lens[name]["mean"][layer] == pytest.approx(
                expected, rel=1e-10 if exact else 1e-4, abs=1e-10 if exact else 1e-4
            )
    assert lens["kl"]["mean"][-1] == 0
    assert min(lens["kl"]["mean"][:-1]) > 0.01


def test_without_wrong_answers_the_right_one_is_above_all() -> None:
    """Accuracy is of the best token, several answers count alike, and one that ties is right."""
    module = module_of("gpt2")
    pairs = []
    for pair in random_task(LENGTHS).pairs:
        best = [int(row.argmax()) for row in plain_lens(module, pair.clean)]
        pairs.append(replace(pair, answers=(best[0], best[3]), wrong_answers=()))
    task = Task("best", tuple(pairs), "answer-log-prob")
    accuracy = norm_growth(traced(module), task).graph["lens"]["accuracy"]["mean"]
    assert (accuracy[0], accuracy[3]) == (1, 1)
    hits = []
    for pair in pairs:
        row = plain_lens(module, pair.clean)[1]
        hits.append(int(row.argmax()) in pair.answers)
    assert accuracy[1] == sum(hits) / 4


def test_intervals_are_over_different_pairs() -> None:
    """They hold the mean; a repeated pair narrows nothing; one pair has none."""
    module, task = module_of("gpt2"), random_task(LENGTHS)
    model = traced(module)
    lens = norm_growth(model, task).graph["lens"]
    for name in ("kl", "metric"):
        for low, mean, high in zip(*(lens[name][key] for key in ("lo", "mean", "hi")), strict=True):
            assert low <= mean <= high
        assert lens[name]["hi"][0] - lens[name]["lo"][0] > 0.01
    twice = norm_growth(model, Task("twice", task.pairs * 2)).graph["lens"]
    assert twice["kl"]["lo"] == pytest.approx(lens["kl"]["lo"], rel=1e-9)
    assert set(norm_growth(model, random_task([4])).graph["lens"]["kl"]) == {"mean"}


def test_a_model_that_writes_nothing_has_answered_at_once() -> None:
    """No divergence at any layer, and the metric of the end everywhere."""
    module: Any = oracles.random_gpt2(3, 2, 16, seed=2)
    with torch.no_grad():
        for block in module.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
    lens = norm_growth(traced(module), random_task(LENGTHS)).graph["lens"]
    assert lens["kl"]["mean"] == pytest.approx([0] * 4, abs=1e-14)
    assert lens["metric"]["mean"] == pytest.approx([lens["metric"]["mean"][3]] * 4, rel=1e-12)


def test_the_last_row_is_the_baseline() -> None:
    """The model's own metric and accuracy, as every circuit tells them."""
    circuit = build_circuit("ioi-mini", analysis="norm-growth")
    lens, base = circuit.graph["lens"], circuit.graph["baseline"]
    assert lens["metric"]["mean"][-1] == pytest.approx(base["clean"], rel=1e-6)
    assert lens["accuracy"]["mean"][-1] == base["accuracy"]
    (panel,) = [one for one in circuit.graph["plots"] if one["title"] == "Logit lens"]
    assert panel["curves"][0]["mean"] == lens["kl"]["mean"]
    first, before = (lens["kl"]["mean"][layer] for layer in (0, 2))
    said = circuit.graph["findings"]["logit lens"]
    assert said.startswith(f"KL {first:.3g} at the input, {before:.3g} before the last layer")


def test_a_hand_made_model_answers_when_its_head_has_written() -> None:
    """hand-induction: nothing of the answer before its last layer, and all of it behind."""
    model, task = load_model("hand-induction"), TASKS["hand-induction"]
    pairs = model.encode(task)
    run = model.run(pairs.clean, read=[Site("resid_pre", layer) for layer in range(2)])
    lens = logit_lens(model, pairs, run)
    assert lens.metric.shape == lens.right.shape == lens.kl.shape == (3, len(pairs))
    assert bool((lens.metric[:2].abs() < 1e-6).all())
    assert bool((lens.metric[2] > 9).all())
    assert lens.right.mean(1).tolist() == [0, 0, 1]


def test_a_norm_that_is_none_known_is_applied_as_it_is() -> None:
    """The model's own module gives the logits, whatever it does behind the last block."""

    class Capped(nn.Module):
        """An unembedding whose logits have a bound."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.weight = inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return 5 * torch.tanh(x @ self.weight.T / 5)

    module = module_of("gpt2")
    module.lm_head = Capped(module.lm_head)
    model = families.unchecked(module)
    task = Task("one", (PromptPair((1, 2, 3), (4, 5, 6), (7,), (8,)),))
    pairs = model.encode(task)
    run = model.run(pairs.clean, read=[Site("resid_pre", layer) for layer in range(3)])
    rows = plain_lens(module, (1, 2, 3))
    expected = [float(row[7] - row[8]) for row in rows]
    assert logit_lens(model, pairs, run).metric[:, 0].tolist() == pytest.approx(expected, rel=1e-10)
