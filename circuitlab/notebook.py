"""Notebook: how objects show themselves, as text and as HTML that holds no markup of strangers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuitlab.labels import clip, escape_xml, visible

#: Rows of a table that are shown, and characters of a cell.
MAX_ROWS, MAX_CELL = 20, 200


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = ""
) -> str:
    """A table as HTML, every text escaped; of many rows the first, and how many there are."""
    parts = ["<table>"]
    if caption:
        parts.append(f"<caption>{escape_xml(clip(caption, MAX_CELL))}</caption>")
    if header:
        parts.append(f"<tr>{''.join(f'<th>{_cell(cell)}</th>' for cell in header)}</tr>")
    for row in rows[:MAX_ROWS]:
        parts.append(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>")
    parts.append("</table>")
    if len(rows) > MAX_ROWS:
        parts.append(f"<p>the first {MAX_ROWS} of {len(rows):,} rows</p>")
    return "".join(parts)


class Shown:
    """Shows itself in notebooks by what its ``_shown`` gives: a line of text, and HTML."""

    __slots__ = ()

    def _shown(self) -> tuple[str, str]:
        raise NotImplementedError

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The text, safe on a terminal, and the HTML."""
        text, html = self._shown()
        return {"text/plain": visible(text), "text/html": html}


def _cell(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return escape_xml(clip(text, MAX_CELL))
