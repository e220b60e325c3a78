"""Evidence: what speaks for a circuit and what against it, measured on pairs it never saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import baseline
from circuitlab.errors import NumericsError, OptionError
from circuitlab.evaluation import sections
from circuitlab.evaluation.bench import Bench, Settings
from circuitlab.evaluation.held_out import HeldOut, hold_out
from circuitlab.evaluation.kept import Level
from circuitlab.evaluation.sections import measured
from circuitlab.evaluation.subject import Subject, find_subject, rediscovery
from circuitlab.labels import escape_xml, visible
from circuitlab.progress import tell, track

if TYPE_CHECKING:
    from circuitlab.ablation import Ablation
    from circuitlab.graph import CircuitGraph
    from circuitlab.loading import Source
    from circuitlab.registry import Registry
    from circuitlab.tasks import Task

SCHEMA = "circuitlab-evidence/1"

#: Random circuits of a quick evaluation.
QUICK = 20
#: The level of all intervals.
CONFIDENCE = 0.95

_SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "random_circuits": sections.random_circuits,
    "completeness": sections.completeness_of,
    "minimality": sections.minimality_of,
    "stability": sections.stability_of,
    "approximation": sections.approximation_of,
    "sensitivity": sections.sensitivity_rows,
    "curve": sections.curve,
    "hypotheses": sections.hypotheses_of,
    "discrimination": sections.discrimination_of,
}


@dataclass(frozen=True)
class Evidence:
    """What is known of a circuit.

    Attributes:
        results: Everything that was measured, plain finite JSON of schema
            ``circuitlab-evidence/1``; a section that could not be measured holds ``reason`` alone.
        circuit: The circuit, with what was found of its edges and the verdict written onto it.
        subject: Model and task.
        held_out: The pairs it was scored on.
    """

    results: dict[str, Any]
    circuit: CircuitGraph
    subject: Subject = field(repr=False)
    held_out: HeldOut = field(repr=False)

    @property
    def verdict(self) -> str:
        """``supported``, ``partly supported`` or ``not supported``."""
        return str(self.results["verdict"]["word"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """How a notebook shows it: verdict, sentence and reasons."""
        verdict = self.results["verdict"]
        lines = [f"{verdict['word']}: {verdict['sentence']}", *verdict["reasons"]]
        first, *rest = map(escape_xml, lines)
        items = "".join(f"<li>{line}</li>" for line in rest)
        return {
            "text/plain": "\n".join(map(visible, lines)),
            "text/html": f"<p><strong>{first}</strong></p><ul>{items}</ul>",
        }


def evaluate_circuit(
    circuit: CircuitGraph | Path | str,
    model: Source | None = None,
    task: Task | str | None = None,
    *,
    ablation: Ablation | None = None,
    level: Level = "edge",
    n_controls: int = 100,
    resamples: int = 2000,
    quick: bool = False,
    thorough: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    held_out: Task | None = None,
    registry: Registry | None = None,
) -> Evidence:
    """Measure what speaks for a circuit, on pairs it was not found on wherever there are any.

    Args:
        circuit: A circuit, or its file.
        model: Anything :func:`circuitlab.load_model` takes; by default the model it names.
        task: A task or the name of one; by default the one it names.
        ablation: What stands outside the circuit instead; by default what it was found with.
        level: Whether it is a set of ``edge`` or of ``node``.
        n_controls: Random circuits it is held against; at most 20 with ``quick``.
        resamples: Bootstrap resamples of each interval.
        quick: Measure only what is cheap.
        thorough: Measure also what is dear.
        seed: Of all that is drawn.
        batch_size: Pairs per pass; None chooses by memory.
        held_out: Pairs to score it on; see :func:`circuitlab.evaluation.held_out.hold_out`.
        registry: Plugins to use; by default all installed ones.

    Raises:
        OptionError: an option does not fit, or the circuit names no model and none is given.
        GraphError: the circuit cannot be read, or is none of this model.
        TaskError: there is no task, or nothing in it to explain.
        QualityError: the whole circuit is not the model, or the empty one not full ablation.
        NumericsError: a number is not finite.
    """
    settings = _checked(Settings(level, n_controls, resamples, quick, thorough, seed, batch_size))
    subject = find_subject(circuit, model, task, ablation=ablation, registry=registry)
    again = rediscovery(subject)
    pairs = hold_out(subject.circuit, subject.task, given=held_out, rediscover=again, seed=seed)
    bench = Bench(subject, pairs, settings)
    warnings = _warnings(bench)
    tell(warnings)
    results = {
        "schema": SCHEMA,
        "circuit": sections.about(bench),
        "settings": {**vars(settings), "confidence": CONFIDENCE},
        "pairs": pairs.to_json(),
        "base_rates": sections.base_rates(bench),
        "checks": bench.runs.checks,
        "faithfulness": bench.faithfulness.to_json(),
    }
    for name, section in track(_SECTIONS.items(), "evaluating"):
        results[name] = measured(section, bench)
    results["verdict"] = sections.verdict_of(bench)
    results["warnings"] = warnings
    _check_finite(results)
    return Evidence(results, _written(bench, results), subject, pairs)


def _checked(settings: Settings) -> Settings:
    """The settings, if they go together; with fewer random circuits where it is to be quick."""
    if settings.quick and settings.thorough:
        raise OptionError("quick and thorough exclude each other; leave one out")
    for name in ("n_controls", "resamples"):
        if (number := getattr(settings, name)) < 1:
            raise OptionError(f"{name} is {number}; give 1 or more")
    if settings.quick:
        return replace(settings, n_controls=min(settings.n_controls, QUICK))
    return settings


def _check_finite(results: dict[str, Any]) -> None:
    for name, section in results.items():
        try:
            json.dumps(section, allow_nan=False)
        except ValueError as error:
            raise NumericsError(
                f"{name} of the results has a number that is not finite; run in a wider type "
                f"(--dtype float32), or with another metric"
            ) from error


def _written(bench: Bench, results: dict[str, Any]) -> CircuitGraph:
    """The circuit that was given, with what was found of it."""
    circuit = bench.subject.circuit.copy()
    if "inclusion" in results["stability"]:
        bench.stability.write(circuit)
    verdict, share = results["verdict"], results["faithfulness"]
    circuit.graph["evidence"] = {
        "word": verdict["word"],
        "sentence": verdict["sentence"],
        "faithfulness": share["value"],
        "interval": share["interval"],
    }
    written: CircuitGraph = circuit
    return written


def _warnings(bench: Bench) -> list[str]:
    """What a reader must know before any number."""
    doubts = baseline.check(bench.measured, bench.pairs, allow_weak=True, seed=bench.settings.seed)
    loud = [] if bench.held_out.independent else [f"scored on {bench.held_out.how}"]
    if bench.settings.quick:
        loud.append(f"quick: at most {QUICK} random circuits, and without what runs hundreds")
    return [*bench.subject.warnings, *loud, *_unreached(bench), *bench.pairs.warnings, *doubts]


def _unreached(bench: Bench) -> list[str]:
    """A warning where no edge of the circuit begins at the input."""
    begins = {kept if isinstance(kept, str) else kept.source for kept in bench.kept}
    if "input" in begins:
        return []
    return ["the circuit has nothing out of input: nothing of the clean prompt reaches it"]
