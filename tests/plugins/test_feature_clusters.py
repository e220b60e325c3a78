"""Clusters of latents: phi by hand, planted circuits found, and the adjusted Rand index."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from circuitlab_feature_interactions.clusters import CoActivation, adjusted_rand_index, communities
from torch import Tensor

from circuitlab import OptionError


def co_activation(active: Tensor, parts: int = 1) -> CoActivation:
    counts = CoActivation(active.shape[1])
    for part in active.chunk(parts):
        counts.add(part)
    return counts


def planted(sizes: list[int], n_tokens: int = 3000, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Groups of latents that are active when their circuit runs, nine times in ten, and noise."""
    generator = torch.Generator().manual_seed(seed)
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    running = torch.rand(n_tokens, len(sizes), generator=generator) < 0.1
    noise = torch.rand(2, n_tokens, len(groups), generator=generator)
    return (running[:, groups] & (noise[0] < 0.9)) | (noise[1] < 0.01), groups


def test_phi_is_the_correlation_of_being_active() -> None:
    """It is torch's correlation of the 0s and 1s, however the tokens were split."""
    generator = torch.Generator().manual_seed(1)
    active = torch.rand(200, 7, generator=generator) < torch.linspace(0.05, 0.9, 7)
    expected = torch.corrcoef(active.double().T)
    assert torch.allclose(co_activation(active, parts=3).phi(), expected, atol=1e-12)


def test_latents_that_do_not_vary_have_phi_0() -> None:
    """Always active and never active: there is nothing to be correlated with."""
    active = torch.tensor([[True, False, True], [True, False, False]])
    phi = co_activation(active).phi()
    assert phi.isfinite().all()
    assert phi[:2].abs().max() == 0
    assert phi[2, 2] == 1


@pytest.mark.parametrize("seed", range(3))
def test_planted_circuits_are_found(seed: int) -> None:
    """Latents of circuits in superposition over the same tokens fall into their own circuits."""
    active, groups = planted([5, 8, 3, 6], seed=seed)
    found = communities(co_activation(active).phi(), seed=seed)
    assert adjusted_rand_index(found, groups) == 1.0


def test_without_circuits_latents_stay_alone() -> None:
    """Latents that are active independently of one another are no cluster."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(3000, 12, generator=generator) < 0.2
    assert communities(co_activation(active).phi()) == list(range(12))


def test_the_same_seed_gives_the_same_groups() -> None:
    """Also where the order of visits matters."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.corrcoef(torch.rand(30, 8, generator=generator))
    assert communities(phi, seed=4) == communities(phi, seed=4)


def test_latents_that_exclude_one_another_are_not_joined() -> None:
    """A threshold that is not above 0 is refused."""
    with pytest.raises(OptionError, match="give > 0"):
        communities(torch.eye(2), least=0)


def test_the_adjusted_rand_index_by_counting_pairs() -> None:
    """(agreeing - expected) / (most - expected), over all pairs of things, one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        first, second = torch.randint(0, 4, (2, 15), generator=generator).tolist()
        pairs = list(combinations(range(15), 2))
        one = [first[a] == first[b] for a, b in pairs]
        other = [second[a] == second[b] for a, b in pairs]
        together = sum(a and b for a, b in zip(one, other, strict=True))
        chance = sum(one) * sum(other) / len(pairs)
        expected = (together - chance) / ((sum(one) + sum(other)) / 2 - chance)
        assert abs(adjusted_rand_index(first, second) - expected) < 1e-12


def test_known_values_of_the_adjusted_rand_index() -> None:
    """Names do not matter, crossed partitions are below 0, and trivial ones are the same."""
    assert adjusted_rand_index([0, 0, 1, 1], ["b", "b", "a", "a"]) == 1
    assert adjusted_rand_index([0, 0, 1, 1], [0, 1, 0, 1]) == -0.5
    assert adjusted_rand_index([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(4 / 7)
    assert adjusted_rand_index([0, 1, 2], [2, 1, 0]) == 1
    assert adjusted_rand_index([0, 0, 0], [0, 1, 2]) == 0


def test_partitions_of_different_things_are_refused() -> None:
    """A group is missing for one of them."""
    with pytest.raises(OptionError, match="2 and 3 things"):
        adjusted_rand_index([0, 1], [0, 1, 2])
