"""What a report is made of, before it is written: parts with lines, lists, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from circuitlab.report.telling import Line


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    lines: Sequence[Line]


@dataclass(frozen=True)
class Rows:
    """A table: headings in plain words, and a line in each cell."""

    header: Sequence[str]
    rows: Sequence[Sequence[Line]]


@dataclass(frozen=True)
class Drawing:
    """A figure by its name, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class Code:
    """A command to copy."""

    text: str


#: A paragraph is a line by itself.
Block = Line | Items | Rows | Drawing | Code


@dataclass(frozen=True)
class Part:
    """A titled part of a report."""

    title: str
    blocks: list[Block] = field(default_factory=list)
