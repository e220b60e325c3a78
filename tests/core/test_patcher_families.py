"""Exact patching of every family against the stock model, computed component by component."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, random_module, unchecked
from family_oracles import SplitModel
from random_tasks import random_task
from torch import Tensor

from circuitlab import Patcher, Site, patchers
from circuitlab.edge_sets import edge_masks

#: Two float32 computations of one metric, relative to the size of the logits.
FLOAT32 = 1e-5


class Case:
    """A model of a family, a padded task, and what the stock model gives."""

    def __init__(self, family: str) -> None:
        module = random_module(family).requires_grad_(False)
        self.model = unchecked(module)
        self.split = SplitModel(module)
        self.pairs = self.model.encode(random_task([6, 4]))
        assert tuple(self.split.sources) == self.model.wiring.sources
        assert [tuple(r) for r in self.model.wiring.receivers] == list(self.split.receivers)

    def patcher(self, mode: Any = "noise") -> Patcher:
        (patcher,) = patchers(self.model, self.pairs, mode=mode)
        return patcher

    @torch.no_grad()
    def expected(self, patched: Tensor, mode: str = "noise") -> Tensor:
        """The metric ``[rows, batch]`` when these edges carry what the other prompt gives."""
        sides = [self.pairs.clean.ids, self.pairs.corrupt.ids]
        base, other = sides if mode == "noise" else sides[::-1]
        mask = self.pairs.clean.mask.long()
        reference = self.split.run(self.pairs.clean.ids, mask).logits[0]
        carried = self.split.run(other, mask).outputs
        logits = self.split.run(base, mask, other=carried, patched=patched).logits
        return torch.stack([self.pairs.score(row, reference) for row in logits]).double()

    def close(self, found: Tensor, expected: Tensor) -> bool:
        off, size = (found - expected).abs().max(), expected.abs().max()
        return bool(off < FLOAT32 * max(1.0, float(size)))


@pytest.fixture(scope="module", params=[f for f in ALL_FAMILIES if not f.endswith("-far")])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_every_edge(case: Case, mode: str) -> None:
    """One edge patched, also into a shared key or value, before or behind any norm."""
    edges = case.model.wiring.edges
    found = case.patcher(mode).edges(edges)
    expected = case.expected(edge_masks(case.model.wiring, [[edge] for edge in edges]), mode)
    assert case.close(found, expected)
    # Nearly every edge does something, so that none could be left out.
    effects = (expected - case.patcher(mode).base_score).abs().amax(1)
    assert int((effects > 1e-4).sum()) > 0.8 * len(edges)


def test_sets_of_edges(case: Case) -> None:
    """Some edges at once: every head reads its own stream, everything else is recomputed."""
    rng, edges = Random(0), case.model.wiring.edges
    sets = [rng.sample(edges, n) for n in (0, 1, 2, 5, 20, len(edges) // 2, len(edges))]
    patcher = case.patcher()
    found = patcher.sets(sets)
    assert case.close(found, case.expected(edge_masks(case.model.wiring, sets)))
    assert case.close(found[0], patcher.base_score)
    assert case.close(found[-1], patcher.other_score)


def test_a_node_is_all_edges_out_of_it(case: Case) -> None:
    """A source's output exchanged where it joins the stream, in the stock model too."""
    patcher, sources = case.patcher(), case.model.wiring.sources
    found = torch.cat(
        [
            patcher.scores(case.model.joins(source), patcher.difference[row][None])
            for row, source in enumerate(sources)
        ]
    )
    sets = [patcher.out_edges(source) for source in sources]
    assert case.close(found, case.expected(edge_masks(case.model.wiring, sets)))


def test_heads_with_streams_of_their_own(case: Case) -> None:
    """Each head's answer is what it would be if all heads read its stream."""
    model, patcher = case.model, case.patcher()
    torch.manual_seed(0)
    batch, pos = patcher.base.mask.shape
    change = torch.randn(2, model.n_heads, batch, pos, model.d_model)
    for ports in ("q", "k", "v", "qv", "qkv"):
        own = patcher.attention(1, dict.fromkeys(ports, change))
        for head in range(model.n_heads):
            same = patcher.attention(1, dict.fromkeys(ports, change[:, head]))
            gap = (own[..., head, :] - same[..., head, :])[:, patcher.base.mask]
            assert float(gap.abs().max()) < 1e-5 * float(same.abs().max())


def test_what_heads_write_more(case: Case) -> None:
    """Groups of heads add up to what the attention adds, and one head alone is its share."""
    model, patcher = case.model, case.patcher()
    torch.manual_seed(0)
    z, heads = Site("z", 1), range(model.n_heads)
    change = torch.randn(2, *patcher.base[z].shape)

    def outputs(z_change: Tensor) -> tuple[Tensor, Tensor]:
        """What each head and the whole attention write when z is changed in the model itself."""
        write = {z: patcher.base[z] + z_change}
        run = model.run(patcher.base.tokens, write=write, read=[*model.source_sites, out])
        rows = [model.wiring.source_rows[f"a1.h{head}"] for head in heads]
        return model.source_outputs(run)[rows], run[out]

    out = Site("attn_out", 1)
    before, whole = outputs(torch.zeros_like(change[0]))
    for row in range(2):
        after, moved = outputs(change[row])
        first, others = patcher.heads_output(1, change, [[0], [1, 2, 3]])
        real = patcher.base.mask
        assert case.close(first[row][real], (after - before)[0][real])
        assert case.close((first + others)[row][real], (moved - whole)[real])
        alone = torch.zeros_like(change[row])
        alone[:, :, 2] = change[row, :, :, 2]
        after, _ = outputs(alone)
        found = patcher.head_output(1, 2, change[:, :, :, 2])[row]
        assert case.close(found[real], (after - before)[2][real])


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_small_changes_in_half_precision(family: str) -> None:
    """What a head writes more is not lost in the rounding of what all heads write."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = unchecked(random_module(family, dtype=torch.bfloat16).to(dtype))
        pairs = model.encode(random_task([6, 4]))
        (patcher,) = patchers(model, pairs)
        torch.manual_seed(0)
        change = 0.003 * torch.randn(1, *patcher.base[Site("z", 1)].shape)
        found += patcher.heads_output(1, change.to(dtype), [range(4)])
    half, whole = found[0].float(), found[1]
    assert found[0].dtype == torch.bfloat16
    real = patcher.base.mask
    alike = torch.nn.functional.cosine_similarity(half[0][real], whole[0][real], dim=-1)
    assert float(alike.min()) > 0.95
