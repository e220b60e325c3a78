"""A loopback NDIF in a process of its own, see ``loopback/server.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parent / "loopback" / "server.py"
#: How the server behaves when it was told nothing.
USUAL: dict[str, Any] = {
    **dict.fromkeys(("fail", "drop", "drop_after", "stall", "lose", "no_results"), 0),
    **dict.fromkeys(("key", "least_version", "other_version", "hostile", "result_url"), ""),
    "untrusted": False,
}
#: Waiting for it is short: settings of ``circuitlab.remote.client``.
SHORT = {"FIRST_PAUSE": 0.02, "FIRST_LOOK": 0.01, "LONGEST_LOOK": 0.05, "UNKNOWN_FOR": 0.3}


def model_key(repository: str) -> str:
    """What nnsight calls a text model of a repository."""
    parts = {"repo_id": repository, "revision": None, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(parts)}"


class Loopback:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def tell(self, **behaviour: Any) -> None:
        """Behave so from now on; everything not named as usual."""
        body = json.dumps({**USUAL, **behaviour}).encode()
        urllib.request.urlopen(f"{self.url}/tell", body, timeout=300).close()

    def log(self) -> list[dict[str, Any]]:
        """Every job that was ever sent: its id, envelope and headers."""
        with urllib.request.urlopen(f"{self.url}/log", timeout=300) as reply:
            found: list[dict[str, Any]] = json.load(reply)
        return found

    def payload(self, job: str) -> bytes:
        """What was sent with a job."""
        with urllib.request.urlopen(f"{self.url}/blob/{job}", timeout=300) as reply:
            return bytes(reply.read())


@contextmanager
def serving(folders: Mapping[str, Path], workdir: Path) -> Iterator[Loopback]:
    """A server that has these models, by the names of their repositories."""
    listed = workdir / "models.json"
    listed.write_text(json.dumps({model_key(name): str(path) for name, path in folders.items()}))
    kept = {k: v for k, v in os.environ.items() if k != "NDIF_API_KEY"}
    # Not in this folder, nor with its path: the host has nothing of ours.
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(listed)],
        stdout=subprocess.PIPE,
        cwd=workdir,
        env={**kept, "OMP_NUM_THREADS": "1"},
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield Loopback(int(process.stdout.readline()))
        finally:
            process.kill()
