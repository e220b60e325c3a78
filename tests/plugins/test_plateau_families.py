"""Direction families draw what they say: against brute force, covariances and full SVDs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.pushes.families import FAMILIES, Normal, Pool, reader_directions
from dictionary_oracles import all_by_loops, random_dictionary
from families import family_model, unchecked
from oracles import random_gpt2
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    DictionaryInfo,
    OptionError,
    Site,
    SiteError,
    TracedModel,
)

SITE = Site("resid_pre", 1)
WIDTH = 16


@pytest.fixture(scope="module")
def model() -> TracedModel:
    """A random GPT-2 of two layers, float64."""
    return unchecked(random_gpt2())


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pool(model: TracedModel, activations: Tensor | None = None, **more: Any) -> Pool:
    return Pool(model, SITE, 3 + normal(60, WIDTH) if activations is None else activations, **more)


def drawn(name: str, source: Pool, base: Tensor, seed: int = 0) -> Tensor:
    return FAMILIES[name](source, base, torch.Generator().manual_seed(seed))


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Of each row with each other, ``[n_rows, n_others]``."""
    units = [part / part.norm(dim=-1, keepdim=True) for part in (rows, others)]
    return units[0] @ units[1].T


def test_isotropic_directions_have_the_cosines_of_the_sphere(model: TracedModel) -> None:
    """E|cos| with a fixed vector is Γ(d/2) / (√π Γ((d+1)/2)), and E cos is 0."""
    n, vector = 40_000, normal(1, WIDTH, seed=3)
    found = cosines(drawn("iso", pool(model), vector.expand(n, -1)), vector)[:, 0]
    d = WIDTH
    expected = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    # cos² has mean 1/d, so four standard errors of either mean are below 4 / √(n d).
    assert float(found.abs().mean()) == pytest.approx(expected, abs=4 / math.sqrt(n * d))
    assert float(found.mean()) == pytest.approx(0, abs=4 / math.sqrt(n * d))


def test_naive_random_target_only_shrinks(model: TracedModel) -> None:
    """``randn - x`` has cosine -|x| / √(x² + d) with x, about -1; the families iso and cov do not.

    The baseline that Lee & Heimersheim 2024 (arXiv:2410.12555) found flawed.
    """
    base = 20 * normal(500, WIDTH, seed=5)
    naive = normal(500, WIDTH, seed=6) - base
    size = base.norm(dim=-1)
    expected = -(size / (size.square() + WIDTH).sqrt()).mean()
    cosine = torch.cosine_similarity(naive, base, dim=-1).mean()
    assert float(cosine) == pytest.approx(float(expected), abs=0.01)
    assert float(cosine) < -0.98
    for name in ("iso", "cov", "cov-mixture", "real-mixture"):
        own = torch.cosine_similarity(drawn(name, pool(model), base), base, dim=-1)
        assert abs(float(own.mean())) < 4 / math.sqrt(500)


@pytest.mark.parametrize("n", [400, 3])
def test_normal_has_mean_and_covariance_of_the_values(n: int) -> None:
    """Draws have the empirical mean and covariance, also of fewer values than dimensions."""
    mixing = normal(5, 5, seed=2)
    values = 4 + normal(n, 5) @ mixing
    expected = torch.cov(values.T)
    found = Normal.fit(values)
    torch.testing.assert_close(found.root.T @ found.root, expected)
    draws = found.sample(200_000, torch.Generator().manual_seed(1))
    spread = expected.diagonal()
    # var(sample covariance of i, j) = (s_ij² + s_ii s_jj) / n, at most 2 s_ii s_jj / n.
    error = 5 * (2 * spread[:, None] * spread / 200_000).sqrt() + 1e-9
    assert bool(((torch.cov(draws.T) - expected).abs() < error).all())
    assert bool(((draws.mean(0) - values.mean(0)).abs() < 5 * (spread / 200_000).sqrt()).all())


@pytest.mark.parametrize(("name", "times"), [("cov", 1), ("cov-mixture", 2)])
def test_covariance_families(model: TracedModel, name: str, times: int) -> None:
    """``cov`` has the covariance of the activations and no mean, ``cov-mixture`` twice that."""
    activations = 10 + normal(300, WIDTH) @ normal(WIDTH, WIDTH, seed=4)
    base = torch.zeros(100_000, WIDTH, dtype=torch.float64)
    found = drawn(name, pool(model, activations), base)
    expected = times * torch.cov(activations.T)
    spread = expected.diagonal()
    error = 5.5 * (2 * spread[:, None] * spread / len(base)).sqrt()
    assert bool(((torch.cov(found.T) - expected).abs() < error).all())
    assert bool((found.mean(0).abs() < 5 * (spread / len(base)).sqrt()).all())


@pytest.mark.parametrize("name", ["iso", "cov", "cov-mixture"])
def test_rows_share_no_draw(model: TracedModel, name: str) -> None:
    """Every row has numbers of its own: no two directions are alike, as one shared draw would be.

    The code beside Lee & Heimersheim 2024 draws once for the whole batch.
    """
    found = drawn(name, pool(model), torch.zeros(40, WIDTH, dtype=torch.float64))
    alike = cosines(found, found) - torch.eye(40, dtype=torch.float64)
    assert float(alike.abs().max()) < 0.95


def test_real_mixture_is_a_difference_of_two_activations(model: TracedModel) -> None:
    """Each direction is x_i - x_j of two different activations."""
    source = pool(model)
    every = (source.activations[:, None] - source.activations).flatten(0, 1)
    found = drawn("real-mixture", source, torch.zeros(50, WIDTH, dtype=torch.float64))
    assert float((found[:, None] - every).norm(dim=-1).min(1).values.max()) < 1e-12
    assert float(found.norm(dim=-1).min()) > 0.1


def test_towards_real_ends_at_an_activation_other_than_the_base(model: TracedModel) -> None:
    """Base plus direction is a real activation, and never the base, which is among them."""
    source = pool(model, 3 + normal(4, WIDTH))
    base = source.activations[torch.arange(80) % 4]
    found = drawn("towards-real", source, base)
    ends = base + found
    assert float((ends[:, None] - source.activations).norm(dim=-1).min(1).values.max()) < 1e-12
    assert float(found.norm(dim=-1).min()) > 0.1
    # It contains minus the base: on average it shrinks.
    assert float(torch.cosine_similarity(found, base, dim=-1).mean()) < -0.05


def test_pca_draws_leading_components(model: TracedModel) -> None:
    """Activations that vary along known axes give these axes, both signs, and no others."""
    axes = torch.linalg.qr(normal(WIDTH, WIDTH, seed=8)).Q[:3]
    source = pool(model, 7 + normal(200, 3) * torch.tensor([5.0, 3.0, 2.0]).double() @ axes)
    found = drawn("pca", source, torch.zeros(200, WIDTH, dtype=torch.float64))
    _, vectors = torch.linalg.eigh(torch.cov(source.activations.T))
    close = cosines(found, vectors[:, -3:].T)
    assert torch.allclose(close.abs().max(1).values, torch.ones(200).double(), atol=1e-9)
    seen = {(int(row.abs().argmax()), bool(row.sum() > 0)) for row in close}
    assert len(seen) == 6


def test_dictionary_rows_are_those_of_live_latents(model: TracedModel) -> None:
    """Every direction is a decoder row, each live latent occurs, and no dead one."""
    dictionary = random_dictionary("topk", d_in=WIDTH, n=40)
    with torch.no_grad():
        dictionary.b_e[20:] -= 1000
    source = pool(model, dictionary=dictionary)
    latents, _ = all_by_loops(dictionary, source.activations)
    alive = (latents > 0).any(0).nonzero()[:, 0].tolist()
    assert 3 < len(alive) <= 20
    found = drawn("dictionary", source, torch.zeros(2000, WIDTH, dtype=torch.float64))
    apart = (found[:, None] - dictionary.W_d.detach()).norm(dim=-1)
    assert float(apart.min(1).values.max()) == 0
    assert set(apart.argmin(1).tolist()) == set(alive)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
def test_dictionary_error_is_reconstruction_less_base(model: TracedModel, kind: str) -> None:
    """The direction is what the dictionary's definition, in loops, gives, less the base."""
    dictionary = random_dictionary(kind, d_in=WIDTH, n=24)
    source = pool(model, dictionary=dictionary)
    base = normal(6, WIDTH, seed=9)
    _, written = all_by_loops(dictionary, base)
    torch.testing.assert_close(drawn("dictionary-error", source, base), written - base)


def test_mean_difference_is_corrupt_less_clean(model: TracedModel) -> None:
    """The same for all rows: the mean change of the last position, prompt by prompt."""
    task = random_task([5, 6, 7])
    source = pool(model, task=task)
    changes = []
    for pair in task.pairs:
        sides = (
            model.run([prompt], read=[SITE])[SITE][0, -1] for prompt in (pair.corrupt, pair.clean)
        )
        corrupt, clean = sides
        changes.append(corrupt - clean)
    found = drawn("mean-difference", source, torch.zeros(4, WIDTH, dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack(changes).mean(0).expand(4, -1))


def singular(matrix: Tensor, n: int = 4, side: str = "left") -> list[Tensor]:
    """Leading singular directions by a full SVD."""
    u, _, vh = torch.linalg.svd(matrix)
    return list((u.T if side == "left" else vh)[:n])


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_weight_svd_of_heads_and_mlp(model: TracedModel, family: str) -> None:
    """Directions are those of dense products of the folded weights, up to sign."""
    traced = model if family == "gpt2" else family_model(family)
    layer = 1
    head = traced.weights.folded(layer, torch.float64)
    expected = []
    for h in range(traced.n_heads):
        expected += singular(head.q[h] @ head.k[h].T)
        expected += singular(head.q[h] @ head.k[h].T, side="right")
        expected += singular(head.v[h] @ head.o[h])
    mlp = traced.weights.mlp(layer, torch.float64)
    expected += singular(mlp.w_in)
    expected += [] if mlp.gate is None else singular(mlp.gate)
    close = cosines(reader_directions(traced, SITE), torch.stack(expected)).abs()
    assert close.shape[0] == close.shape[1]
    assert float((close.max(0).values - 1).abs().max()) < 1e-6
    assert float((close.max(1).values - 1).abs().max()) < 1e-6


def test_weight_svd_behind_the_last_block_and_in_the_middle(model: TracedModel) -> None:
    """Behind the last block the unembedding reads; between attention and MLP the MLP alone."""
    unembedding = torch.stack(singular(model.weights.unembedding(torch.float64)[0]))
    mlp = torch.stack(singular(model.weights.mlp(1, torch.float64).w_in))
    for kind, layer, expected in (
        ("resid_post", 1, unembedding),
        ("mlp_out", 1, unembedding),
        ("resid_mid", 1, mlp),
        ("attn_out", 1, mlp),
    ):
        found = reader_directions(model, Site(kind, layer))
        assert torch.allclose(cosines(found, expected).abs(), torch.eye(4).double(), atol=1e-7)
    same = (reader_directions(model, Site(*at)) for at in (("resid_post", 0), ("resid_pre", 1)))
    assert torch.equal(*same)


def test_weight_svd_draws_only_those_directions(model: TracedModel) -> None:
    """The family draws among them, with both signs."""
    source = pool(model)
    found = drawn("weight-svd", source, torch.zeros(400, WIDTH, dtype=torch.float64))
    close = cosines(found, reader_directions(model, SITE))
    assert float((close.abs().max(1).values - 1).abs().max()) < 1e-12
    assert {bool(row[row.abs().argmax()] > 0) for row in close} == {True, False}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_seed_gives_the_same_directions(model: TracedModel, name: str) -> None:
    """A generator decides everything, and every family has the base's shape and type."""
    source = pool(
        model,
        (3 + normal(60, WIDTH)).float(),
        dictionary=random_dictionary(d_in=WIDTH, n=24, dtype=torch.float32),
        task=random_task([5, 6]),
    )
    base = normal(7, WIDTH, seed=2).float()
    one, two = (drawn(name, source, base, seed=4) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == base.shape
    assert one.dtype == base.dtype


def refusal(name: str, source: Pool) -> str:
    with pytest.raises((OptionError, SiteError)) as caught:
        drawn(name, source, torch.ones(2, WIDTH, dtype=torch.float64))
    return str(caught.value)


def test_what_is_missing_is_named(model: TracedModel) -> None:
    """A family without its dictionary or its task is refused, as is a dictionary of elsewhere."""
    assert "--dictionary" in refusal("dictionary", pool(model))
    assert "needs a task" in refusal("mean-difference", pool(model))
    transcoder = random_dictionary(form="transcoder", d_in=WIDTH)
    assert "transcoder" in refusal("dictionary", pool(model, dictionary=transcoder))
    narrow = random_dictionary(d_in=5)
    assert "reads 5 numbers" in refusal("dictionary-error", pool(model, dictionary=narrow))
    other = random_dictionary(d_in=WIDTH, info=DictionaryInfo(site="resid_post.1"))
    assert "reads resid_post.1" in refusal("dictionary", pool(model, dictionary=other))
    same = random_dictionary(d_in=WIDTH, info=DictionaryInfo(site="resid_post.0"))
    assert len(drawn("dictionary", pool(model, dictionary=same), normal(2, WIDTH))) == 2
    with pytest.raises(OptionError, match="no readers of z"):
        reader_directions(model, Site("z", 0))


def test_directions_that_do_not_exist_are_refused(model: TracedModel) -> None:
    """Equal activations, a silent dictionary and one without error have no directions."""
    same = torch.ones(5, WIDTH, dtype=torch.float64)
    for name in ("real-mixture", "towards-real", "pca", "cov"):
        assert "too much alike" in refusal(name, pool(model, same))
    silent = random_dictionary(d_in=WIDTH, n=8)
    with torch.no_grad():
        silent.b_e -= 1000
    assert "no latent" in refusal("dictionary", pool(model, dictionary=silent))
    with torch.no_grad():
        silent.b_d.copy_(torch.ones(WIDTH))
    assert "error is 0" in refusal("dictionary-error", pool(model, dictionary=silent))
    with pytest.raises(OptionError, match="1 activations have no covariance"):
        Normal.fit(same[:1])


def test_model_that_reads_nothing_has_no_singular_directions() -> None:
    """A block whose weights are 0 is refused by name, not divided by."""
    module: Any = random_gpt2(1)
    with torch.no_grad():
        for parameter in module.transformer.h[0].parameters():
            parameter.zero_()
    with pytest.raises(OptionError, match="nothing reads"):
        reader_directions(unchecked(module), Site("resid_pre", 0))
