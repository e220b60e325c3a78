"""Discrimination: areas and precisions by brute force, and on models whose circuit is known."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitlab
from circuitlab import GraphError, NumericsError, zoo
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.discrimination import discrimination
from circuitlab.evaluation.kept import kept_edges
from circuitlab.evaluation.random_circuits import shares
from circuitlab.registry import Registry
from circuitlab.wiring import Edge, Receiver, Wiring

SMALL = Wiring(2, 2)
GATES = ("gate-and", "gate-or", "gate-add", "gate-xor", "gate-jump")


def placed(wiring: Wiring, values: dict[Edge, float]) -> Tensor:
    scores = torch.zeros(len(wiring.sources), len(wiring.receivers))
    for (source, target, port), value in values.items():
        column = wiring.receiver_columns[Receiver(target, port)]
        scores[wiring.source_rows[source], column] = value
    return scores


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_area_and_precision_by_brute_force(levels: int) -> None:
    """Over all pairs of a known and another edge, and all thresholds, with ties and without."""
    torch.manual_seed(levels)
    draws = (torch.randint(levels, (SMALL.n_edges,)) - levels // 2).tolist()
    values = dict(zip(SMALL.edges, draws, strict=True))
    known = [edge for n, edge in enumerate(SMALL.edges) if n % 4 == 0]
    others = [edge for edge in SMALL.edges if edge not in known]
    won = [
        1.0 if abs(values[a]) > abs(values[b]) else 0.5 * (abs(values[a]) == abs(values[b]))
        for a, b in product(known, others)
    ]
    precisions = []
    for edge in known:
        above = [other for other in SMALL.edges if abs(values[other]) >= abs(values[edge])]
        precisions.append(sum(other in known for other in above) / len(above))
    found = discrimination(SMALL, placed(SMALL, values), known)
    assert found.auroc == pytest.approx(sum(won) / len(won))
    assert found.average_precision == pytest.approx(sum(precisions) / len(precisions))
    assert (found.n_known, found.n_edges) == (len(known), SMALL.n_edges)


def test_ends_of_the_scale() -> None:
    """A perfect ranking has 1, the reverse 0, equal scores 0.5, and rounding is no ranking."""
    known = SMALL.edges[:5]
    size = {edge: 1.0 if edge in known else 0.5 for edge in SMALL.edges}
    assert discrimination(SMALL, -placed(SMALL, size), known).auroc == 1.0
    turned = placed(SMALL, {edge: 2 - value for edge, value in size.items()})
    assert discrimination(SMALL, turned, known).auroc == 0.0
    assert discrimination(SMALL, torch.ones_like(turned), known).auroc == 0.5
    noise = {edge: 1e-9 * (edge in known) for edge in SMALL.edges} | {SMALL.edges[-1]: 1.0}
    n_other = SMALL.n_edges - 5
    expected = (n_other - 1) / n_other / 2
    assert discrimination(SMALL, placed(SMALL, noise), known).auroc == pytest.approx(expected)


def test_bad_knowledge_is_refused() -> None:
    """Edges that are none of the model's, no edges, all edges, and NaN."""
    scores = torch.ones(len(SMALL.sources), len(SMALL.receivers))
    with pytest.raises(GraphError, match=r"a9\.h9 → logits is none of this model's"):
        discrimination(SMALL, scores, [Edge("a9.h9", "logits")])
    for known in ([], SMALL.edges):
        with pytest.raises(GraphError, match="a ranking needs some, and others"):
            discrimination(SMALL, scores, known)
    with pytest.raises(NumericsError, match="has score nan"):
        discrimination(SMALL, scores * torch.nan, SMALL.edges[:2])


def mean_scores(name: str, analysis: str, n_pairs: int = 16, **options: Any) -> Tensor:
    model, registry = circuitlab.load_model(name), Registry.load()
    of_pairs = registry.analysis(analysis).pair_scores
    assert of_pairs is not None
    scores: Tensor = of_pairs(model, model.encode(registry.task(name).take(n_pairs)), **options)
    return scores.mean(0)


def moving(name: str) -> set[Edge]:
    """Edges of a gate that carry something else on the corrupt prompt: all but queries and keys."""
    known = {Edge(*edge) for edge in zoo.known_edges(name)}
    return {edge for edge in known if edge.port not in ("q", "k")}


@pytest.mark.parametrize(
    "name",
    [*GATES, "hand-induction", "hand-duplicate", "hand-and", "hand-planted", "hand-interference"],
)
def test_exact_patching_ranks_perfectly(name: str) -> None:
    """Patching each edge into the clean run puts all edges that have an effect first."""
    wiring = circuitlab.load_model(name).wiring
    known = zoo.known_edges(name, sense="effective")
    found = discrimination(wiring, mean_scores(name, "path-patching", mode="noise"), known)
    assert found.auroc == found.average_precision == 1.0


@pytest.mark.parametrize("name", GATES)
def test_which_direction_finds_a_gate(name: str) -> None:
    """Into the clean run an AND is found, into the corrupt run an OR, and both ways every gate."""
    wiring = circuitlab.load_model(name).wiring
    area = {
        mode: discrimination(
            wiring, mean_scores(name, "path-patching", mode=mode), moving(name)
        ).auroc
        for mode in ("noise", "denoise", "both")
    }
    # One edge of five, m0 to logits, and four that tie with all others.
    blind = 1 / 5 + 4 / 5 / 2
    expected = {"noise": 1.0, "denoise": 1.0, "both": 1.0}
    if name in ("gate-and", "gate-jump"):
        expected["denoise"] = blind
    if name == "gate-or":
        expected["noise"] = blind
    assert area == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "known", "area"),
    [
        ("gate-jump", "effective", 0.6),
        ("gate-or", "moving", 0.6),
        ("hand-induction", "effective", 2 / 3),
    ],
)
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_what_gradients_miss_is_seen(name: str, known: str, area: float, method: str) -> None:
    """Where a gradient is 0 the ranking is worse than 1, and the circuit keeps nothing."""
    model = circuitlab.load_model(name)
    true = moving(name) if known == "moving" else zoo.known_edges(name, sense="effective")
    scores = mean_scores(name, "edge-attribution", method=method)
    assert discrimination(model.wiring, scores, true).auroc == pytest.approx(area)
    runs = CircuitRuns(model, model.encode(Registry.load().task(name).take(16)))
    circuit = circuitlab.circuit_of(model.wiring, scores, top=len(true))
    assert shares(runs, runs.metric([kept_edges(circuit, model.wiring)])) == pytest.approx([0.0])
    assert shares(runs, runs.metric([{Edge(*edge) for edge in true}])) == pytest.approx([1.0])


@pytest.mark.parametrize("name", ["gate-jump", "hand-induction"])
def test_jumps_shared_out_are_seen_too(name: str) -> None:
    """Where eap-ig follows its path adaptively, the same models are ranked perfectly."""
    model = circuitlab.load_model(name)
    scores = mean_scores(name, "edge-attribution", ig_rule="adaptive")
    known = zoo.known_edges(name, sense="effective")
    assert discrimination(model.wiring, scores, known).auroc == 1.0


def test_one_effective_edge_is_no_circuit() -> None:
    """On gate-or the clean run shows one effective edge, ranked perfectly, that keeps nothing."""
    model = circuitlab.load_model("gate-or")
    task = Registry.load().task("gate-or")
    runs = CircuitRuns(model, model.encode(task))
    scores = {
        mode: mean_scores("gate-or", "path-patching", mode=mode) for mode in ("noise", "both")
    }
    kept = [
        kept_edges(circuitlab.circuit_of(model.wiring, part, top=5), model.wiring)
        for part in scores.values()
    ]
    assert [len(edges) for edges in kept] == [1, 5]
    assert shares(runs, runs.metric(kept)) == pytest.approx([0.0, 1.0])
