"""Rules that need a process of their own: how a plugin is loaded, and what the command line has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from circuitlab.testing.clause import BrokenError, Clause, NotCheckedError, judge
from circuitlab.testing.conduct import other_value

if TYPE_CHECKING:
    from circuitlab.options import Option

#: Seconds that loading one plugin may take.
LOAD_LIMIT = 30.0
#: Seconds for what the command line says of a plugin, without a model.
COMMAND_LIMIT = 120.0

#: Begins the lines in which the process says what it found.
_MARK = "circuitlab-check: "
#: Loads a plugin alone, then all that is installed.
_LOAD = """
import contextlib, io, json, sys
from circuitlab.errors import PluginError
from circuitlab.registry import Registry
name, mark, printed = *sys.argv[1:], io.StringIO()
with contextlib.redirect_stdout(printed):
    info = Registry.load([name]).plugins[name]
heavy = [other for other in ("torch", "transformers", "nnsight") if other in sys.modules]
found = {"failure": info.failure, "printed": printed.getvalue(), "heavy": heavy}
print(mark + json.dumps(found), flush=True)
clash = ""
try:
    with contextlib.redirect_stdout(printed):
        Registry.load()
except PluginError as error:
    clash = str(error)
print(mark + json.dumps(clash))
"""
_COMMANDS = """
import contextlib, io, json, sys
from circuitlab.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            found.append((stop.code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""


def check_loading(name: str) -> Iterator[Clause]:
    """Load a plugin in a new process, which it may end or keep for ever."""
    subject, found = f"plugin {name!r}", {}

    def loads() -> None:
        found.update(_loaded(name))
        if found["failure"]:
            raise BrokenError(f"it cannot be loaded: {found['failure']}; mend that first")

    def light() -> None:
        if heavy := found["heavy"]:
            raise BrokenError(
                f"loading it imports {heavy[0]}, which makes every --help slow; import it inside "
                f"the function that uses it"
            )

    def silent() -> None:
        if text := found["printed"]:
            raise BrokenError(
                f"loading it prints {text[:60]!r}; stdout holds results only: use logging"
            )

    def shares() -> None:
        if found["clash"] is None:
            raise NotCheckedError("some other plugin that is installed does not load")
        if clash := found["clash"]:
            raise (BrokenError if repr(name) in clash else NotCheckedError)(clash)

    yield judge(subject, "it loads, in time", loads)
    if found and not found["failure"]:
        yield judge(subject, "loading it imports no model library", light)
        yield judge(subject, "loading it prints nothing", silent)
        yield judge(subject, "no other installed plugin has its names", shares)


def check_flags(name: str, offers: Mapping[tuple[str, ...], Sequence[Option]]) -> Iterator[Clause]:
    """Ask the command line for help, and give it a value for every option.

    Args:
        name: Of the plugin.
        offers: Its commands, as ``("trace", "edge-attribution")``, and the options of each.
    """
    able = {words: {o: other_value(o) for o in options} for words, options in offers.items()}
    calls = [
        [*words, *rest]
        for words, values in able.items()
        for rest in (["--help"], [*_given(values), "--dry-run"])
    ]
    said: list[tuple[int, str, str]] = []

    def check(number: int, words: tuple[str, ...], values: Mapping[Option, Any]) -> None:
        if not values:
            raise NotCheckedError("it has no options")
        said.extend([] if said else _said(name, calls))
        for (code, _, err), call in zip(said[number : number + 2], calls[number:], strict=False):
            if code != 0:
                raise BrokenError(f"`circuitlab {' '.join(call)}` fails: {err.strip()}")
        (_, helped, _), (_, shown, _) = said[number : number + 2]
        for option, value in values.items():
            if option.flag not in helped:
                raise BrokenError(f"`circuitlab {' '.join(words)} --help` has no {option.flag}")
            row = "\t".join((option.flag[2:], str(value), "flag"))
            if row not in shown.splitlines():
                raise BrokenError(f"`{' '.join(_given({option: value}))}` is not what arrives")

    for number, (words, values) in enumerate(able.items()):
        subject, call = f"circuitlab {' '.join(words)}", partial(check, 2 * number, words, values)
        yield judge(subject, "its options are flags", call)


def _given(values: Mapping[Option, Any]) -> list[str]:
    """Values as they are typed."""
    words = []
    for option, value in values.items():
        if option.types == (bool,):
            words.append(option.flag if value else f"--no-{option.flag[2:]}")
        else:
            words += [option.flag, str(value)]
    return words


def _loaded(name: str) -> dict[str, Any]:
    """What a new process says of loading a plugin.

    Raises:
        AssertionError: it does not end, or ends the process.
    """
    try:
        done = _python([_LOAD, name, _MARK], {}, LOAD_LIMIT)
        text, fact = done.stdout, f"loading it ends the process: {_last_line(done)}"
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode("utf-8", "replace") if isinstance(late.stdout, bytes) else ""
        fact = (
            f"it is not loaded after {LOAD_LIMIT:g} s; do what takes long, or waits, when an "
            f"analysis runs and not when the module is imported"
        )
    lines = text.splitlines()
    said = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    if not said:
        raise BrokenError(fact)
    found: dict[str, Any] = json.loads(said[0])
    found["printed"] += "\n".join(line for line in lines if not line.startswith(_MARK))
    return found | {"clash": json.loads(said[1]) if len(said) > 1 else None}


def _said(name: str, calls: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of commands, with this plugin alone; one process for all."""
    environment = {"CIRCUITLAB_PLUGINS": name}
    try:
        done = _python([_COMMANDS, json.dumps(calls)], environment, COMMAND_LIMIT)
    except subprocess.TimeoutExpired:
        raise BrokenError(f"the command line does not end within {COMMAND_LIMIT:g} s") from None
    if done.returncode != 0:
        raise BrokenError(f"the command line fails: {_last_line(done)}")
    found: list[tuple[int, str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _python(
    words: Sequence[str], changes: dict[str, str], limit: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  (this interpreter, no shell)
        [sys.executable, "-c", *words],
        env=_environment(changes),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _environment(changes: dict[str, str]) -> dict[str, str]:
    """This process's environment and installed packages, without settings of CircuitLab's."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("CIRCUITLAB_")}
    paths = os.pathsep.join(path for path in sys.path if path)
    # Wide, so that no flag is broken over two lines.
    return {**kept, "PYTHONPATH": paths, "COLUMNS": "400", "PYTHONIOENCODING": "utf-8", **changes}
