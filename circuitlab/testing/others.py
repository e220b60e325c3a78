"""Rules of what a plugin offers beside analyses: formats, commands, tasks, notes, families."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.builder import run_command
from circuitlab.checks import require, run_checks
from circuitlab.errors import GraphError, PluginError, QualityError
from circuitlab.export import write_circuit
from circuitlab.graph import CircuitGraph
from circuitlab.loading import load_unchecked
from circuitlab.task_files import read_task, write_task
from circuitlab.testing.clause import BrokenError, Clause, NotCheckedError, judge
from circuitlab.testing.samples import planted_circuit, sample_circuit, tiny_model

if TYPE_CHECKING:
    from circuitlab.hookspecs import Exporter
    from circuitlab.offers import Command
    from circuitlab.registry import Registry
    from circuitlab.tasks import Task

#: When a PDF was made, which its makers write down.
_DATE = re.compile(rb"/(Creation|Mod)Date *\([^)]*\)")


def check_exporter(suffix: str, write: Exporter) -> Iterator[Clause]:
    """Hold a file format to its rules."""
    subject = f"exporter {suffix!r}"

    def written(circuit: CircuitGraph) -> bytes:
        with tempfile.TemporaryDirectory() as folder, quiet(subject):
            path = Path(folder, f"sample{suffix}")
            write_circuit(circuit, path, {suffix: write})
            return _DATE.sub(b"", path.read_bytes())

    def writes() -> None:
        circuit = sample_circuit()
        before = circuit.to_json()
        if not written(circuit):
            raise BrokenError(f"{subject} wrote an empty file; write the whole circuit at the path")
        if circuit.to_json() != before:
            raise BrokenError(f"{subject} changed the circuit it was given; work on a copy")

    def repeats() -> None:
        if written(sample_circuit()) != written(sample_circuit()):
            raise BrokenError(
                f"{subject} wrote two different files of one circuit; leave times out and iterate "
                f"over sets in sorted order"
            )

    yield judge(subject, "it writes a circuit, and prints nothing", writes)
    yield judge(subject, "one circuit, one file", repeats)


def check_command(
    command: Command, given: Mapping[str, Any], registry: Registry, *, asked: bool
) -> Iterator[Clause]:
    """Hold a command to its rules; it is run where it has no options, or some were given."""
    subject = f"command {command.name!r}"

    def documented() -> None:
        if not (command.function.__doc__ or "").strip():
            raise BrokenError(f"{subject} has no docstring; its first line is the help text")

    def found() -> str:
        with tempfile.TemporaryDirectory() as folder, _inside(folder), quiet(subject):
            model = tiny_model()
            return json.dumps(run_command(command, model, dict(given), registry=registry))

    def repeats() -> None:
        if command.options and not asked:
            raise NotCheckedError(
                f"it may work for long or write files; give options for a short run by --set "
                f"'{command.name}.OPTION=VALUE'"
            )
        if found() != found():
            raise BrokenError(
                f"{subject} gave two different results from one seed; see register_commands"
            )

    yield judge(subject, "it has a line of help", documented)
    yield judge(subject, "it gives plain JSON, twice the same, and prints nothing", repeats)


def check_task(task: Task) -> Iterator[Clause]:
    """Hold a named task to its rules."""

    def travels() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "task.json")
            write_task(task, path)
            again = read_task(path)
            if (again.name, again.pairs) != (task.name, task.pairs):
                raise BrokenError(
                    f"task {task.name!r} is another one when it was written and read again"
                )

    yield judge(f"task {task.name!r}", "it can be written as a file and read again", travels)


def check_annotator(name: str, registry: Registry) -> Iterator[Clause]:
    """Hold ``annotate_circuit`` to its rules."""
    subject = "annotate_circuit"
    model, task, _ = planted_circuit()

    def noted() -> str:
        circuit = sample_circuit()
        with quiet(subject):
            registry.annotate([name], circuit, model, task)
        circuit.validate()
        try:
            return circuit.to_json()
        except GraphError as error:
            raise BrokenError(f"{subject}: {error}; add plain JSON values, finite") from error

    def repeats() -> None:
        if noted() != noted():
            raise BrokenError(f"{subject} gave two different circuits; leave times and ids out")

    yield judge(subject, "it adds plain data to the nodes there are, and prints nothing", noted)
    yield judge(subject, "one circuit, one annotation", repeats)


def check_families(registry: Registry) -> Iterator[Clause]:
    """Hold ``adapt_architecture`` to its rules, with the one model that is always here."""
    subject = "adapt_architecture"

    class Unknown:
        """A configuration of a family that nobody has."""

        model_type = "circuitlab-check"

    def leaves_others() -> None:
        unknown: Any = Unknown()
        if registry.adapt(unknown) is not None:
            raise BrokenError(
                f"{subject} claims a family that does not exist; look at config.model_type"
            )

    def describes() -> None:
        module: Any = tiny_model()._module
        model, plain = load_unchecked((module, None), registry=registry)
        try:
            require(model, run_checks(model, plain))
        except QualityError as error:
            raise BrokenError(
                f"{subject} claims GPT-2 and describes it wrongly: {error}"
            ) from error

    yield judge(subject, "it leaves families that are not its own", leaves_others)
    yield judge(subject, "GPT-2 is still described rightly", describes)
    own = "its own families: run `circuitlab models check MODEL` on one of each"
    yield judge(subject, "models pass the self-check", _raising(NotCheckedError(own)))


def _raising(error: Exception) -> Callable[[], None]:
    def check() -> None:
        raise error

    return check


@contextmanager
def quiet(subject: str) -> Iterator[None]:
    """Refuse anything written to stdout inside.

    Raises:
        AssertionError: names who wrote what.
    """
    written = io.StringIO()
    try:
        with redirect_stdout(written):
            yield
    except PluginError as error:
        raise BrokenError(str(error)) from error
    if text := written.getvalue():
        raise BrokenError(
            f"{subject} printed {text[:60]!r}; stdout holds results only: use logging"
        )


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Work in a folder, so that what is written by default is gone afterwards."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
