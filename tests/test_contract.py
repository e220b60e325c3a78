"""The conformance kit: sound analyses pass it, and every planted fault is caught.

That the built-in plugins pass it is shown where they are installed as a stranger's are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from circuitlab import (
    CircuitGraph,
    EncodedTask,
    PluginError,
    Site,
    Task,
    TracedModel,
    edge_effects,
)
from circuitlab.options import read_options
from circuitlab.registry import Registry
from circuitlab.testing import check_analysis, planted_circuit, tiny_model, toy_task
from circuitlab.testing.analyses import Trial
from circuitlab.testing.clause import judge
from circuitlab.testing.conduct import CONDUCT, other_value
from circuitlab.wiring import Receiver


def direct(model: TracedModel, task: Task, *, scale: float = 1.0) -> CircuitGraph:
    """Score each head by the size of its z on the clean prompts."""
    pairs = model.encode(task)
    sites = [Site("z", n, h) for n in range(model.n_layers) for h in range(model.n_heads)]
    run = model.run(pairs.clean, read=sites)
    circuit = CircuitGraph(score="mean size of z")
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    for site in sites:
        name = f"a{site.layer}.h{site.head}"
        circuit.add_component(name, kind="head", layer=site.layer, head=site.head)
        circuit.add_effect(name, "logits", scale * float(run[site][pairs.clean.mask].norm()))
    return circuit


def test_sound_analysis_passes() -> None:
    """A short, sound analysis passes and its options reach it."""
    plain, doubled = check_analysis(direct), check_analysis(direct, options={"scale": 2.0})
    scores = dict(zip([e[:3] for e in plain.effects()], plain.effects(), strict=True))
    for *edge, score in doubled.effects():
        assert score == 2 * scores[tuple(edge)][3] != 0


_calls = itertools.count()


def prints(model: TracedModel, task: Task) -> CircuitGraph:
    """Prints."""
    print("hello")
    return direct(model, task)


def wavers(model: TracedModel, task: Task) -> CircuitGraph:
    """Gives another score each time."""
    return direct(model, task, scale=1.0 + next(_calls))


def misnames(model: TracedModel, task: Task) -> CircuitGraph:
    """Names a head the model does not have."""
    circuit = direct(model, task)
    circuit.add_component("a9.h9", kind="head", layer=9)
    return circuit


def mistakes_kind(model: TracedModel, task: Task) -> CircuitGraph:
    """Calls a head an MLP."""
    circuit = direct(model, task)
    circuit.add_component("a0.h0", kind="mlp", layer=0)
    return circuit


def mutates(model: TracedModel, task: Task) -> CircuitGraph:
    """Changes a weight."""
    with torch.no_grad():
        model.weights.heads(0, "v").add_(1e-3)
    return direct(model, task)


def collects_gradients(model: TracedModel, task: Task) -> CircuitGraph:
    """Leaves a parameter that collects gradients."""
    model._module.lm_head.weight.requires_grad_(True)
    return direct(model, task)


def trains(model: TracedModel, task: Task) -> CircuitGraph:
    """Leaves the model in training mode."""
    circuit = direct(model, task)
    model._module.train()
    return circuit


def returns_dict(model: TracedModel, task: Task) -> dict[str, float]:
    """Returns a dict."""
    return {"a0.h0": 1.0}


def invents_nan(model: TracedModel, task: Task) -> CircuitGraph:
    """Puts a NaN past the door of add_effect."""
    circuit = direct(model, task)
    circuit.add_edge("a0.h0", "logits", key="", score=float("nan"))
    return circuit


def keeps_tensor(model: TracedModel, task: Task) -> CircuitGraph:
    """Keeps a tensor in the provenance."""
    circuit = direct(model, task)
    circuit.graph["mean"] = torch.zeros(2)
    return circuit


def depends_on_batch(model: TracedModel, task: Task, *, batch_size: int = 5) -> CircuitGraph:
    """Averages over batches instead of pairs."""
    return direct(model, task, scale=1.0 / batch_size)


def takes_anything(model: TracedModel, task: Task, **options: Any) -> CircuitGraph:
    """Hides its options."""
    return direct(model, task)


def needs_value(model: TracedModel, task: Task, *, scale: float) -> CircuitGraph:
    """Has an option without a default."""
    return direct(model, task, scale=scale)


def undocumented(model: TracedModel, task: Task) -> CircuitGraph:
    return direct(model, task)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (prints, "printed 'hello"),
        (wavers, "two different circuits"),
        (misnames, r"component 'a9\.h9' does not exist"),
        (mistakes_kind, "by its name it is 'head'"),
        (mutates, "changed the model's weights"),
        (collects_gradients, "another requires_grad"),
        (trains, "training mode"),
        (returns_dict, "returned dict"),
        (invents_nan, "finite number"),
        (keeps_tensor, "cannot be written as JSON"),
        (depends_on_batch, "must not depend on its batch"),
        (takes_anything, "signature that cannot be read"),
        (needs_value, "needs a default"),
        (undocumented, "no docstring"),
    ],
)
def test_planted_fault_is_caught(fault: Callable[..., Any], message: str) -> None:
    """Each way to break the contract fails, and the message names the fault and the analysis."""
    with pytest.raises(AssertionError, match=message) as caught:
        check_analysis(fault)
    assert repr(fault.__name__) in str(caught.value)


# --- conduct --------------------------------------------------------------------------------------


def conduct(rule: str, function: Callable[..., Any], **settings: Any) -> str:
    """What one rule says of an analysis; empty where it holds."""
    trial = Trial("subject", function, **settings)
    clause = judge(trial.label, rule, lambda: CONDUCT[rule](trial))
    return "" if clause.verdict == "holds" else f"{clause.verdict}: {clause.reason}"


def exact(model: TracedModel, task: Task, *, factor: float = 1.0) -> CircuitGraph:
    """The exact effect of every edge, times a factor."""
    effects = edge_effects(model, model.encode(task), model.wiring.edges).mean(1)
    circuit = CircuitGraph()
    for edge, effect in zip(model.wiring.edges, effects.tolist(), strict=True):
        for name in (edge.source, edge.target):
            component = model.wiring.component(name)
            circuit.add_component(name, kind=component.kind, layer=component.layer)
        circuit.add_effect(edge.source, edge.target, factor * effect, port=edge.port)
    return circuit


def scores_of_pairs(model: TracedModel, pairs: EncodedTask, **options: Any) -> Tensor:
    """The same, of each pair."""
    wiring = model.wiring
    found = torch.zeros(len(pairs), len(wiring.sources), len(wiring.receivers))
    for edge, effects in zip(wiring.edges, edge_effects(model, pairs, wiring.edges), strict=True):
        column = wiring.receiver_columns[Receiver(edge.target, edge.port)]
        found[:, wiring.source_rows[edge.source], column] = options["factor"] * effects
    return found


def test_pair_scores_are_held_to_their_mean() -> None:
    """Scores of pairs whose mean is the circuit's hold, with options too; others are refused."""
    rule = "its pair_scores have the circuit's scores as mean"
    assert conduct(rule, exact, pair_scores=scores_of_pairs) == ""
    assert conduct(rule, exact, pair_scores=scores_of_pairs, given={"factor": 2.0}) == ""
    assert conduct(rule, exact) == "not checked: it offers no pair_scores"

    def sums(model: TracedModel, pairs: EncodedTask, **options: Any) -> Tensor:
        return scores_of_pairs(model, pairs, **options) * len(pairs)

    def one(model: TracedModel, pairs: EncodedTask, **options: Any) -> Tensor:
        return scores_of_pairs(model, pairs, **options)[:1]

    assert "and the circuit" in conduct(rule, exact, pair_scores=sums)
    assert "gives [1, 7, 15]; give a tensor [5, 7, 15]" in conduct(rule, exact, pair_scores=one)


def test_planted_circuit_tells_right_from_wrong() -> None:
    """Exact effects hold; part of them, words of another kind, and another edge are told apart."""
    rule = "it finds the planted circuit"
    assert conduct(rule, exact) == ""

    def without(dropped: int, **words: str) -> Callable[..., CircuitGraph]:
        def part(model: TracedModel, task: Task) -> CircuitGraph:
            circuit = exact(model, task).top(len(planted_circuit()[2]) - dropped)
            circuit.graph.update(words)
            return circuit

        return part

    assert "not checked: it lists" in conduct(rule, without(1))
    assert "not checked: its scores are of another kind: z" in conduct(rule, without(0, score="z"))

    def wrong(model: TracedModel, task: Task) -> CircuitGraph:
        circuit = exact(model, task)
        weakest = list(circuit.effects())[-1]
        circuit.edges[weakest[:3]]["score"] = 1.0
        return circuit

    assert "FAILS" in conduct(rule, wrong)


def test_options_of_every_kind_get_another_value() -> None:
    """What options are tried with is accepted by them, and is not their default."""

    def every(
        model: TracedModel,
        task: Task,
        *,
        whole: int = 2,
        real: float = 0.0,
        word: Literal["a", "b"] = "a",
        text: str = "x",
        flag: bool = True,
        path: Path | None = None,
        size: int | Literal["auto"] = "auto",
    ) -> CircuitGraph:
        """Read all of them."""
        return direct(model, task, scale=float(bool((whole, real, word, text, flag, path, size))))

    options = read_options(every)
    values = {option.name: other_value(option) for option in options}
    for option in options:
        assert option.accepts(values[option.name])
        assert values[option.name] != option.default
    assert values["size"] == 3
    assert conduct("its options are heeded", every) == ""


def test_unknown_analysis_is_refused() -> None:
    """A name that is not installed is an error of the plugin, not of the contract."""
    with pytest.raises(PluginError, match="is not installed"):
        check_analysis("no-such-analysis")


def test_planted_circuit_is_found_by_patching() -> None:
    """The planted edges are exactly the edges with an effect, and so the default analysis says."""
    model, task, edges = planted_circuit()
    function = Registry.load().analysis("edge-attribution").function
    found = {edge[:3] for edge in function(model, task, method="eap").effects()}
    assert found == edges


def test_tiny_model_leaves_the_random_state() -> None:
    """Making the tiny model draws nothing from the global generator; seeds give other models."""
    state = torch.get_rng_state()
    prompts = [pair.clean for pair in toy_task().pairs]
    first, again, other = (tiny_model(seed).run(prompts).logits for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
