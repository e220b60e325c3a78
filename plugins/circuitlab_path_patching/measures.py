"""What is said of a measured effect: its score, its interval, its share of the task's effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import distinct_rows, mean_intervals

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Mode

Modes = Literal["noise", "denoise", "both"]
Row = dict[str, Any]

#: Effects this much smaller than the largest are rounding.
NEGLIGIBLE = 1e-6
#: Standard errors of the task's effect that it must exceed for shares of it to be given.
SURE = 3.0


def modes_of(mode: Modes) -> tuple[Mode, ...]:
    """The runs that a mode asks for."""
    return ("noise", "denoise") if mode == "both" else (mode,)


def sure_effect(change: Tensor) -> float | None:
    """The task's effect, mean of metric(corrupt) - metric(clean), where shares of it mean anything.

    Args:
        change: metric(corrupt) - metric(clean) of each pair, ``[n_pairs]``.

    Returns:
        None where it is 0 or within three standard errors of 0.
    """
    mean = float(change.mean())
    error = float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0
    return mean if mean and abs(mean) >= SURE * error else None


def effect_rows(
    effects: Mapping[Mode, Tensor], pairs: EncodedTask, effect: float | None, seed: int = 0
) -> list[Row]:
    """What to write of each effect.

    Args:
        effects: For each mode ``[n, n_pairs]``, metric with the corrupt value less metric with the
            clean value: negative helps.
        pairs: The task they were measured on.
        effect: The task's effect, see :func:`sure_effect`.
        seed: Of the bootstrap.

    Returns:
        ``score``, of two modes the one in which it does more; ``interval``, 95 % by bootstrap over
        distinct pairs, None for one pair. With two modes also ``noise_effect`` and
        ``denoise_effect``, and where ``effect`` is given, ``noise`` and ``denoise``: shares of the
        task's effect that noising the component loses and denoising it restores.
    """
    distinct = distinct_rows(pairs)
    means = {mode: values.mean(1).tolist() for mode, values in effects.items()}
    bounds = {mode: mean_intervals(v[:, distinct], seed) for mode, v in effects.items()}
    rows: list[Row] = []
    for number in range(len(next(iter(means.values())))):
        mode = max(means, key=lambda mode: abs(means[mode][number]))
        interval = bounds[mode][number]
        row: Row = {
            "score": means[mode][number],
            "interval": None if interval is None else list(interval),
        }
        if len(means) > 1:
            row |= {f"{mode}_effect": mean[number] for mode, mean in means.items()}
        if effect is not None:
            row |= {mode: mean[number] / effect for mode, mean in means.items()}
        rows.append(row)
    return rows


def strongest(
    scores: Sequence[float],
    names: Sequence[Any],
    top: int | Literal["all"],
    threshold: float | None,
) -> list[int]:
    """Numbers of what to keep, by absolute score, ties by name; with ``top`` no rounding errors."""
    order = sorted(range(len(scores)), key=lambda n: (-abs(scores[n]), names[n]))
    if threshold is not None:
        order = [number for number in order if abs(scores[number]) >= threshold]
    if top == "all" or not order:
        return order
    least = NEGLIGIBLE * abs(scores[order[0]])
    return [number for number in order if abs(scores[number]) > least][:top]


def effect_text(row: Mapping[str, Any]) -> str:
    """A score for people, with its interval."""
    text, interval = f"{row['score']:+.3g}", row["interval"]
    return text if interval is None else f"{text} (95 %: {interval[0]:+.3g} to {interval[1]:+.3g})"


def stronger(effects: Mapping[Mode, Tensor]) -> Tensor:
    """Mean effect in the mode in which it is larger, ``[n]``."""
    means = torch.stack([values.mean(1) for values in effects.values()])
    return means.gather(0, means.abs().argmax(0, keepdim=True))[0]
