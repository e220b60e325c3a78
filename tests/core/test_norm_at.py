"""The norm that reads a site, weights without gains of norms behind, and which keys are seen."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import family_model
from oracles import random_gpt2
from torch import nn

from circuitlab import Site, SiteError, TracedModel, load_model

#: Family, site, path of its norm in a block (empty: none), what the norm adds to its weight.
NORMS = [
    ("gpt2", "resid_pre", "ln_1", 0),
    ("gpt2", "mlp_in", "ln_2", 0),
    ("gpt2", "z", "", 0),
    ("llama", "mlp_in", "post_attention_layernorm", 0),
    ("llama", "q", "", 0),
    ("llama", "mlp_post", "", 0),
    ("qwen3", "q", "self_attn.q_norm", 0),
    ("qwen3", "k", "self_attn.k_norm", 0),
    ("gemma2", "mlp_in", "pre_feedforward_layernorm", 1),
    ("gemma2", "z", "post_attention_layernorm", 1),
    ("gemma3", "k", "self_attn.k_norm", 1),
    ("gemma3", "mlp_post", "post_feedforward_layernorm", 1),
    ("olmo2", "resid_pre", "", 0),
    ("olmo2", "k", "self_attn.k_norm", 0),
    ("olmo2", "mlp_post", "post_feedforward_layernorm", 0),
]


@cache
def model_of(family: str) -> TracedModel:
    return load_model((random_gpt2(), None)) if family == "gpt2" else family_model(family)


@pytest.mark.parametrize(("family", "kind", "path", "more"), NORMS)
def test_norms_are_those_of_the_modules(family: str, kind: str, path: str, more: int) -> None:
    """Gain, shift and small number are the module's own; where there is none, it does nothing."""
    model = model_of(family)
    norm = model.weights.norm_at(Site(kind, 1))
    if not path:
        assert (norm.scaled, norm.centred, norm.epsilon) == (False, False, 0)
        assert torch.equal(norm.gain, torch.ones(4 if kind in ("q", "k") else 16).double())
        return
    block = model.architecture.block(1, path)
    module: Any = model._module.get_submodule(block)
    assert torch.equal(norm.gain, module.weight.double() + more)
    shift = module.bias if isinstance(module, nn.LayerNorm) else torch.zeros(len(norm.gain))
    assert torch.equal(norm.shift, shift.double())
    assert (norm.scaled, norm.centred) == (True, family == "gpt2")
    named = {name: getattr(module, name, None) for name in ("eps", "variance_epsilon")}
    (epsilon,) = {value for value in named.values() if value is not None}
    assert norm.epsilon == pytest.approx(epsilon, rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2", "qwen3", "llama"])
def test_gains_of_norms_behind_can_be_left_out(family: str) -> None:
    """Times the gain, unfolded weights are the folded; what is written is the stored weight."""
    weights = model_of(family).weights
    plain, folded = (weights.folded(1, torch.float64, behind=behind) for behind in (False, True))
    n_heads, _, d_head = plain.q.shape
    for kind in ("q", "k"):
        gain = weights.norm_at(Site(kind, 1)).gain.view(-1, 1, d_head)
        gain = gain.repeat_interleave(n_heads // len(gain), 0)
        torch.testing.assert_close(getattr(plain, kind) * gain, getattr(folded, kind))
        bias = f"{kind}_bias"
        torch.testing.assert_close(getattr(plain, bias) * gain[:, 0], getattr(folded, bias))
    assert torch.equal(plain.v, folded.v)
    assert torch.equal(plain.o, weights.heads(1, "o").double())
    torch.testing.assert_close(plain.o * weights.norm_at(Site("z", 1)).gain, folded.o)
    mlps = [weights.mlp(1, torch.float64, behind=behind) for behind in (False, True)]
    (stored,) = weights.reading(Site("mlp_post", 1))
    assert torch.equal(mlps[0].w_out, stored)
    gain = weights.norm_at(Site("mlp_post", 1)).gain
    torch.testing.assert_close(mlps[0].w_out * gain, mlps[1].w_out)
    torch.testing.assert_close(mlps[0].b_out * gain, mlps[1].b_out)


@pytest.mark.parametrize("site", [Site("v", 1), Site("attn_out", 0), Site("mlp_in", 2)])
def test_other_sites_are_refused(site: Site) -> None:
    """Sites that no norm reads, and layers that are not there."""
    with pytest.raises(SiteError, match=str(site).replace(".", r"\.")):
        model_of("llama").weights.norm_at(site)


@pytest.mark.parametrize(("family", "layer", "window"), [("gemma2", 0, 3), ("gemma2", 1, 9)])
def test_queries_see_what_a_loop_says(family: str, layer: int, window: int) -> None:
    """Real keys that are not later and not beyond the window; and each position itself."""
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    seen = model_of(family).attention.seen(layer, mask)
    assert seen.shape == (2, 1, 5, 5)
    for row in range(2):
        for q in range(5):
            for k in range(5):
                expected = q == k or (k < q and q - k < window and bool(mask[row, k]))
                assert bool(seen[row, 0, q, k]) == expected
