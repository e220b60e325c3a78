"""The command line: click reads it, rich shows it, the core decides.

``main`` is the one place where errors become exit codes: 0 done, 1 a fault of CircuitLab, 2 usage,
3 data, 4 model, 5 resources, 6 remote, 7 not good enough, 8 a plugin asked for failed, 130
interrupted, 141 nobody reads, 143 terminated.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence

import click

from circuitlab.cli import screen
from circuitlab.cli.stopping import heeding_signals, say_stopped
from circuitlab.errors import CircuitLabError

#: A shell sets it to ask for completions.
_COMPLETE = "_CIRCUITLAB_COMPLETE"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    screen.Screen.reset()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A narrow encoding must not turn an arrow or a file name into a crash.
            stream.reconfigure(errors="backslashreplace")
    try:
        with heeding_signals():
            code = _run(given)
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has no reader; without this, closing the streams would complain.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = 141
    sys.exit(code)


def _run(given: list[str]) -> int:
    from circuitlab.cli.commands import circuitlab

    debug = "--debug-traceback" in given
    if instruction := os.environ.get(_COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(circuitlab, {}, "circuitlab", _COMPLETE, instruction)
    try:
        # Not click's main: it makes exit 1 of a closed pipe, whatever it is told.
        command = shlex.join(["circuitlab", *given])
        with circuitlab.make_context("circuitlab", list(given), obj=command) as context:
            circuitlab.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        screen.usage_error(error)
        return error.exit_code
    except click.ClickException as error:
        screen.error(error.format_message())
        return 2
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (all becomes a code and a line)
        stopped = say_stopped(error)
        return _failed(error, debug=debug) if stopped is None else stopped
    return 0


def _failed(error: BaseException, *, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if isinstance(error, CircuitLabError):
        screen.error(str(error), error.exit_code)
        return error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        screen.error("out of memory: use a smaller --batch-size, or a machine with more memory", 5)
        return 5
    screen.error(
        f"a fault of CircuitLab itself: {type(error).__name__}: {error}; please report it, with "
        f"what --debug-traceback shows"
    )
    return 1
