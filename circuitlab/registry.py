"""The registry: finds plugins, loads them one by one, and collects what they offer.

One broken plugin never harms another: it becomes a warning and a FAILED row. Two plugins that claim
one name are an error that names both.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, distribution, entry_points
from typing import TYPE_CHECKING, Any, Self

import pluggy

from circuitlab import hookspecs
from circuitlab.errors import CircuitLabError, PluginError, TaskError
from circuitlab.options import Option, read_options

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from circuitlab.architectures import Architecture
    from circuitlab.graph import CircuitGraph
    from circuitlab.hookspecs import AnalysisFunction, CommandFunction, Exporter
    from circuitlab.model import TracedModel
    from circuitlab.tasks import Task

GROUP = "circuitlab"
#: Analysis that ``circuitlab trace`` runs when none is named.
DEFAULT_ANALYSIS = "edge-attribution"

_SINGULAR = {
    "analyses": "analysis",
    "commands": "command",
    "exporters": "exporter",
    "tasks": "task",
}
#: Words that the command line has itself: no plugin's command can begin with them.
_OURS = frozenset({"trace", "render", "plugins", "models", "tasks", "doctor", "runs"})
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Analysis:
    """A registered analysis: its name, function, plugin, and options read from the signature.

    With ``stream_only`` it also runs where only the blocks of a model are known. ``shards`` are the
    option values with which it can be split into shards; None if it cannot.
    """

    name: str
    function: AnalysisFunction
    plugin: str
    options: tuple[Option, ...]
    stream_only: bool = False
    shards: Mapping[str, Any] | None = None

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
    """A plugin as ``circuitlab plugins`` lists it; ``failure`` is None when it works."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    offers: list[str] = field(default_factory=list)
    failure: str | None = None

    @property
    def warning(self) -> str:
        """One line about the failure, and how to be rid of it."""
        return (
            f"plugin {self.name!r} ({self.distribution} {self.version}) is left out: "
            f"{self.failure}; mend it, uninstall it, or list the plugins you want in "
            f"CIRCUITLAB_PLUGINS"
        )


class Registry:
    """Every installed plugin and what it offers.

    Attributes:
        plugins: All plugins found, broken ones too, by name.
        analyses: By name.
        commands: By their one or two words.
        tasks: By name.
        exporters: By suffix.
    """

    def __init__(self) -> None:
        self.plugins: dict[str, PluginInfo] = {}
        self.analyses: dict[str, Analysis] = {}
        self.commands: dict[str, Command] = {}
        self.tasks: dict[str, Task] = {}
        self.exporters: dict[str, Exporter] = {}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, allowed: Iterable[str] | None = None) -> Self:
        """The registry of what is installed.

        Args:
            allowed: Load only these plugins and the core's own; by default those that
                ``CIRCUITLAB_PLUGINS`` lists, separated by commas, or all when it is not set.

        Raises:
            PluginError: two distributions claim one plugin name, two plugins one offer, or
                ``CIRCUITLAB_STRICT_PLUGINS`` is set and a plugin is broken.
        """
        registry = cls()
        if allowed is None and (listed := os.environ.get("CIRCUITLAB_PLUGINS")) is not None:
            allowed = [name.strip() for name in listed.split(",")]
        wanted = None if allowed is None else {"defaults", *allowed}
        for entry in _entries():
            if wanted is None or entry.name in wanted:
                registry._load(entry)
        if os.environ.get("CIRCUITLAB_STRICT_PLUGINS") == "1":
            for info in registry.failed:
                raise PluginError(info.warning)
        return registry

    @property
    def describers(self) -> tuple[str, ...]:
        """Plugins that describe families."""
        able = (i.name for i in self.plugins.values() if "adapt_architecture" in i.hooks)
        return tuple(sorted(able))

    @property
    def failed(self) -> list[PluginInfo]:
        """Plugins that are broken."""
        return [info for info in self.plugins.values() if info.failure is not None]

    def add(self, plugin: object, info: PluginInfo) -> None:
        """Register one plugin's module and collect its offers; a broken one is only recorded.

        Raises:
            PluginError: it offers a name that another plugin has.
        """
        self.plugins[info.name] = info
        try:
            self._manager.register(plugin, name=info.name)
            info.hooks = self._checked_hooks(plugin)
            offers = self._collect(info)
        except PluginError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  (a plugin may raise anything)
            if self._manager.has_plugin(info.name):
                self._manager.unregister(name=info.name)
            info.failure = describe(error)
            return
        for kind, key, value in offers:
            self._offer(info, kind, key, value)

    def analysis(self, name: str) -> Analysis:
        """The analysis called ``name``.

        Raises:
            PluginError: there is none; says so when its plugin is broken.
        """
        if name in self.analyses:
            return self.analyses[name]
        if (info := self.plugins.get(name)) is not None and info.failure is not None:
            raise PluginError(info.warning)
        raise PluginError(
            f"analysis {name!r} is not installed; there are {', '.join(sorted(self.analyses))}"
        )

    def task(self, name: str) -> Task:
        """The task called ``name``.

        Raises:
            TaskError: there is none.
        """
        if name not in self.tasks:
            near = get_close_matches(name, self.tasks, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TaskError(
                f"task {name!r} does not exist; {hint}tasks are {', '.join(sorted(self.tasks))}"
            )
        return self.tasks[name]

    def adapt(self, config: PretrainedConfig) -> Architecture | None:
        """The architecture of a model family, from the first plugin that knows it.

        Raises:
            PluginError: a plugin's ``adapt_architecture`` raised something of its own.
        """
        for implementation in reversed(self._manager.hook.adapt_architecture.get_hookimpls()):
            name = implementation.plugin_name
            caller = self._only(name, "adapt_architecture")
            try:
                architecture: Architecture | None = caller(config=config)
            except CircuitLabError:
                raise
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"plugin {name!r} failed in adapt_architecture: {describe(error)}"
                ) from error
            if architecture is not None:
                return architecture
        return None

    @property
    def of_streams(self) -> tuple[str, ...]:
        """Analyses and commands that run where only the blocks of a model are known."""
        both: list[Analysis | Command] = [*self.analyses.values(), *self.commands.values()]
        return tuple(sorted(offer.name for offer in both if offer.stream_only))

    def annotate(
        self, names: Iterable[str], circuit: CircuitGraph, model: TracedModel, task: Task | None
    ) -> None:
        """Let the named plugins annotate a circuit.

        Raises:
            PluginError: a plugin cannot annotate, failed, or changed the nodes.
        """
        names = tuple(names)
        self.check_annotators(names)
        for name in names:
            before = set(circuit.nodes)
            try:
                self._only(name, "annotate_circuit")(circuit=circuit, model=model, task=task)
            except CircuitLabError:
                raise
            except (Exception, SystemExit) as error:
                raise PluginError(f"--annotate {name}: {describe(error)}") from error
            if set(circuit.nodes) != before:
                raise PluginError(f"--annotate {name}: it added or removed nodes of the circuit")

    def check_annotators(self, names: Iterable[str]) -> None:
        """Refuse names of plugins that cannot annotate a circuit.

        Raises:
            PluginError: a plugin is not there, is broken, or has no such hook.
        """
        for name in names:
            info = self.plugins.get(name)
            if info is None or info.failure or "annotate_circuit" not in info.hooks:
                able = [i.name for i in self.plugins.values() if "annotate_circuit" in i.hooks]
                fact = info.failure if info and info.failure else "it cannot annotate a circuit"
                raise PluginError(
                    f"--annotate {name}: {fact if info else 'no such plugin'}; "
                    f"plugins that annotate: {', '.join(able) or 'none installed'}"
                )

    def _load(self, entry: EntryPoint) -> None:
        dist = entry.dist
        info = PluginInfo(entry.name, dist.name if dist else "?", dist.version if dist else "?")
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (so may importing one)
            info.failure = describe(error)
            self.plugins[info.name] = info
            return
        self.add(plugin, info)

    def _checked_hooks(self, plugin: object) -> tuple[str, ...]:
        known = set(vars(hookspecs)) & set(vars(self._manager.hook))
        hooks = [caller.name for caller in self._manager.get_hookcallers(plugin) or []]
        unknown = sorted(set(hooks) - known)
        if unknown:
            raise TypeError(
                f"hook {unknown[0]!r} does not exist; hooks are {', '.join(sorted(known))}"
            )
        if not hooks:
            raise TypeError("it implements no hook; mark one with @circuitlab.hookimpl")
        return tuple(sorted(hooks))

    def _collect(self, info: PluginInfo) -> list[tuple[str, str, Any]]:
        """Everything one plugin offers, checked, before any of it is taken on."""
        offers: list[tuple[str, str, Any]] = []

        def analysis(name: str, function: AnalysisFunction, **able: Any) -> None:
            if not _KEBAB.fullmatch(name):
                raise ValueError(f"analysis name {name!r} is not kebab-case")
            options = read_options(function)
            offer = Analysis(name, function, info.name, options, **able)
            offers.append(("analyses", name, offer))

        def command(name: str, function: CommandFunction, stream_only: bool = False) -> None:
            words = name.split(" ")
            if len(words) > 2 or not all(map(_KEBAB.fullmatch, words)):
                raise ValueError(f"command {name!r} is not named by one or two kebab-case words")
            if words[0] in _OURS:
                raise ValueError(f"command {name!r} begins with a word of CircuitLab's own")
            options = read_options(function, ("model",))
            offer = Command(name, function, info.name, options, stream_only)
            offers.append(("commands", name, offer))

        def task(task: Task) -> None:
            offers.append(("tasks", task.name, task))

        def exporter(suffix: str, write: Exporter) -> None:
            if not suffix.startswith("."):
                raise ValueError(f"exporter suffix {suffix!r} does not start with a dot")
            offers.append(("exporters", suffix, write))

        for hook, register in (
            ("register_analyses", analysis),
            ("register_commands", command),
            ("register_tasks", task),
            ("register_exporters", exporter),
        ):
            if hook in info.hooks:
                self._only(info.name, hook)(register=register)
        return offers

    def _offer(self, info: PluginInfo, kind: str, key: str, value: Any) -> None:
        taken: dict[str, Any] = getattr(self, kind)
        # A command's word cannot be a group of others too.
        same = [k for k in taken if f"{k} ".startswith(f"{key} ") or f"{key} ".startswith(f"{k} ")]
        if same:
            offers = f"{kind}:{same[0]}"
            other = next((p for p in self.plugins.values() if offers in p.offers), info)
            names = f"{key!r}" if same[0] == key else f"{same[0]!r} and {key!r}"
            raise PluginError(
                f"two plugins offer the {_SINGULAR[kind]} {names}: {other.name!r} "
                f"({other.distribution} {other.version}) and {info.name!r} "
                f"({info.distribution} {info.version}); uninstall one, or list the plugins you "
                f"want in CIRCUITLAB_PLUGINS"
            )
        taken[key] = value
        info.offers.append(f"{kind}:{key}")

    def _only(self, name: str | None, hook: str) -> Callable[..., Any]:
        """A caller of ``hook`` that reaches one plugin alone."""
        others = [p for n, p in self._manager.list_name_plugin() if n != name and p is not None]
        return self._manager.subset_hook_caller(hook, others)


def describe(error: BaseException) -> str:
    """A stranger's exception in one line: its class and the first line of its text."""
    lines = str(error).strip().splitlines()
    if isinstance(error, pluggy.PluginValidationError):  # says what is wrong in its last line
        lines = [f"{lines[0]}: {lines[-1]}"]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _entries() -> list[EntryPoint]:
    """Entry points by name, the core's first; two distributions with one name are refused."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name != "defaults", e.name)):
        other = found.get(entry.name)
        if other is not None and _owner(other) != _owner(entry):
            raise PluginError(
                f"two distributions offer a plugin {entry.name!r}: {_owner(other)} and "
                f"{_owner(entry)}; uninstall one"
            )
        found[entry.name] = entry
    if "defaults" not in found:
        raise PluginError(
            "the built-in plugins are not installed: run `pip install -e .` in the checkout; "
            f"importing from source alone does not register them ({_version_or_missing()})"
        )
    return list(found.values())


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _version_or_missing() -> str:
    try:
        return f"circuitlab {distribution('circuitlab').version} is registered without entry points"
    except ModuleNotFoundError:
        return "no circuitlab distribution is registered"
