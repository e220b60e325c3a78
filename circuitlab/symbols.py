"""Gate symbols: how AND, OR, ADD, XOR and mixed gates are drawn, upright, inputs below.

Coordinates are points about the symbol's centre, y upwards; the shapes are those of logic diagrams
(IEEE Std 91, distinctive shapes), turned by a quarter. ADD, which logic does not have, is the
circled plus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

#: Bezier segments, 1 + 3n points.
Outline = tuple[tuple[float, float], ...]

#: Bezier arms of a quarter of a unit circle.
_ARM = 0.5523
_WIDTH, _HEIGHT, _DEPTH, _BACK = 46.0, 42.0, 6.0, 5.0


@dataclass(frozen=True, slots=True)
class Symbol:
    """A gate's picture.

    Attributes:
        meaning: What the gate says, for the legend.
        width: Of all of it.
        height: Of all of it; inputs enter below, the output leaves at the top of the middle.
        outlines: The first is closed and filled, the others are lines.
        word: What stands inside, with its place above the middle and its size.
        figure: Place and size of the interaction, where the symbol has room for it.
        spread: Share of the width over which inputs are spread.
        floor: Lowest point of the outline at a distance from the middle.
    """

    meaning: str
    width: float
    height: float
    outlines: tuple[Outline, ...]
    word: tuple[str, float, float]
    figure: tuple[float, float] | None
    spread: float
    floor: Callable[[float], float]

    def feet(self, n: int) -> list[tuple[float, float]]:
        """Where ``n`` inputs touch the symbol, from left to right."""
        places = [((i + 0.5) / n - 0.5) * self.spread * self.width for i in range(n)]
        return [(x, self.floor(x)) for x in places]


def _line(*corners: tuple[float, float]) -> Outline:
    """Straight lines as Bezier segments."""
    points = [corners[0]]
    for (x0, y0), (x1, y1) in pairwise(corners):
        points += [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (1 / 3, 2 / 3)]
        points.append((x1, y1))
    return tuple(points)


def _arch(width: float, height: float) -> Outline:
    """A box whose top is half a circle."""
    x, top, shoulder = width / 2, height / 2, height / 2 - width / 2
    arm = _ARM * x
    dome = ((x, shoulder + arm), (arm, top), (0.0, top))
    other = ((-arm, top), (-x, shoulder + arm), (-x, shoulder))
    return (*_line((-x, shoulder), (-x, -top), (x, -top), (x, shoulder)), *dome, *other)


def _hollow(width: float, floor: float) -> Outline:
    """The hollow lower side of a shield, a parabola, left to right."""
    rise = floor + _DEPTH * 4 / 3
    return ((-width / 2, floor), (-width / 6, rise), (width / 6, rise), (width / 2, floor))


def _shield(width: float, floor: float, top: float) -> Outline:
    x, rise = width / 2, top - floor
    bow = ((x, floor + 0.5 * rise), (0.3 * x, top - 0.14 * rise), (0.0, top))
    other = ((-0.3 * x, top - 0.14 * rise), (-x, floor + 0.5 * rise), (-x, floor))
    return (*_hollow(width, floor), *bow, *other)


def _circle(radius: float) -> Outline:
    r, arm = radius, radius * _ARM
    return (
        (0, -r), (arm, -r), (r, -arm), (r, 0), (r, arm), (arm, r), (0, r),
        (-arm, r), (-r, arm), (-r, 0), (-r, -arm), (-arm, -r), (0, -r),
    )  # fmt: skip


def _on_hollow(x: float) -> float:
    share = x / _WIDTH + 0.5
    return -_HEIGHT / 2 + 4 * _DEPTH * share * (1 - share)


#: The symbol of each type of gate.
SYMBOLS: Mapping[str, Symbol] = MappingProxyType({
    "AND": Symbol(
        "every member is needed", _WIDTH, 40.0, (_arch(_WIDTH, 40.0),),
        ("AND", 2.5, 9.5), (-9.0, 7.5), 0.8, lambda x: -20.0,
    ),
    "OR": Symbol(
        "any one member suffices", _WIDTH, _HEIGHT, (_shield(_WIDTH, -21.0, 21.0),),
        ("OR", 1.5, 9.5), (-8.5, 7.5), 0.7, _on_hollow,
    ),
    "ADD": Symbol(
        "members add up", 38.0, 38.0,
        (_circle(19.0), _line((-7, 6), (7, 6)), _line((0, -1), (0, 13))),
        ("ADD", -8.0, 8.5), None, 0.6, lambda x: -math.sqrt(19.0**2 - x * x),
    ),
    "XOR": Symbol(
        "one member without the other", _WIDTH, _HEIGHT + _BACK,
        (
            _shield(_WIDTH, _BACK / 2 - 21.0, _BACK / 2 + 21.0),
            _hollow(_WIDTH, -_BACK / 2 - 21.0),
        ),
        ("XOR", 3.5, 9.5), (-6.0, 7.5), 0.7, lambda x: _on_hollow(x) - _BACK / 2,
    ),
    "MIXED": Symbol(
        "no one rule fits", 58.0, 40.0, (_line((0, -20), (29, 0), (0, 20), (-29, 0), (0, -20)),),
        ("mixed", 0.0, 8.5), None, 0.4, lambda x: -20.0 * (1 - abs(x) / 29),
    ),
})  # fmt: skip
