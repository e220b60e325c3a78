"""CircuitWalk: circuits run on a batch of pairs, from the run in which everything is ablated.

There every receiver reads what all sources write when ablated. To this a circuit adds, over each
edge that it keeps, what the source writes more than when ablated. So only kept edges cost
anything, and of these only those from sources that write something else at all, to components that
the logits depend on.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from circuitlab.ablation import Ablation
from circuitlab.patcher import Patcher
from circuitlab.run import Run
from circuitlab.sites import Site
from circuitlab.wiring import PORTS, ReceiverBlock

#: A source whose output is this near its ablated one is at rest: in roundings of the largest number
#: of the stream at that token.
ROUNDINGS = 16
#: Bytes that the changes of the sources of the circuits walked together may take, by type of
#: device.
TOGETHER = {"cpu": 64 * 2**20, "cuda": 4 * 2**30}


class CircuitWalk:
    """Runs circuits on the pairs of a patcher.

    Args:
        patcher: In mode ``noise``; its differences are what the ablated sources write more than
            in the clean run.
        ablation: The patcher's.

    Attributes:
        patcher: As given.
        ablated: With ablation ``zero``, a run in which all sources write 0. What is left of the
            stream is then known exactly; norms would blow up the rounding of a sum.
    """

    def __init__(self, patcher: Patcher, ablation: Ablation) -> None:
        self.patcher = patcher
        self.ablated = _zeroed(patcher) if ablation == "zero" else None
        self._ablation = ablation
        self._wiring = patcher.model.wiring
        # One head that changes moves the shares of all of its layer.
        self._joint = bool(patcher.model.architecture.attention_post_norm)

    @torch.no_grad()
    def scores(self, kept: Tensor) -> Tensor:
        """The metric of each circuit on each pair, ``[n_circuits, batch]``, float64.

        Args:
            kept: Edges of each circuit, bool ``[n_circuits, n_sources, n_receivers]`` in the order
                of the wiring, on the CPU.

        Raises:
            NumericsError: an activation is not finite.
        """
        size = self._together(kept)
        parts = [self._walked(kept[i : i + size]) for i in range(0, len(kept), size)]
        return torch.cat([self.patcher.base_score.new_zeros(0, len(self.patcher)), *parts])

    def _together(self, kept: Tensor) -> int:
        """How many circuits are walked together."""
        model, stream = self.patcher.model, self.patcher.difference[0].nbytes
        memory = TOGETHER.get(model.device.type, TOGETHER["cuda"])
        held = int(kept.any(2).any(0).sum()) if len(kept) else 0
        return max(1, memory // ((held + 3 * model.n_heads + 8) * stream))

    # --- everything ablated -----------------------------------------------------------------------

    @cached_property
    def _drift(self) -> list[Tensor]:
        """What each block reads more when all sources are ablated, ``[batch, pos, d_model]``."""
        difference, total, done = self.patcher.difference, None, 0
        found: list[Tensor] = []
        for block in self._wiring.blocks():
            if self.ablated is not None:
                found.append(self._read_by(block, self.ablated) - self._read_by(block))
                continue
            if block.n_sources > done:
                more = difference[done : block.n_sources].sum(0)
                total, done = more if total is None else total + more, block.n_sources
            assert total is not None
            found.append(total)
        return found

    def _read_by(self, block: ReceiverBlock, run: Run | None = None) -> Tensor:
        """The stream that a block reads in a run, by default the clean one."""
        get = self.patcher.stream if run is None else run.__getitem__
        if block.kind == "logits":
            return get(Site("resid_post", block.layer - 1))
        stream = get(Site("resid_pre", block.layer))
        if block.kind == "attention" or self._wiring.parallel:
            return stream
        return stream + get(Site("attn_out", block.layer))

    @cached_property
    def _restless(self) -> dict[int, Tensor]:
        """Sources that write something else than when ablated though all they read is ablated.

        Of each by its row how much more it then writes, ``[1, batch, pos, d_model]``.
        """
        patcher, found = self.patcher, {0: -self.patcher.difference[:1]}
        if self._ablation == "counterfactual":
            return found  # All others then write what they write on the corrupt prompt.
        for block, drift in zip(self._wiring.blocks(), self._drift, strict=True):
            if block.kind == "logits":
                continue
            first, n = self._written(block)
            if block.kind == "attention":
                z = patcher.attention(block.layer, dict.fromkeys(PORTS, drift[None]))
                written = patcher.heads_output(block.layer, z, [[head] for head in range(n)])
            else:
                written = [patcher.mlp(block.layer, drift[None])]
            clean = self._read_by(block)
            largest = torch.maximum(clean.abs(), (clean + drift).abs()).amax(-1)
            least = ROUNDINGS * torch.finfo(clean.dtype).eps * largest
            for row, output in enumerate(written, first):
                more = output - patcher.difference[row]
                if bool((more[0].abs().amax(-1) > least)[patcher.base.mask].any()):
                    found[row] = more
        return found

    # --- one walk ---------------------------------------------------------------------------------

    def _walked(self, kept: Tensor) -> Tensor:
        """``[n, batch]`` of circuits walked together."""
        reads, held = self._needed(kept)
        walk = _Walk(self, reads, held)
        for number, block in enumerate(self._wiring.blocks()):
            walk.go_through(block, self._drift[number])
        return walk.scores

    def _needed(self, kept: Tensor) -> tuple[Tensor, list[int]]:
        """The edges that make a difference, and rows of the sources whose output is then read.

        An edge from a source at rest carries what it carries when patched. A component on which
        the logits do not depend is not computed.
        """
        moving = kept.new_zeros(kept.shape[:2])
        moving[:, list(self._restless)] = True
        blocks = list(self._wiring.blocks())
        for block in blocks[:-1]:
            read = kept[:, : block.n_sources, block.receivers] & moving[:, : block.n_sources, None]
            first, n = self._written(block)
            moving[:, first : first + n] |= self._of_components(block, read.any(1))
        kept = kept & moving[:, :, None]
        live = torch.zeros_like(moving)
        for block in reversed(blocks):
            if block.kind == "logits":
                wanted = kept.new_ones(len(kept), 1)
            else:
                first, n = self._written(block)
                own = live[:, first : first + n]
                if block.kind == "attention":
                    own = own.any(1, keepdim=True).expand_as(own) if self._joint else own
                    own = own.repeat(1, len(PORTS))
                wanted = own
            read = kept[:, : block.n_sources, block.receivers]
            live[:, : block.n_sources] |= (read & wanted[:, None]).any(2)
        return kept, (live & moving).any(0).nonzero().flatten().tolist()

    def _of_components(self, block: ReceiverBlock, receivers: Tensor) -> Tensor:
        """From ``[n, receivers]`` of a block to ``[n, components]``: whether any port is."""
        if block.kind != "attention":
            return receivers
        heads = receivers.view(len(receivers), len(PORTS), -1).any(1)
        return heads.any(1, keepdim=True).expand_as(heads) if self._joint else heads

    def _written(self, block: ReceiverBlock) -> tuple[int, int]:
        """The first of the sources that a block's receivers belong to, and their number."""
        first = self._wiring.first_source(block.layer)
        n_heads = self._wiring.n_heads
        return (first, n_heads) if block.kind == "attention" else (first + n_heads, 1)


class _Walk:
    """Goes through the blocks in forward order.

    Attributes:
        scores: ``[n, batch]``, once the logits are reached.
    """

    scores: Tensor

    def __init__(self, walk: CircuitWalk, reads: Tensor, held: list[int]) -> None:
        self._patcher, self._walk, self._rows = walk.patcher, walk, held
        self._kept, self._n = reads, len(reads)
        difference = self._patcher.difference
        # In front what is read when everything is ablated, in every receiver with weight 1.
        self._weights = torch.cat([reads.new_ones(self._n, 1, reads.shape[2]), reads[:, held]], 1)
        self._weights = self._weights.transpose(1, 2).to(difference)
        self._more = difference.new_empty(self._n, 1 + len(held), *difference.shape[1:])
        self._places = {row: place for place, row in enumerate(held, 1)}
        if 0 in self._places:
            self._more[:, 1] = walk._restless[0]

    def go_through(self, block: ReceiverBlock, drift: Tensor) -> None:
        """What the components of a block write, or at the logits the metric.

        Args:
            block: The next block.
            drift: What it reads more than in the clean run when everything is ablated.
        """
        patcher, layer = self._patcher, block.layer
        # Behind the last attention only the last position counts.
        positions = slice(-1 if layer >= patcher.model.n_layers - 1 else 0, None)
        if block.kind == "logits":
            change = self._read(block, block.receivers, drift, positions)[:, 0]
            site = Site("resid_post", layer - 1)
            self.scores = patcher.scores(site, change).expand(self._n, -1)
            return
        first, n = self._walk._written(block)
        wanted = [row for row in range(first, first + n) if row in self._places]
        if not wanted:
            return
        if not self._kept[:, : block.n_sources, block.receivers].any():
            for row in wanted:
                self._more[:, self._places[row]] = self._walk._restless[row]
            return
        if block.kind == "attention":
            z = patcher.attention(layer, self._ports(block, drift))[:, :, positions]
            written = patcher.heads_output(layer, z, [[row - first] for row in wanted])
        else:
            read = self._read(block, block.receivers, drift, positions)
            written = [patcher.mlp(layer, read[:, 0])]
        for row, output in zip(wanted, written, strict=True):
            more = output - patcher.difference[row][:, positions]
            self._more[:, self._places[row], :, positions] = more

    def _ports(self, block: ReceiverBlock, drift: Tensor) -> dict[str, Tensor]:
        """What the heads of a layer read more through each port than in the clean run."""
        n_heads = self._walk._wiring.n_heads
        columns = [
            slice(block.receivers.start + i * n_heads, block.receivers.start + (i + 1) * n_heads)
            for i in range(len(PORTS))
        ]
        if self._alike(block, block.receivers):
            read = [self._read(block, block.receivers, drift)] * len(PORTS)
        elif any(self._alike(block, part) for part in columns):
            read = [self._read(block, part, drift) for part in columns]
        else:  # one large product takes less time than three
            read = list(self._read(block, block.receivers, drift).chunk(len(PORTS), 1))
        return {
            port: value[:, 0] if value.shape[1] == 1 else value
            for port, value in zip(PORTS, read, strict=True)
        }

    def _alike(self, block: ReceiverBlock, columns: slice) -> bool:
        """Whether in each circuit these receivers of a block read the same."""
        kept = self._kept[:, : block.n_sources, columns]
        return bool((kept == kept[:, :, :1]).all())

    def _read(
        self, block: ReceiverBlock, columns: slice, drift: Tensor, positions: slice = slice(None)
    ) -> Tensor:
        """What receivers read more than in the clean run.

        Returns:
            ``[1 or n, 1 or receivers, batch, positions, d_model]``, one where all are equal.
        """
        if not self._kept[:, : block.n_sources, columns].any():
            return drift[None, None, :, positions]
        if self._alike(block, columns):
            columns = slice(columns.start, columns.start + 1)
        count = 1 + sum(row < block.n_sources for row in self._rows)
        self._more[:, 0] = drift
        weights = self._weights[:, columns, :count]
        more = self._more[:, :count, :, positions]
        mixed = torch.bmm(weights, more.flatten(2))
        return mixed.view(*mixed.shape[:2], *more.shape[2:])


def _zeroed(patcher: Patcher) -> Run:
    """The clean prompts with every source's output overwritten by 0."""
    model = patcher.model
    layers = range(model.n_layers)
    nothing = torch.zeros((), dtype=model.dtype, device=model.device)
    write = {Site(kind, layer): nothing for layer in layers for kind in ("z", "mlp_out")}
    read = [Site(kind, layer) for layer in layers for kind in ("resid_pre", "attn_out")]
    return model.run(
        patcher.pairs.clean,
        read=[*read, Site("resid_post", layers[-1])],
        write={Site("resid_pre", 0): nothing, **write},
    )
