"""Sites: what they are called, which exist, and the order they run in."""

from __future__ import annotations

import random

import pytest

from circuitlab import Site, SiteError
from circuitlab.sites import BLOCK_KINDS, HEAD_KINDS, KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_where_it_belongs(kind: str) -> None:
    """Kinds inside a block need a layer, the others refuse one; the remedy given is legal."""
    wrong, right = (None, 0) if kind in BLOCK_KINDS else (0, None)
    with pytest.raises(SiteError, match="layer; write Site") as caught:
        Site(kind, wrong)
    remedy = str(caught.value).rpartition("write ")[2]
    assert eval(remedy, {"Site": Site}) == Site(kind, right)


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_head_is_where_it_belongs(kind: str) -> None:
    """Only per-head kinds have heads."""
    if kind in HEAD_KINDS:
        assert Site(kind, 1, head=2).head == 2
    else:
        with pytest.raises(SiteError, match=f"site '{kind}' has no heads; .* k, pattern, q, v, z"):
            Site(kind, 1, head=2)


def test_unknown_kind_lists_kinds() -> None:
    """A misspelt kind is answered with those there are."""
    with pytest.raises(SiteError, match="'resid' is unknown; kinds are embed, resid_pre, q, k"):
        Site("resid", 0)


def test_pattern_has_no_position() -> None:
    """The pattern has two positions, so one number cannot say which."""
    with pytest.raises(SiteError, match="query and key positions"):
        Site("pattern", 0, position=1)


def test_forward_order() -> None:
    """Sorting puts sites in the order a block runs them, block after block, embed first."""
    sites = [
        Site("embed"),
        *(Site(kind, layer) for layer in range(3) for kind in BLOCK_KINDS),
        Site("logits"),
    ]
    shuffled = random.Random(0).sample(sites, len(sites))
    assert sorted(shuffled) == sites
    assert Site("q", 0, 0) < Site("q", 0, 1) < Site("k", 0, 0)


@pytest.mark.parametrize(
    ("site", "text"),
    [
        (Site("embed"), "embed"),
        (Site("z", 3), "z.3"),
        (Site("z", 3, 1), "z.3.h1"),
        (Site("q", 0, 2, -1), "q.0.h2[-1]"),
        (Site("mlp_in", 4, position=0), "mlp_in.4[0]"),
    ],
)
def test_name_in_messages(site: Site, text: str) -> None:
    """A site is written the way messages name it, and its whole drops head and position."""
    assert str(site) == text
    assert site.whole == Site(site.kind, site.layer)


def test_sites_are_values() -> None:
    """Equal sites are one dictionary key, and nothing can be changed."""
    assert {Site("z", 1, 0): 1}[Site("z", 1, 0)] == 1
    with pytest.raises(AttributeError):
        Site("z", 1).layer = 2  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_shape_in_words(kind: str) -> None:
    """Every kind states its shape."""
    shape = Site(kind, 0 if kind in BLOCK_KINDS else None).shape
    axes = {"pattern": "n_heads, query, key", "logits": "pos, vocab", "mlp_post": "pos, d_mlp"}
    per_head = "pos, n_heads, d_head" if kind in HEAD_KINDS else "pos, d_model"
    assert shape == f"[batch, {axes.get(kind, per_head)}]"
