"""Offers: what a plugin registers, each checked as it is said."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.errors import CircuitLabError, PluginError
from circuitlab.options import Option, read_options

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.graph import CircuitGraph
    from circuitlab.hookspecs import AnalysisFunction, CommandFunction, Exporter
    from circuitlab.tasks import Task

#: Top-level modules in which the fault of a plugin may come to light.
_NOT_PLUGINS = sys.stdlib_module_names | {
    "accelerate", "circuitlab", "huggingface_hub", "networkx", "nnsight", "numpy", "pluggy",
    "safetensors", "tokenizers", "torch", "transformers",
}  # fmt: skip

#: Words that the command line has itself: no plugin's command can begin with them.
_OURS = frozenset(
    {
        "trace", "render", "plugins", "models", "tasks", "doctor", "runs", "evaluate", "report",
        "compare",
    }
)  # fmt: skip
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Analysis:
    """A registered analysis: its name, function, plugin, and options read from the signature.

    With ``stream_only`` it also runs where only the blocks of a model are known. ``shards`` are the
    option values with which it can be split into shards; None if it cannot. ``pair_scores(model,
    pairs, **options)`` gives its scores of each pair, ``[n_pairs, n_sources, n_receivers]``, whose
    mean over pairs are those of the circuit; None where it has none.
    """

    name: str
    function: AnalysisFunction
    plugin: str
    options: tuple[Option, ...]
    stream_only: bool = False
    shards: Mapping[str, Any] | None = None
    pair_scores: Callable[..., Tensor] | None = None

    @property
    def needs_task(self) -> bool:
        """Whether there is nothing to analyse without a task; else its default is None."""
        task = list(inspect.signature(self.function).parameters.values())[1]
        return task.default is inspect.Parameter.empty

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True, slots=True)
class Command:
    """A registered command: ``name`` is one word, or a group and a name; options by signature."""

    name: str
    function: CommandFunction
    plugin: str
    options: tuple[Option, ...]
    stream_only: bool = False


@dataclass
class PluginInfo:
    """A plugin as ``circuitlab plugins`` lists it; ``failure`` is None when it works.

    ``off`` says why it was not loaded, where it was not wanted.
    """

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    offers: list[str] = field(default_factory=list)
    failure: str | None = None
    off: str | None = None

    @property
    def origin(self) -> str:
        """The plugin with its distribution and version."""
        return f"{self.name!r} ({self.distribution} {self.version})"

    @property
    def warning(self) -> str:
        """One line about the failure, and how to be rid of it."""
        return (
            f"plugin {self.origin} is left out: {self.failure}; mend it, uninstall it, or "
            f"`circuitlab plugins disable {self.name}`"
        )


class Collector:
    """Takes what one plugin registers; each ``register_`` hook is given the method of its kind.

    Attributes:
        offers: Kind, key and value of each offer.
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.offers: list[tuple[str, str, Any]] = []

    def analysis(self, name: str, function: AnalysisFunction, **able: Any) -> None:
        """An analysis.

        Raises:
            ValueError: its name is not kebab-case.
            TypeError: its signature cannot be read, or ``pair_scores`` cannot be called.
        """
        if not _KEBAB.fullmatch(name):
            raise ValueError(f"analysis name {name!r} is not kebab-case")
        if not (able.get("pair_scores") is None or callable(able["pair_scores"])):
            raise TypeError(f"analysis {name!r}: pair_scores is not a function")
        offer = Analysis(name, function, self.plugin, read_options(function), **able)
        self.offers.append(("analyses", name, offer))

    def command(self, name: str, function: CommandFunction, stream_only: bool = False) -> None:
        """A command.

        Raises:
            ValueError: its name is not one or two kebab-case words, or begins with one of ours.
            TypeError: its signature cannot be read.
        """
        words = name.split(" ")
        if len(words) > 2 or not all(map(_KEBAB.fullmatch, words)):
            raise ValueError(f"command {name!r} is not named by one or two kebab-case words")
        if words[0] in _OURS:
            raise ValueError(f"command {name!r} begins with a word of CircuitLab's own")
        options = read_options(function, ("model",))
        offer = Command(name, function, self.plugin, options, stream_only)
        self.offers.append(("commands", name, offer))

    def task(self, task: Task) -> None:
        """A task.

        Raises:
            TypeError: it is none.
        """
        from circuitlab.tasks import Task

        if not isinstance(task, Task):
            raise TypeError(f"register_tasks was given a {type(task).__name__}, not a Task")
        self.offers.append(("tasks", task.name, task))

    def exporter(self, suffix: str, write: Exporter) -> None:
        """A file format.

        Raises:
            ValueError: its suffix has no dot.
            TypeError: it cannot be called.
        """
        if not suffix.startswith("."):
            raise ValueError(f"exporter suffix {suffix!r} does not start with a dot")
        if not callable(write):
            raise TypeError(f"exporter {suffix!r} is a {type(write).__name__}, not a function")
        self.offers.append(("exporters", suffix, _guarded(suffix, write, self.plugin)))


def describe(error: BaseException) -> str:
    """A stranger's exception in one line: its class, the first line of its text, and its place."""
    lines = str(error).strip().splitlines()
    if (
        type(error).__name__ == "PluginValidationError"
    ):  # pluggy says what is wrong in its last line
        lines = [f"{lines[0]}: {lines[-1]}"]
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return said + _place(error)


def _place(error: BaseException) -> str:
    """Where a plugin's own code was when it failed, as Python says it of a syntax error."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_PLUGINS:
            found = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return found


def _guarded(suffix: str, write: Exporter, plugin: str) -> Exporter:
    """An exporter whose faults name its plugin, and which prints nothing on stdout."""
    owner = f"exporter {suffix!r} of plugin {plugin!r}"

    @wraps(write)
    def guarded(circuit: CircuitGraph, path: Path) -> list[str]:
        try:
            with redirect_stdout(sys.stderr):
                warnings = write(circuit, path)
        except (CircuitLabError, OSError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # a plugin may raise anything
            raise PluginError(f"{owner} failed: {describe(error)}") from error
        if not isinstance(warnings, list | None) or any(
            not isinstance(warning, str) for warning in warnings or ()
        ):
            raise PluginError(
                f"{owner} returned {type(warnings).__name__}; return a list of warnings, or nothing"
            )
        return warnings or []

    return guarded
