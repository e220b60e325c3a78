"""A report as fragments of HTML: no script, no style, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from circuitlab.labels import escape_xml
from circuitlab.page import figure
from circuitlab.report.blocks import Block, Code, Drawing, Items, Part, Rows
from circuitlab.report.telling import Line, Name, Number, Strong


def fragment(part: Part, figures: Mapping[str, str]) -> str:
    """A part without its title; ``figures`` are SVGs by name, those not drawn are left out."""
    return "\n".join(filter(None, (_block(block, figures) for block in part.blocks)))


def _block(block: Block, figures: Mapping[str, str]) -> str:
    if isinstance(block, tuple):
        return f"<p>{_line(block)}</p>"
    if isinstance(block, Items):
        items = "".join(f"<li>{_line(line)}</li>" for line in block.lines)
        return f"<ul>{items}</ul>"
    if isinstance(block, Rows):
        head = "".join(f"<th>{escape_xml(name)}</th>" for name in block.header)
        rows = "".join(
            f"<tr>{''.join(f'<td>{_line(cell)}</td>' for cell in row)}</tr>" for row in block.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    if isinstance(block, Code):
        return f"<pre><code>{escape_xml(block.text)}</code></pre>"
    assert isinstance(block, Drawing)
    if block.name not in figures:
        return ""
    return figure(figures[block.name], block.caption)


def _line(line: Line) -> str:
    return "".join(map(_span, line))


def _span(span: object) -> str:
    if isinstance(span, Name):
        return f"<code>{escape_xml(span.text)}</code>"
    if isinstance(span, Strong):
        return f"<strong>{escape_xml(span.text)}</strong>"
    return escape_xml(span.text if isinstance(span, Number) else str(span))
