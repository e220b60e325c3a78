"""Sentences of a report: every number in them is looked up in the results, none is written down."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuitlab.errors import GraphError

#: Shares of less are rounding of float32.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Name:
    """A name of something: shown as it is, in the letters of code."""

    text: str


@dataclass(frozen=True)
class Strong:
    """What a reader should see first."""

    text: str


@dataclass(frozen=True)
class Number:
    """A figure: it needs no escaping."""

    text: str


Span = str | Name | Strong | Number
#: A line of text as what it is made of.
Line = tuple[Span, ...]


def told(template: str, results: Mapping[str, Any]) -> Line:
    """A sentence with its numbers put in.

    In the template ``{a.b:form}`` stands for ``results["a"]["b"]``; ``form`` is empty for a number
    or text, ``%`` for a share in percent, ``name`` for a name or several, ``strong`` for what
    stands out.

    Raises:
        GraphError: the template holds a digit of its own, or asks for what is not there.
    """
    line: list[Span] = []
    for literal, path, form, _ in string.Formatter().parse(template):
        if any(c.isdigit() for c in literal):
            raise GraphError(f"template {template!r} has a number of its own; take it from results")
        if literal:
            line.append(literal)
        if path is not None:
            line.append(_shown(look_up(results, path), form or ""))
    return tuple(line)


def share(results: Mapping[str, Any], at: str) -> Line:
    """The ``value`` at a path as a share, with its ``interval`` where it has one, or the reason.

    Raises:
        GraphError: there is none.
    """
    found = look_up(results, at)
    if found["value"] is None:
        return told(f"undefined: {{{at}.reason}}", results)
    interval = "" if found["interval"] is None else f" {{{at}.interval:%}}"
    return told(f"{{{at}.value:%}}{interval}", results)


def plain(line: Line) -> str:
    """A line as text alone."""
    return "".join(span if isinstance(span, str) else span.text for span in line)


def look_up(results: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, parts of a list by number.

    Raises:
        GraphError: there is none.
    """
    value: Any = results
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise GraphError(f"the results have no {path!r}") from None
    return value


def figure(value: Any, form: str = "") -> str:
    """A value of the results as a report shows it.

    Whole numbers as they are; others rounded to three digits; with form ``%`` a hundred times the
    value and the sign, and 0 where the share is rounding; pairs in brackets; ``undefined`` for
    None.
    """
    if value is None:
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return f"[{', '.join(figure(part, form) for part in value)}]"
    if form == "%":
        return f"{_rounded(100 * value if abs(value) >= ROUNDING else 0.0)} %"
    return f"{value:,}" if isinstance(value, int) else _rounded(value)


def _rounded(value: float) -> str:
    """Three significant digits; no minus before zero."""
    value += 0.0
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _shown(value: Any, form: str) -> Span:
    if form == "name":
        return Name(", ".join(value) if isinstance(value, list) else figure(value))
    if form == "strong":
        return Strong(figure(value))
    return value if isinstance(value, str) else Number(figure(value, form))
