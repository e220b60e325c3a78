"""What an ablated component writes instead: its output on the corrupt prompt, zero, or its mean."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from circuitlab.errors import TaskError
from circuitlab.model import TracedModel
from circuitlab.prompts import EncodedTask
from circuitlab.run import Run
from circuitlab.sites import Site

Ablation = Literal["counterfactual", "zero", "mean"]


class Ablator:
    """Runs a task's pairs clean and ablated.

    Args:
        model: Any traced model.
        pairs: The whole encoded task; the mean is taken over it.
        ablation: ``counterfactual``: the source's output on the corrupt prompt. ``zero``. ``mean``:
            its mean over all clean prompts and real positions, one vector per source.
        batch_size: Pairs per pass when taking the mean.

    Raises:
        TaskError: the ablation is counterfactual and the prompts of a pair are not aligned.
    """

    def __init__(
        self, model: TracedModel, pairs: EncodedTask, ablation: Ablation, batch_size: int
    ) -> None:
        if ablation == "counterfactual" and not pairs.aligned:
            raise TaskError(
                f"task {pairs.task.name!r}: clean and corrupt prompts of different length were "
                f"padded, so their positions do not correspond, and outputs cannot be swapped "
                f"position by position; use --align drop, or --ablation zero or mean"
            )
        self.model = model
        self.ablation = ablation
        self._mean = _mean_outputs(model, pairs, batch_size) if ablation == "mean" else None

    def difference(self, batch: EncodedTask, clean: Run) -> tuple[Tensor, Run | None]:
        """Each source's ablated output less its clean one, and the run the former comes from.

        Args:
            batch: The pairs.
            clean: Their clean run, which read ``model.source_sites``.

        Returns:
            ``[n_sources, batch, pos, d_model]``, 0 where padded; the corrupt run, or None where the
            ablation has no run of its own.
        """
        model = self.model
        if self.ablation == "counterfactual":
            corrupt = model.run(batch.corrupt, read=model.source_sites)
            return model.source_outputs(corrupt, less=clean), corrupt
        difference = model.source_outputs(clean).neg_()
        if self._mean is not None:
            mask = clean.mask[None, :, :, None]
            difference += self._mean.to(difference.dtype)[:, None, None] * mask
        return difference, None

    def logits(self, batch: EncodedTask, embedding: Tensor, run: Run | None) -> Tensor:
        """Last logits ``[batch, vocab]`` when only ``input`` is ablated and all else recomputed.

        With counterfactual ablation that is the corrupt run; else one that begins with the ablated
        ``embedding``, ``[batch, pos, d_model]``.
        """
        if run is None:
            run = self.model.run(batch.clean, write={Site("resid_pre", 0): embedding})
        return run.logits[:, -1]


def _mean_outputs(model: TracedModel, pairs: EncodedTask, batch_size: int) -> Tensor:
    """Mean of each source over clean prompts and real positions, ``[n_sources, d_model]``."""
    total = torch.zeros(1, model.d_model, dtype=torch.float64)
    count = 0
    for batch in pairs.batches(batch_size):
        outputs = model.source_outputs(model.run(batch.clean, read=model.source_sites))
        total = total + outputs.double().sum((1, 2)).cpu()
        count += int(batch.clean.mask.sum())
    return (total / count).to(model.device)
