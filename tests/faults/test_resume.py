"""Runs that are interrupted, terminated or killed, and gone on with by ``--resume``."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Callable[..., Any]

STEPS = 30
#: Scores heads one by one, with a draw for each; a line in ``steps.log`` for each step done.
#: The environment says in which step, and where in it, what happens to the process.
SLOW = '''
import os
import signal
import time

import circuitlab.checkpoint
from circuitlab import CircuitGraph, Checkpoint, track

STEPS = 30


def fault():
    return os.environ.get("FAULT", "-1 none none").split()


@circuitlab.hookimpl
def register_analyses(register):
    register("slow", slow)
    register("forgetful", forgetful)
    register("stubborn", stubborn)
    register("deaf", deaf)


def at(place, step):
    if [str(step), place] == fault()[:2]:
        if fault()[2] == "WAIT":
            open("waiting", "w").close()
            while not os.path.exists("go-on"):
                time.sleep(0.05)
        else:
            os.kill(os.getpid(), getattr(signal, fault()[2]))


def forgetful(model, task, *, size: float = 1.0):
    """Keeps nothing."""
    at("step", 5)
    return CircuitGraph()


def stubborn(model, task):
    """Takes its time to end, and is interrupted in it."""
    try:
        at("step", 1)
    finally:
        at("step", 1)
        time.sleep(1000)


def deaf(model, task):
    """Does not let a signal through."""
    with Checkpoint("scores") as saved:
        for step in track(range(10), "working"):
            try:
                exec("at('step', step)")
            except BaseException:
                continue
            saved.keep({})
            try:
                at("kept", step)
            except BaseException as error:
                raise RuntimeError("caught") from error
            exec("at('exec', step)")
    return CircuitGraph()


def slow(model, task, *, size: float = 1.0):
    """Draw a score for each step."""
    import torch

    number, place, event = fault()
    if event == "SIGKILL":  # in a process of its own: each state is written, or only the first one
        circuitlab.checkpoint.EVERY = 1e9 if place == "kept" else 0.0
    if place in ("fsync", "replace"):
        real, calls = getattr(os, place), []

        def faulty(*arguments):
            calls.append(arguments)
            if len(calls) == int(number) and place == "fsync":
                os.ftruncate(arguments[0], 1000)
            at(place, len(calls))
            return real(*arguments)

        setattr(os, place, faulty)
    with Checkpoint("scores") as saved:
        state = saved.load() or {"scores": torch.zeros(STEPS), "done": torch.tensor(0)}
        done = int(state["done"])
        for step in track(range(done, STEPS), "drawing", done=done):
            state["scores"][step] = size * torch.randn(())
            with open("steps.log", "a") as log:
                log.write(f"{step}\\n")
            at("step", step)
            state["done"] = torch.tensor(step + 1)
            saved.keep(state)
            at("kept", step)
    circuit = CircuitGraph()
    circuit.add_component("logits", kind="logits", layer=2)
    for step, score in enumerate(state["scores"].tolist()):
        circuit.add_component(f"step {step}", kind="step", layer=0)
        circuit.add_effect(f"step {step}", "logits", score)
    return circuit
'''


@pytest.fixture
def slow(install: Any, ids_model: Path, ids_task: Path) -> tuple[str | Path, ...]:
    """A command that takes :data:`STEPS` steps and writes ``c.json``."""
    install("circuitlab-slow", "slow", SLOW)
    return (
        "trace", "slow", "--model", ids_model, "--task-file", ids_task, "--seed", "3",
        "--output", "c.json",
    )  # fmt: skip


@pytest.fixture
def interrupted(lab: Lab) -> Lab:
    """``interrupted(*command, fault=...)``: in this process, whose handlers are put back."""

    def run(*command: str | Path, fault: str) -> Any:
        try:
            return lab(*command, env={"FAULT": fault})
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    return run


@pytest.fixture
def straight(slow: tuple[Any, ...], lab: Lab, tmp_path: Path) -> str:
    """The circuit of a run that nothing happens to."""
    assert lab(*slow).code == 0
    assert steps(tmp_path) == list(range(STEPS))
    return circuit(tmp_path)


def circuit(folder: Path) -> str:
    """The circuit written, but for how long it took; the file and the steps' log are removed."""
    path = folder / "c.json"
    found = json.loads(path.read_text("utf-8"))
    assert found["graph"].pop("seconds") > 0
    path.unlink()
    (folder / "steps.log").unlink()
    return json.dumps(found)


def steps(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "steps.log").read_text().split()]


def left(folder: Path) -> set[str]:
    """Files that this command may have left: its state, lock and draft."""
    return {path.name for path in folder.iterdir() if "run.state" in path.name}


def told(done: Any) -> list[str]:
    """The command that the last line of stderr tells to resume with."""
    line = done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    word, _, command = line.partition("; resume with: ")
    assert word in ("error: interrupted", "error: terminated")
    name, *arguments = shlex.split(command)
    assert name == "circuitlab"
    return arguments


# --- 37, 38: interrupted, terminated --------------------------------------------------------------


@pytest.mark.parametrize(("row", "name", "code"), [(37, "SIGINT", 130), (38, "SIGTERM", 143)])
def test_row_37_38_an_interrupted_run_goes_on_where_it_was(
    row: int, name: str, code: int, straight: str, slow: tuple[Any, ...], process: Lab,
    interrupted: Lab, lab: Lab, tmp_path: Path,
) -> None:  # fmt: skip
    """Stopped twice, then left alone: the command told to resume gives the very same circuit.

    A step that was kept is not done again, the one that was under way is.
    """
    stopped = process(*slow, "--resume", "run.state", env={"FAULT": f"11 kept {name}"})
    assert (stopped.code, stopped.out) == (code, "")
    assert left(tmp_path) == {"run.state"}
    again = interrupted(*told(stopped), fault="20 step SIGINT")
    assert (again.code, again.out) == (130, "")
    assert "going on from run.state" in again.err
    assert "drawing: 12 of 30" in again.err.splitlines()
    assert lab(*told(again)).code == 0
    assert steps(tmp_path) == [*range(21), *range(20, STEPS)]
    assert circuit(tmp_path) == straight
    assert left(tmp_path) == set()


def test_row_37_a_second_interrupt_ends_the_process_at_once(
    slow: tuple[Any, ...], process: Lab
) -> None:
    """While an analysis takes its time to clean up after Ctrl-C, another one ends the process."""
    done = process("trace", "stubborn", *slow[2:], env={"FAULT": "1 step SIGINT"})
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("place", ["step", "kept", "exec"])
def test_row_37_a_signal_that_someone_swallows_still_ends_the_run(
    place: str, slow: tuple[Any, ...], process: Lab, interrupted: Lab
) -> None:
    """Caught and forgotten, turned into another error, or raised through ``exec``: exit 130."""
    command = ("trace", "deaf", *slow[2:], "--resume", "run.state")
    if place == "exec":  # after which Python may end a process by the signal itself
        done = process(*command, env={"FAULT": f"4 {place} SIGINT"})
    else:
        done = interrupted(*command, fault=f"4 {place} SIGINT")
    assert (done.code, done.out) == (130, "")
    assert told(done) == [str(part) for part in command]


def test_row_37_without_resume_it_says_how_to_be_able_to(
    slow: tuple[Any, ...], interrupted: Lab, tmp_path: Path
) -> None:
    """An analysis that keeps its state says so when it is lost; another one promises nothing."""
    done = interrupted(*slow, fault="11 kept SIGINT")
    assert done.code == 130
    last = "error: interrupted; a run with --resume FILE can be gone on with"
    assert done.err.splitlines()[-1] == last
    done = interrupted("trace", "forgetful", *slow[2:], fault="5 step SIGINT")
    assert done.err.splitlines()[-1] == "error: interrupted"
    done = interrupted(
        "trace", "forgetful", *slow[2:], "--resume", "run.state", fault="5 step SIGINT"
    )
    path = tmp_path / "run.state"
    assert done.err.splitlines()[-1] == f"error: interrupted; nothing had been kept in '{path}' yet"
    assert left(tmp_path) == set()


def test_row_37_an_analysis_without_a_state_says_so(slow: tuple[Any, ...], lab: Lab) -> None:
    """``--resume`` is not taken in silence where it does nothing."""
    done = lab("trace", "forgetful", *slow[2:], "--resume", "run.state")
    assert done.code == 0
    assert "warning: analysis 'forgetful' keeps no state: nothing was written to" in done.err


# --- 39: killed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "again"),
    [("12 kept SIGKILL", 1), ("5 fsync SIGKILL", 4), ("1 replace SIGKILL", 0)],
)
def test_row_39_a_killed_run_goes_on_from_its_last_whole_state(
    fault: str, again: int, straight: str, slow: tuple[Any, ...], process: Lab,
    lab: Lab, tmp_path: Path,
) -> None:  # fmt: skip
    """Killed between writes or in the middle of one: the file is the old state or none.

    That has ``again`` steps, and a new run goes on after them; the lock of the dead process holds
    nobody up.
    """
    command = (*slow, "--resume", "run.state")
    killed = process(*command, env={"FAULT": fault})
    assert killed.code == -signal.SIGKILL
    first = steps(tmp_path)
    assert ("run.state" in left(tmp_path)) == (again > 0)
    assert ".run.state.lock" in left(tmp_path)
    assert lab(*command).code == 0
    assert steps(tmp_path) == [*first, *range(again, STEPS)]
    assert circuit(tmp_path) == straight
    assert left(tmp_path) == set()


# --- 40, 41: the result cannot be written; the state is damaged -----------------------------------


def test_row_40_a_result_that_cannot_be_written_loses_no_work(
    straight: str, slow: tuple[Any, ...], install: Any, lab: Lab, tmp_path: Path
) -> None:
    """The state stays until the files are written: a second run writes them without any step."""
    full = """
        import circuitlab, os

        @circuitlab.hookimpl
        def register_exporters(register):
            register(".full", write)

        def write(circuit, path):
            path.write_text("x")
            if not os.path.exists("space"):
                raise OSError(28, "No space left on device")
        """
    install("circuitlab-full", "full", full)
    command = (*slow, "--output", "c.full", "--resume", "run.state")
    assert lab(*command).code == 5
    assert left(tmp_path) == {"run.state"}
    (tmp_path / "space").touch()
    assert lab(*command).code == 0
    assert steps(tmp_path) == list(range(STEPS))
    assert circuit(tmp_path) == straight
    assert left(tmp_path) == set()


def test_row_40_resume_and_output_are_two_files(slow: tuple[Any, ...], lab: Lab) -> None:
    """A result would be removed as if it were the state; the clash is refused before any work."""
    done = lab(*slow, "--resume", "./c.json")
    assert (done.code, "loading" in done.err) == (2, False)
    assert "--output and --resume both name 'c.json'; name two files" in done.err


def test_row_41_a_damaged_state_is_refused_and_can_be_deleted(
    slow: tuple[Any, ...], interrupted: Lab, lab: Lab, tmp_path: Path
) -> None:
    """Cut short: exit 3, one line, before the model is loaded; without the file the run begins."""
    command = (*slow, "--resume", "run.state")
    interrupted(*command, fault="3 kept SIGINT")
    path = tmp_path / "run.state"
    path.write_bytes(path.read_bytes()[:-1])
    done = lab(*command)
    assert (done.code, done.out) == (3, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"error: state '{path}' is no state of a run, or is damaged (")
    path.unlink()
    assert lab(*command).code == 0


# --- 42: two at once ------------------------------------------------------------------------------


def test_row_42_a_second_run_with_the_same_file_is_refused(
    slow: tuple[Any, ...], lab: Lab, process_env: dict[str, str], tmp_path: Path
) -> None:
    """Exit 2, the other's process and machine, nothing disturbed; another file is free."""
    command = [*map(str, slow), "--resume", "run.state"]
    with subprocess.Popen(
        [sys.executable, "-m", "circuitlab", *command],
        env={**process_env, "FAULT": "4 kept WAIT"}, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as first:  # fmt: skip
        until = time.monotonic() + 300
        while not (tmp_path / "waiting").exists() and time.monotonic() < until:
            time.sleep(0.05)
        second = lab(*command)
        other = lab(*command[:-3], "d.json", "--resume", "other.state")
        (tmp_path / "go-on").touch()
        first.communicate(timeout=300)
    assert (second.code, second.out) == (2, "")
    owner = f"process {first.pid} on {socket.gethostname()}"
    assert f"state '{tmp_path / 'run.state'}' is in use by {owner}; wait for it" in second.err
    assert other.code == first.returncode == 0
    assert left(tmp_path) == set()


# --- 43: other settings ---------------------------------------------------------------------------


def test_row_43_a_state_of_other_settings_is_refused(
    straight: str, slow: tuple[Any, ...], interrupted: Lab, lab: Lab, tmp_path: Path
) -> None:
    """Exit 3, each setting that differs with both values; every remedy that is told works."""
    command = (*slow, "--resume", "run.state")
    interrupted(*command, fault="11 kept SIGTERM")
    (tmp_path / "steps.log").unlink()
    others = ("--size", "2", "--seed", "4")
    done = lab(*command, *others)
    assert (done.code, done.out) == (3, "")
    assert done.err.splitlines()[-1].startswith(
        f"error: state '{tmp_path / 'run.state'}' is of another run: seed was 3 and is 4, option "
        f"size was 1.0 and is 2.0; go back to those settings, name another file, or delete this one"
    )
    assert not (tmp_path / "steps.log").exists()
    assert lab(*command, *others, "--resume", "another.state").code == 0
    (tmp_path / "steps.log").unlink()
    kept = (tmp_path / "run.state").read_bytes()
    assert lab(*command).code == 0
    assert steps(tmp_path) == list(range(12, STEPS))
    assert circuit(tmp_path) == straight
    (tmp_path / "run.state").write_bytes(kept)
    assert lab(*command, *others).code == 3
    os.unlink(tmp_path / "run.state")
    assert lab(*command, *others).code == 0
