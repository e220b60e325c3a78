"""The sample against which scores are held: strata, agreement, and the edges that scores miss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from circuitlab_edge_attribution import exact_check
from circuitlab_edge_attribution.exact_check import (
    Patched,
    Stratum,
    agreement,
    count_interval,
    draw,
    missed,
)
from hypothesis import given
from hypothesis import strategies as st

from circuitlab import Edge, build_circuit, edge_effects, load_model, zoo

EDGES = [Edge(f"a0.h{n}", "logits") for n in range(200)]


def ranked(scores: list[float]) -> dict[Edge, float]:
    return dict(zip(EDGES, scores, strict=False))


def test_strata_are_the_ranking_cut_by_score() -> None:
    """The strongest; then what carries all but a twentieth; then the rest, each edge once."""
    scores = [10.0] * 5 + [2.0] * 20 + [0.01] * 100
    top, middle, bottom = draw(ranked(scores), EDGES[:8], 4)
    assert (top.name, middle.name, bottom.name) == ("top", "middle", "bottom")
    assert top.drawn == tuple(EDGES[:4])
    # 4 x 10 in the top; 10 + 20 x 2 = 50 of 91 in the next 21, of which 95 % need the first 19.
    assert (top.size, middle.size, bottom.size) == (4, 20, 101)
    assert (top.outside, middle.outside, bottom.outside) == (0, 16, 101)
    assert len(middle.drawn) == len(bottom.drawn) == 2
    assert set(middle.drawn) <= set(EDGES[4:24])
    assert set(bottom.drawn) <= set(EDGES[24:125])


def test_what_one_stratum_lacks_the_other_gets() -> None:
    """A top that carries everything leaves no middle; all that is left to draw is drawn."""
    top, bottom = draw(ranked([1.0] + [0.0] * 12), EDGES[:1], 10)
    assert (top.size, bottom.size, len(bottom.drawn)) == (1, 12, 12)
    top, middle = draw(ranked([1.0] * 12), EDGES[:12], 6)
    assert (top.size, middle.size, len(middle.drawn)) == (6, 6, 6)


def test_every_edge_is_drawn_equally_often() -> None:
    """Sampling is uniform within a stratum: counts within five standard deviations of the mean."""
    torch.manual_seed(0)
    counts = dict.fromkeys(EDGES[2:40], 0)
    for _ in range(400):
        for edge in draw(ranked([50.0, 50.0] + [0.1] * 38), EDGES[:2], 2)[-1].drawn:
            counts[edge] += 1
    total = sum(counts.values())
    expected = total / len(counts)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def patched(
    values: list[tuple[float, float]], weights: list[int], kept: list[bool] | None = None
) -> list[Patched]:
    """Patched edges (score, exact) that stand for so many edges each."""
    return [
        Patched(edge, *value, inside, Stratum("bottom", weight, weight, (edge,)))
        for edge, value, weight, inside in zip(
            EDGES, values, weights, kept or [False] * len(values), strict=False
        )
    ]


NUMBERS = st.integers(-4, 4).map(float)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(1, 4)), min_size=1, max_size=8))
def test_weighted_agreement_is_that_of_repeated_edges(
    rows: list[tuple[float, float, int]],
) -> None:
    """An edge that stands for three counts as three equal ones do, each of weight 1."""
    values, weights = [row[:2] for row in rows], [row[2] for row in rows]
    repeated = [value for value, weight in zip(values, weights, strict=True) for _ in range(weight)]
    found, expected = (
        agreement(patched(values, weights)),
        agreement(patched(repeated, [1] * len(repeated))),
    )
    for key, value in expected.items():
        other = found[key]
        assert (value is None) == (other is None), key
        assert value is None or other is None or abs(value - other) < 1e-12, key


def test_agreement_by_hand() -> None:
    """Five edges whose numbers can be worked out on paper; the rounding one has no effect."""
    rows = [(-3.0, -6.0), (2.0, 3.0), (1.0, -1.0), (0.5, 1e-9), (0.0, 2.0)]
    found = agreement(patched(rows, [1] * 5))
    assert found["sign"] == 2 / 4
    assert found["sign_by_effect"] == pytest.approx(9 / 12)
    assert found["slope"] == pytest.approx((18 + 6 - 1) / (9 + 4 + 1 + 0.25))
    # Ranks of scores 0 4 3 2 1, of effects 0 4 1 2 3: Spearman 1 - 6 * 8 / (5 * 24).
    assert found["rank_correlation"] == pytest.approx(0.6)


def test_nothing_to_agree_on_is_undefined() -> None:
    """Without effects there is no sign, without spread no correlation, without scores no slope."""
    found = agreement(patched([(0.0, 0.0), (0.0, 0.0)], [1, 1]))
    assert found == dict.fromkeys(("sign", "sign_by_effect", "rank_correlation", "slope"))


def test_missed_estimate_is_unbiased_and_its_interval_holds_the_truth() -> None:
    """Over many samples the mean estimate is the number of missed edges; intervals cover it."""
    torch.manual_seed(1)
    n_edges, kept, verify, cutoff = 120, EDGES[:10], 10, 1.0
    scores = ranked([30.0] * 10 + [1.0] * 30 + [0.01] * 80)
    # Three of the middle and twelve of the bottom do more than the weakest score kept.
    effects = {edge: 2.0 if i in (11, 20, 39) or i >= 108 else 0.1 for i, edge in enumerate(scores)}
    estimates, covered, repeats = [], 0, 300
    for _ in range(repeats):
        strata = draw(scores, kept, verify)
        drawn = [
            Patched(edge, scores[edge], effects[edge], edge in kept, part)
            for part in strata
            for edge in part.drawn
        ]
        found = missed(strata, drawn, cutoff)
        estimates.append(found["estimate"])
        covered += found["interval"][0] <= 15 <= found["interval"][1]
        assert found["of"] == n_edges - 10
    spread = torch.tensor(estimates).double()
    assert abs(float(spread.mean()) - 15) < 4 * float(spread.std()) / repeats**0.5
    assert covered >= 0.95 * repeats


@pytest.mark.parametrize("size", [1, 7, 12])
def test_interval_covers_every_truth(size: int) -> None:
    """For each number of hits there may be, by adding up all samples, the error is kept."""
    for drawn in range(1, size + 1):
        bounds = [count_interval(size, drawn, hits, 0.05) for hits in range(drawn + 1)]
        for truth in range(size + 1):
            covered = math.fsum(
                math.comb(truth, hits) * math.comb(size - truth, drawn - hits)
                for hits, (low, high) in enumerate(bounds)
                if low <= truth <= high
            )
            assert covered / math.comb(size, drawn) >= 0.95 - 1e-12, (drawn, truth)


def test_interval_of_all_is_exact_and_of_few_is_wide() -> None:
    """Nothing is uncertain when all were drawn; five of a thousand say little."""
    assert count_interval(9, 9, 4, 0.05) == (4, 4)
    low, high = count_interval(1000, 5, 0, 0.05)
    assert low == 0
    assert 500 < high < 540  # the binomial's 1 - 0.025 ** (1 / 5) is 0.522
    assert count_interval(32_491, 500, 3, 0.05)[0] > 20


def test_sampled_edges_have_their_exact_effects() -> None:
    """The record of every patched edge is what patching it gives; only the circuit's get data."""
    circuit = build_circuit("greater-than", n_pairs=6, top=12, verify=6, seed=5)
    check: dict[str, Any] = circuit.graph["exact_check"]
    sampled = check["sampled"]
    model = load_model("greater-than")
    pairs = model.encode(next(t for t in zoo.tasks() if t.name == "greater-than").take(6))
    edges = [Edge(one["source"], one["target"], one["port"]) for one in sampled]
    assert len(set(edges)) == len(edges) == 12
    exact = edge_effects(model, pairs, edges).mean(1)
    for edge, one, effect in zip(edges, sampled, exact.tolist(), strict=True):
        assert abs(one["exact"] - effect) < 1e-4
        assert one["in_circuit"] == circuit.has_edge(*edge)
        if one["in_circuit"]:
            assert circuit.edges[edge]["exact"] == one["exact"]
            assert circuit.edges[edge]["score"] == one["score"]
    assert circuit.number_of_edges() == 12
    assert {one["stratum"] for one in sampled} == {"top", "middle", "bottom"}


def test_another_seed_draws_others() -> None:
    """The seed chooses the sample; the same seed the same."""
    drawn = [
        {tuple(map(str, one.values())) for one in build_circuit(
            "greater-than", n_pairs=4, verify=6, seed=seed
        ).graph["exact_check"]["sampled"]}
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_edges_that_the_gradient_does_not_see_are_counted() -> None:
    """In gate-jump four edges do as much as the one that has a score, and all were patched."""
    found = build_circuit("gate-jump").graph["exact_check"]["missed"]
    assert found["estimate"] == found["found"] == 4
    assert found["interval"] == [4, 4]
    assert found["patched"] == found["of"] == 12
    assert exact_check.CONFIDENCE == 0.95
