"""Scores of every edge on each pair by itself, whose mean are the analysis's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from circuitlab import Ablator, OptionError, choose_batch_size, track
from circuitlab_edge_attribution.attribution import Scorer, check_path, path_points

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Ablation, EncodedTask, Run, TracedModel
    from circuitlab_edge_attribution.attribution import Method, Rule


def pair_scores(
    model: TracedModel,
    pairs: EncodedTask,
    *,
    method: Method = "eap-ig",
    ig_steps: int = 5,
    ig_rule: Rule = "midpoint",
    ablation: Ablation = "counterfactual",
    fall_back: Literal["none", "exact"] = "none",
    batch_size: int | Literal["auto"] | None = None,
    **ignored: object,
) -> Tensor:
    """What ``edge-attribution`` makes of each pair.

    Args:
        model: Any traced model.
        pairs: The encoded task; the mean of ablation ``mean`` is taken over all of it.
        method: As the analysis's.
        ig_steps: As the analysis's.
        ig_rule: As the analysis's.
        ablation: As the analysis's.
        fall_back: Only ``none``: what is patched instead depends on all pairs.
        batch_size: Pairs per pass; ``auto`` or None chooses by memory.
        **ignored: Options of the analysis that scores do not depend on.

    Returns:
        ``[n_pairs, n_sources, n_receivers]``, float32, on the CPU; negative helps.

    Raises:
        OptionError: an option that the analysis refuses, or ``fall_back`` is ``exact``.
        NumericsError: an activation or gradient is not finite.
    """
    if fall_back != "none":
        raise OptionError(
            f"--fall-back {fall_back} patches edges by what all pairs say, so no pair has scores "
            f"of its own; use --fall-back none, or find the circuit again on other pairs"
        )
    asked = None if batch_size == "auto" else batch_size
    check_path(model, method, ig_steps, ig_rule, asked)
    size = choose_batch_size(model, pairs, asked)
    adaptive = method == "eap-ig" and ig_rule == "adaptive"
    scorer = (Scorer if adaptive else _PairScorer)(
        model,
        Ablator(model, pairs, ablation, size),
        path_points(method, ig_steps, ig_rule),
        adaptive,
    )
    shape = scorer.total.shape
    found = []
    # Points that adaptive adds belong to one pair each, so it takes one at a time.
    for batch in track(list(pairs.batches(1 if adaptive else size)), "attributing, pair by pair"):
        scorer.total = torch.zeros(shape if adaptive else (len(batch), *shape), dtype=torch.float64)
        scorer.add(batch)
        found.append(scorer.total.float().view(len(batch), *shape))
    return torch.cat(found)


class _PairScorer(Scorer):
    """Scores that are not summed over pairs."""

    def _scores(self, runs: list[Run], difference: Tensor) -> Tensor:
        """``[batch, n_sources, n_receivers]``; positions are summed over."""
        seen = difference.transpose(0, 1).flatten(2)
        scores = seen.new_zeros(len(seen), *self.total.shape[-2:])
        for block, gradient in self.model.receiver_gradients(*runs):
            felt = gradient.transpose(0, 1).flatten(2)
            scores[:, : block.n_sources, block.receivers] = seen[
                :, : block.n_sources
            ] @ felt.transpose(1, 2)
        return scores.double().cpu()
