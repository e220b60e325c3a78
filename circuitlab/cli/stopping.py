"""Ctrl-C and SIGTERM: the first ends a run in order, the next at once; and how to go on after."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from circuitlab.cli import screen

if TYPE_CHECKING:
    from circuitlab.checkpoint import StateFile
    from circuitlab.progress import Listener

#: Said of a run that a signal ended; its exit code is 128 and the signal's number.
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

#: The signals that have arrived.
_arrived: list[int] = []


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived.

    A class of its own: Python ends a process in its own way, whatever its code, once a plain
    KeyboardInterrupt has left code that ``exec`` ran.
    """


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Inside, the first signal raises :class:`Stopped`, the second ends the process."""
    _arrived.clear()
    # Where Python's own handler is not set, someone wants something else: nohup for instance.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        # Where none arrived, whoever called goes on. Where one did, nothing may hold up the end.
        if signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def resumable(
    path: Path | None, shard: tuple[int, int] | None = None, *, anew: bool = False
) -> Iterator[StateFile]:
    """The state of a run, or of a shard, open; a signal inside adds a note on how to go on."""
    from circuitlab.checkpoint import StateFile

    with StateFile(path, shard, anew=anew) as state:
        if state.found and not state.complete and not anew:
            screen.say(f"going on from {path} …")
        try:
            yield state
        except BaseException as error:
            if advice := _advice(state):
                error.add_note(advice)
            raise


def stoppable(listener: Listener) -> Listener:
    """The listener, with whose next message a run ends that has swallowed :class:`Stopped`.

    Python itself swallows what a signal's handler raises in a callback, during an import say.
    """

    def heard(description: str, done: int, total: int | None) -> None:
        if _arrived:
            raise Stopped
        listener(description, done, total)

    return heard


def say_stopped(error: BaseException) -> int | None:
    """Say that a signal ended the run, and how to go on; the exit code. None if none did.

    After a signal it is the reason of every error: what it cut short may fail in any way.
    """
    if not _arrived and not isinstance(error, KeyboardInterrupt | click.Abort):
        return None
    number = _arrived[0] if _arrived else signal.SIGINT
    if sys.stderr.isatty():
        screen.say("")  # the terminal shows ^C where the line would begin
    screen.error("; ".join([_WORDS[signal.Signals(number)], *getattr(error, "__notes__", [])]))
    return 128 + number


def _advice(state: StateFile) -> str:
    """What someone who has interrupted a run wants to know."""
    if state.path is None:
        return "a run with --resume FILE can be gone on with" if state.stages else ""
    jobs = state.path.with_name(f"{state.path.name}.jobs")
    if state.path.exists() or jobs.exists():
        return f"resume with: {click.get_current_context().obj}"
    return f"nothing had been kept in {str(state.path)!r} yet"


def _stop(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    for each in _WORDS:
        if signal.getsignal(each) is _stop:
            signal.signal(each, _stop_at_once)
    raise Stopped


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + number)
