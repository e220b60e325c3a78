"""How much runs at once follows the memory it may take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from random_tasks import random_task
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from circuitlab import (
    OptionError,
    ResourceError,
    TracedModel,
    choose_batch_size,
    load_model,
    memory,
)


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


def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors that were there at one time during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found: Any = profiler.profiler
    events = found.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, n_bytes in changes:
        held += n_bytes
        most = max(most, held)
    return most


def gpt2(n_layers: int, n_heads: int, d_model: int) -> Any:
    """A random GPT-2 of that shape."""
    config = GPT2Config(
        n_layer=n_layers, n_head=n_heads, n_embd=d_model, vocab_size=60, n_positions=100,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(n_layers: int, n_heads: int, d_model: int) -> Any:
    """A random Llama whose heads share keys and values in pairs, with a gate in its MLPs."""
    config = LlamaConfig(
        num_hidden_layers=n_layers, num_attention_heads=n_heads, hidden_size=d_model,
        num_key_value_heads=n_heads // 2, intermediate_size=3 * d_model, vocab_size=60,
        max_position_embeddings=100, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("module", "n_pairs", "n_positions"),
    [
        (gpt2(2, 2, 32), 8, 24),
        (gpt2(2, 4, 32), 2, 100),
        (gpt2(6, 2, 16), 16, 10),
        (gpt2(1, 8, 128), 4, 16),
        (llama(2, 4, 64), 4, 48),
    ],
    ids=["small", "long prompts", "deep", "wide", "gated"],
)
def test_what_a_batch_takes_is_foreseen(module: Any, n_pairs: int, n_positions: int) -> None:
    """The allocator's own peak during an attribution is within a factor of 2, either way."""
    from circuitlab_edge_attribution.attribution import edge_scores

    model = load_model((module, None))
    pairs = model.encode(random_task([n_positions] * n_pairs))
    measured = peak(lambda: edge_scores(model, pairs, batch_size=n_pairs))
    foreseen = memory.batch_memory(model, n_pairs, n_positions)
    assert measured / 2 < foreseen < 2 * measured
    # Weights are beside it.
    assert measured < memory.batch_memory(model, 4 * n_pairs, n_positions)


def test_large_runs_say_what_they_take(
    lab: Callable[..., Any], ids_model: Path, ids_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line before the work, with the batch, what it takes, what is free and the weights."""
    command = ("trace", "--model", ids_model, "--task-file", ids_task, "--allow-weak")
    quiet = lab(*command, "--verify", "0")
    assert "take about" not in quiet.err
    monkeypatch.setattr(memory, "TOLD", 0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 5 * 2**30)
    done = lab(*command, "--verify", "0", "--batch-size", "3")
    lines = [line for line in done.err.splitlines() if "take about" in line]
    model = load_model(ids_model)
    needed = memory.shown(memory.batch_memory(model, 3, 6))
    weights = memory.shown(4 * model.n_parameters)
    assert lines == [
        f"batches of 3 pairs of 6 tokens take about {needed} of 5 GiB free, beside {weights} of "
        f"weights"
    ]
    # An analysis that scores no edges pair by pair makes no such claim.
    other = lab("trace", "attention-heads", "--model", "induction", "--n-prompts", "2")
    assert "take about" not in other.err


def test_one_pair_that_cannot_fit_is_refused(
    lab: Callable[..., Any], ids_model: Path, ids_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the sources of one pair take more than is free: exit 5, before any pass."""
    model = load_model(ids_model)
    least = len(model.wiring.sources) * 6 * model.d_model * 4
    command = ("trace", "--model", ids_model, "--task-file", ids_task, "--allow-weak")
    monkeypatch.setattr("circuitlab.room.free_memory", lambda device: 2**40)
    for free, code in ((least, 0), (least - 1, 5)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        done = lab(*command, "--verify", "0")
        assert done.code == code
    assert f"takes {memory.shown(least)}, and cpu has {memory.shown(least - 1)} free" in done.err
    assert "running the task" not in done.err
    with pytest.raises(ResourceError):
        memory.foresee(model, model.encode(random_task([6])))
