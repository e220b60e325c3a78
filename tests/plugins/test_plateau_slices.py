"""Slices: coordinates, colours and corners, on a staircase and on a random GPT-2."""

from __future__ import annotations

import pytest
import torch
from circuitlab_activation_plateaus.regions.slices import (
    HIGH,
    LOW,
    Slice,
    slice_plane,
    third_corner,
)
from oracles import random_gpt2
from region_oracles import staircase

from circuitlab import OptionError, Site, load_model


def test_colours_are_similarities_to_the_corners() -> None:
    """Every pixel is 1 - distance / nearest corner's, of runs made one by one in A's context."""
    model = load_model(random_gpt2(seed=1))
    prompts = model.tokens([(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    site, out = Site("resid_pre", 1), Site("resid_post", 1)
    a, b, c = corners = model.run(prompts, read=[site])[site][:, -1]
    found = slice_plane(model, prompts.rows([0]), site, corners, steps=5)
    foot = a + ((c - a) @ (b - a)) / ((b - a) @ (b - a)) * (b - a)

    def output(x: torch.Tensor) -> torch.Tensor:
        value = model.run(prompts.rows([0]), read=[site])[site].clone()
        value[:, -1] = x
        return model.run(prompts.rows([0]), read=[out], write={site: value})[out][0, -1]

    ends = [output(x) for x in corners]
    for i, beta in enumerate(torch.linspace(LOW, HIGH, 5).tolist()):
        for j, alpha in enumerate(torch.linspace(LOW, HIGH, 5).tolist()):
            here = output(a + alpha * (b - a) + beta * (c - foot))
            for channel, end in enumerate(ends):
                others = [float((end - other).norm()) for other in ends if other is not end]
                expected = max(0.0, 1 - float((here - end).norm()) / min(others))
                assert float(found.similarity[i, j, channel]) == pytest.approx(expected, abs=1e-6)
    place = float((c - a) @ (b - a) / (b - a).square().sum())
    assert found.corners.tolist() == [[0, 0], [1, 0], [pytest.approx(place), 1]]


def test_corners_have_their_own_colours() -> None:
    """At its corner a prompt's own colour is full and the others are 0."""
    model = load_model(random_gpt2(seed=1))
    site, generator = Site("resid_pre", 1), torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, model.d_model, generator=generator, dtype=torch.float64)
    c = c - ((c - a) @ (b - a)) / ((b - a) @ (b - a)) * (b - a)  # over A
    found = slice_plane(model, model.tokens([(1, 2, 3)]), site, torch.stack([a, b, c]), steps=7)
    for (i, j), colour in (((1, 1), [1, 0, 0]), ((1, 5), [0, 1, 0]), ((5, 1), [0, 0, 1])):
        assert found.alpha[j].item() == pytest.approx(float(j == 5))
        assert found.beta[i].item() == pytest.approx(float(i == 5))
        torch.testing.assert_close(
            found.similarity[i, j], torch.tensor(colour, dtype=torch.float64), atol=1e-9, rtol=0
        )


def test_border_of_a_slice_is_the_hyperplane() -> None:
    """On a staircase, colours change where w · x passes the ramp, whatever the other axis is."""
    stairs = staircase((0.5, 1.8, 3.6), (1.0, 2.9), steepness=400.0, rise=100.0)
    site = Site("resid_pre", 0)
    tokens = stairs.model.tokens([(stairs.first + i,) for i in range(3)])
    corners = stairs.model.run(tokens, read=[site])[site][:, -1]
    corners[:, :6] = corners[:, :6] @ torch.outer(stairs.w[:6], stairs.w[:6])  # no noise across w
    corners[2, :6] += torch.ones(6) - stairs.w[:6].sum() * stairs.w[:6]
    found = slice_plane(stairs.model, tokens.rows([0]), site, corners, steps=31)
    heights = corners @ stairs.w
    reads = heights[0] + found.alpha * (heights[1] - heights[0])
    for row in found.similarity:
        assert torch.equal(row[:, 0] > row[:, 1], reads < stairs.border(0))


def test_third_corner_is_the_output_most_unlike() -> None:
    """Furthest from the nearer of both; one that lies beside the slice only in need."""
    outputs = torch.tensor([[0.0, 0], [4, 0], [2, 1], [0, 3], [9, 9]])
    activations = torch.tensor([[0.0, 0], [1, 0], [0.5, 1], [0.2, 1], [7, 1]])
    assert third_corner(activations, outputs, 0, 1) == 3
    assert third_corner(activations[[0, 1, 4]], outputs[[0, 1, 4]], 0, 1) == 2


def test_panel_marks_the_corners() -> None:
    """The image has the colours, the corners that lie on it, and says which does not."""
    axis = torch.tensor([LOW, 0.5, HIGH], dtype=torch.float64)
    colours = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.5, 1.0]])
    panel = Slice(axis, axis, colours, corners).panel(["x", "y", "z"], Site("resid_pre", 1))
    assert [point.name for point in panel.points] == ["A x", "B y"]
    assert "C lies outside" in panel.caption
    torch.testing.assert_close(torch.tensor(panel.pixels).double(), colours, atol=5e-4, rtol=0)
    assert list(panel.channels) == ["as A x", "as B y", "as C z"]


@pytest.mark.parametrize(
    ("steps", "third", "said"),
    [
        (1, (7, 8, 9), "--slice-steps 1 makes no plane; give 2 or more"),
        (3, (1, 2, 3), "two of its three prompts give the same output"),
    ],
)
def test_refused(steps: int, third: tuple[int, ...], said: str) -> None:
    """A slice of one point, or one whose colours would mean nothing, is refused."""
    model = load_model(random_gpt2(seed=1))
    prompts, site = model.tokens([(1, 2, 3), (4, 5, 6), third]), Site("resid_pre", 1)
    corners = model.run(prompts, read=[site])[site][:, -1]
    with pytest.raises(OptionError, match=said):
        slice_plane(model, prompts.rows([0]), site, corners, steps=steps)
