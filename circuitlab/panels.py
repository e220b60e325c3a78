"""Panels: plots as plain data that an analysis puts beside its circuit, drawn by ``plots``.

A panel checks itself when it is made. ``panel.add_to(circuit)`` appends it to
``circuit.graph["plots"]`` as plain JSON, and :func:`panels_of` reads it back, from files of
strangers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from circuitlab.errors import GraphError
from circuitlab.labels import excerpt
from circuitlab.plain import Record, few, shaped

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph

Guide = Literal["none", "quadrants", "diagonal", "unit-circle", "gates"]


@dataclass(frozen=True, kw_only=True)
class Panel(Record):
    """One plot of a circuit's measurements.

    Attributes:
        title: Its heading.
        caption: How to read it; lines are broken where they do not fit.
    """

    title: str
    caption: str = ""

    kind: ClassVar[str]

    def add_to(self, circuit: CircuitGraph) -> None:
        """Append the panel to ``circuit.graph["plots"]``, as plain JSON."""
        circuit.graph.setdefault("plots", []).append(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The panel as plain JSON: its ``kind`` and its fields, without those left at default."""
        return {"kind": self.kind, **super().to_json()}


@dataclass(frozen=True, kw_only=True)
class Heatmap(Panel):
    """Values in rows and columns as colours; the first row is at the top.

    Attributes:
        rows: Names, ``[n_rows]``.
        columns: Names, ``[n_columns]``.
        values: ``[n_rows][n_columns]``; None where nothing was measured.
        what: What a value is, with its unit and sign.
        row_label: What the rows are.
        column_label: What the columns are.
        diverging: Whether 0 is white and the two signs have two colours; else larger is darker.
        notes: Text in the cells, ``[n_rows][n_columns]``; shown where cells are few enough.

    Raises:
        GraphError: shapes do not agree, or a value is no finite number.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    what: str
    row_label: str = ""
    column_label: str = ""
    diverging: bool = True
    notes: Sequence[Sequence[str]] | None = None

    kind = "heatmap"
    noun = "heat map"

    def _check(self) -> None:
        rows, columns = len(self.rows), len(self.columns)
        if not rows or not columns:
            raise ValueError("it has no cells; give at least one row and one column")
        few(rows * columns, "cells")
        shaped(self.values, rows, columns, "values")
        if self.notes is not None:
            shaped(self.notes, rows, columns, "notes")


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
        _both_or_none(self.lo, self.hi)
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
        _both_or_none(self.lo, self.hi)
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


@dataclass(frozen=True, kw_only=True)
class TextTable(Panel):
    """A table of words and numbers.

    Attributes:
        header: Names of the columns, ``[n_columns]``.
        rows: ``[n_rows][n_columns]``; numbers are written with three figures.

    Raises:
        GraphError: a row has not one cell for each column, or a number is not finite.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    kind = "table"
    noun = "table"

    def _check(self) -> None:
        if not self.header or not self.rows:
            raise ValueError("it has no cells; give at least one row and one column")
        few(len(self.header) * len(self.rows), "cells")
        shaped(self.rows, len(self.rows), len(self.header), "rows")


KINDS: Mapping[str, type[Panel]] = {
    panel.kind: panel for panel in (Heatmap, Curves, Scatter, Bars, UpSet, Histogram, TextTable)
}


def panels_of(circuit: CircuitGraph) -> list[Panel]:
    """The panels in ``circuit.graph["plots"]``.

    Raises:
        GraphError: they do not have the form that panels give them.
    """
    found = circuit.graph.get("plots", [])
    if not isinstance(found, list):
        raise GraphError(
            f'graph["plots"] of the circuit is a {type(found).__name__}, not a list of panels; run '
            f"the analysis again"
        )
    return [_panel(data, number) for number, data in enumerate(found, 1)]


def _panel(data: object, number: int) -> Panel:
    try:
        kind = data.get("kind") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(kind, str) or kind not in KINDS:
            raise GraphError(f"it is none of {', '.join(KINDS)}")
        return KINDS[kind].from_json({k: value for k, value in data.items() if k != "kind"})
    except GraphError as error:
        raise GraphError(
            f"panel {number} of the circuit cannot be plotted: {error}; run the analysis again"
        ) from error


def _both_or_none(lo: object, hi: object) -> None:
    if (lo is None) != (hi is None):
        raise ValueError("an interval has two ends; give lo and hi, or neither")
