"""Verdict: one of three words for what the evidence says of a circuit, by fixed rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from circuitlab.evaluation.hypotheses import binomial_at_least
from circuitlab.evaluation.random_circuits import FEWEST

if TYPE_CHECKING:
    from circuitlab.evaluation.faithfulness import Faithfulness
    from circuitlab.evaluation.random_circuits import RandomControl
    from circuitlab.evaluation.stability import Stability

Word = Literal["supported", "partly supported", "not supported"]

#: A chance result this rare is taken for no chance: of the task, and among random circuits.
ALPHA = 0.05
#: More of the effect must be in the circuit than outside it, and than in the median random one.
HALF = 0.5
#: A circuit that overshoots the model by as much as one that keeps only half is as far from it.
MOST = 1.5
#: More of its edges must recur in resamples than not.
RECURRING = 0.5

CAUTIONS: dict[Word, str] = {
    "supported": "One faithful circuit for this prompt distribution and ablation; others may exist",
    "partly supported": "A circuit with gaps in its evidence, for this prompt distribution and "
    "ablation; others may exist",
    "not supported": "The evidence shows no faithful circuit for this prompt distribution and "
    "ablation",
}


@dataclass(frozen=True)
class Criterion:
    """One rule: what it asks, whether it is met, whether it must be, and what was found."""

    name: str
    met: bool
    necessary: bool
    found: str


@dataclass(frozen=True)
class Verdict:
    """What the evidence says.

    Attributes:
        word: ``supported``, ``partly supported`` or ``not supported``.
        sentence: What was measured, and how far it goes.
        reasons: What was found of each rule that is not met.
        criteria: All rules.
    """

    word: Word
    sentence: str
    reasons: tuple[str, ...]
    criteria: tuple[Criterion, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {
            "word": self.word,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "criteria": [asdict(one) for one in self.criteria],
        }


def verdict(
    *,
    accuracy: float,
    chance: float,
    faithfulness: Faithfulness,
    control: RandomControl | None,
    complement: Faithfulness,
    stability: Stability | None,
    size: float,
    independent: bool,
    what: str = "edges",
) -> Verdict:
    """Judge a circuit.

    ``not supported``, if one of these fails:

    * task: the model is right more often than by chance (binomial, p <= .05);
    * defined: faithfulness has a value and, over two pairs or more, an interval;
    * random circuits: the interval lies above their 97.5th percentile, and p <= .05, which takes
      19 of them.

    ``partly supported``, if all of those hold, and one of these fails:

    * sufficient: the interval lies above one half, and below one and a half;
    * necessary: what is outside the circuit keeps less than half of the effect;
    * telling: the median random circuit keeps less than half of the effect;
    * stable: more than half of the circuit's edges recur in at least 90 % of resamples;
    * held out: no pair is one that the circuit was found on.

    ``supported``, if all hold. Where all pairs give the same share, the interval is that share.

    Args:
        accuracy: Share of the pairs that the model answers rightly.
        chance: Accuracy of guessing.
        faithfulness: Of the circuit.
        control: Random circuits, on the same pairs; None if there is nothing to compare.
        complement: Faithfulness of what is outside the circuit.
        stability: Of its discovery; None if it was not measured, and then it is not shown either.
        size: Share of the model's edges, or components, that the circuit has.
        independent: Whether the pairs are others than those it was found on.
        what: What ``size`` counts.
    """
    interval = _interval(faithfulness)
    criteria = (
        _task(accuracy, chance, faithfulness.n_pairs),
        _defined(faithfulness),
        _above_random(interval, control),
        _sufficient(interval),
        _necessary(complement),
        _telling(control),
        _stable(stability),
        Criterion(
            "held out",
            independent,
            False,
            "it was scored on pairs that it was not found on"
            if independent
            else "it was scored on the pairs that it was found on",
        ),
    )
    failed = [one for one in criteria if not one.met]
    word: Word = "partly supported" if failed else "supported"
    if any(one.necessary for one in failed):
        word = "not supported"
    measured = _sentence(faithfulness, interval, control, complement, stability, size, what)
    return Verdict(
        word, f"{measured}. {CAUTIONS[word]}.", tuple(one.found for one in failed), criteria
    )


def _interval(found: Faithfulness) -> tuple[float, float] | None:
    if found.interval is None and found.value is not None and found.n_pairs > 1:
        return found.value, found.value
    return found.interval


# --- the rules ------------------------------------------------------------------------------------


def _task(accuracy: float, chance: float, n_pairs: int) -> Criterion:
    right = round(accuracy * n_pairs)
    met = 0 < chance < 1 and binomial_at_least(right, n_pairs, chance) <= ALPHA
    beyond = "more" if met else "no more"
    found = f"the model is right on {right} of {n_pairs} pairs, {beyond} than by chance"
    return Criterion("task", met, True, found)


def _defined(found: Faithfulness) -> Criterion:
    if found.value is None:
        return Criterion("defined", False, True, f"faithfulness is not defined: {found.reason}")
    met = found.n_pairs > 1
    return Criterion("defined", met, True, f"pairs behind the interval: {found.n_pairs}")


def _above_random(interval: tuple[float, float] | None, control: RandomControl | None) -> Criterion:
    name = "random circuits"
    if interval is None:
        return Criterion(name, False, True, "there is no interval to hold against random circuits")
    if control is None or control.high is None or control.p is None:
        return Criterion(name, False, True, "there are no random circuits to compare it with")
    n = len(control.values)
    if n < FEWEST:
        text = f"{n} random circuits are too few: p cannot come below .05 with less than {FEWEST}"
        return Criterion(name, False, True, text)
    above, rare = interval[0] > control.high, control.p <= ALPHA
    side = "above" if above else "not above"
    text = (
        f"the interval begins at {_percent(interval[0])} %, {side} the 97.5th percentile of random "
        f"circuits, {_percent(control.high)} %; p = {control.p:.2g}"
    )
    return Criterion(name, above and rare, True, text)


def _sufficient(interval: tuple[float, float] | None) -> Criterion:
    if interval is None:
        return Criterion("sufficient", False, False, "there is no interval of the faithfulness")
    low, high = interval
    text = f"the interval of the faithfulness is {_percent(low)} % to {_percent(high)} %"
    if low <= HALF:
        text += ", not all above one half"
    if high >= MOST:
        text += ", not all below one and a half"
    return Criterion("sufficient", low > HALF and high < MOST, False, text)


def _necessary(complement: Faithfulness) -> Criterion:
    if complement.value is None:
        text = f"the share of the complement is not defined: {complement.reason}"
        return Criterion("necessary", False, False, text)
    met = complement.value < HALF
    text = f"what is outside keeps {_percent(complement.value)} % of the effect"
    return Criterion("necessary", met, False, text)


def _telling(control: RandomControl | None) -> Criterion:
    if control is None or control.median is None:
        return Criterion("telling", False, False, "there are no random circuits of this size")
    text = (
        f"the median random circuit of this size keeps {_percent(control.median)} % of the effect"
    )
    return Criterion("telling", control.median < HALF, False, text)


def _stable(stability: Stability | None) -> Criterion:
    if stability is None or stability.recurring is None:
        text = "whether other pairs would give these edges was not measured"
        return Criterion("stable", False, False, text)
    text = f"{_percent(stability.recurring)} % of its edges recur in at least 90 % of resamples"
    return Criterion("stable", stability.recurring > RECURRING, False, text)


# --- the sentence ---------------------------------------------------------------------------------


def _sentence(
    faithfulness: Faithfulness,
    interval: tuple[float, float] | None,
    control: RandomControl | None,
    complement: Faithfulness,
    stability: Stability | None,
    size: float,
    what: str,
) -> str:
    if faithfulness.value is None:
        parts = [f"faithfulness is not defined for {_size(size)} % of {what}"]
    else:
        share = _with_interval(faithfulness.value, interval)
        parts = [f"recovers {share} of the effect with {_size(size)} % of {what}"]
    if control is None or control.median is None:
        parts.append("random circuits of this size: none")
    else:
        ends = control.low or 0.0, control.high or 0.0
        parts.append(f"random circuits of this size: {_with_interval(control.median, ends)}")
    if complement.value is not None:
        parts.append(f"complement keeps {_percent(complement.value)} %")
    if stability is not None and stability.recurring is not None:
        parts.append(f"{_percent(stability.recurring)} % of edges recur in >= 90 % of resamples")
    return "; ".join(parts)


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    ends = "" if interval is None else f" [{_percent(interval[0])}, {_percent(interval[1])}]"
    return f"{_percent(value)} %{ends}"


def _percent(share: float) -> str:
    """In percent, whole; one decimal where that would hide which side of 100 or 0 it is on."""
    whole = round(100 * share)
    near = whole in (0, 100) and abs(100 * share - whole) >= 0.05
    return f"{100 * share:.1f}" if near else str(whole)


def _size(share: float) -> str:
    """In percent, two digits; whole from ten on."""
    return f"{100 * share:.2g}" if share < 0.0995 else str(round(100 * share))
