"""The installed plugins, as every command loads them: what they print stays off stdout."""

from __future__ import annotations

from circuitlab.cli import screen
from circuitlab.registry import Registry


def load_registry() -> Registry:
    """Every installed plugin and what it offers."""
    with screen.quiet_stdout():
        return Registry.load()


def warn_of_broken(registry: Registry) -> None:
    """One warning line for each plugin that could not be loaded."""
    for info in registry.failed:
        screen.warn(info.warning)
