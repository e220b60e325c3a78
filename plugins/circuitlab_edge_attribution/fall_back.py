"""The fall-back: where gradient scores fail, edges are patched and the circuit is built anew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from circuitlab import Edge, circuit_of, edge_effects, patchers, track
from circuitlab_edge_attribution.exact_check import scores_of

if TYPE_CHECKING:
    from circuitlab import Ablation, CircuitGraph, EncodedTask, TracedModel

#: Work that exact patching may take, in edges x tokens x parameters. All edges of GPT-2 small on 8
#: pairs of 16 tokens are half of it, and take about 16 minutes on two cores.
AFFORDABLE = 1e15
#: The circuit's edges patched together must remove this share of the effect, and all others
#: patched together must spare it.
LEAST_JOINT = 0.5


def exact_circuit(
    failed: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    scores: Tensor,
    *,
    ablation: Ablation,
    top: int | Literal["all"],
    threshold: float | None,
    batch_size: int | None,
    affordable: float = AFFORDABLE,
) -> CircuitGraph:
    """The circuit by exact patching, in place of one whose gradient scores failed.

    All edges are patched where that is affordable; else half as many as are by their scores, and
    half between components with large effects of their own. Edges that were not patched are left
    out.

    Single edges know nothing of what edges do together, so the circuit is held against two joint
    patches, see :data:`LEAST_JOINT`. Only when both pass is the verdict ``established by exact
    patching``.

    Args:
        failed: The circuit of the gradient scores; what it says of itself is kept.
        model: Any traced model.
        pairs: The encoded task.
        scores: Gradient scores, ``[n_sources, n_receivers]``.
        ablation: What replaces a source's output.
        top: How many edges to keep.
        threshold: Keep edges of at least this absolute effect.
        batch_size: Pairs per pass; None chooses by memory.
        affordable: Work that patching may take, in edges x tokens x parameters.
    """
    wiring = model.wiring
    reason = failed.graph.get("verdict_reason", "jumps belong to no edge's score")
    work = len(pairs) * pairs.clean.ids.shape[1] * model.n_parameters
    n_edges = min(wiring.n_edges, max(1, int(affordable / work)))
    edges = list(wiring.edges)
    if n_edges < wiring.n_edges:
        edges = _candidates(model, pairs, scores, ablation, n_edges, batch_size)
    n_runs = f"{len(edges) * len(pairs):,}"
    title = f"scores failed: patching {len(edges):,} of {wiring.n_edges:,} edges in {n_runs} runs"
    for _ in track(range(1), title):
        pass
    exact = edge_effects(
        model, pairs, edges, ablation=ablation, batch_size=batch_size, stage="fall-back"
    )
    circuit = circuit_of(wiring, _matrix(model, edges, exact.mean(1)), top=top, threshold=threshold)
    circuit.remove_edges_from(
        [effect[:3] for effect in list(circuit.effects()) if Edge(*effect[:3]) not in set(edges)]
    )
    warnings = [*failed.graph.get("warnings", ()), *circuit.graph.get("warnings", ())]
    if len(edges) < wiring.n_edges:
        warnings.append(
            f"{wiring.n_edges - len(edges):,} of {wiring.n_edges:,} edges were not patched and are "
            f"not in the circuit; fewer prompts (--n-prompts) make more of them affordable"
        )
    kept = {**failed.graph, **circuit.graph}
    circuit.graph.update(kept, warnings=warnings)
    circuit.graph["method"] = f"exact patching of {len(edges):,} edges, after {kept['method']}"
    circuit.graph["fall_back"] = {"reason": reason, "patched": len(edges)}
    _judge_jointly(circuit, model, pairs, ablation, batch_size)
    return circuit


def joint_shares(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    ablation: Ablation,
    batch_size: int | None,
) -> tuple[float, float]:
    """Shares of the whole effect, means over pairs, by patching the circuit and all but it.

    Returns:
        What is removed when all edges of the circuit are patched together, and what is spared when
        all others are.
    """
    inside = {Edge(*effect[:3]) for effect in circuit.effects()}
    outside = [edge for edge in model.wiring.edges if edge not in inside]
    effect = removed = lost = 0.0
    for patcher in patchers(model, pairs, ablation=ablation, batch_size=batch_size):
        both = patcher.sets([inside, outside]) - patcher.base_score
        effect += float((patcher.other_score - patcher.base_score).sum())
        removed, lost = removed + float(both[0].sum()), lost + float(both[1].sum())
    return removed / effect, 1 - lost / effect


def _judge_jointly(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    ablation: Ablation,
    batch_size: int | None,
) -> None:
    removed, spared = joint_shares(circuit, model, pairs, ablation, batch_size)
    circuit.graph["joint_check"] = {"removed": removed, "spared": spared}
    reasons = []
    if removed < LEAST_JOINT:
        reasons.append(f"patched together its edges remove {_percent(removed)} of the effect")
    if spared < LEAST_JOINT:
        reasons.append(
            f"with all other edges patched {_percent(spared)} of the effect is left: edges may act "
            f"only together, which single edges do not show; run "
            f"circuitlab trace path-patching --mode both --gates"
        )
    circuit.graph.pop("verdict_reason", None)
    circuit.graph["verdict"] = "not established" if reasons else "established by exact patching"
    if reasons:
        circuit.graph["verdict_reason"] = "; ".join(reasons)


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"


def _matrix(model: TracedModel, edges: list[Edge], effects: Tensor) -> Tensor:
    wiring = model.wiring
    columns = {tuple(receiver): n for n, receiver in enumerate(wiring.receivers)}
    matrix = torch.zeros(len(wiring.sources), len(wiring.receivers), dtype=torch.float64)
    rows = [wiring.source_rows[edge.source] for edge in edges]
    matrix[rows, [columns[edge.target, edge.port] for edge in edges]] = effects
    return matrix


def _candidates(
    model: TracedModel,
    pairs: EncodedTask,
    scores: Tensor,
    ablation: Ablation,
    n_edges: int,
    batch_size: int | None,
) -> list[Edge]:
    """Edges to patch where not all can be, in the model's order.

    Half by absolute score, the rest by the smaller effect of the two components they join.
    """
    wiring, sizes = model.wiring, scores_of(model, scores.abs())
    nodes = _node_effects(model, pairs, ablation, batch_size)
    nodes["logits"] = math.inf

    chosen = set(sorted(wiring.edges, key=lambda edge: (-sizes[edge], edge))[: n_edges // 2])
    by_node = sorted(
        (edge for edge in wiring.edges if edge not in chosen),
        key=lambda edge: (-min(nodes[edge.source], nodes[edge.target]), -sizes[edge], edge),
    )
    chosen.update(by_node[: n_edges - len(chosen)])
    return [edge for edge in wiring.edges if edge in chosen]


def _node_effects(
    model: TracedModel, pairs: EncodedTask, ablation: Ablation, batch_size: int | None
) -> dict[str, float]:
    """Absolute effect of patching each component, mean over pairs."""
    effects = dict.fromkeys(model.wiring.sources, 0.0)
    for patcher in patchers(model, pairs, ablation=ablation, batch_size=batch_size):
        for source, difference in zip(effects, patcher.difference, strict=True):
            changed = patcher.scores(model.joins(source), difference[None])[0]
            effects[source] += float((changed - patcher.base_score).sum())
    return {source: abs(effect) / len(pairs) for source, effect in effects.items()}
