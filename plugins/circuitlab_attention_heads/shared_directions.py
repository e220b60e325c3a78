"""Directions of the residual stream that all positions share, and that hide how heads compose.

A few directions of a trained model's stream are far longer than the rest at nearly every position.
Heads that write to them and heads that read from them compose by their weights, whatever else they
do; what is left without these directions says more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitlab import NumericsError, OptionError, Site, choose_batch_size, track

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, TracedModel

#: Of the mean squared length, what a direction holds that is there at all.
_ROUNDING = 1e-10


@torch.no_grad()
def shared_directions(
    model: TracedModel, pairs: EncodedTask, n: int, *, batch_size: int | None = None
) -> tuple[Tensor, float]:
    """The directions that hold most of the residual stream on the clean prompts.

    Principal directions, uncentred, of what every layer's heads read at every real position. Each
    such vector counts the same: its mean is taken off where norms take it off, and it is divided by
    its length, so that no position with a massive activation speaks for all.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        n: How many directions.
        batch_size: Pairs per pass; None chooses by memory.

    Returns:
        ``[n, d_model]``, orthonormal rows, on the model's device; and the share of the vectors'
        squared length that they hold, 0 to 1.

    Raises:
        OptionError: ``n`` is below 1, or the stream has not so many directions.
        NumericsError: the stream is not finite.
    """
    size = choose_batch_size(model, pairs, batch_size)
    sites = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    centred = model.weights.centres
    moment = torch.zeros(model.d_model, model.d_model, dtype=torch.float64, device=model.device)
    batches = track(
        pairs.batches(size), "reading the residual stream", total=-(-len(pairs) // size)
    )
    for batch in batches:
        run = model.run(batch.clean, read=sites, logits="none")
        for site in sites:
            stream = run[site][run.mask].double()
            if centred:
                stream = stream - stream.mean(-1, keepdim=True)
            stream = torch.nn.functional.normalize(stream, dim=-1)
            moment += stream.T @ stream
    if not bool(moment.isfinite().all()):
        raise NumericsError(
            "the residual stream of the clean prompts holds NaN or infinity; check the weights, or "
            "run in a wider type (--dtype float32)"
        )
    values, vectors = torch.linalg.eigh(moment)
    there = int((values > _ROUNDING * values.sum()).sum())
    if not 0 < n <= there:
        raise OptionError(
            f"--remove-directions {n}: on these prompts the residual stream has {there} "
            f"directions; give 1 to {there}, or more prompts"
        )
    dtype = torch.promote_types(model.dtype, torch.float32)
    return vectors[:, -n:].T.flip(0).to(dtype), float(values[-n:].sum() / values.sum())
