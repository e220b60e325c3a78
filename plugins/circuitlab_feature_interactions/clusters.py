"""Clusters: latents that are active at the same tokens, and how two partitions agree.

Latents are joined by phi, the correlation of being active, and grouped by the modularity of that
graph: Louvain's method, Blondel et al. 2008 (arXiv:0803.0476).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from typing import TYPE_CHECKING

import networkx as nx
import torch

from circuitlab import OptionError

if TYPE_CHECKING:
    from torch import Tensor

#: Latents with a lower phi are not joined.
LEAST = 0.1


class CoActivation:
    """How often latents are active, alone and two at a time.

    Args:
        n: Number of latents.

    Attributes:
        tokens: Tokens so far.
        together: Tokens at which both are active, ``[n, n]``, float64; the diagonal has each alone.
    """

    def __init__(self, n: int) -> None:
        self.tokens = 0
        self.together = torch.zeros(n, n, dtype=torch.float64)

    def add(self, active: Tensor) -> None:
        """Add tokens, ``[tokens, n]`` bool."""
        self.tokens += len(active)
        values = active.double()
        self.together += (values.T @ values).cpu()

    def phi(self) -> Tensor:
        """Correlation of being active, ``[n, n]``, -1 to 1; 0 where one always or never is."""
        alone = self.together.diagonal()
        spread = (alone * (self.tokens - alone)).sqrt()
        above = self.together * self.tokens - alone[:, None] * alone
        below = spread[:, None] * spread
        return torch.where(below > 0, above / below.clamp(min=1), 0.0)


def communities(phi: Tensor, *, least: float = LEAST, seed: int = 0) -> list[int]:
    """The group of each latent, ``[n]``: whole numbers from 0, in the order in which they appear.

    Args:
        phi: ``[n, n]``, symmetric.
        least: Latents with a lower phi are not joined; above 0.
        seed: Of the order in which Louvain's method visits latents.

    Raises:
        OptionError: ``least`` is not above 0.
    """
    if least <= 0:
        raise OptionError(f"least phi {least:g} joins latents that exclude one another; give > 0")
    graph = nx.Graph()
    graph.add_nodes_from(range(len(phi)))
    joined = (phi >= least).triu(1).nonzero().tolist()
    graph.add_weighted_edges_from((a, b, float(phi[a, b])) for a, b in joined)
    groups = [0] * len(phi)
    found = nx.community.louvain_communities(graph, seed=seed)
    for number, members in enumerate(sorted(found, key=min)):
        for member in members:
            groups[member] = number
    return groups


def adjusted_rand_index(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two partitions of the same things: 1 the same, 0 as by chance, at least -1/2.

    Hubert & Arabie 1985, Comparing Partitions. Two partitions that leave no pair to disagree about
    are the same.

    Args:
        first: The group of each thing.
        second: The other partition's, in the same order.

    Raises:
        OptionError: the two are not of one length.
    """
    if len(first) != len(second):
        raise OptionError(
            f"partitions of {len(first)} and {len(second)} things cannot be compared; give a group "
            f"for each thing in both"
        )
    both = _pairs(Counter(zip(first, second, strict=True)))
    ones, others, every = _pairs(Counter(first)), _pairs(Counter(second)), comb(len(first), 2)
    # Multiplied through by the number of pairs, so that all but the quotient is exact.
    above, below = both * every - ones * others, (ones + others) * every - 2 * ones * others
    return 1.0 if below == 0 else 2 * above / below


def _pairs(counts: Counter[Hashable]) -> int:
    """Pairs of things in one group."""
    return sum(comb(count, 2) for count in counts.values())
