"""Prompting: the logit difference of other prompts, against a stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from circuitlab_activation_plateaus.steering.injecting import readout
from circuitlab_activation_plateaus.steering.prompting import baselines, prefixed

from circuitlab import EncodedTask, PromptPair, Task, TaskError, TracedModel, load_model

PAIRS = (
    PromptPair((3, 7, 9), (3, 7, 8), (4,), (6,)),
    PromptPair((11, 2, 5, 13), (11, 2, 5, 1), (4, 8), (6,)),
)


def small() -> tuple[Any, TracedModel, EncodedTask]:
    module = oracles.random_gpt2(2, 2, 16, seed=3).requires_grad_(False)
    model = load_model((module, None))
    return module, model, model.encode(Task("own", PAIRS))


def answered(module: Any, prompt: Any, pair: PromptPair) -> float:
    logits = module(torch.tensor([list(prompt)])).logits[0, -1]
    right, wrong = (logits[list(ids)].mean() for ids in (pair.answers, pair.wrong_answers))
    return float(right - wrong)


def test_baselines_are_those_of_a_stock_model() -> None:
    """Both prompts of each pair, and the steered ones behind a prefix."""
    module, model, pairs = small()
    read = readout(model, pairs)
    for prompts in ("clean", "corrupt"):
        found = baselines(model, pairs, read, prompts=prompts, prefix="21, 30", batch_size=1)
        assert list(found) == ["clean prompt", "corrupt prompt", "prompt prefix"]
        for row, pair in enumerate(PAIRS):
            own = getattr(pair, prompts)
            for label, prompt in (
                ("clean prompt", pair.clean),
                ("corrupt prompt", pair.corrupt),
                ("prompt prefix", (21, 30, *own)),
            ):
                assert abs(float(found[label][row]) - answered(module, prompt, pair)) < 1e-9
    assert "prompt prefix" not in baselines(model, pairs, read)


def test_a_prefix_of_text_stands_before_the_text(text_model: Path) -> None:
    """As it is, with no space between; a prompt of ids gets the prefix's ids."""
    model = load_model(str(text_model))
    texts = Task.from_pair("gave a drink to", "gave a book to", " Mary", " John")
    found = prefixed(model, model.encode(texts), "clean", "When Tom ")
    assert found.ids.tolist() == model.tokens(["When Tom gave a drink to"]).ids.tolist()
    ids = Task.from_pair([5, 6, 7], [5, 6, 8], [1], [2])
    found = prefixed(model, model.encode(ids), "corrupt", "When")
    assert found.ids[0].tolist() == [*model.tokens(["When"]).ids[0].tolist(), 5, 6, 8]


def test_prefixes_that_do_not_fit_are_refused() -> None:
    """Too long, and text where there is no tokenizer; the flag is named."""
    _, model, pairs = small()
    with pytest.raises(TaskError, match=r"--prompt-prefix .* 17 tokens, the model reads at most"):
        prefixed(model, pairs, "clean", " ".join(["3"] * 13))
    with pytest.raises(TaskError, match="--prompt-prefix 'be kind': the model has no tokenizer"):
        prefixed(model, pairs, "clean", "be kind")
