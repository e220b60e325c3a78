"""Single paths against brute force, identities that must hold for them, and the search."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random
from typing import Any

import oracles
import path_oracles
import pytest
import torch
from circuitlab_path_patching.effects import Setting
from circuitlab_path_patching.paths import effects as paths
from circuitlab_path_patching.paths import trees as path_trees
from circuitlab_path_patching.paths.effects import named_paths, path_effects, strongest_paths
from circuitlab_path_patching.paths.language import Path, all_paths, parse_paths
from gate_settings import bundled
from path_scores import METRICS, TOLERANCES, Brute, gap, padded_pairs, small_model
from torch import nn

from circuitlab import GraphError, OptionError, TracedModel, edge_effects, load_model

MODES = ("noise", "denoise")
#: Paths of several ports at once, and paths that end before the logits.
ANY = "input>a0.0>a1.1>logits, a0.1>a1.0:qv>logits, input>a0.0:v, input>a0.0>a1.1:k, m0>a1.0:qk"
#: The same, where heads write before the MLP of their layer reads.
SEQUENTIAL = "input>a0.1:qk>m0>a1.0:kv>m1>logits, a0.0>m0>m1"


@pytest.fixture(scope="module")
def gpt2() -> tuple[Any, TracedModel]:
    return small_model("gpt2")


def sampled(model: TracedModel, seed: int) -> list[Path]:
    """Some paths of one port each, joint ports, ends before the logits; in no order."""
    text = ANY if model.wiring.parallel else f"{ANY}, {SEQUENTIAL}"
    chosen = Random(seed).sample(all_paths(model.wiring), 12)
    return chosen + parse_paths(text, model.wiring)


@pytest.mark.parametrize(("family", "mode", "seed"), [*product(TOLERANCES, MODES, (1, 2))])
def test_path_effects_are_those_of_brute_force(family: str, mode: Any, seed: int) -> None:
    """Both modes, sequential and parallel blocks, padded prompts, any ports, any end."""
    module, model = small_model(family, seed)
    pairs = padded_pairs(model, METRICS[seed], seed)
    chosen = sampled(model, seed)
    effects = path_effects(Setting(model, pairs, mode, batch_size=2), chosen)[mode]
    brute = Brute(module, pairs, mode)
    for path, effect in zip(chosen, effects, strict=True):
        expected = brute.effect(path_oracles.patched_path(brute.run, path.nodes))
        assert gap(effect, expected) < TOLERANCES[family], path
    assert effects.abs().amax(1).min() > 100 * TOLERANCES["gpt2"]


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations(gpt2: tuple[Any, TracedModel], ablation: Any) -> None:
    """The first component of a path writes zero or its mean; the others answer."""
    module, model = gpt2
    pairs = padded_pairs(model)
    brute = Brute(module, pairs, "noise", ablation)
    chosen = sampled(model, 3)
    effects = path_effects(Setting(model, pairs, "noise", ablation), chosen)["noise"]
    for path, effect in zip(chosen, effects, strict=True):
        expected = brute.effect(path_oracles.patched_path(brute.run, path.nodes))
        assert gap(effect, expected) < 1e-9, path


@pytest.mark.parametrize("mode", MODES)
def test_a_path_of_one_edge_is_that_edge_patched(gpt2: tuple[Any, TracedModel], mode: Any) -> None:
    """Two algorithms, one number: all edges, among them those into the logits."""
    _, model = gpt2
    pairs = padded_pairs(model)
    edges = model.wiring.edges
    chosen = [Path(((edge.source, ""), (edge.target, edge.port))) for edge in edges]
    expected = edge_effects(model, pairs, edges, mode=mode)
    assert gap(path_effects(Setting(model, pairs, mode), chosen)[mode], expected) < 1e-9


def test_without_norms_direct_effects_add_up(gpt2: tuple[Any, TracedModel]) -> None:
    """A linear metric of a sum: all paths of one step together are the whole effect."""
    module = oracles.random_gpt2(2, 2, 16, layer_norm=False, seed=4)
    model = load_model((module, None))
    pairs = padded_pairs(model)
    brute = Brute(module, pairs)
    steps = [Path(((source, ""), ("logits", ""))) for source in model.wiring.sources]
    whole = Brute(module, pairs, "denoise").base - brute.base
    assert gap(path_effects(Setting(model, pairs, "noise"), steps)["noise"].sum(0), whole) < 1e-9
    assert whole.abs().min() > 1e-3


def test_memory_changes_nothing(
    gpt2: tuple[Any, TracedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few paths are run together, and in whatever order they are given."""
    _, model = gpt2
    pairs = padded_pairs(model)
    chosen = all_paths(model.wiring)
    assert len(chosen) == 196
    setting = Setting(model, pairs, "noise")
    expected = path_effects(setting, chosen)["noise"]
    monkeypatch.setattr(paths, "KEPT_MEMORY", 0)
    Random(1).shuffle(order := list(range(196)))
    effects = path_effects(replace(setting, batch_size=1), [chosen[n] for n in order])
    assert gap(effects["noise"], expected[order]) < 1e-9


def test_paths_share_their_beginnings(gpt2: tuple[Any, TracedModel]) -> None:
    """A path is its beginning and the logits: 196 paths are 196 beginnings and one end for each."""
    _, model = gpt2
    trees = path_trees.PathTrees(model.wiring)
    for path in all_paths(model.wiring):
        trees.add([path])
    inner = [node for node in trees.nodes if node.component != "logits"]
    assert (len(trees.nodes), len(inner)) == (392, 196)
    assert sum(not node.inputs for node in inner) == 1


@pytest.mark.parametrize(
    "nodes",
    [
        (("a1.h0", ""), ("a0.h0", "q"), ("logits", "")),
        (("input", ""), ("a0.h0", ""), ("logits", "")),
        (("input", ""), ("m0", "q"), ("logits", "")),
        (("input", ""), ("logits", ""), ("m1", "")),
        (("input", ""),),
    ],
)
def test_paths_that_do_not_exist(gpt2: tuple[Any, TracedModel], nodes: Any) -> None:
    """Backwards, without ports, with ports where there are none, beyond the end, of no step."""
    _, model = gpt2
    with pytest.raises(GraphError, match=r"does not exist in this model|has no step"):
        path_effects(Setting(model, padded_pairs(model)), [Path(nodes)])


def test_a_set_has_one_end(gpt2: tuple[Any, TracedModel]) -> None:
    """Paths to different ends are not one patch."""
    _, model = gpt2
    with pytest.raises(GraphError, match="paths to logits and to m1 cannot be patched as one set"):
        path_trees.PathTrees(model.wiring).add(parse_paths("input>logits, input>m1", model.wiring))


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hops", [None, 1, 2, 4])
def test_few_paths_are_all_searched(gpt2: tuple[Any, TracedModel], hops: int | None) -> None:
    """Exactly the paths from input to logits of so many steps."""
    _, model = gpt2
    found = strongest_paths(Setting(model, padded_pairs(model), "noise"), max_hops=hops)
    assert sorted(found.paths, key=str) == sorted(all_paths(model.wiring, hops), key=str)
    assert found.method.startswith(f"exact, all {len(found.paths)} paths from input")
    assert found.warnings == ()


def test_a_search_from_senders(gpt2: tuple[Any, TracedModel]) -> None:
    """Paths begin at each of the senders; one may run through another."""
    _, model = gpt2
    found = strongest_paths(Setting(model, padded_pairs(model), "noise"), senders=["a0.h1", "m0"])
    ends = ("logits", "m1>logits", "a1.*:*>logits", "a1.*:*>m1>logits")
    text = ", ".join(f"{start}>{end}" for start in ("a0.1", "a0.1>m0", "m0") for end in ends)
    assert set(found.paths) == set(parse_paths(text, model.wiring))
    assert len(set(found.paths)) == len(found.paths)


@pytest.mark.parametrize("mode", ["noise", "both"])
def test_a_beam_finds_the_strongest(gpt2: tuple[Any, TracedModel], mode: Any) -> None:
    """A wide beam sees every path, a narrow one says what it did; scores are the same."""
    _, model = gpt2
    setting = Setting(model, padded_pairs(model), mode)
    full = strongest_paths(setting)
    wide = strongest_paths(setting, limit=0, beam=1000)
    assert sorted(wide.paths, key=str) == sorted(full.paths, key=str)
    by_path = {path: row for row, path in enumerate(full.paths)}
    narrow = strongest_paths(setting, limit=0, beam=20)
    assert 3 < len(narrow.paths) < 60
    assert "a beam search patched" in narrow.warnings[0]
    assert "that a beam of 20 met" in narrow.method
    for some in (wide, narrow):
        rows = [by_path[path] for path in some.paths]
        for each, effects in some.effects.items():
            assert gap(effects, full.effects[each][rows]) < 1e-9


def test_a_beam_stops_at_the_last_step(gpt2: tuple[Any, TracedModel]) -> None:
    """A beam makes paths of as many steps as are asked for."""
    _, model = gpt2
    found = strongest_paths(
        Setting(model, padded_pairs(model), "noise"), max_hops=2, limit=0, beam=1000
    )
    assert set(found.paths) == set(all_paths(model.wiring, 2))


def test_a_narrow_beam_follows_the_strongest_ends() -> None:
    """One end at each step: the known path of the hand-made model is among the few it meets."""
    found = strongest_paths(bundled("hand-induction", n_pairs=6, mode="noise"), limit=0, beam=1)
    assert str(found.paths[found.order()[0]]) == "input>a0.h0:v>a1.h0:k>logits"
    assert len(found.paths) < 30


def test_what_cannot_be_searched(gpt2: tuple[Any, TracedModel]) -> None:
    """Numbers and senders that make no path are named."""
    _, model = gpt2
    setting = Setting(model, padded_pairs(model))
    with pytest.raises(OptionError, match="--max-hops 0: a path has at least 1 step"):
        strongest_paths(setting, max_hops=0)
    with pytest.raises(GraphError, match="'logits' writes nothing"):
        strongest_paths(setting, senders=["logits"])
    with pytest.raises(OptionError, match="no sender is named"):
        strongest_paths(setting, senders=[])
    with pytest.raises(OptionError, match="ablation zero has no such run"):
        strongest_paths(replace(setting, ablation="zero"))


# --- known circuits -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_hand_induction_runs_along_one_path(mode: Any) -> None:
    """The previous-token head's key path carries the whole effect, others nothing."""
    found = strongest_paths(bundled("hand-induction", n_pairs=6, mode=mode))
    effects = dict(zip(map(str, found.paths), found.effects[mode].mean(1).tolist(), strict=True))
    strongest = min(effects, key=lambda path: effects[path])
    assert strongest == "input>a0.h0:v>a1.h0:k>logits"
    assert effects.pop(strongest) < -9
    assert max(map(abs, effects.values())) < 1e-3


@pytest.mark.parametrize(
    ("gate", "noise", "denoise"),
    [
        ("gate-and", -1.0, 0.0),
        ("gate-or", 0.0, -1.0),
        ("gate-add", -0.5, -0.5),
    ],
)
def test_gates_show_in_the_two_modes(gate: str, noise: float, denoise: float) -> None:
    """AND breaks when one path is corrupted, OR is restored by one, ADD half of each."""
    setting = bundled(gate, n_pairs=1, mode="both")
    chosen = parse_paths("input>a0.*:v>m0>logits", setting.model.wiring)
    found = named_paths(setting, chosen)
    for mode, value in (("noise", noise), ("denoise", denoise)):
        expected = torch.full((2, 1), value, dtype=torch.float64)
        assert gap(found.effects[mode], expected) < 1e-3  # type: ignore[index]


def test_induction_runs_through_keys() -> None:
    """The trained model's strongest paths go from the previous-token head into keys of layer 1."""
    found = strongest_paths(bundled("induction", n_pairs=8, mode="denoise"), max_hops=3)
    best = [str(found.paths[number]) for number in found.order()[:3]]
    assert best[0] == "input>a0.h3:v>a1.h1:k>logits"
    assert all(path.startswith("input>a0.h3:v>") and ":k>" in path for path in best)


def test_nothing_is_left_of_a_module(gpt2: tuple[Any, TracedModel]) -> None:
    """Patching leaves the model as it was."""
    module, model = gpt2
    pairs = padded_pairs(model)
    assert isinstance(module, nn.Module)
    before = module(pairs.clean.ids[:1]).logits
    path_effects(Setting(model, pairs, "noise"), all_paths(model.wiring, 3))
    assert torch.equal(module(pairs.clean.ids[:1]).logits, before)
