"""Regions: the output states of a model in a few classes, and where their borders lie.

A state is what the model predicts after the last token. A region is a set of states, and says by a
margin how far any state lies inside it, so that borders can be found and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from circuitlab import OptionError
from circuitlab_activation_plateaus.regions.clustering import (
    Criterion,
    choose,
    coordinates,
    cut,
    k_means,
    ranked,
    ward,
)

Kind = Literal["argmax", "kmeans", "agglomerative"]

#: States that are clustered at most; the others join the nearest mean.
SAMPLE = 1500
#: Clusters at most, where their number is not given.
MOST = 20
#: Logits that are turned to float64 at once.
_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Regions:
    """Classes of states, told apart by logits.

    Attributes:
        kind: ``argmax``: a region is all states with the same most likely token. ``kmeans`` and
            ``agglomerative``: all states whose log-probabilities are nearest to the same mean.
        tokens: Of ``argmax``, each region's token, ``[k]``; empty for clusters.
        means: Of clusters, mean log-probabilities, ``[k, vocab]``, float64; empty for ``argmax``.
        criterion: Of clusters whose number was chosen, what each number scored.
    """

    kind: Kind
    tokens: Tensor
    means: Tensor
    criterion: Mapping[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(len(self.tokens), len(self.means))

    def assign(self, logits: Tensor) -> Tensor:
        """The region of each state, ``[...]``, from logits ``[..., vocab]``.

        A state of a region that was never seen belongs to the most likely of those that were.
        """
        if self.kind == "argmax":
            return logits[..., self.tokens].argmax(-1)
        flat = logits.flatten(0, -2)
        rows = max(1, _AT_ONCE // flat.shape[-1])
        labels = [self._nearest(part) for part in torch.split(flat, rows)]
        return torch.cat(labels).view(logits.shape[:-1])

    def margin(self, logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """How far states lie beyond the border of two regions, ``[n]``; negative: before it.

        Of ``argmax`` the difference of the two tokens' logits, in nats; of clusters the distance
        from the plane between the two means, in nats of log-probability. Differentiable.

        Args:
            logits: ``[n, vocab]``.
            before: Region that is left, ``[n]``.
            after: Region that is entered, ``[n]``; another one.
        """
        if self.kind == "argmax":
            pair = torch.stack([self.tokens[after], self.tokens[before]], 1).to(logits.device)
            chosen = logits.gather(1, pair)
            return chosen[:, 0] - chosen[:, 1]
        states = logits.double().log_softmax(-1)
        side = self.means[after] - self.means[before]
        middle = (self.means[after] + self.means[before]) / 2
        beyond: Tensor = ((states - middle) * side).sum(-1) / side.norm(dim=-1)
        return beyond

    def _nearest(self, logits: Tensor) -> Tensor:
        states = logits.double().log_softmax(-1)
        return (states @ self.means.T - self.means.square().sum(-1) / 2).argmax(-1)


def find_regions(
    logits: Tensor,
    kind: Kind = "argmax",
    *,
    k: int | None = None,
    k_by: Criterion = "silhouette",
    seed: int = 0,
) -> Regions:
    """Regions of states, the largest first.

    Args:
        logits: States, ``[n, vocab]``.
        kind: How states are told apart.
        k: Number of clusters; chosen from 1 to 20 where None.
        k_by: What chooses it: ``silhouette``, or ``bic``, which takes clusters to be round and
            counts long ones several times.
        seed: Of the starts of k-means, and of the 1,500 states that are clustered where there are
            more.

    Raises:
        OptionError: an unknown kind, or a number of clusters that cannot be.
    """
    if kind not in get_args(Kind):
        raise OptionError(f"--regions {kind!r} is unknown; use {', '.join(get_args(Kind))}")
    if kind == "argmax":
        if k is not None:
            raise OptionError(
                f"--k {k}: regions of the most likely token have no number to choose; use "
                f"--regions kmeans or agglomerative, or leave --k out"
            )
        tokens = logits.argmax(-1)
        order = ranked(tokens)
        first = [int((order == region).nonzero()[0]) for region in range(int(order.max()) + 1)]
        return Regions(kind, tokens[first], logits.new_zeros(0, logits.shape[-1]))
    sample = logits
    if len(logits) > SAMPLE:
        drawn = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
        sample = logits[drawn[:SAMPLE].sort().values.to(logits.device)]
    if k is not None and not 1 <= k <= len(sample):
        raise OptionError(f"--k {k} clusters of {len(sample)} states; give 1 to {len(sample)}")
    states = sample.double().log_softmax(-1)
    points = coordinates(states)
    label = _labeller(points, kind, seed)
    labels, criterion = (label(k), {}) if k is not None else choose(points, label, k_by, MOST)
    members = torch.nn.functional.one_hot(labels.to(states.device)).to(states)
    means = (members.T @ states) / members.sum(0)[:, None]
    found = Regions(kind, torch.zeros(0, dtype=torch.int64), means, criterion)
    return _by_size(found, logits)


@dataclass(frozen=True)
class RegionFacts:
    """What a region holds.

    Attributes:
        token: The most likely token of its states' mean probabilities.
        probability: That token's mean probability.
        mass: Share of all states.
        n_states: Number of states.
        variance: Mean squared distance of its states' log-probabilities from their mean, nats².
    """

    token: int
    probability: float
    mass: float
    n_states: int
    variance: float


def describe(regions: Regions, logits: Tensor, labels: Tensor) -> list[RegionFacts]:
    """What each region holds, from its states.

    Args:
        regions: ``k`` of them, each with a state.
        logits: States, ``[n, vocab]``.
        labels: Their regions, ``[n]``.
    """
    facts = []
    for region in range(len(regions)):
        members = logits[labels == region]
        mean, likely, square = _moments(members)
        token = int(likely.argmax())
        # Of states about their mean, in float64: rounding may leave a little below 0.
        variance = max(0.0, square - float(mean.square().sum()))
        facts.append(
            RegionFacts(
                token, float(likely[token]), len(members) / len(logits), len(members), variance
            )
        )
    return facts


def _moments(logits: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean log-probabilities, mean probabilities, and the mean squared norm of the former."""
    n, vocab = logits.shape
    mean, likely = logits.new_zeros(2, vocab, dtype=torch.float64)
    square = 0.0
    for part in torch.split(logits, max(1, _AT_ONCE // vocab)):
        states = part.double().log_softmax(-1)
        mean += states.sum(0) / n
        likely += states.exp().sum(0) / n
        square += float(states.square().sum()) / n
    return mean, likely, square


def _labeller(points: Tensor, kind: Kind, seed: int) -> Callable[[int], Tensor]:
    """From a number of clusters to labels."""
    if kind == "kmeans":
        return lambda k: k_means(points, k, seed)
    merges = ward(points)
    return lambda k: cut(merges, k)


def _by_size(regions: Regions, logits: Tensor) -> Regions:
    """The same regions, the largest first, without those that no state is nearest to."""
    counts = torch.bincount(regions.assign(logits), minlength=len(regions))
    order = counts.argsort(descending=True, stable=True)
    means = regions.means[order[counts[order] > 0]]
    return Regions(regions.kind, regions.tokens, means, regions.criterion)
