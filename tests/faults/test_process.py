"""A process that is interrupted, whose reader leaves, or whose Graphviz fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Callable[..., Any]


# --- 37, 38: signals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_row_37_38_signals_end_a_run_with_their_code(
    number: signal.Signals, code: int, word: str, process_env: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C gives 130, SIGTERM 143; one line says so, and nothing half done is left."""
    command = ["models", "train", "ioi-mini", "--steps", "1000000", "--output", "trained"]
    with subprocess.Popen(
        [sys.executable, "-m", "circuitlab", *command],
        env=process_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        said = running.stderr.readline()
        time.sleep(0.3)
        running.send_signal(number)
        out, err = running.communicate(timeout=300)
    assert "training ioi-mini" in said
    assert running.returncode == code
    assert out == ""
    assert err.strip().splitlines()[-1] == f"error: {word}"
    assert "Traceback" not in err
    assert not (tmp_path / "trained").exists()


# --- 44: nobody reads -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("tasks", "show", "induction"), ("trace", "--help"), ("plugins",), ("models",)]
)
@pytest.mark.parametrize("both", [False, True])
def test_row_44_a_closed_stdout_is_a_silent_stop(
    command: tuple[str, ...], both: bool, process_env: dict[str, str], tmp_path: Path
) -> None:
    """Where nobody reads, the program ends with 141 and no word; so with stderr closed too."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "circuitlab", *command],
            env=process_env, cwd=tmp_path, stdout=writer,
            stderr=subprocess.STDOUT if both else subprocess.PIPE, check=False, timeout=300,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert not done.stderr


def test_row_44_an_error_that_nobody_reads_is_silent_too(
    process_env: dict[str, str], tmp_path: Path
) -> None:
    """A closed stderr does not turn a usage error into a crash of the program."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "circuitlab", "tasks", "show", "nothing"],
        env=process_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writer, check=False,
        timeout=300,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 141
    assert done.stdout == b""


# --- 46: Graphviz ---------------------------------------------------------------------------------

FAILURES = {
    "import os; os.abort()": "Graphviz failed",
    "raise ImportError('no library')": "Graphviz failed",
    "import time; time.sleep(600)": "Graphviz did not answer in 0.5 s",
    "import sys; print('nonsense'); sys.exit(0)": "Graphviz gave no usable layout",
}


@pytest.fixture
def broken_graphviz(
    request: pytest.FixtureRequest, site: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A pygraphviz that misbehaves when the child process imports it, and no ``dot``."""
    (site / "pygraphviz.py").write_text(request.param, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("PATH", str(site))
    # What answers is given the time that a busy machine takes.
    monkeypatch.setattr("circuitlab.render.BUDGET", 0.5 if "sleep" in request.param else 300.0)
    return FAILURES[request.param]


@pytest.mark.parametrize("broken_graphviz", FAILURES, indirect=True)
def test_row_46_a_failing_graphviz_gives_the_built_in_layout(
    broken_graphviz: str, lab: Lab, circuit_file: Path
) -> None:
    """Whether it crashes, hangs or talks nonsense: a picture, one line on stderr, exit 0."""
    started = time.monotonic()
    done = lab("render", circuit_file, "--output", "c.svg")
    assert done.code == 0
    assert done.out == "c.svg\n"
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"warning: {broken_graphviz}")
    assert done.err.rstrip().endswith("the built-in layout was used")
    shown = "".join(ET.parse("c.svg").getroot().itertext())
    assert "a0.h1" in shown
    assert time.monotonic() - started < 300


@pytest.mark.parametrize("broken_graphviz", ["import os; os.abort()"], indirect=True)
@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_row_46_a_bitmap_without_graphviz_says_what_to_do(
    broken_graphviz: str, suffix: str, lab: Lab, circuit_file: Path
) -> None:
    """PNG and PDF cannot be drawn then: exit 5, and both ways out; the second one works."""
    done = lab("render", circuit_file, "--output", f"c.{suffix}")
    assert (done.code, done.out) == (5, "")
    assert f"a {suffix.upper()} needs Graphviz, but {broken_graphviz}" in done.err
    assert "pip install pygraphviz" in done.err
    assert "or write an .svg, which needs none" in done.err
    assert not Path(f"c.{suffix}").exists()
    assert lab("render", circuit_file, "--output", "c.svg").code == 0


def test_row_46_no_graphviz_at_all(
    lab: Lab, circuit_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With neither wheel nor program, an SVG is drawn, and ``doctor`` says what is missing."""
    import importlib.util

    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "pygraphviz" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = lab("render", circuit_file, "--output", "c.svg")
    assert done.code == 0
    assert done.err == "warning: Graphviz is not installed; the built-in layout was used\n"
    assert Path("c.svg").stat().st_size > 500
    assert "graphviz: NOT FOUND" in lab("doctor").out
