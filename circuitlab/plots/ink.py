"""What the plots share: colours, text that every font shows and its size, gate symbols."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.path import Path as Outline

from circuitlab.symbols import SYMBOLS

#: Okabe & Ito's colours: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5230")
#: The same, light, for bars.
LIGHT = ("#8FB7D3", "#E9C9A0", "#9BCFBD", "#E3B7D0", "#F0DC9A", "#C9C9C9")
BLUE, ORANGE = COLOURS[:2]
GATE_COLOURS = {"AND": "#0072B2", "ADD": "#009E73", "OR": "#E69F00", "XOR": "#CC79A7"}
INK, SOFT, RULE, FAINT, RED = "#222222", "#555555", "#999999", "#BBBBBB", "#C00000"
MISSING, GRID, GATE_FILL = "#D4D4D4", "#EDEDED", "#FFF3C4"

FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine


def readable(text: object, width: int = 40) -> str:
    r"""``text`` on one line, at most ``width`` characters, every character with a glyph.

    What the font cannot show is written as ``\u{hex}``; blanks at the ends are shown.
    """
    whole = str(text)
    clipped = whole[: width + 1]  # a stranger's text may be long
    inner = clipped.lstrip(" ")
    left = len(clipped) - len(inner)
    if len(whole) <= width:
        inner = inner.rstrip(" ")
    right = len(clipped) - left - len(inner)
    shown = "␣" * left + "".join(map(_glyph, inner)) + "␣" * right
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def dark(colour: str) -> str:
    """A colour dark enough for text on white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.72 * part):02X}" for part in parts)


def inches(text: str, size: float, bold: bool = False) -> float:
    """How wide a text of this size in points is."""
    face = _face(bold)
    face.set_size(100, 72)  # large, so that the grid of the glyphs does not count
    face.set_text(text)
    width: float = face.get_width_height()[0] / 64 / 100 * size / 72
    return width


def fitting(text: object, size: float, width: float, bold: bool = False) -> str:
    """``text`` readable, and cut where it is wider than so many inches."""
    shown = readable(text, max(1, int(width / (0.2 * size / 72))))
    while len(shown) > 1 and inches(shown, size, bold) > width:
        shown = shown[:-2].rstrip() + "…"
    return shown


def broken(text: str, size: float, width: float, most: int = 4, bold: bool = False) -> list[str]:
    """``text`` readable, in at most so many lines none of which is wider than ``width`` inches."""
    lines: list[str] = []
    for part in text[:2000].splitlines():
        line = ""
        for word in part.split():
            longer = f"{line} {readable(word, 200)}".strip()
            if line and inches(longer, size, bold) > width:
                lines.append(line)
                longer = readable(word, 200)
            line = longer
        lines.append(line)
    lines = [line for line in lines if line]
    if len(lines) > most:
        lines[most - 1] += " …"
    return [fitting(line, size, width, bold) for line in lines[:most]]


def power(value: float) -> str:
    """A number on a logarithmic axis."""
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    figures, _, exponent = f"{value:.0e}".partition("e")
    raised = str(int(exponent)).translate(_RAISED)
    return f"10{raised}" if figures == "1" else f"{figures}·10{raised}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@cache
def marker(kind: str) -> Outline | str:
    """The gate's symbol as a marker, upright: inputs below, the output above."""
    if kind not in SYMBOLS:
        return "o"
    body, *lines = SYMBOLS[kind].outlines
    if lines and min(y for line in lines for _, y in line) > min(y for _, y in body):
        # Lines inside leave room for a word, which a marker does not have.
        heights = [y for line in lines for _, y in line]
        down = (min(heights) + max(heights)) / 2
        lines = [tuple((x, y - down) for x, y in line) for line in lines]
    points = [*body]
    codes: list[Any] = [Outline.MOVETO, *[Outline.CURVE4] * (len(body) - 1)]
    for line in lines:
        # There and back, so that nothing is filled beside it.
        points += [*line, *line[-2::-1]]
        codes += [Outline.MOVETO, *[Outline.CURVE4] * (2 * len(line) - 2)]
    return Outline(points, codes)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart so that none is nearer than ``gap`` to another.

    The sum of squared moves is the least there is (isotonic regression, pooling neighbours); then
    all move together as far as ``low`` and ``high`` ask, ``low`` where both cannot be.
    """
    order = sorted(range(len(places)), key=lambda n: (places[n], n))
    pools: list[list[float]] = []  # sum and number of places that move together
    for step, n in enumerate(order):
        pools.append([places[n] - gap * step, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    sunk = [total / count for total, count in pools for _ in range(int(count))]
    top = high - gap * (len(places) - 1)
    moved = {
        n: max(min(at, top), low) + gap * step
        for step, (n, at) in enumerate(zip(order, sunk, strict=True))
    }
    return [moved[n] for n in range(len(places))]


def _glyph(character: str) -> str:
    shown = character.isprintable() and _face(False).get_char_index(ord(character))
    return character if shown else f"\\u{{{ord(character):x}}}"


@cache
def _face(bold: bool) -> Any:
    weight = "bold" if bold else "normal"
    return get_font(findfont(FontProperties(family=FONT, weight=weight)))
