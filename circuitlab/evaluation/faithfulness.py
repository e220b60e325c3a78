"""Faithfulness: the share of the model's behaviour that a circuit keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from circuitlab.bootstrap import RESAMPLES, Interval, bca_mean, bca_ratio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """How much of the metric a circuit keeps, on some pairs.

    Attributes:
        value: (m(C) - m(empty)) / (m(M) - m(empty)), each m a mean over pairs; 1 = all of it.
            None where there is nothing to divide by.
        interval: 95 % over pairs, BCa bootstrap; None for a single pair, and where all resamples
            give the same.
        metric: m(C), mean metric of the circuit, in the metric's unit.
        whole: m(M), of the model.
        empty: m(empty), of the empty circuit.
        n_pairs: Number of pairs.
        reason: Why ``value`` or ``interval`` is None; empty otherwise.
    """

    value: float | None
    interval: Interval | None
    metric: float
    whole: float
    empty: float
    n_pairs: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        found = asdict(self)
        found["interval"] = None if self.interval is None else list(self.interval)
        return found


def faithfulness(
    kept: Tensor,
    whole: Tensor,
    empty: Tensor,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Faithfulness:
    """Faithfulness of one circuit, a ratio of means over pairs.

    Defined as in MIB (Mueller et al. 2025, arXiv:2504.13151): 0 for the empty circuit, 1 for the
    model; it may be larger than 1 or negative. Pairs that occur twice count twice.

    Args:
        kept: Metric of the circuit for each pair, ``[n_pairs]``.
        whole: Of the model, on the same pairs.
        empty: Of the empty circuit.
        seed: Of the resamples.
        resamples: How many are drawn; pairs are drawn whole.

    Returns:
        No value where the 95 % interval of m(M) - m(empty) holds 0: a ratio to that says nothing.
    """
    above, below = (part.double().cpu() - empty.double().cpu() for part in (kept, whole))
    means: dict[str, Any] = {
        "metric": float(kept.double().mean()),
        "whole": float(whole.double().mean()),
        "empty": float(empty.double().mean()),
        "n_pairs": len(kept),
    }
    effect = float(below.mean())
    around = bca_mean(below, seed=seed, resamples=resamples)
    low, high = around or (effect, effect)
    if low <= 0 <= high:
        reason = (
            f"the model's metric less that of the empty circuit is {effect:.3g} "
            f"[{low:.3g}, {high:.3g}], which may be 0"
        )
        return Faithfulness(value=None, interval=None, reason=reason, **means)
    interval = bca_ratio(above, below, seed=seed, resamples=resamples)
    reason = ""
    if interval is None:
        reason = "one pair has no interval" if len(kept) < 2 else "all pairs give the same share"
    return Faithfulness(
        value=float(above.mean()) / effect, interval=interval, reason=reason, **means
    )
