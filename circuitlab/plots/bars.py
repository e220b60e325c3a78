"""Bars: one under the other with intervals, and those of sets of members with dots below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuitlab.panels import Bar, Bars, UpSet
from circuitlab.plots.frame import ROW, Frame, Key, Tile, draw_legend, legend_rows
from circuitlab.plots.ink import FAINT, INK, LIGHT, RULE, SOFT, fitting, inches, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Bars and dividends that a panel shows.
MAX_BARS, MAX_DIVIDENDS = 40, 8
_WIDE = 2.6


def bars(panel: Bars) -> Tile:
    """The bars as a tile: names at the left, notes at the right."""
    shown = panel.bars[:MAX_BARS]
    kinds = list(dict.fromkeys(bar.kind for bar in shown))
    colours = {kind: LIGHT[number % len(LIGHT)] for number, kind in enumerate(kinds)}
    left = 0.14 + max(inches(readable(bar.name, 28), 7.5) for bar in shown)
    right = 0.1 + max(inches(readable(bar.note, 28), 7) for bar in shown)
    pitch = 0.3 if len(shown) <= 12 else 0.2
    tall = 0.12 + pitch * len(shown)
    keys = [Key(readable(kind or "other", 40), colours[kind]) for kind in kinds]
    rows = legend_rows(keys if kinds != [""] else [], left + _WIDE + right - 0.1)

    def draw(frame: Frame) -> None:
        axes = frame.axes(left, 0.45, _WIDE, tall)
        _draw(axes, shown, [colours[bar.kind] for bar in shown], 7.5)
        _limits(axes, panel, shown)
        if panel.reference is not None:
            axes.axvline(panel.reference, color=INK, linewidth=0.8, linestyle="--", zorder=2.5)
        for place, bar in enumerate(shown):
            axes.annotate(
                readable(bar.note, 28), (1, place), (6, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", size=7, color=SOFT, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel(fitting(panel.what, 7.5, _WIDE + right + 0.3), size=7.5)
        draw_legend(frame, 0.0, 0.52 + tall + ROW * len(rows), rows)

    note = "" if len(shown) == len(panel.bars) else f"First {len(shown)} of {len(panel.bars):,}."
    return Tile(left + _WIDE + right, 0.5 + tall + ROW * len(rows), draw, note)


def _draw(axes: Axes, shown: Sequence[Bar], colours: Sequence[str], size: float) -> None:
    """Bars from the top with their names and intervals, from a line at 0."""
    places = range(len(shown))
    axes.barh(places, [bar.value for bar in shown], height=0.62, color=colours)
    for place, bar in zip(places, shown, strict=True):
        if bar.lo is not None and bar.hi is not None:
            axes.plot([bar.lo, bar.hi], [place, place], color=INK, linewidth=1.1)
    axes.axvline(0, color=INK, linewidth=0.7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(places, [readable(bar.name, 28) for bar in shown], size=size)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


def _limits(axes: Axes, panel: Bars, shown: Sequence[Bar]) -> None:
    """Room for every bar, interval and the reference, and for 0."""
    ends = [0.0, *(bar.value for bar in shown)]
    ends += [end for bar in shown for end in (bar.lo, bar.hi) if end is not None]
    ends += [] if panel.reference is None else [panel.reference]
    low, high = min(ends), max(ends)
    room = 0.04 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)


def upset(panel: UpSet) -> Tile:
    """Bars of sets as a tile, the smallest sets first; dividends beside them."""
    order = sorted(panel.bars, key=lambda bar: (bar.name.count("1"), bar.name[::-1]))
    members = [readable(name, 18) for name in panel.members]
    left = max(0.68, 0.14 + max(inches(name, 6.5) for name in members))
    wide, tall = max(1.1, min(0.19 * len(order), 9.0)), 1.45
    foot = 0.08 + 0.135 * len(members)
    strongest = sorted(panel.dividends, key=lambda bar: -abs(bar.value))[:MAX_DIVIDENDS]
    beside = [bar for bar in panel.dividends if bar in strongest][:MAX_DIVIDENDS]
    names = 0.3 + max((inches(readable(bar.name, 24), 6.5) for bar in beside), default=0.0)

    def draw(frame: Frame) -> None:
        axes = frame.axes(left, foot, wide, tall)
        _sets(axes, order, members)
        axes.set_ylabel(fitting(panel.what, 7.5, tall + 0.3), size=7.5)
        if beside:
            other = frame.axes(left + wide + names, 0.3, 1.15, tall + foot - 0.3)
            _draw(other, [Bar(name=readable(b.name, 24), value=b.value) for b in beside],
                  [LIGHT[-1]] * len(beside), 6.5)  # fmt: skip
            other.locator_params(axis="x", nbins=3)
            other.set_title("beyond its subsets", size=7.5, color=SOFT)

    width = left + wide + (names + 1.2 if beside else 0.05)
    left_out = len(panel.dividends) - len(beside)
    note = f"The {len(beside)} largest of {len(panel.dividends):,} dividends." if left_out else ""
    return Tile(width, tall + foot + (0.25 if beside else 0.05), draw, note)


def _sets(axes: Axes, order: Sequence[Bar], members: Sequence[str]) -> None:
    places, values = range(len(order)), [bar.value for bar in order]
    axes.bar(places, values, width=0.66, color=LIGHT[0])
    ends = [
        [max(0.0, bar.value - bar.lo) if bar.lo is not None else 0.0 for bar in order],
        [max(0.0, bar.hi - bar.value) if bar.hi is not None else 0.0 for bar in order],
    ]
    if any(map(any, ends)):
        axes.errorbar(places, values, yerr=ends, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    axes.axhline(0, color=RULE, linewidth=0.6)
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="y", nbins=6)
    # Under each bar a column of dots: filled where the member is in the set.
    for member, name in enumerate(members):
        down = -8 - 9.7 * member
        for place, bar in enumerate(order):
            inside = bar.name[member] == "1"
            axes.annotate(
                "●" if inside else "○", (place, 0), (0, down), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="center", size=7,
                color=INK if inside else FAINT, annotation_clip=False,
            )  # fmt: skip
        axes.annotate(
            name, (0, 0), (-5, down), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="center", size=6.5, color=SOFT, annotation_clip=False,
        )  # fmt: skip
