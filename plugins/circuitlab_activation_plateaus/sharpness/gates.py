"""Gate flips: how many gates of the MLPs change sign along a walk.

A gate is what an MLP's nonlinearity reads. The signs of all gates tell on which linear piece of a
ReLU network an input lies, and the number of flips between two points is the distance of their
spline codes (as in Shinkle and Heimersheim 2025). With a smooth nonlinearity a flip is no kink, but
still tells that a neuron goes from its closed side to its open one, or back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Curve, Curves, ModelError, Site, SiteError, Tokens, mean_intervals
from circuitlab_activation_plateaus.comparison import number
from circuitlab_activation_plateaus.walks.bundle import on_grid
from circuitlab_activation_plateaus.walks.responses import apart, d_sym, speed

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, TracedModel
    from circuitlab_activation_plateaus.walks.walking import Walks

#: Share of the largest output by which an MLP may differ from its formula.
ROUNDING = 1e-3
#: An output this far from both ends is between its plateaus.
BETWEEN = 0.1
#: Even intervals of the path that the panel shows.
INTERVALS = 40


class Mlp:
    """An MLP as a formula of the stream that its norm reads, tried against the model itself.

    Args:
        model: Any traced model.
        layer: The MLP's layer.
        dtype: Type of the weights.

    Raises:
        ModelError: the formula is not known, or gives something else than the model.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype = torch.float32) -> None:
        try:
            self._weights = model.weights.mlp(layer, dtype)
        except SiteError as error:
            raise ModelError(str(error)) from error
        self._scales, self._layer = model.weights, layer
        self._try(model, dtype)

    def scale(self, stream: Tensor) -> Tensor:
        """What the norm divides by, ``[..., 1]``."""
        return self._scales.norm_scale(self._layer, stream)

    def gates(self, stream: Tensor) -> Tensor:
        """What the nonlinearity reads, ``[..., d_mlp]``."""
        weights, normed = self._weights, stream / self.scale(stream)
        if weights.gate is None or weights.gate_bias is None:
            return normed @ weights.w_in + weights.b_in
        return normed @ weights.gate + weights.gate_bias

    def write(self, stream: Tensor, scale: Tensor) -> Tensor:
        """What the MLP writes where its norm divides by a given scale, ``[..., d_model]``."""
        return self._weights(stream / scale)

    def _try(self, model: TracedModel, dtype: torch.dtype) -> None:
        """Refuse a model whose MLP differs, as where its norm is none like the attention's."""
        generator = torch.Generator().manual_seed(0)
        stream = torch.randn(1, 2, model.d_model, generator=generator).to(model.device)
        stream[:, 1] = 30 * stream[:, 1] + 10
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        written, read = Site("mlp_out", self._layer), Site("mlp_in", self._layer)
        tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        run = model.run(tokens, read=[written], write={read: stream}, logits="none")
        stream = stream.to(model.dtype).to(dtype)
        apart = (self.write(stream, self.scale(stream)) - run[written].to(dtype)).abs().amax(-1)
        loose = ROUNDING if torch.finfo(model.dtype).bits >= 32 else 50 * ROUNDING
        if bool((apart > loose * run[written].to(dtype).abs().amax(-1)).any()):
            raise ModelError(
                f"the MLP of layer {self._layer} of {model.architecture.family} is not what its "
                f"weights and the scale of its layer's norm give, so its gates and its norm are "
                f"left out"
            )


def mlp_stream(model: TracedModel, layer: int) -> Site:
    """The stream that the norm of an MLP reads."""
    return Site("mlp_in" if model.wiring.parallel else "resid_mid", layer)


def gate_sites(model: TracedModel, site: Site) -> list[Site]:
    """What :func:`gate_flips` needs read: the streams of all MLPs that run after a site.

    None where only the blocks of the model are known.
    """
    if model.architecture.blocks_only:
        return []
    streams = [mlp_stream(model, layer) for layer in range(model.n_layers)]
    return [stream for stream in streams if site < stream]


@dataclass(frozen=True, eq=False)
class Flips:
    """Gate flips along walks.

    Attributes:
        layers: Whose MLPs.
        counts: Gates that differ in sign between two steps, ``[n_layers, n_rows, n_steps - 1]``,
            int64.
        n_gates: Gates of each layer's MLP.
        left_out: Why the gates of other layers are not known, by layer.
    """

    layers: tuple[int, ...]
    counts: Tensor
    n_gates: tuple[int, ...]
    left_out: dict[int, str]


@torch.no_grad()
def gate_flips(model: TracedModel, site: Site, walks: Walks) -> Flips:
    """Flips of the gates of every MLP whose stream was walked or read.

    Args:
        model: Any traced model.
        site: What was walked.
        walks: Walks that read :func:`gate_sites`.
    """
    streams = {**walks.read, site: walks.points}
    n_known = 0 if model.architecture.blocks_only else model.n_layers
    counts, layers, n_gates, left_out = [], [], [], {}
    for layer in range(n_known):
        stream = streams.get(mlp_stream(model, layer))
        if stream is None:
            continue
        try:
            mlp = Mlp(model, layer, stream.dtype)
        except ModelError as error:
            left_out[layer] = str(error)
            continue
        # One prompt at a time: gates are several times wider than the stream.
        rows = [_flipped(mlp.gates(row) > 0) for row in stream]
        counts.append(torch.stack(rows))
        layers.append(layer)
        n_gates.append(mlp.gates(stream[:1, :1]).shape[-1])
    shape = (0, walks.t.shape[0], walks.t.shape[1] - 1)
    stacked = torch.stack(counts) if counts else torch.zeros(shape, dtype=torch.int64)
    return Flips(tuple(layers), stacked, tuple(n_gates), left_out)


def _flipped(opened: Tensor) -> Tensor:
    """Gates ``[n_steps, d_mlp]`` that differ from the step before, ``[n_steps - 1]``."""
    return (opened[1:] != opened[:-1]).sum(-1)


def rebinned(t: Tensor, amounts: Tensor, n: int) -> Tensor:
    """Amounts of each interval as a rate on ``n`` even intervals of the same way, float64.

    What falls into an interval is spread evenly over it, so the total over the way stays.

    Args:
        t: Places, ``[n_rows, n_steps]``, rising from 0 to 1.
        amounts: ``[n_rows, n_steps - 1]``, such as flips, or speed times interval.
        n: Number of even intervals.

    Returns:
        Per unit of t, ``[n_rows, n]``.
    """
    total = torch.nn.functional.pad(amounts.double().cumsum(-1), (1, 0))
    grid = torch.linspace(0, 1, n + 1, dtype=torch.float64, device=t.device)
    return on_grid(t.double(), total, grid).diff(dim=-1) * n


def add_gates(circuit: CircuitGraph, walks: Walks, flips: Flips, seed: int = 0) -> None:
    """Tell where gates flip against where the output moves: data, a finding and a panel.

    Walks whose logits are the same at both ends count no longer, and nothing is added where none is
    left or no gate is known.

    Args:
        circuit: Gets ``graph["gate_flips"]``: flips ``per_path`` by MLP and ``n_gates``;
            ``on_plateaus``, the share of flips where the logits' d_sym is below 0.1 or above 0.9,
            beside ``plateaus``, the share of the way that is; ``correlation`` over the way of flips
            with the logits' speed, mean over pairs, with its ``interval``; ``left_out``.
        walks: With logits.
        flips: Of the same walks.
        seed: Of the intervals.
    """
    data: dict[str, Any] = {}
    if flips.left_out:
        data["left_out"] = {f"m{layer}": why for layer, why in flips.left_out.items()}
    rows = apart(walks.logits)
    if flips.layers and rows.any():
        _tell(circuit, data, walks, flips, rows, seed)
    if data:
        circuit.graph["gate_flips"] = data


def _tell(
    circuit: CircuitGraph,
    data: dict[str, Any],
    walks: Walks,
    flips: Flips,
    rows: Tensor,
    seed: int,
) -> None:
    t, logits = walks.t[rows], walks.logits[rows]
    counts = flips.counts[:, rows]
    total = counts.sum(0)
    moved = speed(t, logits)
    d = d_sym(logits)
    middle = (d[:, 1:] + d[:, :-1]) / 2
    flat = (middle < BETWEEN) | (middle > 1 - BETWEEN)
    names = [f"m{layer}" for layer in flips.layers]
    data["n_gates"] = dict(zip(names, flips.n_gates, strict=True))
    data["per_path"] = dict(zip(names, counts.double().sum(-1).mean(-1).tolist(), strict=True))
    data["plateaus"] = float((t.diff(dim=-1) * flat).sum(-1).mean())
    flipping = total.sum(-1) > 0
    if flipping.any():
        shares = (total * flat).sum(-1)[flipping] / total.sum(-1)[flipping]
        data["on_plateaus"] = float(shares.mean())
    rates = [rebinned(t, amounts, INTERVALS) for amounts in (total, moved * t.diff(dim=-1))]
    found = _correlation(*rates)
    known = found[~found.isnan()]
    if len(known):
        data["correlation"] = float(known.mean())
        interval = mean_intervals(known[None].cpu(), seed)[0]
        data |= {} if interval is None else {"interval": list(interval)}
    circuit.graph.setdefault("findings", {})["gate flips"] = _said(data)
    _add_panel(circuit, *rates)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row; NaN where a row does not vary."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    sizes = a.norm(dim=-1) * b.norm(dim=-1)
    varies = (a.norm(dim=-1) > 0) & (b.norm(dim=-1) > 0)
    return torch.where(varies, (a * b).sum(-1) / sizes, torch.nan)


def _said(data: dict[str, Any]) -> str:
    flipped, n_gates = sum(data["per_path"].values()), sum(data["n_gates"].values())
    text = f"{flipped:.3g} of {n_gates:,} gates flip on the way"
    if "on_plateaus" in data:
        text += f", {data['on_plateaus']:.0%} of them on plateaus ({data['plateaus']:.0%} of it)"
    if "correlation" in data:
        told = number(data["correlation"], data.get("interval"), "+")
        text += f"; correlation with the output's speed {told}"
    return text


def _add_panel(circuit: CircuitGraph, flipped: Tensor, moved: Tensor) -> None:
    """Flips and the output's speed on one axis, each as a multiple of its mean over the way."""
    curves = []
    for name, rates in (("gate flips", flipped), ("speed of the logits", moved)):
        means = rates.mean(-1, keepdim=True)
        relative = rates[means[:, 0] > 0] / means[means[:, 0] > 0]
        if len(relative):
            curves.append(Curve(name=name, mean=relative.mean(0).tolist()))
    n = flipped.shape[-1]
    Curves(
        title="Gate flips along the way",
        caption="Signs of the MLPs' gates that change, and how fast the logits move.",
        x=[(place + 0.5) / n for place in range(n)],
        x_label="t, from A (0) to B (1)",
        y_label="times the mean over the way, mean over pairs",
        curves=curves,
    ).add_to(circuit)
