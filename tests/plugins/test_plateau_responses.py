"""Responses: against closed forms, plain sums and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from circuitlab_activation_plateaus.walks.paths import lerp, slerp
from circuitlab_activation_plateaus.walks.responses import (
    RESPONSES,
    apart,
    d_rel,
    d_sym,
    jsd,
    kl,
    speed,
)
from torch import Tensor

from circuitlab import NumericsError, OptionError

T = torch.linspace(0, 1, 21, dtype=torch.float64)
DISTANCES = (d_rel, d_sym)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_linear_map_answers_in_proportion(distance: type) -> None:
    """On a straight path through a linear map the distance is t."""
    a, b, weight, bias = random(4, 6), random(4, 6, seed=1), random(6, 9), random(9)
    d = distance(lerp(a, b, T) @ weight + bias)
    assert torch.allclose(d, T.expand(4, -1), atol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_readout_bias_and_a_rotation_change_nothing(distance: type) -> None:
    """Distances do not see a constant or an orthogonal map behind the output."""
    values = random(4, 21, 6)
    rotation = torch.linalg.qr(random(6, 6)).Q
    assert torch.allclose(distance(values @ rotation + random(6)), distance(values), atol=1e-12)


def test_distances_are_their_formulas() -> None:
    """Both against the fractions written out, step by step."""
    values = random(3, 5, 4)
    for row, step in ((0, 2), (2, 1), (1, 4)):
        a, b, x = values[row, 0], values[row, -1], values[row, step]
        near, far, whole = (a - x).norm(), (b - x).norm(), (a - b).norm()
        assert d_rel(values)[row, step] == pytest.approx(float(near / whole), abs=1e-14)
        assert d_sym(values)[row, step] == pytest.approx(float(near / (near + far)), abs=1e-14)


def test_other_ends_can_be_given() -> None:
    """A part of a walk, with the ends of the whole, is that part of the whole's distances."""
    values = random(3, 9, 4)
    for distance in DISTANCES:
        part = distance(values[:, 2:6], values[:, 0], values[:, -1])
        assert torch.equal(part, distance(values)[:, 2:6])


def test_only_the_relative_distance_passes_one() -> None:
    """An output that overshoots is beyond 1 in ``d_rel`` and within it in ``d_sym``."""
    values = torch.tensor([[[0.0], [3.0], [1.0]]])
    assert d_rel(values).tolist() == [[0.0, 3.0, 1.0]]
    assert d_sym(values).tolist() == [[0.0, pytest.approx(0.6), 1.0]]


def test_swapped_ends_give_the_rest_of_one() -> None:
    """The symmetric distance of a walk backwards is 1 minus that of the walk."""
    values = random(3, 9, 4)
    assert torch.allclose(d_sym(values.flip(1)), 1 - d_sym(values).flip(1), atol=1e-14)


def test_the_reference_of_an_arc_is_known() -> None:
    """At the injection site a right angle's arc answers by the chord's sine (Pythagoras)."""
    a, b = torch.eye(2, dtype=torch.float64)
    d = d_sym(slerp(a, b, T)[None])
    near, far = torch.sin(T * math.pi / 4), torch.sin((1 - T) * math.pi / 4)
    assert torch.allclose(d[0], near / (near + far), atol=1e-12)


def test_divergences_are_plain_sums() -> None:
    """Against sums over the vocabulary of probabilities written out."""
    logits = random(2, 4, 5)
    p = logits.softmax(-1)
    for row, step in ((0, 3), (1, 2)):
        base, other = p[row, 0], p[row, step]
        expected = sum(
            float(x) * math.log(float(x) / float(y)) for x, y in zip(base, other, strict=True)
        )
        assert kl(logits)[row, step] == pytest.approx(expected, abs=1e-12)
        middle = (base + other) / 2
        halves = [
            float(x) * math.log(float(x) / float(m)) / 2
            for side in (base, other)
            for x, m in zip(side, middle, strict=True)
        ]
        assert jsd(logits)[row, step] == pytest.approx(sum(halves), abs=1e-12)


def test_divergences_do_not_see_a_common_shift() -> None:
    """A constant on all logits of a step changes no probability; the first step is at 0."""
    logits = random(2, 4, 5)
    for divergence in (kl, jsd):
        shifted = divergence(logits + random(2, 4, 1))
        assert torch.allclose(shifted, divergence(logits), atol=1e-12)
        assert divergence(logits)[:, 0].abs().max() < 1e-15
        assert torch.allclose(divergence(logits, logits[:, 2])[:, 2], torch.zeros(2).double())


def test_sure_outputs_are_finite() -> None:
    """Probabilities of 0 in float32 leave finite divergences; theirs is at most ln 2."""
    logits = torch.tensor([[[300.0, 0.0, -300.0], [-300.0, 0.0, 300.0]]])
    assert kl(logits).tolist() == [[0.0, pytest.approx(600.0)]]
    assert jsd(logits).tolist() == [[0.0, pytest.approx(math.log(2))]]


def test_speed_is_the_derivative() -> None:
    """Of a curve on uneven steps, against its derivative in the middle; of a line, exactly."""
    t = torch.sort(torch.rand(2, 200, generator=torch.Generator().manual_seed(0)).double()).values
    curve = torch.stack([torch.sin(3 * t), torch.cos(3 * t), t], -1)
    assert torch.allclose(speed(t, curve), torch.full((2, 199), 10.0**0.5).double(), atol=3e-3)
    a, b = random(2, 6), random(2, 6, seed=1)
    expected = (b - a).norm(dim=-1)[:, None].expand(-1, 199)
    assert torch.allclose(speed(t, lerp(a, b, t)), expected, rtol=1e-6)


def test_ends_that_answer_alike_are_refused() -> None:
    """A distance of rounding is no unit; the walk is named, and can be found beforehand."""
    values = random(3, 5, 4).float()
    values[1, -1] = values[1, 0] * (1 + 2e-7)
    assert apart(values).tolist() == [True, False, True]
    for distance in DISTANCES:
        with pytest.raises(NumericsError, match="walk 2 of 3: both ends answer alike"):
            distance(values)
        assert distance(values[apart(values)]).shape == (2, 5)


@pytest.mark.parametrize("t", [[0.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, 1.0], [[0.0, 0.5, 1.0]] * 3])
def test_places_that_do_not_fit_are_refused(t: list[float]) -> None:
    """Repeated, falling, too few and too many places."""
    with pytest.raises(OptionError, match="places t"):
        speed(torch.tensor(t), random(2, 3, 4))


def test_names_are_those_of_the_options() -> None:
    """Each response takes logits and gives a number per step, 0 at the first."""
    for name, response in RESPONSES.items():
        values = response(random(2, 4, 5).float())
        assert values.shape == (2, 4), name
        assert values.dtype == torch.float64
        assert values[:, 0].abs().max() < 1e-7
