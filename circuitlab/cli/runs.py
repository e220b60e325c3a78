"""``--run`` and ``--shard`` of ``trace``, and ``circuitlab runs``: long runs in folders."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuitlab.cli import screen
from circuitlab.cli.suggesting import Suggesting
from circuitlab.errors import OptionError, ResourceError

if TYPE_CHECKING:
    from circuitlab.checkpoint import StateFile
    from circuitlab.runs import RunFolder

#: What ``--shard`` says to put all shards together.
MERGE = "merge"


@dataclass(frozen=True)
class Place:
    """Where a run keeps its state, and which shard of it this is.

    Attributes:
        state: The file; None where nothing is kept.
        shard: Which shard of how many; None for a whole run.
        folder: Of ``--run``.
        merging: Whether the shards are to be put together.
        anew: Whether to begin anew, whatever is there.
    """

    state: Path | None
    shard: tuple[int, int] | None = None
    folder: RunFolder | None = None
    merging: bool = False
    anew: bool = False

    def gather(self, state: StateFile) -> None:
        """Put the shards together, where that is asked for and not begun yet.

        Raises:
            TaskError: a shard is not complete, or does not fit the others.
        """
        if self.merging and not state.found:
            from circuitlab.shards import merge

            assert self.folder is not None
            merge(state, self.folder.shard_states)

    def shard_done(self) -> None:
        """Say that the shard is done, and what to do when all are."""
        assert self.folder is not None
        assert self.shard is not None
        number, n = self.shard
        screen.say(
            f"shard {number} of {n} is done; when all are: "
            f"{shlex.join(['circuitlab', 'runs', 'merge', str(self.folder.path)])}"
        )

    def finish(self) -> None:
        """The result is written."""
        if self.folder is not None:
            self.folder.finish()


def place(values: dict[str, Any]) -> Place:
    """Where the flags say.

    Raises:
        OptionError: they do not go together.
        TaskError: the folder is that of another run.
    """
    asked, path = values["shard"], values["run"]
    if path is None:
        if asked is not None:
            raise OptionError(f"--shard {asked} needs a folder that all shards share; give --run")
        return Place(values["resume"], anew=_anew(values["resume"], values["force_new"]))
    if values["resume"] is not None:
        raise OptionError("--run keeps the state in its folder; leave --resume out")
    from circuitlab.runs import RunFolder

    if asked == MERGE:
        if values["force_new"]:
            raise OptionError("--shard merge does no work anew; give --force-new to a shard")
        folder = RunFolder(path)
        if folder.shards == 1:
            raise OptionError(f"run {str(path)!r} has no shards; circuitlab runs resume ends it")
        return Place(folder.state(), None, folder, merging=True)
    shard = None if asked is None else _shard(asked)
    command = _without_place(shlex.split(click.get_current_context().obj)[1:])
    folder = RunFolder.begin(path, command, shard[1] if shard else 1, anew=values["force_new"])
    if folder.replaced:
        screen.warn(f"run {str(path)!r} was another one, {folder.replaced}: begun anew")
    if shard is not None:
        state = folder.state(shard[0])
        return Place(state, shard, folder, anew=_anew(state, values["force_new"]))
    if folder.done:
        raise OptionError(
            f"run {str(path)!r} is done; name another folder, or circuitlab runs rm it"
        )
    return Place(folder.state(), None, folder, anew=_anew(folder.state(), values["force_new"]))


def _anew(state: Path | None, asked: bool) -> bool:
    """Whether to begin anew; then no job that a host still has is taken up either."""
    if asked and state is None:
        raise OptionError("--force-new begins a kept run anew; name it with --resume or --run")
    if asked and state is not None:
        state.with_name(f"{state.name}.jobs").unlink(missing_ok=True)
    return asked


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= n or n < 2:
        raise OptionError(f"--shard {text!r} is not I/N with I from 1 to N and N above 1, or merge")
    return number, n


def _without_place(command: Sequence[str]) -> list[str]:
    """A command line without the flags that name folder and shard, and which to begin anew."""
    kept, skip = [], False
    for word in command:
        if not skip and word.partition("=")[0] not in ("--run", "--shard", "--force-new"):
            kept.append(word)
        skip = not skip and word in ("--run", "--shard")
    return kept


@click.group(cls=Suggesting, context_settings={"help_option_names": ["-h", "--help"]})
def runs() -> None:
    """Show, go on with, put together and remove runs that trace --run keeps in folders."""


_FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@runs.command("list")
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
def list_runs(folder: Path) -> None:
    """One row for each run in a folder beneath FOLDER, by default the current one."""
    from circuitlab.runs import RunFolder

    rows = []
    for path in sorted(folder.glob("*/run.json")):
        run = RunFolder(path.parent)
        rows.append((path.parent.name, _word(run), shlex.join(run.command)))
    screen.table(("run", "state", "command"), rows)


@runs.command("show")
@_FOLDER
def show_run(folder: Path) -> None:
    """The command of a run, and how far it and its shards are."""
    from circuitlab.runs import RunFolder

    run = RunFolder(folder)
    values = {"command": shlex.join(["circuitlab", *run.command]), "state": _word(run)}
    values["started in"] = str(run.started_in)
    for number in range(1, len(run.shard_states) + 1):
        values[f"shard {number} of {run.shards}"] = run.status(number)
    screen.pairs(run.path.name, values)


@runs.command("resume")
@_FOLDER
@click.option("--shard", type=click.IntRange(min=1), help="Only this shard.")
def resume_run(folder: Path, shard: int | None) -> None:
    """Go on with a run, or with all its shards that are not done, one after another."""
    from circuitlab.runs import RunFolder

    run = RunFolder(folder)
    if run.shards == 1:
        if shard is not None:
            raise OptionError(f"run {str(folder)!r} has no shards; leave --shard out")
        _again(run)
        return
    if shard is not None and shard > run.shards:
        raise OptionError(f"--shard {shard}: run {str(folder)!r} has {run.shards} shards")
    for number in [shard] if shard else range(1, run.shards + 1):
        if run.status(number) != "done":
            _again(run, "--shard", f"{number}/{run.shards}")


@runs.command("merge")
@_FOLDER
def merge_run(folder: Path) -> None:
    """Check that all shards are done and fit, put them together, and write the result."""
    from circuitlab.runs import RunFolder

    _again(RunFolder(folder), "--shard", MERGE)


@runs.command("rm")
@_FOLDER
def remove_run(folder: Path) -> None:
    """Remove the folder of a run, and the work in it; never results."""
    from circuitlab.runs import RunFolder

    RunFolder(folder).remove()


def _word(run: RunFolder) -> str:
    """How far a run is."""
    if run.shards == 1 or run.done:
        return run.status()
    done = [run.status(number + 1) for number in range(run.shards)].count("done")
    return f"{done} of {run.shards} shards done"


def _again(run: RunFolder, *more: str) -> None:
    """The run's own command once more, where it was given."""
    try:
        os.chdir(run.started_in)
    except OSError as error:
        raise ResourceError(
            f"run {str(run.path)!r} was started in {str(run.started_in)!r}: {error.strerror}; its "
            f"command may name files from there"
        ) from error
    arguments = [*run.command, "--run", str(run.path), *more]
    group = click.get_current_context().find_root().command
    command = shlex.join(["circuitlab", *arguments])
    with group.make_context("circuitlab", arguments, obj=command) as context:
        group.invoke(context)
