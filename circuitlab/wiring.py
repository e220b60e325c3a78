"""The residual graph of a transformer: which components can write to which receivers.

Sources are ``input`` (token plus position embedding), heads ``a{layer}.h{head}`` and MLPs
``m{layer}``, in the order they run. Receivers are the q, k and v port of each head, the input of
each MLP, and ``logits``. A source reaches every receiver that runs after it, through the residual
stream. Names and counts are those of EAP-IG and MIB (Hanna et al. 2024, arXiv:2403.17806): GPT-2
small has 157 sources, 445 receivers and 32,491 edges.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from circuitlab.errors import GraphError

PORTS: tuple[Literal["q"], Literal["k"], Literal["v"]] = ("q", "k", "v")

_HEAD = re.compile(r"a(\d+)\.h(\d+)")
_MLP = re.compile(r"m(\d+)")


class Receiver(NamedTuple):
    """A component and the port it reads through; ``port`` is ``""`` for MLPs and logits."""

    component: str
    port: str


class Edge(NamedTuple):
    """A source, the component that reads it, and the port it reads through."""

    source: str
    target: str
    port: str = ""


class Component(NamedTuple):
    """What a component's name says: ``kind`` input, head, mlp or logits; its layer and head."""

    kind: str
    layer: int
    head: int | None = None


class ReceiverBlock(NamedTuple):
    """Receivers that read the same sources: one layer's attention, one MLP, or the logits."""

    kind: str
    layer: int
    receivers: slice
    n_sources: int


@dataclass(frozen=True)
class Wiring:
    """Sources, receivers and edges of a decoder with ``n_layers`` blocks of ``n_heads`` heads.

    With ``parallel`` (GPT-NeoX) the MLP reads what the attention of its own block reads; else it
    also reads that block's heads.
    """

    n_layers: int
    n_heads: int
    parallel: bool = False

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of all components that write to the residual stream, in forward order."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return tuple(names)

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """All (component, port) that read the stream: per layer q, k, v heads, then the MLP."""
        receivers = []
        for layer in range(self.n_layers):
            receivers += [
                Receiver(f"a{layer}.h{head}", port)
                for port in PORTS
                for head in range(self.n_heads)
            ]
            receivers.append(Receiver(f"m{layer}", ""))
        return (*receivers, Receiver("logits", ""))

    @cached_property
    def source_rows(self) -> dict[str, int]:
        """Index of each source in ``sources``."""
        return {source: row for row, source in enumerate(self.sources)}

    @cached_property
    def receiver_columns(self) -> dict[Receiver, int]:
        """Index of each receiver in ``receivers``."""
        return {receiver: column for column, receiver in enumerate(self.receivers)}

    def first_source(self, layer: int) -> int:
        """Index of the first source of a layer, which is the number of sources before it."""
        return 1 + layer * (self.n_heads + 1)

    def blocks(self) -> Iterator[ReceiverBlock]:
        """Receivers grouped by what they can read, in forward order.

        The sources a block reads are always ``sources[:block.n_sources]``.
        """
        width = 3 * self.n_heads + 1
        for layer in range(self.n_layers):
            start, before = layer * width, self.first_source(layer)
            yield ReceiverBlock("attention", layer, slice(start, start + width - 1), before)
            heard = before if self.parallel else before + self.n_heads
            yield ReceiverBlock("mlp", layer, slice(start + width - 1, start + width), heard)
        last = self.n_layers * width
        yield ReceiverBlock("logits", self.n_layers, slice(last, last + 1), len(self.sources))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by receiver and then by source, both in forward order."""
        return tuple(
            Edge(source, *receiver)
            for block in self.blocks()
            for receiver in self.receivers[block.receivers]
            for source in self.sources[: block.n_sources]
        )

    def by_block(self, edges: Sequence[Edge]) -> list[tuple[ReceiverBlock, list[int]]]:
        """Rows of the edges into each block, blocks in forward order, the same sources together.

        Raises:
            GraphError: an edge does not exist in the model.
        """
        blocks = list(self.blocks())
        owner = [n for n, b in enumerate(blocks) for _ in self.receivers[b.receivers]]
        found: dict[int, list[int]] = defaultdict(list)
        for row, edge in enumerate(edges):
            column = self.receiver_columns.get(Receiver(edge.target, edge.port))
            source = self.source_rows.get(edge.source)
            if column is None or source is None or source >= blocks[owner[column]].n_sources:
                raise GraphError(
                    f"edge {edge.source} -> {edge.target}{':' + edge.port if edge.port else ''} "
                    f"does not exist in this model; a source reaches what runs after it, heads "
                    f"through q, k or v"
                )
            found[owner[column]].append(row)

        def place(row: int) -> tuple[int, str]:
            return self.source_rows[edges[row].source], edges[row].port

        return [(blocks[n], sorted(rows, key=place)) for n, rows in sorted(found.items())]

    @property
    def n_edges(self) -> int:
        """Number of edges, counting q, k and v separately."""
        return sum((b.receivers.stop - b.receivers.start) * b.n_sources for b in self.blocks())

    def component(self, name: str) -> Component:
        """Read a component's name.

        Raises:
            GraphError: the name is not one of this wiring's components.
        """
        if name == "input":
            return Component("input", 0)
        if name == "logits":
            return Component("logits", self.n_layers)
        if match := _HEAD.fullmatch(name):
            layer, head = int(match[1]), int(match[2])
            if layer < self.n_layers and head < self.n_heads:
                return Component("head", layer, head)
        elif match := _MLP.fullmatch(name):
            layer = int(match[1])
            if layer < self.n_layers:
                return Component("mlp", layer)
        raise GraphError(
            f"component {name!r} does not exist in a model of {self.n_layers} layers and "
            f"{self.n_heads} heads; components are input, a0.h0 … "
            f"a{self.n_layers - 1}.h{self.n_heads - 1}, m0 … m{self.n_layers - 1}, logits"
        )
