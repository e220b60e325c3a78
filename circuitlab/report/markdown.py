"""A report as Markdown: text of strangers can neither format it nor break out of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from circuitlab.labels import visible
from circuitlab.report.blocks import Block, Code, Drawing, Items, Part, Rows
from circuitlab.report.telling import Line, Name, Number, Strong

_MARKS = re.compile(r"([\\`*_\[\]<>|#&~])")


def markdown(title: str, parts: Sequence[Part], figures: Collection[str]) -> str:
    """The whole document; figures that were not drawn are left out."""
    lines = [f"# {_plain(title)}", ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for block in part.blocks:
            written = _block(block, figures)
            if written:
                lines += [*written, ""]
    return "\n".join(lines)


def _block(block: Block, figures: Collection[str]) -> list[str]:
    if isinstance(block, tuple):
        return [_line(block)]
    if isinstance(block, Items):
        return [f"- {_line(line)}" for line in block.lines]
    if isinstance(block, Rows):
        rule = "|".join(["", *["---"] * len(block.header), ""])
        rows = [[_line(cell, cell=True) for cell in row] for row in block.rows]
        return [_row(block.header), rule, *map(_row, rows)]
    if isinstance(block, Code):
        return ["```bash", visible(block.text), "```"]
    assert isinstance(block, Drawing)
    if block.name not in figures:
        return []
    return [f"![{block.name}](figures/{block.name}.svg)", "", _plain(block.caption)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _line(line: Line, *, cell: bool = False) -> str:
    return "".join(_span(span, cell=cell) for span in line)


def _span(span: object, *, cell: bool) -> str:
    if isinstance(span, Name):
        return _code(span.text, cell=cell)
    if isinstance(span, Strong):
        return f"**{_plain(span.text)}**"
    return span.text if isinstance(span, Number) else _plain(str(span))


def _plain(text: str) -> str:
    return _MARKS.sub(r"\\\1", visible(text))


def _code(text: str, *, cell: bool) -> str:
    """A code span whose fence is longer than any row of backticks inside.

    A bar ends a cell even there, so in a cell such a name is plain.
    """
    text = visible(text)
    if cell and "|" in text:
        return _plain(text)
    longest = max([len(run) for run in re.findall("`+", text)], default=0)
    fence, room = "`" * (longest + 1), " " if "`" in text or not text.strip() else ""
    return f"{fence}{room}{text}{room}{fence}"
