"""Circuits whose metric is a formula: what evaluations must find is known without a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from circuitlab.evaluation.kept import Level
from circuitlab.wiring import Edge, Wiring


@dataclass(frozen=True)
class Wired:
    """As much of a model as evaluations look at."""

    wiring: Wiring


@dataclass
class FormulaRuns:
    """Runs of circuits on pairs, by a formula in place of a model.

    ``formula(circuit)`` gives the metric of each pair of a circuit that keeps these parts.
    """

    wiring: Wiring
    formula: Callable[[frozenset[Any]], Sequence[float]]
    level: Level = "edge"
    calls: int = 0
    circuits: int = 0

    @property
    def model(self) -> Wired:
        return Wired(self.wiring)

    @property
    def everything(self) -> frozenset[Any]:
        return frozenset(self.wiring.edges if self.level == "edge" else self.wiring.sources)

    @cached_property
    def whole(self) -> Tensor:
        return torch.tensor(self.formula(self.everything), dtype=torch.float64)

    @cached_property
    def empty(self) -> Tensor:
        return torch.tensor(self.formula(frozenset()), dtype=torch.float64)

    def metric(self, circuits: Sequence[Collection[Any]]) -> Tensor:
        self.calls += 1
        self.circuits += len(circuits)
        for circuit in circuits:
            assert frozenset(circuit) <= self.everything
        rows = [list(self.formula(frozenset(circuit))) for circuit in circuits]
        return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(self.whole))


def adding(
    wiring: Wiring, weights: dict[Edge, float], sizes: Sequence[float], start: float = -1.0
) -> FormulaRuns:
    """Each kept edge adds its weight times the size of the pair to ``start``."""

    def formula(kept: frozenset[Edge]) -> list[float]:
        total = sum(weights.get(edge, 0.0) for edge in kept)
        return [start + size * total for size in sizes]

    return FormulaRuns(wiring, formula)
