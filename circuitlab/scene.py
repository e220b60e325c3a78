"""Scene: boxes, curves and text at fixed places, written as SVG or as DOT with pinned positions.

Coordinates are points (1/72 inch), y upwards, the origin at the lower left. The SVG needs no other
program and holds no link, script or reference to anything outside itself. The DOT is for
``neato -n2``, which places nothing and only draws: so PNG and PDF show exactly what the SVG shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from circuitlab.labels import escape, escape_xml

FONT = "Helvetica,Arial,sans-serif"

Point = tuple[float, float]

#: Advance widths of Helvetica in 1/1000 em, characters 32 to 126 (Adobe's font metrics).
_ADVANCES = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556,
    556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667,
    611, 778, 722, 278, 500, 667, 556, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667,
    667, 611, 278, 278, 278, 469, 556, 333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500,
    222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
)  # fmt: skip
#: Strokes and gaps of a line that is not solid, in points.
_DASHES = {"dashed": "5,3", "dotted": "1.5,2.5"}
#: Readers without Helvetica see a wider face (DejaVu Sans is 15 % wider); boxes leave it room.
_WIDER = 1.15


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text, centred at ``(x, y)``, or starting there when ``anchor`` is ``start``."""

    x: float
    y: float
    text: str
    size: float = 9.0
    colour: str = "#333333"
    bold: bool = False
    anchor: str = "middle"
    halo: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle centred at ``(x, y)`` with corners of the given radius, and its own texts.

    Where there are ``outlines``, Bezier points about the centre, they are drawn in place of the
    rectangle that bounds them: the first is closed and filled, the others are lines.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str
    radius: float = 0.0
    dashed: bool = False
    tooltip: str = ""
    texts: tuple[Text, ...] = ()
    outlines: tuple[tuple[Point, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """Bezier segments (1 + 3n points), then an arrowhead from the last point to ``tip``.

    ``dash`` is ``solid``, ``dashed`` or ``dotted``.
    """

    points: tuple[Point, ...]
    colour: str
    width: float
    opacity: float = 1.0
    tip: Point | None = None
    dash: str = "solid"
    tooltip: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture holds; later curves lie on top of earlier ones, boxes on top of curves."""

    width: float
    height: float
    title: str
    curves: Sequence[Curve] = field(default_factory=tuple)
    boxes: Sequence[Box] = field(default_factory=tuple)
    texts: Sequence[Text] = field(default_factory=tuple)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of ``text`` in points, on the safe side where the reader has no Helvetica."""
    units = sum(
        _ADVANCES[ord(c) - 32] if " " <= c <= "~" else (600 if ord(c) < 0x1100 else 1000)
        for c in text
    )
    return units * size * _WIDER * (1.17 if bold else 1.0) / 1000


def arrow_length(width: float) -> float:
    """Length in points of the arrowhead on a line ``width`` points wide."""
    return 5.0 + 1.3 * width


# --- SVG ------------------------------------------------------------------------------------------


def to_svg(scene: Scene) -> str:
    """The scene as one SVG element: valid XML, no prolog, so that it can stand inside HTML."""
    width, height = _n(scene.width), _n(scene.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}pt" height="{height}pt" '
        f'viewBox="0 0 {width} {height}" font-family="{FONT}">',
        f"<title>{escape_xml(scene.title)}</title>",
        f'<rect class="paper" width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    lines += [_curve_svg(curve, scene.height) for curve in scene.curves]
    lines += [_box_svg(box, scene.height) for box in scene.boxes]
    lines += [_text_svg(text, scene.height) for text in scene.texts]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _curve_svg(curve: Curve, top: float) -> str:
    first, *rest = [f"{_n(x)},{_n(top - y)}" for x, y in curve.points]
    pattern = _DASHES.get(curve.dash)
    dash = f' stroke-dasharray="{pattern}"' if pattern else ""
    opacity = f' opacity="{_n(curve.opacity)}"' if curve.opacity < 1 else ""
    head = ""
    if curve.tip is not None:
        corners = " ".join(f"{_n(x)},{_n(top - y)}" for x, y in _arrowhead(curve, curve.tip))
        head = f'<polygon points="{corners}" fill="{curve.colour}"/>'
    return (
        f'<g class="edge"{opacity}>{_title_svg(curve.tooltip)}<path d="M{first} C{" ".join(rest)}" '
        f'fill="none" stroke="{curve.colour}" stroke-width="{_n(curve.width)}"{dash}/>{head}</g>'
    )


def _box_svg(box: Box, top: float) -> str:
    dash = ' stroke-dasharray="3,2"' if box.dashed else ""
    texts = "".join(_text_svg(text, top) for text in box.texts)
    if box.outlines:
        return (
            f'<g class="node" stroke="{box.stroke}" stroke-linejoin="round">'
            f"{_title_svg(box.tooltip)}{_outlines_svg(box, top)}"
            f'<g stroke="none">{texts}</g></g>'
        )
    return (
        f'<g class="node">{_title_svg(box.tooltip)}'
        f'<rect x="{_n(box.x - box.width / 2)}" y="{_n(top - box.y - box.height / 2)}" '
        f'width="{_n(box.width)}" height="{_n(box.height)}" rx="{_n(box.radius)}" '
        f'fill="{box.fill}" stroke="{box.stroke}"{dash}/>{texts}</g>'
    )


def _outlines_svg(box: Box, top: float) -> str:
    paths = []
    for index, outline in enumerate(box.outlines):
        first, *rest = [f"{_n(box.x + x)},{_n(top - box.y - y)}" for x, y in outline]
        end, fill = ("", "none") if index else (" Z", box.fill)
        paths.append(f'<path d="M{first} C{" ".join(rest)}{end}" fill="{fill}"/>')
    return "".join(paths)


def _text_svg(text: Text, top: float) -> str:
    weight = ' font-weight="bold"' if text.bold else ""
    halo = ' paint-order="stroke" stroke="#ffffff" stroke-width="3"' if text.halo else ""
    # Centred by arithmetic: dominant-baseline is ignored by several converters.
    y = top - text.y + 0.35 * text.size
    return (
        f'<text x="{_n(text.x)}" y="{_n(y)}" text-anchor="{text.anchor}" '
        f'font-size="{_n(text.size)}" fill="{text.colour}"{weight}{halo}>'
        f"{escape_xml(text.text)}</text>"
    )


def _title_svg(tooltip: str) -> str:
    return f"<title>{escape_xml(tooltip)}</title>" if tooltip else ""


def _arrowhead(curve: Curve, tip: Point) -> tuple[Point, Point, Point]:
    (x0, y0), (x1, y1) = curve.points[-1], tip
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 or 1.0
    half = 0.35 * arrow_length(curve.width) + 0.5 * curve.width
    dx, dy = half * (x1 - x0) / length, half * (y1 - y0) / length
    return (x0 - dy, y0 + dx), (x1, y1), (x0 + dy, y0 - dx)


# --- DOT ------------------------------------------------------------------------------------------


def to_pinned_dot(scene: Scene, dpi: int = 72) -> str:
    """The scene as DOT for ``neato -n2``; ``dpi`` counts for bitmaps only."""
    # No node of Graphviz has a gate's shape and edges are drawn in an order of its own: both are
    # drawn by its marks for a background, in our order.
    marks = [mark for curve in scene.curves for mark in _curve_marks(curve)]
    marks += [mark for box in scene.boxes if box.outlines for mark in _outline_marks(box)]
    # In pieces: Graphviz refuses one long string.
    background = "\n + ".join(f'"{mark} "' for mark in marks) or '""'
    lines = [
        "digraph scene {",
        f'graph [bgcolor="white", pad="0", dpi="{dpi}", _background={background}];',
        f'node [fontname="{FONT}", fixedsize="true", margin="0", penwidth="1", label=""];',
        "z " + _attributes(pos="0,0", style="invis", shape="point", width="0", height="0"),
        "y " + _attributes(
            pos=f"{_n(scene.width)},{_n(scene.height)}",
            style="invis", shape="point", width="0", height="0",
        ),
    ]  # fmt: skip
    number = 0
    for box in scene.boxes:
        if not box.outlines:
            lines.append(f"b{number} {_box_dot(box)}")
            number += 1
        for text in box.texts:
            lines.append(f"b{number} {_text_dot(text)}")
            number += 1
    for text in scene.texts:
        lines.append(f"b{number} {_text_dot(text)}")
        number += 1
    return "\n".join([*lines, "}"]) + "\n"


def _curve_marks(curve: Curve) -> Iterator[str]:
    shade = curve.colour + f"{round(255 * curve.opacity):02x}"
    yield _style(f"setlinewidth({_n(curve.width)})")
    yield _style(curve.dash)
    yield f"c {len(shade)} -{shade} B {_points(curve.points)}"
    if curve.tip is not None:
        yield f"C {len(shade)} -{shade} {_style('solid')} {_style('setlinewidth(0)')}"
        yield f"P {_points(_arrowhead(curve, curve.tip))}"


def _outline_marks(box: Box) -> Iterator[str]:
    yield f"{_style('solid')} {_style('setlinewidth(1)')}"
    yield f"c {len(box.stroke)} -{box.stroke} C {len(box.fill)} -{box.fill}"
    for index, outline in enumerate(box.outlines):
        points = [(box.x + x, box.y + y) for x, y in outline]
        yield f"{'B' if index else 'b'} {_points(points)}"


def _style(style: str) -> str:
    return f"S {len(style)} -{style}"


def _points(points: Sequence[Point]) -> str:
    return f"{len(points)} " + " ".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _box_dot(box: Box) -> str:
    styles = ["filled"] + ["rounded"] * (box.radius > 0) + ["dashed"] * box.dashed
    return _attributes(
        pos=f"{_n(box.x)},{_n(box.y)}",
        shape="box",
        style=",".join(styles),
        fillcolor=box.fill,
        color=box.stroke,
        width=_n(box.width / 72),
        height=_n(box.height / 72),
    )


def _text_dot(text: Text) -> str:
    width = text_width(text.text, text.size, text.bold)
    x = text.x + width / 2 if text.anchor == "start" else text.x
    return _attributes(
        pos=f"{_n(x)},{_n(text.y)}",
        shape="box",
        style="filled" if text.halo else "solid",
        color="#ffffff00",
        fillcolor="#ffffffd0",
        label=escape(text.text) + ("\\l" if text.anchor == "start" else ""),
        fontsize=_n(text.size),
        fontcolor=text.colour,
        fontname="Helvetica,Arial,sans-serif bold" if text.bold else FONT,
        width=_n(width / 72),
        height=_n(text.size * 1.1 / 72),
    )


def _attributes(**attributes: str) -> str:
    return "[" + ", ".join(f'{name}="{value}"' for name, value in attributes.items()) + "];"


def _n(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 5e-5 else "0"
