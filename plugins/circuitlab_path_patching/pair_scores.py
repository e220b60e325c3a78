"""Exact effects of every edge on each pair by itself, whose mean are the analysis's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from circuitlab import OptionError, edge_effects
from circuitlab_path_patching.effects import chosen_edges
from circuitlab_path_patching.measures import modes_of

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Ablation, EncodedTask, TracedModel
    from circuitlab_path_patching.measures import Modes


def pair_scores(
    model: TracedModel,
    pairs: EncodedTask,
    *,
    scope: str = "edges",
    mode: Modes = "both",
    ablation: Ablation = "counterfactual",
    senders: str | None = None,
    receivers: str | None = None,
    batch_size: int | Literal["auto"] | None = None,
    **ignored: object,
) -> Tensor:
    """What ``path-patching --scope edges`` measures on each pair.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        scope: Only ``edges``.
        mode: ``noise``, ``denoise``, or ``both``: each edge in the mode in which its mean over all
            pairs is larger.
        ablation: What an ablated source writes.
        senders: As the analysis's.
        receivers: As the analysis's.
        batch_size: Pairs per pass; ``auto`` or None chooses by memory.
        **ignored: Options of the analysis that scores do not depend on.

    Returns:
        ``[n_pairs, n_sources, n_receivers]``, float32, on the CPU; negative helps; 0 for edges that
        were not asked for.

    Raises:
        OptionError: another scope, or a sender or receiver does not exist.
        TaskError: positions of clean and corrupt prompts do not correspond.
    """
    if scope != "edges":
        raise OptionError(
            f"--scope {scope} patches no single edges, so no edge has a score; use --scope edges"
        )
    wiring = model.wiring
    edges = chosen_edges(model, senders, receivers)
    effects = torch.stack(
        [
            edge_effects(
                model, pairs, edges, mode=one, ablation=ablation,
                batch_size=None if batch_size == "auto" else batch_size,
            )
            for one in modes_of(mode)
        ]
    )  # fmt: skip
    stronger = effects.mean(2).abs().argmax(0)
    columns = {tuple(receiver): n for n, receiver in enumerate(wiring.receivers)}
    rows = torch.tensor([wiring.source_rows[edge.source] for edge in edges])
    places = torch.tensor([columns[edge.target, edge.port] for edge in edges])
    found = torch.zeros(len(pairs), len(wiring.sources), len(wiring.receivers))
    found[:, rows, places] = effects[stronger, torch.arange(len(edges))].T.float()
    return found
