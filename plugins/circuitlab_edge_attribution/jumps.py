"""Jumps of the metric along the path: where they are, which component makes them, whose they are.

A component with a gate (JumpReLU, a step) has a smooth value h of what it reads that passes a
threshold, and its output jumps there. The gradient behind the gate is the same on both sides, so
integrated gradients lose the jump, all of it.

What each edge is owed follows from a ramp of width w in h, which gradients do see, as w goes to 0.
Inside it the metric has the gradient (size / w) dh/dr at a receiver's input r, and the path stays
inside for w / |dh/dalpha|. An edge from a source with difference d (ablated - clean) is owed

    size * (d . dh/dr) / (sum of d . dh/dr over the edges out of input),

where dh/dr is taken at the crossing, through everything between the receiver and the gate. The
shares of the edges out of ``input`` add up to 1, so the scores add up again; with one input its
edge gets the whole jump. Only the direction of dh/dr matters. At the component's own input it is
the normal of the surface on which the gate flips, measured by how far the crossing moves when what
the component reads is pushed along each coordinate; in front of it, by pushing edge by edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import Site, Tokens
from circuitlab_edge_attribution.ig_path import NARROWEST

if TYPE_CHECKING:
    from circuitlab import ReceiverBlock, Run
    from circuitlab_edge_attribution.ig_path import Gap, InputPath

#: Edges in front of a component that are pushed for one of its jumps, at most.
MOST_EDGES = 5_000
#: A source jumps when it moves this many times faster than on average along the path.
SPEED = 1_000.0
#: Rounding of a sum of many terms, in units of the type's smallest step.
ROUNDING = 64.0
#: How far an edge is pushed: a share of the way from clean to ablated.
PUSH = 2.0**-7
#: How far along the path what a component reads is looked at, to know how it moves.
NEARBY = 2.0**-11
#: How far one coordinate is pushed to see the crossing move, in units of what is read.
NUDGE = 2.0**-10
#: The moved crossing is looked for within so many nudges, the nearest first.
REACHES = (4.0, 16.0, 64.0)
#: Halvings of that reach, down to rounding.
HALVINGS = 48
#: Numbers that the streams of pushes run together may hold.
TOGETHER = 2**21


@dataclass(frozen=True)
class Jump:
    """A jump of the metric on one pair.

    Attributes:
        pair: Number of the pair, counted from 1; while it is looked at, its row of the batch.
        alpha: Where it is between the ablated (0) and the clean (1) input.
        size: metric(ablated side) - metric(clean side), of that pair; negative helps.
        component: The first whose output jumps; None when none was found.
        shared: Whether it was shared out among the edges.
    """

    pair: int
    alpha: float
    size: float
    component: str | None
    shared: bool = False


def locate(path: InputPath, gaps: tuple[Gap, ...]) -> Iterator[Jump]:
    """The jumps behind the gaps of a walk, each with the first component that jumps there."""
    model = path.model
    eps = torch.finfo(model.dtype).eps
    for gap in gaps:
        segment = gap.segment
        rows = [segment.row]
        ends = [
            path.at(rows, [alpha], read=model.source_sites)[0]
            for alpha in (segment.low, segment.high)
        ]
        moved = model.source_outputs(ends[0], less=ends[1]).abs().flatten(1).amax(1)
        size = model.source_outputs(ends[1]).abs().flatten(1).amax(1)
        whole = path.difference_of(rows, ends[0]).abs().flatten(1).amax(1)
        jumped = moved > SPEED * segment.width * whole + ROUNDING * eps * size
        first = model.wiring.sources[int(jumped.int().argmax())] if jumped.any() else None
        yield Jump(segment.row, segment.middle, gap.size, first)


def shares(path: InputPath, jump: Jump) -> Tensor | None:
    """Each edge's share of a jump, ``[n_sources, n_receivers]``; edges out of input sum to 1.

    None where it cannot be told: the jump is not an MLP's, no crossing was found nearby, or more
    than ``MOST_EDGES`` edges stand in front of it.
    """
    wiring = path.model.wiring
    if jump.component is None or wiring.component(jump.component).kind != "mlp":
        return None
    layer = wiring.component(jump.component).layer
    blocks = list(wiring.blocks())
    before = blocks[
        : 1 + next(n for n, b in enumerate(blocks) if (b.kind, b.layer) == ("mlp", layer))
    ]
    n_edges = sum((b.receivers.stop - b.receivers.start) * b.n_sources for b in before)
    if n_edges > MOST_EDGES:
        return None
    crossing = _Crossing(path, jump, layer)
    normal = crossing.normal()
    if normal is None:
        return None
    found = torch.zeros(len(wiring.sources), len(wiring.receivers), dtype=torch.float64)
    for block in before:
        found[: block.n_sources, block.receivers] = crossing.pushed(block, normal)
    whole = float(found[0].sum())
    return found / whole if abs(whole - 1) < 0.1 else None


class _Crossing:
    """One pair's run at the point of the path where an MLP's output jumps."""

    def __init__(self, path: InputPath, jump: Jump, layer: int) -> None:
        self.path, self.model, self.layer = path, path.model, layer
        self.rows, self.alpha = [jump.pair], jump.alpha
        layers = range(layer + 1)
        kinds = ("resid_pre", "q", "k", "v", "z", "attn_out")
        self.heard, self.written = Site("mlp_in", layer), Site("mlp_out", layer)
        sites = [Site(kind, n) for n in layers for kind in kinds]
        sites += [Site("mlp_in", n) for n in layers]
        self.run = self._at(jump.alpha, sites)
        self.difference = path.difference_of(self.rows, self.run)[:, 0].to(self.model.dtype)

    def _at(self, alpha: float, sites: list[Site]) -> Run:
        return self.path.at(self.rows, [alpha], read=sites)[0]

    def _value(self, site: Site) -> Tensor:
        """What the run holds at a site, without the batch axis."""
        return self.run[site][0]

    # --- the normal -------------------------------------------------------------------------------

    def normal(self) -> Tensor | None:
        """dh/dr at the MLP's input, ``[pos, d_model]``, such that it is 1 along the way back."""
        ahead, behind = (self._at(self.alpha + step, [self.heard, self.written]) for step in
                         (NEARBY, -NEARBY))  # fmt: skip
        speed = (behind[self.heard] - ahead[self.heard])[0] / (2 * NEARBY)
        low, high = self._sides()
        jumped = (low - high).abs().amax(1)
        places = (jumped > 1e-3 * jumped.max()).nonzero().flatten().tolist()
        parts = self._parts(low - high, places)
        normal = torch.zeros_like(self._value(self.heard))
        for place, part in zip(places, parts, strict=True):
            found = self._normal_at(place, speed[place], low[place], high[place])
            if found is None:
                return None
            normal[place] = part * found
        return normal

    def _sides(self) -> tuple[Tensor, Tensor]:
        """The MLP's output just on the ablated and on the clean side, ``[pos, d_model]`` each."""
        low, high = (
            self._at(self.alpha + side * NARROWEST, [self.written])[self.written][0]
            for side in (-1, 1)
        )
        return low, high

    def _parts(self, jumped: Tensor, places: list[int]) -> list[float]:
        """What of the jump comes from each position: its output's jump times the gradient there."""
        if len(places) == 1:
            return [1.0]
        part = self.path.batch.rows(self.rows)
        reference = self.path.reference[self.rows]
        run, _ = self.path.at(
            self.rows,
            [self.alpha],
            gradient_of=lambda logits: part.score(logits, reference),
            gradient_at=[self.written],
        )
        weights = (run.gradient(self.written)[0] * jumped).sum(1)[places].double()
        whole = float(weights.sum())
        return (weights / whole).tolist() if whole else [1 / len(places)] * len(places)

    def _normal_at(self, place: int, speed: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
        """The normal at one position, ``[d_model]``, scaled to 1 along ``speed``.

        Pushing coordinate j by e moves the crossing along the path by -e normal[j].
        """
        heard = self._value(self.heard)[place]
        nudge = NUDGE * float(heard.norm() / len(heard) ** 0.5)
        offsets = nudge * torch.eye(len(heard), dtype=heard.dtype, device=heard.device)
        pushed = torch.cat([heard + offsets, heard - offsets])
        middle, jumped = (low + high) / 2, low - high

        def ablated(along: Tensor) -> Tensor:
            """Whether the output is that of the ablated side."""
            return (self._mlp(pushed + along[:, None] * speed) - middle) @ jumped > 0

        upper = heard.new_full((len(pushed),), REACHES[0] * nudge / float(speed.norm()))
        for nearer, reach in pairwise(REACHES):
            outside = ablated(-upper) | ~ablated(upper)
            upper = torch.where(outside, upper * reach / nearer, upper)
        lower = -upper
        if (ablated(lower) | ~ablated(upper)).any():
            return None
        for _ in range(HALVINGS):
            half = (lower + upper) / 2
            beyond = ablated(half)
            upper, lower = torch.where(beyond, half, upper), torch.where(beyond, lower, half)
        above, below = ((lower + upper) / 2).chunk(2)
        return (below - above) / (2 * nudge)

    def _mlp(self, heard: Tensor) -> Tensor:
        """The MLP's output for single positions, ``[n, d_model]``."""
        n = len(heard)
        ids = torch.zeros(n, 1, dtype=torch.int64, device=heard.device)
        nothing = heard.new_zeros(n, 1, heard.shape[1])
        write = {
            Site("resid_pre", self.layer): nothing,
            Site("attn_out", self.layer): nothing,
            self.heard: heard[:, None],
        }
        tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        run = self.model.run(tokens, write=write, read=[self.written], logits="none")
        return run[self.written][:, 0]

    # --- edge by edge -----------------------------------------------------------------------------

    def pushed(self, block: ReceiverBlock, normal: Tensor) -> Tensor:
        """How fast each edge into a block moves h, ``[n_sources, receivers]``, float64."""
        difference = self.difference[: block.n_sources]
        if block.kind == "mlp" and block.layer == self.layer:
            return (difference * normal).double().sum((1, 2))[:, None].cpu()
        pushes = torch.cat([PUSH * difference, -PUSH * difference])
        if block.kind == "mlp":
            columns = [self._reads(self._mlp_writes(block.layer, pushes), normal)]
        else:
            columns = [
                self._reads(write, normal)
                for port in ("q", "k", "v")
                for write in self._head_writes(block.layer, port, pushes)
            ]
        ahead, behind = torch.stack(columns, 1).chunk(2)
        return (ahead - behind) / (2 * PUSH)

    def _mlp_writes(self, layer: int, pushes: Tensor) -> dict[Site, Tensor]:
        stream = self._value(Site("resid_pre", layer)) + self._value(Site("attn_out", layer))
        return {
            Site("resid_pre", layer): stream.expand_as(pushes),
            Site("attn_out", layer): torch.zeros_like(pushes),
            Site("mlp_in", layer): self._value(Site("mlp_in", layer)) + pushes,
        }

    def _head_writes(self, layer: int, port: str, pushes: Tensor) -> Iterator[dict[Site, Tensor]]:
        """For each head, the writes after which it alone reads pushes through the port."""
        stream, base = self._value(Site("resid_pre", layer)), self._value(Site("z", layer))
        write = {
            Site(kind, layer): self._value(Site(kind, layer)).expand(len(pushes), -1, -1, -1)
            for kind in ("q", "k", "v")
        }
        site = Site(port, layer)
        write[site] = self.model.weights.projected(site, stream + pushes)
        start = {Site("resid_pre", layer): stream.expand_as(pushes)}
        # A head's z does not depend on what other heads read.
        z = torch.cat(list(self._passes({**start, **write}, Site("z", layer))))
        for head in range(self.model.n_heads):
            own = base.expand_as(z).clone()
            own[:, :, head] = z[:, :, head]
            yield {**start, Site("z", layer): own}

    def _passes(self, write: dict[Site, Tensor], site: Site) -> Iterator[Tensor]:
        """The values at a site of runs with these writes, as many at a time as fit."""
        n, tokens = len(next(iter(write.values()))), self.run.tokens
        size = max(1, TOGETHER // self._value(self.heard).numel())
        for i in range(0, n, size):
            some = {place: value[i : i + size] for place, value in write.items()}
            many = min(size, n - i)
            rows = Tokens(tokens.ids.repeat(many, 1), tokens.mask.repeat(many, 1))
            yield self.model.run(rows, write=some, read=[site], logits="none")[site]

    def _reads(self, write: dict[Site, Tensor], normal: Tensor) -> Tensor:
        """The value h of runs that begin at a layer, up to a constant: ``[n]``, float64."""
        base = self._value(self.heard)
        return torch.cat(
            [
                ((heard - base) * normal).double().sum((1, 2)).cpu()
                for heard in self._passes(write, self.heard)
            ]
        )
