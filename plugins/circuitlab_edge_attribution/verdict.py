"""Whether gradient scores may be presented as a circuit: completeness gap and exact check."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from circuitlab_edge_attribution.exact_check import check

if TYPE_CHECKING:
    from circuitlab import Ablation, CircuitGraph, EncodedTask, TracedModel
    from circuitlab_edge_attribution.attribution import EdgeScores

#: The scores must account for this share of the whole effect.
LEAST_EXPLAINED = 0.5
#: Confirmed edges must carry this share of the absolute scores that were checked.
LEAST_CONFIRMED = 0.8


def judge(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    scored: EdgeScores,
    ablation: Ablation,
    *,
    verify: int,
    batch_size: int | None,
) -> None:
    """Write the completeness gap, the jumps, the exact check and the verdict into the circuit.

    ``graph["verdict"]`` is ``established``, ``not established`` (with ``verdict_reason``), or
    ``not checked`` when nothing was patched. The verdict looks at the strongest edges alone.
    """
    completeness = scored.completeness
    share = completeness.share
    circuit.graph["completeness"] = {
        "effect": completeness.effect,
        "explained": completeness.explained,
        "gap": completeness.gap,
        "share": share,
        "at_clean": completeness.at_clean,
        "cuts": completeness.cuts,
    }
    if scored.jumps is not None:
        _write_jumps(circuit, scored)
    confirmed = check(
        circuit, model, pairs, scored.scores, ablation, verify=verify, batch_size=batch_size
    )
    reasons = []
    if share is None:
        reasons.append("there is no effect to explain")
    elif share < LEAST_EXPLAINED:
        reasons.append(f"the scores explain {round(share, 2) + 0.0:.0%} of the effect")
    if confirmed is not None and confirmed < LEAST_CONFIRMED:
        reasons.append(f"patching confirms only {confirmed:.0%} of the strongest scores")
    circuit.graph["verdict"] = "established" if confirmed is not None else "not checked"
    if reasons:
        circuit.graph["verdict"] = "not established"
        circuit.graph["verdict_reason"] = "; ".join(reasons)


def _write_jumps(circuit: CircuitGraph, scored: EdgeScores) -> None:
    jumps, lost = scored.jumps or (), scored.lost_jumps
    circuit.graph["jumps"] = [asdict(jump) for jump in jumps]
    warnings = list(circuit.graph.get("warnings", ()))
    if lost:
        owners = sorted({jump.component or "a component that was not found" for jump in lost})
        warnings.append(
            f"{len(lost)} of {len(jumps)} jumps of the metric, at {', '.join(owners)}, belong to "
            f"no edge's score; patch exactly instead (--fall-back exact)"
        )
    if scored.unresolved:
        warnings.append(
            f"the adaptive path has more bends and jumps than its points resolve, pairs: "
            f"{scored.unresolved}; what is missing is in the completeness gap, and more --ig-steps "
            f"help"
        )
    if warnings:
        circuit.graph["warnings"] = warnings
