"""Sums over pairs in parts: an interrupted or split run has the bytes of one that was neither."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from circuitlab_edge_attribution import parts
from circuitlab_edge_attribution.attribution import EdgeScores, Scorer, edge_scores
from circuitlab_edge_attribution.parts import cut_into_parts
from random_tasks import random_task

from circuitlab import EncodedTask, TracedModel, load_model, memory, sharded
from circuitlab.checkpoint import StateFile
from circuitlab.shards import ShardDone, merge

CPU = torch.device("cpu")
N = 11


@pytest.fixture(scope="module")
def model() -> TracedModel:
    module: Any = oracles.random_gpt2(2, 2, 16)
    return load_model((module, None))


@pytest.fixture(scope="module")
def pairs(model: TracedModel) -> EncodedTask:
    return model.encode(random_task([6, 4, 5] * 3 + [6, 6]))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the pairs that were scored, in order."""
    numbers: list[int] = []
    add = Scorer.add

    def noted(scorer: Scorer, batch: EncodedTask) -> None:
        numbers.extend(batch.numbers)
        add(scorer, batch)

    monkeypatch.setattr(Scorer, "add", noted)
    return numbers


def scores(model: TracedModel, pairs: EncodedTask, **options: Any) -> EdgeScores:
    return edge_scores(model, pairs, ig_steps=2, stage="attribution", **options)


def same(one: EdgeScores, other: EdgeScores) -> bool:
    """Whether all numbers are equal bit for bit."""
    return torch.equal(one.scores, other.scores) and one.completeness == other.completeness


@pytest.mark.parametrize(
    ("planned", "n_scores", "n"),
    [(1, 10, 11), (4, 10, 3), (20, 10, 1), (2, 2**25 // 3, 3), (1, 2**40, 1)],
)
def test_parts_are_whole_batches(planned: int, n_scores: int, n: int, pairs: EncodedTask) -> None:
    """Every pair once and in order, cut between batches, few enough to be kept together."""
    found = cut_into_parts(pairs, planned, n_scores)
    assert len(found) == n
    assert [number for part in found for number in part.numbers] == list(range(1, N + 1))
    assert all(len(part) % planned == 0 for part in found[:-1])
    sizes = [-(-len(part) // planned) for part in found]
    assert max(sizes) - min(sizes) <= 1


def test_parts_are_limited(pairs: EncodedTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than so many, and never one without a pair."""
    monkeypatch.setattr(parts, "MOST", 4)
    assert [len(part) for part in cut_into_parts(pairs, 1, 1)] == [2, 3, 3, 3]


@pytest.mark.parametrize("size", [1, 3, None])
def test_sums_are_those_of_single_pairs(
    size: int | None, model: TracedModel, pairs: EncodedTask
) -> None:
    """The mean over parts is the mean of scores of each pair alone."""
    alone = [scores(model, pairs.rows([n])) for n in range(N)]
    found = scores(model, pairs, batch_size=size)
    mean = torch.stack([one.scores for one in alone]).mean(0)
    torch.testing.assert_close(found.scores, mean, rtol=1e-5, atol=1e-8)
    effect = sum(one.completeness.effect for one in alone) / N
    assert found.completeness.effect == pytest.approx(effect, rel=1e-6)
    at_clean = sum(one.completeness.at_clean for one in alone) / N
    assert found.completeness.at_clean == pytest.approx(at_clean, rel=1e-4)


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_an_interrupted_run_has_the_same_bytes(
    ablation: Any, model: TracedModel, pairs: EncodedTask, tmp_path: Path, added: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped in the middle of a part: that part is done again, those before it are not."""
    monkeypatch.setattr(parts, "MOST", 3)
    options: dict[str, Any] = {"batch_size": 2, "ablation": ablation}
    straight = scores(model, pairs, **options)
    assert added == list(range(1, N + 1))
    added.clear()
    real = parts._batches

    def stopping(*work: Any) -> Any:
        for n, batch in enumerate(real(*work)):
            if n == 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            with StateFile(tmp_path / "s") as state, state.used({}, CPU):
                scores(model, pairs, **options)
    assert added == [1, 2, 3, 4, 5, 6]
    added.clear()
    with StateFile(tmp_path / "s") as state, state.used({}, CPU):
        again = scores(model, pairs, **options)
    assert added == list(range(5, N + 1))
    assert same(again, straight)


@pytest.mark.parametrize("n", [2, 4, 13])
def test_shards_have_the_bytes_of_one_run(
    n: int, model: TracedModel, pairs: EncodedTask, tmp_path: Path, added: list[int]
) -> None:
    """Shards score each pair once, and put together nothing is scored again."""
    straight = scores(model, pairs, batch_size=1)
    added.clear()

    def work() -> EdgeScores:
        with sharded():
            return scores(model, pairs, batch_size=1)
        raise AssertionError  # a shard has ended

    files = [tmp_path / str(number) for number in range(n)]
    for number, path in enumerate(files, start=1):
        with StateFile(path, (number, n)) as state, state.used({}, CPU), pytest.raises(ShardDone):
            work()
    assert sorted(added) == list(range(1, N + 1))
    added.clear()
    with StateFile(tmp_path / "whole") as state:
        merge(state, files)
        with state.used({}, CPU):
            assert same(work(), straight)
    assert added == []


def test_parts_do_not_depend_on_the_memory_left(
    model: TracedModel, pairs: EncodedTask, tmp_path: Path
) -> None:
    """A shard whose batches were halved has the same parts, and fits the others."""

    def work(*, fails: bool) -> None:
        caps: Any = memory._caps.get()
        if fails and not caps.most:
            memory.choose_batch_size(model, pairs, 4)
            raise torch.OutOfMemoryError
        with sharded():
            scores(model, pairs, batch_size=4)

    files = [tmp_path / str(number) for number in range(2)]
    for number, path in enumerate(files, start=1):
        with StateFile(path, (number, 2)) as state, state.used({}, CPU), pytest.raises(ShardDone):
            memory.fitting(partial(work, fails=number == 1))
    with StateFile(tmp_path / "whole") as state:
        merge(state, files)
        with state.used({}, CPU):
            found = scores(model, pairs, batch_size=4)
    torch.testing.assert_close(found.scores, scores(model, pairs).scores, rtol=1e-5, atol=1e-8)


def test_adaptive_points_keep_no_state(
    model: TracedModel, pairs: EncodedTask, tmp_path: Path
) -> None:
    """What is found between points is no sum: nothing is kept, and the numbers are the same."""
    some = pairs.rows([0, 1])
    with StateFile(tmp_path / "s") as state, state.used({}, CPU):
        found = scores(model, some, ig_rule="adaptive")
        assert state.stages == []
    assert same(found, edge_scores(model, some, ig_steps=2, ig_rule="adaptive"))
