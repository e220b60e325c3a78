"""Compare the gradient scores with brute force: every edge of a model patched on its own.

Run by hand; prints the tables of docs/scores.md. Arguments: model names, by default the page's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

import circuitlab
from circuitlab import zoo

METHODS = {
    "eap": {"method": "eap"},
    "eap-ig, 5 steps, left": {"ig_rule": "left"},
    "eap-ig, 5 steps, midpoint": {},
    "eap-ig, 20 steps, midpoint": {"ig_steps": 20},
}
STRONGEST = 20


def main(names: Sequence[str]) -> None:
    """Print one table for each model."""
    torch.set_num_threads(1)
    for name in names or ("ioi-mini", "induction", "greater-than", "docstring-mini"):
        compare(name)


def compare(name: str) -> None:
    """Print the agreement of every method with brute force on one bundled model."""
    model = circuitlab.load_model(name)
    started = time.perf_counter()
    exact, edges = brute_force(model)
    seconds = time.perf_counter() - started
    print(f"\n### {name}\n\n{len(edges)} edges, patched one by one in {seconds:.1f} s.\n")
    print(
        f"| method | explained | nearest clean | Spearman | wrong sign | of the effect "
        f"| found of {STRONGEST} | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for label, options in METHODS.items():
        started = time.perf_counter()
        circuit = circuitlab.build_circuit(model, None, top="all", verify=0, **options)
        seconds = time.perf_counter() - started
        scores = torch.tensor(
            [circuit.edges[source, target, port]["score"] for source, target, port in edges]
        )
        whole = circuit.graph["completeness"]
        wrong = torch.sign(scores) != torch.sign(exact)
        strongest = exact.abs().topk(STRONGEST).indices
        found = torch.isin(strongest, scores.abs().topk(STRONGEST).indices).sum()
        print(
            f"| {label} | {whole['share']:.0%} | {whole['at_clean'] / whole['effect']:.0%} "
            f"| {spearman(scores, exact):.2f} | {wrong.double().mean():.0%} "
            f"| {exact[wrong].abs().sum() / exact.abs().sum():.1%} | {found} | {seconds:.1f} |"
        )


def brute_force(model: circuitlab.TracedModel) -> tuple[torch.Tensor, list[circuitlab.Edge]]:
    """Exact effect of every edge, mean over pairs, ``[n_edges]``, and the edges."""
    edges = sorted(model.wiring.edges)
    task = next(task for task in zoo.tasks() if task.name == model.task_name)
    return circuitlab.edge_effects(model, model.encode(task), edges).mean(1).float(), edges


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of the signed scores; ties are rare enough to be broken by place."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main(sys.argv[1:])
