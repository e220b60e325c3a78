"""Job log: which job does which work, written down at once so that a later run can take it up."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from circuitlab.errors import ResourceError
from circuitlab.labels import excerpt

#: Seconds for which hosts keep results.
KEPT = 24 * 3600


class JobLog:
    """A file with one line for each job; without a path, nothing is written or found.

    A line holds the digest of the work, the job's id, the host and the time. No key is in it.

    Args:
        path: The file; made when the first job is sent.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)

    def add(self, digest: str, job: str, host: str) -> None:
        """Write a job down, on the disk when this returns.

        Raises:
            ResourceError: the file cannot be written.
        """
        if self.path is None:
            return
        entry = {"work": digest, "job": job, "host": host, "sent": time.time()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(
                f"the ids of remote jobs cannot be written to '{excerpt(str(self.path))}': "
                f"{error.strerror}; name another file"
            ) from error

    def find(self, digest: str, host: str) -> str | None:
        """The job that was sent last for this work and whose result may still be there."""
        if self.path is None or not self.path.exists():
            return None
        found = None
        for line in self.path.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                fits = (entry["work"], entry["host"]) == (digest, host)
                if fits and time.time() - float(entry["sent"]) < KEPT:
                    found = str(entry["job"])
            except (ValueError, KeyError, TypeError):  # a line cut off by the end of a process
                continue
        return found

    def remove(self) -> None:
        """Forget all jobs: their results have been used."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
