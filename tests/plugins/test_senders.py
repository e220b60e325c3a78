"""Senders and receivers against brute force, and identities that must hold for them."""

from __future__ import annotations

from itertools import product
from typing import Any

import path_oracles
import pytest
from circuitlab_path_patching.effects import Setting
from circuitlab_path_patching.paths.language import parse_receivers
from circuitlab_path_patching.paths.senders import measure_senders, sender_effects
from path_scores import METRICS, TOLERANCES, Brute, gap, padded_pairs, small_model

from circuitlab import Edge, GraphError, OptionError, Patcher, TracedModel, edge_effects

MODES = ("noise", "denoise")
MEDIATE = ("heads", "all")
RECEIVERS = ("logits", "a1.0:k", "a1.0:q, a1.1:v", "m1", "a0.1:kv, m0, a1.*:q", "a0.0, a1.1:k, m1")


@pytest.fixture(scope="module")
def gpt2() -> tuple[Any, TracedModel]:
    return small_model("gpt2", n_layers=3)


@pytest.mark.parametrize(
    ("family", "mode", "mediate"), [*product(TOLERANCES, MODES, MEDIATE)], ids="-".join
)
def test_sender_effects_are_those_of_brute_force(family: str, mode: Any, mediate: Any) -> None:
    """Every sender, one receiver or several at once, in both modes and both definitions."""
    module, model = small_model(family, n_layers=3)
    pairs = padded_pairs(model, METRICS[len(mediate) % 3])
    brute = Brute(module, pairs, mode)
    setting = Setting(model, pairs, mode, batch_size=2)
    senders = list(reversed(model.wiring.sources))
    seen = 0.0
    for text in RECEIVERS:
        receivers = parse_receivers(text, model.wiring)
        effects = sender_effects(setting, senders, receivers, mediate=mediate)[mode]
        for sender, effect in zip(senders, effects, strict=True):
            logits = path_oracles.patched_receivers(brute.run, [sender], receivers, mediate=mediate)
            assert gap(effect, brute.effect(logits)) < TOLERANCES[family], (sender, text)
            before = any(Edge(sender, *to) in model.wiring.edges for to in receivers)
            assert before or not effect.any()
        seen = max(seen, float(effects.abs().max()))
    assert seen > 0.1


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations(gpt2: tuple[Any, TracedModel], ablation: Any) -> None:
    """A sender writes zero or its mean; MLPs answer."""
    module, model = gpt2
    pairs = padded_pairs(model)
    brute = Brute(module, pairs, "noise", ablation)
    receivers = parse_receivers("a2.0:k, a2.1", model.wiring)
    setting = Setting(model, pairs, "noise", ablation)
    effects = sender_effects(setting, model.wiring.sources, receivers)
    for sender, effect in zip(model.wiring.sources, effects["noise"], strict=True):
        logits = path_oracles.patched_receivers(brute.run, [sender], receivers)
        assert gap(effect, brute.effect(logits)) < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_direct_to_one_receiver_is_the_edge(gpt2: tuple[Any, TracedModel], mode: Any) -> None:
    """Where MLPs stay too, what is left is the edge; both are the same patch."""
    _, model = gpt2
    pairs = padded_pairs(model)
    setting = Setting(model, pairs, mode)
    found = measure_senders(setting, model.wiring.sources, model.wiring.receivers, mediate="all")
    assert set(found.edges) == set(model.wiring.edges)
    expected = edge_effects(model, pairs, found.edges, mode=mode)
    assert gap(found.effects[mode], expected) < 1e-9


def test_each_receiver_alone_and_all_together(gpt2: tuple[Any, TracedModel]) -> None:
    """One measurement for each pair that can be, and one for the receivers that can be joined."""
    _, model = gpt2
    setting = Setting(model, padded_pairs(model), "both")
    receivers = parse_receivers("a1.0:k, logits, m0", model.wiring)
    senders = ("a2.h1", "a0.h1", "input")
    found = measure_senders(setting, senders, receivers)
    assert found.edges == (
        Edge("a0.h1", "a1.h0", "k"),
        Edge("input", "a1.h0", "k"),
        *(Edge(sender, "logits") for sender in senders),
        Edge("a0.h1", "m0"),
        Edge("input", "m0"),
    )
    for mode in found.effects:
        for edge, effect in zip(found.edges, found.effects[mode], strict=True):
            alone = sender_effects(setting, [edge.source], [edge[1:]])[mode]
            assert gap(effect, alone[0]) < 1e-9
        both = [receivers[0], receivers[2]]
        together = sender_effects(setting, senders, both)[mode]
        assert gap(found.together[mode], together) < 1e-9
    assert not measure_senders(setting, senders, receivers[:2]).together


def test_rows_in_parts_are_the_same(
    gpt2: tuple[Any, TracedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few senders fit into one pass."""
    _, model = gpt2
    setting = Setting(model, padded_pairs(model), "noise")
    receivers = parse_receivers("a1.0:k, m2", model.wiring)
    expected = sender_effects(setting, model.wiring.sources, receivers)["noise"]
    monkeypatch.setattr(Patcher, "at_once", 1)
    effects = sender_effects(setting, model.wiring.sources, receivers)["noise"]
    assert gap(effects, expected) < 1e-9


def test_what_cannot_be_sent(gpt2: tuple[Any, TracedModel]) -> None:
    """Names that do not exist, ends in the wrong order, and receivers that exclude others."""
    _, model = gpt2
    setting = Setting(model, padded_pairs(model))
    end = [("logits", "")]
    with pytest.raises(GraphError, match=r"component 'a9\.h9' does not exist"):
        sender_effects(setting, ["a9.h9"], end)
    with pytest.raises(GraphError, match="sender 'logits' writes nothing"):
        sender_effects(setting, ["logits"], end)
    with pytest.raises(GraphError, match=r"receiver a1\.h0 does not exist in this model; heads"):
        sender_effects(setting, ["m0"], [("a1.h0", "")])
    with pytest.raises(GraphError, match="component 'm7' does not exist"):
        sender_effects(setting, ["m0"], [("m7", "")])
    with pytest.raises(OptionError, match="no sender is named"):
        sender_effects(setting, [], end)
    with pytest.raises(OptionError, match="no receiver is named"):
        sender_effects(setting, ["m0"], [])
    with pytest.raises(OptionError, match=r"m1 does not reach a0\.h0; name senders of earlier"):
        sender_effects(setting, ["m1"], [("a0.h0", "q")])
    with pytest.raises(OptionError, match="measure logits by itself"):
        sender_effects(setting, ["m0"], [*end, ("a1.h0", "q")])
