"""Panels of points and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from circuitlab.labels import excerpt
from circuitlab.panels.panel import Panel, both_or_none
from circuitlab.plain import Record, few

Guide = Literal["none", "quadrants", "diagonal", "unit-circle", "gates"]


@dataclass(frozen=True, kw_only=True)
class Point(Record):
    """A point of :class:`Scatter`.

    Attributes:
        name: Its label, shown where there is room.
        x: To the right.
        y: Upwards.
        kind: Points of one kind look alike, and a legend says so; ``AND``, ``OR``, ``ADD``, ``XOR``
            and ``MIXED`` are drawn as gate symbols.
        weight: Larger in size is drawn larger and is named first.
        members: Places that the point stands for, each an x and a y: it is drawn near them, where
            there is room, and joined to each by a line.
    """

    name: str
    x: float
    y: float
    kind: str = ""
    weight: float | None = None
    members: Sequence[Sequence[float]] = ()

    noun = "point"

    def _check(self) -> None:
        if any(len(place) != 2 for place in self.members):
            raise ValueError("a member is no place; give an x and a y for each")


@dataclass(frozen=True, kw_only=True)
class Scatter(Panel):
    """Points in the plane.

    Attributes:
        x_label: What x is, with unit and sign.
        y_label: What y is.
        points: At least one.
        guide: What is drawn behind them: ``none``; ``quadrants``, lines at x = 0 and y = 0;
            ``diagonal``, y = x; ``unit-circle``, the complex plane, as for eigenvalues; ``gates``,
            the sectors of noising against denoising. All but ``none`` and ``quadrants`` have equal
            units to the right and upwards.

    Raises:
        GraphError: there is no point, a place is no finite number, or the guide is none of these.
    """

    x_label: str
    y_label: str
    points: Sequence[Point]
    guide: Guide = "none"

    kind = "scatter"
    noun = "scatter plot"

    def _check(self) -> None:
        if not self.points:
            raise ValueError("it has no point; leave the panel out")
        few(sum(1 + len(point.members) for point in self.points), "places")


@dataclass(frozen=True, kw_only=True)
class Bar(Record):
    """A bar of :class:`Bars` or :class:`UpSet`.

    Attributes:
        name: Its label.
        value: Its length.
        lo: Lower end of its interval.
        hi: Upper end.
        kind: Bars of one kind have one colour, and a legend says so.
        note: A few words beside it.
    """

    name: str
    value: float
    lo: float | None = None
    hi: float | None = None
    kind: str = ""
    note: str = ""

    noun = "bar"

    def _check(self) -> None:
        both_or_none(self.lo, self.hi)
        if self.lo is not None and self.hi is not None and self.lo > self.hi:
            raise ValueError(f"lo {self.lo:g} is above hi {self.hi:g}; exchange them")


@dataclass(frozen=True, kw_only=True)
class Bars(Panel):
    """Bars from 0, one under the other.

    Attributes:
        what: What a length is, with unit and sign.
        bars: At least one.
        reference: A value that a dashed line marks.

    Raises:
        GraphError: there is no bar, or a value is no finite number.
    """

    what: str
    bars: Sequence[Bar]
    reference: float | None = None

    kind = "bars"
    noun = "bar plot"

    def _check(self) -> None:
        if not self.bars:
            raise ValueError("it has no bar; leave the panel out")
        few(len(self.bars), "bars")


@dataclass(frozen=True, kw_only=True)
class UpSet(Panel):
    """Bars of sets of members, with dots under each that say who is in it (Lex et al. 2014).

    Attributes:
        what: What a height is, with its unit.
        members: Names; at most six.
        bars: Each named by a 0 or 1 for each member, 1 where it is in the set.
        dividends: What sets add beyond their subsets, named in words; drawn beside.

    Raises:
        GraphError: a bar's name does not fit the members, or a value is no finite number.
    """

    what: str
    members: Sequence[str]
    bars: Sequence[Bar]
    dividends: Sequence[Bar] = ()

    kind = "upset"
    noun = "UpSet plot"

    def _check(self) -> None:
        size, names = len(self.members), [bar.name for bar in self.bars]
        if not 1 <= size <= 6 or not names:
            raise ValueError(f"it has {size} members and {len(names)} bars; give 1 to 6 and a bar")
        for name in names:
            if len(name) != size or set(name) - {"0", "1"}:
                fact = f"bar {excerpt(name)!r} is no set of {size} members"
                raise ValueError(f"{fact}; name it by a 0 or 1 for each")
        if len(set(names)) < len(names):
            raise ValueError("a set has two bars; give each once")


@dataclass(frozen=True, kw_only=True)
class Histogram(Panel):
    """How values are distributed; several series share their bins.

    Attributes:
        what: What a value is, with unit and sign.
        series: The values of each series by its name, at least one of each.

    Raises:
        GraphError: a series is empty, or a value is no finite number.
    """

    what: str
    series: Mapping[str, Sequence[float]]

    kind = "histogram"
    noun = "histogram"

    def _check(self) -> None:
        if not self.series:
            raise ValueError("it has no series; leave the panel out")
        for name, values in self.series.items():
            if not values:
                raise ValueError(f"series {excerpt(name)!r} is empty; leave it out")
        few(sum(map(len, self.series.values())), "values")
