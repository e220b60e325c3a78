"""What the plots share: colours, text that every font shows, and gate symbols as markers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from matplotlib.font_manager import findfont, get_font
from matplotlib.path import Path as Outline

from circuitlab import GraphError

#: Okabe & Ito's colours: told apart by every kind of colour vision.
HELPS, HURTS = "#0072B2", "#D55E00"
TYPE_COLOURS = {"AND": "#0072B2", "ADD": "#009E73", "OR": "#E69F00", "XOR": "#CC79A7"}
INK, SOFT, FAINT, RED = "#222222", "#555555", "#BBBBBB", "#C00000"
GATE_FILL = "#FFF3C4"

FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine


def readable(text: object, width: int = 40) -> str:
    r"""``text`` on one line, at most ``width`` characters, every character with a glyph.

    What the font cannot show is written as ``\u{hex}``; blanks at the ends are shown.
    """
    whole = str(text)
    inner = whole.strip(" ")
    left = len(whole) - len(whole.lstrip(" "))
    right = len(whole) - left - len(inner)
    shown = "␣" * left + "".join(map(_glyph, inner)) + "␣" * right
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def figure(value: float) -> str:
    """A number for people: signed, two significant figures, a true minus sign."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e4:
        text = f"{value:+.0e}"
    else:
        text = f"{value:+.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"
    return text.replace("-", "−")


def number(value: object) -> float:
    """A finite number of a circuit's data.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Name the part of a circuit file that does not have the form it must have."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = readable(f"{type(error).__name__}: {error}", 120)
        raise GraphError(
            f"{what} of the circuit cannot be plotted ({reason}); run the analysis again"
        ) from error


def entries(circuit_data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The list of dicts under ``key``, empty where there is none."""
    found = circuit_data.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise TypeError(f"{key} is not a list of objects")
    return found


@cache
def marker(kind: str) -> Outline | str:
    """The gate's symbol as a marker, upright: inputs below, the output above."""
    move, curve, close = Outline.MOVETO, Outline.CURVE4, Outline.CLOSEPOLY
    line = Outline.LINETO
    floor = [(-0.33, -0.72), (0.33, -0.72)]
    if kind == "AND":
        points = [(-1, -1), (1, -1), (1, 0), (1, 0.55), (0.55, 1), (0, 1)]
        points += [(-0.55, 1), (-1, 0.55), (-1, 0), (-1, -1)]
        return Outline(points, [move, line, line, *[curve] * 6, close])
    if kind in ("OR", "XOR"):
        points = [(-1, -1), *floor, (1, -1), (1, 0), (0.3, 0.72), (0, 1)]
        points += [(-0.3, 0.72), (-1, 0), (-1, -1), (-1, -1)]
        codes = [move, *[curve] * 9, close]
        if kind == "XOR":
            lower = [(x, y - 0.3) for x, y in points[:4]]
            points, codes = [*points, *lower], [*codes, move, *[curve] * 3]
        return Outline(points, codes)
    return {"ADD": "o", "MIXED": "D"}.get(kind, "s")


def _glyph(character: str) -> str:
    shown = character.isprintable() and _face().get_char_index(ord(character))
    return character if shown else f"\\u{{{ord(character):x}}}"


@cache
def _face() -> Any:
    return get_font(findfont(FONT))
