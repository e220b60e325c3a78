"""Sensitivity: how much faithfulness turns on what is ablated, at which level, and which way.

Faithfulness depends strongly on these choices (Miller et al. 2024, arXiv:2407.08734), so a single
number means little without the others beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch

from circuitlab.ablation import Ablation
from circuitlab.errors import CircuitLabError
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.faithfulness import Faithfulness, faithfulness
from circuitlab.evaluation.kept import Level, kept_edges, kept_nodes
from circuitlab.patcher import patchers
from circuitlab.progress import track

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph
    from circuitlab.model import TracedModel
    from circuitlab.prompts import EncodedTask
    from circuitlab.wiring import Edge


def sensitivity(
    model: TracedModel,
    pairs: EncodedTask,
    circuit: CircuitGraph,
    *,
    ablations: Sequence[Ablation] = get_args(Ablation),
    seed: int = 0,
    resamples: int = 2000,
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Faithfulness of a circuit under every ablation, at both levels, and restored as well.

    Args:
        model: The model the circuit is of.
        pairs: What it is scored on.
        circuit: The circuit.
        ablations: What stands outside the circuit instead.
        seed: Of the resamples.
        resamples: How many are drawn.
        batch_size: Pairs per pass; None chooses by memory.

    Returns:
        One row each, plain JSON: ``ablation``, ``level``, ``direction`` and the fields of
        :class:`Faithfulness`. ``noise``: all outside the circuit is ablated in the clean run;
        ``denoise``: all inside carries what it writes on the clean prompt, in the corrupt run.
        Where it cannot be measured ``value`` is None, and ``reason`` says why.
    """
    rows = []
    ways = [(ablation, level) for ablation in ablations for level in get_args(Level)]
    for ablation, level in track(ways, "ablations and levels"):
        found: Faithfulness | str
        try:
            runs = CircuitRuns(model, pairs, ablation=ablation, level=level, batch_size=batch_size)
            kept = _kept(circuit, model, level)
            metric = runs.metric([kept])[0]
            found = faithfulness(metric, runs.whole, runs.empty, seed=seed, resamples=resamples)
        except CircuitLabError as error:
            found = str(error)
        rows.append(_row(ablation, level, "noise", found))
        if ablation == "counterfactual":
            try:
                found = _restored(
                    model, pairs, circuit, level,
                    seed=seed, resamples=resamples, batch_size=batch_size,
                )  # fmt: skip
            except CircuitLabError as error:
                found = str(error)
            rows.append(_row(ablation, level, "denoise", found))
    return rows


def _restored(
    model: TracedModel,
    pairs: EncodedTask,
    circuit: CircuitGraph,
    level: Level,
    *,
    seed: int,
    resamples: int,
    batch_size: int | None,
) -> Faithfulness:
    kept = _kept(circuit, model, level)
    parts = []
    for patcher in patchers(model, pairs, mode="denoise", batch_size=batch_size):
        edges: set[Edge] = {
            edge
            for part in kept
            for edge in (patcher.out_edges(part) if isinstance(part, str) else [part])
        }
        scores = patcher.sets([edges])[0]
        parts.append(torch.stack([scores, patcher.other_score, patcher.base_score]))
    metric, clean, corrupt = torch.cat(parts, 1).cpu()
    return faithfulness(metric, clean, corrupt, seed=seed, resamples=resamples)


def _kept(circuit: CircuitGraph, model: TracedModel, level: Level) -> frozenset[Any]:
    keep = kept_edges if level == "edge" else kept_nodes
    return keep(circuit, model.wiring)


def _row(ablation: str, level: str, direction: str, found: Faithfulness | str) -> dict[str, Any]:
    measured = {"value": None, "reason": found} if isinstance(found, str) else found.to_json()
    return {"ablation": ablation, "level": level, "direction": direction, **measured}
