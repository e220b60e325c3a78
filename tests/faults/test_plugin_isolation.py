"""Installed plugins that harm, side by side with one that works: each alone is left out.

Every package is laid out as an installer does it, and found by the command line of a new process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = """
    import circuitlab

    @circuitlab.hookimpl
    def register_analyses(register):
        register("good", good)

    def good(model, task, *, count: int = 1):
        "Something sound."
        circuit = circuitlab.CircuitGraph(score="one")
        circuit.add_component("logits", kind="logits", layer=model.n_layers)
        circuit.add_component("input", kind="input", layer=0)
        circuit.add_effect("input", "logits", float(count))
        return circuit
"""
HEAD = "import circuitlab, sys\n@circuitlab.hookimpl\n"
TASKS = HEAD + "def register_tasks(register):\n    "
EXPORTERS = HEAD + "def register_exporters(register):\n    "
ANALYSES = HEAD + "def register_analyses(register):\n    "
#: Plugins that are broken in ways of their own, and what their row says.
HARMFUL = {
    "old-api": ("circuitlab_api = 0\n" + ANALYSES + "pass", "written for version 0 of the plugin"),
    "new-api": ("circuitlab_api = 2\n" + ANALYSES + "pass", "and this CircuitLab has 1; install"),
    "no-task": (TASKS + "register({'name': 'mine'})", "was given a dict, not a Task"),
    "no-writer": (EXPORTERS + "register('.own', 'w')", "exporter '.own' is a str, not a function"),
    "no-function": (ANALYSES + "register('mine', None)", "None is not a callable object"),
    "bad-scores": (
        ANALYSES + "register('mine', lambda model, task: None, pair_scores=3)",
        "analysis 'mine': pair_scores is not a function",
    ),
    "unknown-word": (
        ANALYSES + "register('mine', lambda model, task: None, fast=True)",
        "unexpected keyword argument 'fast'",
    ),
    "half-way": (ANALYSES + "register('half', lambda model, task: None); raise ValueError('oh')",
                 "ValueError: oh"),
    "stops": ("class Stop(BaseException): ...\nraise Stop('all of it')", "Stop: all of it"),
    "deep": ("def f():\n    f()\nf()", "RecursionError"),
}  # fmt: skip


def test_harm_stays_where_it_is(
    install: Any, process: Callable[..., Any], ids_model: Path, ids_task: Path
) -> None:
    """Ten broken plugins in one environment: a row and a reason each, and the sound one runs."""
    for name, (source, _) in HARMFUL.items():
        install(f"circuitlab-{name}", name, source)
    install("circuitlab-good", "good-plugin", GOOD)
    done = process("plugins")
    assert (done.code, done.err) == (0, "")
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in done.out.splitlines()}
    for name, (_, reason) in HARMFUL.items():
        assert rows[name][:2] == [f"circuitlab-{name} 0.1", "FAILED"]
        assert reason in rows[name][2]
    assert rows["good-plugin"] == ["circuitlab-good 0.1", "register_analyses", "good"]
    ran = process("trace", "good", "--model", ids_model, "--task-file", ids_task, "--json")
    assert ran.code == 0
    assert [edge["score"] for edge in ran.json["edges"]] == [1.0]
    assert ran.err.count("is left out") == len(HARMFUL)
    alone = process("--no-plugins", "plugins")
    assert "FAILED" not in alone.out
    assert alone.out.count("left out by --no-plugins") == len(HARMFUL) + 1


def test_a_family_that_is_no_architecture_names_its_plugin(
    install: Any, process: Callable[..., Any], ids_model: Path, ids_task: Path
) -> None:
    """An answer of the wrong type is exit 8 with the plugin's name, never a fault of CircuitLab."""
    source = HEAD + "def adapt_architecture(config):\n    return {'n_layers': 2}\n"
    install("circuitlab-own", "own", source)
    done = process("trace", "--model", ids_model, "--task-file", ids_task)
    assert (done.code, done.out) == (8, "")
    assert (
        "plugin 'own' gave a dict in adapt_architecture; give a circuitlab.Architecture" in done.err
    )
    assert process("--no-plugins", "models", "check", ids_model).code == 0


WRITERS = {
    "raise ValueError('oh')": "exporter '.own' of plugin 'own' failed: ValueError: oh",
    "sys.exit(0)": "exporter '.own' of plugin 'own' failed: SystemExit: 0",
    "path.write_text('x'); return 'all'": "exporter '.own' of plugin 'own' returned str; return a",
    "pass": "the exporter for 'x.own' wrote no file",
}


@pytest.mark.parametrize("body", WRITERS)
def test_an_exporter_that_fails_names_its_plugin(
    body: str, install: Any, lab: Callable[..., Any], circuit_file: Path, tmp_path: Path
) -> None:
    """Raising, leaving, an odd result and no file: exit 8, one line, no file under the name."""
    source = EXPORTERS + f"register('.own', write)\ndef write(circuit, path):\n    {body}\n"
    install("circuitlab-own", "own", source)
    done = lab("render", circuit_file, "--output", "x.own")
    assert (done.code, done.out) == (8, "")
    assert WRITERS[body] in done.err
    assert not (tmp_path / "x.own").exists()


def test_what_an_exporter_prints_and_warns(
    install: Any, lab: Callable[..., Any], circuit_file: Path
) -> None:
    """Words it prints go to stderr; warnings it returns are a line each."""
    body = "print('noise'); path.write_text('x'); return ['one', 'two']"
    source = EXPORTERS + f"register('.own', write)\ndef write(circuit, path):\n    {body}\n"
    install("circuitlab-own", "own", source)
    done = lab("render", circuit_file, "--output", "x.own")
    assert (done.code, done.out) == (0, "x.own\n")
    assert done.err == "noise\nwarning: one\nwarning: two\n"


def test_a_plugin_that_hangs_is_named_and_can_be_stopped(
    install: Any, process: Callable[..., Any], process_env: dict[str, str], tmp_path: Path
) -> None:
    """After five seconds a line says who hangs; Ctrl-C ends it; disabled, all else works again."""
    install("circuitlab-stuck", "stuck", "import time\nwhile True:\n    time.sleep(0.01)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "circuitlab", "plugins"],
        env=process_env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        assert running.stdout is not None
        line = running.stderr.readline()
        assert line.startswith(
            "warning: plugin 'stuck' (circuitlab-stuck 0.1) is still being loaded"
        )
        assert "`circuitlab plugins disable stuck`" in line
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
        assert running.stdout.read() == ""
    assert process("plugins", "disable", "stuck").code == 0
    began = time.monotonic()
    done = process("plugins")
    assert (done.code, done.err) == (0, "")
    assert "stuck\tcircuitlab-stuck 0.1\toff" in done.out
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("listed", ["", "good-plugin", "good-plugin,nobody"])
def test_what_is_not_listed_is_not_imported(
    listed: str, install: Any, process: Callable[..., Any], tmp_path: Path
) -> None:
    """With CIRCUITLAB_PLUGINS others leave no mark, whatever importing them would do."""
    mark = tmp_path / "mark"
    install("circuitlab-bad", "bad", f"open({os.fspath(mark)!r}, 'w').close()\nraise SystemExit(9)")
    install("circuitlab-good", "good-plugin", GOOD)
    done = process("plugins", env={"CIRCUITLAB_PLUGINS": listed})
    assert (done.code, done.err) == (0, "")
    assert not mark.exists()
    assert "bad\tcircuitlab-bad 0.1\toff\tnot listed in CIRCUITLAB_PLUGINS" in done.out
    assert ("good-plugin\tcircuitlab-good 0.1\tregister" in done.out) == bool(listed)
