"""Panels of a plot: gate tables, dose–response curves, heat map, path hypotheses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.colors import LinearSegmentedColormap

from circuitlab_path_patching.plots.ink import (
    FAINT,
    HELPS,
    HURTS,
    INK,
    SOFT,
    entries,
    figure,
    number,
    readable,
    reading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from circuitlab import CircuitGraph

#: Gates, members and curves that one panel shows.
MAX_GATES, MAX_MEMBERS, MAX_CURVES, MAX_BARS = 4, 4, 12, 8

Frame = tuple[float, float, float, float]


@dataclass(frozen=True)
class Panel:
    """One panel: its heading, how to read it, its size in inches, and who draws it.

    ``draw`` gets a subfigure and the part of it that is free: left, bottom, right, top.
    """

    title: str
    caption: str
    width: float
    height: float
    draw: Callable[[SubFigure, Frame], None]


def panels(circuit: CircuitGraph) -> Iterator[Panel]:
    """Every panel of this module that the circuit has data for.

    Raises:
        GraphError: the data do not have the form that the analyses give them.
    """
    metric = circuit.graph.get("metric")
    unit = readable(metric.get("name") if isinstance(metric, Mapping) else metric or "metric", 30)
    for key, read in (
        ("gates", _gates), ("doses", _doses), ("heatmap", _heatmap), ("hypotheses", _hypotheses),
    ):  # fmt: skip
        with reading(f'graph["{key}"]'):
            yield from read(circuit.graph, unit)


# --- gates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gate:
    title: str
    members: list[str]
    table: list[tuple[str, float, float, float]]
    dividends: list[tuple[str, float]]


def _gates(graph: Mapping[str, Any], unit: str) -> Iterator[Panel]:
    known = [g for g in entries(graph, "gates") if g.get("table")]
    known.sort(key=lambda gate: not gate.get("drawn", True))
    gates = [_gate(g) for g in known if len(g["members"]) <= MAX_MEMBERS]
    shown = gates[:MAX_GATES]
    if not shown:
        return
    caption = (
        f"Left: {unit} with the members marked ● clean and the others corrupt.\n"
        "Right: what each set of members adds beyond its subsets (dividends)."
    )
    if len(shown) < len(known):
        caption += f" {len(shown)} of {len(known)} gates."
    widest = max(len(gate.table) for gate in shown)
    members = max(len(gate.members) for gate in shown)

    def draw(part: SubFigure, frame: Frame) -> None:
        grid = part.add_gridspec(
            len(shown), 2, left=0.16, right=0.97, bottom=frame[1] + 0.07, top=frame[3] - 0.05,
            hspace=0.4 + 0.16 * members, wspace=0.62, width_ratios=(1.7, 1),
        )  # fmt: skip
        for row, gate in enumerate(shown):
            _table(part.add_subplot(grid[row, 0]), gate, unit)
            _dividends(part.add_subplot(grid[row, 1]), gate)

    width, height = 5.0 + 0.1 * widest, max(2.6, (1.6 + 0.16 * members) * len(shown))
    yield Panel("Gates: every mixture of clean and corrupt", caption, width, height, draw)


def _gate(gate: Mapping[str, Any]) -> _Gate:
    members = [readable(name, 18) for name in gate["members"]]
    table = []
    for bits, *values in gate["table"]:
        if len(bits) != len(members) or set(bits) - set("01"):
            raise ValueError(f"subset {bits!r} does not fit {len(members)} members")
        mean, low, high = map(number, values)
        table.append((str(bits), mean, low, high))
    table.sort(key=lambda row: (row[0].count("1"), row[0][::-1]))
    dividends = [(readable(k, 22), number(v)) for k, v in (gate.get("dividends") or {}).items()]
    known = gate["type"] if gate.get("drawn", True) else gate.get("relation") or gate["type"]
    title = f"{readable(gate['name'], 16)}: {readable(known, 12)}"
    if gate.get("interaction") is not None:
        title += f"  interaction {figure(number(gate['interaction']))}"
    return _Gate(title, members, table, dividends)


def _table(axes: Axes, gate: _Gate, unit: str) -> None:
    places = range(len(gate.table))
    means = [mean for _, mean, _, _ in gate.table]
    reach = [
        [max(0.0, mean - low) for _, mean, low, _ in gate.table],
        [max(0.0, high - mean) for _, mean, _, high in gate.table],
    ]
    axes.bar(places, means, width=0.66, color="#8FB7D3")
    axes.errorbar(places, means, yerr=reach, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    axes.axhline(0, color="#999999", linewidth=0.6)
    axes.set_title(gate.title, size=8.5, weight="bold")
    axes.set_ylabel(unit, size=7.5)
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(gate.table) - 0.4)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelsize=7)
    # Under each bar a column of dots, as in an UpSet plot: filled where the member is clean.
    for member, name in enumerate(gate.members):
        for place, (bits, *_) in enumerate(gate.table):
            on = bits[member] == "1"
            axes.annotate(
                "●" if on else "○", (place, 0), (0, -9 - 9.5 * member),
                xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
                va="center", size=7, color=INK if on else FAINT, annotation_clip=False,
            )  # fmt: skip
        axes.annotate(
            name, (0, 0), (-5, -9 - 9.5 * member), xycoords="axes fraction", ha="right",
            textcoords="offset points", va="center", size=6.5, color=SOFT, annotation_clip=False,
        )  # fmt: skip


def _dividends(axes: Axes, gate: _Gate) -> None:
    least = sorted((abs(v) for _, v in gate.dividends), reverse=True)[:MAX_BARS][-1:]
    found = [(name, v) for name, v in gate.dividends if [abs(v)] >= least]
    places = range(len(found))
    axes.barh(places, [v for _, v in found], height=0.62, color="#C9C9C9")
    axes.axvline(0, color="#999999", linewidth=0.6)
    axes.set_yticks(list(places), [name for name, _ in found], size=6)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=3)
    axes.set_title("dividends", size=8.5)


# --- dose–response --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    name: str
    mean: list[float]
    low: list[float]
    high: list[float]
    slope: float | None
    threshold: float | None


def _doses(graph: Mapping[str, Any], unit: str) -> Iterator[Panel]:
    doses = graph.get("doses")
    if not doses or not doses["curves"]:
        return
    alphas = [number(a) for a in doses["alphas"]]
    if len(set(alphas)) < 2:
        raise ValueError("there are not two doses")
    curves = [_curve(curve, len(alphas)) for curve in doses["curves"]]
    shown = curves[:MAX_CURVES]
    unit = readable(doses.get("what", unit), 40)
    columns = min(len(shown), 2 if len(shown) <= 4 else 3 if len(shown) <= 9 else 4)
    rows = math.ceil(len(shown) / columns)
    caption = (
        "α = 0: each run's own value; α = 1: the other run's; beyond: extrapolated.\n"
        "Band: interval over pairs. Dotted: the threshold."
    )
    caption += f" First {len(shown)} of {len(curves)}." if len(shown) < len(curves) else ""

    def draw(part: SubFigure, frame: Frame) -> None:
        grid = part.add_gridspec(
            rows, columns, left=0.55 / width, right=1 - 0.15 / width, bottom=frame[1] + 0.07,
            top=frame[3] - 0.04, hspace=0.45, wspace=0.14,
        )  # fmt: skip
        first: Axes | None = None
        for index, curve in enumerate(shown):
            axes = part.add_subplot(grid[index // columns, index % columns], sharey=first)
            first = first or axes
            _response(axes, alphas, curve)
            axes.tick_params(labelleft=index % columns == 0, labelsize=7)
            if index + columns >= len(shown):
                axes.set_xlabel("dose α", size=7.5)
        part.text(0.1 / width, (frame[1] + frame[3]) / 2, unit, rotation=90, va="center", size=8)

    width = max(1.0 + 1.75 * columns, 4.6)
    title = "Dose–response: how much of a patch it takes"
    yield Panel(title, caption, width, 0.5 + 1.7 * rows, draw)


def _curve(curve: Mapping[str, Any], n: int) -> _Curve:
    mean, low, high = ([number(v) for v in curve[key]] for key in ("mean", "lo", "hi"))
    if not n == len(mean) == len(low) == len(high):
        raise ValueError(f"curve {curve['name']!r} has not {n} values")
    slope, threshold = (
        None if curve.get(key) is None else number(curve[key]) for key in ("slope", "threshold")
    )
    return _Curve(readable(curve["name"], 20), mean, low, high, slope, threshold)


def _response(axes: Axes, alphas: list[float], curve: _Curve) -> None:
    axes.axhline(0, color="#999999", linewidth=0.6)
    axes.fill_between(alphas, curve.low, curve.high, color=HELPS, alpha=0.18, linewidth=0)
    axes.plot(alphas, curve.mean, color=HELPS, linewidth=1.5)
    if curve.threshold is not None:
        axes.axvline(curve.threshold, color=HURTS, linewidth=1.0, linestyle=":")
    slope = "" if curve.slope is None else f"slope {figure(curve.slope)}"
    axes.set_title(curve.name, size=8, weight="bold")
    axes.set_title(slope, size=7, loc="right", color=SOFT)
    axes.set_xlim(min(alphas), max(alphas))
    axes.locator_params(axis="x", nbins=3)


# --- heat map -------------------------------------------------------------------------------------


def _heatmap(graph: Mapping[str, Any], unit: str) -> Iterator[Panel]:
    heatmap = graph.get("heatmap")
    if not heatmap:
        return
    rows = [readable(name, 22) for name in heatmap["rows"]]
    columns = [readable(name, 14) for name in heatmap["columns"]]
    values = [
        [math.nan if v is None else number(v) for v in row] for row in heatmap["values"]
    ]  # fmt: skip
    if not rows or not columns or len(values) != len(rows) or {*map(len, values)} != {len(columns)}:
        raise ValueError(f"values are not {len(rows)} rows of {len(columns)}")
    what = readable(heatmap.get("what", unit), 90)
    width = min(14.0, max(4.8, 2.2 + 0.34 * len(columns)))

    upright = max(map(len, columns)) <= 2
    foot = 0.3 if upright else 0.2 + 0.066 * max(map(len, columns))

    def draw(part: SubFigure, frame: Frame) -> None:
        inches = part.bbox.height / part.dpi
        low, high = frame[1] + foot / inches, frame[3] - 0.1 / inches
        axes = part.add_axes((1.25 / width, low, 1 - 2.35 / width, high - low))
        largest = max((abs(v) for row in values for v in row if v == v), default=0.0) or 1.0
        sign = LinearSegmentedColormap.from_list("sign", [HELPS, "#FFFFFF", HURTS], N=257)
        scale = sign.with_extremes(bad="#DDDDDD")
        mesh = axes.pcolormesh(
            values, cmap=scale, vmin=-largest, vmax=largest, edgecolors="#FFFFFF", linewidth=0.5,
            rasterized=len(rows) * len(columns) > 5000,
        )  # fmt: skip
        # Names that would run into one another are thinned out.
        for names, setter, most in ((columns, axes.set_xticks, 60), (rows, axes.set_yticks, 45)):
            step = math.ceil(len(names) / most)
            setter([i + 0.5 for i in range(0, len(names), step)], names[::step], size=7)
        axes.tick_params(axis="x", rotation=0 if upright else 90)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        side = part.add_axes((1 - 0.95 / width, low, 0.14 / width, high - low))
        bar = part.colorbar(mesh, cax=side)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
        bar.set_label(unit, size=7.5)

    caption = f"Colour: {what}.\nWhite is no effect."
    height = 0.6 + foot + 0.36 * min(max(len(rows), 4), 20)
    yield Panel("Where it matters", caption, width, height, draw)


# --- hypotheses -----------------------------------------------------------------------------------


_LOST = "#E9C9A0"


class _Bar(NamedTuple):
    """One hypothesis: the share explained, its interval where there is one, what was asked."""

    name: str
    share: float
    interval: list[float]
    said: str
    lost: bool


def _bar(entry: Mapping[str, Any]) -> _Bar:
    n_paths, lost = int(number(entry["n_paths"])), entry.get("mode") == "noise"
    interval = [] if entry["lo"] is None else [number(entry["lo"]), number(entry["hi"])]
    said = f"{n_paths:,} path{'s' * (n_paths != 1)}{' corrupted' * lost}"
    return _Bar(readable(entry["name"], 26), number(entry["explained"]), interval, said, lost)


def _hypotheses(graph: Mapping[str, Any], unit: str) -> Iterator[Panel]:
    listed = [entry for entry in entries(graph, "hypotheses") if entry["explained"] is not None]
    bars = [_bar(entry) for entry in listed]
    if not bars:
        return

    def draw(part: SubFigure, frame: Frame) -> None:
        # Few bars stay slim: the axes are only as high as they need.
        inches = part.bbox.height / part.dpi
        height = (0.1 + 0.42 * len(bars)) / inches
        axes = part.add_axes((0.36, frame[3] - 0.1 / inches - height, 0.42, height))
        for place, bar in enumerate(bars):
            axes.barh([place], [bar.share], height=0.56, color=_LOST if bar.lost else "#8FB7D3")
            if bar.interval:
                axes.plot(bar.interval, [place, place], color=INK, linewidth=1.2)
            axes.annotate(
                bar.said, (1, place), (6, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", size=7, color=SOFT,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle="--")
        ends = [end for bar in bars for end in (bar.share, *bar.interval)]
        axes.set_xlim(min(-0.05, 1.05 * min(ends)), max(1.08, 1.05 * max(ends)))
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars], size=8)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of the effect explained")
        axes.spines["left"].set_visible(False)

    lines = ["Blue: only these paths are clean, and keep this share of the effect."]
    if any(bar.lost for bar in bars):
        lines.append("Sand: only these are corrupt, and lose it. Line: interval over pairs.")
    else:
        lines.append("1: they explain all of it; 0: nothing. Line: interval over pairs.")
    yield Panel("Path hypotheses", "\n".join(lines), 5.4, 1.05 + 0.42 * len(bars), draw)
