"""``--offline``: no connection is tried, no name is looked up; what is here is enough to run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Loaded by Python itself before anything else; an audit hook sees calls from C too.
WATCH = """
import sys

EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}


def watch(event, arguments):
    if event in EVENTS:
        with open("network.log", "a") as log:
            log.write(f"{event} {arguments[-1]}\\n")
        raise OSError(101, "Network is unreachable")


sys.addaudithook(watch)
"""
HOOK = """
import circuitlab

@circuitlab.hookimpl
def register_tasks(register):
    pass
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def alone(
    site: Path, process_env: dict[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``alone("trace", ...)``: a process in a network namespace without any device but its own.

    Where such namespaces are not allowed, what watches and refuses each connection is all.
    """
    (site / "sitecustomize.py").write_text(WATCH)
    space = ["unshare", "--map-root-user", "--net"]
    allowed = (
        shutil.which("unshare")
        and not subprocess.run([*space, "true"], capture_output=True, check=False).returncode
    )

    def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*(space if allowed else []), sys.executable, "-m", "circuitlab", *map(str, arguments)],
            env={**process_env, "HF_HOME": str(tmp_path / "hub"), **env}, cwd=tmp_path,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    return run


def tried(folder: Path) -> list[str]:
    """Connections that were tried since the last look."""
    log = folder / "network.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def in_cache(folder: Path, hub: Path) -> None:
    """The model of a folder as the hub's cache keeps one that was downloaded."""
    model = hub / "hub" / "models--someone--some-model"
    shutil.copytree(folder, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)


def test_offline_runs_what_is_here(
    alone: Callable[..., Any], text_model: Path, tmp_path: Path
) -> None:
    """Of a bundled model, a folder and a cached repository: the circuit, and nothing is tried."""
    in_cache(text_model, tmp_path / "hub")
    pair = ("--clean", "Mary and John", "--corrupt", "John and Mary", "--answer", " gave",
            "--wrong", " went", "--allow-weak", "--verify", "0")  # fmt: skip
    for model, task in (("induction", ("--n-prompts", "4")), ("someone/some-model", pair)):
        done = alone("trace", "--offline", "--model", model, *task, "--output", "c.json")
        assert (done.returncode, done.stderr.count("error")) == (0, 0), done.stderr
        assert (tmp_path / "c.json").exists()
        (tmp_path / "c.json").unlink()
        assert tried(tmp_path) == []


def test_offline_comes_too_late_for_nobody(
    alone: Callable[..., Any], install: Any, text_model: Path, tmp_path: Path
) -> None:
    """A plugin that has imported the hub's library before the flag is read changes nothing."""
    install("circuitlab-early", "early", "import huggingface_hub.constants, transformers\n" + HOOK)
    in_cache(text_model, tmp_path / "hub")
    pair = ("--clean", "Mary", "--corrupt", "John", "--answer", " gave", "--wrong", " went")
    done = alone("trace", "--offline", "--model", "someone/some-model", *pair, "--allow-weak")
    assert done.returncode == 0, done.stderr
    assert tried(tmp_path) == []


def test_offline_asks_nobody_for_what_is_missing(alone: Callable[..., Any], tmp_path: Path) -> None:
    """A repository that is not cached: exit 4 and nothing tried; without the flag it is tried."""
    done = alone("trace", "--offline", "--model", "someone/some-model", "--task", "ioi-mini")
    assert (done.returncode, "hf download someone/some-model" in done.stderr) == (4, True)
    assert tried(tmp_path) == []
    done = alone("trace", "--model", "someone/some-model", "--task", "ioi-mini")
    assert done.returncode == 4
    assert tried(tmp_path) != []


def test_a_model_of_ones_own_asks_nobody_anyway(
    alone: Callable[..., Any], text_model: Path, tmp_path: Path
) -> None:
    """Bundled models and folders need no hub, so that without the flag nothing is tried either."""
    for model in ("induction", text_model):
        done = alone("models", "check", model)
        assert done.returncode == 0, done.stderr
        assert tried(tmp_path) == []


def test_a_run_in_shards_is_offline_too(
    lab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, what is put together, and plugins' commands: sockets of this process are refused."""
    import socket

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a connection was opened")

    for owner, name in ((socket, "create_connection"), (socket, "getaddrinfo"),
                        (socket.socket, "connect"), (socket.socket, "connect_ex")):  # fmt: skip
        monkeypatch.setattr(owner, name, forbidden)
    command = ("trace", "path-patching", "--model", "induction", "--n-prompts", "3", "--offline",
               "--mode", "noise", "--run", "r")  # fmt: skip
    for number in (1, 2):
        assert lab(*command, "--shard", f"{number}/2").code == 0
    assert lab("runs", "merge", "r").code == 0
