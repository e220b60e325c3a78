"""Samples: a tiny random model, a task for it, and a model whose circuit is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitlab import zoo
from circuitlab.graph import EDGE_SCORE, CircuitGraph
from circuitlab.loading import load_model
from circuitlab.panels import Bar, Bars
from circuitlab.registry import Registry
from circuitlab.tasks import PromptPair, Task

if TYPE_CHECKING:
    from circuitlab.model import TracedModel

# Models are loaded with the core's own plugin alone: no other that is installed has a say in them.
_VOCABULARY, _POSITIONS = 32, 16


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
    return load_model((module.requires_grad_(False), None), registry=Registry.load([]))


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
    model = load_model("gate-add", registry=Registry.load([]))
    return model, task, zoo.known_edges("gate-add", sense="effective")


def sample_circuit() -> CircuitGraph:
    """The planted circuit as an analysis would give it, with its provenance and one panel.

    Every effect is 1, but the first by name, which is -1.
    """
    model, task, edges = planted_circuit()
    circuit = CircuitGraph(
        score=EDGE_SCORE,
        analysis="sample",
        plugin="sample",
        model=model.name,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        d_model=model.d_model,
        task=task.name,
        metric=task.metric,
        n_pairs=len(task.pairs),
    )
    for number, (source, target, port) in enumerate(sorted(edges)):
        for name in (source, target):
            kind, layer, _ = model.wiring.component(name)
            circuit.add_component(name, kind=kind, layer=layer)
        circuit.add_effect(source, target, 1.0 if number else -1.0, port=port)
    bars = [Bar(name=f"{s} → {t}", value=score) for s, t, _, score in circuit.effects()]
    Bars(title="Effects", what="score", bars=bars).add_to(circuit)
    return circuit
