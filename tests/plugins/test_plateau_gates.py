"""Gate flips: solved crossings of a ReLU model without norms, and signs that hooks see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.sharpness.gates import (
    Flips,
    Mlp,
    add_gates,
    gate_flips,
    gate_sites,
    rebinned,
)
from circuitlab_activation_plateaus.walks.walking import Walks, walk
from families import random_module, silent, traced
from torch import Tensor, nn

from circuitlab import CircuitGraph, ModelError, Site, Tokens, load_model, panels_of


def prompt(width: int = 3, n: int = 2) -> Tokens:
    ids = torch.arange(1, 1 + n * width).view(n, width)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def line(n_rows: int, n_steps: int, d_model: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n_rows, 1, d_model, generator=generator) for _ in range(2))
    return torch.lerp(a, b, torch.linspace(0, 1, n_steps)[:, None])


def test_flips_are_where_the_planes_are_crossed() -> None:
    """Without norms each neuron flips once at most, at the solved place on a straight line."""
    model = load_model("hand-and")
    ids = model.tokens(model.corpus(3))
    points = line(3, 201, model.d_model)
    site = Site("resid_mid", 0)
    walks = walk(model, ids, site, points)
    flips = gate_flips(model, site, walks)
    linear: Any = model._module.get_submodule(f"{model.architecture.blocks}.0.mlp.c_fc")
    start, end = (points[:, side].double() @ linear.weight.double() for side in (0, -1))
    crossing = (start + linear.bias) / (start - end)
    for row in range(3):
        places = crossing[row][(crossing[row] > 0) & (crossing[row] < 1)]
        expected = torch.histc(places, 200, 0, 1)
        assert flips.counts[0, row].tolist() == expected.tolist()
    assert flips.counts.sum() > 20
    assert flips.layers == (0,)
    assert flips.n_gates == (linear.weight.shape[1],)


def test_flips_are_the_signs_that_a_plain_model_shows() -> None:
    """Flips of all later MLPs are those of what their nonlinearity reads, here of a gated MLP."""
    module: Any = random_module("llama", 3)
    model = traced(module)
    site, points = Site("resid_pre", 1), line(2, 9, model.d_model)
    signs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, __: Any, value: Tensor) -> None:
            signs[layer] = value[:, -1] > 0

        return hook

    def start(_: nn.Module, given: Any) -> Any:
        stream = given[0].clone()
        stream[:, -1] = points[row]
        return (stream, *given[1:])

    walks = walk(model, prompt(), site, points, read=gate_sites(model, site))
    flips = gate_flips(model, site, walks)
    for layer in (1, 2):
        module.model.layers[layer].mlp.gate_proj.register_forward_hook(keep(layer))
    module.model.layers[1].register_forward_pre_hook(start)
    for row in range(2):
        module(prompt().ids[row].expand(9, -1), use_cache=False)
        expected = [(signs[n][1:] != signs[n][:-1]).sum(-1).tolist() for n in (1, 2)]
        assert flips.counts[:, row].tolist() == expected
        assert sum(map(sum, expected)) > 10
    assert flips.layers == (1, 2)
    assert flips.left_out == {}


def test_mlp_that_is_not_described_is_left_out() -> None:
    """Where the architecture does not say what the hidden layer is, the reason is told."""
    model = silent(random_module("neox", 2))
    site = Site("resid_pre", 1)
    walks = walk(model, prompt(), site, line(2, 3, model.d_model), read=gate_sites(model, site))
    flips = gate_flips(model, site, walks)
    assert flips.layers == ()
    assert set(flips.left_out) == {1}
    assert "hidden layer" in flips.left_out[1]


def test_mlp_whose_norm_differs_is_refused() -> None:
    """An MLP that divides by another scale than its layer's attention has no formula here."""
    module: Any = random_module("llama", 1)
    module.model.layers[0].input_layernorm = nn.Identity()
    model = traced(module)
    with pytest.raises(ModelError, match="MLP of layer 0"):
        Mlp(model, 0)


def test_rates_keep_what_there_is() -> None:
    """On even intervals the total stays, each amount stays where it was, and a rate is per t."""
    t = torch.tensor([[0.0, 0.5, 0.6, 1.0], [0.0, 0.1, 0.2, 1.0]], dtype=torch.float64)
    amounts = torch.tensor([[5, 2, 4], [0, 3, 8]])
    rates = rebinned(t, amounts, 10)
    assert torch.allclose(rates.sum(1) / 10, amounts.sum(1).double())
    expected = [[10] * 5 + [20] + [10] * 4, [0, 30] + [10] * 8]
    assert torch.allclose(rates, torch.tensor(expected, dtype=torch.float64))


def logistic(steep: float, n_steps: int = 101) -> Walks:
    """Two walks whose output is a logistic curve along one direction."""
    t = torch.linspace(0, 1, n_steps, dtype=torch.float64)
    curve = torch.sigmoid(steep * (t - 0.5))
    logits = torch.stack([curve, -curve], -1).expand(2, -1, -1)
    return Walks(t.expand(2, -1), logits.clone(), {}, logits)


def flips_of(counts: Tensor) -> Flips:
    return Flips((0, 1), counts, (50, 60), {})


def test_gates_that_flip_where_the_output_moves() -> None:
    """Flips in proportion to speed correlate by 1, even ones do not; shares are as counted."""
    walks = logistic(20.0)
    speed = walks.logits[..., 0].diff(dim=-1)
    counts = (1e6 * speed).round().long().expand(2, -1, -1)
    circuit = CircuitGraph()
    add_gates(circuit, walks, flips_of(counts))
    data = circuit.graph["gate_flips"]
    assert data["correlation"] == pytest.approx(1.0, abs=1e-4)
    assert data["n_gates"] == {"m0": 50, "m1": 60}
    assert data["per_path"]["m1"] == pytest.approx(float(counts[1].sum(-1).double().mean()))
    # Width 2 ln 9 / 20 = 0.22 of the way lies between 0.1 and 0.9; a fifth of the change outside.
    assert data["plateaus"] == pytest.approx(1 - 0.2197, abs=0.011)
    assert data["on_plateaus"] == pytest.approx(0.2, abs=0.02)
    assert "correlation with the output's speed +1" in circuit.graph["findings"]["gate flips"]
    panel = panels_of(circuit)[0]
    assert [curve.name for curve in panel.curves] == ["gate flips", "speed of the logits"]  # type: ignore[attr-defined]  # it is Curves
    ends = torch.zeros_like(counts)
    ends[..., :5] = ends[..., -5:] = 1
    add_gates(circuit, walks, flips_of(ends))
    assert circuit.graph["gate_flips"]["correlation"] < 0
    assert circuit.graph["gate_flips"]["on_plateaus"] == 1.0


def test_what_is_not_known_is_left_out() -> None:
    """No flip has no share and no correlation; an unknown gate a reason; a still output nothing."""
    walks = logistic(20.0)
    circuit = CircuitGraph()
    add_gates(circuit, walks, flips_of(torch.zeros(2, 2, 100, dtype=torch.int64)))
    assert {"on_plateaus", "correlation"}.isdisjoint(circuit.graph["gate_flips"])
    assert "0 of 110 gates" in circuit.graph["findings"]["gate flips"]
    unknown = CircuitGraph()
    add_gates(unknown, walks, Flips((), torch.zeros(0, 2, 100), (), {0: "no map"}))
    assert unknown.graph == {"gate_flips": {"left_out": {"m0": "no map"}}}
    still = CircuitGraph()
    quiet = Walks(walks.t, walks.points, {}, torch.zeros_like(walks.logits))
    add_gates(still, quiet, flips_of(torch.ones(2, 2, 100, dtype=torch.int64)))
    assert still.graph == {}
