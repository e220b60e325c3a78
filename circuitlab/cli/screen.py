"""What people see: results on stdout, everything else on stderr; no escapes where nobody looks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from circuitlab.labels import visible

if TYPE_CHECKING:
    import click

#: Seconds between two lines about one stage where stderr is not a terminal.
LINE_EVERY = 10.0
#: Seconds of the past from which a bar estimates what is to come.
ESTIMATE_OVER = 600.0


class Screen:
    """How this run may speak: set once by the command line's common flags."""

    quiet = False
    color = True
    progress = True
    #: The console whose bars are shown just now.
    live: Any = None

    @classmethod
    def reset(cls) -> None:
        """Speak as when nothing was asked for."""
        cls.quiet, cls.color, cls.progress = False, True, True


def plain(stream: Any) -> bool:
    """Whether a stream must get no escape sequences at all."""
    return not Screen.color or not stream.isatty() or os.environ.get("TERM") == "dumb"


def console(*, stderr: bool) -> Any:
    """A rich console on one of the streams."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    bare = plain(stream)
    return Console(
        file=stream, force_terminal=False if bare else None, no_color=bare or None, highlight=False
    )


def error(message: str, code: int | None = None) -> None:
    """One line on stderr that says what went wrong, and where the page of errors says more."""
    more = "" if code is None else f" (more: docs/errors.md#exit-{code})"
    _line("error", f"{message}{more}", "bold red")


def warn(message: str) -> None:
    """One line on stderr, unless quiet."""
    if not Screen.quiet:
        _line("warning", message, "yellow")


def usage_error(problem: click.UsageError) -> None:
    """A usage error and where to find help."""
    where = problem.ctx.command_path if problem.ctx else "circuitlab"
    _line("error", f"{problem.format_message()} (see {where} --help)", "bold red")


def say(message: str) -> None:
    """One line on stderr about what is happening, unless quiet."""
    if not Screen.quiet:
        sys.stderr.write(visible(message) + "\n")
        sys.stderr.flush()


def out(text: str) -> None:
    """Result text on stdout, as it is."""
    sys.stdout.write(text + "\n")


def pairs(title: str, values: Mapping[str, str]) -> None:
    """A result as a small table on a terminal, as ``key: value`` lines elsewhere."""
    if plain(sys.stdout):
        for key, value in values.items():
            out(f"{key}: {visible(value)}")
        return
    from rich.table import Table
    from rich.text import Text

    heading = Text(visible(title))
    grid = Table(
        title=heading, title_justify="left", title_style="bold", show_header=False, box=None
    )
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in values.items():
        style = "bold red" if value.startswith("NOT ") else ""
        grid.add_row(key, Text(visible(value), style=style))
    console(stderr=False).print(grid)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings on a terminal, separated by tabs elsewhere."""
    if plain(sys.stdout):
        for row in (columns, *rows):
            out("\t".join(visible(cell) for cell in row))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        grid.add_row(*(Text(visible(cell)) for cell in row))
    console(stderr=False).print(grid)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """What a plugin prints goes to stderr, so that stdout holds the result alone."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A listener that shows progress: bars on a terminal, now and then a line elsewhere."""
    if Screen.quiet or not Screen.progress:
        yield lambda description, done, total: None
    elif plain(sys.stderr):
        yield _Lines()
    else:
        with _bars() as listener:
            yield listener


class _Lines:
    """At most one line per stage every :data:`LINE_EVERY` seconds, and one when it starts."""

    def __init__(self) -> None:
        self._stage, self._last = "", 0.0
        self._started, self._first = 0.0, 0

    def __call__(self, description: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if description != self._stage:
            self._stage, self._started, self._first = description, now, done
        elif now - self._last < LINE_EVERY:
            return
        self._last = now
        of = f" of {total}" if total is not None else ""
        line = f"{description}: {done}{of}" if done else f"{description} …"
        # What an earlier run had done took none of this one's time.
        if total is not None and self._first < done < total:
            each = (now - self._started) / (done - self._first)
            line += f", about {_duration(each * (total - done))} left"
        say(line)


def _duration(seconds: float) -> str:
    """A time for people: ``40 s``, ``14 min``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int | None], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        # Short, so that a terminal's ^C fits behind it and the bars can be wiped.
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("·"),
        TimeRemainingColumn(),
        TextColumn("left", style="progress.remaining"),
    )
    shown = console(stderr=True)
    # Steps of half a minute and more still give an estimate.
    with Progress(
        *columns, console=shown, transient=True, speed_estimate_period=ESTIMATE_OVER
    ) as bars:
        stages: dict[str, Any] = {}

        def listener(description: str, done: int, total: int | None) -> None:
            if description not in stages:
                # Begun with what is done, or the estimate would count it as done in no time.
                stages[description] = bars.add_task(
                    visible(description), total=total, completed=done
                )
            bars.update(stages[description], completed=done)

        # A line written past the bars would be drawn over.
        Screen.live = shown
        try:
            yield listener
        finally:
            Screen.live = None


def _line(kind: str, message: str, style: str) -> None:
    text = visible(" ".join(message.split("\n")))
    if plain(sys.stderr):
        sys.stderr.write(f"{kind}: {text}\n")
    else:
        from rich.text import Text

        shown = Screen.live or console(stderr=True)
        shown.print(Text.assemble((f"{kind}: ", style), text), soft_wrap=True)
    sys.stderr.flush()
