"""Rules of an analysis in use: options that are heeded, runs that stop, hosts, known circuits."""

from __future__ import annotations

import dis
import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from circuitlab.checkpoint import StateFile
from circuitlab.graph import EDGE_SCORE, CircuitGraph, effect_name
from circuitlab.options import Option
from circuitlab.testing.analyses import BATCH_TOLERANCE, ROUNDING, Trial, check_agree
from circuitlab.testing.clause import BrokenError, NotCheckedError
from circuitlab.testing.hosts import on_host
from circuitlab.testing.samples import planted_circuit
from circuitlab.wiring import Receiver

#: An edge outside the planted circuit with this share of its largest score is one too many.
TOO_MANY = 0.1


class _ArrivedError(Exception):
    """A function was entered."""


class _Stopping(StateFile):
    """A state file whose run is interrupted when it has kept something once."""

    stopped = False

    def keep(self, stage: str, state: Mapping[str, Any]) -> None:
        super().keep(stage, state)
        if not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


def other_value(option: Option) -> Any:
    """A value of an option that is not its default."""
    words = [word for word in option.choices if word != option.default]
    if words:
        return words[0]
    kind = option.types[0]
    number = option.default if isinstance(option.default, int | float) else 2
    values: dict[type, Any] = {int: int(number) + 1, float: number / 2 + 0.25, str: "circuitlab"}
    values |= {bool: not option.default, Path: Path("circuitlab.check")}
    return values[kind]


def _heeded(trial: Trial) -> None:
    values = {option.name: other_value(option) for option in trial.options}
    if not values:
        raise NotCheckedError("it has no options")
    code = _code(trial.function)
    arrived = _arrived(trial, code, values)
    for name, value in values.items():
        if name not in arrived or arrived[name] != value:
            found = repr(arrived[name]) if name in arrived else "nothing"
            raise BrokenError(
                f"{trial.label} is given {name}={value!r} and its function gets {found}; pass "
                f"every option on in the wrapper of {code.co_name}"
            )
    read = _read(code)
    if unread := [name for name in values if name not in read]:
        raise BrokenError(
            f"{trial.label} never reads its option {unread[0]!r}: whoever sets it changes nothing; "
            f"use it, or take it out of the signature"
        )


def _code(function: Callable[..., Any]) -> CodeType:
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    if not isinstance(code, CodeType):
        raise NotCheckedError(f"its function is a {type(inner).__name__}, which cannot be watched")
    return code


def _arrived(trial: Trial, code: CodeType, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options in the function's own frame; it is left at once."""
    arrived: dict[str, Any] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is code:
            arrived.update({n: frame.f_locals[n] for n in values if n in frame.f_locals})
            raise _ArrivedError

    earlier = sys.getprofile()
    sys.setprofile(watch)
    try:
        with suppress(_ArrivedError):
            trial.function(trial.model, trial.task, **values)
    finally:
        sys.setprofile(earlier)
    return arrived


def _read(code: CodeType) -> set[str]:
    """Names of the variables that a function reads, or hands to a function inside it."""
    if "locals" in code.co_names:
        return set(code.co_varnames)
    found: set[str] = set(code.co_cellvars)
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_") and "FAST" in step.opname:
            found.update(step.argval if isinstance(step.argval, tuple) else (step.argval,))
    return found


def _resumes(trial: Trial) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        with suppress(KeyboardInterrupt), _Stopping(path) as state:
            with state.used({}, trial.model.device):
                trial.run()
            raise NotCheckedError(
                "it keeps no state: a run that is stopped begins again; see circuitlab.Checkpoint"
            )
        with StateFile(path) as left, left.used({}, trial.model.device):
            circuit = trial.run()
    if circuit.to_json() != trial.circuit.to_json():
        raise BrokenError(
            f"{trial.label} gives another circuit when it was stopped and resumed; keep in its "
            f"Checkpoint all that the rest of the stage needs, and draw from torch's generator"
        )


def _on_host(trial: Trial) -> None:
    advice = (
        "on a host only what goes through the model's public methods reaches the weights: use "
        "model.run, model.weights and circuitlab.edge_effects, never the module itself"
    )
    if trial.run().to_json() != trial.circuit.to_json():
        raise NotCheckedError("it gives two circuits from one seed; mend that first")
    circuit = trial.run(on_host(trial.model))
    check_agree(trial.circuit, circuit, f"{trial.label} on a host", advice)


def _finds_planted(trial: Trial) -> None:
    words = trial.circuit.graph.get("score", EDGE_SCORE)
    if words != EDGE_SCORE:
        raise NotCheckedError(f"its scores are of another kind: {words}")
    model, task, planted = planted_circuit()
    found = _edge_scores(trial.run(model, task), set(model.wiring.edges))
    if not found:
        raise NotCheckedError("it lists no edge between components of the model")
    least = TOO_MANY * max(map(abs, found.values()))
    strong = {edge for edge, score in found.items() if abs(score) > least}
    if wrong := sorted(strong - planted):
        raise BrokenError(
            f"{trial.label} scores {effect_name(*wrong[0])} by {found[wrong[0]]:.3g} on gate-add, "
            f"where that edge does nothing; its scores are said to be {EDGE_SCORE!r}: patch as "
            f"they say, or set CircuitGraph(score=...) to what they are"
        )
    if strong != planted:
        raise NotCheckedError(
            f"it lists {len(strong)} of the {len(planted)} planted edges of gate-add, and no other"
        )


def _edge_scores(circuit: CircuitGraph, edges: set[Any]) -> dict[tuple[str, str, str], float]:
    known = {(edge.source, edge.target, edge.port) for edge in edges}
    return {effect[:3]: effect[3] for effect in circuit.effects() if effect[:3] in known}


def _by_pairs(trial: Trial) -> None:
    pair_scores = trial.pair_scores
    if pair_scores is None:
        raise NotCheckedError("it offers no pair_scores")
    wiring, pairs = trial.model.wiring, trial.model.encode(trial.task)
    scores = pair_scores(trial.model, pairs, **_settings(trial))
    shape = (len(trial.task.pairs), len(wiring.sources), len(wiring.receivers))
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise BrokenError(
            f"pair_scores of {trial.label} gives {found}; give a tensor {list(shape)}"
        )
    means = scores.double().mean(0)
    largest = float(means.abs().max())
    for source, target, port, score in trial.circuit.effects():
        edge = Receiver(target, port)
        if source in wiring.source_rows and edge in wiring.receiver_columns:
            mean = float(means[wiring.source_rows[source], wiring.receiver_columns[edge]])
            if abs(mean - score) > max(BATCH_TOLERANCE * largest, ROUNDING):
                raise BrokenError(
                    f"pair_scores of {trial.label}: {effect_name(source, target, port)} has the "
                    f"mean {mean:.6g} over pairs, and the circuit {score:.6g}; give the scores of "
                    f"each pair whose mean the analysis reports"
                )


def _settings(trial: Trial) -> dict[str, Any]:
    return {option.name: option.default for option in trial.options} | trial.given


#: What an analysis that gave a circuit is held to beside :data:`circuitlab.testing.analyses.RULES`.
CONDUCT: dict[str, Callable[[Trial], None]] = {
    "its options are heeded": _heeded,
    "stopped and resumed, it gives the same circuit": _resumes,
    "it runs on a host, and sends plain data": _on_host,
    "it finds the planted circuit": _finds_planted,
    "its pair_scores have the circuit's scores as mean": _by_pairs,
}
