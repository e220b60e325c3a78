"""Fragments: parts of a page made elsewhere in CircuitLab, held to what a page allows."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser

from circuitlab.errors import GraphError
from circuitlab.labels import escape_xml, excerpt

_FORBIDDEN = frozenset({
    "script", "style", "link", "meta", "base", "iframe", "frame", "object", "embed", "form",
    "template", "noscript",
})  # fmt: skip
#: Attributes that name another document.
_REFERENCES = frozenset({"href", "xlink:href", "src", "srcset", "srcdoc", "action", "data"})


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own.

    A figure is a picture made by :func:`figure` or an ``<svg>`` without style attributes. The
    page's style has rules for ``table``, ``figure``, ``dl`` and the classes ``note``, ``good``,
    ``bad``, ``number`` (of table cells) and ``pair`` (figures side by side).

    Attributes:
        title: Its heading, as plain text.
        html: Its content: HTML without scripts, style and references, text already escaped.

    Raises:
        GraphError: the content has what a page does not allow.
    """

    title: str
    html: str

    def __post_init__(self) -> None:
        found = _Guard()
        found.feed(self.html)
        found.close()
        if found.fault:
            raise GraphError(
                f"section {excerpt(self.title)!r} has {found.fault}, which a page does not allow; "
                f"give plain HTML, and pictures by circuitlab.page.figure"
            )


def figure(svg: str, caption: str) -> str:
    """A picture as HTML: what its own style says cannot touch the page.

    Args:
        svg: One SVG document.
        caption: What it shows, as plain text; it is also read aloud.
    """
    start = svg.find("<svg")
    if start < 0:
        raise GraphError(f"figure {excerpt(caption)!r} is no SVG; give one <svg> element")
    text = svg[start:]
    if "xmlns=" not in text[: text.find(">")]:
        text = text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    data = b64encode(text.encode("utf-8", "backslashreplace")).decode("ascii")
    words = escape_xml(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def anchors(sections: Sequence[Section]) -> list[str]:
    """An id for each section, made of its title; no two are the same."""
    found: list[str] = []
    for section in sections:
        slug = "s-" + (re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "part")
        name, number = slug, 2
        while name in found:
            name, number = f"{slug}-{number}", number + 1
        found.append(name)
    return found


class _Guard(HTMLParser):
    """Finds the first thing in a fragment that could run, load, or restyle the page."""

    fault = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _FORBIDDEN:
            self.fault = self.fault or f"an element <{tag}>"
        for name, value in attrs:
            text = re.sub(r"[\s\x00-\x1f]", "", value or "").lower()
            inner = name in ("href", "xlink:href") and text.startswith("#")
            drawn = name == "src" and text.startswith("data:image/")
            loads = name in _REFERENCES and not (inner or drawn)
            if name == "style" or name.startswith("on") or loads:
                self.fault = self.fault or f"an attribute {name!r}"
