"""Answers: what heads write more when they read something else than in the base run.

Norms, projections and attention are recomputed, by the model's own modules. A head's z does not
depend on what other heads read, so one row of a pass serves every head that reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab.sites import Site
from circuitlab.wiring import PORTS, Edge
from circuitlab.writes import HeadWrites

if TYPE_CHECKING:
    from circuitlab.patcher import Patcher
    from circuitlab.run import Run


class HeadAnswers:
    """The heads of a patcher's base run.

    Args:
        patcher: Has the base run and the sources' differences.
        run: Begins rows of changed runs at a layer: ``Patcher._run``.
    """

    def __init__(self, patcher: Patcher, run: Callable[..., Run]) -> None:
        self._patcher, self._run = patcher, run
        self._model, self._base = patcher.model, patcher.base
        self.writes = HeadWrites(patcher.model, patcher.base)

    def z(self, layer: int, change: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`circuitlab.Patcher.attention`."""
        begun = [(heads, self._begin(layer, own)) for heads, own in self._apart(layer, change)]
        if len(begun) == 1:
            return begun[0][1]()
        parts = [(heads, moved()) for heads, moved in begun]
        z = torch.empty_like(parts[0][1])
        for heads, moved in parts:
            z[..., heads, :] = moved[..., heads, :]
        return z

    def to_edges(self, layer: int, edges: Sequence[Edge], positions: slice) -> Callable[[], Tensor]:
        """What is added to the stream more when a head reads a patched edge, one edge a row.

        The pass is begun; the function gives what it gave, ``[edges, batch, positions, d_model]``.
        """
        rows: dict[str, dict[str, int]] = {port: {} for port in PORTS}
        for edge in edges:
            rows[edge.port].setdefault(edge.source, len(rows[edge.port]))
        n = sum(map(len, rows.values()))
        base: dict[str, Tensor] = {port: self._base[Site(port, layer)] for port in PORTS}
        written: dict[str, Tensor] = {
            p: v.expand(n, *v.shape).clone() for p, v in base.items() if rows[p]
        }
        wiring, first, total = self._model.wiring, {}, 0
        for port, sources in rows.items():
            if sources:
                first[port] = total
                changed = self._patcher.difference[[wiring.source_rows[s] for s in sources]]
                part = slice(total, total + len(sources))
                written[port][part] = self._projected(layer, port, changed)
                total += len(sources)
        for port in PORTS:
            written.setdefault(port, base[port].expand(n, *base[port].shape))
        moved = self._from_ports(layer, written)

        def answers() -> Tensor:
            heads = [wiring.component(edge.target).head for edge in edges]
            chosen = [first[e.port] + rows[e.port][e.source] for e in edges]
            own = moved()[:, :, positions][chosen, :, :, heads]
            found = torch.bmm(own.flatten(1, 2), self._model.weights.heads(layer, "o")[heads])
            return self.writes.answer(layer, found.view(*own.shape[:3], -1))

        return answers

    def _apart(
        self, layer: int, change: Mapping[str, Tensor]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The passes that heads with streams of their own need, each with the heads it is for.

        Heads that share a key and value cannot have two of them in one pass. Nor can heads that
        share a norm of queries or keys: each reads through the norm of what it reads alone.
        """
        n_heads, attention = self._model.n_heads, self._model.attention
        own = {port for port, value in change.items() if value.ndim == 5}
        if any(attention.joint(layer, port) for port in own):
            for head in range(n_heads):
                yield [head], {p: v[:, head] if p in own else v for p, v in change.items()}
            return
        shared = own - {"q"}
        group = n_heads // self._model.architecture.n_heads_of("k") if shared else 1
        for first in range(group):
            part = {p: v[:, first::group] if p in shared else v for p, v in change.items()}
            yield list(range(first, n_heads, group)), part

    def _begin(self, layer: int, change: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        """Change of z when the heads read something else, one pass."""
        n = max(map(len, change.values()))
        written: dict[str, Tensor] = {
            port: self._projected(layer, port, change[port])
            if port in change
            else self._base[Site(port, layer)][None]
            for port in PORTS
        }
        spread = {port: value.expand(n, -1, -1, -1, -1) for port, value in written.items()}
        return self._from_ports(layer, spread)

    def _projected(self, layer: int, port: str, change: Tensor) -> Tensor:
        """q, k or v ``[n, batch, pos, n_heads, d_head]`` of the base stream plus ``change``."""
        stream = self._base[Site("resid_pre", layer)] + change
        return self._model.weights.projected(Site(port, layer), stream, per_head=change.ndim == 5)

    def _from_ports(self, layer: int, ports: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        """Change of z when the ports hold these values, ``[n, batch, pos, n_heads, d_head]``.

        The pass is begun; the function gives what it gave.
        """
        site = Site("z", layer)
        write = {Site(port, layer): value for port, value in ports.items()}
        run = self._run(layer, write, read=[site])
        z = self._base[site]
        return lambda: run[site].view(-1, *z.shape) - z
