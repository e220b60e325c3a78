"""Which heads are moved most by the corruption, by the size of the change alone."""

from typing import Annotated

import circuitlab
from circuitlab import CircuitGraph, Site


@circuitlab.hookimpl
def register_analyses(register):
    register("head-norms", head_norms)


def head_norms(model, task, *, top: Annotated[int, "heads to keep"] = 5):
    """Score each head by how far corruption moves its output."""
    pairs = model.encode(task)
    sites = [Site("z", layer, h) for layer in range(model.n_layers) for h in range(model.n_heads)]
    clean, corrupt = (model.run(side, read=sites) for side in (pairs.clean, pairs.corrupt))
    moved = [(corrupt[site] - clean[site])[:, -1].norm(dim=-1).mean().item() for site in sites]
    circuit = CircuitGraph(score="L2 norm of the change of z at the last position, mean; no sign")
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    for score, site in sorted(zip(moved, sites, strict=True), reverse=True)[:top]:
        name = f"a{site.layer}.h{site.head}"
        circuit.add_component(name, kind="head", layer=site.layer, head=site.head)
        circuit.add_effect(name, "logits", score, kind="norm")
    return circuit
