"""Comparing circuits: sets by brute force, rank correlation by another definition, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from edge_circuits import circuit_of, random_edges
from hypothesis import given
from hypothesis import strategies as st

import circuitlab
from circuitlab import CircuitGraph, GraphError, OptionError, compare_circuits
from circuitlab.comparing import kept_edges, rank_correlation
from circuitlab.layout import OWNED
from circuitlab.render import svg


def naive_spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of ranks, each rank counted one by one."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(o == value for o in values) + 1) / 2
            for value in values
        ]

    a, b = ranks(x), ranks(y)
    n = len(x)
    if n == 0:
        return None
    ma, mb = sum(a) / n, sum(b) / n
    top = sum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True))
    below = sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b)
    return top / math.sqrt(below) if below > 0 else None


# --- rank correlation -----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=30))
def test_rank_correlation_is_that_of_counted_ranks(pairs: list[tuple[int, int]]) -> None:
    """Many ties on both sides; undefined where one side is all the same."""
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found, expected = rank_correlation(x, y), naive_spearman(x, y)
    assert (found is None) == (expected is None)
    assert found == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_without_ties_by_the_textbook() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)); only ranks count, and the sign of a reversal."""
    x = [3.0, -1.0, 7.0, 100.0, 5.0]
    y = [1.0, 2.0, 30.0, 4.0, 5.0]
    ranks = ([2, 1, 4, 5, 3], [1, 2, 5, 3, 4])
    d2 = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * d2 / (5 * 24))
    assert rank_correlation(x, [v**3 for v in x]) == 1.0
    assert rank_correlation(x, [-v for v in x]) == -1.0


def test_rank_correlation_needs_pairs() -> None:
    """Values without partners are refused; none or one is undefined."""
    with pytest.raises(OptionError, match="2 values and 1"):
        rank_correlation([1.0, 2.0], [1.0])
    assert rank_correlation([], []) is None
    assert rank_correlation([1.0], [2.0]) is None


# --- sets and scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_sets_and_scores_by_brute_force(seed: int) -> None:
    """Every number of a comparison, from Python sets alone."""
    first, second = random_edges(seed), random_edges(seed + 100, 0.4)
    found = compare_circuits(circuit_of(first), circuit_of(second))
    assert set(found.only_a) == first.keys() - second.keys()
    assert set(found.both) == first.keys() & second.keys()
    assert set(found.only_b) == second.keys() - first.keys()
    assert found.jaccard == len(first.keys() & second.keys()) / len(first.keys() | second.keys())
    union = sorted(first.keys() | second.keys())
    assert found.scores == {e: (first.get(e), second.get(e)) for e in union}
    shared = [e for e in union if e in first and e in second]
    assert found.rank_correlation_common == pytest.approx(
        naive_spearman([first[e] for e in shared], [second[e] for e in shared])
    )
    assert found.rank_correlation_union == pytest.approx(
        naive_spearman([first.get(e, 0.0) for e in union], [second.get(e, 0.0) for e in union])
    )
    assert set(found.sign_disagreements) == {e for e in shared if first[e] * second[e] < 0}
    ends = [{end for edge in edges for end in edge[:2]} for edges in (first, second)]
    a, b = ends
    assert found.components == (len(a - b), len(a & b), len(b - a))


def test_top_overlap_is_the_share_of_the_strongest() -> None:
    """By absolute score, ties by name; only for as many edges as both have."""
    names = [("input", "logits", str(i)) for i in range(12)]
    first = {edge: float(-20 + i) for i, edge in enumerate(names)}
    second = {edge: float(5 + (i * 7) % 12) for i, edge in enumerate(names)}
    found = compare_circuits(circuit_of(first), circuit_of(second)).top_overlap
    assert set(found) == {5, 10}
    for k, share in found.items():
        tops = [sorted(s, key=lambda e: -abs(s[e]))[:k] for s in (first, second)]
        assert share == len({*tops[0]} & {*tops[1]}) / k


def test_effects_that_are_not_kept_are_no_edges_but_have_scores() -> None:
    """``kept=False`` counts neither in the sets nor in the overlap; its score is in the table."""
    edge, other = ("input", "m0", ""), ("m0", "logits", "")
    first, second = circuit_of({edge: -1.0, other: 2.0}), circuit_of({edge: -3.0})
    second.add_effect(*other[:2], 0.25, kept=False)
    found = compare_circuits(first, second)
    assert (found.only_a, found.both, found.only_b) == ((other,), (edge,), ())
    assert found.scores[other] == (2.0, 0.25)
    assert list(kept_edges(second)) == [edge]


def test_a_circuit_is_like_itself() -> None:
    """Jaccard and rank correlation 1, nothing differs, no sign disagrees."""
    circuit = circuit_of(random_edges(3), model="m", task="t")
    found = compare_circuits(circuit, circuit.copy())
    assert (found.jaccard, found.rank_correlation_union) == (1.0, pytest.approx(1.0))
    assert (found.only_a, found.only_b, found.sign_disagreements) == ((), (), ())
    assert found.comparable
    assert found.differences == ()


def test_empty_circuits_have_no_numbers() -> None:
    """What is undefined is None, and null in the JSON."""
    found = compare_circuits(CircuitGraph(), CircuitGraph())
    assert (found.jaccard, found.rank_correlation_common) == (None, None)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["jaccard"] is None
    assert document["rank_correlation"] == {"common": None, "union": None}


# --- what may be compared -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layers", 3), ("n_heads", 8), ("d_model", 512), ("parallel", True)],
)
def test_models_of_different_shape_are_refused(key: str, value: object) -> None:
    """The message names both values, and following its remedy compares names alone."""
    shape = {"n_layers": 2, "n_heads": 4, "d_model": 64, "parallel": False}
    first = circuit_of(random_edges(1), **shape)
    second = circuit_of(random_edges(2), **{**shape, key: value})
    with pytest.raises(GraphError, match=rf"{key} is {shape[key]} in A, {value} in B.*names_only"):
        compare_circuits(first, second)
    found = compare_circuits(first, second, names_only=True)
    assert found.scores == {}
    assert found.rank_correlation_union is None
    assert found.top_overlap == {}
    assert set(found.both) == random_edges(1).keys() & random_edges(2).keys()


@pytest.mark.parametrize(
    ("key", "comparable"),
    [
        ("model", False), ("task", False), ("task_digest", False), ("metric", False),
        ("ablation", False), ("score", False), ("method", True), ("analysis", True),
    ],
)  # fmt: skip
def test_what_differs_is_said(key: str, comparable: bool) -> None:
    """Scores of another task, metric, ablation or meaning are not comparable; of a method, yes.

    In the picture they are then shares of their circuit's largest.
    """
    edges = random_edges(5)
    first = circuit_of(edges, **{key: "this"})
    second = circuit_of({edge: 10 * score for edge, score in edges.items()}, **{key: "that"})
    found = compare_circuits(first, second)
    assert found.differences == (f"{key}: this | that",)
    assert found.comparable is comparable
    assert ("NOT comparable" in found.lines().get("scores", "")) is not comparable
    largest = max(abs(score) for *_, score in found.circuit.effects())
    assert largest == (2.0 if comparable else 1.0)
    assert ("share of the largest" in found.circuit.graph.get("score", "")) is not comparable


def test_names_say_what_sets_circuits_apart() -> None:
    """By default A and B with what differs; others where they are given."""
    first, second = circuit_of({}, model="gpt2", task="ioi"), circuit_of({}, model="gpt2", task="x")
    assert compare_circuits(first, second).names == ("A · ioi", "B · x")
    assert compare_circuits(first, second, names=("u", "v")).names == ("u", "v")


@pytest.mark.parametrize("names_only", [False, True])
def test_an_edge_is_not_a_total_effect_of_that_name(names_only: bool) -> None:
    """Compared or overlaid: the message names the effect and both kinds; one kind is no matter."""
    edges = {("input", "m0", ""): -2.0, ("m0", "logits", ""): -1.0}
    first, second = circuit_of(edges), circuit_of(edges)
    second.edges["m0", "logits", ""]["kind"] = "total"
    fact = "'m0 → logits' is of kind 'edge' in {}, 'total' in {}"
    with pytest.raises(GraphError, match=fact.format("A", "B")):
        compare_circuits(first, second, names_only=names_only)
    with pytest.raises(GraphError, match=fact.format("x", "y")):
        circuitlab.overlay_circuits({"x": first, "y": second})
    with pytest.raises(GraphError, match=fact.format("first", "second")):
        circuitlab.join_circuits(first, second, at="m0")
    assert compare_circuits(second, second).jaccard == 1.0


# --- what is shown --------------------------------------------------------------------------------


def test_picture_has_three_colours_and_a_legend() -> None:
    """Each edge in the colour and dash of where it is, told once each in the legend."""
    first, second = random_edges(1), random_edges(2)
    found = compare_circuits(circuit_of(first), circuit_of(second), names=("one", "two"))
    for source, target, port, data in found.circuit.edges(keys=True, data=True):
        edge = (source, target, port)
        expected = {(True, True): "both", (True, False): "a", (False, True): "b"}
        assert data["in"] == expected[edge in first, edge in second]
        assert data.get("score_a") == first.get(edge)
        assert data.get("score_b") == second.get(edge)
    root = ElementTree.fromstring(svg(found.circuit))
    space = "{http://www.w3.org/2000/svg}"
    shown: dict[tuple[str, str | None], int] = {}
    for group in root.iter(f"{space}g"):
        if group.get("class") == "edge" and group.find(f"{space}title") is not None:
            path = group.find(f"{space}path")
            assert path is not None
            key = (str(path.get("stroke")), path.get("stroke-dasharray"))
            shown[key] = shown.get(key, 0) + 1
    assert shown == {
        (OWNED["a"][0], "5,3"): len(found.only_a),
        (OWNED["b"][0], "1.5,2.5"): len(found.only_b),
        (OWNED["both"][0], None): len(found.both),
    }
    words = [text.text for text in root.iter(f"{space}text")]
    assert [words.count(w) for w in ("only one", "only two", "both")] == [1, 1, 1]
    assert not any("helps the task" in str(word) for word in words)


def luminance(colour: str) -> float:
    """Relative luminance, 0 to 1, by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_differ_without_colour_vision() -> None:
    """In grey the two circuits' colours differ from what both have, and dashes tell all three."""
    grey = {owner: luminance(colour) for owner, (colour, _) in OWNED.items()}
    assert min(grey["a"], grey["b"]) > 4 * grey["both"]
    assert len({dash for _, dash in OWNED.values()}) == 3


def test_notebook_shows_picture_and_numbers() -> None:
    """HTML with the picture and a table; lines elsewhere; names of strangers are text in both."""
    names = ("<script>alert(1)</script>", "two\x1b[2J")
    found = compare_circuits(circuit_of(random_edges(1)), circuit_of(random_edges(2)), names=names)
    bundle = found._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert "<svg" in bundle["text/html"]
    assert "<script" not in bundle["text/html"]
    assert "\x1b" not in bundle["text/plain"] + bundle["text/html"]
    assert "Jaccard: " in bundle["text/plain"]
    assert repr(found).startswith("Comparison(edges: ")


def test_comparison_of_traced_circuits() -> None:
    """EAP and EAP-IG of one model agree in most of their strongest edges."""
    first, second = (
        circuitlab.build_circuit("ioi-mini", method=method, top=40, n_pairs=16, verify=0)
        for method in ("eap", "eap-ig")
    )
    found = compare_circuits(first, second)
    assert found.comparable
    assert found.jaccard is not None
    assert found.jaccard > 0.5
    assert found.names == ("A · eap", "B · eap-ig, 5 steps, midpoint")
    assert CircuitGraph.from_json(found.circuit.to_json()).number_of_edges() == len(found.scores)
