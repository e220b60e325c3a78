"""The path oracles: paths, hypotheses, receivers and mixtures hold to their identities."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import oracles
import path_oracles
import pytest
import torch
from hooked_passes import PORTS, Pass, Plain, Receiver, random_neox
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
from torch import Tensor, nn

from circuitlab.zoo.compiling import compile_model
from circuitlab.zoo.hand import GATES, NO, YES, gate_prompt

PATHS = [
    (("input", ""), END),
    (("input", ""), ("a0.h1", "k"), ("a1.h0", "q"), END),
    (("input", ""), ("m0", ""), ("a1.h1", "v"), ("m1", ""), END),
    (("input", ""), ("a0.h0", "v"), ("a1.h1", "k"), END),
]


@pytest.fixture(scope="module", params=[*product(FAMILIES, MODES)], ids="-".join)
def run(request: pytest.FixtureRequest) -> Runs:
    return runs_of(*request.param)


def test_path_of_two_is_an_edge(run: Runs) -> None:
    """A path that ends at a receiver is its edge; all ports are three edges at once."""
    for source, target, port in run.model.edges()[::3]:
        edge = path_oracles.patched_edges(run, [(source, target, port)])
        assert same(run, path_oracles.patched_path(run, [(source, ""), (target, port)]), edge)
    heads = [("m0", "a1.h1", port) for port in PORTS]
    whole = path_oracles.patched_path(run, [("m0", ""), ("a1.h1", PORTS)])
    assert same(run, whole, path_oracles.patched_edges(run, heads))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_path_is_everything_else_frozen(mode: str) -> None:
    """One path patched: in the other oracle, all edges but those on the path keep base values."""
    run = runs_of("gpt2", mode)
    for nodes in PATHS[1:]:
        on_path = {(a[0], *b) for a, b in pairwise(nodes)}
        first = (nodes[0][0], *nodes[1])
        mixes = {
            edge: run.other[edge[0]] if edge == first else run.base.outputs[edge[0]]
            for edge in run.model.edges()
            if edge == first or edge not in on_path
        }
        frozen = oracles.run(run.model.module, run.ids, run.mask, mixes=mixes).logits[:, -1]
        patched = path_oracles.patched_path(run, nodes)
        assert gap(patched, frozen) < TOLERANCE
        assert gap(patched, run.base.logits) > 1e-3


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (oracles.random_gpt2(2, 2), 196),
        (oracles.random_gpt2(1, 1), 8),
        (random_neox(2, 2), 64),
    ],
)
def test_number_of_paths(module: nn.Module, count: int) -> None:
    """196 for 2 layers of 2 heads; in parallel blocks 1 + 3 x 2 + 1 choices for each layer."""
    paths = path_oracles.all_paths(Plain(module))
    assert len(paths) == len(set(paths)) == count


def test_hypothesis_of_all_paths_and_of_none(run: Runs) -> None:
    """All paths: the base run, nothing unexplained. None: the other run, the total effect."""
    every = path_oracles.all_paths(run.model)
    assert same(run, path_oracles.hypothesis(run, every), run.base.logits)
    assert same(run, path_oracles.hypothesis(run, []), other_logits(run))
    # From the other side all components are recomputed from inputs that differ from the base.
    assert same(run, path_oracles.patched_paths(run, every), other_logits(run))
    assert same(run, path_oracles.patched_paths(run, []), run.base.logits)
    none = path_oracles.unexplained(run, [], distance)
    assert same(run, none, distance(run.base.logits, other_logits(run)))
    assert float(path_oracles.unexplained(run, every, distance).max()) < TOLERANCE
    assert float(path_oracles.unexplained(run, every[::2], distance).min()) > 1e-3


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, 3] - a[:, 5] - b[:, 3] + b[:, 5]).abs()


def test_path_is_the_hypothesis_of_all_others(run: Runs) -> None:
    """One path patched is the hypothesis that all paths but this one matter."""
    every = path_oracles.all_paths(run.model)
    for nodes in PATHS if not run.model.parallel else PATHS[:2]:
        assert nodes in every
        patched = path_oracles.patched_path(run, nodes)
        others = [path for path in every if path != nodes]
        assert same(run, path_oracles.hypothesis(run, others), patched)
        assert same(run, path_oracles.patched_paths(run, [nodes]), patched)


@pytest.mark.parametrize("family", FAMILIES)
def test_hypothesis_is_denoising(family: str) -> None:
    """Paths that stay clean in a corrupt model are paths made clean in a corrupt run."""
    noise, denoise = (runs_of(family, mode) for mode in MODES)
    paths = path_oracles.all_paths(noise.model)[::3]
    kept = path_oracles.hypothesis(noise, paths)
    assert gap(kept, path_oracles.patched_paths(denoise, paths)) < TOLERANCE
    assert gap(kept, noise.base.logits) > 1e-3


def test_path_takes_in_what_is_before_it(run: Runs) -> None:
    """A path from a head is all paths from input through it; a head without port its three."""
    every = path_oracles.all_paths(run.model)
    short = (("a0.h1", ""), ("a1.h0", "k"), END)
    through = [path for path in every if path[-2:] == short[-2:] and path[-3][0] == "a0.h1"]
    assert len(through) == 3
    expected = path_oracles.patched_paths(run, through)
    assert same(run, path_oracles.patched_paths(run, [short]), expected)
    assert same(run, path_oracles.patched_path(run, short), expected)
    wide = (("input", ""), ("a0.h0", "qv"), ("a1.h1", PORTS), END)
    narrow = [(wide[0], ("a0.h0", a), ("a1.h1", b), END) for a in "qv" for b in PORTS]
    expected = path_oracles.patched_paths(run, narrow)
    assert same(run, path_oracles.patched_paths(run, [wide]), expected)
    assert same(run, path_oracles.patched_path(run, wide), expected)


def frozen_heads(run: Runs, sender: str) -> Pass:
    """Wang et al.'s first pass on the stock model: every head's z is held, the sender's is other.

    The z of a head are set before the output projection, so MLPs and norms follow by themselves.
    """
    other_z, base_z = (kept_z(run, ids) for ids in (run.other_ids, run.ids))
    layer, head = int(sender[1]), int(sender[4])
    columns = slice(head * run.model.d_head, (head + 1) * run.model.d_head)
    base_z[layer][..., columns] = other_z[layer][..., columns]
    handles = [
        run.model.output_projection(n).register_forward_pre_hook(lambda _, a, z=z: (z,))
        for n, z in enumerate(base_z)
    ]
    try:
        return run.run()
    finally:
        for handle in handles:
            handle.remove()


def kept_z(run: Runs, ids: Tensor | None) -> list[Tensor]:
    kept: list[Tensor] = []
    handles = [
        run.model.output_projection(layer).register_forward_pre_hook(
            lambda _, a: kept.append(a[0].clone())
        )
        for layer in range(run.model.n_layers)
    ]
    assert ids is not None
    try:
        Pass(run.model).run(ids, run.mask)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def test_senders_and_receivers_with_frozen_heads(run: Runs) -> None:
    """Through MLPs: the first pass equals one with every z held, and the second reads it."""
    for sender in ("a0.h0", "a1.h1"):
        first = frozen_heads(run, sender)
        to_logits = path_oracles.patched_receivers(run, [sender], [END])
        assert same(run, to_logits, first.logits)
        assert gap(to_logits, run.base.logits) > 1e-3
    first = frozen_heads(run, "a0.h0")
    receivers: list[Receiver] = [("a1.h0", "q"), ("a1.h1", "v")]
    expected = run.run(reads={key: first.inputs[key] for key in receivers}).logits
    found = path_oracles.patched_receivers(run, ["a0.h0"], receivers)
    assert same(run, found, expected)
    # No MLP lies between them in parallel blocks.
    direct = path_oracles.patched_edges(run, [("a0.h0", *receiver) for receiver in receivers])
    assert same(run, found, direct) == run.model.parallel


def test_direct_senders_are_edges(run: Runs) -> None:
    """With everything frozen, senders and receivers are the edges between them, patched at once.

    Receivers of one layer do not read each other, so that how they are held makes no difference.
    """
    receivers: list[Receiver] = [("a1.h0", "q"), ("a1.h0", "k"), ("a1.h1", "v")]
    senders = ["a0.h1", "m0"]
    edges = [(sender, *receiver) for sender in senders for receiver in receivers]
    expected = path_oracles.patched_edges(run, edges)
    for fixed in (True, False):
        found = path_oracles.patched_receivers(run, senders, receivers, mediate="all", fixed=fixed)
        assert same(run, found, expected)


def test_receivers_behind_receivers(run: Runs) -> None:
    """Held fixed, logits hide all other receivers; not fixed, all receivers are the whole node."""
    receivers = [edge[1:] for edge in out_edges(run, "a0.h1")]
    free = path_oracles.patched_receivers(run, ["a0.h1"], receivers, mediate="all", fixed=False)
    assert same(run, free, path_oracles.patched_node(run, "a0.h1"))
    held = path_oracles.patched_receivers(run, ["a0.h1"], receivers, mediate="all")
    assert same(run, held, path_oracles.patched_edges(run, [("a0.h1", *END)]))


def test_without_mlps_nothing_mediates() -> None:
    """Where MLPs write a constant, freezing them too changes nothing."""
    run = runs_of("gpt2", mlp=False)
    for receivers in ([("a1.h0", "k")], [END]):
        heads, direct = (
            path_oracles.patched_receivers(run, ["a0.h1"], receivers, mediate=mediate)
            for mediate in ("heads", "all")
        )
        assert gap(heads, direct) < TOLERANCE


def test_mixtures_of_random_models(run: Runs) -> None:
    """All clean, all corrupt, one changed: rows of nodes and of edges are those patches."""
    members = ["a0.h1", ("input", "m1", ""), "m0"]
    table = path_oracles.mixtures(run, members)
    assert table.shape == (8, 3, 40)
    base_row = {"noise": 7, "denoise": 0}[run.mode]
    assert same(run, table[base_row], run.base.logits)
    for bit, member in enumerate(members):
        edges = out_edges(run, member) if isinstance(member, str) else [member]
        alone = path_oracles.patched_edges(run, edges)
        assert same(run, table[base_row ^ 1 << bit], alone)
    clean, corrupt, _ = prompts()
    whole = path_oracles.mixtures(run, ["input"])
    for row, ids in enumerate((corrupt, clean)):
        assert same(run, whole[row], plain_logits(run, ids))


@pytest.mark.parametrize("name", ["gate-and", "gate-or", "gate-add", "gate-xor"])
def test_mixtures_of_gates_are_truth_tables(name: str) -> None:
    """Two heads that copy bits: every mixture gives the gate's value of the mixed bits."""
    module, tokenizer = compile_model(name)
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in (YES, NO))
    bits = list(product((0, 1), repeat=2))
    pairs = [(a, b) for a in bits for b in bits]
    ids = [
        torch.tensor([tokenizer(gate_prompt(pair[side])).input_ids for pair in pairs])
        for side in (0, 1)
    ]
    for mode in MODES:
        run = path_oracles.runs(module.double(), *ids, mode=mode)
        table = path_oracles.mixtures(run, ["a0.h0", "a0.h1"])
        values = table[..., yes] - table[..., no]
        for (row, pair), value in zip(
            product(range(4), pairs), values.flatten().tolist(), strict=True
        ):
            mixed = tuple(pair[0 if row >> bit & 1 else 1][bit] for bit in range(2))
            assert value == pytest.approx(GATES[name].table[mixed], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    """A pair in a padded batch gives what it gives alone."""
    clean, corrupt, mask = prompts()
    together = runs_of(family)

    def measure(run: Runs) -> Tensor:
        return torch.stack(
            [
                path_oracles.patched_node(run, "a0.h1"),
                path_oracles.patched_path(run, PATHS[2]),
                path_oracles.patched_paths(run, PATHS),
                path_oracles.patched_receivers(run, ["a0.h0"], [("a1.h0", "k"), ("m1", "")]),
                path_oracles.patched_site(run, "resid_post", 0),
                *path_oracles.mixtures(run, ["a0.h0", "m0"]),
            ]
        )

    found = measure(together)
    for row, length in enumerate(mask.sum(1).tolist()):
        ids = (clean[row : row + 1, -length:], corrupt[row : row + 1, -length:])
        alone = measure(path_oracles.runs(together.model.module, *ids))
        assert gap(found[:, row : row + 1], alone) < TOLERANCE


def test_what_does_not_exist_is_refused() -> None:
    """A misspelt edge, receiver or state cannot pass for a patch without effect."""
    gpt2 = runs_of("gpt2")
    with pytest.raises(ValueError, match="do not exist in this model"):
        path_oracles.patched_edges(gpt2, [("m1", "a0.h0", "q")])
    with pytest.raises(ValueError, match="choose heads or all"):
        path_oracles.patched_receivers(gpt2, ["m0"], [END], mediate="mlps")
    clean, corrupt, mask = prompts()
    for settings in ({"ablation": "noise"}, {"corrupt": None}, {"mode": "clean"}):
        given: dict[str, Any] = {"clean": clean, "corrupt": corrupt, "mask": mask, **settings}
        with pytest.raises(ValueError, match=r"mode|ablation"):
            path_oracles.runs(gpt2.model.module, **given)
