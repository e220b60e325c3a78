"""Checkpoints: what a long analysis has so far, kept in a file that a later run goes on from.

An analysis opens a :class:`Checkpoint` and sees no path. Whoever builds the circuit may open a
:class:`StateFile` around it; without one, a checkpoint keeps nothing and costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from circuitlab.errors import ResourceError, TaskError
from circuitlab.labels import excerpt
from circuitlab.locks import lock, lock_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = TypeVar("Part")

#: Seconds between two writes of one run.
EVERY = 5.0
#: Written into each file; a file with other words is another program's, or another version's.
SCHEMA = "circuitlab-state/1"

_active: ContextVar[StateFile | None] = ContextVar("circuitlab_state", default=None)


class Checkpoint:
    """One stage of an analysis that can be interrupted and gone on with.

    Where the run was started without ``--resume`` (``build_circuit(resume=...)``), nothing is
    loaded or kept. The state is what :meth:`keep` was last given, and with it torch's global random
    state, so that an analysis that draws its numbers there ends as if it had never stopped.

    Args:
        stage: Name of the stage, another one for each in a run, without ``/``.

    Example:
        >>> import torch
        >>> with Checkpoint("squares") as saved:
        ...     state = saved.load() or {"done": torch.tensor(0), "sum": torch.tensor(0)}
        ...     for number in range(int(state["done"]), 4):
        ...         state = {"done": torch.tensor(number + 1), "sum": state["sum"] + number**2}
        ...         saved.keep(state)
        >>> int(state["sum"])
        14

    Raises:
        ValueError: the name has a ``/``, or an earlier stage of this run has it.
        ResourceError: the state cannot be written.
    """

    def __init__(self, stage: str) -> None:
        if "/" in stage:
            raise ValueError(f"stage {stage!r} has a '/' in its name; leave it out")
        self.stage = stage
        self._file: StateFile | None = None

    def __enter__(self) -> Self:
        self._file = _active.get()
        if self._file is not None:
            self._file.begin_stage(self.stage)
        return self

    def __exit__(self, *raised: object) -> None:
        # Also, and above all, when the block is left by Ctrl-C.
        if self._file is not None:
            self._file.write()

    def load(self) -> dict[str, Tensor] | None:
        """What an interrupted run had kept last, on the CPU; None where there is nothing."""
        return None if self._file is None else self._file.load(self.stage)

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Keep this state instead of the one before.

        The tensors are copied at once, so they may be changed afterwards; they are written every
        few seconds, and when the block is left, in whatever way.
        """
        if self._file is not None:
            self._file.keep(self.stage, state)

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of the work that are done here: all, or those of one shard of a run.

        A run is split inside :func:`circuitlab.sharded` alone. There the tensors kept are of
        floating point, and NaN exactly where another shard's parts, or later ones, belong.
        """
        return list(parts) if self._file is None else self._file.share(parts)


class StateFile:
    """The file of one run's state: locked while it is open, removed when its block succeeds.

    That of a shard stays: it is a part of another run.

    It is one safetensors file, replaced as a whole, with the run's settings in its header.

    Args:
        path: Where; None to keep nothing and only note the stages.
        shard: Which shard of how many, from 1, where the run is one; None for a whole run.
        anew: Begin anew, whatever is there; it is replaced when there is something to keep.

    Attributes:
        path: Where, resolved; or None.
        shard: As given.
        lasting: Whether the file stays when the block succeeds.
        complete: Whether this shard has done all its parts.
        settings: What the numbers of the run depend on.
        kept: Of each stage: what the analysis gave, and torch's random state then.
        found: Whether an earlier run had left a state.
        seconds: Time that earlier runs had spent.
        stages: Names of the stages begun in this run.

    Raises:
        OptionError: another process uses the file; it is named.
        TaskError: the file is damaged, or no state of a run.
        ResourceError: the file cannot be made, read or written.
    """

    def __init__(
        self,
        path: Path | str | None,
        shard: tuple[int, int] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        self.path = None if path is None else Path(path).resolve()
        self.shard = shard
        self._left: str | None = None
        self._anew = anew
        self.lasting = shard is not None
        self.complete = self.sharing = False
        self.found = False
        self.seconds = 0.0
        self.stages: list[str] = []
        self.settings: dict[str, Any] = {}
        self._device: torch.device | None = None
        self.kept: dict[str, dict[str, dict[str, Tensor]]] = {}
        self._changed = False
        self._opened = self._next = 0.0
        self._lock = -1

    def __enter__(self) -> Self:
        self._opened = time.monotonic()
        if self.path is not None:
            self._lock = lock(self.path)
            try:
                self._read(self.path)
            except BaseException as error:
                if not self._anew or not isinstance(error, TaskError):
                    self._unlock(self.path)
                    raise
                self._left = "damaged, or of another program or shard"
            if self._anew:
                self.complete = False
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if self.path is not None:
            if kind is None and not self.lasting:
                self.path.unlink(missing_ok=True)
            self._unlock(self.path)

    @contextmanager
    def used(self, settings: Mapping[str, Any], device: torch.device) -> Iterator[None]:
        """Checkpoints opened inside go to this file.

        Args:
            settings: What the run's numbers depend on, as plain JSON values.
            device: Where the model is; its random state is kept too.

        Raises:
            TaskError: the state is that of other settings; each one that differs is named.
        """
        self.settle(settings)
        self._device = device
        self.stages.clear()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def settle(self, settings: Mapping[str, Any]) -> str:
        """Take the settings of this run; what was there must be of the same, or is left behind.

        Returns:
            What is left behind, for people; empty where nothing is.

        Raises:
            TaskError: the state is that of other settings; each one that differs is named.
        """
        now = json.loads(json.dumps(settings))
        differs = changes(self.settings, now) if self.found else ""
        if differs and not self._anew:
            raise TaskError(
                f"state {self._shown} is of another run: {differs}; go back to those settings, "
                f"name another file, or delete this one to start again, as --force-new does"
            )
        if self._anew and self.found:
            self._left = f"of another run, {differs}" if differs else "of the same settings"
            self.found, self.kept, self.seconds = False, {}, 0.0
        self.settings = now
        left, self._left, self._anew = self._left, None, False
        return f"state {self._shown}, {left}, is not gone on with: begun anew" if left else ""

    def begin_stage(self, stage: str) -> None:
        """Note that a stage begins."""
        if stage in self.stages:
            raise ValueError(f"this run has had a stage {stage!r}; give each one its own name")
        self.stages.append(stage)

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """The parts that are done here."""
        if self.shard is None or not self.sharing:
            return list(parts)
        number, n = self.shard
        return list(parts[number - 1 :: n])

    def load(self, stage: str) -> dict[str, Tensor] | None:
        """What was kept of a stage; torch's random state becomes what it was then."""
        import torch

        if stage not in self.kept:
            return None
        random = self.kept[stage]["random"]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self._device is not None:
            torch.cuda.set_rng_state(random["cuda"], self._device)
        return {name: tensor.clone() for name, tensor in self.kept[stage]["state"].items()}

    def keep(self, stage: str, state: Mapping[str, Tensor]) -> None:
        """Keep a copy of a stage's state, and write it when the last write is long enough ago."""
        import torch

        if self.path is None:
            return
        random = {"cpu": torch.get_rng_state()}
        if self._device is not None and self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in state.items()
        }
        # In this order: whatever is interrupted here, the latest complete state is written.
        self._changed = True
        self.kept[stage] = {"state": copies, "random": random}
        if time.monotonic() >= self._next:
            self.write()

    def finish_shard(self) -> None:
        """Note that this shard has done all its parts, and write it."""
        self.complete = self._changed = True
        self.write()

    def write(self) -> None:
        """Write what has changed: the file is the whole new state or the whole old one.

        Raises:
            ResourceError: it cannot be written; the file is the old one.
        """
        from safetensors.torch import save

        if self.path is None or not self._changed:
            return
        tensors = {
            f"{stage}/{part}/{name}": tensor
            for stage, parts in self.kept.items()
            for part, named in parts.items()
            for name, tensor in named.items()
        }
        about = {
            "format": SCHEMA,
            "settings": json.dumps(self.settings),
            "seconds": str(self.seconds + time.monotonic() - self._opened),
        }
        if self.shard is not None:
            about["shard"] = f"{self._shard}, {'complete' if self.complete else 'begun'}"
        about["digest"] = _seal(about, tensors)
        draft = self.path.with_name(f".{self.path.name}.draft")
        try:
            with draft.open("wb") as file:
                file.write(save(tensors, about))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path)
        except OSError as error:
            raise ResourceError(
                f"state {self._shown} cannot be written: {error.strerror or error}; check free "
                f"space and permissions of {str(self.path.parent)!r}"
            ) from error
        finally:
            draft.unlink(missing_ok=True)
        self._changed, self._next = False, time.monotonic() + EVERY

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        remedy = "name another file, or delete this one to start again, as --force-new does"
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != SCHEMA:
                    raise TaskError(
                        f"state {self._shown} was written by another program or version; {remedy}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return
        except OSError as error:
            raise ResourceError(
                f"state {self._shown} cannot be read: {error.strerror or error}; name another file"
            ) from error
        except SafetensorError as error:
            raise TaskError(
                f"state {self._shown} is no state of a run, or is damaged ({error}); {remedy}"
            ) from error
        if about.pop("digest", "") != _seal(about, tensors):
            raise TaskError(f"state {self._shown} is damaged: its digest does not fit; {remedy}")
        shard, _, word = about.get("shard", "").partition(", ")
        if shard != self._shard:
            raise TaskError(
                f"state {self._shown} is of {shard or 'a whole run'}, not of "
                f"{self._shard or 'a whole run'}; {remedy}"
            )
        self.complete = word == "complete"
        self.settings = json.loads(about["settings"])
        self.seconds = float(about["seconds"])
        for key, tensor in tensors.items():
            stage, part, name = key.split("/", 2)
            parts = self.kept.setdefault(stage, {"state": {}, "random": {}})
            parts[part][name] = tensor
        self.found = True

    def _unlock(self, path: Path) -> None:
        lock_path(path).unlink(missing_ok=True)
        os.close(self._lock)

    @property
    def _shard(self) -> str:
        return "" if self.shard is None else "shard {} of {}".format(*self.shard)

    @property
    def _shown(self) -> str:
        return f"'{excerpt(str(self.path))}'"


def active() -> StateFile | None:
    """The state file that checkpoints go to."""
    return _active.get()


@contextmanager
def opened(resume: Path | str | StateFile | None) -> Iterator[StateFile]:
    """The state file of a path; one that is open already stays open, its opener closes it."""
    if isinstance(resume, StateFile):
        yield resume
    else:
        with StateFile(resume) as state:
            yield state


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, types, shapes and bytes, in the order of the names."""
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _seal(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Digest of all that a file holds; it shows damage, not forgery."""
    text = json.dumps([about, digest(tensors)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every setting that differs, with both values."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in names)
