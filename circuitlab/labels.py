r"""Text of strangers made safe to show: in DOT, in XML and on a terminal.

Tokens, task names and plugin labels may hold anything, lone surrogates included. What has no
glyph of its own is shown as ``\u{hex}``, so a label can neither break a document nor hide in it.
"""

from __future__ import annotations

import unicodedata
from html import escape as _escape_html

#: Control, surrogate, format, private use, unassigned, line separator, paragraph separator.
_INVISIBLE = frozenset({"Cc", "Cs", "Cf", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""``text`` with every character that has no glyph of its own written as ``\u{hex}``.

    The result is valid in XML and sends no control sequence to a terminal. Line ends are such
    characters too: the result is one line.

    >>> visible("bell" + chr(7))
    'bell\\u{7}'
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(_visible(character) for character in text)


def escape(text: str) -> str:
    r"""``text`` as the inside of a double-quoted DOT string that Graphviz shows literally.

    First :func:`visible`; then ``&`` becomes ``&amp;``, ``\`` becomes ``\\``, ``"`` becomes
    ``\"``, in this order, so that neither an entity, nor ``\N``, nor a closing quote survives.
    """
    return visible(text).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')


def escape_xml(text: str) -> str:
    """``text`` as the content of an XML element or of a quoted XML attribute."""
    return _escape_html(visible(text), quote=True)


def clip(text: str, width: int) -> str:
    """``text``, or its first ``width - 1`` characters and an ellipsis when it is longer.

    >>> clip("name mover head", 11)
    'name mover…'
    """
    return text if len(text) <= width else text[: max(width - 1, 0)].rstrip() + "…"


def excerpt(text: str, width: int = 200) -> str:
    """``text`` as a message quotes it: nothing invisible, and not all of a long one."""
    return visible(clip(text, width))


def invisible(character: str) -> bool:
    """Whether a character has no glyph of its own."""
    return unicodedata.category(character) in _INVISIBLE


def _visible(character: str) -> str:
    return f"\\u{{{ord(character):x}}}" if invisible(character) else character


def counted(number: int, noun: str) -> str:
    """``1 layer``, ``12 layers``, ``32,491 edges``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
