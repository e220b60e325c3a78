"""The conformance kit: every installed analysis passes it, and every planted fault is caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from circuitlab import CircuitGraph, PluginError, Site, Task, TracedModel
from circuitlab.registry import Registry
from circuitlab.testing import check_analysis, planted_circuit, tiny_model, toy_task


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


#: What an analysis has to be told, or takes long without.
NEEDED: dict[str, dict[str, Any]] = {
    "activation-plateaus": {"bank_size": 8, "steps": 11, "freeze": "heads"},
    "head-circuits": {"head": "a1.h0"},
}


#: What needs files; tests of their own hold them to the contract.
FED = {"feature-interactions"}


@pytest.mark.parametrize("name", sorted(Registry.load().analyses.keys() - FED))
def test_installed_analysis_keeps_the_contract(name: str) -> None:
    """Every analysis that is installed passes, on padded prompts without a tokenizer."""
    circuit = check_analysis(name, options=NEEDED.get(name))
    assert circuit.number_of_edges() > 0


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
