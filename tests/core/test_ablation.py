"""What ablated components write, against the split model that the oracles run."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch

from circuitlab import (
    Ablator,
    EncodedTask,
    PromptPair,
    Site,
    Task,
    TaskError,
    TracedModel,
    load_model,
)
from circuitlab.ablation import Ablation

TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(seed=11)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


@pytest.fixture(scope="module")
def pairs(model: TracedModel) -> EncodedTask:
    """Three pairs, two of them padded."""
    prompts = [((1, 2, 3, 4, 5), (1, 7, 3, 4, 5)), ((6, 7), (8, 7)), ((9, 8, 7), (9, 8, 1))]
    return model.encode(Task("toy", tuple(PromptPair(c, x, (1,), (2,)) for c, x in prompts)))


@pytest.mark.parametrize("kind", ["counterfactual", "zero", "mean"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_differences_are_the_oracles(
    module: Any, model: TracedModel, pairs: EncodedTask, kind: Ablation, size: int
) -> None:
    """Whatever the batch size, ablated less clean is the oracle's, and nothing at padding.

    The mean is over the whole task, so it cannot depend on the batch it is used in.
    """
    with torch.no_grad():
        expected = oracles.ablated_outputs(
            module, pairs.clean.ids, pairs.corrupt.ids, kind, pairs.clean.mask.long()
        )
        plain = oracles.run(module, pairs.clean.ids, pairs.clean.mask.long()).outputs
    ablator = Ablator(model, pairs, kind, size)
    for number, batch in enumerate(pairs.batches(size)):
        clean = model.run(batch.clean, read=model.source_sites)
        difference, run = ablator.difference(batch, clean)
        assert (run is not None) == (kind == "counterfactual")
        mask, rows = batch.clean.mask, slice(number * size, number * size + size)
        width = mask.shape[1]
        assert not difference[:, ~mask].any()
        for name, found in zip(model.wiring.sources, difference, strict=True):
            other = (expected[name] - plain[name])[rows, -width:]
            assert float((found - other)[mask].abs().max()) < TOLERANCE, name


@pytest.mark.parametrize("kind", ["counterfactual", "zero", "mean"])
def test_logits_with_the_input_ablated(
    module: Any, model: TracedModel, pairs: EncodedTask, kind: Ablation
) -> None:
    """Only the input's output is replaced; everything after it is computed again."""
    mask = pairs.clean.mask.long()
    with torch.no_grad():
        source = oracles.ablated_outputs(module, pairs.clean.ids, pairs.corrupt.ids, kind, mask)
        expected = oracles.run(module, pairs.clean.ids, mask, embedding=source["input"]).logits
    ablator = Ablator(model, pairs, kind, 2)
    clean = model.run(pairs.clean, read=model.source_sites)
    difference, run = ablator.difference(pairs, clean)
    assert (
        float((difference[0] + clean[Site("resid_pre", 0)] - source["input"])[mask > 0].abs().max())
        < TOLERANCE
    )
    found = ablator.logits(pairs, source["input"], run)
    assert float((found - expected[:, -1]).abs().max()) < TOLERANCE


def test_uneven_prompts(model: TracedModel) -> None:
    """Outputs of a prompt of another length cannot be swapped in; each remedy named works."""
    uneven = Task("uneven", (PromptPair((1, 2, 3), (4, 5), (1,), (2,)),), align="pad")
    encoded = model.encode(uneven)
    with pytest.raises(TaskError, match=r"'uneven': .* --align drop, or --ablation zero or mean"):
        Ablator(model, encoded, "counterfactual", 1)
    for kind in ("zero", "mean"):
        clean = model.run(encoded.clean, read=model.source_sites)
        Ablator(model, encoded, kind, 1).difference(encoded, clean)
