"""What is said of measured attention scores: means, intervals, shares of the task's effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import mean_intervals, ratio_interval
from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.scores import BIASES
from circuitlab_attention_heads.sharpness import RULES

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Interval
    from circuitlab_attention_heads.measuring import HeadMeasures, Measured

#: Heads that the result table and the plots name.
SHOWN = 5
#: Pairs of parts that a node keeps.
PAIRS_KEPT = 5
_RULES = {
    "argmax": "all attention on the best key:",
    "uniform": "on all keys alike:",
    "second": "on the second-best key:",
}
#: Rows whose intervals are taken at once: there are thousands of resamples of each.
_ROWS = 1000


@dataclass(frozen=True)
class Replaced:
    """What a rule in place of the pattern does to the metric.

    Attributes:
        change: Metric with the rule less the clean metric, mean over pairs.
        interval: Its 95 % interval; None for a single pair.
        retained: Share of the task's effect, metric(clean) - metric(corrupt), that is left; None
            where there is none to speak of.
        retained_interval: Its interval.
    """

    change: float
    interval: Interval | None
    retained: float | None
    retained_interval: Interval | None

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        """What is known, as plain JSON, each name behind a prefix."""
        return {
            f"{prefix}{name}": list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value is not None
        }


class Facts:
    """What is said of one measurement; intervals are 95 %, by bootstrap over distinct pairs."""

    def __init__(self, measured: Measured, distinct: Sequence[int], seed: int) -> None:
        self.measured, self._distinct, self._seed = measured, list(distinct), seed

    def interval(self, values: Tensor) -> Interval | None:
        """Of the mean of ``[n_pairs]``; None for a single pair."""
        return self.intervals([values])[0]

    def intervals(self, rows: Sequence[Tensor]) -> list[Interval | None]:
        """Of the mean of each row."""
        found: list[Interval | None] = []
        for start in range(0, len(rows), _ROWS):
            values = torch.stack(list(rows[start : start + _ROWS]))
            found += mean_intervals(values[:, self._distinct], self._seed)
        return found

    def replaced(self, change: Tensor) -> Replaced:
        """Of the change of the metric of each pair, ``[n_pairs]``."""
        effect = self.measured.clean - self.measured.corrupt
        left, interval, share = effect + change, self.interval(change), None
        bounds = ratio_interval(left[self._distinct], effect[self._distinct], self._seed)
        if float(effect.mean()) > 0 and (bounds is not None or len(self._distinct) == 1):
            share = float(left.mean() / effect.mean())
        return Replaced(float(change.mean()), interval, share, bounds)

    @cached_property
    def together(self) -> dict[str, Replaced]:
        """Of each rule, all heads together."""
        return {name: self.replaced(change) for name, change in self.measured.changes.items()}

    @cached_property
    def shown(self) -> list[Head]:
        """The heads that matter most for where they look: by what uniform attention changes."""
        heads = self.measured.heads

        def size(head: Head) -> tuple[float, Head]:
            return -abs(float(heads[head].changes["uniform"].mean())), head

        order = sorted(heads, key=size)[:SHOWN]
        return [head for head in order if size(head)[0]] or order[:1]

    def of_head(self, head: Head) -> dict[str, Any]:
        """The data of a head's node, plain JSON."""
        found = self.measured.heads[head]
        n_eff, top1, margin = found.everywhere.tolist()
        data: dict[str, Any] = {
            "n_eff": float(found.n_eff.mean()),
            "top1": float(found.top1.mean()),
            "margin": float(found.margin.mean()),
            "everywhere": {"n_eff": n_eff, "top1": top1, "margin": margin},
            "bias": {"q": _of_bias(found, found.by_query), "k": _of_bias(found, found.by_key)},
            "remainder": float(found.remainder.mean()),
            "strongest_pairs": strongest_pairs(found),
        }
        if (interval := self.interval(found.margin)) is not None:
            data["margin_interval"] = list(interval)
        for rule in RULES:
            data |= self.replaced(found.changes[rule]).to_json(f"{rule}_")
        return data

    def findings(self, n_together: int) -> dict[str, str]:
        """Lines of text by label: all heads together, then those of :attr:`shown`."""
        all_of = f"{n_together} heads at once" if n_together > 1 else "the head"
        texts = [f"{words} {self._left(self.together[rule])}" for rule, words in _RULES.items()]
        clean = f"metric {float(self.measured.clean.mean()):.3g}"
        found = {"argmax": f"{clean}; {all_of}, {'; '.join(texts)}"}
        return found | {head_name(head): self._said(head) for head in self.shown}

    def _left(self, replaced: Replaced) -> str:
        """What is left of the metric, with the share of the task's effect where there is one."""
        text = f"{float(self.measured.clean.mean()) + replaced.change:.3g}"
        if replaced.retained is None:
            return f"{text}, change {with_interval(replaced.change, replaced.interval)}"
        bounds = replaced.retained_interval
        within = "" if bounds is None else f" [{_percent(bounds[0])}, {_percent(bounds[1])}]"
        return f"{text}, keeps {_percent(replaced.retained)}{within} of the effect"

    def _said(self, head: Head) -> str:
        found = self.measured.heads[head]
        best = self.replaced(found.changes["argmax"])
        alike = float(found.changes["uniform"].mean())
        margin = with_interval(float(found.margin.mean()), self.interval(found.margin))
        query, key, part = strongest_pairs(found)[0]
        most = f", most from {query} (q) with {key} (k) {part:+.3g}" if part else ""
        return (
            f"{float(found.n_eff.mean()):.3g} effective keys ({float(found.everywhere[0]):.3g} "
            f"over all queries), margin {margin}{most}; alone on its best key "
            f"{with_interval(best.change, best.interval)}, on all keys alike {alike:+.3g}"
        )


def strongest_pairs(found: HeadMeasures) -> list[tuple[str, str, float]]:
    """The pairs of parts that do most to a margin: the query's, the keys', how much."""
    flat = found.both.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:PAIRS_KEPT].tolist()
    n = len(found.names)
    return [(found.names[i // n], found.names[i % n], float(flat[i])) for i in order]


def with_interval(value: float, interval: Interval | None) -> str:
    """``+1.2 [+1, +1.4]``."""
    return f"{value:+.3g}" + (
        "" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]"
    )


def _of_bias(found: HeadMeasures, values: Tensor) -> float:
    rows = [row for row, part in enumerate(found.names) if part in BIASES]
    return float(values[rows].sum(0).mean())


def _percent(share: float) -> str:
    """A share in whole percent, without a minus before zero."""
    return f"{round(share, 2) + 0.0:.0%}"
