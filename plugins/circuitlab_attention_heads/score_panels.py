"""Plots of attention scores: margins, replaced patterns, where heads look, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitlab import Bar, Bars, Curve, Curves, Heatmap, Histogram
from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.score_facts import Facts, Replaced
from circuitlab_attention_heads.sharpness import RULES, TEMPERATURES

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, EncodedTask, Interval
    from circuitlab_attention_heads.measuring import HeadMeasures

#: Heads whose patterns and margins are drawn.
DRAWN = 4
#: Bars of each side of a margin.
LARGEST = 6
WORDS = {"argmax": "best key alone", "uniform": "spread evenly", "second": "second-best key"}


def add_panels(circuit: CircuitGraph, facts: Facts, pairs: EncodedTask) -> None:
    """Put the plots of a measurement beside its circuit."""
    metric = pairs.metric.name
    _replacements(facts, metric).add_to(circuit)
    _margins(facts).add_to(circuit)
    _waterfall(facts).add_to(circuit)
    for head in facts.shown[:DRAWN]:
        _pattern(facts, head, pairs).add_to(circuit)
    if f"{TEMPERATURES[0]:g}" in facts.together:
        _temperatures(facts, metric).add_to(circuit)


def _replacements(facts: Facts, metric: str) -> Bars:
    rows = {"together": facts.together}
    for head in facts.shown:
        changes = facts.measured.heads[head].changes
        rows[head_name(head)] = {rule: facts.replaced(changes[rule]) for rule in RULES}
    return Bars(
        title="Attention by another rule",
        what=f"change of {metric}; negative = the task suffers",
        bars=[
            _bar(f"{name}, {rule}", each[rule], rule)
            for name, each in rows.items()
            for rule in RULES
        ],
        caption="All heads together, and each alone; lines are 95 % intervals over pairs.",
    )


def _bar(name: str, replaced: Replaced, rule: str) -> Bar:
    lo, hi = _ends(replaced.interval)
    return Bar(name=name, value=replaced.change, lo=lo, hi=hi, kind=WORDS[rule])


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else interval


def _margins(facts: Facts) -> Histogram:
    heads = facts.measured.heads
    return Histogram(
        title="Margins of heads",
        what="margin at the query, one for each pair, score units",
        series={head_name(head): heads[head].margin.tolist() for head in facts.shown[:DRAWN]},
    )


def _waterfall(facts: Facts) -> Bars:
    """Of the head that prefers its best key most, among those that are shown."""
    heads = facts.measured.heads
    head = max(facts.shown, key=lambda head: float(heads[head].margin.mean()))
    found = heads[head]
    sides = (("query", found.by_query), ("keys", found.by_key))
    bars = [bar for side, values in sides for bar in _side(facts, found, side, values)]
    if float(found.remainder.abs().max()) > 0:
        value, (lo, hi) = float(found.remainder.mean()), _ends(facts.interval(found.remainder))
        bars.append(Bar(name="minus entropy of the rest", value=value, lo=lo, hi=hi))
    return Bars(
        title=f"Margin of {head_name(head)}",
        what="contribution, score units; positive = favours the best key",
        bars=bars,
        reference=float(found.margin.mean()),
        caption=(
            "The query's bars sum to the margin, the dashed line; so do the keys'. bias: the "
            "head's own; attention-bias: what the biases of earlier attentions write."
        ),
    )


def _side(facts: Facts, found: HeadMeasures, side: str, values: Tensor) -> list[Bar]:
    means = values.mean(-1)
    order = means.abs().argsort(descending=True, stable=True).tolist()
    bars = []
    for row in order[:LARGEST]:
        lo, hi = _ends(facts.interval(values[row]))
        name = f"{side}: {found.names[row]}"
        bars.append(Bar(name=name, value=float(means[row]), lo=lo, hi=hi, kind=side))
    rest = values[order[LARGEST:]].sum(0)
    if len(order) > LARGEST:
        lo, hi = _ends(facts.interval(rest))
        name = f"{side}: {len(order) - LARGEST} others"
        bars.append(Bar(name=name, value=float(rest.mean()), lo=lo, hi=hi, kind=side))
    return bars


def _pattern(facts: Facts, head: Head, pairs: EncodedTask) -> Heatmap:
    pattern = facts.measured.heads[head].pattern
    tokens = pairs.tokens_text[0][-len(pattern) :]
    cut = len(pairs.tokens_text[0]) > len(pattern)
    return Heatmap(
        title=f"Where {head_name(head)} looks",
        rows=tokens,
        columns=tokens,
        values=[
            [value if key <= query else None for key, value in enumerate(row)]
            for query, row in enumerate(pattern.tolist())
        ],
        what="attention, 0 to 1",
        row_label="query",
        column_label="key",
        diverging=False,
        caption="First clean prompt" + (f", its last {len(pattern)} tokens." if cut else "."),
    )


def _temperatures(facts: Facts, metric: str) -> Curves:
    names = [f"{t:g}" for t in TEMPERATURES]
    rows = [("together", facts.measured.changes)] + [
        (head_name(head), facts.measured.heads[head].changes) for head in facts.shown[:DRAWN]
    ]
    curves = []
    for title, changes in rows:
        found = [facts.replaced(changes[name]) for name in names]
        ends = [_ends(each.interval) for each in found]
        lo, hi = ([low for low, _ in ends], [high for _, high in ends])
        curves.append(Curve(name=title, mean=[each.change for each in found], lo=lo, hi=hi))
    return Curves(
        title="Attention by temperature",
        x=TEMPERATURES,
        x_label="temperature T of pattern^(1/T)",
        y_label=f"change of {metric}",
        curves=curves,
        log_x=True,
        caption="At 1 the model is as it is, below it sharper. Each head alone, and together.",
    )
