"""Annotating: the roles of the heads that a finished circuit holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from circuitlab import GraphError
from circuitlab_attention_heads.roles import find_roles

if TYPE_CHECKING:
    from circuitlab import CircuitGraph, Task, TracedModel

_HEAD = re.compile(r"a(\d+)\.h(\d+)(\[-?\d+\])?")


def annotate(circuit: CircuitGraph, model: TracedModel, task: Task | None) -> None:
    """Put ``role``, ``roles``, ``role_scores`` and ``n_eff`` on the heads of a circuit, in place.

    Heads at one position, ``a1.h0[3]``, get those of the head. A head that has ``role_scores``
    keeps what it has. ``graph["roles"]`` says how they were measured, and ``graph["findings"]``
    gets a line for each role, where none of that name is there.

    Args:
        circuit: Any circuit of this model.
        model: The model.
        task: Not used: roles are measured on random tokens.

    Raises:
        GraphError: a head of the circuit is none of the model.
    """
    places = {}
    for name, data in circuit.nodes(data=True):
        if data.get("kind") == "head" and "role_scores" not in data:
            places[name] = _place(name, model)
    if not places:
        return
    table = find_roles(model)
    for name, place in places.items():
        circuit.nodes[name].update(table.of(*place))
    circuit.graph.setdefault("roles", dict(table.facts))
    findings = circuit.graph.setdefault("findings", {})
    for label, text in table.findings(set(places.values())).items():
        findings.setdefault(label, text)


def _place(name: str, model: TracedModel) -> tuple[int, int]:
    """Layer and head of a component."""
    match = _HEAD.fullmatch(name)
    place = (int(match[1]), int(match[2])) if match else (-1, -1)
    if not (0 <= place[0] < model.n_layers and 0 <= place[1] < model.n_heads):
        raise GraphError(
            f"component {name!r} is no head of model {model.name!r}, of {model.n_layers} "
            f"layers with {model.n_heads} heads; annotate a circuit with its own model"
        )
    return place
