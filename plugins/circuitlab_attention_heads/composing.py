"""The analysis ``attention-heads``: how heads compose by weights, what they copy, their roles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

import circuitlab
from circuitlab import (
    CircuitGraph,
    Edge,
    OptionError,
    TaskError,
    check_cut,
    distinct_rows,
    edge_effects,
    mean_intervals,
)
from circuitlab_attention_heads.composing_panels import add_panels
from circuitlab_attention_heads.composition import PORTS, Compositions, Port, compositions
from circuitlab_attention_heads.copying import Copying, copied_share, copying
from circuitlab_attention_heads.head_names import Head, all_heads, head_name
from circuitlab_attention_heads.roles import RoleTable, find_roles
from circuitlab_attention_heads.shared_directions import shared_directions

if TYPE_CHECKING:
    from circuitlab import EncodedTask, Task, TracedModel

SCORE = (
    "composition by weights, × chance: norm of the product of what one head writes and what the "
    "other reads / product of the norms / that of unrelated heads; 1 = chance, larger = more, no "
    "sign"
)
#: Scores this much smaller than the largest are rounding.
NEGLIGIBLE = 1e-6
#: First choices among which a copied token is, and tokens tried.
FIRST, TRIED = 5, 256
#: Heads that a finding names.
SHOWN = 4


class Pair(NamedTuple):
    """A composition of two heads; ``writer`` and ``reader`` are rows of :class:`Compositions`."""

    score: float
    writer: int
    reader: int
    port: Port


@dataclass(frozen=True)
class Measured:
    """What was computed of a model.

    Attributes:
        heads: (layer, head) of each row.
        found: Compositions.
        without: The same without shared directions; None where none were removed.
        copying: Of all heads.
        roles: None where not asked for.
    """

    heads: list[Head]
    found: Compositions
    without: Compositions | None
    copying: Copying
    roles: RoleTable | None

    def edge(self, pair: Pair) -> Edge:
        """The edge of a pair."""
        writer, reader = (head_name(self.heads[row]) for row in (pair.writer, pair.reader))
        return Edge(writer, reader, pair.port)


def attention_heads(
    model: TracedModel,
    task: Task | None = None,
    *,
    ports: Literal["all", "q", "k", "v"] = "all",
    top: int | Literal["all"] = 40,
    threshold: float | None = None,
    remove_directions: int = 0,
    roles: bool = True,
    role_threshold: float = 0.4,
    effects: bool = False,
    batch_size: int | None = None,
) -> CircuitGraph:
    """How heads compose, by their weights, and the role of each, by its attention.

    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits. Norms are folded into the
    weights; of rotary models W_QK is taken where the query is its own key.

    Args:
        model: Any traced model.
        task: Its prompts are run for ``remove_directions`` and ``effects`` alone.
        ports: Compositions to compare.
        top: How many edges to keep, by score.
        threshold: Keep edges of at least this score; with ``top`` both hold.
        remove_directions: Also compare heads without so many directions that the residual stream
            shares on the clean prompts; see
            :func:`circuitlab_attention_heads.shared_directions.shared_directions`.
        roles: Whether to find roles; see :func:`circuitlab_attention_heads.roles.find_roles`.
        role_threshold: Attention that a role needs.
        effects: Whether to patch the edges that are kept.
        batch_size: Sequences or pairs per pass; None chooses by memory.

    Returns:
        Heads with a kept edge or a role. Edges: ``score`` is composition × chance, ``composition``
        the raw one, 0 to 1, ``z`` its distance from chance, ``without_shared`` the score without
        shared directions, ``exact`` with its ``interval`` the effect of patching the edge, negative
        = it helps the task. Heads: ``copying``, -1 to 1, ``copied``, the share of tokens among the
        head's first choices, ``ov_norm``, ``qk_norm``, and what roles give. ``graph`` has what
        was measured of all: ``composition``, ``shared_directions``, ``copied``, ``roles`` and
        ``agreement``.

    Raises:
        OptionError: an option is out of its range.
        TaskError: shared directions or effects are asked for without a task.
    """
    check_cut(top, threshold)
    if remove_directions < 0:
        raise OptionError(f"--remove-directions {remove_directions}: give 0 or more")
    asked = {"--remove-directions": remove_directions > 0, "--effects": effects}
    pairs = _encoded(model, task, [name for name, given in asked.items() if given])
    chosen: Sequence[Port] = PORTS if ports == "all" else (ports,)
    seed = torch.initial_seed()
    circuit = CircuitGraph(score=SCORE, findings={})
    found, without = compositions(model, ports=chosen), None
    if pairs is not None and remove_directions:
        directions, share = shared_directions(
            model, pairs, remove_directions, batch_size=batch_size
        )
        without = compositions(model, ports=chosen, directions=directions)
        circuit.graph["shared_directions"] = {"n": remove_directions, "share": share}
    table = None
    if roles:
        table = find_roles(model, threshold=role_threshold, seed=seed, batch_size=batch_size)
        circuit.graph["roles"] = table.facts
    measured = Measured(all_heads(model.wiring), found, without, copying(model), table)
    every = pairs_of(found)
    circuit.graph["n_edges_total"] = len(every)
    kept = _cut(circuit, every, top, threshold)
    _add_heads(circuit, model, measured, kept, seed)
    _add_edges(circuit, measured, kept)
    circuit.graph["method"] = _method(model, chosen, len(every))
    circuit.graph["composition"] = {
        "ports": list(chosen),
        "n_pairs": len(every),
        "dimensions": found.dimensions,
        "chance": found.dimensions**-0.5,
    }
    _tell(circuit, measured, every)
    if pairs is not None and effects:
        _patch(circuit, model, pairs, [measured.edge(pair) for pair in kept], batch_size, seed)
    add_panels(circuit, measured)
    return circuit


def _encoded(model: TracedModel, task: Task | None, needed_by: list[str]) -> EncodedTask | None:
    """The task's prompts where something needs them."""
    if not needed_by:
        return None
    if task is None:
        raise TaskError(
            f"{' and '.join(needed_by)} run the prompts of a task, and there is none; name one "
            f"with --task or leave that out"
        )
    return model.encode(task)


def _method(model: TracedModel, ports: Sequence[Port], n_pairs: int) -> str:
    turned = ", rotary embeddings at distance 0" if model.architecture.rotary else ""
    return f"{n_pairs:,} compositions of heads ({', '.join(ports)}) by folded weights{turned}"


def pairs_of(found: Compositions) -> list[Pair]:
    """All pairs that have a score, strongest first, ties in forward order."""
    pairs = []
    for port in found.raw:
        scores = found.times_chance(port)
        at = scores.isfinite().nonzero()
        values = scores[at[:, 0], at[:, 1]].tolist()
        pairs += [Pair(v, i, j, port) for v, (i, j) in zip(values, at.tolist(), strict=True)]
    return sorted(pairs, key=lambda pair: (-pair.score, *pair[1:]))


def _cut(
    circuit: CircuitGraph, every: list[Pair], top: int | Literal["all"], threshold: float | None
) -> list[Pair]:
    """The pairs to keep; the circuit's warnings say where there was nothing to choose by."""
    warnings = []
    if not every:
        warnings.append("no head is read by a head of a later layer: there is nothing to compose")
    kept = [pair for pair in every if threshold is None or pair.score >= threshold]
    if top != "all":
        kept = [pair for pair in kept if pair.score > NEGLIGIBLE * every[0].score]
        if 0 < top < len(kept) and kept[top - 1].score == kept[top].score:
            tied = sum(pair.score == kept[top].score for pair in kept)
            warnings.append(
                f"{tied} edges tie at the cut (score {kept[top].score:.3g}); kept in forward order"
            )
        kept = kept[:top]
    if warnings:
        circuit.graph["warnings"] = warnings
    return kept


# --- the circuit ----------------------------------------------------------------------------------


def _add_heads(
    circuit: CircuitGraph, model: TracedModel, measured: Measured, kept: list[Pair], seed: int
) -> None:
    """Add the heads of kept pairs and those with a role."""
    used = {row for pair in kept for row in (pair.writer, pair.reader)}
    said = [{} if measured.roles is None else measured.roles.of(*one) for one in measured.heads]
    rows = sorted(used | {row for row, data in enumerate(said) if "role" in data})
    shares = copied_share(
        model, [measured.heads[row] for row in rows], top=FIRST, n_tokens=TRIED, seed=seed
    )
    for row, share in zip(rows, shares.tolist(), strict=True):
        layer, head = measured.heads[row]
        data: dict[str, Any] = {
            "head": head,
            "ov_norm": float(measured.found.ov_norms[row]),
            "qk_norm": float(measured.found.qk_norms[row]),
        }
        score = float(measured.copying.scores[layer, head])
        if math.isfinite(score):
            data |= {"copying": score, "copied": share}
        circuit.add_component(
            head_name((layer, head)), kind="head", layer=layer, **data, **said[row]
        )
    n_tokens = min(TRIED, model.vocab_size)
    chance = min(1.0, FIRST / model.vocab_size)
    circuit.graph["copied"] = {"top": FIRST, "n_tokens": n_tokens, "chance": chance}


def _add_edges(circuit: CircuitGraph, measured: Measured, kept: list[Pair]) -> None:
    found, without = measured.found, measured.without
    for pair in kept:
        at, port = (pair.writer, pair.reader), pair.port
        numbers = {"composition": float(found.raw[port][at]), "z": float(found.z[port][at])}
        if without is not None:
            numbers["without_shared"] = float(without.times_chance(port)[at])
        data = {name: value for name, value in numbers.items() if math.isfinite(value)}
        source, target, _ = measured.edge(pair)
        circuit.add_effect(source, target, pair.score, port=port, **data)


def _patch(
    circuit: CircuitGraph,
    model: TracedModel,
    pairs: EncodedTask,
    edges: list[Edge],
    batch_size: int | None,
    seed: int,
) -> None:
    """Put exact effects beside the scores, and say whether the two agree."""
    effects = edge_effects(model, pairs, edges, batch_size=batch_size, stage="composition-effects")
    means = effects.mean(1).tolist()
    bounds = mean_intervals(effects[:, distinct_rows(pairs)], seed)
    for edge, mean, bound in zip(edges, means, bounds, strict=True):
        circuit.edges[tuple(edge)]["exact"] = mean
        if bound is not None:
            circuit.edges[tuple(edge)]["interval"] = list(bound)
    scores = [circuit.edges[tuple(edge)]["score"] for edge in edges]
    agreement = {"all": (rank_correlation(scores, list(map(abs, means))), len(edges))}
    for port in circuit.graph["composition"]["ports"]:
        rows = [row for row, edge in enumerate(edges) if edge.port == port]
        sizes = [abs(means[row]) for row in rows]
        agreement[port] = (rank_correlation([scores[row] for row in rows], sizes), len(rows))
    circuit.graph["agreement"] = {
        name: {"rank_correlation": value, "n_edges": n}
        for name, (value, n) in agreement.items()
        if value is not None
    }
    told = [
        f"{value:+.2f} ({name}, {n} edges)"
        for name, (value, n) in agreement.items()
        if value is not None
    ]
    circuit.graph["findings"]["weights and behaviour"] = (
        f"rank correlation of composition with |patched effect| {', '.join(told)}"
        if told
        else "too few different edges to correlate composition with patched effects"
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, ties at their mean rank; None for fewer than three values, or all the same."""
    return circuitlab.rank_correlation(one, other) if len(one) >= 3 else None


# --- findings -------------------------------------------------------------------------------------


def _tell(circuit: CircuitGraph, measured: Measured, every: list[Pair]) -> None:
    findings = circuit.graph["findings"]
    for port in measured.found.raw:
        own = [pair for pair in every if pair.port == port]
        if own:
            findings[f"{port.upper()}-composition"] = _strongest(measured, own)
    if measured.without is not None:
        findings["shared directions"] = _without_shared(circuit, measured, every)
    findings["copying"] = _copying(measured)
    if measured.roles is not None:
        findings |= measured.roles.findings()


def _strongest(measured: Measured, own: list[Pair]) -> str:
    if not own[0].score:
        return f"none: in none of {len(own):,} pairs one head writes what the other reads"
    source, target, port = measured.edge(own[0])
    raw = float(measured.found.raw[own[0].port][own[0].writer, own[0].reader])
    text = f"{source} → {target}:{port} {own[0].score:.2f} × chance ({raw:.3g})"
    if len(own) == 1:
        return f"{text}, the only pair"
    middle = median(pair.score for pair in own)
    return f"{text} is the strongest, {middle:.2f} the median of {len(own):,} pairs"


def _without_shared(circuit: CircuitGraph, measured: Measured, every: list[Pair]) -> str:
    """How scores change when shared directions are removed."""
    facts, without = circuit.graph["shared_directions"], measured.without
    assert without is not None
    tables = {port: without.times_chance(port).tolist() for port in without.raw}
    left = [(pair, tables[pair.port][pair.writer][pair.reader]) for pair in every]
    left = [(pair, score) for pair, score in left if math.isfinite(score)]
    value = rank_correlation([pair.score for pair, _ in left], [score for _, score in left])
    facts |= {"dimensions": without.dimensions, "n_edges": len(left)}
    if value is not None:
        facts["rank_correlation"] = value
    noun = "direction holds" if facts["n"] == 1 else "directions hold"
    text = f"{facts['n']} {noun} {facts['share']:.0%} of the residual stream's squared length"
    if left:
        pair, score = max(left, key=lambda item: item[1])
        source, target, port = measured.edge(pair)
        text += f"; without, {source} → {target}:{port} is the strongest, {score:.2f} × chance"
    return text if value is None else f"{text}, rank correlation with all scores {value:+.2f}"


def _copying(measured: Measured) -> str:
    scores = [
        (float(measured.copying.scores[head]), head_name(head))
        for head in measured.heads
        if math.isfinite(measured.copying.scores[head])
    ]
    if not scores:
        return "no head reaches a logit by its weights alone"
    ranked = sorted(scores, key=lambda item: -item[0])
    most = ", ".join(f"{name} {score:+.2f}" for score, name in ranked[:SHOWN])
    if len(ranked) <= SHOWN:
        return f"{most} (1 copies, -1 suppresses)"
    least, name = ranked[-1]
    return f"{most} most, {name} {least:+.2f} least (1 copies, -1 suppresses)"
