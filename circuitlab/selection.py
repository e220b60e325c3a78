"""From scores of every edge to the circuit of the strongest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from circuitlab.errors import NumericsError, OptionError
from circuitlab.graph import CircuitGraph
from circuitlab.wiring import Receiver

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.wiring import Wiring

#: Scores this much smaller than the largest are rounding, not effects.
NEGLIGIBLE = 1e-6


def check_cut(top: int | Literal["all"], threshold: float | None) -> None:
    """Refuse what :func:`circuit_of` would, before anything is scored.

    Raises:
        OptionError: ``top`` or ``threshold`` is negative.
    """
    if top != "all" and top < 0:
        raise OptionError(f"--top {top}: give a number of edges to keep, or all")
    if threshold is not None and not threshold >= 0:
        raise OptionError(f"--threshold {threshold}: scores are compared by size; give 0 or more")


def circuit_of(
    wiring: Wiring,
    scores: Tensor,
    *,
    top: int | Literal["all"] = "all",
    threshold: float | None = None,
) -> CircuitGraph:
    """The circuit of the strongest edges of a model.

    Args:
        wiring: The model's residual graph.
        scores: ``[n_sources, n_receivers]`` in the order of ``wiring``; entries that are no
            edge are ignored.
        top: How many edges to keep, by absolute score, ties by name; fewer when the others are zero
            to rounding (below a millionth of the strongest). ``all`` keeps every edge, zeros too.
        threshold: Keep edges of at least this absolute score; with ``top`` both hold.

    Returns:
        The circuit; ``graph["n_edges_total"]`` counts the model's edges, ``graph["warnings"]`` says
        when there was nothing to choose by. ``input`` and ``logits`` are always there.

    Raises:
        OptionError: ``top`` or ``threshold`` is negative.
        NumericsError: a score is NaN or infinite; names the edge.
    """
    check_cut(top, threshold)
    edges = _ranked(wiring, scores)
    largest = abs(edges[0][0]) if edges else 0.0
    warnings = []
    kept = edges
    if threshold is not None:
        kept = [edge for edge in kept if abs(edge[0]) >= threshold]
    if top != "all":
        kept = [edge for edge in kept if abs(edge[0]) > NEGLIGIBLE * largest]
        if 0 < top < len(kept) and abs(kept[top - 1][0]) == abs(kept[top][0]):
            tied = sum(abs(edge[0]) == abs(kept[top][0]) for edge in kept)
            warnings.append(
                f"{tied} edges tie at the cut (score {abs(kept[top][0]):.3g}); kept by name"
            )
        kept = kept[:top]
    if largest == 0:
        warnings.append("every score is zero: nothing distinguishes one edge from another")
    return _graph(wiring, kept, warnings)


def _ranked(wiring: Wiring, scores: Tensor) -> list[tuple[float, str, str, str]]:
    """(score, source, target, port) of every edge, strongest first, ties by name."""
    source_rows, columns, rows = wiring.source_rows, wiring.receiver_columns, scores.tolist()
    edges = [
        (rows[source_rows[source]][columns[Receiver(target, port)]], source, target, port)
        for source, target, port in wiring.edges
    ]
    for score, source, target, port in edges:
        if not abs(score) < float("inf"):
            raise NumericsError(
                f"edge {source}->{target}{f'<{port}>' if port else ''} has score {score}; "
                f"run in a wider type (--dtype float32)"
            )
    return sorted(edges, key=lambda edge: (-abs(edge[0]), edge[1:]))


def _graph(
    wiring: Wiring, edges: list[tuple[float, str, str, str]], warnings: list[str]
) -> CircuitGraph:
    circuit = CircuitGraph()
    used = {"input", "logits"} | {name for edge in edges for name in edge[1:3]}
    for name in (*wiring.sources, "logits"):
        if name in used:
            kind, layer, head = wiring.component(name)
            data = {} if head is None else {"head": head}
            circuit.add_component(name, kind=kind, layer=layer, **data)
    for score, source, target, port in edges:
        circuit.add_effect(source, target, score, port=port)
    circuit.graph["n_edges_total"] = wiring.n_edges
    if warnings:
        circuit.graph["warnings"] = warnings
    return circuit
