"""Circuits to write and read: one by hand, strange ones by Hypothesis, and what analyses give."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from circuitlab.graph import CircuitGraph
from circuitlab.wiring import Wiring


def planted() -> CircuitGraph:
    """Five components of a small model, five effects, provenance of several types."""
    wiring = Wiring(2, 3)
    graph = CircuitGraph(
        model="tiny", n_layers=2, n_heads=3, d_model=24, parallel=False, options={"top": 4},
        commit=None,
    )  # fmt: skip
    for name in ("input", "a0.h1", "m0", "a1.h2", "logits"):
        component = wiring.component(name)
        graph.add_component(name, kind=component.kind, layer=component.layer)
    graph.nodes["a0.h1"]["score"] = -0.5
    graph.add_effect("input", "a0.h1", -1.5, port="v")
    graph.add_effect("a0.h1", "a1.h2", -0.1, port="k", scores=[1.0, None])
    graph.add_effect("a0.h1", "a1.h2", 0.25, port="q")
    graph.add_effect("m0", "a1.h2", 1e-7, port="q", kept=False)
    graph.add_effect("a1.h2", "logits", -3.0)
    return graph


#: Any text, lone surrogates and control characters too, and what other programs stumble over.
TEXTS = st.one_of(
    st.text(st.characters(), min_size=1, max_size=8),
    st.sampled_from(
        ["null", "1", "true", '"', "<b>&amp;", "]]>", "(p=0.5)", "\x00", "\ud800", "\u202e", " a ",
         "0_5_3", "n0", "\\u{7}", "\x07", "a\r\nb", "", "E_1_0", "-0"]
    ).filter(bool),
)  # fmt: skip
#: As large as a score may be.
_NUMBERS = st.floats(-1e100, 1e100)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | _NUMBERS | TEXTS | st.just(""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
#: Names of data are words of programs: no control characters, and none that files need.
NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=6).filter(
    lambda name: (
        name
        not in ("id", "source", "target", "key", "port", "kind", "layer", "score", "label",
                "position", "feature", "index", "feature_type", "supernode", "circuitlab_name")
    )
)  # fmt: skip
_DATA = st.dictionaries(NAMES, _VALUES, max_size=3)


@st.composite
def circuits(draw: st.DrawFn) -> CircuitGraph:
    """A circuit with any names, ports and data."""
    circuit = CircuitGraph(**{**draw(_DATA), "score": "score of a test"})
    names = draw(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
    for name in names:
        kind = draw(st.sampled_from(["head", "feature", "error", "token", "logits", "cluster"]))
        place: dict[str, Any] = draw(
            st.sampled_from([{}, {"position": 3}, {"position": -1}, {"token": "\x1b<b>"}])
        )
        layer = draw(st.integers(0, 3))
        circuit.add_node(name, **{**draw(_DATA), **place, "kind": kind, "layer": layer})
    for i, source in enumerate(names):
        for target in names[i + 1 :]:
            for port in draw(st.lists(TEXTS | st.just(""), max_size=2, unique=True)):
                data = draw(_DATA)
                circuit.add_edge(source, target, port, **{**data, "score": draw(_NUMBERS)})
    return circuit
