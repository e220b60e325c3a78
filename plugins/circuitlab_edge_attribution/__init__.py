"""Edge attribution: the default analysis. Every edge scored by gradients, the strongest checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import circuitlab

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from circuitlab import CircuitGraph, EncodedTask, Task, TracedModel


@circuitlab.hookimpl
def register_analyses(register: Callable[..., None]) -> None:
    """Offer ``edge-attribution``."""
    register(
        "edge-attribution",
        edge_attribution,
        shards={"ig_rule": ("midpoint", "left")},
        pair_scores=scores_by_pair,
    )


def scores_by_pair(model: TracedModel, pairs: EncodedTask, **options: Any) -> Tensor:
    """Scores of each pair, ``[n_pairs, n_sources, n_receivers]``; their mean are the analysis's."""
    from circuitlab_edge_attribution.pair_scores import pair_scores

    return pair_scores(model, pairs, **options)


def edge_attribution(
    model: TracedModel,
    task: Task,
    *,
    method: Annotated[
        Literal["eap", "eap-ig"], "gradient at the clean prompt, or averaged along a path to it"
    ] = "eap-ig",
    ig_steps: Annotated[int, "points on the path of eap-ig"] = 5,
    ig_rule: Annotated[
        Literal["midpoint", "left", "adaptive"],
        "where they lie; left is what the code of EAP-IG does, adaptive adds points and shares "
        "jumps out where the gradient misses a change",
    ] = "midpoint",
    ablation: Annotated[
        Literal["counterfactual", "zero", "mean"], "what replaces an ablated component's output"
    ] = "counterfactual",
    top: Annotated[int | Literal["all"], "edges to keep, by absolute score"] = 40,
    threshold: Annotated[float | None, "keep edges of at least this absolute score"] = None,
    verify: Annotated[
        int, "strongest edges to check by patching each one, and as many of the others; 0 for none"
    ] = 10,
    fall_back: Annotated[
        Literal["none", "exact"], "where the scores fail: score edges by patching each one instead"
    ] = "none",
    batch_size: Annotated[int | Literal["auto"], "pairs per pass"] = "auto",
) -> CircuitGraph:
    """Score every edge by EAP or EAP-IG; say what the scores miss; patch the strongest to check.

    Syed et al. 2023 (arXiv:2310.10348), Hanna et al. 2024 (arXiv:2403.17806).
    """
    from circuitlab_edge_attribution.attribution import edge_scores
    from circuitlab_edge_attribution.fall_back import exact_circuit
    from circuitlab_edge_attribution.verdict import judge

    circuitlab.check_cut(top, threshold)
    if verify < 0:
        raise circuitlab.OptionError(f"--verify {verify}: give how many edges to check, 0 for none")
    pairs, size = model.encode(task), None if batch_size == "auto" else batch_size
    with circuitlab.sharded():
        scored = edge_scores(
            model, pairs, method=method, ig_steps=ig_steps, ig_rule=ig_rule, ablation=ablation,
            batch_size=size, stage="attribution",
        )  # fmt: skip
    circuit = circuitlab.circuit_of(model.wiring, scored.scores, top=top, threshold=threshold)
    how = method if method == "eap" else f"{method}, {ig_steps} steps, {ig_rule}"
    circuit.graph.update(method=how, ablation=ablation)
    judge(circuit, model, pairs, scored, ablation, verify=verify, batch_size=size)
    failed = scored.lost_jumps or circuit.graph["verdict"] == "not established"
    if fall_back == "none" or not failed or not scored.completeness.effect:
        return circuit
    return exact_circuit(
        circuit, model, pairs, scored.scores, ablation=ablation, top=top, threshold=threshold,
        batch_size=size,
    )  # fmt: skip
