"""The core's own families, tasks and exporters, offered through the same hooks as a plugin's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from circuitlab import architectures, export, zoo
from circuitlab.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from circuitlab.architectures import Architecture
    from circuitlab.hookspecs import Exporter
    from circuitlab.tasks import Task


@hookimpl
def register_tasks(register: Callable[[Task], None]) -> None:
    """The tasks of the bundled models."""
    for task in zoo.tasks():
        register(task)


@hookimpl(trylast=True)
def adapt_architecture(config: PretrainedConfig) -> Architecture | None:
    """The families CircuitLab knows itself."""
    answers = (family(config) for family in architectures.FAMILIES)
    return next((answer for answer in answers if answer is not None), None)


@hookimpl
def register_exporters(register: Callable[[str, Exporter], None]) -> None:
    """The built-in file formats."""
    for suffix, write in export.EXPORTERS.items():
        register(suffix, write)
