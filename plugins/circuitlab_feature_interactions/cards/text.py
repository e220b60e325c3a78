r"""Text of strangers as the page shows it: inert, on one line, every character visible."""

from __future__ import annotations

import unicodedata
from html import escape

#: Control, surrogate, format, private use, unassigned, line separator, paragraph separator.
_INVISIBLE = frozenset({"Cc", "Cs", "Cf", "Co", "Cn", "Zl", "Zp"})
#: Characters of a token that are shown; a tooltip has more.
SHOWN, TOLD = 32, 400


def shown(text: str, width: int = TOLD) -> str:
    r"""``text`` as the content of an element or of a quoted attribute, cut to ``width``.

    A line end is ``⏎``, other characters without a glyph are ``\u{hex}``.
    """
    clipped = text if len(text) <= width else text[: width - 1] + "…"
    return escape("".join(map(_visible, clipped)), quote=True)


def number(value: float) -> str:
    """Three figures; a minus sign that is one."""
    return f"{value:.3g}".replace("-", "−")


def percent(value: float) -> str:
    """A share in per cent, three figures."""
    return f"{number(100 * value)} %"


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    if unicodedata.category(character) in _INVISIBLE:
        return f"\\u{{{ord(character):x}}}"
    return character
