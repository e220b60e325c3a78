"""Progress as people see it: lines in a pipe, a bar on a terminal, each with the time left."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest

from circuitlab import track
from circuitlab.cli import screen
from circuitlab.progress import listening


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the screen and its bars take for the time."""
    now = [1000.0]
    stopped = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("circuitlab.cli.screen.time", stopped)
    monkeypatch.setattr("rich.console.monotonic", stopped.monotonic)
    monkeypatch.setattr(screen.Screen, "quiet", False)
    monkeypatch.setattr(screen.Screen, "progress", True)
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_pipe_gets_a_line_in_ten_seconds_with_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """100 steps of 4 s: after the first line one for each 12 s, its estimate exact."""
    with screen.progress() as listener, listening(listener):
        for _ in track(range(100), "patching"):
            clock[0] += 4
    shown = lines(capsys)
    assert shown[:3] == [
        "patching …",
        "patching: 3 of 100, about 6 min left",
        "patching: 6 of 100, about 6 min left",
    ]
    assert shown[-2:] == [
        "patching: 96 of 100, about 16 s left",
        "patching: 99 of 100, about 4 s left",
    ]
    assert len(shown) == 34


def test_time_left_is_judged_by_this_run_alone(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that an earlier run had done took no time here: ten of an hour, 10 h 30 min left."""
    with screen.progress() as listener, listening(listener):
        for step in track(range(900, 1000), "patching", total=1000, done=900):
            if step == 910:
                break
            clock[0] += 420
    shown = lines(capsys)
    assert shown[0] == "patching: 900 of 1000"
    assert shown[-1] == "patching: 910 of 1000, about 10 h 30 min left"


def test_nobody_knows_how_long_an_endless_stage_takes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a total there is a count and no estimate."""
    with screen.progress() as listener, listening(listener):
        for _ in track(iter(range(3)), "searching"):
            clock[0] += 30
    assert lines(capsys) == ["searching …", "searching: 1", "searching: 2", "searching: 3"]


def test_a_terminal_gets_a_bar_with_both_times(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar shows steps, the time gone and the time left; a resumed one by its own speed."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with screen.progress() as listener, listening(listener):
        for step in track(range(900, 1000), "patching 32,491 edges", total=1000, done=900):
            clock[0] += 6
            if step == 910:
                break
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).split("\r")[-2:]
    assert any(
        re.search(r"patching 32,491 edges .*910/1000 0:01:06 · 0:09:00 left", x) for x in last
    )
