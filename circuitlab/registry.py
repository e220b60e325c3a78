"""The registry: finds plugins, loads them one by one, and collects what they offer.

One broken plugin never harms another: it becomes a warning and a FAILED row. Two plugins that claim
one name are an error that names both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from threading import Timer
from typing import TYPE_CHECKING, Any, Self

import pluggy

from circuitlab import hookspecs
from circuitlab.architectures import Architecture
from circuitlab.entries import GROUP, installed_plugins, left_out
from circuitlab.errors import CircuitLabError, PluginError, TaskError
from circuitlab.hookspecs import API_VERSION
from circuitlab.offers import Analysis, Collector, Command, PluginInfo, describe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from circuitlab.graph import CircuitGraph
    from circuitlab.hookspecs import Exporter
    from circuitlab.model import TracedModel
    from circuitlab.tasks import Task

__all__ = ["DEFAULT_ANALYSIS", "Analysis", "Command", "PluginInfo", "Registry", "describe"]

#: Analysis that ``circuitlab trace`` runs when none is named.
DEFAULT_ANALYSIS = "edge-attribution"
#: Seconds after which it is said that a plugin is still being loaded.
SLOW = 5.0

_SINGULAR = {
    "analyses": "analysis",
    "commands": "command",
    "exporters": "exporter",
    "tasks": "task",
}


class Registry:
    """Every installed plugin and what it offers.

    Attributes:
        plugins: All plugins that were loaded, broken ones too, by name.
        off: Those that were not wanted, by name; nothing of them was imported.
        analyses: By name.
        commands: By their one or two words.
        tasks: By name.
        exporters: By suffix.
    """

    def __init__(self) -> None:
        self.plugins: dict[str, PluginInfo] = {}
        self.off: dict[str, PluginInfo] = {}
        self.analyses: dict[str, Analysis] = {}
        self.commands: dict[str, Command] = {}
        self.tasks: dict[str, Task] = {}
        self.exporters: dict[str, Exporter] = {}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(
        cls, allowed: Iterable[str] | None = None, *, warn: Callable[[str], None] | None = None
    ) -> Self:
        """The registry of what is installed.

        Args:
            allowed: Load only these plugins and the core's own; by default those that
                ``CIRCUITLAB_PLUGINS`` lists, separated by commas, or all when it is not set;
                without those that are disabled, and with ``CIRCUITLAB_NO_PLUGINS`` without those
                that do not come with CircuitLab.
            warn: Told of a plugin that takes longer than :data:`SLOW` to load.

        Raises:
            PluginError: two distributions claim one plugin name, two plugins one offer, or
                ``CIRCUITLAB_STRICT_PLUGINS`` is set and a plugin is broken.
        """
        registry = cls()
        entries = installed_plugins()
        off = left_out(entries.values(), allowed)
        for name, entry in entries.items():
            dist = entry.dist
            info = PluginInfo(name, dist.name if dist else "?", dist.version if dist else "?")
            if name in off:
                info.off = off[name]
                registry.off[name] = info
                continue
            with _watched(info, warn):
                registry._load(entry, info)
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
            _check_api(plugin)
            self._manager.register(plugin, name=info.name)
            info.hooks = self._checked_hooks(plugin)
            offers = self._collect(info)
        except (PluginError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  (a plugin may raise anything)
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
        off = [f"; plugin {i.name!r} is not loaded: {i.off}" for i in self.off.values()]
        raise PluginError(
            f"analysis {name!r} is not installed; there are {', '.join(sorted(self.analyses))}"
            f"{''.join(off)}"
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
            PluginError: a plugin's ``adapt_architecture`` raised something of its own, or gave
                something else.
        """
        for implementation in reversed(self._manager.hook.adapt_architecture.get_hookimpls()):
            name = implementation.plugin_name
            caller = self._only(name, "adapt_architecture")
            try:
                architecture = caller(config=config)
            except CircuitLabError:
                raise
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"plugin {name!r} failed in adapt_architecture: {describe(error)}"
                ) from error
            if isinstance(architecture, Architecture):
                return architecture
            if architecture is not None:
                raise PluginError(
                    f"plugin {name!r} gave a {type(architecture).__name__} in adapt_architecture; "
                    f"give a circuitlab.Architecture, or None for a family that is not its own"
                )
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

    def _load(self, entry: EntryPoint, info: PluginInfo) -> None:
        try:
            plugin = entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  (so may importing one)
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
        collector = Collector(info.name)
        for hook, register in (
            ("register_analyses", collector.analysis),
            ("register_commands", collector.command),
            ("register_tasks", collector.task),
            ("register_exporters", collector.exporter),
        ):
            if hook in info.hooks:
                self._only(info.name, hook)(register=register)
        return collector.offers

    def _offer(self, info: PluginInfo, kind: str, key: str, value: Any) -> None:
        taken: dict[str, Any] = getattr(self, kind)
        # A command's word cannot be a group of others too.
        same = [k for k in taken if f"{k} ".startswith(f"{key} ") or f"{key} ".startswith(f"{k} ")]
        if same:
            offers = f"{kind}:{same[0]}"
            other = next((p for p in self.plugins.values() if offers in p.offers), info)
            names = f"{key!r}" if same[0] == key else f"{same[0]!r} and {key!r}"
            raise PluginError(
                f"two plugins offer the {_SINGULAR[kind]} {names}: {other.origin} and "
                f"{info.origin}; uninstall one, or `circuitlab plugins disable {info.name}`"
            )
        taken[key] = value
        info.offers.append(f"{kind}:{key}")

    def _only(self, name: str | None, hook: str) -> Callable[..., Any]:
        """A caller of ``hook`` that reaches one plugin alone."""
        others = [p for n, p in self._manager.list_name_plugin() if n != name and p is not None]
        return self._manager.subset_hook_caller(hook, others)


def _check_api(plugin: object) -> None:
    """Refuse a plugin that states another version of the hooks than this one.

    Raises:
        TypeError: names both versions.
    """
    stated = getattr(plugin, "circuitlab_api", API_VERSION)
    if stated != API_VERSION:
        raise TypeError(
            f"it is written for version {stated!r} of the plugin API, and this CircuitLab has "
            f"{API_VERSION}; install a version of the plugin for this one"
        )


@contextmanager
def _watched(info: PluginInfo, warn: Callable[[str], None] | None) -> Iterator[None]:
    """Say so when loading one plugin takes long: it may never end."""
    if warn is None:
        yield
        return
    text = (
        f"plugin {info.origin} is still being loaded after {SLOW:g} s; if it hangs, stop and "
        f"`circuitlab plugins disable {info.name}`"
    )
    timer = Timer(SLOW, warn, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
