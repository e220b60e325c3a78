"""For the tests of a plugin: a tiny model, a task for it, a known circuit, and the contract itself.

``check_analysis`` is what the built-in analyses pass; run it over your own::

    def test_contract():
        check_analysis("head-norms")

It holds an analysis to what ``build_circuit`` and its readers count on, not to being right: for
that compare it with :func:`planted_circuit`, whose edges are known.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import zoo
from circuitlab.errors import GraphError
from circuitlab.graph import CircuitGraph, effect_name
from circuitlab.loading import load_model
from circuitlab.options import Option, read_options
from circuitlab.registry import Registry
from circuitlab.tasks import PromptPair, Task
from circuitlab.wiring import Wiring

if TYPE_CHECKING:
    from circuitlab.hookspecs import AnalysisFunction
    from circuitlab.model import TracedModel

__all__ = ["check_analysis", "planted_circuit", "tiny_model", "toy_task"]

#: Scores may differ this much between batch sizes, as a share of the largest: float32 adds up in
#: another order.
BATCH_TOLERANCE = 1e-4
#: A difference of float32 logits that is none.
ROUNDING = 1e-6

_VOCABULARY, _POSITIONS = 32, 16
#: Kinds whose components are named by the wiring; other kinds are a plugin's own.
_STANDARD = frozenset({"input", "head", "mlp", "logits"})

Parameters = dict[str, tuple[Tensor, bool, Tensor | None]]


def tiny_model(seed: int = 0) -> TracedModel:
    """A random GPT-2 of 2 layers, 2 heads and d_model 16 that reads token ids below 32, float32.

    Its weights are so wide that no part of it is close to linear. The global random state is left
    as it was.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=_VOCABULARY,
        n_positions=_POSITIONS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = GPT2LMHeadModel(config)
        module.set_attn_implementation("eager")
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / 3 if parameter.ndim > 1 else parameter + noise / 5)
    return load_model((module.requires_grad_(False), None))


def toy_task() -> Task:
    """Five contrasts of token ids for :func:`tiny_model`, of 3 to 6 tokens, so that batches pad."""
    pairs = []
    for number, length in enumerate((4, 6, 3, 5, 6)):
        clean = [1 + (7 * number + 3 * place) % (_VOCABULARY - 1) for place in range(length)]
        corrupt = list(clean)
        corrupt[length // 2] = 1 + (corrupt[length // 2] + 10) % (_VOCABULARY - 1)
        pairs.append(PromptPair(tuple(clean), tuple(corrupt), (2 + number,), (20 + number,)))
    return Task("toy", tuple(pairs), description="random contrasts")


def planted_circuit() -> tuple[TracedModel, Task, frozenset[tuple[str, str, str]]]:
    """A model whose circuit is known, its task, and that circuit's edges (source, target, port).

    The model adds two bits linearly, so that every method that looks at edges finds exactly these;
    an analysis of another question need not.
    """
    task = next(task for task in zoo.tasks() if task.name == "gate-add")
    return load_model("gate-add"), task, zoo.known_edges("gate-add", sense="effective")


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
    label = f"analysis {name!r}"
    known = {option.name: option for option in _check_signature(function, label)}
    model, task, given = model or tiny_model(), task or toy_task(), dict(options or {})
    before = _parameters(model)

    def run(**changed: Any) -> CircuitGraph:
        torch.manual_seed(0)
        return _run(lambda: function(model, task, **given | changed), label)

    circuit = run()
    _check_untouched(model, before, label)
    _check_circuit(circuit, model.wiring, label)
    if run().to_json() != circuit.to_json():
        raise AssertionError(
            f"{label} gave two different circuits from one seed; draw random numbers from torch's "
            f"global generator, iterate over sets in sorted order, and keep times out of the graph"
        )
    if "batch_size" in known:
        for size in (1, 2):
            _check_agree(circuit, run(batch_size=size), f"{label}, batch_size={size}")
    return circuit


def _check_signature(function: Callable[..., Any], label: str) -> tuple[Option, ...]:
    try:
        options = read_options(function)
    except TypeError as error:
        raise AssertionError(f"{label} has a signature that cannot be read: {error}") from error
    if not (function.__doc__ or "").strip():
        raise AssertionError(f"{label} has no docstring; its first line is the help text")
    return options


def _run(call: Callable[[], object], label: str) -> CircuitGraph:
    """What the analysis returns, when it is a circuit and nothing was printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        circuit = call()
    if text := printed.getvalue():
        raise AssertionError(
            f"{label} printed {text[:60]!r}; stdout holds results only: use logging, or "
            f"circuitlab.track to show progress"
        )
    if not isinstance(circuit, CircuitGraph):
        raise AssertionError(
            f"{label} returned {type(circuit).__name__}; build and return a circuitlab.CircuitGraph"
        )
    return circuit


def _check_circuit(circuit: CircuitGraph, wiring: Wiring, label: str) -> None:
    try:
        circuit.validate()
        circuit.to_json()
        for name, data in circuit.nodes(data=True):
            if data["kind"] in _STANDARD:
                # What holds at one position is named by it: a1.h0[5].
                meant = wiring.component(name.removesuffix(f"[{data.get('position')}]"))
                if (data["kind"], data["layer"]) != (meant.kind, meant.layer):
                    raise GraphError(
                        f"component {name!r} has kind {data['kind']!r} and layer {data['layer']}; "
                        f"by its name it is {meant.kind!r} of layer {meant.layer}"
                    )
    except GraphError as error:
        raise AssertionError(f"{label} returned a malformed circuit: {error}") from error


def _check_agree(one: CircuitGraph, other: CircuitGraph, label: str) -> None:
    """Circuits of the same scores; edges that tie at the cut may differ."""
    scores, others = ({e[:3]: e[3] for e in circuit.effects()} for circuit in (one, other))
    allowed = max(BATCH_TOLERANCE * max(map(abs, scores.values()), default=0.0), ROUNDING)
    for edge in scores.keys() & others.keys():
        if abs(scores[edge] - others[edge]) > allowed:
            raise AssertionError(
                f"{label}: {effect_name(*edge)} scores {others[edge]:.6g}, at its default size "
                f"{scores[edge]:.6g}; a prompt's score must not depend on its batch: look for "
                f"means over the batch, and for padded positions that are counted"
            )
    sizes = zip_longest(map(abs, scores.values()), map(abs, others.values()), fillvalue=0.0)
    if any(abs(a - b) > allowed for a, b in sizes):
        raise AssertionError(f"{label}: other edges are in the circuit than at its default size")


def _parameters(model: TracedModel) -> Parameters:
    return {
        name: (parameter.detach().clone(), parameter.requires_grad, parameter.grad)
        for name, parameter in model._module.named_parameters()
    }


def _check_untouched(model: TracedModel, before: Parameters, label: str) -> None:
    for name, parameter in model._module.named_parameters():
        value, requires_grad, grad = before[name]
        if not torch.equal(parameter, value):
            raise AssertionError(f"{label} changed the model's weights ({name}); write to a copy")
        if parameter.requires_grad != requires_grad or parameter.grad is not grad:
            raise AssertionError(
                f"{label} left {name} with another requires_grad or grad; use model.run, which "
                f"differentiates without touching parameters"
            )
    if model._module.training:
        raise AssertionError(f"{label} left the model in training mode; it must stay in eval()")
