"""The region graph and the analysis: on a staircase, all of it in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from circuitlab_activation_plateaus.regions.graphs import Names, find_borders, in_order
from circuitlab_activation_plateaus.regions.normals import Crossings, Facing
from circuitlab_activation_plateaus.regions.tracing import plateau_regions
from dictionary_oracles import random_dictionary
from region_oracles import Staircase, staircase

from circuitlab import (
    CircuitGraph,
    DictionaryInfo,
    Image,
    OptionError,
    PromptPair,
    SiteError,
    Task,
    panels_of,
    write_circuit,
    write_dictionary,
)

PLACES = (0.3, 4.1, 1.6, 2.7, 0.5, 3.9)


def crossings(*seen: tuple[int, float, int, int]) -> Crossings:
    """Crossings (walk, place, before, after)."""
    rows, t, before, after = (torch.tensor(part) for part in zip(*seen, strict=True))
    return Crossings(rows, t.double(), before, after, torch.full((len(seen),), 1e-4))


def facing(slopes: list[float], normals: list[list[float]]) -> Facing:
    slope = torch.tensor(slopes, dtype=torch.float64)
    return Facing(slope, torch.ones_like(slope), torch.tensor(normals, dtype=torch.float64))


def test_regions_are_ordered_by_borders_from_the_largest() -> None:
    """First the largest, then its neighbours, then theirs; what is joined elsewhere follows."""
    seen = crossings((0, 0.5, 0, 3), (1, 0.5, 3, 1), (2, 0.5, 5, 0), (3, 0.5, 4, 2))
    assert in_order(7, seen) == [0, 3, 5, 1, 2, 4, 6]


def test_border_sums_up_its_crossings() -> None:
    """Both directions are one border: places from its source's side, normals towards its target."""
    seen = crossings(
        (0, 0.2, 0, 1), (0, 0.4, 1, 0), (1, 0.7, 1, 0), (2, 0.6, 0, 1), (3, 0.1, 1, 2)
    )  # fmt: skip
    ways = facing([1, 9, 3, 2, 4], [[1, 0], [-1, 0], [0, -1], [0, 0], [0, 1]])
    first, second = find_borders([1, 0, 2], seen, ways)
    assert (first.source, first.target, second.source, second.target) == (1, 0, 1, 2)
    assert (first.n_walks, first.forward, first.backward) == (3, 2, 2)
    # Walks 0, 1, 2 cross first at 0.2 backwards, 0.7 forwards, 0.6 backwards.
    assert first.location == pytest.approx(0.7)
    assert first.slope == 2
    assert first.n_normals == 3
    assert first.normal is not None
    assert first.normal.tolist() == pytest.approx([-2 / 5**0.5, -1 / 5**0.5])
    assert first.agreement == pytest.approx(5**0.5 / 3)
    assert (second.location_interval, second.agreement) == (None, 1)


def test_border_without_normals_has_none() -> None:
    """Where no gradient was seen, or normals cancel, no direction is made up."""
    seen = crossings((0, 0.2, 0, 1), (1, 0.4, 0, 1))
    (none,) = find_borders([0, 1], seen, facing([1, 1], [[0, 0], [0, 0]]))
    assert (none.normal, none.agreement, none.n_normals) == (None, None, 0)
    (cancelled,) = find_borders([0, 1], seen, facing([1, 1], [[1, 0], [-1, 0]]))
    assert (cancelled.normal, cancelled.agreement) == (None, 0)


def test_names() -> None:
    """A region is numbered from 1; a token of blanks is quoted."""
    assert Names(["x", "  "]).full(0) == "r1 x"
    assert Names(["x", "  "]).full(1) == "r2 '  '"


# --- the analysis ---------------------------------------------------------------------------------


def pairs_file(folder: Path, stairs: Staircase, pairs: list[tuple[int, int]]) -> str:
    path = folder / "pairs.jsonl"
    lines = [{"a": [stairs.first + a], "b": [stairs.first + b]} for a, b in pairs]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return str(path)


def traced(stairs: Staircase, pairs: str, **options: Any) -> CircuitGraph:
    settings: dict[str, Any] = {"path": "embed", "steps": 15, "slice_steps": 4} | options
    circuit = plateau_regions(stairs.model, None, pairs=pairs, **settings)
    circuit.validate()
    json.dumps(dict(circuit.nodes(data=True)), allow_nan=False)
    json.dumps([*circuit.edges(data=True), circuit.graph], allow_nan=False)
    return circuit


def test_staircase_is_a_chain(tmp_path: Path) -> None:
    """Regions, masses, borders, places, slopes and normals are those written into the weights."""
    stairs = staircase(PLACES)
    pairs = [(0, 1), (1, 0), (2, 3), (0, 2), (4, 5)]
    circuit = traced(stairs, pairs_file(tmp_path, stairs, pairs))
    of = {data["token_id"]: name for name, data in circuit.nodes(data=True)}
    assert sorted(of) == [0, 1, 2, 3]
    steps = torch.linspace(0, 1, 15)
    for token, name in of.items():
        inside = 0
        for a, b in pairs:
            reads = PLACES[a] + steps * (PLACES[b] - PLACES[a])
            above = reads > stairs.border(token - 1) if token else reads > -9
            below = reads < stairs.border(token) if token < 3 else reads < 9
            inside += int((above & below).sum())
        assert circuit.nodes[name]["n_states"] == inside
        assert circuit.nodes[name]["kind"] == "region"
    assert circuit.number_of_edges() == 3
    for j in range(3):
        reverse = (of[j + 1], of[j]) in circuit.edges()
        ends = (of[j + 1], of[j]) if reverse else (of[j], of[j + 1])
        data = circuit.edges[*ends, ""]
        over = [
            (a, b)
            for a, b in pairs
            if (PLACES[a] - stairs.border(j)) * (PLACES[b] - stairs.border(j)) < 0
        ]
        assert data["score"] == pytest.approx(len(over) / 5)
        # The walk's part on the source's side; its length does not depend on its direction.
        parts, speeds = [], []
        for a, b in over:
            low, high = sorted((PLACES[a], PLACES[b]))
            part = (stairs.border(j) - low) / (high - low)
            parts.append(1 - part if reverse else part)
            speeds.append(high - low)
        middle = (len(parts) - 1) // 2, len(parts) // 2
        expected = [sum(sorted(x)[i] for i in middle) / 2 for x in (parts, speeds)]
        assert data["location"] == pytest.approx(expected[0], abs=1e-4)
        assert data["slope"] == pytest.approx(expected[1] * stairs.slope(), rel=2e-3)
        normal = -stairs.normal(j) if reverse else stairs.normal(j)
        assert data["normal"] == pytest.approx(normal.tolist(), abs=1e-4)
        assert data["agreement"] == pytest.approx(1, abs=1e-5)


def test_readout_and_nearest_tokens(tmp_path: Path) -> None:
    """Cosines are those of the border's normal with differences of unembeddings, and with each."""
    stairs = staircase(PLACES)
    circuit = traced(stairs, pairs_file(tmp_path, stairs, [(0, 1)]), matches=2)
    head, _ = stairs.model.weights.unembedding(torch.float32)
    centred = (head - head.mean(1, keepdim=True)).T.double()
    for source, target, data in circuit.edges(data=True):
        normal = torch.tensor(data["normal"], dtype=torch.float64)
        a, b = (circuit.nodes[end]["token_id"] for end in (source, target))
        cosine = torch.nn.functional.cosine_similarity
        assert data["readout"] == pytest.approx(
            float(cosine(normal, head[:, b].double() - head[:, a].double(), 0)), abs=1e-5
        )
        every = cosine(normal[None], centred, 1)
        best = every.abs().sort(descending=True).values[:2]
        found = [match["cosine"] for match in data["matches"]["unembedding"]]
        assert [abs(value) for value in found] == pytest.approx(best.tolist(), abs=1e-5)


def test_features_of_a_dictionary_are_matched(tmp_path: Path) -> None:
    """A latent that writes along the normal is found, with its cosine; another site is refused."""
    stairs = staircase(PLACES)
    dictionary = random_dictionary("relu", d_in=stairs.model.d_model, n=12)
    with torch.no_grad():
        dictionary.W_d[7] = -3 * stairs.normal(1).to(dictionary.W_d)
    dictionary.info = DictionaryInfo(site="resid_pre.0")
    write_dictionary(dictionary, tmp_path / "sae")
    pairs = pairs_file(tmp_path, stairs, [(2, 3)])
    circuit = traced(stairs, pairs, dictionary=tmp_path / "sae")
    ((source, _, data),) = circuit.edges(data=True)
    sign = -1 if circuit.nodes[source]["token_id"] == 1 else 1
    best = data["matches"]["dictionary"][0]
    assert best == {"name": "feature 7", "cosine": pytest.approx(sign, abs=1e-4)}
    assert 0 < circuit.graph["chance"]["dictionary"] < 1
    with pytest.raises(SiteError, match=r"the dictionary writes resid_pre\.0, and walks are at"):
        traced(stairs, pairs, dictionary=tmp_path / "sae", path="lerp", site="resid_mid.0")


@pytest.mark.parametrize("regions", ["argmax", "kmeans", "agglomerative"])
def test_regions_are_stable(regions: str) -> None:
    """Two runs give the same graph; banks of other seeds the same regions and borders."""
    stairs = staircase([0.1, 0.4, 1.4, 1.7, 2.3, 2.8, 3.5, 4.0], steepness=4000.0)
    task = Task(
        "stairs",
        tuple(
            PromptPair((stairs.first + i,), (stairs.first + (i + 1) % 8,), (0,), (1,))
            for i in range(8)
        ),
    )

    def run(seed: int) -> CircuitGraph:
        torch.manual_seed(seed)
        return plateau_regions(
            stairs.model, task, bank_size=25, path="embed", regions=regions, slice_pair=0
        )  # type: ignore[arg-type]  # one of the kinds

    with torch.random.fork_rng():
        first, again, *others = run(0), run(0), run(1), run(2)
    assert first.to_json() == again.to_json()
    assert {frozenset(border) for border in tokens_of(first)} == {
        frozenset({0, 1}), frozenset({1, 2}), frozenset({2, 3})
    }  # fmt: skip
    for other in others:
        assert {*map(frozenset, tokens_of(other))} == {*map(frozenset, tokens_of(first))}
        assert len(other) == len(first) == 4


def tokens_of(circuit: CircuitGraph) -> list[tuple[int, int]]:
    """Borders by their regions' tokens."""
    token = nx.get_node_attributes(circuit, "token_id")
    return [(token[a], token[b]) for a, b in circuit.edges()]


def test_pictures(tmp_path: Path) -> None:
    """Graph and panels are drawn: a slice, regions and borders, and for clusters their number."""
    stairs = staircase(PLACES)
    pairs = pairs_file(tmp_path, stairs, [(0, 1), (2, 3), (3, 0)])
    circuit = traced(stairs, pairs, regions="kmeans")
    titles = ["Slice through three activations", "Regions", "Borders", "How many regions"]
    assert [panel.title for panel in panels_of(circuit)] == titles
    assert isinstance(panels_of(circuit)[0], Image)
    assert "stability" in circuit.graph["findings"]
    for name in ("graph.svg", "panels.plot.svg"):
        assert write_circuit(circuit, tmp_path / name) == []


def test_slice_that_cannot_be_is_left_out(tmp_path: Path) -> None:
    """Of two prompts there is no plane: a warning says so, the graph is there."""
    stairs = staircase(PLACES)
    circuit = traced(stairs, pairs_file(tmp_path, stairs, [(0, 1)]))
    assert [panel.title for panel in panels_of(circuit)] == ["Regions", "Borders"]
    (said,) = circuit.graph["warnings"]
    assert said.startswith("no slice: two of its three prompts give the same output; take another")


def test_walks_within_one_region(tmp_path: Path) -> None:
    """Without a crossing the graph has its region and no border, and says that none is crossed."""
    stairs = staircase((0.1, 0.6, 0.3))
    circuit = traced(stairs, pairs_file(tmp_path, stairs, [(0, 1), (1, 2)]), slice_pair=0)
    assert (len(circuit), circuit.number_of_edges()) == (1, 0)
    assert "2 of 2 walks cross none" in circuit.graph["findings"]["crossings"]


def test_strongest_borders_are_kept(tmp_path: Path) -> None:
    """``top`` keeps the borders most walks cross, and the file says of how many."""
    stairs = staircase(PLACES)
    pairs = pairs_file(tmp_path, stairs, [(0, 1), (2, 3)])
    circuit = traced(stairs, pairs, top=1)
    assert [sorted(border) for border in tokens_of(circuit)] == [[1, 2]]
    assert circuit.graph["n_edges_total"] == 3
    assert circuit.graph["findings"]["most crossed"].endswith(", by 2 of 2 walks")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1}, "--steps 1 is too few; give 2 or more"),
        ({"slice_steps": 1}, "--slice-steps 1 is too few; give 2 or more"),
        ({"matches": 0}, "--matches 0 is too few; give 1 or more"),
        ({"slice_pair": 3}, "--slice-pair 3: there are 2 pairs; give 1 to 2, 0 for none"),
        ({"slice_pair": -1}, "--slice-pair -1: there are 2 pairs"),
        ({"path": "ray"}, "--path 'ray' is unknown; use lerp, slerp, embed"),
        ({"batch_size": 0}, "batch size 0 is too small"),
        ({"top": -1}, "--top -1: give a number"),
        ({"site": "z.0", "path": "lerp"}, "--site 'z.0'"),
        ({"k": 2}, "--k 2: regions of the most likely token"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """Options that cannot be are refused by name."""
    stairs = staircase(PLACES)
    with pytest.raises(OptionError, match=said):
        traced(stairs, pairs_file(tmp_path, stairs, [(0, 1), (2, 3)]), **options)
