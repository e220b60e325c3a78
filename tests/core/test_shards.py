"""Shards: a run's work split into parts, done apart, and put together or refused."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitlab import (
    Checkpoint,
    CircuitGraph,
    OptionError,
    PluginError,
    Task,
    TaskError,
    TracedModel,
    build_circuit,
    edge_effects,
    hookimpl,
    sharded,
    shards,
)
from circuitlab.checkpoint import StateFile
from circuitlab.registry import PluginInfo, Registry
from circuitlab.shards import ShardDone, merge
from circuitlab.testing import tiny_model, toy_task

CPU = torch.device("cpu")
N = 7


def square(parts: list[int] | None = None, *, draw: bool = False) -> list[float]:
    """Squares of 0 to 6, each one a part; with ``parts`` these and no others are done."""
    with sharded():
        try:
            with Checkpoint("squares") as saved:
                state = saved.load() or {"squares": torch.full((N,), torch.nan)}
                for row in saved.share(range(N)) if parts is None else parts:
                    if draw:
                        torch.rand(1)
                    state["squares"][row] = row**2
                    saved.keep(state)
        except Exception as error:  # what a plugin may write
            raise AssertionError from error
    return state["squares"].tolist()


def run(path: Path, shard: tuple[int, int] | None, seed: int = 0, **options: Any) -> Any:
    """The squares as an analysis; what a shard has when it ends, None for its own."""
    with StateFile(path, shard) as state, state.used({"seed": seed}, CPU):
        try:
            return square(**options)
        except ShardDone:
            return state.kept.get("squares", {}).get("state", {}).get("squares")


def paths(folder: Path, n: int) -> list[Path]:
    return [folder / f"{number}.state" for number in range(n)]


def put_together(folder: Path, n: int, seed: int = 0) -> Any:
    """What an analysis makes of all shards, and the parts that are still shared out then."""
    with StateFile(folder / "whole") as state:
        merge(state, paths(folder, n))
        with state.used({"seed": seed}, CPU):
            return square(parts=[])


def test_the_example_works() -> None:
    """Outside a shard, all parts are done and the block goes on."""
    assert doctest.testmod(shards).failed == 0
    assert doctest.testmod(shards).attempted > 3
    assert square() == [0, 1, 4, 9, 16, 25, 36]


@pytest.mark.parametrize("n", [2, 3, 7, 9])
def test_shards_have_each_part_once(n: int, tmp_path: Path) -> None:
    """Together they have all parts, apart no part twice; more shards than parts do no harm."""
    found = [run(path, (i, n)) for i, path in enumerate(paths(tmp_path, n), 1)]
    counts = sum((~part.isnan()).int() for part in found if part is not None)
    assert counts.tolist() == [1] * N
    assert put_together(tmp_path, n) == [0, 1, 4, 9, 16, 25, 36]
    assert not (tmp_path / "whole").exists()
    assert all(path.exists() for path in paths(tmp_path, n))


def test_only_what_is_inside_is_shared(tmp_path: Path) -> None:
    """A stage outside the block has all its parts, in a shard too."""
    with (
        StateFile(tmp_path / "s", (2, 3)) as state,
        state.used({}, CPU),
        Checkpoint("before") as saved,
    ):
        assert saved.share("abc") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"parts": [0, 1, 3, 5]}, "two shards have done the same parts of stage 'squares'"),
        ({"parts": [1, 3]}, "all shards together lack 1 of 7 values of stage 'squares'"),
        ({"draw": True}, "shards drew different random numbers in stage 'squares'"),
        ({"seed": 4}, "shard 2 of 2 is of another run than shard 1: seed was 0 and is 4"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    second: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Parts done twice or never, other random numbers, other settings: nothing is put together."""
    first, other = paths(tmp_path, 2)
    run(first, (1, 2))
    run(other, (2, 2), **second)
    with pytest.raises(TaskError, match=words):
        put_together(tmp_path, 2)


def test_a_shard_that_is_not_done_is_refused(tmp_path: Path) -> None:
    """Not begun, and stopped on the way, are told apart; neither is put together."""
    first, other = paths(tmp_path, 2)
    run(first, (1, 2))
    with pytest.raises(TaskError, match="shard 2 of 2 has not been run"):
        put_together(tmp_path, 2)

    def stop() -> None:
        with StateFile(other, (2, 2)) as state, state.used({"seed": 0}, CPU):
            with sharded(), Checkpoint("squares") as saved:
                saved.keep({"squares": torch.full((N,), torch.nan)})
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    with pytest.raises(TaskError, match="shard 2 of 2 is not complete"):
        put_together(tmp_path, 2)
    run(other, (2, 2))
    assert put_together(tmp_path, 2)[5] == 25


@pytest.mark.parametrize("other", [None, (2, 4), (3, 3)])
def test_a_shard_is_no_other(other: tuple[int, int] | None, tmp_path: Path) -> None:
    """Neither a whole run nor another shard goes on from a shard's state."""
    run(tmp_path / "s", (2, 3))
    with pytest.raises(TaskError, match=r"is of shard 2 of 3, not of (a whole run|shard \d of \d)"):
        run(tmp_path / "s", other)


@pytest.mark.parametrize("size", [2, None])
def test_shards_of_edges_have_the_bytes_of_one_run(
    size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact effects of all edges, of 4 shards and of one run: equal bit for bit."""
    model = tiny_model()
    pairs = model.encode(toy_task())
    edges = list(model.wiring.edges)
    expected = edge_effects(model, pairs, edges, batch_size=size)

    def work() -> torch.Tensor:
        with sharded():
            return edge_effects(model, pairs, edges, batch_size=size, stage="edges")
        raise AssertionError  # a shard has ended

    for number, path in enumerate(paths(tmp_path, 4), start=1):
        with StateFile(path, (number, 4)) as state, state.used({}, CPU), pytest.raises(ShardDone):
            work()
    with StateFile(tmp_path / "whole") as state:
        merge(state, paths(tmp_path, 4))
        monkeypatch.setattr("circuitlab.patcher.Patcher.edges", None)  # nothing is left to do
        with state.used({}, CPU):
            assert torch.equal(work(), expected)


# --- what an analysis says of itself --------------------------------------------------------------


def splitting(model: TracedModel, task: Task, *, how: str = "well") -> CircuitGraph:
    """Can be split when it is done well."""
    if how == "well":
        square()
    return CircuitGraph()


def lying(model: TracedModel, task: Task) -> CircuitGraph:
    """Says it can be split and cannot."""
    return CircuitGraph()


def registry() -> Registry:
    class Plugin:
        @hookimpl
        def register_analyses(self, register: Callable[..., None]) -> None:
            register("splitting", splitting, shards={"how": "well"})
            register("lying", lying, shards={})
            register("whole", lying)

    found = Registry.load()
    found.add(Plugin(), PluginInfo("own", "circuitlab-own", "1"))
    return found


def build(path: Path, analysis: str, **options: Any) -> CircuitGraph:
    with StateFile(path, (1, 2)) as state:
        return build_circuit(
            tiny_model(), toy_task(), analysis,
            resume=state, registry=registry(), allow_weak=True, **options,
        )  # fmt: skip


def test_an_analysis_is_split_as_it_says(tmp_path: Path) -> None:
    """As declared it is split; undeclared, or with other options, it is refused by name."""
    with pytest.raises(ShardDone):
        build(tmp_path / "a", "splitting")
    with pytest.raises(OptionError, match="'splitting' can be split into shards with --how well"):
        build(tmp_path / "b", "splitting", how="badly")
    with pytest.raises(OptionError, match=r"'whole' cannot be split .* lying, path-pat.*splitting"):
        build(tmp_path / "c", "whole")
    with pytest.raises(PluginError, match=r"'lying' of plugin 'own' .* no part of its work in"):
        build(tmp_path / "d", "lying")
