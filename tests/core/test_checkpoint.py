"""Checkpoints: what is kept comes back, whole or not at all, and to nobody else."""

from __future__ import annotations

import doctest
import errno
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from circuitlab import (
    Checkpoint,
    OptionError,
    ResourceError,
    TaskError,
    checkpoint,
)
from circuitlab.checkpoint import StateFile, digest

CPU = torch.device("cpu")
SETTINGS = {"seed": 0, "task": "toy"}


class Stopped(BaseException):
    """What ends a run here, as Ctrl-C would."""


def run(path: Path, work: Callable[[], Any], **settings: Any) -> Any:
    """``work`` as an analysis whose state is kept at ``path``."""
    with StateFile(path) as state, state.used({**SETTINGS, **settings}, CPU):
        return work()


def keep(*stages: str, stop: bool = True) -> None:
    """Keep a state of each stage."""
    for number, stage in enumerate(stages):
        with Checkpoint(stage) as saved:
            saved.keep({"x": torch.tensor([1.5, number]), "done": torch.tensor(True)})
    if stop:
        raise Stopped


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The file that an interrupted run with one stage, ``a``, has left."""
    path = tmp_path / "run.state"
    with pytest.raises(Stopped):
        run(path, lambda: keep("a"))
    return path


def loaded(stage: str) -> dict[str, Any] | None:
    with Checkpoint(stage) as saved:
        found = saved.load()
    return found and {name: tensor.tolist() for name, tensor in found.items()}


def test_nobody_asked() -> None:
    """Without a state file nothing is loaded, and keeping does nothing; so the example works."""
    with Checkpoint("a") as saved:
        saved.keep({"x": torch.ones(2)})
        assert saved.load() is None
    assert doctest.testmod(checkpoint).failed == 0
    assert doctest.testmod(checkpoint).attempted == 3


def test_what_was_kept_comes_back(state: Path) -> None:
    """A later run gets the values, types and shapes of the stage; another stage gets nothing."""
    assert run(state, lambda: (loaded("a"), loaded("b")))[0] == {"x": [1.5, 0.0], "done": True}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(3.0).expand(2, 2),
        torch.zeros(0, 4, dtype=torch.bool),
        torch.tensor(2**60),
        torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_every_kind_of_tensor_comes_back(tensor: torch.Tensor, tmp_path: Path) -> None:
    """Views, empty ones, scalars and half precision come back with their dtype and shape."""

    def stop() -> None:
        with Checkpoint("a") as saved:
            saved.keep({"x": tensor})
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "s", stop)

    def load() -> dict[str, torch.Tensor] | None:
        return Checkpoint("a").__enter__().load()

    found = run(tmp_path / "s", load)["x"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)


def test_a_state_is_as_it_was_when_it_was_kept(tmp_path: Path) -> None:
    """What is changed after ``keep`` or after ``load`` does not reach the file."""
    path = tmp_path / "s"

    def stop() -> None:
        with Checkpoint("a") as saved:
            x = torch.zeros(2)
            saved.keep({"x": x})
            x += 1
            saved.keep({"x": x})
            x += 1
            raise Stopped

    def change() -> None:
        with Checkpoint("a") as saved:
            found = saved.load() or {}
            assert found["x"].tolist() == [1, 1]
            found["x"] += 5
            raise Stopped

    with pytest.raises(Stopped):
        run(path, stop)
    for _ in range(2):
        with pytest.raises(Stopped):
            run(path, change)


def test_stages_are_kept_side_by_side(tmp_path: Path) -> None:
    """A run of two stages that is stopped in the second finds both again."""
    path = tmp_path / "s"
    with pytest.raises(Stopped):
        run(path, lambda: keep("a", "b"))
    a, b = run(path, lambda: (loaded("a"), loaded("b")))
    assert (a["x"], b["x"]) == ([1.5, 0], [1.5, 1])


def test_a_stage_is_one_of_a_run() -> None:
    """Two stages of one name would take each other's state; ``/`` is refused as a name too."""
    with StateFile(None) as file, file.used({}, CPU):
        keep("a", stop=False)
        with pytest.raises(ValueError, match="this run has had a stage 'a'; give each one"):
            keep("a")
        with pytest.raises(ValueError, match="stage 'a/b' has a '/'"):
            Checkpoint("a/b")


def test_file_goes_when_the_run_succeeds(state: Path) -> None:
    """It stays when a run is stopped or fails, and is gone, lock and all, after a success."""
    with pytest.raises(ZeroDivisionError):
        run(state, lambda: 1 / 0)
    assert [path.name for path in state.parent.iterdir()] == ["run.state"]
    run(state, lambda: loaded("a"))
    assert list(state.parent.iterdir()) == []


def test_it_is_written_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first state at once, then one in :data:`EVERY` seconds, and the last at the end."""
    path, now, written = tmp_path / "s", [0.0], []
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *ends: (written.append(now[0]), replace(*ends)))

    def work() -> None:
        with Checkpoint("a") as saved:
            for second in range(13):
                now[0] = float(second)
                saved.keep({"x": torch.tensor(second)})

    run(path, work)
    assert written == [0, 5, 10, 12]


# --- the same as if it had never stopped ----------------------------------------------------------


def walk(stop: int, steps: list[int]) -> list[float]:
    """A random walk in two stages of five steps, with a draw between; stopped before one."""
    ends = []
    for stage in range(2):
        with Checkpoint(f"walk {stage}") as saved:
            begun = saved.load() or {"place": torch.rand(()), "done": torch.tensor(0)}
            place, done = begun["place"], int(begun["done"])
            for step in range(done, 5):
                if 5 * stage + step == stop:
                    raise Stopped
                place = place + torch.randn(()) / (1 + place**2)
                steps.append(5 * stage + step)
                saved.keep({"place": place, "done": torch.tensor(step + 1)})
        ends += [place.item(), torch.rand(()).item()]
    return ends


@pytest.mark.parametrize("stops", [[k] for k in range(10)] + [[0, 3, 3, 8]])
def test_a_walk_that_was_stopped_ends_where_it_would_have(stops: list[int], tmp_path: Path) -> None:
    """Wherever it is stopped, the numbers drawn are the same, and no step is done twice."""
    torch.manual_seed(1)
    straight = walk(-1, [])
    steps: list[int] = []
    for stop in stops:
        torch.manual_seed(1)
        with pytest.raises(Stopped):
            run(tmp_path / "s", lambda stop=stop: walk(stop, steps))
        torch.rand(7)
    torch.manual_seed(1)
    assert run(tmp_path / "s", lambda: walk(-1, steps)) == straight
    assert steps == list(range(10))


# --- what is refused ------------------------------------------------------------------------------


def test_state_of_other_settings_names_each_of_them(state: Path) -> None:
    """Every setting that differs is named with both values; the file is left as it is."""
    before = state.read_bytes()
    with pytest.raises(TaskError) as caught:
        run(state, lambda: None, seed=1, task=None, top=4)
    assert str(caught.value) == (
        f"state '{state}' is of another run: seed was 0 and is 1, task was toy and is None, top "
        f"was None and is 4; go back to those settings, name another file, or delete this one to "
        f"start again, as --force-new does"
    )
    assert state.read_bytes() == before


def test_damage_is_never_taken_for_a_state(state: Path) -> None:
    """With any byte changed, or the end cut off anywhere, the file is refused as damaged."""
    whole = state.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 97)]
    damaged += [
        whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :]
        for n in [*range(700), *range(700, len(whole), 31)]
    ]
    for content in damaged:
        state.write_bytes(content)
        with pytest.raises(TaskError, match="delete this one to start again"):
            run(state, lambda: None)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "safetensors"])
def test_another_file_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    """A pickle is not opened, and no other file is taken, overwritten or removed."""
    path = tmp_path / "other"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif kind == "torch":
        torch.save({"x": Trap()}, path)
    elif kind == "text":
        path.write_text("prompts = []\n")
    else:
        save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    before = path.read_bytes()
    with pytest.raises(TaskError, match=r"no state of a run|another program or version"):
        run(path, lambda: keep("a"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


class Trap:
    """Ends the test when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    """A folder, or a name in a folder that is not there, is refused before anything is done."""
    with pytest.raises(ResourceError, match="is a folder; name a file"):
        run(tmp_path, lambda: pytest.fail("begun"))
    with pytest.raises(ResourceError, match="cannot be kept there: No such file or directory"):
        run(tmp_path / "none" / "s", lambda: pytest.fail("begun"))


def test_a_full_disk_leaves_the_old_state(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails is an error, leaves no draft, and the file is the one before."""
    before = state.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="cannot be written: No space left on device; check"):
        run(state, lambda: keep("b"))
    assert state.read_bytes() == before
    assert [path.name for path in state.parent.iterdir()] == ["run.state"]


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    """Who holds it is named by process and machine, also by another path; then it is free."""
    path, link = tmp_path / "s", tmp_path / "link"
    link.symlink_to(path)
    with StateFile(path):
        for name in (path, link):
            with pytest.raises(OptionError) as caught, StateFile(name):
                pytest.fail("two at once")
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            assert f"state '{path}' is in use by {owner}; wait" in str(caught.value)
    with StateFile(link):
        pass


def test_digest_is_of_names_types_shapes_and_values() -> None:
    """Whatever differs, the digest does; the order in which tensors come does not count."""
    x = torch.zeros(2, 2)
    others = [{"y": x}, {"x": x.view(4)}, {"x": x.int()}, {"x": x + 1}, {"x": x, "y": x}, {}]
    assert len({digest(one) for one in [{"x": x}, *others]}) == 7
    assert digest({"x": x, "y": x}) == digest({"y": x.clone(), "x": x})
    assert digest({"x": torch.arange(4).view(2, 2).T}) == digest(
        {"x": torch.tensor([[0, 2], [1, 3]])}
    )
