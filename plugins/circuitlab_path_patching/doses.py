"""Dose–response: how a component's effect grows with the share of its other value patched in.

Activation patching with a continuous injection coefficient α: a component writes
base + α (other - base). α = 0 is the base run, α = 1 an ordinary patch; beyond them the change is
extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import OptionError, check_cut, distinct_rows, mean_intervals
from circuitlab_path_patching.effects import (
    Setting,
    Top,
    measure,
    total_circuit,
)
from circuitlab_path_patching.measures import NEGLIGIBLE
from circuitlab_path_patching.panels import add_panels
from circuitlab_path_patching.patches import Patch, at_positions, node_patches

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Ablation, CircuitGraph, Mode, Task, TracedModel
    from circuitlab_path_patching.measures import Modes

#: A curve is linear where the area between it and its chord is at most this; 0.5 is the most that a
#: rising curve can have.
LINEAR = 0.05
#: Share of the full effect that a curve may lose again on its way and still have a threshold.
BACKWARDS = 0.1
#: Nodes that the result table names.
SHOWN = 5


@dataclass(frozen=True)
class Response:
    """What is said of a curve of effects over α; only 0 to 1 counts, but for ``steepest``.

    Attributes:
        slope: d effect / d α at 0: the difference quotient of the first step above 0.
        steepest: The slope of the steepest step of the whole curve. The mean slope from 0 to 1 is
            the full effect, so ``steepest`` / full effect says how sudden the curve is.
        threshold: α at which half of the full effect is reached, interpolated; None where the curve
            goes back by more than :data:`BACKWARDS` of the full effect, or there is none.
        shape: By the area between the curve, as a share of the full effect, and its chord:
            ``linear`` where it is at most :data:`LINEAR`; ``threshold`` where the curve first stays
            below the chord, ``saturating`` where it is above; ``mixed`` where it goes back, or
            rises, rests and rises again; ``none`` where nothing happens.
    """

    slope: float
    steepest: float
    threshold: float | None
    shape: str


def response(alphas: Sequence[float], effects: Sequence[float], least: float = 0.0) -> Response:
    """Describe one curve.

    Args:
        alphas: Rising, with 0 and 1 among them.
        effects: The effect at each.
        least: Effects up to this size are rounding.
    """
    steps = [(b - a) / (y - x) for (x, y), (a, b) in _steps(alphas, effects)]
    start, end = alphas.index(0.0), alphas.index(1.0) + 1
    full, steepest = effects[end - 1], max(steps, key=abs)
    inside = effects[start:end]
    if abs(full) <= least:
        shape = "none" if max(map(abs, inside)) <= least else "mixed"
        return Response(steps[start], steepest, None, shape)
    doses, shares = alphas[start:end], [effect / full for effect in inside]
    if sum(max(a - b, 0.0) for a, b in pairwise(shares)) > BACKWARDS:
        return Response(steps[start], steepest, None, "mixed")
    return Response(steps[start], steepest, _half(doses, shares), _shape(doses, shares))


def dose_response(
    model: TracedModel,
    task: Task,
    *,
    mode: Modes = "both",
    ablation: Ablation = "counterfactual",
    senders: str | None = None,
    positions: bool = False,
    low: float = 0.0,
    high: float = 1.0,
    steps: int = 11,
    top: Top = 12,
    batch_size: int | None = None,
) -> CircuitGraph:
    """Patch each component by degrees and describe the curve of its effect.

    Args:
        model: Any traced model.
        task: The task.
        mode: The runs that are patched; see :func:`circuitlab.patchers`.
        ablation: What the other value is in mode ``noise``.
        senders: Components, in the path language; None is all.
        positions: Whether each position is patched alone.
        low: Smallest α; below 0 a component is pushed away from its other value.
        high: Largest α.
        steps: Number of α from ``low`` to ``high``; 0 and 1 are added where they are not among
            them.
        top: How many components to keep, by the absolute effect at α = 1.
        batch_size: Pairs per batch; None chooses by memory.

    Returns:
        Effects of ``kind`` ``total`` on ``logits``: ``score`` is the effect at α = 1; ``slope``,
        ``steepest``, ``threshold`` and ``shape`` (see :class:`Response`) are those of the mode of
        the score, ``dose_mode``. ``graph["doses"]`` has ``alphas`` and ``curves``, strongest first,
        one for each mode: ``mean`` effect in units of the metric, negative = helps, and the ends
        ``lo`` and ``hi`` of its interval, 95 % by bootstrap over distinct pairs; of a single pair
        both are the mean.

    Raises:
        OptionError: a component does not exist, the range is empty or has no dose between 0 and
            1, or the ablation does not go with the mode.
        TaskError: positions of clean and corrupt prompts do not correspond.
        NumericsError: an activation is not finite; a smaller range may help.
    """
    check_cut(top, None)
    alphas = _alphas(low, high, steps)
    pairs = model.encode(task)
    setting = Setting(model, pairs, mode, ablation, batch_size, torch.initial_seed())
    patches = node_patches(model, senders)
    if positions:
        patches = [one for patch in patches for one in at_positions(patch, pairs)]
    effects = _swept(setting, patches, alphas)
    full = {each: values[:, alphas.index(1.0)] for each, values in effects.items()}
    circuit, kept = total_circuit(setting, patches, top, None, full)
    rows = {patch.name: row for row, patch in enumerate(patches)}
    means = {each: values.mean(-1) for each, values in effects.items()}
    least = NEGLIGIBLE * max(float(values.abs().max()) for values in means.values())
    curves = []
    for name in (patch.name for patch in kept):
        found = {m: response(alphas, v[rows[name]].tolist(), least) for m, v in means.items()}
        most = max(full, key=lambda each: abs(float(means[each][rows[name], alphas.index(1.0)])))
        said = vars(found[most]) | {"dose_mode": most}
        circuit.nodes[name].update(said)
        circuit.edges[name, "logits", ""].update(said)
        for each, values in effects.items():
            title = name if len(effects) == 1 else f"{name} {each}"
            curve = _curve(values[rows[name]], distinct_rows(pairs), setting.seed)
            curves.append({"name": title, "node": name, "mode": each, **curve, **vars(found[each])})
    circuit.graph |= {
        "method": (
            f"exact patching of {len(patches):,} nodes at {len(alphas)} doses from {alphas[0]:g} "
            f"to {alphas[-1]:g}, {' and '.join(setting.modes)}"
        ),
        "doses": {"alphas": alphas, "curves": curves, "what": f"effect on {task.metric}"},
        "findings": {curve["name"]: _said(curve, alphas) for curve in curves[:SHOWN]},
    }
    add_panels(circuit, task.metric)
    return circuit


def _alphas(low: float, high: float, steps: int) -> list[float]:
    if steps < 2:
        raise OptionError(f"--steps {steps} makes no curve; give 2 or more")
    if not low < high:
        raise OptionError(f"--low {low:g} --high {high:g}: no dose lies between; give low < high")
    # 0.1 + 0.2 is to be 0.3, and the 0 and 1 of a grid are to be those that are added.
    grid = {round(low + (high - low) * step / (steps - 1), 9) + 0.0 for step in range(steps)}
    if not any(0 < alpha < 1 for alpha in grid):
        raise OptionError(
            f"--low {low:g} --high {high:g} --steps {steps}: no dose lies between 0 and 1, where "
            f"the curve's shape is read; give more --steps, or a range that includes some"
        )
    return sorted(grid | {0.0, 1.0})


def _swept(
    setting: Setting, patches: Sequence[Patch], alphas: Sequence[float]
) -> dict[Mode, Tensor]:
    """Effects ``[n_patches, n_alphas, n_pairs]`` in each mode; at 0 there is nothing to measure."""
    doses = [number for number, alpha in enumerate(alphas) if alpha]
    swept = [_dosed(patch, alphas[number]) for patch in patches for number in doses]
    effects: dict[Mode, Tensor] = {}
    for mode, found in measure(setting, swept).items():
        effects[mode] = found.new_zeros(len(patches), len(alphas), found.shape[1])
        effects[mode][:, doses] = found.view(len(patches), len(doses), -1)
    return effects


def _dosed(patch: Patch, alpha: float) -> Patch:
    return Patch(patch.name, patch.site, lambda patcher: alpha * patch.change(patcher), patch.data)


def _curve(values: Tensor, distinct: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Means of ``[n_alphas, n_pairs]`` and the ends of their intervals."""
    means = values.mean(-1).tolist()
    bounds = mean_intervals(values[:, list(distinct)], seed)
    ends = [bound or (mean, mean) for bound, mean in zip(bounds, means, strict=True)]
    return {"mean": means, "lo": [low for low, _ in ends], "hi": [high for _, high in ends]}


def _said(curve: dict[str, Any], alphas: Sequence[float]) -> str:
    full, threshold = curve["mean"][alphas.index(1.0)], curve["threshold"]
    half = "" if threshold is None else f", half of it at α = {threshold:.2g}"
    slopes = f"slope {curve['slope']:+.3g} at 0, steepest {curve['steepest']:+.3g}"
    return f"{full:+.3g}, {curve['shape']}{half}; {slopes}"


def _steps(
    doses: Sequence[float], values: Sequence[float]
) -> zip[tuple[tuple[float, float], tuple[float, float]]]:
    return zip(pairwise(doses), pairwise(values), strict=True)


def _half(doses: Sequence[float], shares: Sequence[float]) -> float | None:
    """Where a curve from 0 to 1 first reaches a half."""
    for (x, y), (a, b) in _steps(doses, shares):
        if a < 0.5 <= b:
            return x + (y - x) * (0.5 - a) / (b - a)
    return None


def _shape(doses: Sequence[float], shares: Sequence[float]) -> str:
    above = below = 0.0
    apart = [share - dose for dose, share in zip(doses, shares, strict=True)]
    for (x, y), (a, b) in _steps(doses, apart):
        # Where the sign changes inside a step, a triangle lies on each side.
        size = abs(a) + abs(b)
        for value in (a, b):
            part = 0.5 * (y - x) * (value if a * b >= 0 else value * abs(value) / size)
            above, below = above + max(part, 0.0), below + max(-part, 0.0)
    if above + below <= LINEAR:
        return "linear"
    if below <= LINEAR / 2:
        return "saturating"
    late_first = apart.index(min(apart)) < apart.index(max(apart))
    return "threshold" if above <= LINEAR / 2 or late_first else "mixed"
