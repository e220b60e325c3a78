"""Panels of rows and columns: heat maps, images, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from circuitlab.panels.marks import Point
from circuitlab.panels.panel import Panel
from circuitlab.plain import few, shaped


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


@dataclass(frozen=True, kw_only=True)
class Image(Panel):
    """A plane of colours over two axes, as of a slice through activations.

    Attributes:
        x: Rising, ``[n_x]``: the middles of the columns.
        y: Rising, ``[n_y]``: the middles of the rows; the first row is at the bottom.
        pixels: Red, green and blue, 0 to 1 each, ``[n_y][n_x][3]``.
        x_label: What x is, with its unit.
        y_label: What y is.
        channels: What red, green and blue are; a legend says so. None, or three.
        points: Places that are marked and named.

    Raises:
        GraphError: shapes do not agree, an axis does not rise, or a colour is not 0 to 1.
    """

    x: Sequence[float]
    y: Sequence[float]
    pixels: Sequence[Sequence[Sequence[float]]]
    x_label: str
    y_label: str
    channels: Sequence[str] = ()
    points: Sequence[Point] = ()

    kind = "image"
    noun = "image"

    def _check(self) -> None:
        if min(len(self.x), len(self.y)) < 2:
            raise ValueError("it has no plane; give at least two places along each axis")
        few(3 * len(self.x) * len(self.y), "values")
        for name, places in (("x", self.x), ("y", self.y)):
            if any(a >= b for a, b in pairwise(places)):
                raise ValueError(f"{name} does not rise; sort it, each place once")
        shaped(self.pixels, len(self.y), len(self.x), "pixels")
        for pixel in (pixel for row in self.pixels for pixel in row):
            if len(pixel) != 3 or not all(0 <= part <= 1 for part in pixel):
                raise ValueError("a pixel is no colour; give red, green and blue, 0 to 1 each")
        if len(self.channels) not in (0, 3):
            fact = f"channels has {len(self.channels)} names"
            raise ValueError(f"{fact}; name red, green and blue, or none")
