"""Run folders: a long run's command and states in one place, whole or in shards."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuitlab.checkpoint import StateFile, changes
from circuitlab.errors import OptionError, ResourceError, TaskError

#: Written into each folder.
SCHEMA = "circuitlab-run-folder/1"
_PLAN, _DONE, _STATE = "run.json", "done", "run.state"


class RunFolder:
    """The folder of one run.

    ``run.json`` has its command; ``run.state`` the state of the whole run, ``shard-2-of-4.state``
    that of a shard; ``done`` is there when the result is written.

    Args:
        path: The folder.

    Attributes:
        path: Resolved.
        command: Arguments of the command line, without those that name folder and shard.
        shards: Number of shards; 1 for a whole run.
        started_in: Folder in which the command was given.
        replaced: In what the run differs that was in this folder before; empty where none was.

    Raises:
        TaskError: it is no folder of a run, or its plan cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        plan = self._read()
        self.command: list[str] = plan["command"]
        self.shards: int = plan["shards"]
        self.started_in = Path(plan["folder"])
        self.replaced = ""

    @classmethod
    def begin(
        cls, path: Path | str, command: Sequence[str], shards: int, *, anew: bool = False
    ) -> RunFolder:
        """The folder of this run, made where it is not there yet.

        Processes may do so at once; the first one's plan holds.

        Args:
            path: The folder.
            command: Arguments of the command line, without those that name folder and shard.
            shards: Number of shards; 1 for a whole run.
            anew: Where the folder is that of another run, it is removed first.

        Raises:
            TaskError: the folder is that of another run, or has other files.
            OptionError: that other run is under way.
            ResourceError: it cannot be made.
        """
        folder = Path(path).resolve()
        plan = {
            "format": SCHEMA, "command": list(command), "shards": shards, "folder": str(Path.cwd()),
        }  # fmt: skip
        try:
            replaced = ""
            if anew and (folder / _PLAN).exists() and (earlier := cls(folder))._read() != plan:
                replaced = changes(earlier._read(), plan)
                earlier.remove()
            folder.mkdir(parents=True, exist_ok=True)
            _publish(folder, plan)
        except OSError as error:
            raise ResourceError(
                f"run folder {str(folder)!r} cannot be made: {error.strerror}; name another"
            ) from error
        run = cls(folder)
        if (there := run._read()) != plan:
            raise TaskError(
                f"{str(folder)!r} is the folder of another run: {changes(there, plan)}; name "
                f"another folder, or remove it with circuitlab runs rm, as --force-new does"
            )
        run.replaced = replaced
        if anew:
            (folder / _DONE).unlink(missing_ok=True)
        return run

    @property
    def done(self) -> bool:
        """Whether the result of the whole run is written."""
        return (self.path / _DONE).exists()

    def finish(self) -> None:
        """Note that the result is written."""
        (self.path / _DONE).touch()

    def state(self, shard: int | None = None) -> Path:
        """Where the whole run, or a shard, keeps its state."""
        name = _STATE if shard is None else f"shard-{shard}-of-{self.shards}.state"
        return self.path / name

    @property
    def shard_states(self) -> list[Path]:
        """States of all shards, in their order; empty for a run that has none."""
        return [self.state(n + 1) for n in range(self.shards)] if self.shards > 1 else []

    def status(self, shard: int | None = None) -> str:
        """``done``, ``stopped``, ``not begun``, or who is at it."""
        if shard is None and self.done:
            return "done"
        which = None if shard is None else (shard, self.shards)
        try:
            with StateFile(self.state(shard), which) as state:
                found = "done" if state.complete else "stopped" if state.found else "not begun"
                state.lasting = True
                return found
        except OptionError as error:
            return "running: " + str(error).partition(" in use by ")[2].partition(";")[0]
        except TaskError:
            return "damaged"

    def remove(self) -> None:
        """Remove the folder's files and the folder.

        Raises:
            OptionError: the run is under way.
            TaskError: the folder has files that are not a run's.
        """
        states = [self.state(), *self.shard_states]
        busy = [
            word for n in (None, *range(1, len(states))) if "running" in (word := self.status(n))
        ]
        if busy:
            raise OptionError(f"run {str(self.path)!r} is {busy[0]}; stop it first")
        ours = {name for path in states for name in (path.name, f"{path.name}.jobs")}
        ours |= {f".{path.name}.{end}" for path in states for end in ("lock", "draft")}
        ours |= {_PLAN, _DONE}
        files = {path.name for path in self.path.iterdir()}
        if files - ours:
            raise TaskError(
                f"folder {str(self.path)!r} also has {min(files - ours)!r}, which is no file of a "
                f"run; move it away first"
            )
        for name in sorted(files):
            (self.path / name).unlink()
        self.path.rmdir()

    def _read(self) -> dict[str, Any]:
        try:
            plan = json.loads((self.path / _PLAN).read_text("utf-8"))
        except OSError as error:
            raise TaskError(
                f"{str(self.path)!r} is no folder of a run ({_PLAN}: {error.strerror}); make one "
                f"with circuitlab trace --run"
            ) from error
        except ValueError as error:
            raise TaskError(f"{str(self.path / _PLAN)!r} is not JSON: {error}") from error
        if not isinstance(plan, dict) or plan.get("format") != SCHEMA:
            raise TaskError(f"{str(self.path / _PLAN)!r} was written by another program or version")
        return plan


def _publish(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, whole, where there is none."""
    if (folder / _PLAN).exists():
        return
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise TaskError(f"folder {str(folder)!r} has other files; name a new one")
    descriptor, draft = tempfile.mkstemp(prefix=".run.", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(plan, file, indent=1)
        os.link(draft, folder / _PLAN)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
