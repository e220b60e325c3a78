"""Hypotheses: five statistical tests of what a circuit is said to be.

Shi et al. 2024 (arXiv:2410.13032): three ideals (equivalence, independence, minimality), whose null
hypothesis is that the circuit has the property, and two that compare it with random circuits
(sufficiency, partial necessity), whose null is that it has not. All p-values are corrected together
by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab.evaluation.completeness import complement
from circuitlab.evaluation.random_circuits import ROUNDING, Circuit
from circuitlab.graph import effect_name

if TYPE_CHECKING:
    from circuitlab.evaluation.circuit_runs import CircuitRuns
    from circuitlab.evaluation.random_circuits import RandomControl

#: A test rejects its null hypothesis at or below this corrected p.
ALPHA = 0.05
#: How far from 1/2 the circuit's chance to do better than the model may be.
EPSILON = 0.1
#: The circuit, and each of its edges, is to beat so many of the random ones.
QUANTILE = 0.9
N_PERMUTATIONS = 1000
N_INFLATED = 100


@dataclass(frozen=True)
class HypothesisTest:
    """One test.

    Attributes:
        name: ``equivalence``, ``independence``, ``minimality``, ``sufficiency`` or ``partial
            necessity``.
        null: The null hypothesis, in words.
        statistic: What was observed; see ``what``.
        what: The statistic in words.
        n: Pairs, permutations or random circuits behind it.
        p: Uncorrected; of minimality the smallest over the circuit's edges.
        corrected: By Holm's method over all tests, and all edges.
        rejected: Whether the null hypothesis is.
        holds: Whether the circuit passes: an ideal that is not rejected, or a null of the other two
            that is. An ideal that is not rejected is not shown either.
        failing: Of minimality the edges (at level ``node`` components) for which it is rejected.
    """

    name: str
    null: str
    statistic: float
    what: str
    n: int
    p: float
    corrected: float
    rejected: bool
    holds: bool
    failing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {**asdict(self), "failing": list(self.failing)}


def hypotheses(
    runs: CircuitRuns,
    kept: Collection[Any],
    control: RandomControl,
    *,
    n_inflated: int = N_INFLATED,
    seed: int = 0,
) -> tuple[HypothesisTest, ...]:
    """Test a circuit; tests that there is nothing to draw for are left out.

    * Equivalence: the circuit does better than the model on a pair with a probability within 0.1
      of 1/2. Sign test over pairs; ties are left out.
    * Independence: what the complement does on a pair says nothing of what the model does. HSIC
      with Gaussian kernels of median width, by permutation (Gretton et al. 2007). With corrupt
      prompts for ablation even an empty complement may depend on the model: its metric is that of
      the corrupt prompt, which has words in common with the clean one.
    * Minimality: each edge, removed from the circuit, changes the metric more than 9 of 10 random
      edges of the circuit inflated by a random path. One binomial test for each edge.
    * Sufficiency: the circuit is nearer to the model than 9 of 10 random circuits. Binomial.
    * Partial necessity: its complement is further from the model than those of 9 of 10 random
      circuits. Binomial.

    Distances are means over pairs of absolute differences of the metric. Differences within
    rounding are no differences.

    Args:
        runs: Runs circuits on held-out pairs.
        kept: The circuit, as ``runs`` takes it.
        control: Random circuits, run on the same pairs.
        n_inflated: Inflated circuits of the minimality test.
        seed: Of permutations and inflated circuits.
    """
    rng = Random(seed)  # noqa: S311  # no secret
    least = ROUNDING * float((runs.whole - runs.empty).mean().abs())
    parts, randoms = sorted(kept), control.drawn.circuits
    inflated = _inflated(runs, kept, n_inflated, rng) if parts else []
    circuits: list[Circuit] = [frozenset(kept), complement(runs, kept)]
    circuits += [frozenset(kept) - {part} for part in parts]
    circuits += [more for more, _ in inflated] + [more - {part} for more, part in inflated]
    circuits += [complement(runs, other) for other in randoms]
    sizes = [1, 1, len(parts), len(inflated), len(inflated), len(randoms)]
    metric = iter(torch.split_with_sizes(runs.metric(circuits), sizes))
    own, rest, less, more, less_more, random_rest = metric
    found = [
        _equivalence(own[0] - runs.whole, least),
        _independence(rest[0], runs.whole, seed),
    ]
    if randoms:
        near = _distance(control.metric, runs.whole) - _distance(own, runs.whole)
        far = _distance(rest, runs.whole) - _distance(random_rest, runs.whole)
        found += [_sufficiency(near > least), _necessity(far > least)]
    if not inflated:
        return _corrected(found, [])
    others = _distance(more, less_more)
    names = [part if isinstance(part, str) else effect_name(*part) for part in parts]
    beaten = [(size > others + least) for size in _distance(own, less)]
    return _corrected(found, list(zip(names, beaten, strict=True)))


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().mean(-1)


# --- the tests ------------------------------------------------------------------------------------

#: Name, null hypothesis, statistic, what it is, n, p.
_Found = tuple[str, str, float, str, int, float]


def _equivalence(difference: Tensor, least: float) -> _Found:
    better, worse = int((difference > least).sum()), int((difference < -least).sum())
    n = better + worse
    return (
        "equivalence",
        "on a random pair the circuit does better than the model as often as worse, within 10 %",
        better / n if n else 0.5,
        "share of pairs, without ties, on which the circuit does better",
        n,
        sign_test(better, n, EPSILON),
    )


def _independence(rest: Tensor, whole: Tensor, seed: int) -> _Found:
    statistic, p = hsic_test(rest, whole, n_permutations=N_PERMUTATIONS, seed=seed)
    return (
        "independence",
        "what the complement does on a pair is independent of what the model does",
        statistic,
        "HSIC of the two metrics over pairs",
        N_PERMUTATIONS,
        p,
    )


def _sufficiency(won: Tensor) -> _Found:
    return (
        "sufficiency",
        "at most 9 of 10 random circuits are further from the model than this one",
        float(won.double().mean()),
        "share of random circuits that are further from the model",
        len(won),
        binomial_at_least(int(won.sum()), len(won), QUANTILE),
    )


def _necessity(won: Tensor) -> _Found:
    return (
        "partial necessity",
        "at most 9 of 10 random circuits, taken out, change the model less than this one",
        float(won.double().mean()),
        "share of random circuits that change the model less when they are taken out",
        len(won),
        binomial_at_least(int(won.sum()), len(won), QUANTILE),
    )


def _corrected(
    found: Sequence[_Found], beaten: Sequence[tuple[str, Tensor]]
) -> tuple[HypothesisTest, ...]:
    """The tests with all p-values corrected together.

    Args:
        found: All but minimality.
        beaten: Name of each part of the circuit, and which random parts it beats.
    """
    of_parts = [binomial_at_most(int(won.sum()), len(won), QUANTILE) for _, won in beaten]
    corrected = holm([*(test[-1] for test in found), *of_parts])
    tests = []
    for test, p in zip(found, corrected, strict=False):
        rejected = p <= ALPHA
        ideal = test[0] in ("equivalence", "independence")
        tests.append(HypothesisTest(*test, p, rejected, rejected != ideal))
    if beaten:
        of_edges = corrected[len(found) :]
        failing = [name for (name, _), p in zip(beaten, of_edges, strict=True) if p <= ALPHA]
        tests.append(
            HypothesisTest(
                "minimality",
                "each part matters more than 9 of 10 random parts added to the circuit",
                min(float(won.double().mean()) for _, won in beaten),
                "share of random parts that the circuit's least part beats",
                len(beaten[0][1]),
                min(of_parts),
                min(of_edges),
                bool(failing),
                not failing,
                tuple(failing),
            )
        )
    return tuple(tests)


# --- inflated circuits ----------------------------------------------------------------------------


def _inflated(
    runs: CircuitRuns, kept: Collection[Any], n: int, rng: Random
) -> list[tuple[Circuit, Any]]:
    """The circuit and a random path, or component, more; and a part of what was added."""
    wiring, own = runs.model.wiring, frozenset(kept)
    found: list[tuple[Circuit, Any]] = []
    if runs.level == "node":
        left = sorted({*wiring.sources} - own - {"input"})
        drawn = [rng.choice(left) for _ in range(n)] if left else []
        return [(own | {name}, name) for name in drawn]
    if len(own) == wiring.n_edges:
        return found
    out: dict[str, list[Any]] = {}
    for edge in wiring.edges:
        out.setdefault(edge.source, []).append(edge)
    while len(found) < n:
        path, at = [], "input"
        while at != "logits":
            path.append(rng.choice(out[at]))
            at = path[-1].target
        if added := sorted({*path} - own):
            found.append((own | {*path}, rng.choice(added)))
    return found


# --- statistics -----------------------------------------------------------------------------------


def sign_test(successes: int, n: int, epsilon: float) -> float:
    """P-value of the null hypothesis that a success has a chance within ``epsilon`` of 1/2.

    The exact probability, at the worst such chance, of a share of successes at least as far from
    1/2; 1 for no trials.
    """
    far = abs(2 * successes - n)
    as_far = [k for k in range(n + 1) if abs(2 * k - n) >= far]
    return min(1.0, math.fsum(binomial(k, n, 0.5 + epsilon) for k in as_far))


def binomial(k: int, n: int, chance: float) -> float:
    """Probability of ``k`` successes in ``n`` trials; ``chance`` is neither 0 nor 1."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(chance) + (n - k) * math.log1p(-chance))


def binomial_at_least(k: int, n: int, chance: float) -> float:
    """Probability of ``k`` or more successes in ``n`` trials."""
    return min(1.0, math.fsum(binomial(i, n, chance) for i in range(k, n + 1)))


def binomial_at_most(k: int, n: int, chance: float) -> float:
    """Probability of ``k`` or fewer successes in ``n`` trials."""
    return min(1.0, math.fsum(binomial(i, n, chance) for i in range(k + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in their order (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def hsic_test(
    one: Tensor, other: Tensor, *, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """HSIC of two variables and its p under independence, by permutation.

    The biased estimator trace(K H L H) / (n - 1)^2 with Gaussian kernels, each as wide as the
    median distance between different observations (Gretton et al. 2007, "A kernel statistical test
    of independence").

    Args:
        one: ``[n]``.
        other: ``[n]``.
        n_permutations: How many.
        seed: Which.

    Returns:
        The statistic, and (1 + permutations that reach it) / (their number + 1). A constant
        variable is independent of all others: 0 and 1.
    """
    first, second = (_kernel(values.double().cpu()) for values in (one, other))
    if first is None or second is None:
        return 0.0, 1.0
    centred = first - first.mean(0) - first.mean(1, keepdim=True) + first.mean()
    observed = float((centred * second).sum())
    generator = torch.Generator().manual_seed(seed)
    reached = 0
    for _ in range(n_permutations):
        order = torch.randperm(len(one), generator=generator)
        reached += float((centred * second[order][:, order]).sum()) >= observed * (1 - 1e-12)
    return observed / (len(one) - 1) ** 2, (1 + reached) / (1 + n_permutations)


def _kernel(values: Tensor) -> Tensor | None:
    """Gaussian kernel of median width, ``[n, n]``; None for a constant variable."""
    distance = (values[:, None] - values[None]).abs()
    apart = distance[distance > 0]
    if not len(apart):
        return None
    return torch.exp(-((distance / apart.median()) ** 2) / 2)
