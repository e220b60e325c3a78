"""Path trees: the metric when sets of paths are patched, and only what lies on them is recomputed.

A set of paths with a common end is read backwards, as a tree: what the end reads through each port,
what those components read, and so on to where the paths begin. A component at the beginning of a
path writes its other output; one inside reads the base stream plus what comes along the paths, and
its answer is recomputed; all else is the base run. This is the treeified model of Goldowsky-Dill
et al. 2023 (arXiv:2304.05969).

Equal branches are one node, so paths share their beginnings and the cost is the number of different
nodes. Nodes of one layer are rows of one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from circuitlab import Edge, GraphError, Site, Wiring

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Patcher, TracedModel
    from circuitlab_path_patching.paths.language import Path

#: Bytes that the changed outputs of one chunk of paths may take.
KEPT_MEMORY = 128 * 2**20

Item = TypeVar("Item")
Inputs = tuple[tuple[str, tuple[int, ...]], ...]
_Branch = tuple[tuple[str, str], ...]


class _Node(NamedTuple):
    """A component and, for each port, the nodes whose change it reads; none where paths begin."""

    component: str
    inputs: Inputs


class PathTrees:
    """Sets of paths, each patched together; all are scored at once.

    Attributes:
        nodes: The different nodes, each after those that it reads.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.nodes: list[_Node] = []
        self._roots: list[int] = []
        self._numbers: dict[_Node, int] = {}
        self._built: dict[frozenset[_Branch], int] = {}

    def add(self, paths: Collection[Path]) -> None:
        """Add a set of paths that have one end.

        Of two paths of which one is the end of the other, the shorter says more: it patches all
        that comes to its beginning. No path at all is the base run.

        Raises:
            GraphError: a path does not run forward in the model, or two have different ends.
        """
        ends = {path.nodes[-1][0] for path in paths}
        if len(ends) > 1:
            first, second = sorted(ends)[:2]
            raise GraphError(
                f"paths to {first} and to {second} cannot be patched as one set; "
                f"give a set for each end"
            )
        for path in paths:
            _check(path, self.wiring)
        branches = frozenset(path.nodes for path in paths)
        self._roots.append(self._build(branches) if paths else self._number(_Node("logits", ())))

    def scores(self, patcher: Patcher) -> Tensor:
        """The metric with each set patched, ``[n_sets, batch]``, float64.

        Where the paths end at another component than ``logits``, its output changes and everything
        after it is recomputed, as when an edge is patched.

        Raises:
            NumericsError: an activation is not finite.
        """
        return _Evaluation(self, patcher).scores(self._roots)

    def _build(self, branches: frozenset[_Branch]) -> int:
        """The node to which these paths come; all of them end at one component."""
        if branches in self._built:
            return self._built[branches]
        component = next(iter(branches))[-1][0]
        inputs: list[tuple[str, tuple[int, ...]]] = []
        if all(len(branch) > 1 for branch in branches):
            heard: dict[str, dict[str, set[_Branch]]] = {}
            for *before, (_, ports) in branches:
                for port in ports or ("",):
                    sources = heard.setdefault(port, {})
                    sources.setdefault(before[-1][0], set()).add(tuple(before))
            for port in sorted(heard):
                # By name: sets have no order, and sums and numbers must not depend on theirs.
                found = sorted(heard[port].items())
                inputs.append((port, tuple(self._build(frozenset(part)) for _, part in found)))
        number = self._built[branches] = self._number(_Node(component, tuple(inputs)))
        return number

    def _number(self, node: _Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]


def chunks(
    wiring: Wiring, sets: Sequence[Collection[Path]], n_nodes: int
) -> Iterator[tuple[PathTrees, slice]]:
    """Trees of consecutive sets, each of about ``n_nodes`` nodes or of one set.

    Raises:
        GraphError: see :meth:`PathTrees.add`.
    """
    trees, first = PathTrees(wiring), 0
    for number, paths in enumerate(sets, 1):
        trees.add(paths)
        if len(trees.nodes) >= n_nodes or number == len(sets):
            yield trees, slice(first, number)
            trees, first = PathTrees(wiring), number


def row_bytes(model: TracedModel, n_pairs: int, n_positions: int) -> int:
    """Bytes of one changed output of ``n_pairs`` prompts."""
    return n_pairs * n_positions * model.d_model * model.dtype.itemsize


def _check(path: Path, wiring: Wiring) -> None:
    if len(path.nodes) < 2:
        raise GraphError(f"path {str(path)!r} has no step; a path has two components or more")
    for (source, _), (target, ports) in zip(path.nodes, path.nodes[1:], strict=False):
        for port in ports or ("",):
            if Edge(source, target, port) not in edge_set(wiring):
                raise GraphError(
                    f"path {str(path)!r}: edge {source} -> {target}{':' + port if port else ''} "
                    f"does not exist in this model; a source reaches what runs after it, heads "
                    f"through q, k or v"
                )


@lru_cache(maxsize=4)
def edge_set(wiring: Wiring) -> frozenset[Edge]:
    """The wiring's edges, to look one up."""
    return frozenset(wiring.edges)


class _Evaluation:
    """Walks the model forward, block by block.

    Attributes:
        moved: Change of each node's output.
        ended: Change of the whole attention's output, of nodes where it is another.
        roots: Nodes at which paths end.
    """

    def __init__(self, trees: PathTrees, patcher: Patcher) -> None:
        self.nodes, self.wiring, self.patcher = trees.nodes, trees.wiring, patcher
        self.moved: dict[int, Tensor] = {}
        self.ended: dict[int, Tensor] = {}
        self.roots: set[int] = set()
        self.size = patcher.at_once

    def scores(self, roots: Sequence[int]) -> Tensor:
        self.roots = set(roots)
        blocks: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, node in enumerate(self.nodes):
            kind, layer, _ = self.wiring.component(node.component)
            if node.inputs:
                blocks[kind, layer].append(number)
            elif kind != "logits":
                row = self.wiring.source_rows[node.component]
                self.moved[number] = self.patcher.difference[row]
        for block in self.wiring.blocks():
            if block.kind == "attention":
                self._attention(block.layer, blocks["head", block.layer])
            elif block.kind == "mlp":
                self._mlp(block.layer, blocks["mlp", block.layer])
        found = self._scores(self.roots)
        return torch.stack([found[root] for root in roots])

    def _attention(self, layer: int, numbers: Sequence[int]) -> None:
        """Heads that read the same are one row: a head's answer does not depend on other heads."""
        readers: dict[Inputs, list[int]] = defaultdict(list)
        for number in numbers:
            readers[self.nodes[number].inputs].append(number)
        by_ports: dict[str, list[Inputs]] = defaultdict(list)
        for inputs in readers:
            by_ports["".join(port for port, _ in inputs)].append(inputs)
        for ports, rows in by_ports.items():
            for part in self._parts(rows):
                change = {
                    port: self._streams([inputs[place][1] for inputs in part])
                    for place, port in enumerate(ports)
                }
                z = self.patcher.attention(layer, change)
                answers: dict[int, list[tuple[int, int]]] = defaultdict(list)
                for row, inputs in enumerate(part):
                    for number in readers[inputs]:
                        head = self.wiring.component(self.nodes[number].component).head
                        assert head is not None
                        answers[head].append((row, number))
                for head, found in answers.items():
                    own = z[[row for row, _ in found], :, :, head]
                    written = self.patcher.head_output(layer, head, own)
                    numbers = [number for _, number in found]
                    self.moved.update(zip(numbers, written, strict=True))
                    self._end_at_head(layer, head, dict(zip(numbers, own, strict=True)))

    def _end_at_head(self, layer: int, head: int, z_changes: Mapping[int, Tensor]) -> None:
        """What all heads write more where paths end at one, and its change moves the others'."""
        model = self.patcher.model
        ended = {n: z for n, z in z_changes.items() if n in self.roots}
        if not ended or not model.architecture.attention_post_norm:
            return
        own = torch.stack(list(ended.values()))
        z = own.new_zeros(*own.shape[:3], model.n_heads, model.d_head)
        z[:, :, :, head] = own
        (written,) = self.patcher.heads_output(layer, z, [range(model.n_heads)])
        self.ended.update(zip(ended, written, strict=True))

    def _mlp(self, layer: int, numbers: Sequence[int]) -> None:
        for part in self._parts(numbers):
            change = self._streams([self.nodes[number].inputs[0][1] for number in part])
            self.moved.update(zip(part, self.patcher.mlp(layer, change), strict=True))

    def _scores(self, roots: Collection[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        ends: dict[Site, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for root in sorted(roots):
            component, inputs = self.nodes[root]
            if component != "logits":
                ends[self.patcher.model.joins(component)].append((root, (root,)))
            elif inputs:
                last = Site("resid_post", self.wiring.n_layers - 1)
                ends[last].append((root, inputs[0][1]))
            else:
                found[root] = self.patcher.base_score
        for site, ended in ends.items():
            for part in self._parts(ended):
                change = torch.stack(
                    [self.ended[n] if n in self.ended else self._stream(heard) for n, heard in part]
                )
                scores = self.patcher.scores(site, change)
                found.update(zip([root for root, _ in part], scores, strict=True))
        return found

    def _streams(self, heard: Sequence[Sequence[int]]) -> Tensor:
        """``[n, batch, pos, d_model]``: for each, the sum of what these nodes write more."""
        return torch.stack([self._stream(numbers) for numbers in heard])

    def _stream(self, numbers: Sequence[int]) -> Tensor:
        stream = self.moved[numbers[0]]
        for number in numbers[1:]:
            stream = stream + self.moved[number]
        return stream

    def _parts(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        return (items[i : i + self.size] for i in range(0, len(items), self.size))
