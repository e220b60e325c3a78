r"""Text of strangers as the page shows it: inert, on one line, every character visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from html import escape
from typing import Any

#: Control, surrogate, format, private use, unassigned, line separator, paragraph separator.
_INVISIBLE = frozenset({"Cc", "Cs", "Cf", "Co", "Cn", "Zl", "Zp"})
#: Characters of a token that are shown; a tooltip has more.
SHOWN, TOLD = 32, 400
#: Context dependence of what was never active behind another token.
UNKNOWN = "never active behind another token"


def shown(text: str, width: int = TOLD) -> str:
    r"""``text`` as the content of an element or of a quoted attribute, cut to ``width``.

    A line end is ``⏎``, other characters without a glyph are ``\u{hex}``.
    """
    return escape(plain(text, width), quote=True)


def plain(text: str, width: int = TOLD) -> str:
    """The same before it is escaped."""
    clipped = text if len(text) <= width else text[: width - 1] + "…"
    return "".join(map(_visible, clipped))


def number(value: float) -> str:
    """Three figures; a minus sign that is one."""
    return f"{value:.3g}".replace("-", "−")


def percent(value: float) -> str:
    """A share in per cent, three figures."""
    return f"{number(100 * value)} %"


def density_words(facts: Mapping[str, Any]) -> list[str]:
    """How often a feature is active, in words, the most important first."""
    if not facts["active"]:
        fact = f"silent at all {facts['tokens']:,} tokens: density below {percent(facts['below'])}"
        if facts["dead"] is True:
            return [f"{fact}, dead"]
        return [f"{fact}; {facts['tokens_needed']:,} tokens are needed to call it dead"]
    told = [f"density {percent(facts['density'])}"]
    if "interval" in facts:
        low, high = facts["interval"]
        told.append(f"[{percent(low)}, {percent(high)}]")
    return [*told, f"· {facts['active']:,} of {facts['tokens']:,} tokens"]


def context_words(facts: Mapping[str, Any]) -> list[list[str]]:
    """Context dependence: of each way what it is and its interval, if any; empty if unknown."""
    told: list[list[str]] = []
    for name in ("alone", "hidden") if facts["tokens"] else ():
        told.append([f"{name} {number(facts[name]['score'])}"])
        if ends := facts[name].get("interval"):
            told[-1].append(f"[{number(ends[0])}, {number(ends[1])}]")
    return told


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    if unicodedata.category(character) in _INVISIBLE:
        return f"\\u{{{ord(character):x}}}"
    return character
