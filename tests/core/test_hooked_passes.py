"""Hooks on plain models: nodes, sites and edges agree with the stock model and the other oracle."""

from __future__ import annotations

from itertools import product

import oracles
import path_oracles
import pytest
import torch
from oracle_runs import (
    END,
    FAMILIES,
    MODES,
    TOLERANCE,
    gap,
    other_logits,
    out_edges,
    plain_logits,
    prompts,
    runs_of,
    same,
)
from path_oracles import Runs


@pytest.fixture(scope="module", params=[*product(FAMILIES, MODES)], ids="-".join)
def run(request: pytest.FixtureRequest) -> Runs:
    return runs_of(*request.param)


@pytest.fixture(scope="module")
def gpt2() -> Runs:
    return runs_of("gpt2")


def test_hooks_are_gone_afterwards(run: Runs) -> None:
    """The model is left as it was, also after an error."""
    before = plain_logits(run)
    path_oracles.patched_node(run, "m0")
    with pytest.raises(RuntimeError):
        run.run(writes={"m0": torch.zeros(1, 1, 3)})
    assert torch.equal(plain_logits(run), before)
    assert same(run, run.base.logits, before)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("family", FAMILIES)
def test_decomposition(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """What the sources write, and the biases that belong to none, sum to every stream."""
    run = runs_of(family, dtype=dtype)
    biases = [run.model.output_projection(layer).bias for layer in range(2)]
    for (target, port), sources in run.model.receivers():
        n_biases = 2 if target == "logits" else int(target[1])
        if target[0] == "m" and not run.model.parallel:
            n_biases += 1
        total = sum(run.base.outputs[source] for source in sources) + sum(biases[:n_biases])
        stream = run.base.inputs[target, port]
        assert gap(total, stream) < tolerance * float(stream.abs().max())


@torch.no_grad()
def test_passes_equal_the_other_oracle(gpt2: Runs) -> None:
    """Hooks on the stock model and a model computed part by part: equal under every change."""
    generator = torch.Generator().manual_seed(1)
    module, mask = gpt2.model.module, gpt2.mask
    plain = oracles.run(module, gpt2.ids, mask)
    real = mask.bool()
    for source, output in plain.outputs.items():
        assert gap(gpt2.base.outputs[source][real], output[real]) < TOLERANCE
    for receiver, stream in plain.inputs.items():
        assert gap(gpt2.base.inputs[receiver][real], stream[real]) < TOLERANCE
    assert gpt2.model.edges() == oracles.edge_names(2, 2)
    for _ in range(10):
        chosen = torch.rand(len(gpt2.model.edges()), generator=generator) < 0.3
        mixes = {
            edge: torch.randn(gpt2.other[edge[0]].shape, generator=generator).double()
            for edge, is_chosen in zip(gpt2.model.edges(), chosen, strict=True)
            if is_chosen
        }
        pushes = {("a1.h1", "k"): torch.randn(3, 6, 16, generator=generator).double()}
        expected = oracles.run(module, gpt2.ids, mask, mixes=mixes, pushes=pushes).logits[:, -1]
        assert gap(gpt2.run(mixes=mixes, pushes=pushes).logits, expected) < TOLERANCE
        assert gap(expected, gpt2.base.logits) > 0.1


@torch.no_grad()
def test_ablations_equal_the_other_oracle(gpt2: Runs) -> None:
    """What a patched source writes is the same, for each ablation."""
    clean, corrupt, mask = prompts()
    real = mask.bool()
    for ablation in ("counterfactual", "zero", "mean"):
        run = path_oracles.runs(gpt2.model.module, clean, corrupt, mask, ablation=ablation)
        expected = oracles.ablated_outputs(gpt2.model.module, clean, corrupt, ablation, mask)
        for source, output in expected.items():
            assert gap(run.other[source][real], output[real]) < TOLERANCE


def test_node_is_all_of_its_edges(run: Runs) -> None:
    """A component that writes its other output is every edge out of it, patched together."""
    for source in run.base.outputs:
        node = path_oracles.patched_node(run, source)
        assert same(run, node, path_oracles.patched_edges(run, out_edges(run, source)))
        assert gap(node, run.base.logits) > 1e-3
    whole = path_oracles.patched_node(run, "input")
    assert same(run, whole, other_logits(run))


def test_node_at_one_position(run: Runs) -> None:
    """The input at one position is that token exchanged; all positions are the whole node."""
    assert run.other_ids is not None
    for position in (3, 5):
        where = torch.zeros(3, 6, dtype=torch.bool)
        where[:, position] = True
        token = plain_logits(run, torch.where(where, run.other_ids, run.ids))
        assert same(run, path_oracles.patched_node(run, "input", where), token)
    # What a last component writes is read at the last position alone.
    node = path_oracles.patched_node(run, "m1")
    assert same(run, path_oracles.patched_node(run, "m1", where), node)
    assert torch.equal(path_oracles.patched_node(run, "m1", ~where), run.base.logits)


def test_site_carries_the_rest_of_the_run(run: Runs) -> None:
    """A stream exchanged whole is the other run from there on; the first one is the input."""
    kinds = ["resid_pre", "resid_post"] + ["resid_mid"] * (not run.model.parallel)
    for kind, layer in product(kinds, range(2)):
        assert same(run, path_oracles.patched_site(run, kind, layer), other_logits(run))
    where = torch.zeros(3, 6, dtype=torch.bool)
    where[:, 4] = True
    at_input = path_oracles.patched_site(run, "resid_pre", 0, where)
    assert same(run, at_input, path_oracles.patched_node(run, "input", where))
    last = path_oracles.patched_site(run, "resid_post", 1, where)
    assert torch.equal(last, run.base.logits)


def test_source_joins_the_stream(run: Runs) -> None:
    """A source's difference added where it joins the stream is the node, patched."""
    joins = {"input": ("resid_pre", 0), "m0": ("resid_post", 0), "m1": ("resid_post", 1)}
    for layer, head in product(range(2), range(2)):
        kind = "resid_post" if run.model.parallel else "resid_mid"
        joins[f"a{layer}.h{head}"] = (kind, layer)
    for source, (kind, layer) in joins.items():
        change = run.other[source] - run.base.outputs[source]
        pushed = path_oracles.pushed_site(run, kind, layer, change)
        assert same(run, pushed, path_oracles.patched_node(run, source))


@torch.no_grad()
def test_edge_into_logits_is_a_swap_in_the_last_stream(run: Runs) -> None:
    """The direct edge into logits: the last stream with one output exchanged, normed again."""
    module = run.model.module
    head = module.get_output_embeddings()
    for source in run.base.outputs:
        stream = run.base.inputs[END] - run.base.outputs[source] + run.other[source]
        expected = head(run.model.final_norm(stream))[:, -1]
        assert same(run, path_oracles.patched_edges(run, [(source, *END)]), expected)
        assert same(run, path_oracles.patched_path(run, [(source, ""), END]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_without_norms_direct_effects_sum_to_the_total(mode: str) -> None:
    """In a last stream that is not normed, the sources' direct effects add up; as do both modes."""
    run, back = (runs_of("gpt2", m, layer_norm=False) for m in (mode, *set(MODES) - {mode}))
    total = other_logits(run) - run.base.logits
    effects = {
        source: path_oracles.patched_edges(run, [(source, *END)]) - run.base.logits
        for source in run.base.outputs
    }
    assert gap(sum(effects.values(), torch.zeros(())), total) < TOLERANCE
    for source, effect in effects.items():
        recovered = path_oracles.patched_edges(back, [(source, *END)]) - back.base.logits
        assert gap(recovered, -effect) < TOLERANCE
