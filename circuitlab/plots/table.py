"""Tables of words and numbers: three rules, no lines between cells."""

from __future__ import annotations

from collections.abc import Sequence

from circuitlab.panels import TextTable
from circuitlab.plots.frame import Frame, Tile
from circuitlab.plots.ink import INK, fitting, inches

#: Rows and columns that a panel shows, and inches that a column and all columns take at most.
MAX_ROWS, MAX_COLUMNS, WIDEST, WHOLE = 40, 12, 2.6, 10.0
_LINE, _GAP, _SIZE = 0.175, 0.22, 7.5


def table(panel: TextTable) -> Tile:
    """The table as a tile; columns of numbers stand at the right of their columns."""
    most = min(WIDEST, WHOLE / len(panel.header[:MAX_COLUMNS]))
    header = [fitting(name, _SIZE, most, True) for name in panel.header[:MAX_COLUMNS]]
    rows = [[_words(cell, most) for cell in row[:MAX_COLUMNS]] for row in panel.rows[:MAX_ROWS]]
    columns = list(zip(*rows, strict=True))
    widths = [
        max(inches(name, _SIZE, True), *(inches(words, _SIZE) for words in column))
        for name, column in zip(header, columns, strict=True)
    ]
    numeric = [
        all(_is_number(row[number]) for row in panel.rows[:MAX_ROWS])
        for number in range(len(header))
    ]
    width = sum(widths) + _GAP * (len(widths) - 1)
    height = _LINE * (len(rows) + 1) + 0.18

    def draw(frame: Frame) -> None:
        for y, weight in ((height, 1.2), (height - _LINE - 0.06, 0.7), (0.04, 1.2)):
            frame.line([0, width], [y, y], color=INK, linewidth=weight)
        x = 0.0
        for name, column, wide, right in zip(header, columns, widths, numeric, strict=True):
            at, side = (x + wide, "right") if right else (x, "left")
            style = {"ha": side, "va": "center_baseline", "size": _SIZE, "color": INK}
            frame.text(at, height - 0.02 - _LINE / 2, name, weight="bold", **style)
            for number, words in enumerate(column):
                frame.text(at, height - 0.08 - _LINE * (number + 1.5), words, **style)
            x += wide + _GAP

    return Tile(width, height, draw, _left_out(panel))


def _words(cell: str | float, widest: float) -> str:
    if isinstance(cell, str):
        return fitting(cell, _SIZE, widest)
    text = f"{cell:,}" if isinstance(cell, int) and abs(cell) < 1e9 else f"{cell:.3g}"
    return text.replace("-", "−")


def _is_number(cell: str | float) -> bool:
    try:
        float(str(cell)[:40].replace("−", "-").removesuffix("%"))
    except ValueError:
        return False
    return True


def _left_out(panel: TextTable) -> str:
    found: Sequence[tuple[int, int, str]] = (
        (len(panel.rows), MAX_ROWS, "rows"),
        (len(panel.header), MAX_COLUMNS, "columns"),
    )
    return " ".join(f"First {most} of {n:,} {what}." for n, most, what in found if n > most)
