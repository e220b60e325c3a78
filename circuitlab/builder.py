"""build_circuit: from a model, a task and an analysis to a circuit with its provenance."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import baseline, progress
from circuitlab.checkpoint import StateFile, opened
from circuitlab.errors import (
    CircuitLabError,
    GraphError,
    ModelError,
    PluginError,
    TaskError,
)
from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.loading import Source, load_model
from circuitlab.memory import fitting, foresee
from circuitlab.options import check_values
from circuitlab.provenance import provenance, run_settings
from circuitlab.registry import DEFAULT_ANALYSIS, Analysis, Command, Registry, describe
from circuitlab.shards import check_shards

if TYPE_CHECKING:
    from circuitlab.baseline import Baseline
    from circuitlab.model import TracedModel
    from circuitlab.prompts import EncodedTask
    from circuitlab.tasks import Align, Task


def build_circuit(
    model: Source,
    task: Task | str | None = None,
    analysis: str = DEFAULT_ANALYSIS,
    *,
    metric: str | None = None,
    n_pairs: int | None = None,
    align: Align | None = None,
    allow_weak: bool = False,
    annotate: Sequence[str] = (),
    seed: int = 0,
    resume: Path | str | StateFile | None = None,
    registry: Registry | None = None,
    **options: Any,
) -> CircuitGraph:
    """Run an analysis and return its circuit, validated and with its provenance.

    Args:
        model: Anything :func:`circuitlab.load_model` takes.
        task: A task, the name of one, or None for the task a bundled model was made for; an
            analysis that needs none runs without where there is none.
        analysis: Name of an installed analysis.
        metric: Another metric than the task's own.
        n_pairs: Use only the first pairs of the task.
        align: What to do with pairs whose prompts differ in length.
        allow_weak: Go on when the effect to explain is within its own noise.
        annotate: Plugins that may annotate the finished circuit.
        seed: For whatever the analysis draws at random.
        resume: File in which the analysis keeps what it has so far; where an interrupted run left
            one, this run goes on from it. It is removed at the end. A shard's state, which the
            command line opens, ends the run by ``ShardDone`` when the shard's parts are done.
        registry: Plugins to use; by default all installed ones.
        **options: Options of the analysis.

    Raises:
        TaskError: ``resume`` is no state of a run, or that of a run with other settings.
        OptionError: another process uses ``resume``.
        CircuitLabError: the subclass says what was wrong, the message who, what and what to do.
    """
    started = time.time()
    registry = registry or Registry.load()
    chosen = registry.analysis(analysis)
    registry.check_annotators(annotate)
    check_values(chosen.options, options, f"analysis {analysis!r}")
    with opened(resume) as state:
        if state.shard is not None:
            check_shards(chosen, options, registry.analyses.values())
        traced = _check_parts(chosen, load_model(model, registry=registry), registry)
        named = _task_of(chosen, traced, task, registry, metric, n_pairs, align)
        measured, used, warnings = None, list[str](), list[str]()
        if named is not None:
            pairs = traced.encode(named)
            _foresee(chosen, traced, pairs, options)
            measured, warnings = _measured(traced, pairs, allow_weak=allow_weak, seed=seed)
            used = [named.pairs[number - 1].digest for number in pairs.numbers]
        origin = provenance(traced, named, chosen, options, seed=seed, pairs=used)
        settings = run_settings(origin, traced, named, registry) if state.path else {}
        progress.tell(filter(None, [state.settle(settings)]))
        circuit = _run(chosen, traced, named, options, seed, state, settings)
        told = circuit.graph.get("warnings", ())
        circuit.graph["warnings"] = [*told, *_stateless(chosen, state, traced)]
        progress.tell(circuit.graph["warnings"])
        if annotate:
            registry.annotate(annotate, circuit, traced, named)
            _validate(circuit, f"--annotate {', '.join(annotate)}")
    _note_origin(circuit, origin, measured, seed)
    circuit.graph["warnings"] = [*warnings, *circuit.graph["warnings"]]
    circuit.graph["seconds"] = round(time.time() - started + state.seconds, 3)
    return circuit


def _note_origin(
    circuit: CircuitGraph, origin: dict[str, Any], measured: Baseline | None, seed: int
) -> None:
    """Write down where a circuit comes from, and what its effect is worth."""
    for key, value in origin.items():
        circuit.graph.setdefault(key, value)
    if measured is not None:
        circuit.graph["baseline"] = measured.to_json(seed)
        if measured.weak(seed):
            _mark_weak(circuit)


def _task_of(
    analysis: Analysis,
    model: TracedModel,
    task: Task | str | None,
    registry: Registry,
    metric: str | None,
    n_pairs: int | None,
    align: Align | None,
) -> Task | None:
    """The task as it is asked for; None where there is none, and none is needed.

    Raises:
        TaskError: there is none, and one is needed, or something is asked of it.
    """
    if not analysis.needs_task and task is None and model.task_name is None:
        _check_unused(metric=metric, n_pairs=n_pairs, align=align)
        return None
    named = find_task(model, task, registry)
    named = replace(named, metric=metric or named.metric, align=align or named.align)
    return named if n_pairs is None else named.take(n_pairs)


def _foresee(
    analysis: Analysis, model: TracedModel, pairs: EncodedTask, options: dict[str, Any]
) -> None:
    """Say what the batches of an analysis take that scores edges pair by pair.

    Raises:
        ResourceError: not even one pair can fit.
    """
    if analysis.pair_scores is not None:
        size = options.get("batch_size")
        progress.inform(foresee(model, pairs, size if isinstance(size, int) else None))


def _measured(
    model: TracedModel, pairs: EncodedTask, *, allow_weak: bool, seed: int
) -> tuple[Baseline, list[str]]:
    """What the model does on the task, and warnings about it.

    Raises:
        TaskError: the task cannot be used.
    """
    measured = fitting(lambda: baseline.measure(model, pairs))
    doubts = baseline.check(measured, pairs, allow_weak=allow_weak, seed=seed)
    warnings = [*pairs.warnings, *doubts]
    progress.tell(warnings)
    return measured, warnings


def _check_unused(**settings: object) -> None:
    """Refuse settings of a task where there is none."""
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise TaskError(
            f"{' and '.join(given)} belong to a task, and there is none; name one with --task"
        )


def find_task(model: TracedModel, task: Task | str | None, registry: Registry) -> Task:
    """The task that is meant.

    Raises:
        TaskError: no task of that name, or none given for a model that has none of its own.
    """
    if task is not None and not isinstance(task, str):
        return task
    name = task or model.task_name
    if name is None:
        raise TaskError(
            f"model {model.name!r} has no task of its own; name one (--task, "
            f"{', '.join(registry.tasks)}), or give prompts (--task-file FILE, or --clean "
            f"--corrupt --answer --wrong)"
        )
    return registry.task(name)


def _run(
    analysis: Analysis,
    model: TracedModel,
    task: Task | None,
    options: dict[str, Any],
    seed: int,
    state: StateFile,
    settings: dict[str, Any],
) -> CircuitGraph:
    """The analysis's circuit; what a plugin does wrong becomes a PluginError that names it."""
    owner = f"analysis {analysis.name!r} of plugin {analysis.plugin!r}"

    def once() -> CircuitGraph:
        with state.used(settings, model.device), _by_plugin(owner, model, seed):
            return analysis.function(model, task, **options)

    circuit = fitting(once)
    _check_split(analysis, state)
    if not isinstance(circuit, CircuitGraph):
        raise PluginError(f"{owner} returned {type(circuit).__name__}, not a CircuitGraph")
    _validate(circuit, owner)
    return circuit


def _check_parts(offer: Analysis | Command, model: TracedModel, registry: Registry) -> TracedModel:
    """The model, if as much is known of it as this needs.

    Raises:
        ModelError: only its blocks are known; names what works on them.
    """
    if model.architecture.blocks_only and not offer.stream_only:
        raise ModelError(
            f"{offer.name} needs the heads, MLPs and norms of model {model.name!r}, and no plugin "
            f"describes family {model.architecture.family!r} (asked: "
            f"{', '.join(registry.describers)}); what works on the stream between its blocks: "
            f"{', '.join(registry.of_streams) or 'nothing installed'}; a plugin can describe the "
            f"family by adapt_architecture"
        )
    return model


def run_command(
    command: Command,
    model: TracedModel,
    options: dict[str, Any],
    *,
    seed: int = 0,
    registry: Registry | None = None,
) -> dict[str, Any]:
    """What a plugin's command found, by label.

    Raises:
        OptionError: it has no such option, or the option no such value.
        ModelError: it needs more than the blocks of the model, and only they are known.
        PluginError: it failed, or gave something else than plain JSON by label.
    """
    owner = f"command {command.name!r} of plugin {command.plugin!r}"
    check_values(command.options, options, owner)
    _check_parts(command, model, registry or Registry.load())
    with _by_plugin(owner, model, seed):
        found = command.function(model, **options)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(found), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"{owner} gave {type(found).__name__} ({error}); give plain JSON and finite, by label"
        ) from error
    return plain


@contextmanager
def _by_plugin(owner: str, model: TracedModel, seed: int) -> Iterator[None]:
    """What a plugin does inside is seeded, and what it does wrong becomes an error that names it.

    The caller's own random numbers go on as if nothing had been drawn here.
    """
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    except GraphError as error:
        # The graph is the plugin's own work, whoever noticed.
        raise PluginError(f"{owner} made a bad circuit: {error}") from error
    except CircuitLabError:
        raise
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        # On a CPU torch has no class for it.
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise PluginError(f"{owner} failed: {describe(error)}") from error


def _validate(circuit: CircuitGraph, owner: str) -> None:
    try:
        circuit.validate()
        _check_values(circuit)
    except GraphError as error:
        raise PluginError(f"{owner} made a bad circuit: {error}") from error


def _check_values(circuit: CircuitGraph) -> None:
    """Refuse data that no circuit file can hold.

    Raises:
        GraphError: names the component or effect, and what it holds.
    """
    owners: list[tuple[str, dict[str, Any]]] = [("the circuit", circuit.graph)]
    owners += [(f"component {name!r}", data) for name, data in circuit.nodes(data=True)]
    owners += [
        (f"effect {effect_name(source, target, port)}", data)
        for source, target, port, data in circuit.edges(keys=True, data=True)
    ]
    for owner, data in owners:
        try:
            json.dumps(data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GraphError(
                f"{owner} has data {data!r} ({error}); data must be plain JSON and finite: leave "
                f"out what was not measured"
            ) from None


def _mark_weak(circuit: CircuitGraph) -> None:
    """An effect within its own noise establishes nothing, and has no shares."""
    if isinstance(whole := circuit.graph.get("completeness"), dict):
        whole["share"] = None
    reason = "the effect to explain is within its own noise"
    earlier = circuit.graph.get("verdict_reason")
    circuit.graph["verdict"] = "not established"
    circuit.graph["verdict_reason"] = f"{reason}; {earlier}" if earlier else reason


def _check_split(analysis: Analysis, state: StateFile) -> None:
    """Refuse a shard that did not end where its parts were done: it has done those of all shards.

    Raises:
        PluginError: the analysis is not split as it says.
    """
    if state.shard is not None:
        raise PluginError(
            f"analysis {analysis.name!r} of plugin {analysis.plugin!r} says that it can be split "
            f"into shards, and has no part of its work in circuitlab.sharded()"
        )


def _stateless(analysis: Analysis, state: StateFile, model: TracedModel) -> list[str]:
    """A warning where a state was asked for and the analysis has none to give.

    Of a model on a host, the jobs are kept.
    """
    if state.path is None or state.stages or model.remote:
        return []
    return [
        f"analysis {analysis.name!r} keeps no state: nothing was written to {str(state.path)!r}, "
        f"and an interrupted run of it begins again"
    ]
