"""Panels of every kind, and what tests of plots read from a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from circuitlab import (
    Bar,
    Bars,
    CircuitGraph,
    Curve,
    Curves,
    Heatmap,
    Histogram,
    Image,
    Panel,
    Point,
    Scatter,
    TextTable,
    UpSet,
)
from circuitlab.plots import page

HEATMAP = Heatmap(
    title="Where it matters", caption="White is no effect.", rows=["a0", "a1"],
    columns=[" The", "cat", "$x$"], values=[[-3.0, 0.0, 1.0], [0.5, None, 2.0]],
    what="effect", row_label="layer", column_label="token",
    notes=[["n1", "n2", "n3"], ["n4", "n5", "n6"]],
)  # fmt: skip
CURVES = Curves(
    title="Norms", x=[0, 1, 2], x_label="layer", y_label="norm",
    curves=[
        Curve(name="stream", mean=[1, 2, 4], lo=[0.5, 1, 3], hi=[2, 3, 5]),
        Curve(name="attention", mean=[1, 2, 3.99]),
        Curve(name="MLP", mean=[1, 1.5, None]),
    ],
)  # fmt: skip
SCATTER = Scatter(
    title="Eigenvalues", x_label="real", y_label="imaginary", guide="unit-circle",
    points=[
        Point(name=f"a{i}", x=0.3 * i - 0.5, y=0.2 * i, kind="copies" if i % 2 else "")
        for i in range(4)
    ],
)  # fmt: skip
BARS = Bars(
    title="Hypotheses", what="share", reference=1.0,
    bars=[
        Bar(name="one path", value=0.47, lo=0.4, hi=0.5, kind="kept", note="1 path"),
        Bar(name="all", value=-0.2, kind="lost", note="4 paths"),
    ],
)  # fmt: skip
UPSET = UpSet(
    title="gate1: AND", what="logit-difference", members=["a0.h0", "a0.h1"],
    bars=[
        Bar(name="11", value=10, lo=9, hi=11), Bar(name="00", value=0, lo=-0.5, hi=0.5),
        Bar(name="10", value=1), Bar(name="01", value=0.5, lo=0, hi=1),
    ],
    dividends=[Bar(name="a0.h0", value=1), Bar(name="a0.h0+a0.h1", value=8.5)],
)  # fmt: skip
HISTOGRAM = Histogram(
    title="Margins", what="margin", series={"a1.h0": [0.0, 0.1, 0.9], "a1.h1": [0.5]}
)
TABLE = TextTable(
    title="Top tokens", header=["token", "score"], rows=[[" Mary", 2.94567], ["x", -1]]
)
IMAGE = Image(
    title="Slice", x=[-0.25, 0.5, 1.25], y=[0, 1], x_label="α", y_label="β",
    pixels=[[[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]], [[0, 0, 1], [0, 0.5, 0.5], [0, 0, 0]]],
    channels=["like A", "like B", "like C"], points=[Point(name="A", x=0, y=0)],
)  # fmt: skip
ALL: tuple[Panel, ...] = (HEATMAP, CURVES, SCATTER, BARS, UPSET, HISTOGRAM, TABLE, IMAGE)


def circuit_with(*panels: Panel, **graph: Any) -> CircuitGraph:
    circuit = CircuitGraph(model="tiny", task="toy", metric="logit-difference", **graph)
    for panel in panels:
        panel.add_to(circuit)
    return circuit


def compose(*panels: Panel, **graph: Any) -> Figure:
    """The page of some panels, drawn with the plots' own settings."""
    with page.settings():
        figure = page.compose(circuit_with(*panels, **graph), panels)
        figure.canvas.draw()
    return figure


def axes_of(figure: Figure, panel: int = 0) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() == f"panel {panel}"]


def shown(svg: Path) -> list[str]:
    """Texts of an SVG: they are drawn as outlines, and each is named in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text("utf-8"))
