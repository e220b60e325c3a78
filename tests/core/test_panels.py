"""Panels: what they hold, what they refuse, and that they survive a circuit file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitlab import (
    Bar,
    Bars,
    CircuitGraph,
    Curve,
    Curves,
    GraphError,
    Heatmap,
    Histogram,
    Image,
    Panel,
    Point,
    Scatter,
    TextTable,
    UpSet,
    panels_of,
)
from circuitlab.panels import KINDS

MAKE: dict[str, Callable[..., Any]] = {
    "heatmap": lambda **given: Heatmap(
        **{
            "title": "t", "rows": ["a", "b"], "columns": ["x"], "values": [[1.5], [None]],
            "what": "w", **given,
        }
    ),
    "curves": lambda **given: Curves(
        **{
            "title": "t", "x": [1, 2.5], "x_label": "x", "y_label": "y",
            "curves": [Curve(name="c", mean=[1, 2]), Curve(name="d", mean=[3, None])], **given,
        }
    ),
    "scatter": lambda **given: Scatter(
        **{
            "title": "t", "x_label": "x", "y_label": "y",
            "points": [Point(name="p", x=1, y=-0.5), Point(name="q", x=0, y=0, kind="OR")], **given,
        }
    ),
    "bars": lambda **given: Bars(
        **{"title": "t", "what": "w", "bars": [Bar(name="b", value=1, lo=0, hi=2)], **given}
    ),
    "upset": lambda **given: UpSet(
        **{
            "title": "t", "what": "w", "members": ["a", "b"],
            "bars": [Bar(name="00", value=0), Bar(name="10", value=1.5)], **given,
        }
    ),
    "histogram": lambda **given: Histogram(
        **{"title": "t", "what": "w", "series": {"s": [1, 2.5], "r": [0]}, **given}
    ),
    "table": lambda **given: TextTable(
        **{"title": "t", "header": ["a", "b"], "rows": [["x", 1], ["y", 2.5]], **given}
    ),
    "image": lambda **given: Image(
        **{
            "title": "t", "x": [0, 1], "y": [-1, 0.5], "x_label": "x", "y_label": "y",
            "pixels": [[[0, 0, 0.25], [1, 0, 0]], [[0, 1, 0], [0.5, 0.5, 0.5]]],
            "points": [Point(name="p", x=1, y=-0.5)], **given,
        }
    ),
}  # fmt: skip


def circuit_with(*panels: Panel) -> CircuitGraph:
    circuit = CircuitGraph()
    for panel in panels:
        panel.add_to(circuit)
    return circuit


def test_every_kind_is_tested() -> None:
    """The tests below go over all kinds of panels."""
    assert list(KINDS) == list(MAKE)


@pytest.mark.parametrize("kind", MAKE)
def test_panel_survives_a_circuit_file(kind: str) -> None:
    """What is read back from JSON is the panel that was added, and panels keep their order."""
    panel, other = MAKE[kind](caption="how to read it"), MAKE["table"]()
    read = CircuitGraph.from_json(circuit_with(panel, other).to_json())
    assert panels_of(read) == [panel, other]
    assert read.graph["plots"][0]["kind"] == kind
    assert panels_of(CircuitGraph()) == []


def test_form_of_a_panel_in_a_file() -> None:
    """The JSON is the fields by name, nested as they are; what has its default is left out."""
    panel = Curves(
        title="t", x=(0, 0.5), x_label="x", y_label="y", log_y=True,
        curves=[Curve(name="c", mean=[1, None], lo=[0, None], hi=[2, None], mark=0.25)],
    )  # fmt: skip
    assert panel.to_json() == {
        "kind": "curves", "title": "t", "x": [0, 0.5], "x_label": "x", "y_label": "y",
        "log_y": True,
        "curves": [
            {"name": "c", "mean": [1, None], "lo": [0, None], "hi": [2, None], "mark": 0.25}
        ],
    }  # fmt: skip


@given(
    table=st.lists(
        st.tuples(*[st.none() | st.floats(-1e100, 1e100) | st.integers(-(10**9), 10**9)] * 3),
        min_size=1,
    ),
    word=st.text(),
)
def test_values_come_back_exactly(table: list[tuple[float | None, ...]], word: str) -> None:
    """No number and no text is changed by a file, not even by a bit."""
    panel = MAKE["heatmap"](
        title=word, rows=[word] * len(table), columns=[word] * 3, values=table, notes=None
    )
    (read,) = panels_of(CircuitGraph.from_json(circuit_with(panel).to_json()))
    assert isinstance(read, Heatmap)
    assert repr(read.values) == repr(tuple(table))
    assert read == panel


def test_panels_do_not_change() -> None:
    """Lists that were given may change later; the panel does not, nor does the circuit's copy."""
    values = [[1.0], [2.0]]
    panel = MAKE["heatmap"](values=values)
    circuit = circuit_with(panel)
    values[0][0] = 9.0
    circuit.graph["plots"][0]["values"][1][0] = 7.0
    assert panel.values == ((1.0,), (2.0,))


def test_numbers_of_other_libraries_become_plain() -> None:
    """What numpy counts as a number is a plain one in the circuit."""
    numpy = pytest.importorskip("numpy")
    bar = Bar(name="b", value=numpy.float32(0.5), lo=numpy.int64(0), hi=numpy.float64(1.0))
    assert json.dumps(bar.to_json()) == '{"name": "b", "value": 0.5, "lo": 0, "hi": 1.0}'


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("heatmap", {"title": 1}, "title has a int where text must be"),
        ("heatmap", {"rows": "ab"}, "rows has a str and not a list"),
        ("heatmap", {"rows": []}, "it has no cells"),
        ("heatmap", {"values": [[1]]}, "values has 1 rows, not 2"),
        ("heatmap", {"values": [[1], [1, 2]]}, "values has a row of 2, not 1"),
        ("heatmap", {"values": [[math.nan], [1]]}, "values has a number that is not finite"),
        ("heatmap", {"values": [[math.inf], [1]]}, "values has a number that is not finite"),
        ("heatmap", {"values": [[1e101], [1]]}, "above 1e\\+100"),
        ("heatmap", {"values": [[10**5000], [1]]}, "above 1e\\+100"),
        ("heatmap", {"values": [[True], [1]]}, "values has a bool where a number must be"),
        ("heatmap", {"values": [["1"], [1]]}, "values has a str where a number must be"),
        ("heatmap", {"notes": [["a", "b"]]}, "notes has 1 rows, not 2"),
        ("heatmap", {"diverging": 1}, "diverging has a int where true or false must be"),
        ("heatmap", {"what": None}, "what has a NoneType where text must be"),
        ("heatmap", {"rows": ["r"] * 1001, "columns": ["c"] * 1001}, "1,002,001 cells, more than"),
        ("curves", {"x": [1]}, "curve 'c' has 2 values, x 1; give one for each"),
        ("curves", {"x": [2, 1]}, "x does not rise"),
        ("curves", {"x": [1, 1]}, "x does not rise"),
        ("curves", {"x": [0, 1], "log_x": True}, "x is not above 0 on a logarithmic axis"),
        ("curves", {"curves": []}, "the curves have no value"),
        ("curves", {"curves": [Curve(name="c", mean=[None, None])]}, "the curves have no value"),
        ("curves", {"curves": [Point(name="p", x=1, y=1)]}, "a Point where Curve must be"),
        (
            "curves", {"curves": [Curve(name="c", mean=[1, 0])], "log_y": True},
            "curve 'c' is not above 0 on a logarithmic axis; give None there",
        ),
        ("scatter", {"points": []}, "it has no point"),
        ("scatter", {"guide": "circle"}, "'circle'; give one of none, quadrants, diagonal"),
        ("bars", {"bars": []}, "it has no bar"),
        ("bars", {"reference": math.nan}, "reference has a number that is not finite"),
        ("upset", {"bars": [Bar(name="0", value=1)]}, "bar '0' is no set of 2 members"),
        ("upset", {"bars": [Bar(name="02", value=1)]}, "bar '02' is no set of 2 members"),
        ("upset", {"bars": [Bar(name="00", value=1)] * 2}, "a set has two bars"),
        ("upset", {"members": list("abcdefg")}, "it has 7 members"),
        ("histogram", {"series": {}}, "it has no series"),
        ("histogram", {"series": {"s": []}}, "series 's' is empty"),
        ("histogram", {"series": [1]}, "series has a list and not a mapping"),
        ("table", {"rows": []}, "it has no cells"),
        ("table", {"rows": [["x"]]}, "rows has a row of 1, not 2"),
        ("table", {"rows": [["x", None]]}, "rows has a NoneType where a number must be"),
        ("image", {"x": [0]}, "it has no plane; give at least two places"),
        ("image", {"y": [1, 1]}, "y does not rise; sort it"),
        ("image", {"pixels": [[[0, 0, 0]] * 2]}, "pixels has 1 rows, not 2"),
        ("image", {"pixels": [[[0, 0, 0]]] * 2}, "pixels has a row of 1, not 2"),
        ("image", {"pixels": [[[0, 0]] * 2] * 2}, "a pixel is no colour"),
        ("image", {"pixels": [[[0, 0, 1.5]] * 2] * 2}, "a pixel is no colour"),
        ("image", {"pixels": [[[0, 0, -0.5]] * 2] * 2}, "a pixel is no colour"),
        ("image", {"pixels": [[[0, 0, None]] * 2] * 2}, "NoneType where a number must be"),
        ("image", {"channels": ["a", "b"]}, "channels has 2 names; name red, green and blue"),
    ],
)  # fmt: skip
def test_refused(kind: str, given: dict[str, Any], said: str) -> None:
    """A panel that cannot be drawn is refused when it is made: what it is, what is wrong."""
    with pytest.raises(GraphError, match=said) as caught:
        MAKE[kind](**given)
    noun = KINDS[kind].noun
    assert str(caught.value).startswith(f"{noun}: " if "title" in given else f"{noun} 't': ")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Curve(name="c", mean=[1], lo=[1]), "curve 'c': an interval has two ends"),
        (lambda: Curve(name="c", mean=[1], lo=[1, 2], hi=[1]), "curve 'c': lo has 2 values, mean"),
        (lambda: Bar(name="b", value=1, hi=1), "bar 'b': an interval has two ends"),
        (lambda: Bar(name="b", value=1, lo=2, hi=1), "bar 'b': lo 2 is above hi 1"),
        (lambda: Point(name="p", x=1, y=math.nan), "point 'p': y has a number that is not finite"),
        (lambda: Point(name="p", x=1, y=1, members=[[1]]), "point 'p': a member is no place"),
    ],
)
def test_elements_are_refused(make: Callable[[], object], said: str) -> None:
    """So is a curve, a bar or a point, by its own name."""
    with pytest.raises(GraphError, match=said):
        make()


def test_tensors_are_told_apart_from_lists() -> None:
    """A tensor is refused, and the message says how to make it a list."""
    torch = pytest.importorskip("torch")
    with pytest.raises(GraphError, match=r"values has a Tensor and not a list; .*\.tolist\(\)"):
        MAKE["heatmap"](values=torch.zeros(2, 1))
    assert MAKE["heatmap"](values=torch.ones(2, 1).tolist()).values == ((1.0,), (1.0,))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("x", r'graph\["plots"\] of the circuit is a str, not a list of panels'),
        ([3], "panel 1 of the circuit cannot be plotted: it is none of heatmap, curves"),
        ([{}], "it is none of"),
        ([{"kind": ["heatmap"]}], "it is none of"),
        ([{"kind": "pie"}], "it is none of"),
        ([{"kind": "table", "title": "t"}], "a table lacks header, rows"),
        ([MAKE["bars"]().to_json() | {"colour": "red"}], "a bar plot has no 'colour'"),
        ([MAKE["bars"]().to_json() | {"bars": {"name": "b"}}], "bars has a dict and not a list"),
        ([MAKE["bars"]().to_json() | {"bars": [3]}], "bars has a int where Bar must be"),
        ([MAKE["bars"]().to_json() | {"bars": [{"name": "b"}]}], "a bar lacks value"),
        (
            [MAKE["bars"]().to_json() | {"bars": [{"name": "b", "value": "x"}]}],
            "bar 'b': value has a str where a number must be",
        ),
        (
            [MAKE["table"]().to_json(), MAKE["heatmap"]().to_json() | {"values": [[[1]], [2]]}],
            "panel 2 of the circuit .*heat map 't': values has a list where a number must be; run",
        ),
    ],
)  # fmt: skip
def test_malformed_files_are_named(data: object, said: str) -> None:
    """A file that someone edited is refused by the panel and the part that is wrong."""
    circuit = CircuitGraph(plots=data)
    with pytest.raises(GraphError, match=said):
        panels_of(circuit)
