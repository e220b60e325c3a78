"""Document: the whole page as one HTML file that asks for nothing, from a network or a disk.

The policy in its head lets one script and one style through, by their hashes, and nothing else.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from circuitlab.comparing import compare_circuits
from circuitlab.errors import ResourceError
from circuitlab.graph import CircuitGraph
from circuitlab.labels import clip, escape_xml
from circuitlab.page.data import embed, page_data
from circuitlab.page.facts import caption, title
from circuitlab.page.fragments import Section, anchors

#: Parts of the page's script, in the order they stand in.
_SCRIPTS = ("data", "shown", "canvas", "view", "card", "controls", "start")


def compose(
    circuit: CircuitGraph,
    *,
    sections: Sequence[Section] = (),
    details: Mapping[str, Mapping[str, Any]] | None = None,
    other: CircuitGraph | None = None,
    head: Sequence[str] = (),
) -> str:
    """A circuit as an interactive HTML document; the same circuit gives the same text.

    Args:
        circuit: What an analysis gave. Of more than 20,000 effects the strongest are shown.
        sections: Parts that follow the circuit, as in a report.
        details: More about components, by name: ``role`` (text), ``pattern`` (``tokens`` and
            ``values`` [query][key], attention probabilities), ``effects`` (``noise`` and
            ``denoise``, in the metric's unit, negative helps), ``card`` (an SVG, or lines).
        other: A second circuit to compare: colours then say which of the two has an effect, as in
            ``compare_circuits(circuit, other).circuit``.
        head: Lines above the circuit, the first the largest.

    Raises:
        GraphError: a circuit, or details, are not well formed, or two circuits to compare are of
            models of different shapes.
    """
    shown = circuit if other is None else compare_circuits(circuit, other).circuit
    style, script = _style(), _script()
    names = anchors(sections)
    links = zip(["circuit", *names], ["Circuit", *(s.title for s in sections)], strict=True)
    nav = "".join(f'<a href="#{name}">{escape_xml(words)}</a>' for name, words in links)
    parts = "".join(
        f'<section class="part" id="{name}"><h2>{escape_xml(section.title)}</h2>\n{section.html}\n'
        f"</section>\n"
        for name, section in zip(names, sections, strict=True)
    )
    lines = "".join(f"<p>{escape_xml(line)}</p>" for line in head)
    return Template(_asset("page.html")).substitute(
        policy=_policy(script, style),
        title=escape_xml(clip(title(shown), 200)),
        caption=escape_xml(caption(shown)),
        whole="" if sections or head else ' class="whole"',
        nav=f'<nav aria-label="Sections">{nav}</nav>' if sections else "",
        head=f'<div class="head">{lines}</div>' if head else "",
        sections=parts,
        style=style,
        data=embed(page_data(shown, details or {})),
        script=script,
    )


def write_page(circuit: CircuitGraph, path: Path) -> None:
    """Write the circuit's page.

    Raises:
        GraphError: the circuit is not well formed.
        ResourceError: the file cannot be written.
    """
    text = compose(circuit)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"page {path.name!r} cannot be written: {error.strerror}; "
            f"check free space and permissions of its folder"
        ) from error


def _policy(script: str, style: str) -> str:
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        f"img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode("ascii")


@cache
def _style() -> str:
    return _asset("page.css")


@cache
def _script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


@cache
def _asset(name: str) -> str:
    return files("circuitlab.page").joinpath("assets", name).read_text(encoding="utf-8")
