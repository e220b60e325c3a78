"""Baselines find what is planted: clusters, axes, independent sources; the probe meets its form."""

from __future__ import annotations

import math

import pytest
import torch
from circuitlab_feature_interactions.baselines import ica, k_means, pca, random_directions
from circuitlab_feature_interactions.probing import probe_model, xor_probe
from torch import Tensor

from circuitlab import OptionError, Site, load_model, zoo
from circuitlab.zoo.summing import compile_interference
from circuitlab.zoo.superposition import Interference, interference_prompt


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def r2(x: Tensor, reconstruction: Tensor) -> float:
    missed = (x.double() - reconstruction.double()).square().sum()
    return float(1 - missed / (x.double() - x.double().mean(0)).square().sum())


def test_k_means_finds_planted_clusters() -> None:
    """Of 6 tight clusters far apart every centre is found."""
    g = generator()
    centres = 10 * torch.randn(6, 5, generator=g)
    x = centres.repeat(50, 1) + 0.01 * torch.randn(300, 5, generator=g)
    found = k_means(x, 6, g)
    assert torch.cdist(centres.double(), found.centres[0]).min(1).values.max() < 0.01
    assert r2(x, found.reconstruct(x)) > 0.9999


def test_stages_of_k_means_explain_sums_of_clusters() -> None:
    """Two stages give a sum of two planted codes, of which one stage explains only a part."""
    g = generator(1)
    large, small = 20 * torch.eye(4, 8), torch.eye(4, 8).flip(1)
    x = (large[:, None] + small[None]).reshape(16, 8).repeat(20, 1)
    assert r2(x, k_means(x, 4, g).reconstruct(x)) < 0.9999
    assert r2(x, k_means(x, 4, g, stages=2).reconstruct(x)) == pytest.approx(1, abs=1e-9)


def test_one_cluster_is_the_mean() -> None:
    """It explains nothing: centred R² is 0."""
    x = torch.randn(40, 3, generator=generator()) + 5
    assert r2(x, k_means(x, 1, generator()).reconstruct(x)) == pytest.approx(0, abs=1e-9)


def test_pca_keeps_the_largest_scores() -> None:
    """With k of d it is the k scores largest in size; with all of them exact."""
    x = torch.randn(200, 6, generator=generator()) @ torch.diag(
        torch.tensor([3.0, 2, 1, 1, 1, 0.5])
    )
    x = x + 7
    centred = x.double() - x.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ axes.T
    keep = torch.zeros_like(scores).scatter(1, scores.abs().topk(2, 1).indices, 1.0)
    wanted = (scores * keep) @ axes + x.double().mean(0)
    assert torch.allclose(pca(x, 2)(x).double(), wanted, atol=1e-4)
    assert torch.allclose(pca(x, 6)(x), x, atol=1e-4)
    assert (pca(x, 2).encode(x) > 0).sum(1).max() == 2


def test_ica_finds_independent_sources_that_pca_mixes() -> None:
    """Of sparse sources, mixed at random, every direction is found; principal axes are others."""
    g = generator(2)
    n, d = 20_000, 6
    sources = (torch.rand(n, d, generator=g) < 0.1).float() * torch.rand(n, d, generator=g)
    mixing = torch.randn(d, d, generator=g)
    x = sources @ mixing + 3
    true = mixing / mixing.norm(dim=1, keepdim=True)
    assert (true @ ica(x, 2, g).W_d.T).max(1).values.min() > 0.99
    assert (true @ pca(x, 2).W_d.T).max(1).values.min() < 0.95


def test_flat_directions_are_left_out() -> None:
    """Activations in 2 of 5 dimensions have 2 components, each with both signs."""
    x = torch.randn(100, 2, generator=generator()) @ torch.randn(2, 5, generator=generator(1))
    assert pca(x, 1).n == ica(x, 1, generator()).n == 4


def test_random_directions_are_matched() -> None:
    """They have norm 1, as many latents and as many active ones as asked."""
    x = torch.randn(50, 8, generator=generator())
    found = random_directions(x, 32, 3, generator())
    assert torch.allclose(found.W_d.norm(dim=1), torch.ones(32))
    assert found.n == 32
    assert (found.encode(x) > 0).sum(1).max() == 3


def test_baselines_refuse_what_cannot_be() -> None:
    """No variation, no active direction, and more clusters than tokens are refused."""
    with pytest.raises(OptionError, match="do not vary"):
        pca(torch.ones(10, 3), 1)
    with pytest.raises(OptionError, match="cannot be"):
        pca(torch.randn(10, 3), 0)
    with pytest.raises(OptionError, match="at most as many clusters"):
        k_means(torch.randn(3, 2), 4, generator())


@pytest.mark.parametrize(("epsilon", "noise"), [(0.2, 0.05), (0.6, 0.02)])
def test_probe_of_the_model_meets_the_closed_form(epsilon: float, noise: float) -> None:
    """d′ and cosine of hand-interference's streams are those of its formulas."""
    setting = Interference(epsilon, noise)
    model = load_model((compile_interference(setting), zoo.load("hand-interference")[1]))
    states = [
        (a, b, (i, j, k))
        for a in (False, True)
        for b in (False, True)
        for i in (1, -1)
        for j in (1, -1)
        for k in (1, -1)
    ]
    found = probe_model(
        model,
        [interference_prompt(*state) for state in states],
        [state[0] for state in states],
        [state[1] for state in states],
        Site("resid_post", 0),
    )
    assert found.d_prime == pytest.approx(setting.d_prime, rel=5e-3)
    assert found.cosine == pytest.approx(setting.cosine, abs=1e-3)
    assert found.accuracy > 0.7


def test_probe_finds_no_xor_where_there_is_none() -> None:
    """Of A u + B v with noise, the classes have the same mean: d′ near 0."""
    g = generator(3)
    a, b = (torch.rand(20_000, generator=g) < 0.5 for _ in range(2))
    x = torch.stack([a.float(), b.float(), torch.zeros(20_000)], 1)
    found = xor_probe(x + 0.3 * torch.randn(20_000, 3, generator=g), a.tolist(), b.tolist())
    assert found.d_prime < 0.05
    assert found.cosine > 0.99
    assert math.isclose(found.accuracy, 0.5, abs_tol=0.02)


def test_probe_refuses_missing_states() -> None:
    """All four states must occur, and labels must be as many as activations."""
    with pytest.raises(OptionError, match="does not occur"):
        xor_probe(torch.randn(2, 3), [True, False], [True, True])
    with pytest.raises(OptionError, match="give as many"):
        xor_probe(torch.randn(2, 3), [True], [True])
