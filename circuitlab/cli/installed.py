"""What is installed: plugins, as every command loads them, and versions.

What plugins print stays off stdout.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from circuitlab.cli import screen
from circuitlab.registry import Registry

#: Packages whose versions matter, and the newest that was tested.
TESTED = {
    "torch": "2.13",
    "transformers": "5.23",
    "nnsight": "0.8",
    "networkx": "3.6",
    "pluggy": "1.7",
}
#: Those in which models are written and traced: another version may do it differently.
TRACING = ("transformers", "nnsight")


def versions() -> Iterator[tuple[str, str, str]]:
    """Name and version of each package, and the one that was tested where that is another."""
    yield "circuitlab", version("circuitlab"), ""
    for package, tested in TESTED.items():
        found = version(package)
        same = found == tested or found.startswith(f"{tested}.")
        yield package, found, "" if same else tested


def warn_of_versions() -> None:
    """One warning line where models are traced by versions that were not tested."""
    others = [
        f"{package} {found} (tested with {tested})"
        for package, found, tested in versions()
        if package in TRACING and tested
    ]
    if others:
        screen.warn(
            f"versions that were not tested: {', '.join(others)}; every model is checked when it "
            f"is loaded, and `circuitlab doctor MODEL` shows how"
        )


def load_registry() -> Registry:
    """Every installed plugin and what it offers."""
    with screen.quiet_stdout():
        return Registry.load(warn=screen.warn)


def warn_of_broken(registry: Registry) -> None:
    """One warning line for each plugin that could not be loaded."""
    for info in registry.failed:
        screen.warn(info.warning)
