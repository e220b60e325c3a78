"""Panels of curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from circuitlab.labels import excerpt
from circuitlab.panels.panel import Panel, both_or_none
from circuitlab.plain import Record, few


@dataclass(frozen=True, kw_only=True)
class Curve(Record):
    """A curve of :class:`Curves`.

    Attributes:
        name: Its label.
        mean: Its value at each x, ``[n_x]``; None where nothing was measured.
        lo: Lower ends of its band, ``[n_x]``.
        hi: Upper ends of its band.
        mark: The x at which a dotted line marks something of it, which the caption explains.
        note: A few more words, shown where the curves stand apart.
    """

    name: str
    mean: Sequence[float | None]
    lo: Sequence[float | None] | None = None
    hi: Sequence[float | None] | None = None
    mark: float | None = None
    note: str = ""

    noun = "curve"

    def _check(self) -> None:
        both_or_none(self.lo, self.hi)
        for name, ends in (("lo", self.lo), ("hi", self.hi)):
            if ends is not None and len(ends) != len(self.mean):
                raise ValueError(
                    f"{name} has {len(ends)} values, mean {len(self.mean)}; give one for each"
                )


@dataclass(frozen=True, kw_only=True)
class Curves(Panel):
    """Curves over one x.

    Attributes:
        x: Rising, ``[n_x]``.
        x_label: What x is, with its unit.
        y_label: What the curves are, with unit and sign.
        curves: At least one.
        log_x: Whether the x axis is logarithmic; every x is above 0 then.
        log_y: Whether the y axis is logarithmic; every mean is above 0 then.
        apart: Whether each curve has a small picture of its own, on common axes.

    Raises:
        GraphError: lengths do not agree, x does not rise, a value is no finite number, or is not
            above 0 on a logarithmic axis.
    """

    x: Sequence[float]
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    apart: bool = False

    kind = "curves"
    noun = "curve plot"

    def _check(self) -> None:
        few(len(self.x) * len(self.curves), "values")
        if any(a >= b for a, b in pairwise(self.x)):
            raise ValueError("x does not rise; sort it, each x once")
        if self.log_x and self.x and self.x[0] <= 0:
            raise ValueError("x is not above 0 on a logarithmic axis; leave out what is not")
        for curve in self.curves:
            name, known = excerpt(curve.name), [value for value in curve.mean if value is not None]
            if len(curve.mean) != len(self.x):
                fact = f"curve {name!r} has {len(curve.mean)} values, x {len(self.x)}"
                raise ValueError(f"{fact}; give one for each x, None where there is none")
            if self.log_y and min(known, default=1.0) <= 0:
                fact = f"curve {name!r} is not above 0 on a logarithmic axis"
                raise ValueError(f"{fact}; give None there, or a linear axis")
        if all(value is None for curve in self.curves for value in curve.mean):
            raise ValueError("the curves have no value; leave the panel out")
