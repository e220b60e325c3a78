"""What goes to stdout, what to stderr, and that neither gets an escape byte in a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Callable[..., Any]


@pytest.fixture
def traced(ids_model: Path, ids_task: Path) -> tuple[str | Path, ...]:
    """A command that traces the small model."""
    return ("trace", "--model", ids_model, "--task-file", ids_task)


def test_a_real_process_keeps_the_streams_apart(
    process: Callable[..., Any], traced: tuple[Any, ...]
) -> None:
    """In a pipe: the result as ``key: value`` on stdout, progress on stderr, no escape bytes."""
    done = process(*traced, "--output", "c.svg", "--output", "c.json")
    assert done.code == 0
    keys = [line.partition(": ")[0] for line in done.out.splitlines()]
    assert all(": " in line for line in done.out.splitlines())
    assert {"circuit", "task", "size", "score", "written", "next"} <= set(keys)
    assert "written: c.svg, c.json" in done.out
    assert "next: circuitlab render c.json --output c.pdf" in done.out
    assert "\x1b" not in done.out + done.err
    assert "\r" not in done.out + done.err
    said = done.err.splitlines()
    assert said[0] == f"loading {traced[2]} …"
    assert [line for line in said if line.startswith("attributing")] == ["attributing 46 edges …"]


@pytest.mark.parametrize(
    "command",
    [("--help",), ("trace", "--help"), ("plugins",), ("models",), ("tasks",), ("no-such-command",),
     ("render", "none.json", "-o", "x.svg")],
)  # fmt: skip
def test_no_command_sends_escapes_into_a_pipe(
    command: tuple[str, ...], process: Callable[..., Any]
) -> None:
    """Help, tables and errors are plain bytes in a pipe, even where colour is forced."""
    done = process(*command, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert "\x1b" not in done.out + done.err
    assert done.code in (0, 2, 3)


def test_a_broken_model_prints_one_plain_line(
    process: Callable[..., Any], ids_model: Path, tmp_path: Path
) -> None:
    """The loader's own coloured report of missing weights is not shown; our line is."""
    from safetensors.torch import load_file, save_file

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((ids_model / "config.json").read_bytes())
    weights = load_file(ids_model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    done = process("models", "check", "m")
    assert (done.code, done.out) == (4, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: the weights of 'm' lack lm_head.weight")


def test_json_is_one_document(lab: Lab, traced: tuple[Any, ...]) -> None:
    """``--json``: stdout is one JSON document without NaN, whatever else is said on stderr."""
    done = lab(*traced, "--json", "--output", "c.json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    document = done.json
    assert document["schema"] == "circuitlab-run/1"
    assert {"run_id", "paths", "metrics", "warnings", "provenance", "edges"} <= set(document)
    assert document["paths"] == ["c.json"]
    assert len(document["edges"]) == document["metrics"]["edges"] == 40
    json.dumps(document, allow_nan=False)


def test_json_of_an_error_is_empty(lab: Lab, traced: tuple[Any, ...]) -> None:
    """Where there is no result stdout stays empty, so nothing can be taken for one."""
    done = lab(*traced, "--json", "--metric", "logit-difference", "--align", "drop", "--top", "x")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")


def test_quiet_leaves_only_errors(lab: Lab, ids_model: Path, ids_task: Path) -> None:
    """``-q`` says nothing of progress or warnings; an error it does say."""
    flags = ("trace", "--model", ids_model, "-q")
    pair = ("--clean", "[1, 2]", "--corrupt", "[3, 2]", "--answer", "[4]", "--wrong", "[5]")
    done = lab(*flags, *pair)
    assert (done.code, done.err) == (0, "")
    assert "circuit: " in done.out
    done = lab(*flags, "--task-file", "none.json")
    assert done.code == 3
    assert done.err.count("\n") == 1


def test_no_progress_still_warns(lab: Lab, ids_model: Path) -> None:
    """``--no-progress`` drops the stages and keeps the warnings."""
    pair = ("--clean", "[1, 2]", "--corrupt", "[3, 2]", "--answer", "[4]", "--wrong", "[5]")
    done = lab("trace", "--model", ids_model, *pair, "--no-progress")
    assert done.code == 0
    assert "attributing" not in done.err
    assert "warning: 1 pair: no interval can be given" in done.err


def test_a_second_command_does_not_inherit_the_first_ones_flags(lab: Lab) -> None:
    """``-q`` of one call in a process is not kept for the next."""
    from circuitlab.cli import main, screen

    with pytest.raises(SystemExit):
        main(["trace", "-q", "--output", "x.unknown"])
    assert screen.Screen.quiet
    with pytest.raises(SystemExit):
        main(["plugins"])
    assert not screen.Screen.quiet


def test_text_that_an_encoding_lacks_is_escaped(
    process: Callable[..., Any], tmp_path: Path
) -> None:
    """Under an ASCII encoding arrows and accents are written as escapes, and nothing crashes."""
    name = "café-→.json"
    done = process("tasks", "init", name, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.code, done.err) == (0, "")
    assert done.out == "caf\\xe9-\\u2192.json\n"
    assert (tmp_path / name).is_file()


def test_a_debug_traceback_only_when_asked_for(lab: Lab) -> None:
    """An error is one line; with ``--debug-traceback`` the traceback comes before it."""
    done = lab("trace", "--task", "nothing")
    assert done.err.count("\n") == 1
    for command in (
        ("trace", "--task", "nothing", "--debug-traceback"),
        ("--debug-traceback", "trace", "--task", "nothing"),
    ):
        done = lab(*command)
        assert done.code == 3
        assert done.err.startswith("Traceback")
        assert done.err.splitlines()[-1].startswith("error: task 'nothing' does not exist")


# --- what is imported -----------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "nnsight", "safetensors", "tokenizers")


@pytest.mark.parametrize(
    "command",
    [("--help",), ("--version",), ("trace", "--help"), ("trace", "edge-attribution", "--help"),
     ("trace", "--dry-run"), ("plugins",), ("models",), ("tasks",), ("tasks", "show", "ioi-mini"),
     ("tasks", "init", "new.json"), ("trace", "--output", "x.unknown"),
     ("render", "circuit.json", "-o", "c.svg", "-o", "c.dot", "-o", "c.json", "-o", "c.png")],
)  # fmt: skip
def test_light_commands_load_nothing_heavy(
    command: tuple[str, ...], process_env: dict[str, str], tmp_path: Path, circuit_file: Path
) -> None:
    """Help, lists and drawing a finished circuit import neither torch nor transformers."""
    code = (
        "import sys\nfrom circuitlab.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        f"finally:\n    print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env=process_env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == (2 if "x.unknown" in command else 0), done.stderr
    assert done.stderr.splitlines()[-1] == ""
