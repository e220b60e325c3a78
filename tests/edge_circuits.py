"""Circuits of a small set of components with edges drawn at random."""

from __future__ import annotations

import random
from itertools import product

from circuitlab import CircuitGraph

NAMES = ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "logits"]
KINDS = {"input": "input", "a": "head", "m": "mlp", "logits": "logits"}
Edge = tuple[str, str, str]


def circuit_of(edges: dict[Edge, float], **facts: object) -> CircuitGraph:
    circuit = CircuitGraph(**facts)
    for name in NAMES:
        kind = KINDS.get(name) or KINDS[name[0]]
        circuit.add_component(name, kind=kind, layer=int(name.startswith("a1")))
    for (source, target, port), score in edges.items():
        circuit.add_effect(source, target, score, port=port)
    return circuit


def random_edges(seed: int, share: float = 0.5) -> dict[Edge, float]:
    draw = random.Random(seed)
    possible = [
        (NAMES[i], NAMES[j], port)
        for i, j, port in product(range(6), range(6), ("", "q", "k"))
        if i < j
    ]
    return {e: draw.choice((-2.0, -1.0, 0.5, 1.0)) for e in possible if draw.random() < share}
