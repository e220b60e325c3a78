"""Copying heads: eigenvalues and first choices against full tables over the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import circuitlab_attention_heads.copying as module_under_test
import pytest
import torch
from circuitlab_attention_heads.copying import Copying, copied_share, copying
from composition_oracles import dense_gpt2
from oracles import random_gpt2
from torch import Tensor

from circuitlab import OptionError, TracedModel, load_model

VOCAB = 40
HEADS = [(layer, head) for layer in range(2) for head in range(2)]


def gpt2(**settings: Any) -> tuple[Any, TracedModel]:
    module = random_gpt2(vocab=VOCAB, **settings).requires_grad_(False)
    return module, load_model((module, None))


def full_circuits(module: Any) -> list[Tensor]:
    """W_E W_OV W_U of each head, ``[vocab, vocab]``, each row's mean taken off."""
    final, d_model = module.transformer.ln_f, module.config.n_embd
    embed, unembed = module.transformer.wte.weight.double(), module.lm_head.weight.double().T
    if hasattr(final, "weight"):
        unembed = final.weight.double()[:, None] * unembed
        unembed = unembed - unembed.mean(0, keepdim=True)
    assert unembed.shape == (d_model, VOCAB)
    unembed = unembed - unembed.mean(1, keepdim=True)
    return [embed @ ov @ unembed for ov in dense_gpt2(module)["ov"]]


def by_size(values: Tensor) -> Tensor:
    """Eigenvalues, largest first; of a conjugate couple the upper one."""
    return torch.stack(sorted(values, key=lambda v: (-round(float(v.abs()), 9), -float(v.imag))))


# --- eigenvalues ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [True, False], ids=["norms", "no-norms"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)], ids=["f64", "f32"]
)
def test_eigenvalues_are_those_of_the_full_circuit(
    layer_norm: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """d_head eigenvalues of a small product are all that V x V has but zeros."""
    module, model = gpt2(layer_norm=layer_norm, dtype=dtype)
    found = copying(model)
    for (layer, head), circuit in zip(HEADS, full_circuits(module), strict=True):
        every = by_size(torch.linalg.eigvals(circuit))
        assert bool((every[8:].abs() < 1e-6 * every[0].abs()).all())
        own = by_size(found.eigenvalues[layer, head])
        assert float((own - every[:8]).abs().max()) < tolerance * float(every[0].abs())
        score = float(every[:8].sum().real / every[:8].abs().sum())
        assert float(found.scores[layer, head]) == pytest.approx(score, abs=tolerance)


def test_parts_of_the_vocabulary_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are taken at once, the result is the same."""
    _, model = gpt2()
    whole, shares = copying(model), copied_share(model, HEADS, top=5)
    monkeypatch.setattr(module_under_test, "_TOKENS", 7)
    assert torch.allclose(copying(model).scores, whole.scores, rtol=0, atol=1e-12)
    assert torch.equal(copied_share(model, HEADS, top=5), shares)


def compiled(turn: Tensor) -> tuple[Any, TracedModel]:
    """One layer of heads of width 2; on two columns of the stream head 0 does ``x @ turn``.

    Embedding and unembedding are transposes of each other, with orthonormal columns of mean 0.
    """
    module: Any = random_gpt2(1, 8, 16, vocab=VOCAB, layer_norm=False).requires_grad_(False)
    columns = torch.randn(VOCAB, 16, dtype=torch.float64)
    embed = torch.linalg.qr(columns - columns.mean(0, keepdim=True))[0]
    module.transformer.wte.weight.copy_(embed)
    module.lm_head.weight.copy_(embed)
    attention = module.transformer.h[0].attn
    attention.c_attn.weight[:, 32:34] = torch.eye(16, 2, dtype=torch.float64)
    attention.c_proj.weight[:2] = turn @ torch.eye(2, 16, dtype=torch.float64)
    return module, load_model((module, None))


def of_first_head(found: Copying) -> float:
    return float(found.scores[0, 0])


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, 2.5, math.pi])
def test_a_rotation_copies_by_its_cosine(angle: float) -> None:
    """e^{±iθ} gives cos θ: 1 for a head that copies, -1 for one that suppresses."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    _, model = compiled(turn)
    found = copying(model)
    assert of_first_head(found) == pytest.approx(cos, abs=1e-12)
    assert torch.allclose(found.eigenvalues[0, 0].abs(), torch.ones(2).double(), atol=1e-12)


def test_size_does_not_matter_but_direction_does() -> None:
    """Three times an identity copies as an identity does; eigenvalues 3 and -1 give a half."""
    _, model = compiled(3 * torch.eye(2, dtype=torch.float64))
    assert of_first_head(copying(model)) == pytest.approx(1, abs=1e-12)
    _, model = compiled(torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64)))
    assert of_first_head(copying(model)) == pytest.approx(0.5, abs=1e-12)


def test_heads_that_reach_no_logit_have_no_score() -> None:
    """An idle head, and one that writes where nothing is unembedded, neither copy nor suppress."""
    module, model = compiled(torch.zeros(2, 2, dtype=torch.float64))
    assert math.isnan(of_first_head(copying(model)))
    module, model = compiled(torch.eye(2, dtype=torch.float64))
    hidden = torch.linalg.qr(torch.randn(16, 2, dtype=torch.float64))[0]
    module.transformer.h[0].attn.c_proj.weight[:2] = hidden.T
    module.lm_head.weight.sub_(module.lm_head.weight @ hidden @ hidden.T)
    found = copying(model)
    assert 0 < float(found.eigenvalues[0, 0].abs().max()) < 1e-12  # rounding
    assert math.isnan(of_first_head(found))
    assert int(found.scores.isfinite().sum()) == 7


# --- first choices --------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 5, VOCAB])
def test_copied_share_is_that_of_the_full_table(top: int) -> None:
    """A token is copied where fewer than ``top`` others get a logit as large as its own."""
    module, model = gpt2()
    found = copied_share(model, HEADS, top=top, n_tokens=VOCAB)
    for share, circuit in zip(found.tolist(), full_circuits(module), strict=True):
        ranks = (circuit >= circuit.diagonal()[:, None]).sum(1)
        assert share == pytest.approx(float((ranks <= top).double().mean()), abs=1e-12)


def test_copied_share_of_heads_that_copy_and_of_heads_that_do_not() -> None:
    """Any sample of tokens tells: an identity copies all, its negative and a silent head none."""
    for factor, share in ((1.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        turn = torch.eye(2, dtype=torch.float64) * factor
        module, _ = compiled(turn)
        # Tokens on a circle: each is its own nearest.
        angles = torch.arange(VOCAB, dtype=torch.float64) * 2 * math.pi / VOCAB
        circle = torch.stack([angles.cos(), angles.sin()], 1)
        for weight in (module.transformer.wte.weight, module.lm_head.weight):
            weight[:, :2] = circle
        model = load_model((module, None))
        for seed in (0, 1):
            found = copied_share(model, [(0, 0)], top=1, n_tokens=9, seed=seed)
            assert found.tolist() == [share]


def test_a_sample_is_drawn_by_its_seed() -> None:
    """The same seed gives the same share; some other seed another; no state is left behind."""
    _, model = gpt2()
    state = torch.get_rng_state()
    shares = [copied_share(model, HEADS, n_tokens=4, seed=seed).tolist() for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), state)
    assert shares[3] == copied_share(model, HEADS, n_tokens=4, seed=3).tolist()
    assert len({tuple(share) for share in shares}) > 1
    assert all((4 * value) % 1 == 0 for share in shares for value in share)


def test_options_are_checked() -> None:
    """No token, and no place among the first, are refused."""
    _, model = gpt2()
    with pytest.raises(OptionError, match="top 0"):
        copied_share(model, HEADS, top=0)
    with pytest.raises(OptionError, match="0 tokens"):
        copied_share(model, HEADS, n_tokens=0)
