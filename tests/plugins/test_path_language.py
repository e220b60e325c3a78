"""The path language: what a text stands for, how many paths there are, and what is refused."""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import pairwise, product
from pathlib import Path as File

import pytest
from circuitlab_path_patching.paths.hypothesis_files import Hypothesis, read_hypotheses
from circuitlab_path_patching.paths.language import (
    Path,
    all_paths,
    count_paths,
    parse_components,
    parse_paths,
    parse_receivers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitlab import Edge, OptionError, ResourceError, Wiring

TWO = Wiring(2, 2)
WIRINGS = [TWO, Wiring(1, 3), Wiring(2, 2, parallel=True), Wiring(3, 1)]
WORDS = ["input", "a0.0", "a0.*", "a*.h1", "a*.*", "m0", "m*", "logits", "a1.0:k", "a*.*:*", "m1"]


def written(text: str, wiring: Wiring = TWO) -> list[str]:
    return [str(path) for path in parse_paths(text, wiring)]


def walks(wiring: Wiring) -> list[Path]:
    """All paths from input, found by walking the wiring's own list of edges."""
    found, ends = [], [Path((("input", ""),))]
    while ends:
        path = ends.pop()
        for edge in wiring.edges:
            if edge.source == path.nodes[-1][0]:
                longer = Path((*path.nodes, (edge.target, edge.port)))
                (found if edge.target == "logits" else ends).append(longer)
    return found


def combinations_of(words: list[str], wiring: Wiring) -> set[Path]:
    """What wildcards stand for, from the edges alone: all combinations, kept if they run."""
    edges = set(wiring.edges)
    choices = []
    for place, word in enumerate(words):
        pattern, _, letters = word.replace(".h", ".").partition(":")
        alternatives = ("q", "k", "v") if letters == "*" else (letters or "qkv",)
        choices.append(
            [
                (name, ports)
                for name in [*wiring.sources, "logits"]
                if fnmatchcase(name.replace(".h", "."), pattern)
                for ports in (alternatives if place and name[0] == "a" else ("",))
            ]
        )
    return {
        Path(nodes)
        for nodes in product(*choices)
        if all(
            Edge(before[0], after[0], port) in edges
            for before, after in pairwise(nodes)
            for port in after[1] or ("",)
        )
    }


def test_path_reads_as_it_is_written() -> None:
    """Components and ports in order; the short name of a head is the long one."""
    (path,) = parse_paths(" input > a0.1 : k>a1.h0>m1> logits", TWO)
    assert path.nodes == (
        ("input", ""),
        ("a0.h1", "k"),
        ("a1.h0", "qkv"),
        ("m1", ""),
        ("logits", ""),
    )
    assert str(path) == "input>a0.h1:k>a1.h0>m1>logits"
    assert written("a0.0>a1.1:vq") == ["a0.h0>a1.h1:qv"]
    assert written("m0>a1.0:vkq") == ["m0>a1.h0"]


def test_several_paths_each_once() -> None:
    """Commas and line ends part paths; a path that is named twice counts once."""
    text = "input>logits, m0>logits\n\nm1>logits,\r\ninput>logits"
    assert written(text) == ["input>logits", "m0>logits", "m1>logits"]


def test_wildcards_stand_for_what_runs_forward() -> None:
    """All layers, all heads, each port by itself, in the order components run."""
    assert written("input>a0.*:k>logits") == ["input>a0.h0:k>logits", "input>a0.h1:k>logits"]
    assert written("a*.0>m*") == ["a0.h0>m0", "a0.h0>m1", "a1.h0>m1"]
    assert written("m0>a1.1:*") == ["m0>a1.h1:q", "m0>a1.h1:k", "m0>a1.h1:v"]
    # Of all pairs of heads only the first layer's can be read, and only by the second's.
    assert len(written("a*.*>a*.*>logits")) == 4
    assert written("a*.0>m*", Wiring(2, 2, parallel=True)) == ["a0.h0>m1"]


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=2, max_size=5))
def test_expansion_equals_brute_force(words: list[str]) -> None:
    """A text stands for exactly the combinations all of whose steps are edges, or is refused."""
    for wiring in (TWO, Wiring(2, 2, parallel=True)):
        bad_ends = ":" in words[0] or "logits" in words[:-1] or "input" in words[1:]
        expected = set() if bad_ends else combinations_of(words, wiring)
        if not expected:
            with pytest.raises(OptionError, match="path '"):
                parse_paths(">".join(words), wiring)
            continue
        paths = parse_paths(">".join(words), wiring)
        assert len(paths) == len(expected)
        assert set(paths) == expected
        for path in paths:
            assert parse_paths(str(path), wiring) == [path]


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
def test_all_paths_are_the_walks_of_the_graph(wiring: Wiring) -> None:
    """Listing and counting agree with a walk over the edges, for every number of hops."""
    expected = walks(wiring)
    paths = all_paths(wiring)
    assert len(paths) == len(set(paths)) == len(expected) == count_paths(wiring)
    assert set(paths) == set(expected)
    for hops in range(2 * wiring.n_layers + 3):
        short = [path for path in paths if len(path.nodes) - 1 <= hops]
        assert all_paths(wiring, max_hops=hops) == short
        assert count_paths(wiring, max_hops=hops) == len(short)


def test_number_of_paths() -> None:
    """196 for 2 layers of 2 heads: 7 into m0, 42 into each head of layer 1, 98 into m1."""
    assert count_paths(TWO) == 196
    # Layer by layer the stream's paths multiply by (1 + 3 heads), then double at the MLP.
    assert count_paths(Wiring(12, 12)) == (37 * 2) ** 12
    assert count_paths(Wiring(12, 12, parallel=True)) == 38**12


def test_path_splits_into_its_ports() -> None:
    """A head without ports reads through three, so the path stands for three."""
    (path,) = parse_paths("input>a0.0:qv>a1.1>logits", TWO)
    assert [str(part) for part in path.split()] == [
        f"input>a0.h0:{first}>a1.h1:{second}>logits" for first in "qv" for second in "qkv"
    ]
    (single,) = parse_paths("m0>a1.0:k>m1", TWO)
    assert single.split() == [single]


def test_wildcards_and_ports_make_all_paths() -> None:
    """With every length written out in wildcards the text stands for all paths there are."""
    middles = ["a*.*:*", "m*"]
    chains = [chain for n in range(5) for chain in product(middles, repeat=n)]
    found = set()
    for chain in chains:
        try:
            found.update(parse_paths(">".join(("input", *chain, "logits")), TWO))
        except OptionError:
            continue
    assert found == set(all_paths(TWO))


def test_components_and_receivers() -> None:
    """Lists of senders and receivers, with the same names, wildcards and ports."""
    assert parse_components("a*.1, m0\ninput,m*", TWO) == ["a0.h1", "a1.h1", "m0", "input", "m1"]
    assert parse_receivers("a1.0:q, logits,a1.0", TWO) == [
        ("a1.h0", "q"),
        ("logits", ""),
        ("a1.h0", "k"),
        ("a1.h0", "v"),
    ]
    everything = parse_receivers("a*.*, m*, logits", TWO)
    assert set(everything) == set(TWO.receivers)
    assert parse_components("input, a*.*, m*", TWO) == sorted(
        TWO.sources, key=lambda name: "iam".index(name[0])
    )
    assert parse_receivers("a0.0:kv", TWO) == [("a0.h0", "k"), ("a0.h0", "v")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path list is empty; name one, as in 'input>a0.0>logits'"),
        (" ,\n", "path list is empty"),
        ("input", "path 'input': a path has two components or more.*as in input>logits"),
        ("input>a0.9>logits", "column 7: a0.9 does not exist in a model of 2 layers and 2 heads; "),
        ("input>a0.9>logits", "the nearest is a0.1; layers and heads are counted from 0"),
        ("input>a7.*:k>logits", r"a7\.\* does not exist .*; the nearest is a1.0"),
        ("input>m2>logits", "m2 does not exist .*; the nearest is m1"),
        ("inptu>logits", r"path 'inptu>logits', column 1: 'inptu' is no component; did you mean "),
        ("m0>a1h0", "'a1h0' is no component; did you mean a1.h0?"),
        ("embed>logits", "'embed' is no component; use input, a0.0"),
        ("input->logits", "column 1: 'input-' is no component; did you mean input?"),
        ("input>>logits", "column 7: a component is missing; put one before and behind each '>'"),
        ("input>m1>m0", "column 10: m0 reads nothing of m1, which does not run before it; "),
        ("input>m1>m0", "order they run: layer by layer, heads before the MLP"),
        ("a*.*>a*.*>a1.0>m*", "column 11: a1.0 reads nothing of a*.*".replace("*", r"\*")),
        ("input>a0.0>input", "column 12: input reads nothing; begin the path with it"),
        ("logits>m0", "column 1: logits writes nothing; end the path with it"),
        ("a0.0:k>logits", "column 1: ports say how .* the first one only writes; write a0.0"),
        ("input>m0:q>logits", "column 7: m0 has no ports; leave ':q' out"),
        ("input>logits:v", "column 7: logits has no ports"),
        ("input>a0.0:x>logits", "column 7: 'x' is no port; use q, k, v"),
        ("input>a0.0:q:k>logits", "'q:k' is no port"),
        ("input>a0.0:>logits", "no port stands behind ':'; add q, k, v"),
        ("input>a0.0:kk>logits", "port k is named twice; name it once"),
        ("input>a" + "9" * 5000 + ".0", "is no component"),
    ],
)
def test_path_that_cannot_be(text: str, message: str) -> None:
    """A message quotes the path, gives the column, the fact and what to do."""
    with pytest.raises(OptionError, match=message) as caught:
        parse_paths(f"m0>logits, {text}" if text.strip(", \n") else text, TWO)
    assert len(str(caught.value)) < 600


def test_remedies_work() -> None:
    """The path that a message proposes is accepted."""
    for text in ("input>a0.0>logits", "input>logits", "input>a0.1>logits", "m0>a1.h0", "a0.0>m1"):
        assert parse_paths(text, TWO)


def test_parallel_blocks_are_named_in_the_error() -> None:
    """Where heads and MLP run side by side, the message says so."""
    with pytest.raises(OptionError, match="layer by layer, heads and MLP side by side"):
        parse_paths("a0.0>m0", Wiring(2, 2, parallel=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "component list is empty; name one, as in 'a0.*, m0'"),
        ("logits", "component 'logits': logits writes nothing; name input, heads or MLPs"),
        ("m0, a0.0:q", "component 'a0.0:q': what a component writes has no ports; write a0.0"),
        ("a0", "component 'a0': 'a0' is no component"),
    ],
)
def test_components_that_cannot_be(text: str, message: str) -> None:
    """What does not write is no sender."""
    with pytest.raises(OptionError, match=message):
        parse_components(text, TWO)


def test_receivers_that_cannot_be() -> None:
    """What does not read is no receiver."""
    with pytest.raises(OptionError, match="receiver 'input': input reads nothing"):
        parse_receivers("m0,input", TWO)
    with pytest.raises(OptionError, match="receiver list is empty"):
        parse_receivers(" ", TWO)


def test_too_many_paths() -> None:
    """A wildcard over a large model is refused by its count, without listing what it stands for."""
    large = Wiring(12, 12)
    # Heads of layers l < m through 9 pairs of ports, then any of the 12 - m MLPs from layer m on.
    count = 9 * 144 * sum(m * (12 - m) for m in range(12))
    with pytest.raises(OptionError, match=f"for {count:,} paths, more than 100,000; put names"):
        parse_paths("input>a*.*:*>a*.*:*>m*>logits", large)
    with pytest.raises(OptionError, match=r"has 26,\S* paths, more than 100,000; allow fewer hops"):
        all_paths(large)
    # 1 direct, 12 MLPs, 432 ports of heads.
    assert len(all_paths(large, max_hops=2)) == 445
    # Heads of layers 0, 1 and 2 out of three million combinations.
    assert len(parse_paths("input>a*.*>a*.*>a*.*>a3.0>logits", large)) == 12**3


def hypothesis_file(folder: File, text: str, name: str = "claims.toml") -> File:
    path = folder / name
    path.write_bytes(text.encode())
    return path


TOML = """\
[[hypothesis]]
name = "by hand"
paths = ["input>a0.0:k>logits",
         "m0>a1.*>logits", "input>a0.0:k>logits"]

[[hypothesis]]
paths = ["input>logits"]
name = "direct"
"""
PLAIN = "\ufeff# what I believe\r\ninput>a0.0:k>logits  # first\r\n\nm0>a1.*>logits,m0>logits\n"


def test_hypothesis_files(tmp_path: File) -> None:
    """TOML holds several hypotheses, plain text one that is called after its file."""
    by_hand = tuple(parse_paths("input>a0.0:k>logits, m0>a1.0>logits, m0>a1.1>logits", TWO))
    direct = Hypothesis("direct", tuple(parse_paths("input>logits", TWO)))
    expected = [Hypothesis("by hand", by_hand), direct]
    assert read_hypotheses(hypothesis_file(tmp_path, TOML), TWO) == expected
    plain = Hypothesis("guess", (*by_hand, *parse_paths("m0>logits", TWO)))
    assert read_hypotheses(hypothesis_file(tmp_path, PLAIN, "guess.txt"), TWO) == [plain]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("m0>a1.*", "m0>a9.*"), r"claims.toml:4: path 'm0>a9\.\*>logits', column 4: a9\.\* does"),
        (('"direct"', '"by hand"'), "claims.toml:6: name 'by hand' is given to a second"),
        (('name = "direct"', "rank = 1"), "claims.toml:6: key 'rank' is unknown; known: name"),
        (('name = "direct"', 'nam = "x"'), "claims.toml:6: key 'nam' is unknown; did you mean n"),
        (('name = "direct"', ""), "claims.toml:6: hypothesis has no name; add name"),
        (('["input>logits"]', "3"), "claims.toml:6: paths is no list of texts; write paths"),
        (('["input>logits"]', "[]"), "claims.toml:6: hypothesis has no paths; name one"),
        (('"direct"', '"direct'), "claims.toml:8: not TOML: .* at column 15; correct it"),
        (("[[hypothesis]]", "[[hypotheses]]"), "claims.toml: key 'hypotheses' is unknown; did"),
        ((TOML, ""), r"claims.toml: no \[\[hypothesis\]\] stands in it; write one"),
        ((TOML, "hypothesis = [1]"), "claims.toml: hypothesis is no table"),
        ((TOML, "x = " + "9" * 5000), "claims.toml: not TOML"),
    ],
)
def test_hypothesis_file_that_cannot_be_read(
    tmp_path: File, change: tuple[str, str], message: str
) -> None:
    """A fault in a file is told with the file and, where it is known, the line."""
    path = hypothesis_file(tmp_path, TOML.replace(*change))
    with pytest.raises(OptionError, match=message):
        read_hypotheses(path, TWO)


def test_plain_hypothesis_file_that_cannot_be_read(tmp_path: File) -> None:
    """Lines are counted with comments and empty lines; other faults name the file."""
    text = PLAIN.replace("m0>a1", "m0>b1")
    with pytest.raises(OptionError, match=r"guess\.txt:4: path .* is no component"):
        read_hypotheses(hypothesis_file(tmp_path, text, "guess.txt"), TWO)
    with pytest.raises(OptionError, match=r"none\.txt: hypothesis has no paths"):
        read_hypotheses(hypothesis_file(tmp_path, "# nothing\n", "none.txt"), TWO)
    with pytest.raises(OptionError, match=r"gone\.txt: file does not exist; check the path"):
        read_hypotheses(tmp_path / "gone.txt", TWO)
    with pytest.raises(OptionError, match="cannot be read"):
        read_hypotheses(tmp_path, TWO)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"input>logits\n# caf\xe9")
    with pytest.raises(OptionError, match=r"latin\.txt:2: byte 0xe9 is not UTF-8; save it as UTF"):
        read_hypotheses(path, TWO)


def test_hypothesis_file_without_permission(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that may not be read is a matter of resources."""

    def refuse(path: File) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = hypothesis_file(tmp_path, TOML)
    monkeypatch.setattr(File, "read_bytes", refuse)
    with pytest.raises(ResourceError, match="reading is not permitted; change its permissions"):
        read_hypotheses(path, TWO)
