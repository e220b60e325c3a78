"""Verdict: the word that each rule gives, and the sentence that stands beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitlab.evaluation.faithfulness import Faithfulness
from circuitlab.evaluation.random_circuits import RandomCircuits, RandomControl
from circuitlab.evaluation.stability import Stability
from circuitlab.evaluation.verdict import CAUTIONS, Verdict, verdict


def share(
    value: float | None, *interval: float, n_pairs: int = 64, reason: str = ""
) -> Faithfulness:
    ends = (interval[0], interval[1]) if interval else None
    return Faithfulness(
        value=value, interval=ends, metric=1.0, whole=2.0, empty=0.0, n_pairs=n_pairs, reason=reason
    )


def among(low: float, median: float, high: float, p: float, n: int = 100) -> RandomControl:
    drawn = RandomCircuits([frozenset()] * n, "as many edges")
    return RandomControl(
        [median] * n, median, low, high, 100 * (1 - p), p, drawn, torch.zeros(n, 2)
    )


def recurs(recurring: float | None) -> Stability:
    return Stability({}, recurring, 0.8, 20, 64, "how")


GOOD: dict[str, Any] = {
    "accuracy": 1.0,
    "chance": 0.5,
    "faithfulness": share(0.87, 0.81, 0.92),
    "control": among(-0.02, 0.03, 0.09, 1 / 101),
    "complement": share(0.11, 0.05, 0.2),
    "stability": recurs(0.74),
    "size": 0.021,
    "independent": True,
}


def judged(**changed: Any) -> Verdict:
    return verdict(**{**GOOD, **changed})


def test_good_evidence() -> None:
    """A circuit that passes every rule is supported, in the words of the fixed sentence."""
    found = judged()
    assert found.word == "supported"
    assert found.reasons == ()
    assert found.sentence == (
        "recovers 87 % [81, 92] of the effect with 2.1 % of edges; random circuits of this size: "
        "3 % [-2, 9]; complement keeps 11 %; 74 % of edges recur in >= 90 % of resamples. "
        "One faithful circuit for this prompt distribution and ablation; others may exist."
    )
    assert all(one.met for one in found.criteria)
    assert [one.name for one in found.criteria if one.necessary] == [
        "task", "defined", "random circuits",
    ]  # fmt: skip
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["word"] == "supported"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"accuracy": 0.5}, "the model is right on 32 of 64 pairs, no more than by chance"),
        ({"accuracy": 0.0}, "the model is right on 0 of 64 pairs, no more than by chance"),
        (
            {"accuracy": 1.0, "faithfulness": share(0.9, 0.8, 1.0, n_pairs=4)},
            "the model is right on 4 of 4 pairs, no more than by chance",
        ),
        (
            {"faithfulness": share(None, reason="no effect"), "control": None},
            "faithfulness is not defined: no effect",
        ),
        ({"faithfulness": share(0.9, n_pairs=1)}, "pairs behind the interval: 1"),
        (
            {"faithfulness": share(0.2, 0.08, 0.3)},
            "the interval begins at 8 %, not above the 97.5th percentile of random circuits, 9 %; "
            "p = 0.0099",
        ),
        (
            {"control": among(-0.02, 0.03, 0.09, 0.06)},
            "the interval begins at 81 %, above the 97.5th percentile of random circuits, 9 %; "
            "p = 0.06",
        ),
        (
            {"control": among(-0.02, 0.03, 0.09, 1 / 19, n=18)},
            "18 random circuits are too few: p cannot come below .05 with less than 19",
        ),
        ({"control": None}, "there are no random circuits to compare it with"),
    ],
)
def test_what_is_not_supported(changed: dict[str, Any], reason: str) -> None:
    """A necessary rule that fails decides, whatever else holds, and says why."""
    found = judged(**changed)
    assert found.word == "not supported"
    assert reason in found.reasons
    assert found.sentence.endswith(f"{CAUTIONS['not supported']}.")
    assert "others may exist" not in found.sentence


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"faithfulness": share(0.6, 0.5, 0.7)},
            "the interval of the faithfulness is 50 % to 70 %, not all above one half",
        ),
        (
            {"faithfulness": share(1.3, 1.1, 1.5)},
            "the interval of the faithfulness is 110 % to 150 %, not all below one and a half",
        ),
        (
            {"control": among(0.2, 0.5, 0.8, 1 / 101)},
            "the median random circuit of this size keeps 50 % of the effect",
        ),
        ({"complement": share(0.5)}, "what is outside keeps 50 % of the effect"),
        ({"stability": recurs(0.5)}, "50 % of its edges recur in at least 90 % of resamples"),
        ({"stability": None}, "whether other pairs would give these edges was not measured"),
        (
            {"stability": recurs(None)},
            "whether other pairs would give these edges was not measured",
        ),
        ({"independent": False}, "it was scored on the pairs that it was found on"),
    ],
)
def test_what_is_partly_supported(changed: dict[str, Any], reason: str) -> None:
    """A rule that is not necessary takes the best word away, and no more."""
    found = judged(**changed)
    assert found.word == "partly supported"
    assert found.reasons == (reason,)
    assert found.sentence.endswith(f"{CAUTIONS['partly supported']}.")


def test_a_single_failing_rule_of_each_kind_together() -> None:
    """With failing rules of both kinds the worse word stands, and all reasons are given."""
    found = judged(accuracy=0.5, independent=False)
    assert found.word == "not supported"
    assert len(found.reasons) == 2


def test_pairs_that_all_agree() -> None:
    """Where all pairs give the same share there is no width, and the share is the interval."""
    exact = share(1.0, reason="all pairs give the same share")
    found = judged(faithfulness=exact, complement=share(0.0))
    assert found.word == "supported"
    assert found.sentence.startswith("recovers 100 % [100, 100] of the effect")


def test_numbers_near_the_ends_keep_a_digit() -> None:
    """99.6 % is not told as 100 %, nor 0.4 % as 0 %; and components are called so."""
    found = judged(
        faithfulness=share(0.996, 0.9, 1.001), complement=share(0.004), size=5 / 16, what="nodes"
    )
    assert found.sentence.startswith("recovers 99.6 % [90, 100.1] of the effect with 31 % of nodes")
    assert "complement keeps 0.4 %" in found.sentence


@pytest.mark.parametrize(
    ("size", "told"),
    [(1.0, "100 %"), (0.153, "15 %"), (0.0996, "10 %"), (0.021, "2.1 %"), (0.00012, "0.012 %")],
)
def test_size_in_percent(size: float, told: str) -> None:
    """Small shares keep two digits, large ones are whole."""
    assert f"effect with {told} of edges;" in judged(size=size).sentence


def test_what_was_not_measured_is_not_told() -> None:
    """The sentence leaves out what there is no number for."""
    found = judged(
        faithfulness=share(None, reason="no effect"), control=None, stability=None,
        complement=replace(share(None), reason="no effect"),
    )  # fmt: skip
    assert found.sentence == (
        "faithfulness is not defined for 2.1 % of edges; random circuits of this size: none. "
        f"{CAUTIONS['not supported']}."
    )


def test_chance_of_many_answers() -> None:
    """With many answers to choose from, a few right ones are more than chance."""
    assert judged(accuracy=5 / 64, chance=1 / 100).word == "supported"
    assert judged(accuracy=1 / 64, chance=1 / 100).word == "not supported"
