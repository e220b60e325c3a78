"""Rules of an analysis: what ``build_circuit`` and the readers of its circuit count on."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab.errors import GraphError
from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.options import Option, read_options
from circuitlab.registry import Registry
from circuitlab.testing.clause import BrokenError, NotCheckedError
from circuitlab.testing.samples import tiny_model, toy_task

if TYPE_CHECKING:
    from circuitlab.hookspecs import AnalysisFunction
    from circuitlab.model import TracedModel
    from circuitlab.tasks import Task
    from circuitlab.wiring import Wiring

#: Scores may differ this much between batch sizes, as a share of the largest: float32 adds up in
#: another order.
BATCH_TOLERANCE = 1e-4
#: A difference of float32 logits that is none.
ROUNDING = 1e-6

#: Kinds whose components are named by the wiring; other kinds are a plugin's own.
_STANDARD = frozenset({"input", "head", "mlp", "logits"})

Parameters = dict[str, tuple[Tensor, bool, Tensor | None]]


@dataclass
class Trial:
    """An analysis, what it is run on, and what it gave.

    Attributes:
        name: Of the analysis.
        function: The analysis.
        given: Values for its options.
        model: What it is run on.
        task: The same.
        pair_scores: Its scores of each pair, where it offers them.
        printed: What it has written to stdout so far.
    """

    name: str
    function: AnalysisFunction
    given: dict[str, Any] = field(default_factory=dict)
    model: TracedModel = field(default_factory=tiny_model)
    task: Task = field(default_factory=toy_task)
    pair_scores: Callable[..., Tensor] | None = None
    printed: str = ""

    @property
    def label(self) -> str:
        """The analysis, for people."""
        return f"analysis {self.name!r}"

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """Its options.

        Raises:
            AssertionError: its signature cannot be read.
        """
        try:
            return read_options(self.function)
        except TypeError as error:
            message = f"{self.label} has a signature that cannot be read: {error}"
            raise BrokenError(message) from error

    @cached_property
    def before(self) -> Parameters:
        """The model's parameters before the first run."""
        return {
            name: (parameter.detach().clone(), parameter.requires_grad, parameter.grad)
            for name, parameter in self.model._module.named_parameters()
        }

    @cached_property
    def circuit(self) -> CircuitGraph:
        """What the first run gave."""
        _ = self.before
        return self.run()

    def run(
        self, model: TracedModel | None = None, task: Task | None = None, **changed: Any
    ) -> CircuitGraph:
        """What the analysis gives from seed 0.

        Raises:
            AssertionError: it gives no circuit.
        """
        torch.manual_seed(0)
        written = io.StringIO()
        try:
            with redirect_stdout(written):
                circuit: object = self.function(
                    model or self.model, task or self.task, **self.given | changed
                )
        finally:
            self.printed += written.getvalue()
        if not isinstance(circuit, CircuitGraph):
            raise BrokenError(
                f"{self.label} returned {type(circuit).__name__}; build and return a "
                f"circuitlab.CircuitGraph"
            )
        return circuit


def check_analysis(
    analysis: str | AnalysisFunction,
    *,
    model: TracedModel | None = None,
    task: Task | None = None,
    options: Mapping[str, Any] | None = None,
) -> CircuitGraph:
    """Hold an analysis to the contract; returns the circuit it made.

    * Its options can be read from its signature, and its docstring has a first line for the help.
    * It returns a valid CircuitGraph that can be written as JSON, whose components of kind input,
      head, mlp and logits are the model's own, under the names the wiring gives them.
    * After ``torch.manual_seed`` of one number it gives the same circuit twice.
    * With an option ``batch_size``: scores agree between sizes to :data:`BATCH_TOLERANCE`.
    * It writes nothing to stdout, and leaves the model as it was: weights, ``requires_grad``,
      ``grad``, and evaluation mode.

    Args:
        analysis: The name of an installed analysis, or the function itself.
        model: What to run it on; by default :func:`tiny_model`.
        task: By default :func:`toy_task`.
        options: Values for its options, for instance to make it quick.

    Raises:
        AssertionError: says which clause is broken, by what, and what to do.
        PluginError: there is no analysis of that name.
    """
    if isinstance(analysis, str):
        name, function = analysis, Registry.load().analysis(analysis).function
    else:
        name, function = getattr(analysis, "__name__", repr(analysis)), analysis
    trial = Trial(name, function, dict(options or {}), model or tiny_model(), task or toy_task())
    for check in RULES.values():
        try:
            check(trial)
        except NotCheckedError:
            continue
    return trial.circuit


def _documented(trial: Trial) -> None:
    _ = trial.options
    if not (trial.function.__doc__ or "").strip():
        raise BrokenError(f"{trial.label} has no docstring; its first line is the help text")


def _gives_circuit(trial: Trial) -> None:
    _ = trial.circuit


def _quiet(trial: Trial) -> None:
    _ = trial.circuit
    if trial.printed:
        raise BrokenError(
            f"{trial.label} printed {trial.printed[:60]!r}; stdout holds results only: use "
            f"logging, or circuitlab.track to show progress"
        )


def _untouched(trial: Trial) -> None:
    _ = trial.circuit
    for name, parameter in trial.model._module.named_parameters():
        value, requires_grad, grad = trial.before[name]
        if not torch.equal(parameter, value):
            raise BrokenError(
                f"{trial.label} changed the model's weights ({name}); write to a copy"
            )
        if parameter.requires_grad != requires_grad or parameter.grad is not grad:
            raise BrokenError(
                f"{trial.label} left {name} with another requires_grad or grad; use model.run, "
                f"which differentiates without touching parameters"
            )
    if trial.model._module.training:
        raise BrokenError(f"{trial.label} left the model in training mode; it must stay in eval()")


def _well_formed(trial: Trial) -> None:
    try:
        trial.circuit.validate()
        trial.circuit.to_json()
        _check_names(trial.circuit, trial.model.wiring)
    except GraphError as error:
        raise BrokenError(f"{trial.label} returned a malformed circuit: {error}") from error


def _check_names(circuit: CircuitGraph, wiring: Wiring) -> None:
    for name, data in circuit.nodes(data=True):
        if data["kind"] in _STANDARD:
            # What holds at one position is named by it: a1.h0[5].
            meant = wiring.component(name.removesuffix(f"[{data.get('position')}]"))
            if (data["kind"], data["layer"]) != (meant.kind, meant.layer):
                raise GraphError(
                    f"component {name!r} has kind {data['kind']!r} and layer {data['layer']}; "
                    f"by its name it is {meant.kind!r} of layer {meant.layer}"
                )


def _repeatable(trial: Trial) -> None:
    if trial.run().to_json() != trial.circuit.to_json():
        raise BrokenError(
            f"{trial.label} gave two different circuits from one seed; draw random numbers from "
            f"torch's global generator, iterate over sets in sorted order, and keep times out of "
            f"the graph"
        )


def _by_pair(trial: Trial) -> None:
    if "batch_size" not in {option.name for option in trial.options}:
        raise NotCheckedError("it has no option batch_size")
    advice = (
        "a prompt's score must not depend on its batch: look for means over the batch, and for "
        "padded positions that are counted"
    )
    for size in (1, 2):
        label = f"{trial.label}, batch_size={size}"
        check_agree(trial.circuit, trial.run(batch_size=size), label, advice)


def check_agree(one: CircuitGraph, other: CircuitGraph, label: str, advice: str) -> None:
    """Refuse circuits of other scores; edges that tie at the cut may differ.

    Raises:
        AssertionError: names the first effect that differs.
    """
    scores, others = ({e[:3]: e[3] for e in circuit.effects()} for circuit in (one, other))
    allowed = max(BATCH_TOLERANCE * max(map(abs, scores.values()), default=0.0), ROUNDING)
    for edge in scores.keys() & others.keys():
        if abs(scores[edge] - others[edge]) > allowed:
            raise BrokenError(
                f"{label}: {effect_name(*edge)} scores {others[edge]:.6g}, by default "
                f"{scores[edge]:.6g}; {advice}"
            )
    sizes = zip_longest(map(abs, scores.values()), map(abs, others.values()), fillvalue=0.0)
    if any(abs(a - b) > allowed for a, b in sizes):
        raise BrokenError(f"{label}: other edges are in the circuit than by default; {advice}")


#: What every analysis is held to, in this order.
RULES: dict[str, Callable[[Trial], None]] = {
    "its signature and help can be read": _documented,
    "it gives a circuit": _gives_circuit,
    "it writes nothing to stdout": _quiet,
    "it leaves the model as it was": _untouched,
    "names, scores and data are well formed": _well_formed,
    "one seed, one circuit": _repeatable,
    "scores do not depend on the batch": _by_pair,
}
