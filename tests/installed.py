"""What an installer leaves behind of a distribution, so that its plugins are found."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path


def describe(site: Path, name: str, version: str, plugins: Mapping[str, str]) -> None:
    """Write the metadata of a distribution and its entry points, plugin to module, into ``site``.

    What an earlier installation of the same version left is replaced.
    """
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    lines = ["[circuitlab]", *(f"{plugin} = {module}" for plugin, module in plugins.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_project(site: Path, folder: Path) -> None:
    """The same of the project in ``folder``, by its ``pyproject.toml``."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    describe(site, project["name"], project["version"], project["entry-points"]["circuitlab"])
