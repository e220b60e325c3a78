"""Edges, nodes and residual streams patched by the plugin, against plain Hugging Face modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import path_oracles
import pytest
import torch
from circuitlab_path_patching.effects import Setting, measure
from circuitlab_path_patching.measures import effect_rows, strongest, sure_effect
from circuitlab_path_patching.patches import at_positions as each_position
from circuitlab_path_patching.patches import node_patch, stream_patches
from path_scores import Brute
from random_tasks import random_task
from torch import Tensor

import circuitlab
from circuitlab import (
    CircuitGraph,
    EncodedTask,
    Heatmap,
    OptionError,
    PromptPair,
    Task,
    TracedModel,
    load_model,
    memory,
    panels_of,
)

MODES = ("noise", "denoise")
LENGTHS = [6, 3, 5]
#: Largest error allowed for weights of each type.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def module(request: pytest.FixtureRequest) -> Any:
    return oracles.random_gpt2(2, 2, 16, seed=5).to(request.param)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


def expected(module: Any, pairs: EncodedTask, mode: str, logits: Any) -> Tensor:
    """Effects ``[n, n_pairs]`` of patched runs, given as a function of the plain runs."""
    brute = Brute(module, pairs, mode)
    return torch.stack([brute.effect(patched) for patched in logits(brute.run)])


def close(found: Tensor, wanted: Tensor, model: TracedModel) -> bool:
    return float((found - wanted).abs().max()) < TOLERANCE[model.dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", ["logit-difference", "kl-divergence"])
def test_edges(module: Any, model: TracedModel, mode: Any, metric: str) -> None:
    """All edges of a padded batch: hooks on plain modules say the same."""
    pairs = model.encode(random_task(LENGTHS, metric))
    edges = model.wiring.edges
    wanted = expected(
        module, pairs, mode, lambda run: [path_oracles.patched_edges(run, [e]) for e in edges]
    )
    for size in (1, None):
        found = circuitlab.edge_effects(model, pairs, edges, mode=mode, batch_size=size)
        assert close(found, wanted, model)
    assert wanted.abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_nodes_whole_and_at_each_position(module: Any, model: TracedModel, mode: Any) -> None:
    """Every source, at all positions and at one, seen by all that runs after it."""
    pairs = model.encode(random_task(LENGTHS))
    sources = model.wiring.sources
    whole = [node_patch(model, source) for source in sources]
    wanted = expected(
        module, pairs, mode, lambda run: [path_oracles.patched_node(run, s) for s in sources]
    )
    width = max(LENGTHS)
    only = torch.eye(width, dtype=torch.bool)[:, None].expand(-1, len(pairs), -1)
    placed = expected(
        module,
        pairs,
        mode,
        lambda run: [path_oracles.patched_node(run, s, at) for s in sources for at in only],
    )
    parts = [one for patch in whole for one in each_position(patch, pairs)]
    for size in (1, 2, None):
        setting = Setting(model, pairs, mode, batch_size=size)
        assert close(measure(setting, whole)[mode], wanted, model)
        assert close(measure(setting, parts)[mode], placed, model)
    assert parts[0].name == "input[-6]"
    assert float(placed.abs().max()) > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_streams_at_each_position(module: Any, model: TracedModel, mode: Any) -> None:
    """The residual stream before attention, before the MLP and at the end, one position a time."""
    pairs = model.encode(random_task([5, 5]))
    patches = stream_patches(model)
    only = torch.eye(5, dtype=torch.bool)[:, None].expand(-1, 2, -1)
    wanted = expected(
        module,
        pairs,
        mode,
        lambda run: [
            path_oracles.patched_site(run, patch.site.kind, patch.site.layer, at)
            for patch in patches
            for at in only
        ],
    )
    parts = [one for patch in patches for one in each_position(patch, pairs)]
    assert close(measure(Setting(model, pairs, mode), parts)[mode], wanted, model)
    assert [patch.name for patch in parts[:2]] == ["resid_pre.0[0]", "resid_pre.0[1]"]
    assert [str(p.site) for p in patches] == [
        *["resid_pre.0", "resid_mid.0", "resid_pre.1", "resid_mid.1", "resid_post.1"]
    ]


def test_a_direct_effect_is_the_edge_to_the_logits(model: TracedModel) -> None:
    """Node data: total and direct effect, and direct / total; the last MLP is all direct."""
    task = random_task([5, 5, 4])
    circuit = build(model, task, scope="nodes", top="all", allow_weak=True)
    edges = build(model, task, receivers="logits", top="all", allow_weak=True)
    for source in model.wiring.sources:
        data = circuit.nodes[source]
        assert data["score"] == circuit.edges[source, "logits", ""]["score"]
        direct = edges.edges[source, "logits", ""]
        assert data["direct"] == pytest.approx(direct["score"], abs=1e-6)
        assert data["direct_share"] == pytest.approx(data["direct"] / data["score"])
    assert circuit.nodes["m1"]["direct_share"] == pytest.approx(1, abs=1e-5)


def build(model: TracedModel, task: Any, **options: Any) -> CircuitGraph:
    return circuitlab.build_circuit(model, task, "path-patching", **options)


@pytest.mark.parametrize("scope", ["edges", "nodes", "residual"])
def test_both_modes_keep_what_is_strong_in_either(scope: str) -> None:
    """gate-or: noising one bit does nothing, denoising it everything; its score is the larger."""
    (noise, denoise, both) = (
        circuitlab.build_circuit("gate-or", None, "path-patching", scope=scope, mode=mode)
        for mode in ("noise", "denoise", "both")
    )
    strong = {effect[:3]: effect[3] for effect in both.effects()}
    for mode, circuit in (("noise", noise), ("denoise", denoise)):
        for *names, score in circuit.effects():
            data = both.edges[tuple(names)]
            assert abs(data["score"]) >= abs(score) - 1e-6
            assert data[f"{mode}_effect"] == pytest.approx(score, abs=1e-6)
    if scope != "residual":
        bit = ("a0.h0", "m0", "") if scope == "edges" else ("a0.h0", "logits", "")
        data = both.edges[bit]
        assert (data["noise"], data["denoise"]) == pytest.approx((0, 1), abs=1e-3)
        assert strong[bit] == pytest.approx(-1, abs=1e-3)


def test_known_edges_of_the_hand_models() -> None:
    """Exact patching of all edges finds those and only those that change the metric alone."""
    from circuitlab import zoo

    for name in ("gate-and", "gate-add", "gate-xor", "gate-jump", "hand-induction"):
        circuit = circuitlab.build_circuit(
            name, None, "path-patching", mode="noise", threshold=1e-3
        )
        found = {(s, t, p) for s, t, p, _ in circuit.effects()}
        assert found == set(zoo.known_edges(name, sense="effective")), name


def test_senders_and_receivers_choose_edges(model: TracedModel) -> None:
    """Only edges from a named sender to a named receiver are patched."""
    circuit = build(
        model,
        random_task([5, 5, 4]),
        senders="a0.*",
        receivers="a1.0:k, m1",
        top="all",
        allow_weak=True,
    )
    found = {(s, t, p) for s, t, p, _ in circuit.effects()}
    heads = ("a0.h0", "a0.h1")
    assert found == {(h, "a1.h0", "k") for h in heads} | {(h, "m1", "") for h in heads}


def test_heat_map_has_every_stream(model: TracedModel) -> None:
    """Layers by positions; what is kept as an effect is the strongest of it."""
    circuit = build(model, random_task([4, 4]), scope="residual", top=3, allow_weak=True)
    heatmap = panels_of(circuit)[0]
    assert isinstance(heatmap, Heatmap)
    assert (len(heatmap.rows), len(heatmap.columns)) == (5, 4)
    values = sorted((abs(v or 0) for row in heatmap.values for v in row), reverse=True)
    assert [abs(score) for *_, score in circuit.effects()] == pytest.approx(values[:3])


def test_a_column_names_its_token_where_all_prompts_have_it(model: TracedModel) -> None:
    """Where prompts differ the position is named alone, and its commonest texts are kept."""
    pairs = [PromptPair((5, a, 7), (5, a, 9), (1,), (2,)) for a in (11, 12, 12)]
    circuit = build(model, Task("t", tuple(pairs)), scope="residual", top="all", allow_weak=True)
    assert circuit.graph["plots"][0]["columns"] == ["0 5", "1", "2 7"]
    tokens = [{"11", "12"} if "[1]" in name else set() for name in circuit if "[" in name]
    kept = [set(data.get("tokens", ())) for name, data in circuit.nodes(data=True) if "[" in name]
    assert kept == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": True}, "--positions means nothing with --scope edges; use --scope nodes"),
        ({"path": "input>logits"}, "--path means nothing with --scope edges; use --scope paths"),
        ({"scope": "nodes", "receivers": "m0"}, "--receivers means nothing with --scope nodes"),
        ({"scope": "residual", "gates": True}, "--gates means nothing with --scope residual"),
        ({"scope": "paths", "receivers": "m0"}, "--receivers of --scope paths go with --mediate"),
        ({"scope": "paths", "mediate": "all"}, "give --receivers"),
        (
            {"scope": "paths", "path": "input>logits", "hypothesis": Path("h.toml")},
            "--path and --hypothesis ask for different runs",
        ),
        ({"ablation": "zero"}, "--mode both needs the corrupt run.*add --mode noise"),
        ({"ablation": "mean", "mode": "denoise"}, "--mode denoise needs the corrupt run"),
        ({"top": -1}, "--top -1"),
        ({"senders": "a9.0"}, "a9"),
        ({"senders": "m1", "receivers": "m0"}, "no edge leads from senders 'm1' to receivers 'm0'"),
    ],
)
def test_options_that_do_not_go_together(
    model: TracedModel, options: dict[str, Any], message: str
) -> None:
    """Each is refused with the option's name and a remedy."""
    with pytest.raises(OptionError, match=message):
        build(model, random_task([4, 4]), allow_weak=True, **options)


def test_shares_only_of_a_sure_effect() -> None:
    """An effect within three standard errors of 0 has no shares; the mode that does more scores."""
    assert sure_effect(torch.tensor([1.0, -1.0, 0.5])) is None
    assert sure_effect(torch.tensor([-2.0, -2.0])) == -2.0
    assert sure_effect(torch.tensor([0.0])) is None
    pairs = load_model((oracles.random_gpt2(), None)).encode(random_task([4, 4]))
    effects: Any = {
        "noise": torch.tensor([[-1.0, -3.0], [0.0, 0.2]], dtype=torch.float64),
        "denoise": torch.tensor([[-0.5, -0.5], [1.0, 1.0]], dtype=torch.float64),
    }
    rows = effect_rows(effects, pairs, -4.0)
    assert [row["score"] for row in rows] == [-2.0, 1.0]
    assert [row["noise"] for row in rows] == [0.5, pytest.approx(-0.025)]
    assert rows[0]["interval"] == [-3.0, -1.0]
    assert "noise" not in effect_rows(effects, pairs, None)[0]


def test_strongest_leaves_out_rounding_and_breaks_ties_by_name() -> None:
    """Below a millionth of the strongest a score is rounding; ``all`` keeps it all the same."""
    scores, names = [1.0, -2.0, 1e-9, 1.0], ["b", "c", "d", "a"]
    assert strongest(scores, names, 10, None) == [1, 3, 0]
    assert strongest(scores, names, "all", None) == [1, 3, 0, 2]
    assert strongest(scores, names, 1, 1.5) == [1]
    assert strongest([], [], 3, None) == []


@pytest.mark.parametrize("mode", ["noise", "both"])
def test_an_interrupted_scan_goes_on(
    model: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Only what was missing is patched, and the circuit is that of an uninterrupted run."""
    monkeypatch.setitem(memory.PATCHES, "cpu", 0)
    monkeypatch.setattr(memory, "TOGETHER", 1)  # one edge a pass
    task, state = random_task([4, 4, 4]), tmp_path / "run.state"
    options: dict[str, Any] = {"mode": mode, "top": "all", "allow_weak": True, "batch_size": 2}
    whole = build(model, task, **options)
    passes: list[int] = []
    patch = circuitlab.Patcher.edges

    def counted(self: Any, edges: Any) -> Tensor:
        if len(passes) == stop:
            raise KeyboardInterrupt
        passes.append(len(edges))
        return patch(self, edges)

    monkeypatch.setattr(circuitlab.Patcher, "edges", counted)
    stop = 37
    with pytest.raises(KeyboardInterrupt):
        build(model, task, resume=state, **options)
    stop = -1
    resumed = build(model, task, resume=state, **options)
    n_modes, n_batches = (1, 2) if mode == "noise" else (2, 2)
    assert len(passes) == n_modes * n_batches * model.wiring.n_edges
    assert list(resumed.effects()) == list(whole.effects())
    assert not state.exists()
