"""The wiring: published counts, who reaches whom, and names."""

from __future__ import annotations

import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitlab import GraphError, Wiring
from circuitlab.wiring import Component, Receiver

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans())


def test_gpt2_small_has_the_published_counts() -> None:
    """157 sources, 445 receivers and 32,491 edges, as EAP-IG and MIB count them."""
    wiring = Wiring(12, 12)
    assert (len(wiring.sources), len(wiring.receivers), wiring.n_edges) == (157, 445, 32_491)
    assert len(set(wiring.edges)) == 32_491


@given(SIZES)
def test_edges_are_those_of_the_oracle(size: tuple[int, int, bool]) -> None:
    """Blocks, counts and indices agree with an independent enumeration."""
    n_layers, n_heads, parallel = size
    wiring = Wiring(n_layers, n_heads, parallel)
    expected = set(oracles.edge_names(n_layers, n_heads))
    if parallel:
        own = {(f"a{n}.h{h}", f"m{n}", "") for n in range(n_layers) for h in range(n_heads)}
        expected -= own
    found = wiring.edges
    assert set(found) == expected
    assert len(found) == len(expected) == wiring.n_edges
    assert len(set(wiring.sources)) == len(wiring.sources)
    assert len(set(wiring.receivers)) == len(wiring.receivers)


@given(SIZES)
def test_blocks_tile_the_receivers(size: tuple[int, int, bool]) -> None:
    """Blocks follow one another without gap, and later ones hear no fewer sources."""
    wiring = Wiring(*size)
    blocks = list(wiring.blocks())
    stops = [0, *(block.receivers.stop for block in blocks)]
    assert [block.receivers.start for block in blocks] == stops[:-1]
    assert stops[-1] == len(wiring.receivers)
    heard = [block.n_sources for block in blocks]
    assert heard == sorted(heard)
    assert heard[-1] == len(wiring.sources)


@given(SIZES)
def test_names_read_back(size: tuple[int, int, bool]) -> None:
    """Every source and receiver is a component; first_source counts those before a layer."""
    wiring = Wiring(*size)
    kinds = [wiring.component(name) for name in wiring.sources]
    assert kinds[0] == Component("input", 0)
    layers = [component.layer for component in kinds[1:]]
    assert layers == sorted(layers)
    for layer in range(wiring.n_layers):
        assert wiring.component(wiring.sources[wiring.first_source(layer)]).layer == layer
        assert wiring.component(wiring.sources[wiring.first_source(layer)]).head == 0
    for receiver in wiring.receivers:
        kind = wiring.component(receiver.component).kind
        assert (receiver.port != "") == (kind == "head")
    assert wiring.receivers[-1] == Receiver("logits", "")
    assert wiring.component("logits") == Component("logits", wiring.n_layers)


@pytest.mark.parametrize(
    "name", ["a2.h0", "a0.h3", "m2", "m-1", "a0", "a0.h0.q", "A0.h0", "", "input ", "h0", "a٣.h0"]
)
def test_name_that_is_no_component(name: str) -> None:
    """Any other name is refused, with the range of those there are."""
    with pytest.raises(GraphError, match=r"2 layers and 3 heads; .* a1\.h2, m0 … m1, logits"):
        Wiring(2, 3).component(name)
