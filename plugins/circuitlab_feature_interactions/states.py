"""The state of a training in a file: replaced as a whole, checked when read, locked while used."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from circuitlab import ModelError, OptionError, ResourceError

#: In the folder of a set: the state of a training that is not complete, and who uses the folder.
STATE, LOCK = "training.safetensors", ".lock"
#: Another program's or version's state says something else.
SCHEMA = "circuitlab-training/1"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out; the system lets go when this one ends.

    Raises:
        OptionError: another process trains in it.
        ResourceError: it cannot be made or written.
    """
    make_folder(folder)
    try:
        held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"folder '{folder}' is in use by another training; wait for it to end, or name "
                f"another --output"
            ) from None
        yield
    finally:
        os.close(held)


def make_folder(folder: Path) -> None:
    """Make a folder that may be there.

    Raises:
        ResourceError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole, or not at all; it outlives a power cut.

    Raises:
        ResourceError: it cannot be written; an older one stays.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        draft.unlink(missing_ok=True)


def write_state(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state; what was there before is replaced.

    Args:
        folder: Of the set.
        tensors: By name, on any device.
        facts: Plain JSON.

    Raises:
        ResourceError: it cannot be written.
    """
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": SCHEMA, "facts": json.dumps(facts)}
    header["digest"] = _digest(header["facts"], copies)
    write_whole(folder / STATE, save(copies, header))


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors, on the CPU, and the facts; None where there is no state.

    Raises:
        ModelError: the file is damaged, or no state of a training.
        ResourceError: it cannot be read.
    """
    path = folder / STATE
    remedy = "delete it to start again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        raise ModelError(f"state '{path}' is damaged ({error}); {remedy}") from error
    except OSError as error:
        raise ResourceError(f"state '{path}' cannot be read: {error.strerror or error}") from error
    if header.get("format") != SCHEMA:
        raise ModelError(f"state '{path}' was written by another program or version; {remedy}")
    if header.get("digest") != _digest(header.get("facts", ""), tensors):
        raise ModelError(f"state '{path}' is damaged: its digest does not fit; {remedy}")
    facts: dict[str, Any] = json.loads(header["facts"])
    return tensors, facts


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _unwritable(folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"folder '{folder}' cannot be written: {error.strerror or error}; check free space and "
        f"permissions, or name another --output"
    )
