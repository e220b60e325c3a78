"""Exact effects of single edges: patch one, recompute everything after it, read the metric."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from random import Random

import torch
from torch import Tensor

from circuitlab.ablation import Ablation
from circuitlab.checkpoint import Checkpoint
from circuitlab.memory import (
    as_planned,
    choose_batch_size,
    patches_at_once,
    patches_together,
)
from circuitlab.model import TracedModel
from circuitlab.patcher import Mode, patchers
from circuitlab.progress import track
from circuitlab.prompts import EncodedTask
from circuitlab.wiring import Edge

#: Patches that share two round trips on a host.
PER_ROUND = 256


def edge_effects(
    model: TracedModel,
    pairs: EncodedTask,
    edges: Sequence[Edge],
    *,
    mode: Mode = "noise",
    ablation: Ablation = "counterfactual",
    batch_size: int | None = None,
    stage: str | None = None,
) -> Tensor:
    """Exact effect of each edge alone, per pair.

    Only the receiver reads the source's other output: its norm is recomputed, everything after it
    is recomputed, other readers of the source are untouched.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        edges: Edges of ``model.wiring``.
        mode: ``noise`` patches ablated outputs into the clean run, ``denoise`` clean outputs into
            the corrupt run.
        ablation: What an ablated source writes.
        batch_size: Pairs per pass; None chooses by memory.
        stage: Name of the :class:`Checkpoint` that an interrupted run goes on from, and whose parts
            shards share; None for none.

    Returns:
        ``[n_edges, n_pairs]``, float64; negative helps. In mode ``noise`` metric(edge patched) -
        metric(clean), in mode ``denoise`` metric(corrupt) - metric(edge patched): in both the
        metric with the edge's corrupt value less that with its clean value. In a shard of a run,
        inside :func:`sharded`, NaN for edges of other shards.

    Raises:
        GraphError: an edge does not exist in the model.
        OptionError: mode ``denoise`` with another ablation than ``counterfactual``.
        TaskError: positions of clean and corrupt prompts do not correspond.
        NumericsError: an activation is not finite.
    """
    sign = 1 if mode == "noise" else -1
    size = choose_batch_size(model, pairs, batch_size)
    batches = patchers(model, pairs, mode=mode, ablation=ablation, batch_size=size)
    with as_planned():  # so that shards share the same parts, whatever memory they have
        planned = min(choose_batch_size(model, pairs, batch_size), len(pairs))
        step = patches_together(patches_at_once(model, planned, pairs.clean.ids.shape[1]))
    # On a host parts share round trips, whatever their receivers.
    step = max(step, PER_ROUND) if model.remote else step
    blocks = [list(range(len(edges)))] if model.remote else _by_block(model, edges)
    parts = [rows[i : i + step] for rows in blocks for i in range(0, len(rows), step)]
    # Early layers take longest. In any order that mixes them, the time left can be told.
    Random(0).shuffle(parts)  # noqa: S311  # no secret
    # What is not a number is yet to be measured.
    effects = torch.full((len(edges), len(pairs)), torch.nan, dtype=torch.float64)
    with Checkpoint(stage) if stage else nullcontext() as saved:
        if saved is not None:
            parts = saved.share(parts)
            if (state := saved.load()) is not None:
                effects = state["effects"]
        columns = [slice(i, i + size) for i in range(0, len(pairs), size)]
        left = [[rows for rows in parts if effects[rows, c].isnan().any()] for c in columns]
        n_left, n_all = sum(map(len, left)), len(parts) * len(columns)
        work = (
            (c, p, rows) for c, p, some in zip(columns, batches, left, strict=True) for rows in some
        )
        title = f"patching {len(edges):,} edges, {mode}"
        for column, patcher, rows in track(work, title, total=n_all, done=n_all - n_left):
            scores = patcher.edges([edges[row] for row in rows])
            effects[rows, column] = sign * (scores - patcher.base_score).cpu()
            if saved is not None:
                saved.keep({"effects": effects})
    return effects


def _by_block(model: TracedModel, edges: Sequence[Edge]) -> list[list[int]]:
    """Rows of edges that read at the same place."""
    return [rows for _, rows in model.wiring.by_block(edges)]
