"""``circuitlab evaluate`` and ``report``: what they print, write and refuse, and how they end."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import circuitlab
from circuitlab.evaluation import circuit_runs

Lab = Callable[..., Any]
QUICK = ("--quick", "--n-controls", "19", "--resamples", "100")


@pytest.fixture(scope="session")
def traced() -> str:
    """A circuit of a small model, traced on some of its pairs, as a file has it."""
    return circuitlab.build_circuit("greater-than", n_pairs=56, top=8).to_json()


@pytest.fixture
def circuit(traced: str, tmp_path: Path) -> Path:
    """Its file."""
    path = tmp_path / "circuit.json"
    path.write_text(traced, encoding="utf-8")
    return path


def lines(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_a_pipe_gets_the_result_and_nothing_else(
    circuit: Path, process: Callable[..., Any]
) -> None:
    """A real process prints one ``key: value`` on each line of stdout, without escapes."""
    done = process("evaluate", circuit, *QUICK)
    assert done.code == 0, done.err
    said = lines(done.out)
    assert said["verdict"].split(":")[0] in ("supported", "partly supported", "not supported")
    assert said["pairs"].startswith("8, pairs of greater-than that the circuit was not found on")
    assert said["size"].startswith("8 of ")
    assert "\x1b" not in done.out + done.err


def test_json_is_the_results(circuit: Path, lab: Lab, tmp_path: Path) -> None:
    """One document on stdout, the same as the file, of the schema that is documented."""
    done = lab("evaluate", circuit, *QUICK, "--json", "--output", "results.json")
    assert done.code == 0, done.err
    assert done.json["schema"] == "circuitlab-evidence/1"
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == done.json
    assert len(done.out.splitlines()) == 1


def test_thresholds_decide_the_exit_code(circuit: Path, lab: Lab) -> None:
    """Below the threshold the result is shown and the code is 7; names and numbers are checked."""
    done = lab("evaluate", circuit, *QUICK, "--fail-under", "accuracy=1.5")
    assert done.code == 7
    assert "accuracy is 1, below the 1.5 that --fail-under asks for" in done.err
    assert "verdict" in lines(done.out)
    assert lab("evaluate", circuit, *QUICK, "--fail-under", "faithfulness-low=-5").code == 0
    for wrong in ("faithfulness", "faithfulness=nan", "beauty=1"):
        done = lab("evaluate", circuit, "--fail-under", wrong)
        assert done.code == 2
        assert wrong.split("=")[0] in done.err


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_what_cannot_be_evaluated_has_its_code(
    command: str, circuit: Path, lab: Lab, tmp_path: Path
) -> None:
    """A missing file, an unknown task or another model ends with 3, and leaves no folder."""
    output = ("--output", "out") if command == "report" else ()
    done = lab(command, "nothing.json", *output)
    assert (done.code, "does not exist" in done.err) == (3, True)
    text = circuit.read_text("utf-8")
    circuit.write_text(text.replace('"task": "greater-than"', '"task": "mine"'), "utf-8")
    done = lab(command, circuit, *output)
    assert done.code == 3
    assert "--task-file" in done.err
    assert "loading" not in done.err
    circuit.write_text(text, "utf-8")
    done = lab(command, circuit, "--model", "gate-add", "--task", "gate-add", *output)
    assert done.code == 3
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failed_self_check_ends_with_seven(
    circuit: Path, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the whole circuit is not the model, nothing is told of any circuit, and no report."""
    monkeypatch.setattr(circuit_runs, "ROUNDINGS", -1)
    done = lab("report", circuit, *QUICK, "--output", "out")
    assert done.code == 7
    assert "off by" in done.err
    assert done.out == ""
    assert not (tmp_path / "out").exists()


def test_a_report_is_a_folder(circuit: Path, lab: Lab, tmp_path: Path) -> None:
    """It is written once, not over another without --force, and --json lists its files."""
    done = lab("report", circuit, *QUICK, "--output", "out", "--json")
    assert done.code == 0, done.err
    found = sorted(
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    )
    assert done.json["schema"] == "circuitlab-report/1"
    assert done.json["files"] == found
    assert {"report.html", "report.md", "results.json", "run.json", "REPRODUCE"} < set(found)
    record = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    assert record["settings"]["n_controls"] == 19
    done = lab("report", circuit, *QUICK, "--output", "out")
    assert done.code == 2
    assert "--force" in done.err
    assert "loading" not in done.err
    done = lab("report", circuit, *QUICK, "--output", "out", "--force")
    assert done.code == 0
    assert lines(done.out)["next"] == "open out/report.html"


def test_reproduce_does_what_it_says(circuit: Path, lab: Lab, tmp_path: Path) -> None:
    """The command of a report, run in an empty folder, gives the same results byte by byte."""
    assert lab("report", circuit, *QUICK, "--seed", "3", "--output", "out").code == 0
    told = (tmp_path / "out" / "REPRODUCE").read_text("utf-8")
    assert told.strip() in (tmp_path / "out" / "report.md").read_text("utf-8")
    circuit.unlink()
    for command in told.strip().split(" && "):
        name, *arguments = shlex.split(command)
        assert name == "circuitlab"
        done = lab(*arguments)
        assert done.code == 0, done.err
    first, second = (
        (tmp_path / folder / "results.json").read_bytes() for folder in ("out", "again")
    )
    assert first == second


def test_a_task_file_is_asked_for_and_its_digest_compared(
    lab: Lab, ids_model: Path, ids_task: Path, tmp_path: Path
) -> None:
    """A circuit of a task file needs the file; another file is used, and said to be another."""
    name = "<script>alert(1)<"
    document = json.loads(ids_task.read_text("utf-8"))
    ids_task.write_text(json.dumps({**document, "name": name}), encoding="utf-8")
    trace = ("trace", "--model", ids_model, "--task-file", ids_task, "--top", "12", "--allow-weak")
    assert lab(*trace, "--output", "circuit.json").code == 0
    assert "--task-file" in lab("evaluate", "circuit.json").err
    done = lab("report", "circuit.json", *QUICK, "--task-file", ids_task, "--output", "out")
    assert done.code == 0, done.err
    assert "digest" not in done.err
    assert "half the pairs" in lines(done.out)["pairs"]
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text("utf-8")
    document["prompts"] = document["prompts"][1:]
    ids_task.write_text(json.dumps(document), encoding="utf-8")
    done = lab("evaluate", "circuit.json", *QUICK, "--task-file", ids_task)
    assert done.code == 0, done.err
    assert "is not the one that the circuit was found on" in done.err
    assert "THE SAME PAIRS" in lines(done.out)["pairs"]


def test_held_out_pairs_can_be_given(circuit: Path, lab: Lab, tmp_path: Path) -> None:
    """A file of other pairs is what the circuit is scored on."""
    shown = json.loads(lab("tasks", "show", "greater-than").out)
    shown["prompts"] = shown["prompts"][52:60]
    (tmp_path / "held.json").write_text(json.dumps(shown), encoding="utf-8")
    done = lab("evaluate", circuit, *QUICK, "--held-out", "held.json", "--json")
    assert done.code == 0, done.err
    pairs = done.json["pairs"]
    assert (pairs["origin"], pairs["n_pairs"], pairs["left_out"]) == ("given", 4, 4)


def test_no_network_is_asked_for(circuit: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither command opens a connection."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert lab("report", circuit, *QUICK, "--offline", "--output", "out").code == 0


def test_settings_are_shown_without_a_model(circuit: Path, lab: Lab) -> None:
    """--dry-run tells each setting and where it is from, and loads nothing."""
    for command, output in (("evaluate", ()), ("report", ("--output", "out"))):
        done = lab(command, circuit, *output, "--n-controls", "7", "--dry-run")
        assert done.code == 0
        assert "n-controls\t7\tflag" in done.out
        assert "loading" not in done.err


def test_help_is_light() -> None:
    """The help of both commands imports no torch."""
    code = (
        "import sys\n"
        "from circuitlab.cli.evidence import evaluate, report\n"
        "for command in (evaluate, report):\n"
        "    context = command.make_context('x', ['c'], resilient_parsing=True)\n"
        "    command.get_help(context)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
