"""The subject of an evaluation: a circuit, with the model and the task it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from circuitlab.ablation import Ablation
from circuitlab.builder import build_circuit
from circuitlab.errors import GraphError, OptionError, TaskError
from circuitlab.export import read_circuit
from circuitlab.graph import CircuitGraph
from circuitlab.layout import helps
from circuitlab.loading import DType, Source, load_model
from circuitlab.registry import Analysis, Registry
from circuitlab.tasks import Task

if TYPE_CHECKING:
    from circuitlab.model import TracedModel


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        circuit: As it was traced.
        model: The model it is of.
        task: The task it is for, with the metric it was found by.
        ablation: What stands outside the circuit instead.
        registry: Installed plugins.
        warnings: How model or task differ from those the circuit names.
    """

    circuit: CircuitGraph
    model: TracedModel
    task: Task
    ablation: Ablation
    registry: Registry
    warnings: tuple[str, ...]


def find_subject(
    circuit: CircuitGraph | Path | str,
    model: Source | None = None,
    task: Task | str | None = None,
    *,
    ablation: Ablation | None = None,
    registry: Registry | None = None,
) -> Subject:
    """A circuit with the model, task and ablation that are given, or else those it names.

    Raises:
        GraphError: the circuit cannot be read, or is a comparison of several.
        OptionError: it names no model and none is given, or its model is on a host.
        TaskError: it names no task that is installed, and none is given.
    """
    if not isinstance(circuit, CircuitGraph):
        circuit = read_circuit(Path(circuit))
    registry = registry or Registry.load()
    check_subject(circuit, task, registry)
    if model is None:
        name, dtype, revision = recorded_model(circuit)
        traced = load_model(name, dtype=dtype, revision=revision, registry=registry)
    else:
        traced = load_model(model, registry=registry)
    found, warnings = _task(circuit, traced, task, registry)
    return Subject(
        circuit, traced, found, _ablation(circuit, ablation), registry,
        (*_other_model(circuit, traced), *warnings, *_other_scores(circuit)),
    )  # fmt: skip


def recorded_analysis(
    circuit: CircuitGraph, registry: Registry
) -> tuple[Analysis, dict[str, Any]] | None:
    """The analysis that found a circuit, and its options; None where it has them no longer."""
    analysis = registry.analyses.get(str(circuit.graph.get("analysis")))
    options = circuit.graph.get("options")
    if analysis is None or not isinstance(options, dict):
        return None
    own = {option.name: option for option in analysis.options}
    try:
        return analysis, {
            name: value if value is None or own[name].accepts(value) else own[name].parse(value)
            for name, value in options.items()
        }
    except (KeyError, OptionError, AttributeError, TypeError):
        return None


def rediscovery(subject: Subject) -> Callable[[Task], CircuitGraph] | None:
    """Finds the circuit again on other pairs, by its own analysis and options.

    None where the circuit names no analysis that is installed, or options it no longer has.
    """
    registry, seed = subject.registry, subject.circuit.graph.get("seed")
    found = recorded_analysis(subject.circuit, registry)
    if found is None:
        return None
    analysis, given = found

    def again(task: Task) -> CircuitGraph:
        return build_circuit(
            subject.model,
            task,
            analysis.name,
            seed=seed if isinstance(seed, int) else 0,
            allow_weak=True,
            registry=registry,
            **given,
        )

    return again


def recorded_model(
    circuit: CircuitGraph, *, on_host: bool = False
) -> tuple[str, DType, str | None]:
    """Name, type of the weights and revision of the model that a circuit says it is of.

    Raises:
        OptionError: it does not say, or the model is on a host and ``on_host`` is not set.
    """
    facts = circuit.graph
    name, dtype, revision = (facts.get(key) for key in ("model", "dtype", "model_revision"))
    if not isinstance(name, str) or not name:
        raise OptionError("the circuit does not say which model it is of; name it with --model")
    if facts.get("remote") and not on_host:
        raise OptionError(
            f"the circuit was found on model {name!r} on a host; say where it is with --remote, or "
            f"name a model that is here with --model"
        )
    kind = cast("DType", dtype if dtype in get_args(DType) else "float32")
    return name, kind, revision if isinstance(revision, str) else None


def check_subject(circuit: CircuitGraph, task: Task | str | None, registry: Registry) -> None:
    """Refuse, before any model is loaded, a circuit that cannot be evaluated.

    Raises:
        GraphError: it is a comparison of several.
        TaskError: it is for a task that no plugin offers, and none is given.
    """
    if any("in" in data for *_, data in circuit.edges(data=True)):
        raise GraphError("this is a comparison of circuits, not one; evaluate each by itself")
    named = circuit.graph.get("task")
    if task is None and isinstance(named, str) and named not in registry.tasks:
        recorded = circuit.graph.get("task_digest", "none recorded")
        raise TaskError(
            f"the circuit is for task {named!r} (digest {recorded}), which no plugin offers; "
            f"give its file with --task-file"
        )


def _task(
    circuit: CircuitGraph, model: TracedModel, task: Task | str | None, registry: Registry
) -> tuple[Task, list[str]]:
    """The task, with the circuit's own metric, and how it differs from the recorded one."""
    named = circuit.graph.get("task")
    if isinstance(task, str):
        task = registry.task(task)
    elif task is None:
        if not isinstance(named, str):
            if model.task_name is None:
                raise TaskError(
                    "the circuit does not say which task it is for; name one with --task, or give "
                    "its file with --task-file"
                )
            named = model.task_name
        task = registry.task(named)
    metric = circuit.graph.get("metric")
    if isinstance(metric, str):
        task = replace(task, metric=metric)
    return task, _other_task(circuit, task)


def _other_task(circuit: CircuitGraph, task: Task) -> list[str]:
    """A warning where the pairs are not those that the circuit's digest is of."""
    recorded, n_pairs = circuit.graph.get("task_digest"), circuit.graph.get("n_pairs")
    if not isinstance(recorded, str) or not isinstance(n_pairs, int) or n_pairs < 1:
        return []
    if recorded in (task.digest, task.take(n_pairs).digest):
        return []
    return [
        f"task {task.name!r} (digest {task.digest}) is not the one that the circuit was found on "
        f"(digest {recorded})"
    ]


def _other_model(circuit: CircuitGraph, model: TracedModel) -> list[str]:
    """Warnings where the model is not the one that the circuit names."""
    warnings = []
    for field, found in (("model", model.name), ("model_revision", model.revision)):
        recorded = circuit.graph.get(field)
        if recorded is not None and recorded != found:
            warnings.append(
                f"{field.replace('_', ' ')} {found!r} is not the circuit's {recorded!r}"
            )
    return warnings


def _other_scores(circuit: CircuitGraph) -> list[str]:
    """A warning where the scores are no effects on the metric."""
    if helps(circuit):
        return []
    return [
        "the circuit's scores are no effects on the metric (see its score line): the verdict is on "
        "its edges as a circuit of the task, not on what its analysis measured; an effect that has "
        "no kind of its own is taken for an edge of the model"
    ]


def _ablation(circuit: CircuitGraph, ablation: Ablation | None) -> Ablation:
    chosen = ablation or circuit.graph.get("ablation") or "counterfactual"
    if chosen not in get_args(Ablation):
        said = "is unknown" if ablation else "of the circuit replaces no component's output"
        raise OptionError(
            f"ablation {chosen!r} {said}; use one of {', '.join(get_args(Ablation))} (--ablation)"
        )
    return cast("Ablation", chosen)
