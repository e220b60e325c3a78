"""Names of sites in dictionaries of others, and whether a dictionary fits a model and its use."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import dictionary_oracles as oracles
import pytest
import torch
from families import unchecked
from hypothesis import given
from hypothesis import strategies as st
from oracles import random_gpt2

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    OptionError,
    Site,
    SiteError,
    Tokens,
    TracedModel,
)
from circuitlab.dictionaries.info import HOOKS, hook_name, parse_site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("resid_post.3", Site("resid_post", 3)),
        ("z.1.h0", Site("z", 1, 0)),
        ("embed", Site("embed")),
        ("hook_embed", Site("embed")),
        ("blocks.0.hook_resid_pre", Site("resid_pre", 0)),
        ("blocks.11.hook_mlp_out", Site("mlp_out", 11)),
        ("blocks.2.hook_attn_out", Site("attn_out", 2)),
        ("blocks.2.attn.hook_z", Site("z", 2)),
        ("blocks.2.hook_z", Site("z", 2)),
        ("blocks.2.mlp.hook_post", Site("mlp_post", 2)),
    ],
)
def test_names_of_sites(text: str, site: Site) -> None:
    """Our names and TransformerLens's lead to one site, and back to its hook."""
    assert parse_site(text) == site
    assert str(parse_site(str(site))) == str(site)
    assert parse_site(hook_name(site)) == replace(site, head=None)


@given(st.sampled_from(sorted(HOOKS)), st.integers(0, 99))
def test_every_hook_leads_back(kind: str, layer: int) -> None:
    """No two sites share a hook."""
    assert parse_site(hook_name(Site(kind, layer))) == Site(kind, layer)


@pytest.mark.parametrize(
    ("text", "beside", "says"),
    [
        ("hook_resid_pre", {}, "unknown; write a site such as resid_post.3"),
        ("resid_pre", {}, "ambiguous: it says no layer"),
        ("blocks.{layer}.hook_resid_pre", {}, "ambiguous: it says no layer"),
        ("blocks.3.hook_resid_pre", {"layer": 4}, "ambiguous: layer 4 stands beside it"),
        ("z.1.h0", {"head": 1}, "ambiguous: head 1 stands beside it"),
        ("blocks.3.ln2.hook_normalized", {}, "unknown"),
        ("model.layers.3", {}, "unknown"),
        ("pattern.0", {}, "cannot have a dictionary"),
        ("logits", {}, "cannot have a dictionary"),
        ("resid_post.1.h2", {}, "has no heads"),
        ("resid_post.1[-1]", {}, "unknown"),
        ("", {}, "unknown"),
    ],
)
def test_ambiguous_and_unknown_names_are_refused(
    text: str, beside: dict[str, int], says: str
) -> None:
    """The message says what is wrong with the name."""
    with pytest.raises(SiteError, match=re.escape(says)):
        parse_site(text, **beside)


def test_a_layer_or_head_may_stand_beside_the_name() -> None:
    """Earlier files leave the layer out of the name, and all have the head beside it."""
    assert parse_site("blocks.{layer}.hook_resid_pre", layer=4) == Site("resid_pre", 4)
    assert parse_site("blocks.3.attn.hook_z", layer=3, head=1) == Site("z", 3, 1)
    assert parse_site("hook_embed", layer=0) == Site("embed")


def test_info_has_one_name_for_a_site() -> None:
    """Hooks become sites, and what cannot be is refused."""
    info = DictionaryInfo(site="blocks.0.hook_mlp_in", target="mlp_out.0")
    assert (info.site, info.reads, info.writes) == (
        "mlp_in.0",
        Site("mlp_in", 0),
        Site("mlp_out", 0),
    )
    assert DictionaryInfo(site="z.0").writes == Site("z", 0)
    assert DictionaryInfo().writes is None
    with pytest.raises(OptionError, match="the site itself; leave it out"):
        DictionaryInfo(site="mlp_out.0", target="blocks.0.hook_mlp_out")
    with pytest.raises(OptionError, match="'left' is none of none, excluded, included"):
        DictionaryInfo(padding="left")
    with pytest.raises(OptionError, match="context_length 0"):
        DictionaryInfo(context_length=0)
    with pytest.raises(SiteError, match="ambiguous"):
        DictionaryInfo(target="resid_post")


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> TracedModel:
    """Two layers of two heads, width 16, MLPs of 64."""
    return unchecked(random_gpt2())


def mirror(site: str, width: int) -> Dictionary:
    """The dictionary that gives back what it reads: x = max(x, 0) - max(-x, 0)."""
    one = torch.eye(width, dtype=torch.float64)
    both = torch.cat([one, -one])
    zeros = torch.zeros(2 * width), torch.zeros(width)
    info = DictionaryInfo(site=site)
    return Dictionary(both.T, zeros[0], both, zeros[1], apply_b_dec_to_input=False, info=info)


@pytest.mark.parametrize(
    ("site", "width"),
    [
        ("blocks.1.hook_resid_pre", 16),
        ("embed", 16),
        ("blocks.0.hook_mlp_out", 16),
        ("mlp_post.1", 64),
        ("blocks.1.attn.hook_z", 16),
        ("z.1.h1", 8),
        ("q.0", 16),
    ],
)
def test_a_dictionary_in_its_place_changes_nothing(
    model: TracedModel, site: str, width: int
) -> None:
    """What the mirror gives for a site's value, put there, leaves the logits as they were."""
    d = mirror(site, width)
    assert d.check_for(model) == []
    place = d.info.reads
    assert place is not None
    run = model.run([[1, 2, 3, 4], [5, 6, 7, 8]], read=[place])
    value = run[place]
    written = d(value.reshape(*value.shape[:2], width)).detach().view_as(value)
    torch.testing.assert_close(written, value, rtol=0, atol=0)
    again = model.run(run.tokens, write={place: written})
    torch.testing.assert_close(again.logits, run.logits, rtol=1e-12, atol=1e-12)
    moved = model.run(run.tokens, write={place: written + 0.1 * written.abs()})
    assert float((moved.logits - run.logits).abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("site", "width", "says"),
    [
        ("resid_post.2", 16, "layers run from 0 to 1"),
        ("z.0.h2", 8, "heads run from 0 to 1"),
        ("resid_post.1", 12, "has 16 numbers, and the dictionary reads 12"),
        ("z.1.h0", 16, "has 8 numbers, and the dictionary reads 16"),
        ("mlp_post.0", 16, "has 64 numbers"),
    ],
)
def test_a_dictionary_of_another_model_is_refused(
    model: TracedModel, site: str, width: int, says: str
) -> None:
    """A site that is not there, or of another width, is named with what there is."""
    with pytest.raises(SiteError, match=re.escape(says)):
        mirror(site, width).check_for(model)


def test_transcoders_are_checked_at_both_ends(model: TracedModel) -> None:
    """What it reads and what it writes must fit; a target that is not known is not checked."""
    info = DictionaryInfo(site="mlp_in.0", target="mlp_post.0")
    d = oracles.random_dictionary(form="transcoder", d_in=16, info=info)
    with pytest.raises(SiteError, match=r"site mlp_post.0 .* the dictionary writes 18"):
        d.check_for(model)
    d.info = DictionaryInfo(site="mlp_in.0")
    assert d.check_for(model) == []
    d.info = DictionaryInfo()
    with pytest.raises(SiteError, match="does not say which site it reads; set"):
        d.check_for(model)


def test_parallel_blocks_have_no_middle() -> None:
    """A site that an architecture lacks is refused as everywhere else."""
    module = random_gpt2()
    architecture = replace(unchecked(module).architecture, parallel=True)
    with pytest.raises(SiteError, match="run in parallel"):
        mirror("resid_mid.0", 16).check_for(TracedModel(module, None, architecture, name="toy"))


def test_differences_from_the_training_are_told(model: TracedModel) -> None:
    """Each fact that both sides state and that differs gives a warning; longer prompts too."""
    trained = DictionaryInfo(
        site="resid_post.1",
        model="toy",
        context_length=8,
        data_digest="aa",
        padding="excluded",
        bos=True,
        training={"model_from_pretrained_kwargs": {"center_writing_weights": False}},
    )
    d = mirror("resid_post.1", 16)
    d.info = trained
    assert d.check_for(model) == []
    assert d.check_for(model, DictionaryInfo(context_length=8, padding="excluded")) == []
    changes: list[tuple[dict[str, Any], str]] = [
        ({"context_length": 9}, "trained on 8 tokens per prompt and is used on 9"),
        ({"data_digest": "bb"}, "another digest of the data: aa, and is used with bb"),
        ({"padding": "included"}, "another treatment of padding: excluded"),
        ({"bos": False}, "another beginning-of-sequence token: True"),
        ({"model": "gpt2"}, "another model: toy, and is used with gpt2"),
    ]
    for change, says in changes:
        [warning] = d.check_for(model, DictionaryInfo(**change))
        assert says in warning
    everything = DictionaryInfo(**{name: value for c, _ in changes for name, value in c.items()})
    assert len(d.check_for(model, everything)) == len(changes)
    with pytest.raises(SiteError, match=r"trained with site resid_post.1 and is used with resid_p"):
        d.check_for(model, DictionaryInfo(site="resid_post.0"))
    d.info = replace(trained, model="other", revision="abc")
    assert len(d.check_for(model)) == 1
    d.info = replace(
        trained, training={"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    )
    [warning] = d.check_for(model)
    assert "whose weights were processed (center_writing_weights)" in warning
    d.info = replace(trained, training={"model_from_pretrained_kwargs": ["of", "a", "stranger"]})
    assert d.check_for(model) == []


def test_padding_takes_no_part(model: TracedModel) -> None:
    """A left-padded prompt has the latents that it has alone."""
    d = mirror("resid_post.1", 16)
    site = Site("resid_post", 1)
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    padded = Tokens(ids, torch.tensor([[False, False, True, True], [True] * 4]))
    both = d.encode(model.run(padded, read=[site])[site])
    alone = d.encode(model.run([[3, 4]], read=[site])[site])
    torch.testing.assert_close(both[0, 2:], alone[0], rtol=1e-10, atol=1e-10)
