"""Selection: which edges are kept, in what order, and what is said when nothing decides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitlab import CircuitGraph, NumericsError, OptionError, Wiring, circuit_of
from circuitlab.selection import NEGLIGIBLE

WIRING = Wiring(1, 2)
SHAPE = (len(WIRING.sources), len(WIRING.receivers))
Named = dict[tuple[str, str, str], float]


def named(scores: Tensor) -> Named:
    """Score of every edge by name, enumerated apart from the code under test."""
    edges = {}
    for row, source in enumerate(WIRING.sources):
        for column, (target, port) in enumerate(WIRING.receivers):
            kinds = [WIRING.component(name) for name in (source, target)]
            rank = {"input": -1, "head": 0, "mlp": 1, "logits": 2}
            if rank[kinds[0].kind] < rank[kinds[1].kind]:
                edges[source, target, port] = float(scores[row, column])
    return edges


def kept(circuit: CircuitGraph) -> Named:
    return {(s, t, p): score for s, t, p, score in circuit.effects()}


def strongest(edges: Named) -> list[tuple[str, str, str]]:
    return sorted(edges, key=lambda edge: (-abs(edges[edge]), edge))


def distinct() -> Tensor:
    return torch.linspace(-1, 1.1, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e-3, -3.0]),
        min_size=math.prod(SHAPE),
        max_size=math.prod(SHAPE),
    ),
    top=st.integers(0, 30) | st.just("all"),
    threshold=st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.5, 9.0]),
)
def test_kept_are_the_strongest(
    values: list[float], top: int | str, threshold: float | None
) -> None:
    """The first of a plain sort by size and name, with ties, zeros, and k of any size."""
    scores = torch.tensor(values, dtype=torch.float64).view(SHAPE)
    edges = named(scores)
    circuit = circuit_of(WIRING, scores, top=top, threshold=threshold)  # type: ignore[arg-type]
    expected = [e for e in strongest(edges) if threshold is None or abs(edges[e]) >= threshold]
    if top != "all":
        expected = [edge for edge in expected if edges[edge] != 0][: int(top)]
    assert kept(circuit) == {edge: edges[edge] for edge in expected}
    circuit.validate()
    assert {"input", "logits"} <= set(circuit)
    ends = {name for edge in expected for name in edge[:2]}
    assert set(circuit) == ends | {"input", "logits"}
    assert circuit.graph["n_edges_total"] == WIRING.n_edges == len(edges)


@pytest.mark.parametrize(("top", "count"), [(0, 0), (1, 1), (12, 12), (10**6, None), ("all", None)])
def test_number_kept(top: int, count: int | None) -> None:
    """None for 0, all of them for a number above what there is."""
    circuit = circuit_of(WIRING, distinct(), top=top)
    assert circuit.number_of_edges() == (WIRING.n_edges if count is None else count)


def test_all_zero_is_said() -> None:
    """Zeros are not chosen among: a number keeps none, all keeps all, and both say so."""
    for top, count in ((5, 0), ("all", WIRING.n_edges)):
        circuit = circuit_of(WIRING, torch.zeros(SHAPE), top=top)  # type: ignore[arg-type]
        assert circuit.number_of_edges() == count
        (warning,) = circuit.graph["warnings"]
        assert "every score is zero" in warning


def test_rounding_is_not_an_effect() -> None:
    """Scores below a millionth of the strongest are dust; a number of edges does not reach them."""
    scores = torch.zeros(SHAPE, dtype=torch.float64)
    scores[0, 0], scores[0, 1], scores[0, 2] = 1.0, 0.9 * NEGLIGIBLE, 1.1 * NEGLIGIBLE
    assert circuit_of(WIRING, scores, top=5).number_of_edges() == 2
    assert circuit_of(WIRING, scores, top="all").number_of_edges() == WIRING.n_edges


def test_tie_at_the_cut_is_said() -> None:
    """Where the cut falls among equals, names decide and the circuit says how many tie."""
    scores = torch.zeros(SHAPE)
    scores[0, :5] = torch.tensor([1.0, -0.5, 0.5, 0.5, 0.25])
    circuit = circuit_of(WIRING, scores, top=2)
    (warning,) = circuit.graph["warnings"]
    assert warning == "3 edges tie at the cut (score 0.5); kept by name"
    assert set(kept(circuit)) == set(strongest(named(scores))[:2])
    for top in (1, 4, 5):
        assert "warnings" not in circuit_of(WIRING, scores, top=top).graph


def test_entries_that_are_no_edge_are_ignored() -> None:
    """What stands below the diagonal is never read, be it NaN or large."""
    scores = distinct()
    expected = kept(circuit_of(WIRING, scores))
    real = torch.zeros(SHAPE, dtype=torch.bool)
    for block in WIRING.blocks():
        real[: block.n_sources, block.receivers] = True
    assert not real.all()
    assert kept(circuit_of(WIRING, scores.masked_fill(~real, math.nan))) == expected
    assert kept(circuit_of(WIRING, scores.masked_fill(~real, 99.0))) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite(value: float) -> None:
    """The edge is named."""
    scores = distinct()
    column = [tuple(receiver) for receiver in WIRING.receivers].index(("a0.h1", "k"))
    scores[0, column] = value
    with pytest.raises(NumericsError, match=r"edge input->a0\.h1<k> has score (nan|-?inf)"):
        circuit_of(WIRING, scores, top=1)


def test_negative_options_are_refused() -> None:
    """A negative number of edges or threshold, or a NaN, is a mistake."""
    for options in ({"top": -1}, {"threshold": -0.1}, {"threshold": math.nan}):
        with pytest.raises(OptionError, match=rf"--{next(iter(options))} (-|nan)"):
            circuit_of(WIRING, distinct(), **options)  # type: ignore[arg-type]


def test_components_say_what_they_are() -> None:
    """Nodes carry the kind, layer and head of the wiring, in forward order."""
    circuit = circuit_of(WIRING, distinct())
    assert list(circuit) == [*WIRING.sources, "logits"]
    for name, data in circuit.nodes(data=True):
        component = WIRING.component(name)
        expected = {"kind": component.kind, "layer": component.layer}
        assert data == expected | ({} if component.head is None else {"head": component.head})
