"""Directions of matched length and the centres they start from, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.pushes.directions import (
    CENTRES,
    centres,
    directions,
    perpendicular,
    stream_activations,
)
from circuitlab_activation_plateaus.pushes.families import FAMILIES, Pool
from dictionary_oracles import all_by_loops, random_dictionary
from families import traced, unchecked
from oracles import random_gpt2
from random_tasks import random_task
from torch import Tensor

from circuitlab import Dictionary, OptionError, Site, TaskError, TracedModel

SITE = Site("resid_pre", 1)
WIDTH = 16


@pytest.fixture(scope="module")
def model() -> TracedModel:
    """A random GPT-2 of two layers, float64."""
    return unchecked(random_gpt2())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def orthogonal(n: int = WIDTH) -> Dictionary:
    """An autoencoder whose decoder rows are orthogonal, so that what it wrote can be read back."""
    rows = torch.linalg.qr(normal(n, n, seed=7)).Q
    lengths = 1 + torch.arange(n).double()
    return Dictionary(
        (rows / lengths[:, None]).T.contiguous(),
        -0.02 * torch.ones(n).double(),
        rows * lengths[:, None],
        torch.full((n,), 0.5).double(),
        apply_b_dec_to_input=True,
    )


def written(dictionary: Dictionary, values: Tensor) -> Tensor:
    """Length of what each latent wrote, ``[n_rows, n]``, from sums of orthogonal decoder rows."""
    rows = dictionary.W_d.detach()
    return (values - dictionary.b_d.detach()) @ (rows / rows.norm(dim=-1, keepdim=True)).T


def pool(model: TracedModel, activations: Tensor | None = None, **more: Any) -> Pool:
    return Pool(model, SITE, 3 + normal(60, WIDTH) if activations is None else activations, **more)


@pytest.mark.parametrize("suffix", ["", "-perp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_matched(model: TracedModel, name: str, suffix: str) -> None:
    """Every direction has length 1, with ``-perp`` it is perpendicular to its base, and seeded."""
    source = pool(
        model, dictionary=random_dictionary(d_in=WIDTH, n=24), task=random_task([5, 6, 7])
    )
    base = 30 * normal(40, WIDTH, seed=2)
    found = directions(name + suffix, source, base, seeded())
    assert torch.allclose(found.norm(dim=-1), torch.ones(40).double(), atol=1e-12)
    cosine = torch.cosine_similarity(found, base, dim=-1)
    assert (float(cosine.abs().max()) < 1e-12) == bool(suffix)
    assert torch.equal(found, directions(name + suffix, source, base, seeded()))


def test_perpendicular_variant_is_the_same_draw_without_its_shrinkage(model: TracedModel) -> None:
    """``towards-real`` mostly shrinks a long base; its ``-perp`` is what is left of the draw."""
    source, base = pool(model), 40 * normal(30, WIDTH, seed=3)
    plain = directions("towards-real", source, base, seeded(5))
    left = directions("towards-real-perp", source, base, seeded(5))
    assert float(torch.cosine_similarity(plain, base, dim=-1).mean()) < -0.95
    unit = base / base.norm(dim=-1, keepdim=True)
    rest = torch.stack([p - (p @ u) * u for p, u in zip(plain, unit, strict=True)])
    torch.testing.assert_close(left, rest / rest.norm(dim=-1, keepdim=True))


def test_perpendicular_to_nothing_changes_nothing() -> None:
    """A base of 0 takes nothing away."""
    vectors = normal(3, WIDTH)
    assert torch.equal(perpendicular(vectors, torch.zeros_like(vectors)), vectors)


def test_direction_along_its_base_has_no_perpendicular_part(model: TracedModel) -> None:
    """Activations that are multiples of one vector leave nothing, which is refused, not scaled."""
    line = torch.arange(1, 9).double()[:, None] * normal(1, WIDTH)
    source = pool(model, line)
    assert len(directions("towards-real", source, line[:3], seeded())) == 3
    with pytest.raises(OptionError, match="lies along its base"):
        directions("towards-real-perp", source, line[:3], seeded())


def test_names_that_are_unknown_are_refused(model: TracedModel) -> None:
    """The message lists what there is."""
    base = normal(2, WIDTH)
    with pytest.raises(OptionError, match="'random' is unknown; use iso, cov"):
        directions("random", pool(model), base, seeded())
    with pytest.raises(OptionError, match="'mean' is unknown; use real, gaussian"):
        centres("mean", pool(model), base, seeded())


def test_real_centres_are_the_real_ones(model: TracedModel) -> None:
    """Nothing is drawn."""
    real = normal(4, WIDTH)
    assert torch.equal(centres("real", pool(model), real, seeded()), real)


def test_gaussian_centres_have_mean_and_covariance(model: TracedModel) -> None:
    """Mean and covariance are those of the activations, and no two rows are the same."""
    activations = 5 + normal(200, WIDTH) @ normal(WIDTH, WIDTH, seed=4)
    real = torch.zeros(100_000, WIDTH, dtype=torch.float64)
    found = centres("gaussian", pool(model, activations), real, seeded(1))
    expected = torch.cov(activations.T)
    spread = expected.diagonal()
    error = 5.5 * (2 * spread[:, None] * spread / len(real)).sqrt()
    assert bool(((torch.cov(found.T) - expected).abs() < error).all())
    means = (found.mean(0) - activations.mean(0)).abs()
    assert bool((means < 5 * (spread / len(real)).sqrt()).all())
    assert float(torch.pdist(found[:50]).min()) > 0.1


def test_bag_has_as_many_latents_and_lengths_as_a_real_activation(model: TracedModel) -> None:
    """Sorted lengths of what latents write are a real activation's; which latents are not."""
    dictionary = orthogonal()
    source = pool(model, 2 * normal(20, WIDTH, seed=6), dictionary=dictionary)
    latents, _ = all_by_loops(dictionary, source.activations)
    lengths = latents * dictionary.W_d.detach().norm(dim=-1)
    bag = written(dictionary, centres("dictionary-bag", source, normal(60, WIDTH), seeded()))
    ordered = [part.sort(-1).values for part in (bag, lengths)]
    apart = (ordered[0][:, None] - ordered[1]).abs().amax(-1)
    assert float(apart.min(1).values.max()) < 1e-9
    patterns = {tuple((row > 1e-9).tolist()) for row in bag}
    assert not patterns <= {tuple((row > 1e-9).tolist()) for row in lengths}
    assert len(set(apart.argmin(1).tolist())) > 10


def test_bag_holds_no_dead_latent(model: TracedModel) -> None:
    """Latents that are active on no activation are in no bag, though others take their place."""
    dictionary = orthogonal()
    with torch.no_grad():
        dictionary.b_e[10:] -= 1000
    source = pool(model, 2 * normal(20, WIDTH, seed=6), dictionary=dictionary)
    bag = written(dictionary, centres("dictionary-bag", source, normal(200, WIDTH), seeded()))
    used = (bag > 1e-9).any(0)
    assert used[:10].all()
    assert not used[10:].any()


def test_structured_centres_keep_which_latents_occur_together(model: TracedModel) -> None:
    """Latents are those of one real activation; each has a value that it takes somewhere."""
    dictionary = orthogonal()
    source = pool(model, 2 * normal(20, WIDTH, seed=6), dictionary=dictionary)
    latents, _ = all_by_loops(dictionary, source.activations)
    found = centres("dictionary-structured", source, normal(80, WIDTH), seeded())
    values = written(dictionary, found) / dictionary.W_d.detach().norm(dim=-1)
    patterns = {tuple((row > 1e-9).tolist()) for row in latents}
    own = [tuple((row > 1e-9).tolist()) for row in values]
    assert set(own) <= patterns
    assert len(set(own)) > 10
    mixed = 0
    for row in values:
        for latent in (row > 1e-9).nonzero()[:, 0].tolist():
            assert float((latents[:, latent] - row[latent]).abs().min()) < 1e-9
        mixed += float((latents - row).abs().amax(-1).min()) > 1e-6
    # Were values those of the activation itself, centres would be reconstructions.
    assert mixed > 70


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
def test_centres_of_every_kind_of_dictionary(model: TracedModel, kind: str) -> None:
    """Centres are finite, seeded, of the base's type, and differ from row to row."""
    dictionary = random_dictionary(kind, d_in=WIDTH, n=24, dtype=torch.float32)
    source = pool(model, normal(40, WIDTH).float(), dictionary=dictionary)
    real = normal(5, WIDTH, seed=2).float()
    for name in CENTRES:
        one, two = (centres(name, source, real, seeded(3)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.dtype == real.dtype
        assert bool(one.isfinite().all())
        assert float(torch.pdist(one).min()) > 0


def test_silent_dictionary_has_no_centres(model: TracedModel) -> None:
    """A dictionary that is active nowhere is refused for both kinds."""
    dictionary = orthogonal()
    with torch.no_grad():
        dictionary.b_e -= 1000
    for kind in ("dictionary-bag", "dictionary-structured"):
        with pytest.raises(OptionError, match="no latent"):
            centres(kind, pool(model, dictionary=dictionary), normal(2, WIDTH), seeded())


def test_stream_activations_take_each_prefix_once() -> None:
    """Each prefix of two tokens or more stands for itself once, whatever the padding."""
    module = random_gpt2(dtype=torch.float32)
    model = traced(module)
    prompts = [[1, 2, 3, 4], [1, 2, 9], [5], [1, 2, 3, 7, 8], [5, 6]]
    prefixes = [(1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 9), (1, 2, 3, 7), (1, 2, 3, 7, 8), (5, 6)]
    expected = []
    for prefix in prefixes:
        with torch.no_grad():
            states = module(torch.tensor([prefix]), output_hidden_states=True).hidden_states
        expected.append(states[1][0, -1])
    batches = [model.tokens(prompts[:2]), model.tokens(prompts[2:])]
    found = stream_activations(model, batches, SITE)
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_prompts_of_one_token_have_no_activations(model: TracedModel) -> None:
    """There is nothing behind the first position, and the message says so."""
    with pytest.raises(TaskError, match="second token"):
        stream_activations(model, [model.tokens([[1], [2]])], SITE)
