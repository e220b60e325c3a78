"""Out of memory: batches are halved and the work goes on, to the same numbers; or exit 5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitlab import (
    CircuitGraph,
    PluginError,
    ResourceError,
    TracedModel,
    build_circuit,
    edge_effects,
    hookimpl,
)
from circuitlab.checkpoint import StateFile
from circuitlab.memory import as_planned, choose_batch_size, fitting, patches_at_once
from circuitlab.progress import listening
from circuitlab.registry import PluginInfo, Registry
from circuitlab.shards import ShardDone, merge
from circuitlab.testing import tiny_model, toy_task


@pytest.fixture(scope="module")
def model() -> TracedModel:
    return tiny_model()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """``memory(rows)``: passes of more rows run out of memory; returns the rows of each pass."""
    real = TracedModel.run

    def hold(most: int) -> list[int]:
        passes: list[int] = []

        def run(self: TracedModel, prompts: Any, **settings: Any) -> Any:
            passes.append(len(prompts))
            if len(prompts) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, prompts, **settings)

        monkeypatch.setattr(TracedModel, "run", run)
        return passes

    return hold


def scores(circuit: CircuitGraph) -> dict[tuple[str, str, str], float]:
    return {effect[:3]: effect[3] for effect in circuit.effects()}


def build(model: TracedModel, analysis: str, **options: Any) -> tuple[CircuitGraph, list[str]]:
    """The circuit, and what was told on the way."""
    told: list[str] = []
    with listening(lambda *step: None, told.append):
        circuit = build_circuit(model, toy_task(), analysis, allow_weak=True, top="all", **options)
    return circuit, [line for line in told if "memory" in line]


@pytest.mark.parametrize(
    ("analysis", "options"),
    [
        ("edge-attribution", {"verify": 0}),
        ("edge-attribution", {"verify": 3, "method": "eap", "ablation": "mean"}),
        ("path-patching", {}),
        ("path-patching", {"scope": "nodes", "mode": "noise"}),
    ],
)
@pytest.mark.parametrize("rows", [2, 1])
def test_halved_batches_give_the_same_numbers(
    rows: int, analysis: str, options: dict[str, Any], model: TracedModel,
    memory: Callable[[int], list[int]],
) -> None:  # fmt: skip
    """Memory for 2 rows, or for 1, where all 5 pairs were to run at once: equal to 1e-5.

    The last passes all fit, and what was halved is told, from what to what.
    """
    expected, told = build(model, analysis, **options)
    assert told == []
    passes = memory(rows)
    found, told = build(model, analysis, **options)
    assert max(passes) > rows
    assert "out of memory: batches are halved, pairs 5 → 2" in told[0]
    assert scores(found) == pytest.approx(scores(expected), rel=1e-5, abs=1e-5)
    assert len(scores(found)) > 5


def test_halved_batches_are_those_that_may_be_asked_for(
    model: TracedModel, memory: Callable[[int], list[int]]
) -> None:
    """5 pairs halved to 2 give bit for bit what a batch size of 2 gives."""
    expected, _ = build(model, "edge-attribution", verify=0, batch_size=2)
    memory(2)
    found, _ = build(model, "edge-attribution", verify=0)
    assert scores(found) == scores(expected)


def test_memory_for_nothing_is_refused_with_advice(
    model: TracedModel, memory: Callable[[int], list[int]]
) -> None:
    """With one pair and one patch at a time there is nothing to halve: exit 5, and what helps."""
    memory(0)
    with pytest.raises(ResourceError, match="one pair and one patch at a time: use shorter pr"):
        build(model, "path-patching")
    assert ResourceError.exit_code == 5


def test_what_was_kept_is_not_done_again(model: TracedModel, tmp_path: Path) -> None:
    """Memory runs out late in a run with a state: only what was left is patched, in halves."""
    pairs = model.encode(toy_task())
    edges = list(model.wiring.edges)
    expected = edge_effects(model, pairs, edges)
    done: list[int] = []
    real = StateFile.keep

    def keep(self: StateFile, stage: str, state: Any) -> None:
        real(self, stage, state)
        done.append(int((~state["effects"].isnan()).sum()))
        if len(done) == 2:
            raise torch.OutOfMemoryError

    with StateFile(tmp_path / "s") as state, pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFile, "keep", keep)

        def work() -> torch.Tensor:
            with state.used({}, torch.device("cpu")):
                return edge_effects(model, pairs, edges, stage="edges")

        found = fitting(work)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert done == sorted(done)
    assert len(set(done)) == len(done)  # each step after it adds to what was there


def test_shards_of_other_memory_share_the_same_parts(
    model: TracedModel, memory: Callable[[int], list[int]], tmp_path: Path
) -> None:
    """One shard ran out of memory and one did not: put together they have each edge once."""
    pairs = model.encode(toy_task())
    expected = edge_effects(model, pairs, list(model.wiring.edges))
    whole, _ = build(model, "path-patching", mode="noise")
    paths = [tmp_path / "1", tmp_path / "2"]
    for number, (path, rows) in enumerate(zip(paths, (10**9, 2), strict=True), start=1):
        memory(rows)
        with StateFile(path, (number, 2)) as state, pytest.raises(ShardDone):
            build(model, "path-patching", mode="noise", resume=state)
    memory(10**9)
    with StateFile(tmp_path / "whole") as state:
        merge(state, paths)
        assert torch.allclose(
            state.kept["edges, noise"]["state"]["effects"], expected, rtol=1e-5, atol=1e-5
        )
        found, _ = build(model, "path-patching", mode="noise", resume=state)
    assert scores(found) == pytest.approx(scores(whole), rel=1e-5, abs=1e-5)


def test_sizes_are_halved_once_for_each_time(model: TracedModel) -> None:
    """A size that is chosen from a chosen size is not halved twice; plans do not change."""
    pairs = model.encode(toy_task())
    seen = []

    def work() -> int:
        size = choose_batch_size(model, pairs, choose_batch_size(model, pairs))
        seen.append((size, choose_batch_size(model, pairs, 4), patches_at_once(model, 1, 6) > 1))
        with as_planned():
            assert choose_batch_size(model, pairs) == 5
        if len(seen) < 3:
            raise torch.OutOfMemoryError
        return size

    assert fitting(work) == 1
    assert [sizes[:2] for sizes in seen] == [(5, 4), (2, 2), (1, 1)]
    assert choose_batch_size(model, pairs) == 5


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)
def test_a_cpu_runs_out_of_memory_too(error: Exception, model: TracedModel) -> None:
    """Neither error is torch's own for it; another RuntimeError is still the plugin's fault."""

    def greedy(model: TracedModel, task: Any) -> CircuitGraph:
        """Takes all."""
        raise error

    def wrong(model: TracedModel, task: Any) -> CircuitGraph:
        """Fails."""
        raise RuntimeError("no")

    class Plugin:
        @hookimpl
        def register_analyses(self, register: Callable[..., None]) -> None:
            register("greedy", greedy)
            register("wrong", wrong)

    registry = Registry.load()
    registry.add(Plugin(), PluginInfo("own", "circuitlab-own", "1"))
    with pytest.raises(ResourceError, match="out of memory with one pair"):
        build_circuit(model, toy_task(), "greedy", registry=registry, allow_weak=True)
    with pytest.raises(PluginError, match="RuntimeError: no"):
        build_circuit(model, toy_task(), "wrong", registry=registry, allow_weak=True)
