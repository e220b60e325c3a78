"""Scatter plots: points, gates and guides stand where they belong, and names beside them."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Circle
from matplotlib.text import Annotation, Text
from plot_samples import SCATTER, axes_of, compose

from circuitlab import Point, Scatter
from circuitlab.panels import Guide
from circuitlab.plots.ink import marker, spread
from circuitlab.plots.scatter import sector
from circuitlab.symbols import SYMBOLS

GATE = Point(
    name="AND +9\na0.h0, a0.h1", x=0.95, y=0.05, kind="AND", members=[[1.0, 0.0], [0.9, 0.1]]
)


def plane(points: list[Point], guide: Guide = "gates") -> Scatter:
    return Scatter(title="t", x_label="x", y_label="y", points=points, guide=guide)


def spiral(n: int = 60) -> list[Point]:
    """``n`` points at all angles, those of the largest weight outside."""
    return [
        Point(
            name=f"a{i // 8}.h{i % 8} → logits", x=abs(i / n * math.cos(2.4 * i)),
            y=i / n * math.sin(2.4 * i), weight=-i / n,
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("noise", "denoise", "expected"),
    [
        (1, 0, "AND"), (0, 1, "OR"), (0.5, 0.5, "ADD"), (-0.5, 0.5, "XOR"), (0.5, -0.5, "XOR"),
        (-1, 0, "AND"), (0, -1, "OR"), (-0.5, -0.5, "ADD"), (1, 0.41, "AND"), (1, 0.42, "ADD"),
        (0.41, 1, "OR"), (0.42, 1, "ADD"), (1, -0.41, "AND"), (1, -0.42, "XOR"),
        (-0.41, 1, "OR"), (-0.42, 1, "XOR"), (1, -1e-18, "AND"),
    ],
)  # fmt: skip
def test_sector_is_the_nearest_type(noise: float, denoise: float, expected: str) -> None:
    """Sectors reach 22.5 degrees to each side, tan 22.5° = 0.4142; half a turn changes nothing."""
    assert sector(noise, denoise) == expected


def test_points_stand_at_their_places() -> None:
    """Each point is at its x and y; larger weights are larger and on top."""
    points = spiral(20)
    (axes,) = axes_of(compose(plane(points)))
    (drawn,) = axes.collections
    found = [tuple(place) for place in drawn.get_offsets()]
    expected = sorted(points, key=lambda point: abs(point.weight or 0))
    assert found == [pytest.approx((point.x, point.y)) for point in expected]
    sizes = list(drawn.get_sizes())
    assert sizes == sorted(sizes)
    assert sizes[-1] > 5 * sizes[0]


@pytest.mark.parametrize("guide", ["gates", "unit-circle", "diagonal"])
def test_axes_are_equal_and_hold_every_point(guide: Guide) -> None:
    """A unit is as long to the right as upwards: angles are what they seem to be."""
    for scale in (0.05, 1.0, 7.0, -3.0):
        points = [Point(name="", x=scale * p.x, y=scale * p.y) for p in spiral(30)]
        (axes,) = axes_of(compose(plane(points, guide)))
        assert axes.get_xlim() == axes.get_ylim()
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height)
        places = axes.collections[0].get_offsets()
        assert axes.get_xlim()[0] <= places.min() <= places.max() <= axes.get_xlim()[1]


def test_guides() -> None:
    """The circle has radius 1 about 0, the diagonal is y = x, quadrants are two lines at 0."""
    (axes,) = axes_of(compose(SCATTER))
    (circle,) = (patch for patch in axes.patches if isinstance(patch, Circle))
    assert (circle.center, circle.radius) == ((0, 0), 1.0)
    assert axes.get_xlim()[1] > 1

    points = [Point(name="", x=2, y=30), Point(name="", x=5, y=11)]
    (axes,) = axes_of(compose(plane(points, "diagonal")))
    (line,) = axes.lines
    assert line.get_xdata().tolist() == line.get_ydata().tolist() == list(axes.get_xlim())

    for guide, lines in (("quadrants", 2), ("none", 0)):
        (axes,) = axes_of(compose(plane(points, guide)))  # type: ignore[arg-type]  # from a tuple
        assert len(axes.lines) == lines
        assert (axes.get_xlim()[0] <= 0) == (guide == "quadrants")
        assert axes.get_xlim()[1] < 10 < axes.get_ylim()[1]


def test_kinds_are_told_by_colour_and_shape() -> None:
    """Each kind has a colour and a marker of its own, and a legend names it once."""
    points = [Point(name="", x=i, y=i % 3, kind=f"kind {i % 7}") for i in range(14)]
    figure = compose(plane(points, "none"))
    (axes,) = axes_of(figure)
    looks = {
        (tuple(drawn.get_facecolor()[0]), drawn.get_paths()[0].vertices.tobytes())
        for drawn in axes.collections
    }
    assert len(looks) == len({colour for colour, _ in looks}) == 7
    assert len({shape for _, shape in looks}) == 7
    legend = [text for text in figure.texts if text.get_text().startswith("kind")]
    assert [text.get_text() for text in legend] == [f"kind {i}" for i in range(7)]
    box = axes.get_window_extent()
    for text in legend:
        assert text.get_window_extent().x1 <= box.x1 + 0.1 * figure.dpi
        assert text.get_window_extent().y0 > box.y1


def test_gate_types_have_their_symbols() -> None:
    """A point of a gate's kind is drawn by the symbol of circuit diagrams; the legend says what."""
    points = [Point(name="", x=i, y=i, kind=kind) for i, kind in enumerate(SYMBOLS)]
    figure = compose(plane(points, "none"))
    (axes,) = axes_of(figure)
    shapes = {drawn.get_paths()[0].vertices.tobytes() for drawn in axes.collections}
    assert shapes == {_vertices(kind) for kind in SYMBOLS}
    words = {text.get_text() for text in figure.texts}
    assert {f"{kind}: {symbol.meaning}" for kind, symbol in SYMBOLS.items()} <= words


def _vertices(kind: str) -> Any:
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(marker(kind))
    return style.get_path().transformed(style.get_transform()).vertices.tobytes()


def test_names_do_not_overlap() -> None:
    """At most 12 of 60 points are named, the strongest among them, and no two texts overlap."""
    other = Point(name="OR −1\nm0, m1", x=0, y=0.9, kind="OR", members=[[0, 1], [0.1, 0.8]])
    points = [*spiral(60), GATE, other]
    (axes,) = axes_of(compose(plane(points)))
    inside = axes.get_window_extent()
    texts = [a for a in axes.get_children() if isinstance(a, Annotation) and a.zorder == 6]
    boxes = [Text.get_window_extent(text) for text in texts]  # without the line to the point
    named = [text.get_text() for text in texts if "→" in text.get_text()]
    strongest = [p.name for p in sorted(spiral(60), key=lambda p: p.weight or 0)]
    assert strongest[0] in named
    assert 5 <= len(named) <= 12
    assert [name for name in strongest if name in named] == named
    for box, another in combinations(boxes, 2):
        overlap = (
            min(box.x1, another.x1) - max(box.x0, another.x0),
            min(box.y1, another.y1) - max(box.y0, another.y0),
        )
        assert min(overlap) < 3  # pixels; the two lines of one gate touch
    assert all(box.x0 >= inside.x0 and box.x1 <= inside.x1 for box in boxes)


def test_point_with_members_is_joined_to_them() -> None:
    """One line leads from each member's place to the symbol, which covers none of them."""
    (axes,) = axes_of(compose(plane([GATE])))
    lines = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    joins = [line for line in lines if line[0] in ([1.0, 0.0], [0.9, 0.1])]
    assert [line[0] for line in joins] == [[1.0, 0.0], [0.9, 0.1]]
    assert joins[0][1] == joins[1][1]
    for line in joins:
        assert math.dist(*axes.transData.transform(line)) > 12
    assert {"AND +9", "a0.h0, a0.h1"} <= {text.get_text() for text in axes.texts}


@given(st.lists(st.floats(-5, 105), max_size=12), st.floats(0.5, 20))
def test_spread_places_keep_order_and_distance(places: list[float], gap: float) -> None:
    """No two are nearer than the gap, none leaves the range if all fit, and the order stays."""
    moved = spread(places, gap, 0.0, 100.0)
    order = sorted(range(len(places)), key=lambda n: (places[n], n))
    inner = [moved[n] for n in order]
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(inner))
    if gap * (len(places) - 1) <= 100:
        assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)


@given(st.lists(st.floats(30, 70), min_size=2, max_size=4))
def test_spread_moves_least(places: list[float]) -> None:
    """No other places that keep the gap are nearer to the given ones in sum of squares."""
    moved = spread(places, 5.0, -1000.0, 1000.0)
    cost = sum((a - b) ** 2 for a, b in zip(places, moved, strict=True))
    order = sorted(range(len(places)), key=lambda n: (places[n], n))
    for first in range(len(places)):
        # Move a run of neighbours, and with them whatever they would push.
        for step in (-0.01, 0.01):
            trial = [moved[n] for n in order]
            trial[first] += step
            run = range(first + 1, len(trial)) if step > 0 else range(first - 1, -1, -1)
            for n in run:
                edge = trial[n - 1] + 5.0 if step > 0 else trial[n + 1] - 5.0
                trial[n] = max(trial[n], edge) if step > 0 else min(trial[n], edge)
            other = sum((places[n] - at) ** 2 for n, at in zip(order, trial, strict=True))
            assert other >= cost - 1e-6
