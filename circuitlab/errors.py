"""Everything CircuitLab raises on purpose, and the exit code each one becomes.

    CircuitLabError            1   a fault of CircuitLab itself, or unclassified
    ├── OptionError            2   an option or argument that does not fit
    ├── TaskError              3   a prompt, task file or metric that cannot be used
    │   └── NumericsError      3   NaN or infinity where a number was expected
    ├── SiteError              3   a site the model does not have, or a value of the wrong shape
    ├── GraphError             3   a circuit file or graph that is not well formed
    ├── ModelError             4   a model that cannot be had, or is not understood
    ├── ResourceError          5   memory, disk or permissions
    ├── RemoteError            6   a host does not do what it was asked
    ├── QualityError           7   a result, or the traced model itself, fails its check
    └── PluginError            8   a plugin that was asked for failed

A message names the offender, the fact and the remedy. The command line prints it in one line and
exits with the class's ``exit_code``.
"""

from __future__ import annotations

from typing import ClassVar


class CircuitLabError(Exception):
    """Base of every error raised on purpose."""

    exit_code: ClassVar[int] = 1


class OptionError(CircuitLabError):
    """An option or argument has a value that does not fit."""

    exit_code = 2


class TaskError(CircuitLabError):
    """A prompt, a task file or a metric cannot be used."""

    exit_code = 3


class NumericsError(TaskError):
    """A NaN or an infinity appeared; the message names the site and the pair."""


class SiteError(CircuitLabError):
    """A site does not exist in the model, or a value does not have its shape."""

    exit_code = 3


class GraphError(CircuitLabError):
    """A circuit graph or circuit file is not well formed."""

    exit_code = 3


class ModelError(CircuitLabError):
    """A model cannot be loaded, or its architecture is not understood."""

    exit_code = 4


class ResourceError(CircuitLabError):
    """Memory, disk space or permissions do not suffice."""

    exit_code = 5


class RemoteError(CircuitLabError):
    """A host refused a job, lost it, or could not be reached in time."""

    exit_code = 6


class QualityError(CircuitLabError):
    """A self-check of the traced model failed, or a result is below what was asked."""

    exit_code = 7


class PluginError(CircuitLabError):
    """A plugin that was asked for is broken, or two plugins claim one name."""

    exit_code = 8
