"""CircuitRuns: the metric of many circuits on one set of pairs, all else patched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import get_args

import torch
from torch import Tensor

from circuitlab.ablation import Ablation
from circuitlab.edge_sets import check_masks, edge_masks, existing_edges
from circuitlab.errors import ModelError, OptionError, QualityError, SiteError
from circuitlab.evaluation.circuit_walk import CircuitWalk
from circuitlab.evaluation.kept import Level
from circuitlab.model import TracedModel
from circuitlab.patcher import Patcher, patchers
from circuitlab.prompts import EncodedTask
from circuitlab.run import Run
from circuitlab.sites import Site
from circuitlab.wiring import Edge

#: A circuit: edges, or at level node names of components.
Circuit = Collection[Edge] | Collection[str]

#: Bytes of the runs of all batches that are held from one call to the next.
HELD = 2 * 2**30
#: How far the metric of two ways to run one circuit may be apart, in roundings of the model's
#: type, as a share of the largest metric; and never more than this share.
ROUNDINGS = 8192
LARGEST = 0.25


class CircuitRuns:
    """The metric of many circuits on one set of pairs: everything outside each is patched.

    A circuit is run on the clean prompts. What it keeps carries what its source writes once
    everything before it is recomputed; every other edge of the model carries what its source
    writes when ablated. At level ``edge`` a circuit is a set of edges, at level ``node`` a set of
    components: it keeps all edges out of these.

    Args:
        model: A traced model.
        pairs: The encoded task.
        ablation: What a patched edge carries: its source's output on the corrupt prompt
            (``counterfactual``), ``zero``, or its ``mean`` over all clean prompts. With ``zero``, a
            norm that reads next to nothing blows up rounding; the more so in narrow types.
        level: What circuits are sets of.
        batch_size: Pairs per batch; None chooses by memory.

    Attributes:
        model: The model.
        pairs: The pairs.
        ablation: As given.
        level: As given.
        whole: Metric of the model, ``[n_pairs]``, float64.
        empty: Metric of the circuit that keeps nothing, ``[n_pairs]``, float64.
        checks: Of ``whole`` and of ``empty`` the largest ``difference`` over pairs between the
            circuit as run here and a run of its own without circuits, and its ``tolerance``, both
            in the metric's unit.

    Raises:
        OptionError: there is no such ablation or level.
        ModelError: only the blocks of the model are known, so it has no edges.
        TaskError: positions of clean and corrupt prompts do not correspond.
        QualityError: a difference in ``checks`` is above its tolerance.
    """

    def __init__(
        self,
        model: TracedModel,
        pairs: EncodedTask,
        *,
        ablation: Ablation = "counterfactual",
        level: Level = "edge",
        batch_size: int | None = None,
    ) -> None:
        for name, value, known in (
            ("ablation", ablation, get_args(Ablation)),
            ("level", level, get_args(Level)),
        ):
            if value not in known:
                raise OptionError(f"{name} {value!r} does not exist; use {' or '.join(known)}")
        if model.architecture.blocks_only:
            raise ModelError(
                f"model {model.name!r}: no plugin describes family {model.architecture.family!r}, "
                f"so its heads and MLPs are not known and no circuit of them can be run; register "
                f"an adapt_architecture hook for it"
            )
        self.model, self.pairs = model, pairs
        self.ablation, self.level = ablation, level
        self._batch_size = batch_size
        self._held: list[CircuitWalk] | None = None
        self._exists = existing_edges(model.wiring)
        self.whole, self.empty, self.checks = self._ends()

    def metric(self, circuits: Sequence[Circuit] | Tensor) -> Tensor:
        """The metric of each circuit on each pair, ``[n_circuits, n_pairs]``, float64.

        Args:
            circuits: What each keeps: edges, at level ``node`` names of components; or masks, bool
                ``[n_circuits, n_sources, n_receivers]``, at level ``node`` ``[n_circuits,
                n_sources]``, in the order of ``model.wiring``.

        Raises:
            GraphError: an edge or component does not exist in the model.
            SiteError: the masks have another type or shape.
            NumericsError: an activation is not finite.
        """
        kept = self._masks(circuits)
        return self._of_each(lambda walk: walk.scores(kept))

    def _ends(self) -> tuple[Tensor, Tensor, dict[str, dict[str, float]]]:
        """Metric of the whole and of the empty circuit, and how sure they are."""
        both = torch.stack([self._exists, torch.zeros_like(self._exists)])
        ways = self._of_each(
            lambda walk: torch.stack(
                [*walk.scores(both), walk.patcher.base_score, self._all_ablated(walk)]
            )
        )
        largest = max(1.0, float(ways.abs().max()))
        eps = torch.finfo(self.model.dtype).eps
        tolerance = min(ROUNDINGS * eps, LARGEST) * largest
        checks = {}
        for name, found, known in zip(("whole", "empty"), ways[:2], ways[2:], strict=True):
            difference = float((found - known).abs().max())
            checks[name] = {"difference": difference, "tolerance": tolerance}
            if not difference <= tolerance:
                raise QualityError(
                    f"model {self.model.name!r}: the metric of the {name} circuit is off by "
                    f"{difference:.3g} where at most {tolerance:.3g} is rounding, so its circuits "
                    f"cannot be trusted; try a wider type (--dtype float64) or report it"
                )
        return ways[2], ways[1], checks

    def _all_ablated(self, walk: CircuitWalk) -> Tensor:
        """The metric ``[batch]`` of a run without circuits in which every source is ablated."""
        patcher = walk.patcher
        if self.ablation == "counterfactual":
            return patcher.other_score
        run = walk.ablated or _averaged(patcher)
        clean = self.model.run(patcher.pairs.clean)
        return patcher.pairs.score(run.logits[:, -1], clean.logits[:, -1]).double()

    def _of_each(self, work: Callable[[CircuitWalk], Tensor]) -> Tensor:
        """What ``work`` gives ``[n, batch]`` of each batch, side by side on the CPU."""
        if self._held is not None:
            return torch.cat([work(walk).cpu() for walk in self._held], 1)
        held, found, size = [], [], 0
        for patcher in patchers(
            self.model, self.pairs, ablation=self.ablation, batch_size=self._batch_size
        ):
            walk = CircuitWalk(patcher, self.ablation)
            found.append(work(walk).cpu())
            size += patcher.difference.nbytes
            if size <= HELD:
                held.append(walk)
        if size <= HELD:
            self._held = held
        return torch.cat(found, 1)

    def _masks(self, circuits: Sequence[Circuit] | Tensor) -> Tensor:
        """What each circuit keeps, ``[n_circuits, n_sources, n_receivers]``, bool, on the CPU."""
        wiring = self.model.wiring
        if self.level == "edge":
            if not isinstance(circuits, Tensor):
                return edge_masks(wiring, [[Edge(*edge) for edge in c] for c in circuits])
            check_masks(wiring, circuits)
            return circuits.cpu()
        if isinstance(circuits, Tensor):
            if circuits.dtype != torch.bool or circuits.shape[1:] != (len(wiring.sources),):
                raise SiteError(
                    f"masks of components have type {circuits.dtype} and shape "
                    f"{list(circuits.shape)}; give bool and [n_circuits, n_sources], here "
                    f"[n_circuits, {len(wiring.sources)}]"
                )
            nodes = circuits.cpu()
        else:
            nodes = torch.zeros(len(circuits), len(wiring.sources), dtype=torch.bool)
            for number, names in enumerate(circuits):
                for name in names:
                    if wiring.component(str(name)).kind != "logits":
                        nodes[number, wiring.source_rows[str(name)]] = True
        return nodes[:, :, None] & self._exists


def _averaged(patcher: Patcher) -> Run:
    """The clean prompts with embedding, attentions and MLPs overwritten by what is ablated."""
    model, base, change = patcher.model, patcher.base, patcher.difference
    write = {Site("resid_pre", 0): base[Site("resid_pre", 0)] + change[0]}
    for layer in range(model.n_layers):
        first = model.wiring.first_source(layer)
        last = first + model.n_heads
        for kind, moved in (("attn_out", change[first:last].sum(0)), ("mlp_out", change[last])):
            write[Site(kind, layer)] = base[Site(kind, layer)] + moved
    return model.run(patcher.pairs.clean, write=write)
