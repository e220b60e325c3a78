"""Stability: what resampling does to circuits whose scores are written down."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch
from torch import Tensor

import circuitlab
from circuitlab import CircuitGraph, NumericsError, OptionError
from circuitlab.evaluation.kept import kept_edges
from circuitlab.evaluation.stability import rediscovered, stability
from circuitlab.wiring import Edge, Receiver, Wiring

SMALL = Wiring(2, 2)
FIRST, SECOND, THIRD = SMALL.edges[0], SMALL.edges[5], SMALL.edges[-1]


def of_pairs(*pairs: dict[Edge, float]) -> Tensor:
    scores = torch.zeros(len(pairs), len(SMALL.sources), len(SMALL.receivers))
    for row, values in enumerate(pairs):
        for (source, target, port), value in values.items():
            column = SMALL.receiver_columns[Receiver(target, port)]
            scores[row, SMALL.source_rows[source], column] = value
    return scores


def cut(scores: Tensor, rows: list[int], top: int) -> CircuitGraph:
    return circuitlab.circuit_of(SMALL, scores[rows].double().mean(0), top=top)


def test_pairs_that_agree_give_one_circuit() -> None:
    """Where all pairs say the same, every resample has the circuit, and no other edge."""
    scores = of_pairs(*[{FIRST: -2.0, SECOND: 1.0, THIRD: 0.5}] * 6)
    found = stability(SMALL, {FIRST, SECOND}, scores, top=2)
    assert found.inclusion == {FIRST: 1.0, SECOND: 1.0}
    assert (found.recurring, found.jaccard) == (1.0, 1.0)
    assert (found.n_resamples, found.n_pairs) == (20, 6)


def test_chance_of_an_edge_that_one_pair_has() -> None:
    """Of two pairs that each have an edge of their own, the stronger is in 3 of 4 resamples."""
    scores = of_pairs({FIRST: 1.5}, {SECOND: 1.0})
    found = stability(SMALL, {FIRST}, scores, top=1, n_resamples=2000, seed=1)
    n, chance = 2000, 0.75
    error = 4 * (chance * (1 - chance) / n) ** 0.5
    assert found.inclusion[FIRST] == pytest.approx(chance, abs=error)
    assert found.inclusion[SECOND] == pytest.approx(1 - chance, abs=error)
    assert found.recurring == 0.0
    # Two resamples agree when both have the one or both the other.
    assert found.jaccard == pytest.approx(chance**2 + (1 - chance) ** 2, abs=2 * error)


def test_numbers_by_brute_force() -> None:
    """Inclusion, recurring edges and Jaccard are those of the circuits, found one by one."""
    torch.manual_seed(0)
    scores = torch.randn(8, len(SMALL.sources), len(SMALL.receivers)) + torch.linspace(0, 2, 15)
    kept = kept_edges(cut(scores, list(range(8)), 12), SMALL)
    rows: list[list[int]] = []

    def again(chosen: list[int]) -> CircuitGraph:
        rows.append(chosen)
        return cut(scores, chosen, 12)

    found = rediscovered(SMALL, kept, again, 8, n_resamples=10, seed=5)
    assert len(rows) == 10
    assert all(len(chosen) == 8 and {*chosen} <= {*range(8)} for chosen in rows)
    circuits = [kept_edges(cut(scores, chosen, 12), SMALL) for chosen in rows]
    for edge, share in found.inclusion.items():
        assert share == sum(edge in circuit for circuit in circuits) / 10
    assert {*found.inclusion} == kept.union(*circuits)
    often = [edge for edge in kept if sum(edge in circuit for circuit in circuits) >= 9]
    assert found.recurring == len(often) / 12
    overlaps = [len(a & b) / len(a | b) for a, b in combinations(circuits, 2)]
    assert found.jaccard == pytest.approx(sum(overlaps) / len(overlaps))
    assert 0 < found.recurring < 1


def test_cached_scores_and_the_analysis_agree() -> None:
    """Cutting cached scores gives what running again on the same pairs does, draw by draw."""
    torch.manual_seed(3)
    scores = torch.randn(6, len(SMALL.sources), len(SMALL.receivers))
    kept = kept_edges(cut(scores, list(range(6)), 9), SMALL)
    cached = stability(SMALL, kept, scores, top=9, seed=2)
    again = rediscovered(SMALL, kept, lambda rows: cut(scores, rows, 9), 6, seed=2)
    assert cached.inclusion == again.inclusion
    assert (cached.recurring, cached.jaccard) == (again.recurring, again.jaccard)
    assert cached.how != again.how


def test_threshold_cuts_as_the_circuit_did() -> None:
    """With a threshold, circuits grow and shrink with the scores."""
    scores = of_pairs({FIRST: 2.0, SECOND: 2.0}, {FIRST: 2.0})
    found = stability(SMALL, {FIRST, SECOND}, scores, threshold=1.5, n_resamples=200)
    assert found.inclusion[FIRST] == 1.0
    assert found.inclusion[SECOND] == pytest.approx(0.25, abs=0.13)
    assert found.recurring == 0.5


def test_inclusion_goes_onto_the_edges() -> None:
    """Each edge of the circuit gets its share; JSON lists edges that recur most first."""
    scores = of_pairs({FIRST: 1.5}, {SECOND: 1.0})
    circuit = cut(scores, [0, 1], 2)
    found = stability(SMALL, kept_edges(circuit, SMALL), scores, top=1)
    found.write(circuit)
    written = {
        Edge(*edge): data["inclusion"] for *edge, data in circuit.edges(keys=True, data=True)
    }
    assert written == found.inclusion
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["inclusion"][0] == {**FIRST._asdict(), "inclusion": found.inclusion[FIRST]}
    assert CircuitGraph.from_json(circuit.to_json()).edges(data=True) is not None


def test_empty_circuits() -> None:
    """A circuit without edges has no share that recurs; two empty circuits are the same."""
    found = stability(SMALL, set(), of_pairs({FIRST: 1.0}, {FIRST: 1.0}), threshold=5.0)
    assert (found.recurring, found.jaccard, found.inclusion) == (None, 1.0, {})


def test_what_cannot_be_resampled_is_refused() -> None:
    """One resample, one pair or none, and scores that are no numbers."""
    scores = of_pairs({FIRST: 1.0}, {FIRST: 1.0})
    with pytest.raises(OptionError, match="give 2 resamples or more"):
        stability(SMALL, {FIRST}, scores, n_resamples=1)
    for n_pairs in (0, 1):
        with pytest.raises(OptionError, match="and 2 pairs"):
            stability(SMALL, {FIRST}, scores[:n_pairs])
    with pytest.raises(NumericsError):
        stability(SMALL, {FIRST}, scores * torch.inf)
