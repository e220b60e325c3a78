"""Comparing two circuits: which edges they share, and how their scores agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuitlab.errors import GraphError, OptionError
from circuitlab.graph import EDGE_SCORE, CircuitGraph, effect_name
from circuitlab.labels import clip, visible
from circuitlab.notebook import html_table
from circuitlab.panels import Point, Scatter

#: An edge: source, target, port.
EdgeKey = tuple[str, str, str]

#: Provenance that a score depends on, and what else is told where it differs.
_OF_SCORES = ("model", "model_revision", "task", "task_digest", "metric", "ablation", "score")
_OTHER = ("analysis", "method", "n_pairs")
_SHAPE = ("n_layers", "n_heads", "d_model", "parallel")
_CUTS = (5, 10, 20, 50, 100, 200, 500)
#: Edges that the plot shows.
_POINTS = 500


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two circuits side by side; edges are ``(source, target, port)``, strongest first.

    Attributes:
        names: What the circuits are called.
        only_a: Edges of the first alone.
        both: Edges of both.
        only_b: Edges of the second alone.
        jaccard: Shared edges / edges of either; None where neither has any.
        components: Number of components with an edge in the first alone, in both, in the second
            alone.
        scores: Score of each edge of either in the first and the second, None where it has none;
            empty where names alone were compared.
        rank_correlation_common: Spearman's, signed scores of shared edges; None for fewer than two
            of them, or all the same.
        rank_correlation_union: The same of all edges of either, 0 where a circuit has no score.
        sign_disagreements: Shared edges that help by one and hurt by the other.
        top_overlap: For k strongest edges of each, the share of them that is the same.
        differences: Provenance that differs, as ``key: first | second``.
        comparable: Whether nothing differs that scores depend on.
        circuit: Edges of either as one circuit whose data ``in`` is ``a``, ``b`` or ``both``, for
            pictures. Its ``score`` is the first's where that has one; where scores are not
            comparable, as a share of the circuit's largest.
    """

    names: tuple[str, str]
    only_a: tuple[EdgeKey, ...]
    both: tuple[EdgeKey, ...]
    only_b: tuple[EdgeKey, ...]
    jaccard: float | None
    components: tuple[int, int, int]
    scores: Mapping[EdgeKey, tuple[float | None, float | None]]
    rank_correlation_common: float | None
    rank_correlation_union: float | None
    sign_disagreements: tuple[EdgeKey, ...]
    top_overlap: Mapping[int, float]
    differences: tuple[str, ...]
    comparable: bool
    circuit: CircuitGraph

    def __repr__(self) -> str:
        return f"Comparison({'; '.join(f'{key}: {value}' for key, value in self.lines().items())})"

    def lines(self) -> dict[str, str]:
        """The comparison in words, by what each line is about."""
        a, b = self.names
        counts = len(self.only_a), len(self.both), len(self.only_b)
        found = {"edges": f"{counts[0]} only in {a}, {counts[1]} in both, {counts[2]} only in {b}"}
        ends = self.components
        found["components"] = f"{ends[0]} only in {a}, {ends[1]} in both, {ends[2]} only in {b}"
        if self.jaccard is not None:
            found["Jaccard"] = f"{self.jaccard:.2f}"
        if self.scores:
            found["rank correlation"] = (
                f"{_figure(self.rank_correlation_common)} over shared edges, "
                f"{_figure(self.rank_correlation_union)} over all, 0 where there is no score"
            )
            names = ", ".join(effect_name(*edge) for edge in self.sign_disagreements[:5])
            more = len(self.sign_disagreements) - 5
            found["other sign"] = f"{len(self.sign_disagreements)} of {counts[1]} shared edges" + (
                f": {names}{f' and {more} more' if more > 0 else ''}" if names else ""
            )
        if self.top_overlap:
            shares = ", ".join(f"{share:.0%} of {k}" for k, share in self.top_overlap.items())
            found["same among the strongest"] = shares
        if self.differences:
            found["differ"] = "; ".join(self.differences)
        if self.scores and not self.comparable:
            found["scores"] = "NOT comparable: what they depend on differs"
        return {key: visible(value) for key, value in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain, finite JSON; what is undefined is null."""
        sets = {"only_a": self.only_a, "both": self.both, "only_b": self.only_b}
        return {
            "schema": "circuitlab-comparison/1",
            "names": list(self.names),
            **{key: [list(edge) for edge in edges] for key, edges in sets.items()},
            "jaccard": self.jaccard,
            "components": dict(zip(sets, self.components, strict=True)),
            "scores": [[*edge, *pair] for edge, pair in self.scores.items()],
            "rank_correlation": {
                "common": self.rank_correlation_common, "union": self.rank_correlation_union,
            },
            "sign_disagreements": [list(edge) for edge in self.sign_disagreements],
            "top_overlap": {str(k): share for k, share in self.top_overlap.items()},
            "differences": list(self.differences),
            "comparable": self.comparable,
        }  # fmt: skip

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """How a notebook shows it: the picture of both, the lines as a table; text elsewhere."""
        bundle = self.circuit._repr_mimebundle_()
        bundle["text/html"] = bundle.pop("image/svg+xml", "") + html_table(
            (), list(self.lines().items())
        )
        bundle["text/plain"] = "\n".join(f"{key}: {value}" for key, value in self.lines().items())
        return bundle


def compare_circuits(
    a: CircuitGraph,
    b: CircuitGraph,
    *,
    names: tuple[str, str] | None = None,
    names_only: bool = False,
) -> Comparison:
    """Which edges two circuits share, and how their scores agree.

    Edges are the same where source, target and port have the same names. Effects that were measured
    but not kept (``kept=False``) are no edges of a circuit; their scores count all the same.

    Args:
        a: The first circuit.
        b: The second.
        names: What to call them; by default A and B, with what sets them apart.
        names_only: Compare names of edges and no scores, of models of any shape.

    Raises:
        GraphError: a circuit is malformed, or their models have different shapes, so that the same
            name is not the same component; or effects of one name are of different kinds.
    """
    for circuit in (a, b):
        circuit.validate()
    first, second = names or ("A", "B")
    check_kinds([(first, a), (second, b)])
    if not names_only:
        remedy = "compare names alone (names_only=True, --names-only)"
        check_shapes([(first, a), (second, b)], remedy)
    edges = kept_edges(a), kept_edges(b)
    every = _by_strength(
        {edge: max(abs(side.get(edge, 0.0)) for side in edges) for edge in {**edges[0], **edges[1]}}
    )
    common = [edge for edge in every if edge in edges[0] and edge in edges[1]]
    scores = {} if names_only else {edge: (_score(a, edge), _score(b, edge)) for edge in every}
    differences, comparable = _differences(a, b)
    names = names or _names(a, b)
    comparison = Comparison(
        names=names,
        only_a=tuple(edge for edge in every if edge not in edges[1]),
        both=tuple(common),
        only_b=tuple(edge for edge in every if edge not in edges[0]),
        jaccard=len(common) / len(every) if every else None,
        components=_shares(_ends(edges[0]), _ends(edges[1])),
        scores=scores,
        rank_correlation_common=_correlation([scores[edge] for edge in common if scores]),
        rank_correlation_union=_correlation(list(scores.values())),
        sign_disagreements=tuple(
            edge for edge in common if not names_only and edges[0][edge] * edges[1][edge] < 0
        ),
        top_overlap={} if names_only else _overlaps(*edges),
        differences=tuple(differences),
        comparable=comparable,
        circuit=CircuitGraph(),
    )
    _draw(comparison, a, b)
    return comparison


def kept_edges(circuit: CircuitGraph) -> dict[EdgeKey, float]:
    """Edges that are part of a circuit and their scores, strongest first."""
    return {
        (s, t, p): score
        for s, t, p, score in circuit.effects()
        if circuit.edges[s, t, p].get("kept", True)
    }


def check_shapes(circuits: Iterable[tuple[str, CircuitGraph]], remedy: str) -> None:
    """Refuse circuits of models of different shapes: there a name is not the same component.

    Raises:
        GraphError: says which circuits, and what of their models differs.
    """
    listed = list(circuits)
    for key in _SHAPE:
        told = [(name, c.graph[key]) for name, c in listed if key in c.graph]
        if len({repr(value) for _, value in told}) > 1:
            values = ", ".join(f"{value!r:.40} in {name}" for name, value in told)
            raise GraphError(
                f"the circuits are of models of different shapes: {key} is {values}; {remedy}"
            )


def check_kinds(circuits: Iterable[tuple[str, CircuitGraph]]) -> None:
    """Refuse effects of one name that are different things, as an edge and a node's total effect.

    Raises:
        GraphError: says which effect, and what it is in which circuit.
    """
    told: dict[EdgeKey, tuple[str, str]] = {}
    for name, circuit in circuits:
        for *edge, data in circuit.edges(keys=True, data=True):
            key = (edge[0], edge[1], edge[2])
            kind = str(data.get("kind", "edge"))
            other, known = told.setdefault(key, (name, kind))
            if kind != known:
                raise GraphError(
                    f"{effect_name(*key)!r} is of kind {known!r} in {other}, {kind!r} in {name}; "
                    f"give circuits whose effects are of one kind"
                )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, -1 to 1, ties at their mean rank.

    None for fewer than two values, or where one side is all the same.
    """
    if len(first) != len(second):
        raise OptionError(f"{len(first)} values and {len(second)}; give as many of each")
    ranks = [_ranks(values) for values in (first, second)]
    middle = (len(first) + 1) / 2
    centred = [[rank - middle for rank in side] for side in ranks]
    sizes = [math.fsum(x * x for x in side) for side in centred]
    if not all(sizes):
        return None
    product = math.fsum(x * y for x, y in zip(*centred, strict=True))
    return max(-1.0, min(1.0, product / math.sqrt(sizes[0] * sizes[1])))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def _correlation(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    return rank_correlation([a or 0.0 for a, _ in pairs], [b or 0.0 for _, b in pairs])


def _score(circuit: CircuitGraph, edge: EdgeKey) -> float | None:
    return float(circuit.edges[edge]["score"]) if circuit.has_edge(*edge) else None


def _by_strength(edges: Mapping[EdgeKey, float]) -> list[EdgeKey]:
    return sorted(edges, key=lambda edge: (-abs(edges[edge]), edge))


def _ends(edges: Mapping[EdgeKey, float]) -> set[str]:
    return {end for edge in edges for end in edge[:2]}


def _shares(a: set[str], b: set[str]) -> tuple[int, int, int]:
    return len(a - b), len(a & b), len(b - a)


def _overlaps(a: Mapping[EdgeKey, float], b: Mapping[EdgeKey, float]) -> dict[int, float]:
    """Share of the k strongest that is the same, for each k that both circuits have."""
    first, second = _by_strength(a), _by_strength(b)
    most = min(len(first), len(second))
    return {k: len({*first[:k]} & {*second[:k]}) / k for k in _CUTS if k <= most}


def _differences(a: CircuitGraph, b: CircuitGraph) -> tuple[list[str], bool]:
    """What differs, and whether scores can be compared all the same."""
    found, comparable = [], True
    for key in (*_OF_SCORES, *_OTHER):
        default = EDGE_SCORE if key == "score" else "not told"
        values = [graph.get(key, default) for graph in (a.graph, b.graph)]
        if values[0] != values[1]:
            comparable = comparable and key not in _OF_SCORES
            shown = " | ".join(clip(visible(str(value)), 80) for value in values)
            found.append(f"{key}: {shown}")
    return found, comparable


def _names(a: CircuitGraph, b: CircuitGraph) -> tuple[str, str]:
    keys = [
        key
        for key in ("model", "task", "metric", "method", "ablation")
        if a.graph.get(key) != b.graph.get(key)
    ]
    first, second = (
        " · ".join(
            [letter, *(clip(visible(str(c.graph[key])), 30) for key in keys if key in c.graph)]
        )
        for letter, c in (("A", a), ("B", b))
    )
    return first, second


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _draw(comparison: Comparison, a: CircuitGraph, b: CircuitGraph) -> None:
    """Fill in the circuit of both."""
    circuit = comparison.circuit
    shared = {key: value for key, value in a.graph.items() if b.graph.get(key) == value}
    told = (*_SHAPE, *_OF_SCORES, *_OTHER)
    circuit.graph.update({key: value for key, value in shared.items() if key in told})
    if not comparison.comparable:
        circuit.graph["score"] = (
            "score as a share of the largest of its circuit, the first's where both have the edge"
        )
    circuit.graph["compared"] = list(comparison.names)
    circuit.graph["comparison"] = {
        key: value
        for key, value in comparison.to_json().items()
        if key not in ("scores", "only_a", "both", "only_b")
    }
    scales = [
        1.0 if comparison.comparable else max(map(abs, kept_edges(c).values()), default=0.0) or 1.0
        for c in (a, b)
    ]
    owners = {"a": comparison.only_a, "both": comparison.both, "b": comparison.only_b}
    for owner, edges in owners.items():
        for source, target, port in edges:
            for end in (source, target):
                circuit.add_node(end, **(a if end in a else b).nodes[end])
            scores = [_score(c, (source, target, port)) for c in (a, b)]
            side = 1 if owner == "b" else 0
            told_scores = {
                f"score_{letter}": score
                for letter, score in zip("ab", scores, strict=True)
                if score is not None
            }
            data = {"in": owner, **told_scores, "score": (scores[side] or 0.0) / scales[side]}
            circuit.add_edge(source, target, port, **data)
    _plot(comparison)


def _plot(comparison: Comparison) -> None:
    """Score against score, one point an edge."""
    a, b = (clip(visible(name), 40) for name in comparison.names)
    words = dict.fromkeys(comparison.only_a, f"only {a}")
    words |= dict.fromkeys(comparison.only_b, f"only {b}")
    points = [
        Point(name=effect_name(*edge), x=one or 0.0, y=other or 0.0, kind=words.get(edge, "both"))
        for edge, (one, other) in list(comparison.scores.items())[:_POINTS]
    ]
    if points:
        many = len(comparison.scores) > _POINTS
        shown = f"The {_POINTS} strongest edges" if many else "All edges"
        Scatter(
            title="Scores side by side", x_label=f"score in {a}", y_label=f"score in {b}",
            points=points, guide="diagonal",
            caption=f"{shown}; 0 where a circuit has no score of one.",
        ).add_to(comparison.circuit)  # fmt: skip
