"""The analysis ``attention-scores``: why heads look where they look, and whether softmax is argmax.

Two questions about the same attention. Which components make a head prefer the key that it looks
at: its margin, split over what they wrote, on the query's side and on the keys'. And whether the
preference is all that counts: the pattern replaced by its best key alone, for one head and for all
at once, beside uniform attention and the second-best key, and what the task loses.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import CircuitGraph, Edge, check_cut, distinct_rows
from circuitlab_attention_heads.head_names import all_heads, head_name, parse_heads
from circuitlab_attention_heads.measuring import (
    TRIED_PAIRS,
    choose_heads,
    measure,
    query_offsets,
)
from circuitlab_attention_heads.score_facts import Facts
from circuitlab_attention_heads.score_panels import add_panels
from circuitlab_attention_heads.scores import BIASES, INPUTS

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Task, TracedModel
    from circuitlab_attention_heads.margins import Against

RIVALS = {"second": "the second-best key's", "rest": "the log-sum-exp of all others'"}
#: Contributions this much smaller than the largest are rounding.
NEGLIGIBLE = 1e-6


def attention_scores(
    model: TracedModel,
    task: Task,
    *,
    heads: str | None = None,
    query: int = -1,
    against: Against = "second",
    top: int | Literal["all"] = 40,
    threshold: float | None = None,
    temperatures: bool = False,
    batch_size: int | None = None,
) -> CircuitGraph:
    """Split the margins of heads over earlier components, and replace their patterns.

    Args:
        model: Any traced model.
        task: The task; margins and sharpness are those of its clean prompts.
        heads: Names as ``a1.h0, a2.*``. If left out, all heads; of more than 64, those whose
            attention, made uniform, changes the metric most on the first 8 pairs. All heads of the
            model, or those named, are replaced together.
        query: Position of the query in each clean prompt, negative from the end. Replaced are the
            patterns of all queries.
        against: What the best key's score is compared with, see
            :func:`circuitlab_attention_heads.margins.contest`.
        top: How many edges to keep, by absolute score.
        threshold: Keep those of at least this absolute score; with ``top`` both hold.
        temperatures: Whether patterns are sharpened and flattened by degrees too.
        batch_size: Pairs per batch; None chooses by memory.

    Returns:
        Edges from earlier components into ``q`` and ``k`` of heads: ``score``, mean contribution to
        the margin in score units, positive = favours the best key; ``interval``, 95 % by bootstrap
        over distinct pairs; out of ``input`` also ``token`` and ``position``, its two parts, where
        positions are learned. Contributions into ``q``, with ``bias["q"]`` and ``remainder`` of
        the node, sum to its ``margin``; so do those into ``k``. Nodes of heads have the mean
        ``n_eff``, ``top1`` and ``margin`` at the query, the same ``everywhere``, and for ``argmax``
        and its controls ``uniform`` and ``second`` a ``<rule>_change`` of the metric (negative =
        the task suffers), ``<rule>_interval`` and, where the task has an effect,
        ``<rule>_retained``: the share of it that is left. ``graph["replacements"]`` has these for
        all heads together.

    Raises:
        OptionError: a head or the query does not exist.
        ModelError: an attention is not a softmax of scaled products of queries and keys.
    """
    check_cut(top, threshold)
    pairs = model.encode(task)
    query_offsets(pairs, query)
    every = all_heads(model.wiring)
    together = every if heads is None else parse_heads(heads, model.wiring)
    chosen = choose_heads(model, pairs, batch_size) if heads is None else together
    found = measure(
        model,
        pairs,
        chosen,
        together,
        query=query,
        against=against,
        temperatures=temperatures,
        batch_size=batch_size,
    )
    facts = Facts(found, distinct_rows(pairs), torch.initial_seed())
    circuit = _circuit(model, facts, top, threshold)
    circuit.graph |= {
        "score": (
            f"mean contribution to a head's margin, its best key's score less {RIVALS[against]}; "
            f"edges into q and into k split the same margin; positive = favours the key it looks at"
        ),
        "method": f"margins at position {query} split exactly, patterns replaced",
        "replacements": {
            "heads": [head_name(head) for head in together],
            **{rule: replaced.to_json() for rule, replaced in facts.together.items()},
        },
        "findings": facts.findings(len(together)),
    }
    if len(chosen) < len(together):
        circuit.graph["warnings"] = [
            f"{len(chosen)} of {len(every)} heads are looked at one by one: those whose attention, "
            f"spread evenly, changes the metric most on {min(TRIED_PAIRS, len(pairs))} pairs; name "
            f"others with --heads"
        ]
    add_panels(circuit, facts, pairs)
    return circuit


def _circuit(
    model: TracedModel, facts: Facts, top: int | Literal["all"], threshold: float | None
) -> CircuitGraph:
    """All heads that were measured, and the strongest edges into them."""
    parts = _edges(facts)
    sums = {edge: torch.stack(list(values.values())).sum(0) for edge, values in parts.items()}
    scores = {edge: float(value.mean()) for edge, value in sums.items()}
    order = sorted(scores, key=lambda edge: (-abs(scores[edge]), edge))
    if threshold is not None:
        order = [edge for edge in order if abs(scores[edge]) >= threshold]
    if top != "all":
        least = NEGLIGIBLE * max(map(abs, scores.values()))
        order = [edge for edge in order if abs(scores[edge]) > least][:top]
    heads = {head_name(head): facts.of_head(head) for head in facts.measured.heads}
    used = {*heads, *(edge.source for edge in order)}
    circuit = CircuitGraph()
    for name in model.wiring.sources:
        if name in used:
            kind, layer, head = model.wiring.component(name)
            data: dict[str, Any] = {} if head is None else {"head": head}
            circuit.add_component(name, kind=kind, layer=layer, **data, **heads.get(name, {}))
    for edge, interval in zip(order, facts.intervals([sums[e] for e in order]), strict=True):
        data = {} if interval is None else {"interval": list(interval)}
        if len(parts[edge]) > 1:
            data |= {part: float(value.mean()) for part, value in parts[edge].items()}
        circuit.add_effect(edge.source, edge.target, scores[edge], port=edge.port, **data)
    return circuit


def _edges(facts: Facts) -> dict[Edge, dict[str, Tensor]]:
    """The contributions ``[n_pairs]`` of every edge into q and k, by the parts of its source."""
    found: dict[Edge, dict[str, Tensor]] = defaultdict(dict)
    for head, measures in facts.measured.heads.items():
        for port, values in (("q", measures.by_query), ("k", measures.by_key)):
            for part, value in zip(measures.names, values, strict=True):
                if part not in BIASES:
                    source = "input" if part in INPUTS else part
                    found[Edge(source, head_name(head), port)][part] = value
    return dict(found)
