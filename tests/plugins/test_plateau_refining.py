"""Refined walks: closed forms of planted models, and the grid that a slow loop arrives at."""

from __future__ import annotations

import pytest
import torch
from circuitlab_activation_plateaus.walks.paths import lerp, slerp
from circuitlab_activation_plateaus.walks.responses import d_sym, speed
from circuitlab_activation_plateaus.walks.summaries import excess, summarise
from circuitlab_activation_plateaus.walks.walking import clean, refined, walk
from families import family_model
from oracles import random_gpt2
from plateau_oracles import NEAR, build, gap, other_last, prompts, summarised

from circuitlab import OptionError, Site, TracedModel, load_model
from circuitlab.zoo.network import parameters, silent

# --- closed forms ---------------------------------------------------------------------------------


def test_a_linear_model_answers_in_proportion() -> None:
    """Without norms, behind the last block: width 0.8, slope 1, no boundary, no excess."""
    model = load_model((random_gpt2(layer_norm=False, dtype=torch.float32), None))
    tokens, site = prompts(model), Site("resid_post", 1)
    a, b = (clean(model, part, [site])[site] for part in (tokens, other_last(tokens)))
    walks = refined(model, tokens, site, lerp, (a, b), steps=11, refine=4, read=[site])
    out, inside = summarised(walks), summarise(walks.t, d_sym(walks.read[site]))
    assert gap(out.width, torch.tensor(0.8)) < 1e-4
    assert gap(out.participation, torch.tensor(1.0)) < 1e-4
    assert gap(excess(out, inside), torch.tensor(1.0)) < 2e-3
    assert out.boundaries.tolist() == [0, 0, 0]


def planted(threshold: float) -> TracedModel:
    """A model of one ReLU: yes is how far coordinate 0 is beyond the threshold, at the MLP."""
    module = silent(8, 4, width=4, n_layers=1, n_inner=2)
    weights = parameters(module)
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = 1
    weights["transformer.h.0.mlp.c_fc.bias"][0] = -threshold
    weights["transformer.h.0.mlp.c_proj.weight"][0, 3] = 1
    weights["lm_head.weight"][5, 3] = 2
    return load_model((module, None))


def test_a_planted_hyperplane_is_crossed_where_it_is_solved() -> None:
    """From 0 to 1 behind a threshold h: flat to h, then a line of slope 1 / (1 - h).

    The interval with the corner, 0.01 long, makes the participation larger by 0.0025 at most.
    """
    threshold = 0.6180339
    model = planted(threshold)
    tokens = model.tokens([(1, 2, 3)])
    ends = torch.zeros(1, 4), torch.eye(4)[:1]
    walks = refined(model, tokens, Site("resid_mid", 0), lerp, ends, steps=101, refine=5)
    crossed = walks.t[0, (walks.logits[0, :, 5] > 0).nonzero()[0]]
    assert threshold < float(crossed) < threshold + 0.01
    found = summarise(walks.t, d_sym(walks.logits), speed(walks.t, walks.logits))
    assert float(found.width) == pytest.approx(0.8 * (1 - threshold), abs=2e-3)
    assert float(found.flat_start) == pytest.approx(threshold + 0.1 * (1 - threshold), abs=2e-3)
    assert float(found.max_slope) == pytest.approx(1 / (1 - threshold), rel=1e-3)
    assert float(found.participation) == pytest.approx(1 - threshold, abs=2.6e-3)


def test_a_jump_is_found_to_the_shortest_interval() -> None:
    """``gate-jump`` turns from bits 1.57 to 1.5705 of 2: refined, a step of one interval."""
    model = load_model("gate-jump")
    tokens, site = model.tokens(["off off =", "on on ="]), Site("resid_mid", 0)
    off, on = clean(model, tokens, [site])[site]
    walks = refined(model, tokens.rows(0), site, lerp, (off[None], on[None]), steps=21, refine=6)
    found = summarised(walks)
    assert float(found.location) == pytest.approx(1.57025 / 2, abs=1.6e-3)
    assert float(found.max_slope) > 1 / 4e-3
    assert found.boundaries.tolist() == [1]


# --- refinement -----------------------------------------------------------------------------------


def test_refinement_halves_the_interval_that_moves_most() -> None:
    """The grid is that of a loop which halves one interval at a time; values belong to their t."""
    _, model = build("gpt2")
    tokens, site, read = prompts(model), Site("resid_pre", 0), [Site("resid_post", 0)]
    a = 4 * clean(model, tokens, [site])[site]
    ends = a, a.roll(1, 0)
    walks = refined(model, tokens, site, slerp, ends, steps=5, refine=9, read=read)
    assert walks.t.shape == (3, 14)
    grids = [torch.linspace(0, 1, 5, dtype=torch.float64).tolist() for _ in range(3)]
    for _ in range(9):
        t = torch.tensor(grids, dtype=torch.float64)
        rates = speed(t, walk(model, tokens, site, slerp(*ends, t), t=t).logits)
        for grid, rate in zip(grids, rates, strict=True):
            lengths = torch.tensor(grid, dtype=torch.float64).diff()
            at = int(torch.where(lengths >= 2e-3, rate**2 * lengths, 0).argmax())
            grid.insert(at + 1, (grid[at] + grid[at + 1]) / 2)
    assert torch.equal(walks.t, torch.tensor(grids, dtype=torch.float64))
    again = walk(model, tokens, site, slerp(*ends, walks.t), t=walks.t, read=read)
    assert gap(again.logits, walks.logits) < NEAR
    assert gap(again.points, walks.points) < NEAR
    assert gap(again.read[read[0]], walks.read[read[0]]) < NEAR


def test_refinement_stops_where_only_rounding_moves() -> None:
    """At a jump no interval gets shorter than 1e-3, however often the grid is refined."""
    model = load_model("gate-jump")
    tokens, site = model.tokens(["off off =", "on on ="]), Site("resid_mid", 0)
    off, on = clean(model, tokens, [site])[site]
    walks = refined(model, tokens.rows(0), site, lerp, (off[None], on[None]), steps=3, refine=20)
    assert walks.t.shape == (1, 23)
    assert 1e-3 <= float(walks.t.diff(dim=1).min()) < 2e-3


def test_grids_that_cannot_be_refined_are_refused() -> None:
    """Two steps have no middle, and fewer than no refinements are none."""
    model = family_model("llama")
    ends = torch.zeros(3, 16), torch.ones(3, 16)
    for grid in ({"steps": 2}, {"refine": -1}):
        with pytest.raises(OptionError, match="use 3 steps or more"):
            refined(model, prompts(model), Site("resid_pre", 1), lerp, ends, **grid)
