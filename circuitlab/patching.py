"""Exact effects of single edges: patch one, recompute everything after it, read the metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuitlab.ablation import Ablation, Ablator, choose_batch_size
from circuitlab.errors import GraphError
from circuitlab.model import TracedModel
from circuitlab.progress import track
from circuitlab.prompts import EncodedTask, Tokens
from circuitlab.run import Run
from circuitlab.sites import Site
from circuitlab.wiring import PORTS, Edge, Receiver, ReceiverBlock

#: Bytes that the residual streams of the edges patched together may take.
MEMORY = 64 * 2**20


def edge_effects(
    model: TracedModel,
    pairs: EncodedTask,
    edges: Sequence[Edge],
    *,
    ablation: Ablation = "counterfactual",
    batch_size: int | None = None,
) -> Tensor:
    """Exact effect of each edge alone, per pair.

    Only the receiver reads the source's ablated output: its norm is recomputed, everything after it
    is recomputed, other readers of the source are untouched. Blocks before the receiver are not run
    again, and many edges share one pass.

    Returns:
        ``[n_edges, n_pairs]``, metric(edge patched) - metric(clean), float64; negative helps.

    Raises:
        GraphError: an edge does not exist in the model.
        NumericsError: an activation is not finite.
    """
    blocks = _by_block(model, edges)
    size = batch_size or choose_batch_size(model, pairs)
    ablator = Ablator(model, pairs, ablation, size)
    effects = torch.zeros(len(edges), len(pairs), dtype=torch.float64)
    batches = list(pairs.batches(size))
    work = [(number, block) for number in range(len(batches)) for block in blocks]
    current, state = -1, None
    for number, block in track(work, f"patching {len(edges)} edges"):
        if number != current:
            current, state = number, _State(model, batches[number], ablator)
        assert state is not None
        columns = slice(number * size, number * size + len(batches[number]))
        for rows in state.chunks(blocks[block]):
            chosen = [edges[row] for row in rows]
            effects[rows, columns] = state.effects(block.kind, block.layer, chosen).double().cpu()
    return effects


class _Block(NamedTuple):
    kind: str
    layer: int


def _by_block(model: TracedModel, edges: Sequence[Edge]) -> dict[_Block, list[int]]:
    """Indices of the edges into each block of receivers, each edge checked."""
    where: dict[int, ReceiverBlock] = {
        number: block
        for block in model.wiring.blocks()
        for number in range(block.receivers.start, block.receivers.stop)
    }
    blocks: dict[_Block, list[int]] = defaultdict(list)
    for row, edge in enumerate(edges):
        receiver = model.wiring.receiver_columns.get(Receiver(edge.target, edge.port))
        source = model.wiring.source_rows.get(edge.source)
        if receiver is None or source is None or source >= where[receiver].n_sources:
            raise GraphError(
                f"edge {edge.source} -> {edge.target}{':' + edge.port if edge.port else ''} does "
                f"not exist in this model; a source reaches what runs after it, heads through "
                f"q, k or v"
            )
        blocks[_Block(where[receiver].kind, where[receiver].layer)].append(row)
    return dict(sorted(blocks.items(), key=lambda entry: (entry[0].layer, entry[1])))


class _State:
    """A batch run once clean and once ablated, from which edges are patched."""

    def __init__(self, model: TracedModel, batch: EncodedTask, ablator: Ablator) -> None:
        self.model, self.batch = model, batch
        streams = ["resid_pre"] if model.architecture.parallel else ["resid_pre", "resid_mid"]
        layers = range(model.n_layers)
        sites = [Site(kind, layer) for kind in (*streams, *PORTS) for layer in layers]
        self.clean = model.run(
            batch.clean, read=[*model.source_sites, *sites, Site("resid_post", model.n_layers - 1)]
        )
        self.difference, _ = ablator.difference(batch, self.clean)
        self.reference = self.clean.logits[:, -1]
        self.base = batch.score(self.reference, self.reference)

    def chunks(self, rows: Sequence[int]) -> Iterator[list[int]]:
        size = max(1, MEMORY // self.difference[0].nbytes)
        return (list(rows[i : i + size]) for i in range(0, len(rows), size))

    def effects(self, kind: str, layer: int, edges: Sequence[Edge]) -> Tensor:
        """``[edges, batch]`` for edges into one block of receivers."""
        model, clean = self.model, self.clean
        rows = [model.wiring.source_rows[edge.source] for edge in edges]
        moved = self.difference[rows].to(model.dtype)
        if kind == "logits":
            last = Site("resid_post", model.n_layers - 1)
            write = {last: clean[last] + moved}
            layer = model.n_layers - 1
        elif kind == "mlp":
            stream = Site("resid_pre" if model.architecture.parallel else "resid_mid", layer)
            write = {Site("mlp_in", layer): clean[stream] + moved}
        else:
            write = self._ports(layer, edges, clean[Site("resid_pre", layer)] + moved)
        n = len(edges)
        start = Site("resid_pre", layer)
        flat = {site: value.flatten(0, 1) for site, value in write.items()}
        flat[start] = clean[start].repeat(n, 1, 1)
        tokens = Tokens(clean.tokens.ids.repeat(n, 1), clean.tokens.mask.repeat(n, 1))
        run: Run = model.run(tokens, write=flat)
        logits = run.logits[:, -1].view(n, len(self.batch), -1)
        scores = [self.batch.score(row, self.reference) for row in logits]
        return torch.stack(scores) - self.base

    def _ports(self, layer: int, edges: Sequence[Edge], streams: Tensor) -> dict[Site, Tensor]:
        """Values of the ports written: clean everywhere but in each edge's own head."""
        model = self.model
        write = {}
        for port in PORTS:
            rows = [row for row, edge in enumerate(edges) if edge.port == port]
            if not rows:
                continue
            site = Site(port, layer)
            value = self.clean[site].expand(len(edges), -1, -1, -1, -1).clone()
            patched = model.projected(site, streams[rows])
            for number, row in enumerate(rows):
                head = model.wiring.component(edges[row].target).head
                value[row, :, :, head] = patched[number, :, :, head]
            write[site] = value
        return write
