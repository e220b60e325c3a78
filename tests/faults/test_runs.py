"""Runs in folders and in shards: killed, gone on with, put together, or refused."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitlab import Checkpoint, checkpoint
from circuitlab.checkpoint import StateFile

Lab = Callable[..., Any]

#: Kills its own process with the state that is kept as often as the environment says; notes how
#: many parts are done.
KILLER = """
import os
import signal

import circuitlab
import circuitlab.checkpoint
from circuitlab import Checkpoint, hookimpl

circuitlab.checkpoint.EVERY = 0.0
real, calls = Checkpoint.keep, []


def keep(self, state):
    real(self, state)
    calls.append(self.stage)
    with open("parts.log", "a") as log:
        log.write(f"{self.stage}\\n")
    if len(calls) == int(os.environ.get("KILL", "0")):
        os.kill(os.getpid(), getattr(signal, os.environ["BY"]))


@hookimpl
def register_tasks(register):
    Checkpoint.keep = keep
"""


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the killer changes in this process is changed back."""
    monkeypatch.setattr(checkpoint, "EVERY", checkpoint.EVERY)
    monkeypatch.setattr(Checkpoint, "keep", Checkpoint.keep)


@pytest.fixture
def command(ids_model: Path, ids_task: Path) -> tuple[str | Path, ...]:
    """A command that patches each edge alone, both ways, and writes ``c.json``."""
    return (
        "trace", "path-patching", "--model", ids_model, "--task-file", ids_task, "--allow-weak",
        "--top", "all", "--batch-size", "1", "--output", "c.json",
    )  # fmt: skip


@pytest.fixture
def gradients(ids_model: Path, ids_task: Path) -> tuple[str | Path, ...]:
    """A command that scores edges by gradients, pair by pair, and writes ``c.json``."""
    return (
        "trace", "edge-attribution", "--model", ids_model, "--task-file", ids_task, "--allow-weak",
        "--top", "all", "--batch-size", "1", "--verify", "5", "--output", "c.json",
    )  # fmt: skip


@pytest.fixture
def straight(command: tuple[Any, ...], lab: Lab, tmp_path: Path) -> str:
    """The circuit of one run."""
    assert lab(*command).code == 0
    return circuit(tmp_path)


def circuit(folder: Path) -> str:
    """The circuit written, but for how long it took; the file is removed."""
    path = folder / "c.json"
    found = json.loads(path.read_text("utf-8"))
    assert found["graph"].pop("seconds") > 0
    path.unlink()
    return json.dumps(found)


def states(lab: Lab) -> list[str]:
    """What ``runs show`` says of each shard of the run in ``r``."""
    lines = lab("runs", "show", "r").out.splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("shard ")]


# --- shards ---------------------------------------------------------------------------------------


def test_four_shards_of_which_one_is_killed_are_one_run(
    straight: str, command: tuple[Any, ...], install: Any, process: Lab, lab: Lab, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Four processes, one ended by ``kill -9`` and resumed: the same bytes as one run.

    Until then nothing is put together; what the dead process had done is not done again.
    """
    install("circuitlab-killer", "killer", KILLER)
    for number in (1, 2, 4):
        run = process if number == 2 else lab
        done = run(*command, "--run", "r", "--shard", f"{number}/4")
        assert (done.code, done.out) == (0, "")
        assert f"shard {number} of 4 is done; when all are: circuitlab runs merge" in done.err
    (tmp_path / "parts.log").unlink()
    killed = process(*command, "--run", "r", "--shard", "3/4", env={"KILL": "2", "BY": "SIGKILL"})
    assert killed.code == -signal.SIGKILL
    assert states(lab) == ["done", "done", "stopped", "done"]
    early = lab("runs", "merge", "r")
    assert (early.code, (tmp_path / "c.json").exists()) == (3, False)
    assert "error: shard 3 of 4 is not complete" in early.err

    monkeypatch.chdir("/")
    resumed = lab("runs", "resume", tmp_path / "r")
    assert resumed.code == 0
    assert "going on from" in resumed.err
    assert resumed.err.count("loading") == 1
    monkeypatch.chdir(tmp_path)
    assert len(_lines(tmp_path)) == parts_of_shard(lab, command, tmp_path)
    assert states(lab) == ["done"] * 4
    assert lab("runs", "merge", "r").code == 0
    assert circuit(tmp_path) == straight
    assert lab("runs", "rm", "r").code == 0
    assert not (tmp_path / "r").exists()


def test_shards_of_gradient_scores_are_one_run(
    gradients: tuple[Any, ...], install: Any, process: Lab, lab: Lab, tmp_path: Path
) -> None:
    """Four shards of prompt pairs, one killed and resumed, merged: the bytes of one run.

    The exact check, which looks at all scores, is made once, when they are put together.
    """
    install("circuitlab-killer", "killer", KILLER)
    assert lab(*gradients).code == 0
    straight = circuit(tmp_path)
    (tmp_path / "parts.log").unlink()
    for number in (1, 2, 4):
        assert lab(*gradients, "--run", "r", "--shard", f"{number}/4").code == 0
    assert set(_lines(tmp_path)) == {"attribution"}
    killed = process(*gradients, "--run", "r", "--shard", "3/4", env={"KILL": "1", "BY": "SIGKILL"})
    assert killed.code == -signal.SIGKILL
    assert states(lab) == ["done", "done", "stopped", "done"]
    assert lab("runs", "merge", "r").code == 3
    assert lab("runs", "resume", "r").code == 0
    assert lab("runs", "merge", "r").code == 0
    assert circuit(tmp_path) == straight
    assert set(_lines(tmp_path)) == {"attribution", "exact check"}


def _lines(folder: Path) -> list[str]:
    return (folder / "parts.log").read_text().splitlines()


def parts_of_shard(lab: Lab, command: tuple[Any, ...], folder: Path) -> int:
    """How many parts shard 3 of 4 has when nothing happens to it."""
    (folder / "parts.log").unlink()
    assert lab(*command, "--run", "other", "--shard", "3/4").code == 0
    return len(_lines(folder))


def test_a_shard_that_is_done_is_not_done_again(command: tuple[Any, ...], lab: Lab) -> None:
    """An array of jobs may be sent twice: the model is not even loaded."""
    where = {"CIRCUITLAB_RUN": "r", "CIRCUITLAB_SHARD": "2/2"}
    assert "loading" in lab(*command, env=where).err
    again = lab(*command, env=where)
    assert (again.code, "loading" in again.err) == (0, False)
    assert "shard 2 of 2 is done" in again.err


def test_resume_does_what_is_left(
    straight: str, command: tuple[Any, ...], lab: Lab, tmp_path: Path
) -> None:
    """Of two shards one is done here and the other by ``runs resume``, or by its number."""
    assert lab(*command, "--run", "r", "--shard", "2/3").code == 0
    assert "shard 1 of 3 is done" in lab("runs", "resume", "r", "--shard", "1").err
    done = lab("runs", "resume", "r")
    assert (done.code, "shard 3 of 3 is done" in done.err) == (0, True)
    assert lab("runs", "resume", "r", "--shard", "4").code == 2
    assert states(lab) == ["done"] * 3
    assert "3 of 3 shards done" in lab("runs", "list").out
    assert lab("runs", "merge", "r").code == 0
    assert circuit(tmp_path) == straight
    assert "3 of 3 shards done" not in lab("runs", "list").out


def test_row_43_shards_of_other_settings_are_refused(command: tuple[Any, ...], lab: Lab) -> None:
    """Another command at once, other settings from the environment before anything is merged."""
    assert lab(*command, "--run", "r", "--shard", "1/2").code == 0
    for more in (("--shard", "2/3"), ("--shard", "2/2", "--seed", "4")):
        done = lab(*command, "--run", "r", *more)
        assert (done.code, "loading" in done.err) == (3, False)
        assert "is the folder of another run: " in done.err
    assert lab(*command, "--run=r", "--shard=2/2", env={"CIRCUITLAB_SEED": "4"}).code == 0
    done = lab("runs", "merge", "r")
    assert done.code == 3
    assert "shard 2 of 2 is of another run than shard 1: seed was 0 and is 4" in done.err


def test_row_43_force_new_replaces_a_run_or_a_shard(
    straight: str, command: tuple[Any, ...], lab: Lab, tmp_path: Path
) -> None:
    """Another run's folder is emptied, and that is said; of the same run only this shard is new.

    The command that is kept does not force anything when it is resumed.
    """
    assert lab(*command, "--seed", "4", "--run", "r", "--shard", "1/2").code == 0
    new = lab(*command, "--run", "r", "--shard", "1/2", "--force-new")
    assert new.code == 0
    assert "warning: run 'r' was another one, command was [" in new.err
    assert lab(*command, "--run", "r", "--shard", "2/2").code == 0
    again = lab(*command, "--run", "r", "--shard", "2/2", "--force-new")
    assert (again.code, "loading" in again.err) == (0, True)
    assert "of the same settings, is not gone on with: begun anew" in again.err
    assert states(lab) == ["done", "done"]
    assert "force-new" not in lab("runs", "show", "r").out
    refused = lab(*command, "--run", "r", "--shard", "merge", "--force-new")
    assert (refused.code, "--shard merge does no work anew" in refused.err) == (2, True)
    assert lab("runs", "merge", "r").code == 0
    assert circuit(tmp_path) == straight
    whole = (*command, "--run", "w")
    assert lab(*whole).code == 0
    assert lab(*whole).code == 2
    assert lab(*whole, "--force-new").code == 0
    assert circuit(tmp_path) == straight


def test_row_41_a_damaged_shard_is_refused(
    command: tuple[Any, ...], lab: Lab, tmp_path: Path
) -> None:
    """One byte of a shard's scores is another: exit 3, and the shard is named as damaged."""
    for number in (1, 2):
        assert lab(*command, "--run", "r", "--shard", f"{number}/2").code == 0
    path = tmp_path / "r" / "shard-2-of-2.state"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    done = lab("runs", "merge", "r")
    assert (done.code, f"state '{path}' is damaged" in done.err) == (3, True)
    assert states(lab) == ["done", "damaged"]


def test_row_42_a_shard_in_use_is_refused(
    command: tuple[Any, ...], lab: Lab, tmp_path: Path
) -> None:
    """A second process for the same shard, and removing the folder: exit 2, who is at it."""
    for number in (1, 2):
        assert lab(*command, "--run", "r", "--shard", f"{number}/2").code == 0
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with StateFile(tmp_path / "r" / "shard-2-of-2.state", (2, 2)):
        assert states(lab) == ["done", f"running: {owner}"]
        for other in ((*command, "--run", "r", "--shard", "2/2"), ("runs", "merge", "r"),
                      ("runs", "rm", "r")):  # fmt: skip
            done = lab(*other)
            assert (done.code, owner in done.err) == (2, True)
    assert lab("runs", "rm", "r").code == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--shard", "1/2"), "--shard 1/2 needs a folder that all shards share; give --run"),
        (("--run", "r", "--shard", "0/2"), "--shard '0/2' is not I/N with I from 1 to N"),
        (("--run", "r", "--shard", "3/2"), "--shard '3/2' is not I/N"),
        (("--run", "r", "--shard", "1/1"), "--shard '1/1' is not I/N"),
        (("--run", "r", "--shard", "half"), "--shard 'half' is not I/N"),
        (("--run", "r", "--resume", "s"), "--run keeps the state in its folder; leave --resume"),
        (
            ("--run", "r", "--shard", "1/2", "--scope", "nodes"),
            "with --scope edges, not with nodes",
        ),
    ],
)
def test_flags_that_do_not_fit(
    more: tuple[str, ...], words: str, command: tuple[Any, ...], lab: Lab, tmp_path: Path
) -> None:
    """Exit 2, one line, and no model is loaded for nothing."""
    done = lab(*command, *more)
    assert (done.code, done.out, words in done.err) == (2, "", True)
    assert "loading" not in done.err
    assert not (tmp_path / "r").exists()


def test_what_cannot_be_split_is_refused(ids_model: Path, ids_task: Path, lab: Lab) -> None:
    """An analysis that does not say it can be split is not: exit 2, and which ones can."""
    on = ("--model", ids_model, "--task-file", ids_task, "--run", "r", "--shard", "1/2")
    done = lab("trace", "attention-heads", *on)
    assert done.code == 2
    assert "analysis 'attention-heads' cannot be split into shards" in done.err
    assert "edge-attribution, path-patching" in done.err
    done = lab("trace", "edge-attribution", *on, "--ig-rule", "adaptive")
    assert (done.code, "loading" in done.err) == (2, False)
    assert "with --ig-rule midpoint or left, not with adaptive" in done.err


# --- whole runs -----------------------------------------------------------------------------------


def test_a_whole_run_in_a_folder(
    straight: str, command: tuple[Any, ...], install: Any, process: Lab, lab: Lab, tmp_path: Path
) -> None:
    """Killed, it goes on by ``runs resume``; done, it is done once, and the folder can go."""
    install("circuitlab-killer", "killer", KILLER)
    killed = process(*command, "--run", "r", env={"KILL": "5", "BY": "SIGKILL"})
    assert killed.code == -signal.SIGKILL
    assert "stopped" in lab("runs", "show", "r").out
    done = process("runs", "resume", "r")
    assert (done.code, "going on from" in done.err) == (0, True)
    assert circuit(tmp_path) == straight
    assert "done" in lab("runs", "list").out
    again = lab(*command, "--run", "r")
    assert (again.code, "is done; name another folder" in again.err) == (2, True)
    assert lab("runs", "merge", "r").code == 2
    (tmp_path / "r" / "notes.txt").touch()
    kept = lab("runs", "rm", "r")
    assert (kept.code, "also has 'notes.txt'" in kept.err) == (3, True)
    (tmp_path / "r" / "notes.txt").unlink()
    assert lab("runs", "rm", "r").code == 0
    assert not (tmp_path / "r").exists()


def test_an_interrupted_run_says_how_to_go_on(
    command: tuple[Any, ...], install: Any, process: Lab
) -> None:
    """Ctrl-C: exit 130, and the command that goes on."""
    install("circuitlab-killer", "killer", KILLER)
    done = process(*command, "--run", "r", "--shard", "1/2", env={"KILL": "1", "BY": "SIGINT"})
    assert done.code == 130
    assert done.err.splitlines()[-1].startswith("error: interrupted; resume with: circuitlab trace")
    assert "--shard 1/2" in done.err.splitlines()[-1]


def test_folders_that_are_no_runs(command: tuple[Any, ...], lab: Lab, tmp_path: Path) -> None:
    """One with other files is left alone, one without a plan is no run; exit 3."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "x").touch()
    done = lab(*command, "--run", folder)
    assert (done.code, "has other files; name a new one" in done.err) == (3, True)
    assert [path.name for path in folder.iterdir()] == ["x"]
    for name in ("show", "resume", "merge", "rm"):
        done = lab("runs", name, folder)
        assert (done.code, "is no folder of a run" in done.err) == (3, True)
    (folder / "run.json").write_text("{}")
    assert "another program or version" in lab("runs", "show", folder).err
    (folder / "run.json").write_text("{")
    assert "is not JSON" in lab("runs", "show", folder).err


def test_row_40_a_folder_that_cannot_be_made(command: tuple[Any, ...], lab: Lab) -> None:
    """Exit 5 before the model is loaded."""
    done = lab(*command, "--run", "/proc/nowhere")
    assert (done.code, "loading" in done.err) == (5, False)
    assert "run folder '/proc/nowhere' cannot be made: " in done.err
