"""What ``injection-scan`` says and shows: findings in words, and panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from circuitlab import Curve, Curves

if TYPE_CHECKING:
    from circuitlab import CircuitGraph
    from circuitlab_activation_plateaus.steering.circuits import Scan

#: Curves that one panel shows, and components that a finding names.
SHOWN = 6
#: How far lines drawn for comparison may leave what was measured, as a share of its range.
_ROOM = 0.15

_AXIS = {"stream": "coefficient, mean norms of the stream", "raw": "coefficient"}
_LOGITS = "logit difference, mean over prompts"


def findings(scan: Scan, circuit: CircuitGraph) -> dict[str, str]:
    """What the terminal says: one line for each label."""
    data = circuit.graph["scan"]
    x, total = data["coefficients"], data["total"]["mean"]
    base = f"{data['prompts']} prompt"
    own = data["baselines"][base]["mean"]
    share = data["length"] / data["stream_norm"]
    n = len(data["largest_change_by_control"])
    most = max(data["largest_change_by_control"])
    largest = max(abs(value - own) for value in total)
    said = {
        "direction": (
            f"{data['direction']} at {data['site']}, {data['positions']} positions of the "
            f"{data['prompts']} prompts; coefficient 1 has norm {data['length']:.3g}, "
            f"{share:.2g} of the stream's"
        ),
        "logit difference": ", ".join(
            f"{label} {found['mean']:+.3g}" for label, found in data["baselines"].items()
        ),
        "steered": f"{total[0]:+.3g} at {x[0]:g}, {total[-1]:+.3g} at {x[-1]:g}" + _flips(data),
        "random vectors": (
            f"{n} of that length change it by {most:.3g} at most, the direction by {largest:.3g}"
        ),
        "slope at 0": ", ".join(
            f"{name} {value:+.3g}"
            for name, value in (
                ("measured", data["slopes"].get("measured")),
                ("by gradient", data["slopes"]["gradient"]),
                ("straight to the logits", data["slopes"]["direct"]),
            )
            if value is not None
        ),
    }
    for number, shape, names in _groups(scan, circuit):
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        said[f"group {number}"] = f"{shape}: {', '.join(names[:SHOWN])}{more}"
    said["exactness"] = (
        f"components sum to the logit difference to {data['gap']:.1g} at every coefficient"
    )
    return said


def add_panels(scan: Scan, circuit: CircuitGraph) -> None:
    """Add the plots; the circuit has the curves already."""
    data = circuit.graph["scan"]
    x, label = data["coefficients"], _AXIS[data["unit"]]
    Curves(
        title="Steering",
        caption=(
            "The same length along the direction and along random ones, and prompts without "
            "steering. Straight lines: slope at 0 by gradient, and v · W, the part of it that goes "
            "straight to the logits."
        ),
        x=x,
        x_label=label,
        y_label=_LOGITS,
        curves=_totals(data),
    ).add_to(circuit)
    for number, shape, names in _groups(scan, circuit):
        told = f", the {SHOWN} largest of {len(names)}" if len(names) > SHOWN else ""
        Curves(
            title=f"Group {number}: {shape}",
            caption=f"Each component's part in the logit difference{told}.",
            x=x,
            x_label=label,
            y_label="part in the logit difference, mean over prompts",
            curves=[Curve(name=name, **data["components"][name]) for name in names[:SHOWN]],
        ).add_to(circuit)
    neurons = [name for name in data["components"] if ".n" in name]
    if neurons:
        Curves(
            title=f"Neurons of {neurons[0].partition('.')[0]}",
            caption="Each neuron's part in the logit difference, largest change first.",
            x=x,
            x_label=label,
            y_label="part in the logit difference, mean over prompts",
            curves=[Curve(name=name, **data["components"][name]) for name in neurons[:SHOWN]],
        ).add_to(circuit)


def _groups(scan: Scan, circuit: CircuitGraph) -> list[tuple[int, str, list[str]]]:
    """Number, shape and members, strongest first, of each group that has some in the circuit."""
    found = []
    for number, shape in enumerate(scan.clusters.names, 1):
        names = [
            source
            for source, target, port, _ in circuit.effects()
            if circuit.edges[source, target, port].get("group") == number
        ]
        if names:
            found.append((number, shape, names))
    return found


def _totals(data: dict[str, Any]) -> list[Curve]:
    """The steered curve, and what it is compared with."""
    x = data["coefficients"]
    curves = [
        Curve(name="steered", **data["total"]),
        Curve(name="random vectors", **data["control"]),
    ]
    for label, found in data["baselines"].items():
        curves.append(Curve(name=label, mean=[found["mean"]] * len(x)))
    known = [value for curve in curves for value in curve.mean if value is not None]
    low, high = min(known), max(known)
    room = _ROOM * (high - low)
    own = data["baselines"][f"{data['prompts']} prompt"]["mean"]
    for name, key in (("gradient at 0", "gradient"), ("v · W", "direct")):
        line = [own + data["slopes"][key] * value for value in x]
        curves.append(Curve(name=name, mean=_within(line, low - room, high + room)))
    return [curve for curve in curves if any(value is not None for value in curve.mean)]


def _within(line: Sequence[float], low: float, high: float) -> list[float | None]:
    return [value if low <= value <= high else None for value in line]


def _flips(data: dict[str, Any]) -> str:
    return f"; 0 at {data['flips']:.2g}" if "flips" in data else ""
