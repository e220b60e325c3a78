"""Hypotheses: exact statistics, kept error rates, and circuits that pass or fail."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import permutations, product
from math import comb
from random import Random
from typing import cast

import pytest
import torch
from evidence_oracles import FormulaRuns
from torch import Tensor

from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.hypotheses import (
    HypothesisTest,
    binomial_at_least,
    binomial_at_most,
    holm,
    hsic_test,
    hypotheses,
    sign_test,
)
from circuitlab.evaluation.random_circuits import random_control
from circuitlab.wiring import Edge, Wiring

IOI = Wiring(3, 4)
#: The circuit of the formula below: three paths, by way of two heads each.
PATHS = [
    frozenset({Edge("input", a, one), Edge(a, b, other), Edge(b, "logits")})
    for a, one, other, b in (
        ("a0.h1", "v", "k", "a1.h2"), ("a0.h2", "q", "v", "a2.h3"), ("a0.h3", "k", "q", "a1.h0")
    )
]  # fmt: skip
PLANTED = frozenset().union(*PATHS)


def planted(n: int = 40, noise: float = 0.05, seed: int = 0) -> FormulaRuns:
    """Each of three paths gives a third of the effect; all else adds a little noise."""
    torch.manual_seed(seed)
    sizes = 1 + torch.rand(n, dtype=torch.float64)
    weights = {edge: noise * torch.randn(n, dtype=torch.float64) for edge in IOI.edges}

    def formula(kept: frozenset[Edge]) -> list[float]:
        metric = torch.zeros_like(sizes)
        for path in PATHS:
            metric += 2 * sizes * (path <= kept)
        for edge in kept - PLANTED:
            metric += weights[edge] / len(IOI.edges) ** 0.5
        values: list[float] = metric.tolist()
        return values

    return FormulaRuns(IOI, formula)


def the_tests(runs: FormulaRuns, kept: frozenset[Edge], n: int = 60) -> dict[str, HypothesisTest]:
    bench = cast("CircuitRuns", runs)
    control = random_control(bench, kept, 1.0, n=n)
    return {test.name: test for test in hypotheses(bench, kept, control, n_inflated=60)}


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "chance"), [(1, "1/2"), (7, "9/10"), (30, "2/5"), (100, "9/10")])
def test_binomial_tails_are_exact(n: int, chance: str) -> None:
    """Both tails agree with sums of fractions, to the last digits."""
    p = Fraction(chance)
    ways = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    for k in range(n + 1):
        assert binomial_at_least(k, n, float(p)) == pytest.approx(float(sum(ways[k:])), rel=1e-11)
        assert binomial_at_most(k, n, float(p)) == pytest.approx(
            float(sum(ways[: k + 1])), rel=1e-11
        )


@pytest.mark.parametrize("n", [1, 4, 7])
def test_sign_test_by_enumeration(n: int) -> None:
    """P is the largest over all chances of the null, of every outcome at least as far from half."""
    outcomes = list(product((0, 1), repeat=n))
    for k in range(n + 1):
        far = [o for o in outcomes if abs(sum(o) - n / 2) >= abs(k - n / 2)]
        worst = max(
            sum(c ** sum(o) * (1 - c) ** (n - sum(o)) for o in far)
            for c in (0.4 + 0.2 * i / 50 for i in range(51))
        )
        assert sign_test(k, n, 0.1) == pytest.approx(worst, rel=1e-9)
    assert sign_test(0, 0, 0.1) == 1.0


def test_sign_test_keeps_its_error_rate() -> None:
    """At the edge of the null, exactly computed, at most 5 % of the outcomes are rejected."""
    for n in (10, 32, 64, 200):
        rate = sum(
            comb(n, k) * 0.6**k * 0.4 ** (n - k)
            for k in range(n + 1)
            if sign_test(k, n, 0.1) <= 0.05
        )
        assert rate <= 0.05
        assert sign_test(n, n, 0.1) <= 0.05


def test_holm_by_hand() -> None:
    """The smallest is multiplied by the number of tests, the next by one less, never decreasing."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_keeps_the_familywise_error() -> None:
    """Of 20 true hypotheses, the chance that any is rejected is at most 5 %."""
    rng = Random(0)
    wrong = sum(min(holm([rng.random() for _ in range(20)])) <= 0.05 for _ in range(2000))
    assert wrong / 2000 <= 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5


def naive_hsic(one: Tensor, other: Tensor) -> float:
    """trace(K H L H) / (n - 1)^2, as it is written."""
    n = len(one)
    kernels = []
    for values in (one, other):
        distances = [
            abs(float(values[i] - values[j])) for i in range(n) for j in range(n) if i != j
        ]
        width = torch.tensor(distances).median()
        kernels.append(torch.exp(-((values[:, None] - values) ** 2) / (2 * width**2)))
    centre = torch.eye(n) - torch.ones(n, n) / n
    product_ = kernels[0].double() @ centre.double() @ kernels[1].double() @ centre.double()
    return float(product_.trace()) / (n - 1) ** 2


def test_hsic_by_its_definition() -> None:
    """The statistic is the trace of the definition, and p that of all permutations of five."""
    torch.manual_seed(1)
    one, other = torch.randn(5), torch.randn(5)
    statistic, p = hsic_test(one, other, n_permutations=4000)
    assert statistic == pytest.approx(naive_hsic(one, other), rel=1e-5)
    every = [naive_hsic(one, other[list(order)]) for order in permutations(range(5))]
    exact = sum(value >= statistic * (1 - 1e-6) for value in every) / len(every)
    assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5 + 1 / 4000)


def test_hsic_keeps_its_error_rate_and_has_power() -> None:
    """Independent variables are rejected in 5 % of cases, a parabola without correlation always."""
    torch.manual_seed(0)
    wrong = 0
    for trial in range(200):
        p = hsic_test(torch.randn(12), torch.randn(12), n_permutations=39, seed=trial)[1]
        wrong += p <= 0.05
    assert wrong / 200 <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert wrong > 0
    line = torch.linspace(-1, 1, 30)
    assert hsic_test(line, line**2, n_permutations=199)[1] == 1 / 200
    assert hsic_test(line, torch.ones(30)) == (0.0, 1.0)


# --- the five tests -------------------------------------------------------------------------------


def test_planted_circuit_passes_all() -> None:
    """The circuit that the formula is made of has every property that is asked for."""
    found = the_tests(planted(), PLANTED, 100)
    assert sorted(found) == [
        "equivalence", "independence", "minimality", "partial necessity", "sufficiency",
    ]  # fmt: skip
    assert all(test.holds for test in found.values())
    assert found["sufficiency"].rejected
    assert found["sufficiency"].p == pytest.approx(0.9**100)
    # Nine edges, two nulls of ideals and two of comparisons.
    assert found["sufficiency"].corrected <= 13 * found["sufficiency"].p
    assert not found["minimality"].rejected


def test_part_of_the_circuit_is_not_enough() -> None:
    """Without one of its three paths a circuit is worse than the model on every pair."""
    found = the_tests(planted(), PATHS[0] | PATHS[1])
    assert not found["equivalence"].holds
    assert found["equivalence"].statistic == 0.0


def test_superfluous_edges_are_named() -> None:
    """Edges that do nothing are no more than random ones, and minimality names them alone."""
    extra = frozenset({Edge("input", "a1.h1", "v"), Edge("a1.h1", "logits")})
    found = the_tests(planted(noise=0.0), PLANTED | extra)["minimality"]
    assert not found.holds
    assert found.failing == ("a1.h1 → logits", "input → a1.h1:v")
    assert found.statistic == 0.0


def test_circuit_that_misses_everything_fails() -> None:
    """A random circuit beats too few random ones: neither sufficiency nor necessity is shown."""
    other = frozenset({Edge("input", "a0.h0", "q"), Edge("a0.h0", "m1"), Edge("m1", "logits")})
    found = the_tests(planted(), other)
    assert not found["sufficiency"].holds
    assert not found["partial necessity"].holds
    assert not found["equivalence"].holds


def test_dependent_complement_is_seen() -> None:
    """A complement that does the task as well is not independent of the model."""

    def formula(kept: frozenset[Edge]) -> list[float]:
        done = bool(kept & {Edge("input", "logits"), Edge("m2", "logits")})
        return [done * size for size in torch.linspace(1, 5, 24).tolist()]

    found = the_tests(FormulaRuns(IOI, formula), frozenset({Edge("input", "logits")}))
    assert not found["independence"].holds
    assert found["equivalence"].n == 0
    assert found["equivalence"].p == 1.0


def test_a_circuit_drawn_at_random_seldom_beats_the_others() -> None:
    """Sufficiency is kept to 5 %: circuits no better than those drawn are not taken for better."""
    rng, wrong = Random(0), 0
    for _ in range(400):
        own = rng.random()
        won = sum(own > rng.random() for _ in range(60))
        wrong += binomial_at_least(won, 60, 0.9) <= 0.05
    # One in ten beats more than nine of ten; of these the test is to reject, and of no others.
    assert wrong / 400 <= 0.1


def test_nothing_to_compare_with() -> None:
    """The whole model cannot be inflated, and an empty circuit has no random ones either."""
    found = the_tests(planted(n=6), frozenset(IOI.edges))
    assert "minimality" not in found
    assert found["equivalence"].holds
    empty = the_tests(planted(n=6), frozenset())
    assert sorted(empty) == ["equivalence", "independence"]
    assert json.loads(json.dumps([test.to_json() for test in empty.values()], allow_nan=False))


def test_components_are_tested_too() -> None:
    """At level node a component more is what a circuit is inflated by."""
    weights = {"input": 4.0, "a0.h0": 2.0, "m1": 0.0}

    def formula(kept: frozenset[str]) -> list[float]:
        return [size * sum(weights.get(name, 0.01) for name in kept) for size in (1.0, 2.0, 3.0)]

    runs = cast("CircuitRuns", FormulaRuns(IOI, formula, level="node"))
    kept = frozenset({"input", "a0.h0", "m1"})
    control = random_control(runs, kept, 1.0, n=36)
    found = {test.name: test for test in hypotheses(runs, kept, control)}
    assert found["minimality"].failing == ("m1",)
    assert found["sufficiency"].statistic > 0.9
