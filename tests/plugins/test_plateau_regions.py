"""Regions of output states: against definitions by loops, and stable from run to run."""

from __future__ import annotations

import pytest
import torch
from circuitlab_activation_plateaus.regions.clustering import likeness
from circuitlab_activation_plateaus.regions.finding import Kind, Regions, describe, find_regions
from torch import Tensor

from circuitlab import OptionError


def states(n_each: int = 12, *, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits about four known predictions, of sizes 4 : 3 : 2 : 1, and which is which."""
    generator = torch.Generator().manual_seed(seed)
    middles = 4.0 * torch.eye(9)[:4] + torch.randn(4, 9, generator=torch.Generator().manual_seed(9))
    truth = torch.arange(4).repeat_interleave(torch.tensor([4, 3, 2, 1]) * n_each)
    truth = truth[torch.randperm(len(truth), generator=generator)]
    return middles[truth] + noise * torch.randn(len(truth), 9, generator=generator), truth


def test_argmax_regions_are_the_tokens_that_win() -> None:
    """Each token that some state predicts is a region, the most frequent first."""
    logits = torch.eye(5)[[3, 1, 3, 4, 1, 3]]
    regions = find_regions(logits)
    assert regions.tokens.tolist() == [3, 1, 4]
    assert regions.assign(logits).tolist() == [0, 1, 0, 2, 1, 0]
    assert len(regions) == 3


def test_state_of_an_unseen_token_joins_the_likeliest_seen() -> None:
    """What was never seen is no region; of those that were, the most likely is taken."""
    regions = find_regions(torch.eye(5)[[3, 1]])
    assert regions.assign(torch.tensor([[9.0, 2.0, 0.0, 1.0, 5.0]])).tolist() == [1]


@pytest.mark.parametrize("kind", ["kmeans", "agglomerative"])
def test_planted_regions_are_found(kind: Kind) -> None:
    """The four predictions are four regions, the largest first, with means where they are."""
    logits, truth = states()
    regions = find_regions(logits, kind)
    assert torch.equal(regions.assign(logits), truth)
    for region in range(4):
        mean = logits[truth == region].double().log_softmax(-1).mean(0)
        torch.testing.assert_close(regions.means[region], mean)
    assert max(regions.criterion, key=lambda k: regions.criterion[k]) == 4


@pytest.mark.parametrize("kind", ["argmax", "kmeans", "agglomerative"])
def test_regions_are_the_same_in_repeated_runs(kind: Kind) -> None:
    """Two runs give the same regions; two samples and two seeds the same but for their names."""
    logits, _ = states(seed=1)
    first, second = (find_regions(logits, kind) for _ in range(2))
    assert torch.equal(first.assign(logits), second.assign(logits))
    assert torch.equal(first.means, second.means)
    for seed in (1, 2):
        other = find_regions(states(seed=5 + seed)[0], kind, seed=seed)
        assert likeness(first.assign(logits), other.assign(logits)) == 1.0


def test_assignment_is_to_the_nearest_mean() -> None:
    """Of clusters, the region is that of the nearest mean log-probabilities, by search."""
    logits, _ = states(noise=1.5)
    regions = find_regions(logits, "kmeans", k=5)
    near = torch.cdist(logits.double().log_softmax(-1), regions.means).argmin(1)
    assert torch.equal(regions.assign(logits), near)
    shaped = logits.view(2, -1, 9)
    assert torch.equal(regions.assign(shaped), near.view(2, -1))


def test_many_states_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of states a sample is clustered, and all others join the nearest mean."""
    logits, truth = states(20)
    monkeypatch.setattr("circuitlab_activation_plateaus.regions.finding.SAMPLE", 60)
    regions = find_regions(logits, "agglomerative")
    assert likeness(regions.assign(logits), truth) == 1.0


@pytest.mark.parametrize("kind", ["argmax", "kmeans"])
def test_margin_changes_sign_on_the_border(kind: Kind) -> None:
    """Of two regions alone, the margin is positive where the second is assigned."""
    logits, truth = states(noise=0.2)
    pair = logits[truth < 2]
    regions = find_regions(pair, kind, k=None if kind == "argmax" else 2)
    other = 3 * torch.randn(200, 9, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(200, dtype=torch.int64)
    beyond = regions.margin(other, zero, zero + 1)
    assert torch.equal(beyond > 0, regions.assign(other) == 1)
    torch.testing.assert_close(regions.margin(other, zero + 1, zero), -beyond)


def test_margin_of_clusters_is_a_distance() -> None:
    """It is the distance from the plane of points as near to one mean as to the other."""
    means = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -1.5]], dtype=torch.float64)
    regions = Regions("kmeans", torch.zeros(0, dtype=torch.int64), means)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.int64)
    near = torch.cdist(logits.log_softmax(-1), means)
    apart = float((means[1] - means[0]).norm())
    expected = (near[:, 0].square() - near[:, 1].square()) / (2 * apart)
    torch.testing.assert_close(regions.margin(logits, zero, zero + 1), expected)


@pytest.mark.parametrize("kind", ["argmax", "kmeans"])
def test_margin_can_be_differentiated(kind: Kind) -> None:
    """Its gradient is that of finite differences."""
    logits, _ = states()
    regions = find_regions(logits, kind)
    x = logits[:5].double().requires_grad_()
    before, after = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 0, 3, 2, 2])
    assert torch.autograd.gradcheck(lambda x: regions.margin(x, before, after), (x,))


def test_facts_of_regions() -> None:
    """Token, its mean probability, share and variance, each by its definition."""
    logits, _ = states()
    regions = find_regions(logits)
    labels = regions.assign(logits)
    facts = describe(regions, logits, labels)
    assert sum(fact.mass for fact in facts) == pytest.approx(1)
    for region, fact in enumerate(facts):
        members = logits[labels == region].double()
        likely, states_ = members.softmax(-1).mean(0), members.log_softmax(-1)
        spread = (states_ - states_.mean(0)).square().sum(-1).mean()
        assert fact.token == int(likely.argmax())
        assert fact.probability == pytest.approx(float(likely.max()))
        assert fact.n_states == len(members)
        assert fact.variance == pytest.approx(float(spread), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "k", "said"),
    [
        ("argmax", 3, "--k 3: regions of the most likely token have no number to choose"),
        ("kmeans", 0, "--k 0 clusters of 120 states; give 1 to 120"),
        ("kmeans", 121, "--k 121 clusters of 120 states; give 1 to 120"),
        ("dbscan", None, "--regions 'dbscan' is unknown; use argmax, kmeans, agglomerative"),
    ],
)
def test_refused(kind: Kind, k: int | None, said: str) -> None:
    """A number of clusters that cannot be, or an unknown kind, is refused."""
    with pytest.raises(OptionError, match=said):
        find_regions(states()[0], kind, k=k)
