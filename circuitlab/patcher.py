"""Patcher: patch edges, nodes or streams, recompute everything after them, read the metric.

An edge patch changes what one receiver reads. So the base run is computed once; a patched run
begins at the receiver; only the receiver's own answer is recomputed there, and what it writes is
added to the stream, from which many patches go on together as rows of one batch. Only the last
position reaches the unembedding, and only the logits that the metric looks at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from circuitlab.ablation import Ablation, Ablator
from circuitlab.answers import HeadAnswers
from circuitlab.edge_sets import score_sets
from circuitlab.errors import OptionError, SiteError
from circuitlab.memory import (
    choose_batch_size,
    keep_freed_memory,
    patches_at_once,
    patches_together,
)
from circuitlab.metrics import Answers
from circuitlab.model import TracedModel
from circuitlab.prompts import EncodedTask, Tokens
from circuitlab.run import Run
from circuitlab.sites import Site
from circuitlab.wiring import PORTS, Edge, ReceiverBlock

Mode = Literal["noise", "denoise"]


def patchers(
    model: TracedModel,
    pairs: EncodedTask,
    *,
    mode: Mode = "noise",
    ablation: Ablation = "counterfactual",
    batch_size: int | None = None,
) -> Iterator[Patcher]:
    """One :class:`Patcher` for each batch of pairs.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        mode: ``noise`` patches ablated outputs into the clean run, ``denoise`` clean outputs into
            the corrupt run.
        ablation: What an ablated source writes.
        batch_size: Pairs per batch; None chooses by memory.

    Raises:
        OptionError: mode ``denoise`` with another ablation than ``counterfactual``: there is no run
            in which every source is ablated and nothing else.
        TaskError: positions of clean and corrupt prompts do not correspond.
    """
    if mode == "denoise" and ablation != "counterfactual":
        raise OptionError(
            f"mode denoise patches clean outputs into the corrupt run, and ablation {ablation} has "
            f"no such run; use --ablation counterfactual, or --mode noise"
        )
    keep_freed_memory()
    size = choose_batch_size(model, pairs, batch_size)
    ablator = Ablator(model, pairs, ablation, size)
    return (Patcher(model, batch, ablator, mode) for batch in pairs.batches(size))


class Patcher:
    """A batch of pairs run in its base and its other state, from which components are patched.

    In mode ``noise`` the base is the clean run and patches carry ablated outputs; in mode
    ``denoise`` the base is the corrupt run and patches carry clean outputs.

    Attributes:
        model: The traced model.
        pairs: The batch.
        mode: ``noise`` or ``denoise``.
        base: The base run; it read every stream, port, source and attention output.
        difference: Each source's other output less its base output, ``[n_sources, batch, pos,
            d_model]`` in the order of ``model.wiring.sources``; 0 where padded.
        base_score: Metric of the base run, ``[batch]``, float64.
        other_score: Metric of the other run, ``[batch]``, float64.
    """

    def __init__(
        self, model: TracedModel, pairs: EncodedTask, ablator: Ablator, mode: Mode
    ) -> None:
        self.model, self.pairs, self.mode = model, pairs, mode
        self._narrow, self._vocabulary = pairs.narrowed()
        layers = range(model.n_layers)
        inside = () if model.architecture.blocks_only else (*PORTS, "attn_out")
        kinds = ("resid_pre", *inside)
        sites = [*model.source_sites, *(Site(kind, n) for n in layers for kind in kinds)]
        sites.append(Site("resid_post", model.n_layers - 1))
        base = pairs.clean if mode == "noise" else pairs.corrupt
        self.base = model.run(base, read=sites, vocabulary=self._vocabulary)
        self._answers = HeadAnswers(self, self._run)
        if mode == "noise":
            difference, other = ablator.difference(pairs, self.base)
            embedding = self.base[Site("resid_pre", 0)]
            ablated = ablator.logits(pairs, embedding + difference[0].to(embedding.dtype), other)
            ablated = ablated if self._vocabulary is None else ablated[:, self._vocabulary]
            reference = self.base.logits[:, -1]
        else:
            clean = model.run(pairs.clean, read=model.source_sites, vocabulary=self._vocabulary)
            difference = model.source_outputs(clean, less=self.base)
            reference = ablated = clean.logits[:, -1]
        self.difference = difference.to(model.dtype)
        self._reference = reference
        self.base_score = self._score(self.base.logits[:, -1])[0]
        self.other_score = self._score(ablated)[0]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def at_once(self) -> int:
        """How many patches are best run together, as rows of one batch."""
        return patches_at_once(self.model, *self.base.mask.shape)

    def out_edges(self, source: str) -> list[Edge]:
        """All edges out of a source: to patch a node is to patch all of these."""
        return self._out_edges.get(source, [])

    @cached_property
    def _out_edges(self) -> dict[str, list[Edge]]:
        out = defaultdict(list)
        for edge in self.model.wiring.edges:
            out[edge.source].append(edge)
        return dict(out)

    def stream(self, site: Site) -> Tensor:
        """The base run's residual stream at a site, ``[batch, pos, d_model]``."""
        if site.kind == "resid_mid":
            return (
                self.base[Site("resid_pre", site.layer)] + self.base[Site("attn_out", site.layer)]
            )
        if site.kind == "resid_post" and site.layer != self.model.n_layers - 1:
            assert site.layer is not None
            return self.base[Site("resid_pre", site.layer + 1)]
        return self.base[site]

    def attention(self, layer: int, change: Mapping[str, Tensor]) -> Tensor:
        """Change of a layer's head outputs when its heads read something else.

        Args:
            layer: The layer.
            change: For each port what is added to the stream that the heads read through it:
                ``[n, batch, pos, d_model]``, or ``[n, n_heads, batch, pos, d_model]`` with a stream
                for each head. Ports left out read the base; n may be 1 for some, which is then the
                same for all. Norms are recomputed.

        Returns:
            Change of z, ``[n, batch, pos, n_heads, d_head]``.
        """
        return self._answers.z(layer, change)

    def head_output(self, layer: int, head: int, z_change: Tensor) -> Tensor:
        """What one head writes more when its z changes, and that of no other head of the layer.

        Args:
            layer: The layer.
            head: The head.
            z_change: ``[..., batch, pos, d_head]``.

        Returns:
            ``[..., batch, pos, d_model]``.
        """
        return self._answers.writes.alone(layer, head, z_change)

    def heads_output(
        self, layer: int, z_change: Tensor, groups: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """What heads write more when z changes as given, all heads of the layer at once.

        Args:
            layer: The layer.
            z_change: ``[n, batch, pos, n_heads, d_head]``, as from :meth:`attention`.
            groups: Heads whose writes are summed, none of them twice.

        Returns:
            ``[n, batch, pos, d_model]`` for each group.
        """
        return self._answers.writes.groups(layer, z_change, groups)

    def mlp(self, layer: int, change: Tensor) -> Tensor:
        """Change of an MLP's output when ``change`` is added to what it reads.

        Args:
            layer: The layer.
            change: ``[n, batch, pos, d_model]``, or of the last position alone.

        Returns:
            The same shape.
        """
        site = Site("mlp_out", layer)
        run = self._run(layer, self._mlp_writes(layer, change), read=[site])
        return run[site].view(change.shape) - self.base[site][:, -change.shape[2] :]

    # --- the metric after a change ----------------------------------------------------------------

    def scores(self, site: Site, change: Tensor) -> Tensor:
        """The metric when the residual stream is changed and everything after it recomputed.

        Args:
            site: ``resid_pre``, ``resid_mid`` or ``resid_post`` of a layer.
            change: Added to the base run's stream there, ``[n, batch, pos, d_model]``.

        Returns:
            ``[n, batch]``, float64.

        Raises:
            SiteError: the site is no residual stream of this model.
            NumericsError: an activation is not finite.
        """
        layer, kind = site.layer, site.kind
        if layer is None or kind not in ("resid_pre", "resid_mid", "resid_post"):
            raise SiteError(
                f"site {site} is not the residual stream; give resid_pre, resid_mid or resid_post"
            )
        if kind != "resid_pre":
            change = change[:, :, self._wanted(layer)]
        return self._score(self._begin(site, change).logits[:, -1])

    def _begin(self, site: Site, change: Tensor) -> Run:
        """That run; ``change`` may be of the last position alone, where that is all that counts."""
        layer = site.layer
        assert layer is not None
        stream = self.stream(site)[:, -change.shape[2] :] + change
        if site.kind == "resid_mid":
            return self._run(layer, self._after_attention(layer, stream))
        if site.kind == "resid_post" and layer + 1 < self.model.n_layers:
            layer, site = layer + 1, Site("resid_pre", layer + 1)
        return self._run(layer, {site: stream})

    def _wanted(self, layer: int) -> slice:
        """Positions that count after the attention of a layer: behind the last one, the last."""
        return slice(-1 if layer >= self.model.n_layers - 1 else 0, None)

    def edges(self, edges: Sequence[Edge]) -> Tensor:
        """The metric with each edge alone patched, ``[n_edges, batch]``, float64.

        Raises:
            GraphError: an edge does not exist in the model.
            NumericsError: an activation is not finite.
        """
        scores = self.base_score.new_zeros(len(edges), len(self))
        step = patches_together(self.at_once)
        parts = [
            (block, rows[i : i + step])
            for block, rows in self.model.wiring.by_block(edges)
            for i in range(0, len(rows), step)
        ]
        # On a host all are begun before the outcome of one is looked at.
        size = max(1, len(parts)) if self.model.remote else 1
        for i in range(0, len(parts), size):
            some = parts[i : i + size]
            begun = [self._edges_into(block, [edges[row] for row in rows]) for block, rows in some]
            answered = [go_on() for go_on in begun]
            for (_, rows), finish in zip(some, answered, strict=True):
                scores[rows] = finish()
        return scores

    def _edges_into(
        self, block: ReceiverBlock, edges: Sequence[Edge]
    ) -> Callable[[], Callable[[], Tensor]]:
        """``[edges, batch]`` for edges into one block, in three steps.

        Heads have begun to answer; called, all that follows has begun; called again, the metric.
        """
        answers = None
        if block.kind == "attention":
            answers = self._answers.to_edges(block.layer, edges, self._wanted(block.layer))

        def go_on() -> Callable[[], Tensor]:
            layer, wiring = block.layer, self.model.wiring
            if answers is not None:
                change = answers()
                kind = "resid_post" if wiring.parallel else "resid_mid"
            else:
                rows = [wiring.source_rows[edge.source] for edge in edges]
                change = self.difference[:, :, self._wanted(layer)][rows]
                kind, layer = "resid_post", layer - (block.kind == "logits")
            # A single position of many patches takes less room than all positions of a few.
            size = self.at_once if change.shape[2] > 1 else len(edges)
            parts = [change[i : i + size] for i in range(0, len(edges), size)]
            if block.kind == "mlp":
                runs = [self._run(layer, self._mlp_writes(layer, part)) for part in parts]
            else:
                runs = [self._begin(Site(kind, layer), part) for part in parts]
            return lambda: torch.cat([self._score(run.logits[:, -1]) for run in runs])

        return go_on

    def sets(self, sets: Sequence[Collection[Edge]] | Tensor) -> Tensor:
        """The metric with each set of edges patched together, ``[n_sets, batch]``, float64.

        An edge of the set carries its source's other output; every other edge carries what its
        source writes once everything before it is recomputed.

        Args:
            sets: Edges; or, where there are thousands in a set, a mask of each set, bool ``[n_sets,
                n_sources, n_receivers]`` in the order of ``model.wiring``.

        Raises:
            GraphError: an edge does not exist in the model.
            SiteError: the masks have another type or shape.
            NumericsError: an activation is not finite.
        """
        return score_sets(self, sets)

    # --- passes -----------------------------------------------------------------------------------

    def _mlp_writes(self, layer: int, change: Tensor) -> dict[Site, Tensor]:
        """Writes after which only the MLP of a layer reads something else."""
        heard = self.stream(Site("resid_pre" if self.model.wiring.parallel else "resid_mid", layer))
        after = self.base[Site("resid_pre", layer)] + self.base[Site("attn_out", layer)]
        heard, after = (part[:, -change.shape[2] :] for part in (heard, after))
        write = self._after_attention(layer, after.expand_as(change))
        return {**write, Site("mlp_in", layer): heard + change}

    def _after_attention(self, layer: int, stream: Tensor) -> dict[Site, Tensor]:
        """Writes that begin a layer after its attention: the stream as it is then, and no more."""
        nothing = stream.new_zeros(1, 1, 1, 1).expand_as(stream)
        return {Site("resid_pre", layer): stream, Site("attn_out", layer): nothing}

    def _run(self, layer: int, write: Mapping[Site, Tensor], read: Sequence[Site] = ()) -> Run:
        """Rows of many patches as one batch, from the base stream of a layer on.

        Args:
            layer: Where they begin.
            write: ``[n, batch, pos, ...]`` each, all positions or the last alone.
            read: What to keep; with it there are no logits.
        """
        n = len(next(iter(write.values())))
        flat = {
            site: value[0, :1].expand(n * len(self), -1, -1)
            if site.kind == "attn_out"
            else value.flatten(0, 1)
            for site, value in write.items()
        }
        start, last = Site("resid_pre", layer), Site("resid_post", layer)
        if start not in flat and last not in flat:
            flat[start] = self.base[start].repeat(n, 1, 1)
        width = flat[start if start in flat else last].shape[1]
        tokens = self.base.tokens if width == self.base.mask.shape[1] else self._last_tokens
        return self.model.run(
            tokens.repeat(n),
            read=read,
            write=flat,
            logits="none" if read else "last",
            vocabulary=None if read else self._vocabulary,
        )

    @cached_property
    def _last_tokens(self) -> Tokens:
        tokens = self.base.tokens
        return Tokens(*(part[:, -1:] for part in (tokens.ids, tokens.mask, tokens.position_ids)))

    def _score(self, logits: Tensor) -> Tensor:
        """The metric ``[n, batch]`` of logits ``[n * batch, vocab]``."""
        answers, n = self._narrow.answers, len(logits) // len(self)
        repeated = Answers(answers.right.repeat(n, 1), answers.wrong.repeat(n, 1))
        scores = self._narrow.metric(logits, repeated, self._reference.repeat(n, 1))
        return scores.double().view(n, -1)
