"""Curves: in one picture with their names at their ends, or each in a small one of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from circuitlab.panels import Curve, Curves
from circuitlab.plots.frame import Frame, Tile, label_axes, zero_line
from circuitlab.plots.ink import (
    BLUE,
    COLOURS,
    FAINT,
    ORANGE,
    SOFT,
    dark,
    fitting,
    inches,
    power,
    readable,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: Curves that one panel shows, and values up to which each has a dot.
MAX_CURVES, DOTS = 12, 13
_WIDE, _HIGH = 3.3, 2.5


def curves(panel: Curves) -> Tile:
    """The curves as a tile."""
    shown = panel.curves[:MAX_CURVES]
    left_out = len(panel.curves) - len(shown)
    note = f"First {len(shown)} of {len(panel.curves):,} curves." if left_out else ""
    return _apart(panel, shown, note) if panel.apart else _together(panel, shown, note)


def _together(panel: Curves, shown: Sequence[Curve], note: str) -> Tile:
    names = [readable(curve.name, 26) for curve in shown]
    beside = max(inches(name, 7) for name in names) + 0.25

    def draw(frame: Frame) -> None:
        axes = frame.axes(0.62, 0.45, _WIDE, _HIGH)
        _scales(axes, panel)
        for number, curve in enumerate(shown):
            style = "-" if number < len(COLOURS) else "--"
            _draw(axes, panel, curve, COLOURS[number % len(COLOURS)], style, dots=DOTS)
        label_axes(axes, panel.x_label, panel.y_label, _WIDE, _HIGH)
        if not panel.log_y:
            zero_line(axes)
        frame.fit(axes)
        _name_ends(axes, panel, shown, names)

    return Tile(0.62 + _WIDE + beside, 0.5 + _HIGH, draw, note)


def _apart(panel: Curves, shown: Sequence[Curve], note: str) -> Tile:
    n = len(shown)
    columns = min(n, 2 if n <= 4 else 3 if n <= 9 else 4)
    rows = math.ceil(n / columns)
    wide, high, across, up = 1.55, 1.15, 1.78, 1.68

    def draw(frame: Frame) -> None:
        first: Axes | None = None
        for number, curve in enumerate(shown):
            column, row = number % columns, rows - 1 - number // columns
            axes = frame.axes(0.62 + across * column, 0.45 + up * row, wide, high)
            if first is None:
                first = axes
            else:
                axes.sharey(first)
                axes.sharex(first)
            _scales(axes, panel)
            _draw(axes, panel, curve, BLUE)
            axes.set_title(fitting(curve.name, 8, 0.62 * wide, True), size=8, weight="bold")
            axes.set_title(fitting(curve.note, 7, 0.6 * wide), size=7, loc="right", color=SOFT)
            axes.tick_params(labelleft=column == 0, labelsize=7)
            if not panel.log_x:
                axes.locator_params(axis="x", nbins=3)
            if number + columns >= n:
                axes.set_xlabel(fitting(panel.x_label, 7.5, wide + 0.1), size=7.5)
        for axes in first.get_shared_y_axes().get_siblings(first) if first else ():
            if not panel.log_y:
                zero_line(axes)
        words = fitting(panel.y_label, 8, 0.9 * up * rows)
        frame.text(0.1, 0.2 + up * rows / 2, words, rotation=90, va="center", ha="center", size=8)

    return Tile(0.62 + across * columns, 0.45 + up * rows - 0.25, draw, note)


def _scales(axes: Axes, panel: Curves) -> None:
    """Logarithmic or linear axes, and the ends of x."""
    if panel.log_x:
        axes.set_xscale("log")
        _powers(axes.xaxis, panel.x[0], panel.x[-1])
    elif all(float(x).is_integer() for x in panel.x):
        axes.locator_params(axis="x", integer=True)
    if panel.log_y:
        axes.set_yscale("log", nonpositive="clip")
        known = [value for curve in panel.curves for value in curve.mean if value is not None]
        _powers(axes.yaxis, min(known), max(known))
    if len(panel.x) > 1:
        axes.set_xlim(panel.x[0], panel.x[-1])


def _powers(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis: at powers of ten, and between where there are few."""
    few = high < 60 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_formatter(NullFormatter())


def _draw(
    axes: Axes, panel: Curves, curve: Curve, colour: str, style: str = "-", *, dots: int = 0
) -> None:
    x, mean = list(panel.x), _floats(curve.mean)
    if curve.lo is not None and curve.hi is not None:
        axes.fill_between(
            x, _floats(curve.lo), _floats(curve.hi), color=colour, alpha=0.17, linewidth=0
        )
    # A line does not show a value whose neighbours are missing.
    known = [False, *(not math.isnan(value) for value in mean), False]
    alone = any(known[i] and not (known[i - 1] or known[i + 1]) for i in range(1, len(known) - 1))
    dotted = len(x) <= max(dots, 1) or alone
    axes.plot(
        x, mean, color=colour, linewidth=1.5, linestyle=style, marker="o" if dotted else None,
        markersize=2.8, clip_on=False,
    )  # fmt: skip
    if curve.mark is not None:
        axes.axvline(curve.mark, color=ORANGE, linewidth=1.0, linestyle=":")


def _name_ends(axes: Axes, panel: Curves, shown: Sequence[Curve], names: Sequence[str]) -> None:
    """Write each curve's name at its right end, moved up or down where two would overlap."""
    ends = {}
    for number, curve in enumerate(shown):
        known = [(x, y) for x, y in zip(panel.x, curve.mean, strict=True) if y is not None]
        if known:
            ends[number] = known[-1]
    high = 72 * _HIGH  # points
    heights = [
        high * float(axes.transAxes.inverted().transform(axes.transData.transform(end))[1])
        for end in ends.values()
    ]
    places = spread(heights, 9.0, 0.0, high)
    for number, height, place in zip(ends, heights, places, strict=True):
        far = abs(place - height) > 2 or ends[number][0] < panel.x[-1]
        line = {"arrowstyle": "-", "color": FAINT, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            names[number], ends[number], (1.03, place / high), textcoords="axes fraction",
            size=7, color=dark(COLOURS[number % len(COLOURS)]), va="center",
            arrowprops=line if far else None, annotation_clip=False,
        )  # fmt: skip


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
