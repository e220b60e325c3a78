"""How much runs at once follows the memory it may take."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from random_tasks import random_task

from circuitlab import OptionError, TracedModel, choose_batch_size, load_model, memory


@pytest.fixture(scope="module")
def model() -> TracedModel:
    module: Any = oracles.random_gpt2(2, 2, 16)
    return load_model((module, None))


def test_batch_size_follows_memory(model: TracedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pairs as fit, never none and never more than there are."""
    pairs = model.encode(random_task([5, 4, 5]))
    ends = len(model.wiring.sources) + len(model.wiring.receivers)
    for share, size in ((0, 1), (1, 1), (2.5, 2), (1000, 3)):
        monkeypatch.setattr(memory, "PAIRS", int(share * ends * 5 * 16 * 8))
        assert choose_batch_size(model, pairs) == size


def test_patches_follow_memory(model: TracedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many residual streams as fit, and never none."""
    each = 3 * 5 * 16 * torch.float64.itemsize
    for share, n_patches in ((0, 1), (1, 1), (2.5, 2), (10, 10)):
        monkeypatch.setitem(memory.PATCHES, "cpu", int(share * each))
        assert memory.patches_at_once(model, 3, 5) == n_patches


@pytest.mark.parametrize("size", [0, -3])
def test_batch_size_below_one_is_refused(model: TracedModel, size: int) -> None:
    """0 is no way to say auto; what is asked for is taken as it is."""
    pairs = model.encode(random_task([5, 4]))
    with pytest.raises(OptionError, match=f"batch size {size} is too small; use 1 or more"):
        choose_batch_size(model, pairs, size)
    assert choose_batch_size(model, pairs, 7) == 7
