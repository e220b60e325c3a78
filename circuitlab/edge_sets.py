"""The metric with sets of edges patched together: every receiver reads a stream of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab.errors import GraphError, SiteError
from circuitlab.sites import Site
from circuitlab.wiring import PORTS, Edge, Receiver, ReceiverBlock, Wiring

if TYPE_CHECKING:
    from circuitlab.patcher import Patcher


#: Bytes that the changes of all sources of the sets walked together may take.
SET_MEMORY = 512 * 2**20


def edge_masks(wiring: Wiring, sets: Sequence[Collection[Edge]]) -> Tensor:
    """Sets of edges as masks, ``[n_sets, n_sources, n_receivers]``, bool.

    Raises:
        GraphError: an edge does not exist in the model.
    """
    rows, columns = wiring.source_rows, wiring.receiver_columns
    exists = existing_edges(wiring).tolist()
    places = []
    for number, chosen in enumerate(sets):
        for source, target, port in chosen:
            column, row = columns.get(Receiver(target, port)), rows.get(source)
            if column is None:
                raise GraphError(
                    f"receiver {_named(target, port)} does not exist in this model; heads are read "
                    f"through q, k or v"
                )
            if row is None or not exists[row][column]:
                raise _missing(source, target, port)
            places.append((number, row, column))
    masks = torch.zeros(len(sets), len(rows), len(columns), dtype=torch.bool)
    if places:
        masks[tuple(torch.tensor(places).T)] = True
    return masks


def check_masks(wiring: Wiring, masks: Tensor) -> None:
    """Refuse masks that are of another model.

    Raises:
        SiteError: the masks are not bool, or of another shape.
        GraphError: a mask is true where there is no edge.
    """
    shape = (len(wiring.sources), len(wiring.receivers))
    if masks.dtype != torch.bool or masks.shape[1:] != shape or masks.ndim != 3:
        raise SiteError(
            f"masks of edges have type {masks.dtype} and shape {list(masks.shape)}; give bool and "
            f"[n_sets, n_sources, n_receivers], here [n_sets, {shape[0]}, {shape[1]}]"
        )
    wrong = masks.any(0).cpu() & ~existing_edges(wiring)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise _missing(wiring.sources[row], *wiring.receivers[column])


def score_sets(patcher: Patcher, sets: Sequence[Collection[Edge]] | Tensor) -> Tensor:
    """See :meth:`circuitlab.patcher.Patcher.sets`; as many sets at a time as memory allows."""
    wiring = patcher.model.wiring
    if isinstance(sets, Tensor):
        check_masks(wiring, sets)
        held = int(sets.any(2).any(0).sum()) if len(sets) else 0
    else:
        held = len({edge.source for chosen in sets for edge in chosen})
    streams = held + 2 * patcher.model.n_heads + 2
    mask_size = len(wiring.sources) * len(wiring.receivers)
    size = max(1, SET_MEMORY // (streams * patcher.difference[0].nbytes + mask_size))
    parts = [patcher.base_score.new_zeros(0, len(patcher))]
    for first in range(0, len(sets), size):
        part = sets[first : first + size]
        masks = part if isinstance(part, Tensor) else edge_masks(wiring, part)
        parts.append(_Walk(patcher, masks.to(patcher.model.device)).scores())
    return torch.cat(parts)


class _Walk:
    """Goes through the blocks in forward order; everything is kept as a change from the base run.

    What all sets have in common has one row, so it is computed once; a component whose output no
    receiver reads in any set is not computed at all.

    Attributes:
        patched: ``[n_sets, n_sources, n_receivers]``.
        stream: Change of the sources that no set patches, summed, ``[1 or n_sets, batch, pos,
            d_model]``; None before anything has changed.
        held: The same of each other source that somebody reads, by its row.
    """

    def __init__(self, patcher: Patcher, masks: Tensor) -> None:
        self.patcher, self.model, self.n = patcher, patcher.model, len(masks)
        self.patched = masks
        exists = existing_edges(self.model.wiring).to(masks.device)
        self.free: list[bool] = (~masks.any(2).any(0)).tolist()
        self.unread: list[bool] = (masks | ~exists).all(2).all(0).tolist()
        self.into: list[bool] = masks.any(1).any(0).tolist()
        self.stream: Tensor | None = None
        self.held: dict[int, Tensor] = {}

    def scores(self) -> Tensor:
        """``[n_sets, batch]``."""
        before: Tensor | None = None
        for block in self.model.wiring.blocks():
            if block.kind == "attention":
                if not any(self.into[block.receivers.start :]):
                    return self._finish(Site("resid_pre", block.layer), self._everything())
                before = self.stream
                self._attention(block)
            elif block.kind == "mlp":
                self._mlp(block, before if self.model.wiring.parallel else self.stream)
            else:
                change = self._read(block.receivers, block.n_sources, self.stream)
                last = Site("resid_post", block.layer - 1)
                return self._finish(last, None if change is None else change[:, 0])
        raise AssertionError("the last block is the logits")

    def _attention(self, block: ReceiverBlock) -> None:
        layer, n_heads = block.layer, self.model.n_heads
        first = self.model.wiring.first_source(layer)
        free = [head for head in range(n_heads) if self.free[first + head]]
        held = [h for h in range(n_heads) if h not in free and not self.unread[first + h]]
        if not free and not held:
            return
        change: dict[str, Tensor] = {}
        for number, port in enumerate(PORTS):
            start = block.receivers.start + number * n_heads
            read = self._read(slice(start, start + n_heads), block.n_sources, self.stream)
            if read is not None:
                change[port] = read[:, 0] if read.shape[1] == 1 else read
        if not change:
            return
        z = self.patcher.attention(layer, change)
        groups = [[head] for head in held] + [free] * bool(free)
        written = self.patcher.heads_output(layer, z, groups)
        for head, own in zip(held, written, strict=False):
            self.held[first + head] = own
        if free:
            self._write(written[-1])

    def _mlp(self, block: ReceiverBlock, stream: Tensor | None) -> None:
        row = self.model.wiring.source_rows[f"m{block.layer}"]
        if not self.free[row] and self.unread[row]:
            return
        change = self._read(block.receivers, block.n_sources, stream)
        if change is None:
            return
        moved = self.patcher.mlp(block.layer, change[:, 0])
        if self.free[row]:
            self._write(moved)
        else:
            self.held[row] = moved

    def _read(self, columns: slice, n_sources: int, stream: Tensor | None) -> Tensor | None:
        """What receivers read more than in the base run.

        Returns:
            ``[1 or n_sets, 1 or receivers, batch, pos, d_model]``, one where all are equal; None
            for nothing.
        """
        patched = self.patched[:, :n_sources, columns]
        if (patched == patched[:, :, :1]).all():
            patched = patched[:, :, :1]
        # A source whose change is the same in all sets is a row of one matrix product.
        rows = patched.any(2).any(0).nonzero().flatten().tolist()
        values = [self.patcher.difference[rows]]
        weights = [patched[:, rows]]
        own: list[int] = []
        for row, moved in self.held.items():
            if row >= n_sources or patched[:, row].all():
                continue
            if len(moved) == self.n > 1:
                own.append(row)
            else:
                values.append(moved)
                weights.append(~patched[:, row : row + 1])
        total = None if stream is None else stream[:, None]
        if rows or len(values) > 1:
            total = _plus(total, _mixed(torch.cat(weights, 1), torch.cat(values)))
        if own:
            moved = torch.stack([self.held[row] for row in own], 1)
            weight = (~patched[:, own]).transpose(1, 2).to(moved.dtype)
            mixed = torch.bmm(weight, moved.flatten(2))
            total = _plus(total, mixed.view(*mixed.shape[:2], *moved.shape[2:]))
        return total

    def _everything(self) -> Tensor | None:
        """Change of the whole stream, where nothing later is patched."""
        total = self.stream
        for moved in self.held.values():
            total = _plus(total, moved)
        return total

    def _finish(self, site: Site, change: Tensor | None) -> Tensor:
        if change is None:
            return self.patcher.base_score.expand(self.n, -1).clone()
        return self.patcher.scores(site, change).expand(self.n, -1)

    def _write(self, change: Tensor) -> None:
        self.stream = _plus(self.stream, change)


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of values, ``[1 or n, receivers, ...]``; one where all sets have the same weights.

    Args:
        weights: ``[n, n_values, receivers]``, bool.
        values: ``[n_values, ...]``.
    """
    if (weights == weights[:1]).all():
        weights = weights[:1]
    flat = weights.transpose(1, 2).to(values.dtype).flatten(0, 1) @ values.flatten(1)
    return flat.view(len(weights), -1, *values.shape[1:])


def _plus(total: Tensor | None, change: Tensor) -> Tensor:
    return change if total is None else total + change


def existing_edges(wiring: Wiring) -> Tensor:
    """Which pairs are edges, ``[n_sources, n_receivers]``, bool."""
    exists = torch.zeros(len(wiring.sources), len(wiring.receivers), dtype=torch.bool)
    for block in wiring.blocks():
        exists[: block.n_sources, block.receivers] = True
    return exists


def _named(target: str, port: str) -> str:
    return f"{target}:{port}" if port else target


def _missing(source: str, target: str, port: str) -> GraphError:
    return GraphError(
        f"edge {source} -> {_named(target, port)} does not exist in this model; a source reaches "
        f"what runs after it"
    )
