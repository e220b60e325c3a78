"""Groups of nodes and edges: how they are named, and their mixtures against brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import path_oracles
import pytest
import torch
from circuitlab_path_patching.gates.groups import group_of, parse_groups
from circuitlab_path_patching.gates.mixtures import mixtures
from gate_settings import EXACT, MODES, random_setting

from circuitlab import Edge, GraphError, Mode, OptionError, Wiring

WIRING = Wiring(2, 3)
SMALL = Wiring(2, 2)


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "members",
    [
        (Edge("a0.h0", "m0"), Edge("a0.h1", "a1.h0", "k"), Edge("m0", "m1")),
        ("a0.h1", "m0", "a1.h0"),
        (Edge("input", "a1.h1", "v"), "a0.h0", Edge("m1", "logits")),
    ],
    ids=["edges", "nodes", "both"],
)
def test_mixtures_are_those_of_brute_force(members: Sequence[Edge | str], mode: Mode) -> None:
    """Every row is a forward pass of the stock model in which those members were exchanged."""
    setting, module = random_setting()
    pairs = setting.pairs
    runs = path_oracles.runs(
        module, pairs.clean.ids, pairs.corrupt.ids, pairs.clean.mask.long(), mode=mode
    )
    names = [member if isinstance(member, str) else tuple(member) for member in members]
    logits = path_oracles.mixtures(runs, names)
    reference = (runs.base if mode == "noise" else path_oracles.runs(
        module, pairs.clean.ids, pairs.corrupt.ids, pairs.clean.mask.long()
    ).base).logits  # fmt: skip
    expected = torch.stack([pairs.score(row, reference).double() for row in logits])
    found = mixtures(setting, members, mode=mode)
    assert float((found - expected).abs().max()) < EXACT
    assert float((expected.amax(0) - expected.amin(0)).min()) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_ends_of_the_table_are_the_runs(mode: Mode) -> None:
    """All clean is the clean run in noise, all corrupt the corrupt run in denoise; all else 1."""
    setting, _ = random_setting()
    patcher = next(setting.patchers(mode))
    table = mixtures(setting, ["a0.h0", "a1.h1"], mode=mode)
    row = -1 if mode == "noise" else 0
    assert float((table[row] - patcher.base_score).abs().max()) < EXACT
    whole = mixtures(setting, ["input", *SMALL.sources[1:]][:7], mode=mode)
    other = 0 if mode == "noise" else -1
    assert float((whole[other] - patcher.other_score).abs().max()) < EXACT


def test_order_of_members_permutes_the_table() -> None:
    """When members change places, so do the bits of the rows."""
    setting, _ = random_setting()
    members: list[Edge | str] = [Edge("a0.h0", "m0"), "m1", Edge("input", "a1.h0", "q")]
    table = mixtures(setting, members, mode="noise")
    for order in permutations(range(3)):
        rows = [sum(1 << order[i] for i in range(3) if row >> i & 1) for row in range(8)]
        found = mixtures(setting, [members[i] for i in order], mode="noise")
        assert float((found - table[rows]).abs().max()) < EXACT


# --- what a group is named by ---------------------------------------------------------------------


def test_groups_are_read() -> None:
    """Semicolons between groups, blanks or commas between members, wildcards one member each."""
    text = "a0.0>m0, a0.1 > m0 ;\n a0.2>a1.*:k;a0.h0 m1\n>a1.*:k; a0.0>a1.1 >m1"
    groups = parse_groups(text, WIRING)
    assert [group.names for group in groups] == [
        ["a0.h0>m0", "a0.h1>m0"],
        ["a0.h2>a1.h0:k", "a0.h2>a1.h1:k", "a0.h2>a1.h2:k"],
        ["a0.h0", "m1"],
        [">a1.h0:k", ">a1.h1:k", ">a1.h2:k"],
        ["a0.h0>a1.h1", ">m1"],
    ]
    assert list(map(str, groups)) == [
        "a0.h0 + a0.h1 → m0",
        "a0.h2 → k of a1.h0, a1.h1, a1.h2",
        "a0.h0 + m1",
        "k of a1.h0, a1.h1, a1.h2",
        "a0.h0 → a1.h1 + → m1",
    ]
    ports, reads = groups[4].members
    assert ports.edges == tuple(Edge("a0.h0", "a1.h1", port) for port in "qkv")
    assert [edge.source for edge in reads.edges] == list(WIRING.sources[:8])
    for group in groups:
        # A name is text that names the same.
        assert parse_groups(" ".join(group.names), WIRING) == [group]


def test_a_member_is_all_that_carries_its_value() -> None:
    """A node is all edges out of it, an edge is itself."""
    group = group_of(["a0.h2", Edge("m0", "a1.h0", "v")], WIRING)
    node, edge = group.members
    assert node.edges == tuple(e for e in WIRING.edges if e.source == "a0.h2")
    assert edge.edges == (Edge("m0", "a1.h0", "v"),)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "groups are empty; name members"),
        (" ; \n", "groups are empty"),
        ("a0.0", "group 'a0.0' has one member; a gate joins two or more"),
        ("a0.0>m0 a0.0>m0", "has one member"),
        ("a0.* a1.* m* input", "group 'a0.* a1.* m* input' has 9 members; give 1 to 8"),
        ("a0.0 a7.0", "a7.0 does not exist in a model of 2 layers and 3 heads"),
        ("a0.0 logits", "logits writes nothing"),
        ("a0.0 b1", "'b1' is no component"),
        ("a0.0>m0 m1>m0", "m0 reads nothing of m1"),
        ("a0.0 input>a0.0>logits", "is a path of 2 edges; name nodes"),
        ("a0.0 a0.0>m0", "members a0.h0 and a0.h0>m0 share the edge a0.h0>m0; leave one"),
        (">m0 a0.0>m0", "members >m0 and a0.h0>m0 share the edge"),
        ("a0.0 >input", "input reads nothing"),
    ],
)
def test_bad_groups_are_refused(text: str, fact: str) -> None:
    """The text, or the member, what is wrong with it, and what to write."""
    with pytest.raises(OptionError) as refused:
        parse_groups(text, WIRING)
    assert fact in str(refused.value)


def test_bad_members_are_refused() -> None:
    """None, too many, twice the same, not in the model; or a mode without a run."""
    setting, _ = random_setting()
    nine: list[Edge | str] = [Edge("input", "logits"), *(e for e in SMALL.edges[:8])]
    for members, error, fact in (
        ([], OptionError, "group has 0 members; give 1 to 8"),
        (nine, OptionError, "group has 9 members"),
        (["a0.h0", "a0.h0"], OptionError, "share the edge"),
        (["a9.h0"], GraphError, "does not exist in a model"),
        (["logits"], GraphError, "'logits' writes nothing"),
        ([Edge("m1", "m0")], GraphError, "does not exist in this model"),
        ([Edge("a0.h0", "a1.h0")], GraphError, "heads through q, k or v"),
    ):
        with pytest.raises(error, match=fact):
            mixtures(setting, members, mode="noise")
    with pytest.raises(OptionError, match="no such run"):
        mixtures(replace(setting, ablation="zero"), ["m0"], mode="denoise")
