"""Whether gradient scores may be presented as a circuit: completeness gap and exact check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitlab import Edge, edge_effects

if TYPE_CHECKING:
    from circuitlab import Ablation, CircuitGraph, EncodedTask, TracedModel
    from circuitlab_edge_attribution.attribution import Completeness

#: The scores must account for this share of the whole effect.
LEAST_EXPLAINED = 0.5
#: An edge is confirmed when its exact effect has the score's sign and this share of its size.
LEAST_EXACT = 0.1
#: Confirmed edges must carry this share of the absolute scores that were checked.
LEAST_CONFIRMED = 0.8


def judge(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    completeness: Completeness,
    ablation: Ablation,
    *,
    verify: int,
    batch_size: int | None,
) -> None:
    """Write the completeness gap, the exact check and the verdict into the circuit.

    ``graph["verdict"]`` is ``established``, ``not established`` (with ``verdict_reason``), or
    ``not checked`` when nothing was patched. Checked edges get ``exact`` and ``confirmed``.

    """
    share = completeness.share
    circuit.graph["completeness"] = {
        "effect": completeness.effect,
        "explained": completeness.explained,
        "gap": completeness.gap,
        "share": share,
        "at_clean": completeness.at_clean,
        "cuts": completeness.cuts,
    }
    confirmed = _check_strongest(circuit, model, pairs, ablation, verify, batch_size)
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


def _check_strongest(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    ablation: Ablation,
    verify: int,
    batch_size: int | None,
) -> float | None:
    """Patch the strongest edges; the share of their scores that is confirmed, None for no edges."""
    strongest = [effect for effect, _ in zip(circuit.effects(), range(verify), strict=False)]
    strongest = [effect for effect in strongest if effect[3] != 0]
    if not strongest:
        return None
    edges = [Edge(source, target, port) for source, target, port, _ in strongest]
    exact = edge_effects(model, pairs, edges, ablation=ablation, batch_size=batch_size).mean(1)
    total = good = 0.0
    n_confirmed = 0
    for (source, target, port, score), effect in zip(strongest, exact.tolist(), strict=True):
        confirmed = effect * score > 0 and abs(effect) >= LEAST_EXACT * abs(score)
        circuit.edges[source, target, port].update(exact=effect, confirmed=confirmed)
        total += abs(score)
        good += abs(score) * confirmed
        n_confirmed += confirmed
    circuit.graph["exact_check"] = {
        "checked": len(strongest),
        "confirmed": n_confirmed,
        "confirmed_share": good / total,
    }
    return good / total
