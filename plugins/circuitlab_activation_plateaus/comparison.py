"""Comparison: how sharp a model's curves are, beside the path itself and untrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Curve, Curves, TaskError, TextTable
from circuitlab_activation_plateaus.walks.bundle import Bundle, bands, on_grid
from circuitlab_activation_plateaus.walks.medians import difference_of_medians, median_interval
from circuitlab_activation_plateaus.walks.summaries import excess

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Interval

#: What is told of every bundle, and its name for people.
QUANTITIES = {
    "width": "width, 10 to 90 %",
    "max_slope": "max slope",
    "excess": "excess sharpness",
    "location": "location of the half",
    "participation": "participation ratio",
    "boundaries": "boundaries",
    "flat_start": "flat at A",
    "flat_end": "flat at B",
    "deviation": "deviation from monotone",
}
#: Deviations from monotone above this are of outputs that go forth and back: several regions.
MULTIPLE = 0.1
#: Numbers below this are none.
ROUNDING = 1e-9
#: Points of the mean curves.
GRID = 51

Ends = tuple[float, float]


@dataclass(frozen=True)
class Quantity:
    """A number of a model's curves: medians over pairs, with 95 % intervals.

    Attributes:
        name: One of :data:`QUANTITIES`.
        value: Of the model.
        interval: None for a single pair.
        reference: Of the same distance at the site; None for what has no reference.
        control: Of the untrained models, the median over these first for each pair; None without.
        control_interval: Of it.
        difference: ``value`` less ``control``.
        difference_interval: Pairs are drawn for both at once.
    """

    name: str
    value: float
    interval: Interval | None
    reference: float | None = None
    control: float | None = None
    control_interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None

    @property
    def told(self) -> str:
        """The quantity in a line."""
        text = number(self.value, self.interval)
        if self.reference is not None:
            text += f"; at the site {self.reference:.3g}"
        if self.control is None or self.difference is None:
            return text
        return (
            f"{text}; re-initialised {number(self.control, self.control_interval)}; difference "
            f"{number(self.difference, self.difference_interval, '+')}"
        )


def common(bundles: Sequence[Bundle]) -> list[Bundle]:
    """The bundles on the pairs that all of them have.

    Raises:
        TaskError: there is none.
    """
    shared = [row for row in bundles[0].rows if all(row in other.rows for other in bundles[1:])]
    if not shared:
        raise TaskError(
            "no pair has different outputs in the model and in its controls; give other --pairs, "
            "or --controls 0"
        )
    return [bundle.of(shared) for bundle in bundles]


def compare(model: Bundle, controls: Sequence[Bundle], seed: int = 0) -> list[Quantity]:
    """All quantities of a model, and of untrained models on the same pairs.

    Args:
        model: Its curves.
        controls: Those of the untrained models, on the same rows; none for no comparison.
        seed: Of the bootstrap.
    """
    return [_quantity(name, model, controls, seed) for name in QUANTITIES]


def _quantity(name: str, model: Bundle, controls: Sequence[Bundle], seed: int) -> Quantity:
    own = values(model, name)
    reference = None if name == "excess" else middle(_clear(getattr(model.inside, name)))
    told = partial(Quantity, name, middle(own), median_interval(own, seed), reference)
    if not controls:
        return told()
    other = torch.stack([values(control, name) for control in controls]).quantile(0.5, dim=0)
    difference, interval = difference_of_medians(own, other, seed, paired=True)
    return told(middle(other), median_interval(other, seed), difference, interval)


def values(bundle: Bundle, name: str) -> Tensor:
    """A quantity of each pair, ``[n_rows]``, float64."""
    found = excess(bundle.out, bundle.inside) if name == "excess" else getattr(bundle.out, name)
    return _clear(found)


def _clear(numbers: Tensor) -> Tensor:
    """Without rounding, float64."""
    return torch.where(numbers.abs() < ROUNDING, 0.0, numbers.double()).cpu()


def middle(numbers: Tensor) -> float:
    """The median, between the two middle numbers where there is no single one."""
    return float(numbers.double().quantile(0.5))


def number(value: float, interval: Ends | None, sign: str = "") -> str:
    """``0.52 [0.48, 0.55]``."""
    text = f"{value:{sign}.3g}"
    return text if interval is None else f"{text} [{interval[0]:.3g}, {interval[1]:.3g}]"


def findings(quantities: Sequence[Quantity], bundle: Bundle) -> dict[str, str]:
    """The lines that are shown first."""
    by_name = {quantity.name: quantity for quantity in quantities}
    several = int((bundle.out.boundaries > 1).sum())
    one = int((bundle.out.boundaries == 1).sum())
    back = int((bundle.out.deviation > MULTIPLE).sum())
    n = len(bundle.rows)
    return {
        "median width": by_name["width"].told,
        "median max slope": by_name["max_slope"].told,
        "boundaries": (
            f"one in {one} of {n} pairs, more in {several}, none in {n - one - several}; "
            f"forth and back in {back}"
        ),
    }


def plain(quantities: Sequence[Quantity]) -> list[dict[str, Any]]:
    """The quantities as plain JSON, without what was not measured."""
    return [
        {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(quantity).items()
            if value is not None
        }
        for quantity in quantities
    ]


def add_panels(
    circuit: CircuitGraph,
    model: Bundle,
    controls: Sequence[Bundle],
    quantities: Sequence[Quantity],
    *,
    response: str,
    title: str,
    seed: int = 0,
) -> None:
    """Add the curves, beside the path itself and the untrained models, and the table of numbers.

    Args:
        circuit: Where to.
        model: The model's curves.
        controls: Those of untrained models.
        quantities: What :func:`compare` gave.
        response: Name of what the curves are.
        title: Of the curves.
        seed: Of the bootstrap.
    """
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    curves = [
        _curve("logits", [model], "response", grid, seed),
        _curve("the site itself", [model], "reference", grid, seed),
    ]
    if controls:
        curves.insert(1, _curve("re-initialised", controls, "response", grid, seed))
    Curves(
        title=title,
        caption=(
            f"Mean of {len(model.rows)} pairs; band: 95 % interval over pairs. Where the logits "
            f"follow the site itself, nothing was sharpened."
        ),
        x=grid.tolist(),
        x_label="t, from A to B",
        y_label=LABELS[response],
        curves=curves,
    ).add_to(circuit)
    _table(quantities, controls=bool(controls)).add_to(circuit)


#: What each response is, for people.
LABELS = {
    "d-sym": "share of the way from A to B (d_sym)",
    "d-rel": "distance from A / distance of A and B (d_rel)",
    "kl": "KL from A, nats; the site: d_rel",
    "jsd": "Jensen-Shannon divergence from A, nats; the site: d_rel",
}


def _curve(name: str, bundles: Sequence[Bundle], what: str, grid: Tensor, seed: int) -> Curve:
    """Mean over pairs, of several models the mean over these first."""
    found = [on_grid(bundle.t, getattr(bundle, what), grid.to(bundle.t)) for bundle in bundles]
    mean, lo, hi = bands(torch.stack(found).mean(0), seed)
    return Curve(name=name, mean=mean, lo=lo, hi=hi)


def _table(quantities: Sequence[Quantity], *, controls: bool) -> TextTable:
    header = ["median over pairs", "logits", "the site itself"]
    rows: list[list[str | float]] = []
    for quantity in quantities:
        label = QUANTITIES[quantity.name]
        row: list[str | float] = [label, number(quantity.value, quantity.interval)]
        row.append("" if quantity.reference is None else f"{quantity.reference:.3g}")
        if quantity.control is not None and quantity.difference is not None:
            row.append(number(quantity.control, quantity.control_interval))
            row.append(number(quantity.difference, quantity.difference_interval, "+"))
        rows.append(row)
    return TextTable(
        title="How sharp: the numbers of the curves",
        caption=(
            "In brackets: 95 % interval over pairs. A straight line has width 0.8, slope 1 and "
            "participation 1."
        ),
        header=[*header, "re-initialised", "difference"] if controls else header,
        rows=rows,
    )
