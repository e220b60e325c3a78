"""Walks: each step against a stock model under hooks, one prompt at a time and without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.walks import walking
from circuitlab_activation_plateaus.walks.paths import slerp
from circuitlab_activation_plateaus.walks.walking import clean, refined, walk
from families import family_model
from oracles import random_gpt2
from plateau_oracles import (
    FAMILIES,
    LOGITS,
    NEAR,
    Change,
    Hooked,
    between,
    build,
    gap,
    other_last,
    prompts,
    put,
    same,
    summarised,
)
from torch import Tensor

from circuitlab import OptionError, ResourceError, Site, SiteError, load_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("site", "position"),
    [(Site("resid_pre", 1), -1), (Site("resid_post", 0), -2), (Site("attn_out", 0), -1)],
    ids=str,
)
def test_each_step_is_a_stock_model_with_one_value_replaced(
    family: str, site: Site, position: int
) -> None:
    """Logits and sites read after it, in batches that cut rows, equal hooks on single prompts."""
    module, model = build(family)
    tokens = prompts(model)
    points = between(model, tokens, site)
    read = [Site("z", 1), Site("mlp_out", 1), Site("resid_post", 1)]
    walks = walk(model, tokens, site, points, position=position, read=read, batch_size=5)
    assert walks.logits.shape == (3, 4, 40)
    assert walks.t.tolist() == [pytest.approx([0, 1 / 3, 2 / 3, 1])] * 3
    assert torch.equal(walks.points, points)
    hooked = Hooked(module, family)
    for row in range(3):
        ids = tokens.ids[row][tokens.mask[row]]
        for step in range(4):
            changes = {site: put(position, points[row, step])} | dict.fromkeys(read, same)
            logits, seen = hooked.run(ids, changes)
            assert gap(walks.logits[row, step], logits) < NEAR
            for place in read:
                assert gap(walks.read[place][row, step], seen[place][position]) < NEAR


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position", [-1, -2])
def test_held_components_keep_their_values(family: str, position: int) -> None:
    """A held component has the held value there and its clean one elsewhere, whatever the point."""
    module, model = build(family)
    tokens, site = prompts(model), Site("resid_pre", 0)
    points = between(model, tokens, site)
    head, d_head = Site("z", 1, head=1), model.d_head
    sites = [Site("attn_out", 0), head, Site("mlp_out", 1)]
    values = clean(model, other_last(tokens), sites, position)
    hold = {
        sites[0]: values[sites[0]],
        head: values[head][:, None] * torch.linspace(0, 1, 4)[:, None],
        sites[2]: values[sites[2]],
    }
    walks = walk(model, tokens, site, points, position=position, hold=hold, batch_size=5)
    hooked, whole = Hooked(module, family), Site("z", 1)
    own = slice(d_head, 2 * d_head)
    for row in range(3):
        ids = tokens.ids[row][tokens.mask[row]]
        _, plain = hooked.run(ids, dict.fromkeys((sites[0], whole, sites[2]), same))
        for step in range(4):
            frozen_z = put(position, hold[head][row, step], own)(plain[whole])

            def held_head(z: Tensor, frozen: Tensor = frozen_z) -> Tensor:
                return torch.cat([z[:, : own.start], frozen[:, own], z[:, own.stop :]], 1)

            changes: dict[Site, Change] = {site: put(position, points[row, step])}
            for other in (sites[0], sites[2]):
                frozen = put(position, hold[other][row])(plain[other])
                changes[other] = lambda _, frozen=frozen: frozen
            logits, _ = hooked.run(ids, changes | {whole: held_head})
            assert gap(walks.logits[row, step], logits) < NEAR


def test_a_component_held_at_what_it_does_changes_nothing() -> None:
    """Values read along a walk, held along the same walk, give the same walk."""
    _, model = build("gpt2")
    tokens, site = prompts(model), Site("resid_pre", 0)
    points = between(model, tokens, site)
    places = [Site("attn_out", 0), Site("z", 1, head=0), Site("mlp_out", 1)]
    free = walk(model, tokens, site, points, read=places)
    for place in places:
        held = walk(model, tokens, site, points, hold={place: free.read[place]})
        assert gap(held.logits, free.logits) < NEAR
        still = walk(model, tokens, site, points, hold={place: free.read[place][:, 0]})
        assert gap(still.logits, free.logits) > 100 * NEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_of_a_walk_are_the_clean_prompts(family: str) -> None:
    """Between prompts that differ in the last token alone, both ends have the clean logits."""
    _, model = build(family)
    tokens, site = prompts(model), Site("resid_post", 0)
    a, b = (clean(model, part, [site, LOGITS]) for part in (tokens, other_last(tokens)))
    walks = refined(model, tokens, site, slerp, (a[site], b[site]), steps=5, refine=2)
    assert gap(walks.logits[:, 0], a[LOGITS]) < 1e-4
    assert gap(walks.logits[:, -1], b[LOGITS]) < 1e-4
    assert gap(a[LOGITS], b[LOGITS]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_prompts_have_equal_widths(family: str) -> None:
    """From B to A in B's prompt, which shares A's prefix, the curve is the same backwards."""
    _, model = build(family)
    site = Site("resid_pre", 1)
    both = [prompts(model), other_last(prompts(model))]
    ends = [clean(model, tokens, [site])[site] for tokens in both]
    there, back = (
        summarised(refined(model, both[i], site, slerp, (ends[i], ends[1 - i]), steps=31))
        for i in (0, 1)
    )
    assert gap(there.width, back.width) < 1e-4
    assert gap(there.location, 1 - back.location) < 1e-4


def test_clean_values_are_those_of_single_prompts() -> None:
    """Sites, whole and of one head, and centred logits, at a position or each site's own."""
    module, model = build("gpt2")
    tokens = prompts(model)
    own = Site("resid_pre", 1, position=-3)
    read = [Site("z", 0), Site("z", 0, head=1), own, LOGITS]
    values = clean(model, tokens, read, position=-2)
    hooked = Hooked(module, "gpt2")
    for row in range(3):
        ids = tokens.ids[row][tokens.mask[row]]
        logits, seen = hooked.run(ids, {Site("z", 0): same, own.whole: same})
        assert gap(values[LOGITS][row], logits) < NEAR
        assert gap(values[read[0]][row], seen[read[0]][-2]) < NEAR
        assert gap(values[read[1]][row], seen[read[0]][-2, model.d_head :]) < NEAR
        assert gap(values[own][row], seen[own.whole][-3]) < NEAR


def test_batches_do_not_show() -> None:
    """One step a pass, or all in one, and positions counted from either end, are the same."""
    _, model = build("gpt2")
    tokens, site = prompts(model), Site("resid_pre", 1)
    points, read = between(model, tokens, site), [Site("mlp_out", 1)]
    whole = walk(model, tokens, site, points, read=read, batch_size=100)
    for size, position in ((1, -1), (7, 5), (None, 5)):
        other = walk(model, tokens, site, points, read=read, batch_size=size, position=position)
        assert gap(other.logits, whole.logits) < NEAR
        assert gap(other.read[read[0]], whole.read[read[0]]) < NEAR


def test_logits_can_be_reduced_or_left_out() -> None:
    """What is kept of them is a function of them and of the prompt's row."""
    _, model = build("gpt2")
    tokens, site = prompts(model), Site("resid_pre", 1)
    points, read = between(model, tokens, site), [Site("resid_post", 1)]
    whole = walk(model, tokens, site, points, read=read)
    base = whole.logits[:, 0]

    def distance(logits: Tensor, rows: Tensor) -> Tensor:
        return (logits - base[rows]).norm(dim=-1, keepdim=True)

    small = walk(model, tokens, site, points, reduce=distance, batch_size=5)
    assert gap(small.logits[..., 0], (whole.logits - base[:, None]).norm(dim=-1)) < NEAR
    none = walk(model, tokens, site, points, read=read, logits=False)
    assert none.logits.shape == (3, 4, 0)
    assert gap(none.read[read[0]], whole.read[read[0]]) < NEAR


def test_values_are_kept_in_float32_at_least() -> None:
    """A model in bfloat16 walks, and its walks are wide enough to be told apart."""
    model = load_model((random_gpt2(dtype=torch.bfloat16), None))
    tokens, site = prompts(model), Site("resid_pre", 1)
    walks = walk(model, tokens, site, between(model, tokens, site), read=[Site("resid_post", 1)])
    assert walks.logits.dtype == walks.read[Site("resid_post", 1)].dtype == torch.float32
    assert walks.t.dtype == torch.float64


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "fact"),
    [
        ({"points": torch.zeros(2, 4, 16)}, OptionError, "points have shape"),
        ({"points": torch.zeros(3, 16)}, OptionError, "points have shape"),
        ({"points": torch.zeros(3, 4, 9)}, OptionError, r"values at resid_pre.1 have shape"),
        ({"t": torch.zeros(3)}, OptionError, "places t have shape"),
        ({"position": 0}, OptionError, "position 0 is padding in prompt 2 of 3"),
        ({"position": -5}, OptionError, "position -5 is padding in prompt 2 of 3"),
        ({"position": 6}, OptionError, "position 6 does not exist: the prompts have 6"),
        ({"batch_size": 0}, OptionError, "batch size 0 is too small"),
        ({"reduce": lambda logits, _: logits[:, 0]}, OptionError, r"reduce gave \[12\]"),
        ({"site": Site("resid_pre", 1, position=-1)}, SiteError, "give position= instead"),
        ({"site": Site("resid_pre", 2)}, SiteError, "layers run from 0 to 1"),
        ({"read": [Site("mlp_out", 0)]}, SiteError, "mlp_out.0 does not come after resid_pre.1"),
        ({"hold": {Site("resid_pre", 1): 0}}, SiteError, "resid_pre.1 does not come after"),
        (
            {"hold": {Site("attn_out", 1): torch.zeros(3, 3)}},
            OptionError,
            r"values at attn_out.1 have shape \[3, 3\]; give \[3, 4, 16\], or \[3, 16\]",
        ),
        (
            {"hold": {Site("attn_out", 1, position=-1): torch.zeros(3, 16)}},
            SiteError,
            "give position= instead",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], fact: str
) -> None:
    """Shapes, positions, sites and batch sizes; the message says which."""
    model = family_model("llama")
    given = {"site": Site("resid_pre", 1), "points": torch.zeros(3, 4, 16)} | change
    with pytest.raises(error, match=fact):
        walk(model, prompts(model), **given)


def test_more_logits_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of very many steps are refused before the first pass; reduced ones are not."""
    model = family_model("llama")
    tokens, site = prompts(model), Site("resid_pre", 1)
    monkeypatch.setattr(walking, "LOGITS", 1000)
    points = torch.zeros(3, 4, 16)
    with pytest.raises(ResourceError, match="logits of 12 steps would take"):
        walk(model, tokens, site, points)
    few = walk(model, tokens, site, points, reduce=lambda logits, _: logits[:, :2])
    assert few.logits.shape == (3, 4, 2)
