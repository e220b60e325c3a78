"""Row 43: a kept run that is begun anew, whatever is there, and says what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitlab import checkpoint

Lab = Callable[..., Any]

#: Six steps, each noted in ``steps.log``; the environment says after which one it is interrupted.
STEPS = """
import os

import circuitlab.checkpoint
from circuitlab import CircuitGraph, Checkpoint

circuitlab.checkpoint.EVERY = 0.0


@circuitlab.hookimpl
def register_analyses(register):
    register("steps", steps)


def steps(model, task):
    import torch

    with Checkpoint("steps") as saved:
        state = saved.load() or {"drawn": torch.zeros(6), "done": torch.tensor(0)}
        for step in range(int(state["done"]), 6):
            state["drawn"][step] = torch.randn(())
            state["done"] = torch.tensor(step + 1)
            with open("steps.log", "a") as log:
                log.write(f"{step}")
            saved.keep(state)
            if str(step) == os.environ.get("STOP"):
                raise KeyboardInterrupt
    return CircuitGraph(drawn=state["drawn"].tolist())
"""


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plugin changes in this process is changed back."""
    monkeypatch.setattr(checkpoint, "EVERY", checkpoint.EVERY)


@pytest.fixture
def command(install: Any, ids_model: Path, ids_task: Path) -> tuple[str | Path, ...]:
    """A command that takes the steps and writes ``c.json``."""
    install("circuitlab-steps", "steps", STEPS)
    return (
        "trace", "steps", "--model", ids_model, "--task-file", ids_task, "--seed", "3",
        "--output", "c.json", "--resume", "run.state",
    )  # fmt: skip


def drawn(folder: Path) -> list[float]:
    """What the circuit written holds; the file is removed."""
    path = folder / "c.json"
    found: list[float] = json.loads(path.read_text("utf-8"))["graph"]["drawn"]
    path.unlink()
    return found


def steps(folder: Path) -> str:
    """Steps taken since the last look."""
    log = folder / "steps.log"
    taken = log.read_text()
    log.unlink()
    return taken


@pytest.mark.parametrize(
    ("others", "damage", "words"),
    [
        (("--seed", "4"), False, "of another run, seed was 4 and is 3"),
        ((), False, "of the same settings"),
        ((), True, "damaged, or of another program or shard"),
    ],
)
def test_row_43_force_new_begins_anew(
    others: tuple[str, ...], damage: bool, words: str, command: tuple[Any, ...], lab: Lab,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A state of other settings, of the same ones, or damaged: said, and not gone on with."""
    path = tmp_path / "run.state"
    assert lab(*command).code == 0
    straight = drawn(tmp_path)
    assert lab(*command, *others, env={"STOP": "2"}).code == 130
    assert steps(tmp_path) == "012345012"
    if damage:
        path.write_bytes(path.read_bytes()[:-1])
    done = lab(*command, "--force-new")
    assert done.code == 0
    said = f"warning: state '{path}', {words}, is not gone on with: begun anew"
    assert said in done.err.splitlines()
    assert "going on from" not in done.err
    assert steps(tmp_path) == "012345"
    assert drawn(tmp_path) == straight
    assert not path.exists()


def test_row_43_a_forced_run_is_gone_on_with(
    command: tuple[Any, ...], lab: Lab, tmp_path: Path
) -> None:
    """Begun anew and stopped, it goes on by the same command without the flag."""
    assert lab(*command).code == 0
    straight = drawn(tmp_path)
    assert lab(*command, "--seed", "4", env={"STOP": "4"}).code == 130
    assert lab(*command, "--force-new", env={"STOP": "1"}).code == 130
    steps(tmp_path)
    done = lab(*command)
    assert (done.code, "going on from run.state" in done.err) == (0, True)
    assert steps(tmp_path) == "2345"
    assert drawn(tmp_path) == straight


def test_row_43_without_a_state_there_is_nothing_to_force(
    command: tuple[Any, ...], lab: Lab
) -> None:
    """Exit 2 without a file or folder; with a file that is not there yet, a plain run."""
    done = lab(*command[:-2], "--force-new")
    assert done.code == 2
    assert "--force-new begins a kept run anew; name it with --resume or --run" in done.err
    done = lab(*command, "--force-new")
    assert (done.code, "begun anew" in done.err) == (0, False)
