"""The command line on a host: the same circuit, the key in nothing that is left behind, a way back.

Everything here is in processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback_host import Loopback

CANARY = "5e1f0c4a-canary-9b7d"
Runner = Callable[..., Any]


def arguments(host: Loopback, folders: dict[str, Path], task: Path) -> list[str]:
    """A small trace on the host."""
    return [
        *("trace", "--model", str(folders["test/ids"]), "--task-file", str(task)),
        *("--remote", host.url, "--remote-key", "test/ids", "--allow-weak"),
        *("--verify", "4", "--timeout", "600"),
    ]


def left_behind(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_trace_on_a_host(
    host: Loopback,
    folders: dict[str, Path],
    ids_task: Path,
    process: Runner,
    tmp_path: Path,
) -> None:
    """The circuit is that of this machine; the key is in no file, stream or record of the run."""
    host.tell(key=CANARY)
    outputs = [f"--output=far.{suffix}" for suffix in ("json", "svg", "dot", "graphml")]
    far = process(
        *arguments(host, folders, ids_task), *outputs, "--resume", "state", "--json",
        env={"NDIF_API_KEY": CANARY},
    )  # fmt: skip
    assert far.code == 0, far.err
    assert not (tmp_path / "state.jobs").exists()
    files = left_behind(tmp_path)
    assert any(name.endswith("far.json") for name in files)
    assert CANARY not in far.out + far.err
    assert [name for name, content in files.items() if CANARY.encode() in content] == []
    near = process(
        "trace", "--model", folders["test/ids"], "--task-file", ids_task, "--allow-weak",
        "--verify", "4", "--output", "near.json",
    )  # fmt: skip
    assert near.code == 0, near.err
    there, here = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("far", "near"))
    assert there["graph"]["remote"] is True

    def scores(circuit: dict[str, Any]) -> dict[tuple[str, ...], float]:
        links = circuit["edges"]
        return {(e["source"], e["target"], str(e.get("key"))): e["score"] for e in links}

    assert scores(there) == pytest.approx(scores(here), abs=1e-5)


@pytest.mark.parametrize("told", [{"key": "another"}, {"least_version": "99"}, {"hostile": "x"}])
def test_failures_do_not_tell_the_key(
    host: Loopback,
    folders: dict[str, Path],
    ids_task: Path,
    process: Runner,
    tmp_path: Path,
    told: dict[str, str],
) -> None:
    """Exit 6 in one line; not even the traceback, or a host that repeats the key, shows it."""
    host.tell(**told)
    failed = process(
        *arguments(host, folders, ids_task), "--debug-traceback", "--resume", "state",
        env={"NDIF_API_KEY": CANARY},
    )  # fmt: skip
    assert failed.code == 6
    assert "Traceback" in failed.err
    assert CANARY not in failed.out + failed.err
    assert all(CANARY.encode() not in content for content in left_behind(tmp_path).values())
    assert failed.err.splitlines()[-1].startswith("error: ")


def test_usage_errors(lab: Runner, folders: dict[str, Path]) -> None:
    """An unsafe address, or a host and nobody at once, end with exit 2."""
    model = ("trace", "--model", folders["test/ids"])
    unsafe = lab(*model, "--remote", "http://example.org", "--remote-key", "a/b")
    assert unsafe.code == 2
    assert "is not https" in unsafe.err
    both = lab(*model, "--remote", "--offline")
    assert both.code == 2
    assert "leave one of them out" in both.err


@pytest.mark.parametrize("command", [("models", "check"), ("doctor",)])
def test_checks_on_a_host(
    command: tuple[str, ...], host: Loopback, folders: dict[str, Path], lab: Runner
) -> None:
    """``models check`` and ``doctor`` show the self-check of the host's model, in three jobs.

    A host that does not have it is exit 6; flags that would do nothing are exit 2.
    """
    model, before = str(folders["test/llama"]), len(host.log())
    done = lab(*command, model, "--remote", host.url, "--remote-key", "test/llama")
    assert done.code == 0
    assert len(host.log()) - before == 3
    rows = [line.split("\t") for line in done.out.splitlines() if line.count("\t") == 3]
    assert len(rows) > 10
    assert {row[0] for row in rows[1:]} == {"holds"}
    elsewhere = lab(*command, model, "--remote", host.url, "--remote-key", "test/nowhere")
    assert (elsewhere.code, "does not have model" in elsewhere.err) == (6, True)
    device = lab(*command, model, "--remote", host.url, "--device", "cpu")
    assert (device.code, "the device and type its host gave it" in device.err) == (2, True)


def test_doctor_has_a_model_for_its_flags(lab: Runner) -> None:
    """How a model is loaded is said together with which one."""
    done = lab("doctor", "--remote")
    assert done.code == 2
    assert "--remote says how a model is loaded, and no MODEL is given" in done.err


def test_interrupted_run_takes_its_job_up(
    host: Loopback,
    folders: dict[str, Path],
    ids_task: Path,
    process: Runner,
    process_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """A run that is ended while a job waits says how to go on; that run sends no job twice."""
    command = [*arguments(host, folders, ids_task), "--resume", "state", "--output", "c.json"]
    whole = len(host.log())
    assert process(*command).code == 0
    whole = len(host.log()) - whole
    before = len(host.log())
    host.tell(stall=1_000_000)
    running = subprocess.Popen(
        [sys.executable, "-m", "circuitlab", *command],
        env=process_env, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    jobs = tmp_path / "state.jobs"
    end = time.monotonic() + 300
    while not (jobs.exists() and jobs.read_text().count("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGTERM)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 143
    assert "resume with: circuitlab trace" in said
    waiting = json.loads(jobs.read_text().splitlines()[0])["job"]
    assert host.log()[-1]["job"] == waiting
    # The job itself is done by now; it only looked as if it were queued.
    host.tell(release=True)
    assert process(*command).code == 0
    assert len(host.log()) - before == whole
    assert not jobs.exists()
