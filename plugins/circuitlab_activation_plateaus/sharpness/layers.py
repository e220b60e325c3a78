"""Through the layers: how sharp and how many the jumps are at each stream along the same walk.

Whether regions split into smaller ones or only sharpen from layer to layer is read off two numbers:
how many boundaries the walk crosses, and how steep its steepest slope is. Regions and slopes are
those of Janiak et al. (2024, arXiv:2409.17113).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import Curve, Curves, Heatmap, OptionError, Site, mean_intervals
from circuitlab_activation_plateaus.comparison import middle, number
from circuitlab_activation_plateaus.sharpness.gates import rebinned
from circuitlab_activation_plateaus.walks.bundle import STREAMS
from circuitlab_activation_plateaus.walks.medians import median_interval
from circuitlab_activation_plateaus.walks.responses import apart, d_rel, d_sym, speed
from circuitlab_activation_plateaus.walks.summaries import summarise

if TYPE_CHECKING:
    from circuitlab import CircuitGraph, Interval, TracedModel
    from circuitlab_activation_plateaus.walks.walking import Walks

#: Responses that streams have as well as logits.
DISTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {"d-sym": d_sym, "d-rel": d_rel}
#: Columns of the speed map.
COLUMNS = 40
#: A change of the mean slope by a smaller share than this is none.
LEAST = 0.01
#: What a rise or fall from the first stream to the output is called, by (boundaries, slope):
#: 1 where the interval of the change is above 0, -1 where it is below, 0 where it holds 0.
VERDICTS: Mapping[tuple[int, int], str] = {
    (0, 0): "regions stay as they are",
    (0, 1): "regions sharpen",
    (0, -1): "regions blur",
    (1, 0): "regions split",
    (1, 1): "regions split and sharpen",
    (1, -1): "regions split and blur",
    (-1, 0): "regions merge",
    (-1, 1): "regions merge and sharpen",
    (-1, -1): "regions merge and blur",
}


@dataclass(frozen=True, eq=False)
class LayerTable:
    """What the walk looks like at each site, by pair; ``[n_sites, n_rows]`` each, float64.

    Attributes:
        sites: ``walked``, the walked stream itself; the sites that were read, in the order they
            run; ``logits``.
        boundaries: Peaks of the speed.
        max_slope: Steepest slope of the distance, per t.
        width: Share of the way between 0.1 and 0.9 of it.
        participation: Participation ratio of the speed.
        rows: Pairs that are in the table: all of whose sites differ between the ends, ``[n_pairs]``
            bool.
    """

    sites: tuple[str, ...]
    boundaries: Tensor
    max_slope: Tensor
    width: Tensor
    participation: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Change:
    """A number at the output less that at the first stream.

    Attributes:
        mean: Over pairs.
        interval: Of it; None for a single pair.
        least: Means no larger than this are no change.
    """

    mean: float
    interval: Interval | None
    least: float = 0.0

    @property
    def sign(self) -> int:
        """1 above 0, -1 below, 0 where the interval holds 0 or the change is too small."""
        low, high = self.interval or (self.mean, self.mean)
        if abs(self.mean) <= self.least:
            return 0
        return int(low > 0) - int(high < 0)


@dataclass(frozen=True)
class Verdict:
    """Whether regions split or sharpen between the first stream that was read and the output.

    Attributes:
        words: One of :data:`VERDICTS`.
        boundaries: Change of the number of boundaries, at least one at each site.
        max_slope: Change of the steepest slope.
        ends: The two sites that are compared.
    """

    words: str
    boundaries: Change
    max_slope: Change
    ends: tuple[str, str]


def layer_sites(model: TracedModel, site: Site) -> list[Site]:
    """The residual streams that run after a site, in order: what :func:`layer_table` is for."""
    whole = model.architecture.blocks_only or model.wiring.parallel
    kinds = ("resid_post",) if whole else ("resid_mid", "resid_post")
    sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in kinds]
    return [each for each in sites if site < each]


def find_distance(response: str) -> Callable[[Tensor], Tensor]:
    """The response of a name, for one that streams have too.

    Raises:
        OptionError: it is no distance.
    """
    if response not in DISTANCES:
        raise OptionError(
            f"--response {response!r} is none of a stream; use {' or '.join(DISTANCES)}, which "
            f"streams and logits have"
        )
    return DISTANCES[response]


def layer_table(walks: Walks, response: str = "d-sym") -> LayerTable:
    """Sharpness and boundaries of the same walks at every residual stream that was read.

    Args:
        walks: Walks that read residual streams, with logits.
        response: ``d-sym`` or ``d-rel``, the same at every site.

    Raises:
        OptionError: the response is no distance, or at some site no pair's ends differ.
    """
    distance, values = find_distance(response), _values(walks)
    rows = torch.stack([apart(value) for value in values.values()]).all(0)
    if not rows.any():
        raise OptionError(
            "at some site every pair's ends are the same, so no distance can be told; read other "
            "sites, or take other pairs"
        )
    t = walks.t[rows]
    found = []
    for value in values.values():
        at = value[rows]
        found.append(summarise(t, distance(at), speed(t, at)))
    names = ("boundaries", "max_slope", "width", "participation")
    stacked = {n: torch.stack([getattr(each, n).double().cpu() for each in found]) for n in names}
    return LayerTable(tuple(values), rows=rows, **stacked)


def _values(walks: Walks) -> dict[str, Tensor]:
    """What is compared, by site: the walked stream, residual streams, logits."""
    read = {str(s): walks.read[s] for s in sorted(walks.read) if s.kind in STREAMS}
    return {"walked": walks.points, **read, "logits": walks.logits}


def split_or_sharpen(table: LayerTable, seed: int = 0) -> Verdict | None:
    """Compare the output with the first stream after the walked one; None where none was read.

    A stream without a boundary counts as one with a single, smeared out: regions split where there
    are two boundaries or more.

    Args:
        table: Of the walks.
        seed: Of the intervals.
    """
    if len(table.sites) < 3:
        return None
    changes = []
    numbers = ((table.boundaries.clamp(min=1), 0.0), (table.max_slope, LEAST))
    for values, share in numbers:
        change = values[-1] - values[1]
        interval = mean_intervals(change[None], seed)[0]
        changes.append(Change(float(change.mean()), interval, share * float(values[1].mean())))
    boundaries, slope = changes
    words = VERDICTS[boundaries.sign, slope.sign]
    return Verdict(words, boundaries, slope, (table.sites[1], table.sites[-1]))


def add_layers(
    circuit: CircuitGraph, walks: Walks, response: str = "d-sym", seed: int = 0
) -> LayerTable:
    """Put the layers into a circuit: data, the verdict as a finding, and two panels.

    Args:
        circuit: Gets ``graph["layers"]``: a row of medians over pairs for each site, and the
            ``verdict``.
        walks: Walks that read residual streams, with logits.
        response: ``d-sym`` or ``d-rel``.
        seed: Of the intervals.

    Raises:
        OptionError: see :func:`layer_table`.
    """
    table = layer_table(walks, response)
    data: dict[str, Any] = {"response": response, "n_pairs": int(table.rows.sum())}
    data["sites"] = [_site_data(table, place, seed) for place in range(len(table.sites))]
    verdict = split_or_sharpen(table, seed)
    if verdict is not None:
        data["verdict"] = {"words": verdict.words, "from": verdict.ends[0], "to": verdict.ends[1]}
        for name, change in (("boundaries", verdict.boundaries), ("max_slope", verdict.max_slope)):
            told = {"mean": change.mean}
            interval = {} if change.interval is None else {"interval": list(change.interval)}
            data["verdict"][name] = told | interval
        circuit.graph.setdefault("findings", {})["through the layers"] = _said(verdict)
    circuit.graph["layers"] = data
    speed_map(walks, table.rows).add_to(circuit)
    _sharpness_panel(table, response, seed).add_to(circuit)
    return table


def _site_data(table: LayerTable, place: int, seed: int) -> dict[str, Any]:
    """A site's numbers: medians of slope, width and participation, mean number of boundaries."""
    data: dict[str, Any] = {"site": table.sites[place]}
    for name in ("max_slope", "width", "participation"):
        values = getattr(table, name)[place]
        data[name] = {"median": middle(values)} | _interval(median_interval(values, seed))
    counts = table.boundaries[place]
    data["boundaries"] = {"mean": float(counts.mean())}
    data["boundaries"] |= _interval(mean_intervals(counts[None], seed)[0])
    return data


def _interval(interval: Interval | None) -> dict[str, list[float]]:
    return {} if interval is None else {"interval": list(interval)}


def _said(verdict: Verdict) -> str:
    first, last = verdict.ends
    return (
        f"{verdict.words}: from {first} to {last} boundaries "
        f"{number(verdict.boundaries.mean, verdict.boundaries.interval, '+')}, steepest slope "
        f"{number(verdict.max_slope.mean, verdict.max_slope.interval, '+')}"
    )


def speed_map(walks: Walks, rows: Tensor | None = None) -> Heatmap:
    """How fast each site moves along the way, as a multiple of its mean, mean over pairs.

    Args:
        walks: Walks that read residual streams, with logits.
        rows: Pairs that count, ``[n_rows]`` bool; those that differ at every site where None.
    """
    values = _values(walks)
    if rows is None:
        rows = torch.stack([apart(value) for value in values.values()]).all(0)
    t, cells = walks.t[rows], []
    for value in reversed(values.values()):
        moved = speed(t, value[rows]) * t.diff(dim=-1)
        rates = rebinned(t, moved, COLUMNS)
        cells.append((rates / rates.mean(-1, keepdim=True)).mean(0).tolist())
    return Heatmap(
        title="Speed through the layers",
        caption="1 is even speed; a dark column is a jump. The last site is at the top.",
        rows=list(reversed(values)),
        columns=[f"{(place + 0.5) / COLUMNS:.2f}" for place in range(COLUMNS)],
        values=cells,
        what="speed over its mean",
        row_label="site",
        column_label="t, from A (0) to B (1)",
        diverging=False,
    )


def _sharpness_panel(table: LayerTable, response: str, seed: int) -> Curves:
    """Slope and boundaries over the sites, in the order they run."""
    slopes = [middle(values) for values in table.max_slope]
    counts = table.boundaries.mean(-1).tolist()
    slope_ends = [median_interval(values, seed) for values in table.max_slope]
    ends = mean_intervals(table.boundaries, seed)
    places = [float(place) for place in range(len(table.sites))]
    caption = f"0 is the walked stream, {len(places) - 1} the logits"
    if len(places) > 2:
        caption += f"; between them, in order, streams from {table.sites[1]} to {table.sites[-2]}"
    return Curves(
        title="Split or sharpen",
        caption=f"{caption}.",
        x=places,
        x_label="site",
        y_label=f"slope of {response} per t; number",
        curves=[
            _curve("steepest slope, median", slopes, slope_ends),
            _curve("boundaries, mean", counts, ends),
        ],
    )


def _curve(name: str, middle: Sequence[float], ends: Sequence[Interval | None]) -> Curve:
    known = [end for end in ends if end is not None]
    if len(known) < len(ends):
        return Curve(name=name, mean=middle)
    lo, hi = ([end[side] for end in known] for side in (0, 1))
    return Curve(name=name, mean=middle, lo=lo, hi=hi)
