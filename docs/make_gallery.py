"""Make the pictures of gallery.md again, by the commands that stand there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
#: A picture may be kept under a shorter name than its format asks for.
KEPT = {"induction-quadrants.plot.svg": "induction-quadrants.svg"}


def commands() -> list[str]:
    """Every command of the gallery, in order."""
    return re.findall(r"^\$ circuitlab (.*)$", (DOCS / "gallery.md").read_text("utf-8"), re.M)


def main() -> None:
    """Run every command in an empty folder and keep what the page shows."""
    shown = set(re.findall(r"\(pictures/([^)]+)\)", (DOCS / "gallery.md").read_text("utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        for command in commands():
            print("circuitlab", command, flush=True)
            subprocess.run(
                [sys.executable, "-m", "circuitlab", *shlex.split(command)],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        for path in sorted(Path(folder).glob("*.svg")):
            name = KEPT.get(path.name, path.name)
            if name in shown:
                shutil.copy(path, DOCS / "pictures" / name)
                shown.remove(name)
    if shown:
        raise SystemExit(f"no command made {', '.join(sorted(shown))}")


if __name__ == "__main__":
    main()
