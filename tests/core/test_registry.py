"""The registry: plugins load one by one, a broken one harms no other, and names are unique."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from circuitlab import (
    Architecture,
    CircuitGraph,
    PluginError,
    Projection,
    PromptPair,
    Task,
    TaskError,
    TracedModel,
    hookimpl,
)
from circuitlab.registry import PluginInfo, Registry
from circuitlab.testing import tiny_model

TASK = Task("own", (PromptPair((1,), (2,), (3,), (4,)),))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("CIRCUITLAB_PLUGINS", "CIRCUITLAB_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def sound(model: TracedModel, task: Task, *, size: int = 1) -> CircuitGraph:
    """One head that matters."""
    circuit = CircuitGraph(size=size)
    circuit.add_component("a0.h0", kind="head", layer=0)
    circuit.add_component("logits", kind="logits", layer=2)
    circuit.add_effect("a0.h0", "logits", -float(size))
    return circuit


def write_text(circuit: CircuitGraph, path: Path) -> None:
    path.write_text(str(circuit))


class Analyses:
    """A plugin of one analysis, ``head-norms`` unless it is called otherwise."""

    def __init__(self, name: str = "head-norms", function: Any = sound) -> None:
        self.name, self.function = name, function

    @hookimpl
    def register_analyses(self, register: Callable[..., None]) -> None:
        register(self.name, self.function)


class Tasks:
    @hookimpl
    def register_tasks(self, register: Callable[..., None]) -> None:
        register(TASK)


@dataclass(eq=False)
class Exporters:
    suffix: str = ".own"

    @hookimpl
    def register_exporters(self, register: Callable[..., None]) -> None:
        register(self.suffix, write_text)


class Annotator:
    @hookimpl
    def annotate_circuit(self, circuit: CircuitGraph, task: Task) -> None:
        for _, data in circuit.nodes(data=True):
            data["task"] = task.name


class Family:
    @hookimpl
    def adapt_architecture(self, config: Any) -> Any:
        return MINE if config is CONFIG else None


CONFIG: Any = object()
#: Paths are not looked at before a model is loaded.
MINE = Architecture(
    *("mine", 1, 1, 4, 4, 8, "embed", "blocks", "norm", "norm", "attention"),
    *(Projection("q", 0, 4), Projection("k", 0, 4), Projection("v", 0, 4)),
    *("output", "norm", "mlp"),
)


def info(name: str, distribution: str = "circuitlab-own") -> PluginInfo:
    return PluginInfo(name, distribution, "0.1")


def with_plugins(*plugins: object) -> Registry:
    registry = Registry()
    for number, plugin in enumerate(plugins):
        registry.add(plugin, info(f"plugin-{number}"))
    return registry


# --- isolation ------------------------------------------------------------------------------------


class WrongHook:
    @hookimpl
    def register_analysis(self, register: Callable[..., None]) -> None: ...


class WrongArgument:
    @hookimpl
    def register_analyses(self, registrar: Callable[..., None]) -> None: ...


class Raises:
    @hookimpl
    def register_analyses(self, register: Callable[..., None]) -> None:
        register("half", sound)
        raise RuntimeError("no GPU\nat all")


def untyped(model: Any, task: Any, *, size: list[int] = []) -> CircuitGraph:  # noqa: B006
    return sound(model, task)


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (WrongHook(), "hook 'register_analysis' does not exist; hooks are adapt_architecture"),
        (WrongArgument(), "registrar"),
        (Raises(), "RuntimeError: no GPU"),
        (object(), "it implements no hook; mark one with @circuitlab.hookimpl"),
        (Analyses("Head_Norms"), "analysis name 'Head_Norms' is not kebab-case"),
        (Analyses("untyped", untyped), "options are int, float, str, bool, Path"),
        (Exporters("own"), "exporter suffix 'own' does not start with a dot"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_broken_plugin_harms_no_other(plugin: object, reason: str) -> None:
    """It becomes a FAILED row with its reason on one line; nothing it offered half is kept."""
    registry = with_plugins(Analyses("before"), plugin, Analyses("after"), Family())
    assert set(registry.analyses) == {"before", "after"}
    assert not registry.exporters
    (failed,) = registry.failed
    assert failed.name == "plugin-1"
    assert reason in str(failed.failure)
    assert "\n" not in failed.warning
    assert "plugin 'plugin-1' (circuitlab-own 0.1) is left out" in failed.warning
    assert registry.adapt(CONFIG) is MINE


def test_hook_that_raises_later() -> None:
    """A plugin that fails when it is asked for an architecture is named; others are not blamed."""

    class Fails:
        @hookimpl
        def adapt_architecture(self, config: Any) -> None:
            raise KeyError("hidden_size")

    registry = with_plugins(Family(), Fails())
    with pytest.raises(PluginError, match="'plugin-1' failed in adapt_architecture: KeyError"):
        registry.adapt(CONFIG)

    class Refuses:
        @hookimpl
        def adapt_architecture(self, config: Any) -> None:
            raise TaskError("mine")

    with pytest.raises(TaskError, match=r"^mine$"):
        with_plugins(Refuses()).adapt(CONFIG)


@pytest.mark.parametrize(
    ("plugin", "what"),
    [
        (Analyses, "analyse 'head-norms'|analysis 'head-norms'"),
        (Tasks, "task 'own'"),
        (Exporters, "exporter '.own'"),
    ],
)
def test_duplicate_offer_names_both(plugin: type, what: str) -> None:
    """Two plugins that offer one name are both named, with their distributions."""
    registry = with_plugins(plugin())
    with pytest.raises(PluginError, match=f"two plugins offer the ({what}): 'plugin-0'") as caught:
        registry.add(plugin(), PluginInfo("rival", "circuitlab-rival", "7.0"))
    assert "'rival' (circuitlab-rival 7.0)" in str(caught.value)


def test_unknown_analysis() -> None:
    """A name that is not there is answered with those there are; a broken plugin's with why."""
    registry = with_plugins(Analyses("one"), Analyses("two"))
    with pytest.raises(PluginError, match="'three' is not installed; there are one, two"):
        registry.analysis("three")
    registry.add(Raises(), info("three"))
    with pytest.raises(PluginError, match="left out: RuntimeError: no GPU"):
        registry.analysis("three")


class Meddler:
    @hookimpl
    def annotate_circuit(self, circuit: CircuitGraph) -> None:
        circuit.add_component("m9", kind="mlp", layer=9)


class Crasher:
    @hookimpl
    def annotate_circuit(self, circuit: CircuitGraph) -> None:
        raise ZeroDivisionError("by 0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such plugin; plugins that annotate: plugin-0, plugin-1"),
        ("plugin-0", "it added or removed nodes"),
        ("plugin-1", "ZeroDivisionError: by 0"),
        ("plugin-2", "it cannot annotate a circuit"),
    ],
)
def test_annotation_that_fails(name: str, message: str) -> None:
    """The plugin is named, and what it did."""
    registry = with_plugins(Meddler(), Crasher(), Analyses())
    with pytest.raises(PluginError, match=f"--annotate {name}: {message}"):
        registry.annotate([name], sound(tiny_model(), TASK), tiny_model(), TASK)


# --- what is installed ----------------------------------------------------------------------------

SOURCE = """
    import circuitlab

    @circuitlab.hookimpl
    def register_analyses(register):
        register("{name}", analysis)

    def analysis(model, task):
        "Does nothing."
"""

Install = Callable[..., None]


def test_installed_plugins_are_found(install: Install) -> None:
    """The built-in ones and a stranger's, each with distribution, version and offers."""
    install("circuitlab-one", "one", SOURCE.format(name="first"))
    registry = Registry.load()
    assert registry.failed == []
    assert next(iter(registry.plugins)) == "defaults"
    assert {"edge-attribution", "one"} <= set(registry.plugins)
    one = registry.plugins["one"]
    assert (one.distribution, one.version, one.offers) == (
        "circuitlab-one",
        "0.1",
        ["analyses:first"],
    )


def test_import_that_fails(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that cannot be imported is a row, unless strictness is asked for."""
    install("circuitlab-bad", "bad", "import no_such_module")
    registry = Registry.load()
    assert "edge-attribution" in registry.analyses
    assert "No module named 'no_such_module'" in str(registry.plugins["bad"].failure)
    monkeypatch.setenv("CIRCUITLAB_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match=r"plugin 'bad' .* is left out"):
        Registry.load()


def test_list_of_plugins(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIRCUITLAB_PLUGINS loads those it lists and the core's own, and imports no other."""
    install("circuitlab-bad", "bad", "raise RuntimeError")
    install("circuitlab-one", "one", SOURCE.format(name="first"))
    monkeypatch.setenv("CIRCUITLAB_PLUGINS", " one")
    registry = Registry.load()
    assert set(registry.plugins) == {"defaults", "one"}
    assert registry.tasks
    monkeypatch.setenv("CIRCUITLAB_PLUGINS", "")
    assert set(Registry.load().plugins) == {"defaults"}
    assert set(Registry.load(["one"]).plugins) == {"defaults", "one"}


def test_two_distributions_with_one_plugin(install: Install) -> None:
    """Neither replaces the other in silence: both are named."""
    install("circuitlab-one", "one", SOURCE.format(name="first"))
    install("circuitlab-two", "one", SOURCE.format(name="second"), "2.0")
    with pytest.raises(PluginError, match=r"a plugin 'one': circuitlab-(one 0\.1|two 2\.0) and "):
        Registry.load()
