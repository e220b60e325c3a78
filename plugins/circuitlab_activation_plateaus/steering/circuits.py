"""The circuit of a scan: who adds to the answer and who takes from it as a direction grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import CircuitGraph, mean_intervals
from circuitlab_activation_plateaus.steering.panels import add_panels, findings

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Interval, TracedModel
    from circuitlab_activation_plateaus.steering.injecting import Injection
    from circuitlab_activation_plateaus.steering.profiles import Clusters
    from circuitlab_activation_plateaus.steering.scanning import Settings
    from circuitlab_activation_plateaus.steering.vectors import Steering

#: Changes this much smaller than the largest are rounding.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Scan:
    """All that a scan measured.

    Attributes:
        steering: What was added.
        what: What the logit difference is, in words.
        injection: The scan.
        controls: Totals with random vectors instead, ``[n_controls, n_coefficients, n_prompts]``.
        slopes: See :func:`.steering.injecting.slopes`.
        baselines: Logit difference of prompts without steering, ``[n_prompts]``, by label.
        clusters: Shapes of the components' mean curves.
        distinct: Pairs that repeat no earlier one.
        seed: Of the intervals.
    """

    steering: Steering
    what: str
    injection: Injection
    controls: Tensor
    slopes: tuple[Tensor, Tensor]
    baselines: dict[str, Tensor]
    clusters: Clusters
    distinct: list[int]
    seed: int

    def intervals(self, values: Tensor) -> list[Interval | None]:
        """Interval of the mean of each row of ``[n, n_prompts]``."""
        return mean_intervals(values[:, self.distinct].cpu(), self.seed)

    def curve(self, values: Tensor) -> dict[str, list[float]]:
        """Means over prompts of ``[n_x, n_prompts]``, and ends of intervals where there are any."""
        told = {"mean": values.mean(-1).tolist()}
        ends = [bound for bound in self.intervals(values) if bound is not None]
        if ends:
            told |= {"lo": [low for low, _ in ends], "hi": [high for _, high in ends]}
        return told


@dataclass(frozen=True)
class _Part:
    """A component, or a neuron, of the circuit.

    Attributes:
        name: Of its node.
        curve: Its part in the logit difference, ``[n_coefficients, n_prompts]``, float64.
        ends: Rows of the smallest and largest value of its mean, the earlier one first.
        row: Its row of the scan; None for a neuron.
    """

    name: str
    curve: Tensor
    ends: tuple[int, int]
    row: int | None

    @property
    def changes(self) -> Tensor:
        """From one end to the other, ``[n_prompts]``."""
        return self.curve[self.ends[1]] - self.curve[self.ends[0]]

    @property
    def score(self) -> float:
        """Mean change over prompts."""
        return float(self.changes.mean())


def scan_circuit(model: TracedModel, scan: Scan, settings: Settings) -> CircuitGraph:
    """The circuit of a scan, with its curves, findings and panels.

    Args:
        model: The model that was steered.
        scan: What was measured.
        settings: Of the scan.

    Returns:
        Edges from components, and from the ``injection`` where it is added at the last position, to
        ``logits``. ``score``: how far the component's part in the logit difference, mean over
        prompts, moves from its smallest to its largest value or back: the one that comes at the
        larger coefficient, ``to``, less the other one, at ``from``; ``interval`` of this difference
        at these two coefficients. ``slope`` at coefficient 0 where that lies inside; ``shape`` and
        ``group`` of the curve where that is not flat. Neurons, named ``m1.n37``, are parts of their
        MLP. ``biases`` are those of attention, of the final norm and of the unembedding.

        ``graph["scan"]`` has ``coefficients`` and, over them, ``total``, ``control`` and, by name,
        ``components``, each with ``mean`` and the ends ``lo`` and ``hi`` of its interval;
        ``baselines`` by label; ``slopes`` of the total at 0: ``measured``, ``gradient`` and
        ``direct``; ``flips``, the coefficient nearest to 0 at which the mean logit difference is 0;
        ``gap``, by how much the components miss a logit difference at worst.
    """
    kept = _kept(scan, settings)
    circuit = CircuitGraph()
    for part in sorted(kept, key=lambda part: (part.row is None, part.row or 0, part.name)):
        circuit.add_component(part.name, **_node(model, scan, part.name, settings.neurons))
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    if kept:
        changes = torch.stack([part.changes for part in kept])
        for part, interval in zip(kept, scan.intervals(changes), strict=True):
            data = _edge(scan, part)
            if interval is not None:
                data["interval"] = list(interval)
            circuit.add_effect(part.name, "logits", part.score, **data)
    low, high = f"{settings.low:g}", f"{settings.high:g}"
    n_prompts = scan.injection.totals.shape[1]
    circuit.graph |= {
        "score": (
            "range of a component's part in the logit difference over the coefficients, mean over "
            "prompts; positive = largest behind smallest"
        ),
        "method": (
            f"{settings.steps} coefficients from {low} to {high}, {n_prompts} "
            f"prompt{'' if n_prompts == 1 else 's'}, taken apart exactly"
        ),
        "scan": _data(scan, settings, kept),
    }
    if scan.steering.warnings:
        circuit.graph["warnings"] = list(scan.steering.warnings)
    circuit.graph["findings"] = findings(scan, circuit)
    add_panels(scan, circuit)
    return circuit


def reached(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
    """The x nearest to 0 at which a curve, straight between its points, is ``target``."""
    found = []
    for (a, b), (p, q) in zip(pairwise(x), pairwise(y), strict=True):
        if p == q == target:
            found.append(min(max(0.0, a), b))
        elif min(p, q) <= target <= max(p, q):
            found.append(a + (b - a) * (target - p) / (q - p))
    return min(found, key=abs, default=None)


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The difference quotient over 0: of the points nearest to it on both sides; None outside."""
    below = [row for row, value in enumerate(x) if value < 0]
    above = [row for row, value in enumerate(x) if value > 0]
    centre = [row for row, value in enumerate(x) if value == 0]
    first, last = (below[-1:] or centre)[:1], (above[:1] or centre)[:1]
    if not first or not last or first == last:
        return None
    return (y[last[0]] - y[first[0]]) / (x[last[0]] - x[first[0]])


# --- nodes and edges ------------------------------------------------------------------------------


def _kept(scan: Scan, settings: Settings) -> list[_Part]:
    """Components, and neurons, of the largest change, strongest first, ties by name."""
    found = scan.injection
    curves = [*zip(found.names, found.attributions, range(len(found.names)), strict=True)]
    parts = [_part(name, curve, row) for name, curve, row in curves]
    if found.neurons is not None:
        means = found.neurons.mean(-1)
        ranges = means.amax(-1) - means.amin(-1)
        most = len(ranges) if settings.top == "all" else min(settings.top, len(ranges))
        for row in ranges.topk(most).indices.tolist():
            name = f"m{settings.neurons}.n{row}"
            parts.append(_part(name, found.neurons[row].double(), None))
    parts.sort(key=lambda part: (-abs(part.score), part.name))
    if settings.threshold is not None:
        parts = [part for part in parts if abs(part.score) >= settings.threshold]
    if settings.top == "all" or not parts:
        return parts
    least = NEGLIGIBLE * abs(parts[0].score)
    return [part for part in parts if abs(part.score) > least][: settings.top]


def _part(name: str, curve: Tensor, row: int | None) -> _Part:
    mean = curve.mean(-1)
    first, last = sorted((int(mean.argmin()), int(mean.argmax())))
    return _Part(name, curve, (first, last), row)


def _node(model: TracedModel, scan: Scan, name: str, neurons: int | None) -> dict[str, Any]:
    if name == "injection":
        return {"kind": "injection", "layer": scan.steering.site.layer}
    if name == "biases":
        return {"kind": "biases", "layer": 0}
    if name.startswith("m") and ".n" in name:
        return {"kind": "neuron", "layer": neurons, "neuron": int(name.partition(".n")[2])}
    kind, layer, head = model.wiring.component(name)
    return {"kind": kind, "layer": layer, **({} if head is None else {"head": head})}


def _edge(scan: Scan, part: _Part) -> dict[str, Any]:
    x = scan.injection.coefficients.tolist()
    data: dict[str, Any] = {"from": x[part.ends[0]], "to": x[part.ends[1]]}
    at_zero = slope(x, part.curve.mean(-1).tolist())
    if at_zero is not None:
        data["slope"] = at_zero
    group = -1 if part.row is None else scan.clusters.labels[part.row]
    if group >= 0:
        data |= {"group": group + 1, "shape": scan.clusters.names[group]}
    return data


def _data(scan: Scan, settings: Settings, kept: Sequence[_Part]) -> dict[str, Any]:
    """The scan as plain JSON."""
    found, chosen = scan.injection, scan.steering
    x, total = found.coefficients.tolist(), scan.curve(found.totals)
    gradient, direct = (float(each.mean()) for each in scan.slopes)
    own = {"measured": slope(x, total["mean"]), "gradient": gradient, "direct": direct}
    control = scan.curve(scan.controls.mean(0))
    changes = (scan.controls.mean(-1) - _unsteered(scan, settings)).abs().amax(-1)
    bounds = scan.intervals(torch.stack(list(scan.baselines.values())))
    unsteered = {
        label: {
            "mean": float(values.mean()),
            **({} if bound is None else {"interval": list(bound)}),
        }
        for (label, values), bound in zip(scan.baselines.items(), bounds, strict=True)
    }
    data: dict[str, Any] = {
        "direction": chosen.name,
        "site": str(chosen.site),
        "positions": settings.where,
        "prompts": settings.prompts,
        "unit": settings.unit,
        "length": chosen.length,
        "raw_length": chosen.raw_length,
        "stream_norm": chosen.stream_norm,
        "what": scan.what,
        "coefficients": x,
        "total": total,
        "control": control,
        "largest_change_by_control": changes.tolist(),
        "baselines": unsteered,
        "slopes": {name: value for name, value in own.items() if value is not None},
        "gap": found.gap,
        "components": {part.name: scan.curve(part.curve) for part in kept},
    }
    if (flips := reached(x, total["mean"], 0.0)) is not None:
        data["flips"] = flips
    if scan.clusters.silhouette is not None:
        data["silhouette"] = scan.clusters.silhouette
    return data


def _unsteered(scan: Scan, settings: Settings) -> float:
    return float(scan.baselines[f"{settings.prompts} prompt"].mean())
