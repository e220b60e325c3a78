"""Locks: one process at a time uses a file; which one is told to the others."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from circuitlab.errors import OptionError, ResourceError
from circuitlab.labels import excerpt


def lock_path(path: Path) -> Path:
    """The file whose lock is held."""
    return path.with_name(f".{path.name}.lock")


def lock(path: Path) -> int:
    """Hold the file for this process; the system lets go when the process ends, however it ends.

    Raises:
        OptionError: another process holds it; its number and machine are named.
        ResourceError: no lock can be made there.
    """
    import fcntl

    shown = excerpt(str(path))
    if path.is_dir():
        raise ResourceError(f"state '{shown}' is a folder; name a file")
    while True:
        held = -1
        try:
            held = os.open(lock_path(path), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(held, lock_path(path)):
                os.ftruncate(held, 0)
                os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return held
        except BlockingIOError:
            owner = os.pread(held, 200, 0).decode(errors="replace") or "another process"
            os.close(held)
            raise OptionError(
                f"state '{shown}' is in use by {excerpt(owner)}; wait for it to end, or name "
                f"another file"
            ) from None
        except OSError as error:
            if held >= 0:
                os.close(held)
            raise ResourceError(
                f"state '{shown}' cannot be kept there: {error.strerror}; name a file in a folder "
                f"that exists and may be written"
            ) from error
        os.close(held)


def _is_at(held: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: its last owner may have removed it."""
    try:
        return os.path.samestat(os.fstat(held), os.stat(path))
    except FileNotFoundError:
        return False
