"""Circuits of paths, senders and hypotheses: what was measured stands in them, and no more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from circuitlab_path_patching.effects import Setting
from circuitlab_path_patching.paths import circuits as path_circuits
from circuitlab_path_patching.paths.circuits import (
    hypothesis_circuit,
    path_circuit,
    sender_circuit,
)
from circuitlab_path_patching.paths.effects import path_effects
from circuitlab_path_patching.paths.hypotheses import check_hypotheses
from circuitlab_path_patching.paths.hypothesis_files import Hypothesis
from circuitlab_path_patching.paths.language import parse_paths, parse_receivers
from circuitlab_path_patching.paths.senders import sender_effects
from gate_settings import MODES, bundled
from path_scores import padded_pairs, small_model

from circuitlab import CircuitGraph, OptionError


@pytest.fixture(scope="module")
def setting() -> Setting:
    _, model = small_model("gpt2")
    return Setting(model, padded_pairs(model), mode="noise")


@pytest.fixture(scope="module")
def both(setting: Setting) -> Setting:
    return Setting(setting.model, setting.pairs, mode="both")


def checked(circuit: CircuitGraph) -> CircuitGraph:
    circuit.validate()
    assert {"input", "logits"} <= set(circuit)
    return CircuitGraph.from_json(circuit.to_json())


def test_the_strongest_paths_are_drawn(setting: Setting) -> None:
    """Their edges and no others; an edge has the score of the strongest path through it."""
    circuit = checked(path_circuit(setting, top=4))
    rows = circuit.graph["paths"]
    sizes = [abs(row["score"]) for row in rows]
    assert len(rows) == 4
    assert sizes == sorted(sizes, reverse=True)
    paths = parse_paths(",".join(row["path"] for row in rows), setting.model.wiring)
    expected = path_effects(setting, paths)["noise"].mean(1).tolist()
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-9)
    every = path_circuit(setting).graph["paths"]
    assert every[:4] == rows
    assert len(every) == 196
    used = {
        (source, target, port): row
        for row, path in reversed(list(zip(rows, paths, strict=True)))
        for (source, _), (target, port) in zip(path.nodes, path.nodes[1:], strict=False)
    }
    assert {edge[:3] for edge in circuit.effects()} == set(used)
    for source, target, port, score in circuit.effects():
        strongest = used[source, target, port]
        assert score == strongest["score"]
        data = circuit.edges[source, target, port]
        assert data["paths"][0] == strongest["path"]
        assert data["interval"] == strongest["interval"]
    for row in rows:
        low, high = row["interval"]
        assert low <= row["score"] <= high


def test_the_threshold_keeps_strong_paths(setting: Setting) -> None:
    """All paths of that size, whatever their number, and none below it."""
    every = path_circuit(setting).graph["paths"]
    cut = abs(every[9]["score"])
    circuit = path_circuit(setting, threshold=cut)
    assert circuit.graph["paths"] == every[:10]
    assert checked(path_circuit(setting, threshold=1e9)).graph["paths"] == []


def test_both_modes_are_told(both: Setting) -> None:
    """A path counts by the mode in which it does more, and has the effect of each."""
    circuit = checked(path_circuit(both, path="input>a0.*:*>logits, input>a0.0:q>a1.1:kv>logits"))
    assert circuit.graph["method"] == "exact, 7 named paths, noise and denoise"
    for row in circuit.graph["paths"]:
        effects = [row["noise_effect"], row["denoise_effect"]]
        assert row["score"] == max(effects, key=abs)
    ports = [port for _, target, port in circuit.edges if target == "a1.h1"]
    assert sorted(ports) == ["k", "v"]


def test_options_that_exclude_one_another(setting: Setting) -> None:
    """Named paths are not searched for."""
    with pytest.raises(OptionError, match="--path names them; leave one of these out"):
        path_circuit(setting, path="input>logits", senders="m0")
    with pytest.raises(OptionError, match="--path names them; leave one of these out"):
        path_circuit(setting, path="input>logits", max_hops=2)


def test_a_search_from_senders_within_hops(setting: Setting) -> None:
    """Senders and hops reach the search, and the method says so."""
    circuit = path_circuit(setting, senders="a0.*", max_hops=2)
    assert circuit.graph["method"].startswith("exact, all 18 paths from a0.h0, a0.h1 of up to 2")
    assert all(row["path"].startswith("a0.h") for row in circuit.graph["paths"])


def test_senders_and_receivers_are_joined(setting: Setting) -> None:
    """An edge of kind path for each pair, by itself; and each sender by way of all at once."""
    circuit = checked(sender_circuit(setting, receivers="a1.0:kv, logits", top=5))
    assert circuit.number_of_edges() == 5
    for source, target, port, score in circuit.effects():
        alone = sender_effects(setting, [source], [(target, port)])["noise"]
        assert score == pytest.approx(float(alone.mean()), abs=1e-9)
        assert circuit.edges[source, target, port]["kind"] == "path"
        assert len(circuit.edges[source, target, port]["interval"]) == 2
    receivers = parse_receivers("a1.0:kv", setting.model.wiring)
    rows = circuit.graph["senders"]
    assert {row["sender"] for row in rows} == {"input", "a0.h0", "a0.h1", "m0"}
    for row in rows:
        joint = sender_effects(setting, [row["sender"]], receivers)["noise"]
        assert row["score"] == pytest.approx(float(joint.mean()), abs=1e-9)
    assert len(circuit.graph["findings"]) == 6


def test_direct_edges_alone(both: Setting) -> None:
    """Where MLPs stay too, the numbers are others, and the method says so."""
    heads = sender_circuit(both, senders="a0.*, input", receivers="logits")
    alone = sender_circuit(both, senders="a0.*, input", receivers="logits", mediate="all")
    assert set(heads.edges) == set(alone.edges)
    assert heads.graph["method"] == (
        "exact, sender to receiver, MLPs recomputed, heads not, noise and denoise"
    )
    assert "direct edges alone" in alone.graph["method"]
    assert "no head between them answers" in heads.graph["score"]
    assert "nothing between them answers" in alone.graph["score"]
    score = {edge[:3]: edge[3] for edge in heads.effects()}
    assert all(abs(score[edge[:3]] - edge[3]) > 1e-6 for edge in alone.effects())
    assert "senders" not in heads.graph


def test_hypotheses_and_their_paths(both: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of both modes, and each path alone; too many paths are tested but not drawn."""
    wiring = both.model.wiring
    some = Hypothesis("some", tuple(parse_paths("input>a0.*:v>logits, input>m1>logits", wiring)))
    one = Hypothesis("one", some.paths[:1])
    circuit = checked(hypothesis_circuit(both, [some, one]))
    expected = [
        result
        for mode in MODES
        for result in check_hypotheses(replace(both, mode=mode), [some, one])
    ]
    rows = circuit.graph["hypotheses"]
    assert [(row["name"], row["mode"], row["aue"]) for row in rows] == [
        (result.name, result.mode, result.aue) for result in expected
    ]
    assert len(circuit.graph["paths"]) == 3
    assert len(circuit.graph["findings"]) == 4
    monkeypatch.setattr(path_circuits, "LIMIT", 2)
    circuit = checked(hypothesis_circuit(both, [some]))
    assert circuit.number_of_edges() == 0
    assert circuit.graph["warnings"][0].startswith("3 paths are too many to patch each alone")


def test_a_dead_search_says_so() -> None:
    """Where no path does anything, no path is strongest."""
    setting = bundled("gate-or", n_pairs=8, mode="noise")
    circuit = path_circuit(setting, path="input>a0.*:v>m0>logits", top=3)
    assert circuit.graph["paths"] == []
    assert circuit.graph["warnings"] == [
        "every score is zero: nothing distinguishes one path from another"
    ]


def test_hand_induction_is_found() -> None:
    """The known circuit of one path: three edges, all of the whole effect."""
    circuit = checked(
        path_circuit(bundled("hand-induction", n_pairs=8, mode="both"), top=3, threshold=1.0)
    )
    assert {edge[:3] for edge in circuit.effects()} == {
        ("input", "a0.h0", "v"),
        ("a0.h0", "a1.h0", "k"),
        ("a1.h0", "logits", ""),
    }
    finding = circuit.graph["findings"]["input>a0.h0:v>a1.h0:k>logits"]
    assert finding.startswith("-1")
    assert json.loads(circuit.to_json())["graph"]["ablation"] == "counterfactual"
