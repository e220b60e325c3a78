"""The six hooks: what a plugin offers through each is used, and nothing it did not offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_model_families.families import gpt_neox
from hooked_passes import random_neox
from torch import Tensor

from circuitlab import (
    Architecture,
    CircuitGraph,
    Edge,
    ModelError,
    OptionError,
    PluginError,
    PromptPair,
    Site,
    Task,
    TracedModel,
    build_circuit,
    edge_effects,
    hookimpl,
    load_model,
    write_circuit,
)
from circuitlab.builder import run_command
from circuitlab.registry import PluginInfo, Registry
from circuitlab.testing import tiny_model, toy_task

TASK = Task("own", (PromptPair((1,), (2,), (3,), (4,)),))
WEAK: dict[str, Any] = {"allow_weak": True}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("CIRCUITLAB_PLUGINS", "CIRCUITLAB_STRICT_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def installed_and(plugin: object) -> Registry:
    """What is installed, and this plugin under the name ``own``."""
    registry = Registry.load()
    registry.add(plugin, PluginInfo("own", "circuitlab-own", "0.1"))
    assert registry.failed == []
    return registry


def one_head(model: TracedModel, task: Task, *, size: int = 1) -> CircuitGraph:
    """One head that matters."""
    circuit = CircuitGraph(size=size)
    circuit.add_component("a0.h0", kind="head", layer=0)
    circuit.add_component("logits", kind="logits", layer=2)
    circuit.add_effect("a0.h0", "logits", -float(size))
    return circuit


def test_hook_register_analyses() -> None:
    """An offered analysis is found by name, with its options, summary and plugin, and runs."""

    class Plugin:
        @hookimpl
        def register_analyses(self, register: Callable[..., None]) -> None:
            register("one-head", one_head, pair_scores=sizes_of_pairs)

    def sizes_of_pairs(model: TracedModel, pairs: Any, **options: Any) -> Tensor:
        return torch.zeros(1)

    registry = installed_and(Plugin())
    analysis = registry.analysis("one-head")
    assert analysis.pair_scores is sizes_of_pairs
    assert (analysis.plugin, analysis.summary) == ("own", "One head that matters.")
    assert [option.name for option in analysis.options] == ["size"]
    circuit = build_circuit(tiny_model(), toy_task(), "one-head", size=3, registry=registry, **WEAK)
    assert next(circuit.effects()) == ("a0.h0", "logits", "", -3.0)
    assert circuit.graph["plugin"] == "own"


def test_hook_register_tasks() -> None:
    """An offered task can be named where a task is asked for."""

    class Plugin:
        @hookimpl
        def register_tasks(self, register: Callable[..., None]) -> None:
            register(TASK)

    circuit = build_circuit(tiny_model(), "own", registry=installed_and(Plugin()), verify=0)
    assert circuit.graph["task"] == "own"


def test_hook_register_exporters(tmp_path: Path) -> None:
    """An offered format writes files of its suffix."""

    class Plugin:
        @hookimpl
        def register_exporters(self, register: Callable[..., None]) -> None:
            register(".own", lambda circuit, path: path.write_text(str(circuit)) and None)

    path, circuit = tmp_path / "circuit.own", one_head(tiny_model(), TASK)
    write_circuit(circuit, path, installed_and(Plugin()).exporters)
    assert path.read_text() == str(circuit)


def test_hook_annotate_circuit() -> None:
    """Only a plugin that is named annotates; it may take a subset of the arguments."""

    class Plugin:
        @hookimpl
        def annotate_circuit(self, circuit: CircuitGraph, task: Task) -> None:
            for _, data in circuit.nodes(data=True):
                data["task"] = task.name

    registry = installed_and(Plugin())
    plain = build_circuit(tiny_model(), toy_task(), registry=registry, verify=0, **WEAK)
    assert all("task" not in data for _, data in plain.nodes(data=True))
    circuit = build_circuit(
        tiny_model(), toy_task(), annotate=["own"], registry=registry, verify=0, **WEAK
    )
    assert all(data["task"] == "toy" for _, data in circuit.nodes(data=True))


class NeoX:
    """A plugin that knows a family: parallel blocks, heads interleaved in one projection."""

    @hookimpl
    def adapt_architecture(self, config: Any) -> Architecture | None:
        return gpt_neox(config) if config.model_type == "gpt_neox" else None


def test_hook_adapt_architecture() -> None:
    """A family that a plugin describes passes the self-check; its gradients and effects are right.

    Gradients at all receivers sum to the stream's; the effect of an edge into logits is what comes
    of subtracting the source's output from the last stream.
    """
    module: Any = random_neox(dtype=torch.float32)
    registry = Registry.load(allowed=[])
    assert load_model((module, None), registry=registry).architecture.blocks_only
    registry.add(NeoX(), PluginInfo("own", "circuitlab-own", "0.1"))
    model = load_model((module, None), registry=registry)
    assert (model.architecture.family, model.wiring.parallel) == ("GPT-NeoX", True)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, 1] - logits[:, 2]

    start = Site("resid_pre", 0)
    run = model.run(
        [(1, 2, 3, 4), (5, 6)],
        read=model.source_sites,
        gradient_of=metric,
        gradient_at=[start, *model.receiver_sites],
    )
    total = torch.cat([gradient for _, gradient in model.receiver_gradients(run)]).sum(0)
    expected = run.gradient(start)
    assert float((total - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    pairs = model.encode(Task("own", (PromptPair((1, 2, 3), (4, 5, 6), (1,), (2,)),)))
    effect = edge_effects(model, pairs, [Edge("a1.h1", "logits")], ablation="zero")
    last = Site("resid_post", 1)
    clean = model.run(pairs.clean, read=[*model.source_sites, last])
    output = model.source_outputs(clean)[model.wiring.sources.index("a1.h1")]
    patched = model.run(pairs.clean, write={last: clean[last] - output})
    change = metric(patched.logits[:, -1]) - metric(clean.logits[:, -1])
    assert float((effect - change).abs()) < 1e-5
    assert float(effect.abs()) > 1e-3


def sizes(model: TracedModel, *, of: str = "layers", scale: int = 1) -> dict[str, Any]:
    """How many there are."""
    return {of: scale * getattr(model, f"n_{of}")}


class Commands:
    """Offers one command."""

    def __init__(self, name: str = "model sizes", function: Callable[..., Any] = sizes) -> None:
        self.offer = name, function

    @hookimpl
    def register_commands(self, register: Callable[..., None]) -> None:
        register(*self.offer)


def test_hook_register_commands() -> None:
    """An offered command is found by its two words, and runs with its options."""
    command = installed_and(Commands()).commands["model sizes"]
    assert [option.name for option in command.options] == ["of", "scale"]
    assert run_command(command, tiny_model(), {"of": "heads", "scale": 3}) == {"heads": 6}
    with pytest.raises(OptionError, match="has no option 'off'; its options are of, scale"):
        run_command(command, tiny_model(), {"off": "heads"})


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model sizes now",
        "Model sizes",
        "models sizes",
        "render",
        "evaluate x",
        "report",
        "compare",
    ],
)
def test_a_command_that_cannot_be_called_is_refused(name: str) -> None:
    """A command has one or two kebab-case words, the first of them none of CircuitLab's own."""
    registry = Registry.load()
    registry.add(Commands(name), PluginInfo("own", "circuitlab-own", "0.1"))
    assert f"command {name!r}" in str(registry.plugins["own"].failure)


@pytest.mark.parametrize("found", [{"a": float("nan")}, {"a": object()}, 3])
def test_what_a_command_gives_is_plain(found: Any) -> None:
    """Anything but finite JSON by label is the plugin's fault, and so is an exception."""

    def odd(model: TracedModel) -> Any:
        """Give something odd."""
        return found

    def broken(model: TracedModel) -> Any:
        """Fail."""
        raise KeyError("x")

    for function, words in ((odd, "give plain JSON"), (broken, "failed: KeyError")):
        command = installed_and(Commands(function=function)).commands["model sizes"]
        with pytest.raises(PluginError, match=f"command 'model sizes' of plugin 'own'.*{words}"):
            run_command(command, tiny_model(), {})


def test_stream_only() -> None:
    """Where no plugin describes a family, what says it needs no more than the stream runs on it."""

    class Plugin:
        @hookimpl
        def register_analyses(self, register: Any) -> None:
            register("own-streams", one_stream, stream_only=True)
            register("own-heads", one_head)

        @hookimpl
        def register_commands(self, register: Any) -> None:
            register("own sizes", lambda model: {"layers": model.n_layers}, stream_only=True)
            register("own heads", lambda model: {"heads": model.n_heads})

    def one_stream(model: TracedModel, task: Task) -> CircuitGraph:
        """The stream."""
        circuit = CircuitGraph()
        circuit.add_component("resid_pre.0", kind="residual", layer=0)
        circuit.add_component("logits", kind="logits", layer=model.n_layers)
        circuit.add_effect("resid_pre.0", "logits", 1.0)
        return circuit

    registry = Registry.load(allowed=[])
    registry.add(Plugin(), PluginInfo("own", "circuitlab-own", "0.1"))
    model = load_model(random_neox(dtype=torch.float32), registry=registry)
    options: dict[str, Any] = {"registry": registry, "allow_weak": True}
    circuit = build_circuit(model, TASK, "own-streams", **options)
    assert circuit.graph["n_heads"] == 0
    works = r"no plugin describes family 'gpt_neox' \(asked: defaults\).*: own sizes, own-streams;"
    with pytest.raises(ModelError, match=f"own-heads needs the heads.*{works}"):
        build_circuit(model, TASK, "own-heads", **options)
    sizes, heads = (registry.commands[name] for name in ("own sizes", "own heads"))
    assert run_command(sizes, model, {}, registry=registry) == {"layers": 2}
    with pytest.raises(ModelError, match=f"own heads needs the heads.*{works}"):
        run_command(heads, model, {}, registry=registry)


def test_core_families_come_last() -> None:
    """A plugin may describe a family that the core knows too, and then its word counts."""

    class Renamed:
        @hookimpl
        def adapt_architecture(self, config: Any) -> Any:
            return replace(known, family="mine") if config.model_type == "gpt2" else None

    model = tiny_model()
    known = model.architecture
    found = installed_and(Renamed()).adapt(model._module.config)
    assert (known.family, found and found.family) == ("GPT-2", "mine")
