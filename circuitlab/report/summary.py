"""A summary of the evidence in a few lines, as a terminal shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitlab.report.telling import plain, share, told

Results = Mapping[str, Any]

#: Label, the section it is of, and what is said of it; nothing where that is a share.
_LINES = (
    ("verdict", "verdict", "{verdict.word}: {verdict.sentence}"),
    ("faithfulness", "faithfulness", ""),
    (
        "random circuits",
        "random_circuits",
        "{random_circuits.n}, median {random_circuits.median:%}, p {random_circuits.p}",
    ),
    (
        "complement",
        "completeness",
        "",
    ),
    (
        "stability",
        "stability",
        "{stability.recurring:%} of its edges recur, mean Jaccard index {stability.jaccard:%}",
    ),
    (
        "scores",
        "approximation",
        "rank correlation with patching {approximation.rank_correlation}, sign right for "
        "{approximation.sign:%}",
    ),
    (
        "pairs",
        "pairs",
        "{pairs.n_pairs}, {pairs.how}; prompts in both: {pairs.shared_prompts}",
    ),
    (
        "task",
        "base_rates",
        "accuracy {base_rates.accuracy:%}, chance {base_rates.chance:%}; metric "
        "{base_rates.clean} clean, {base_rates.corrupt} corrupt",
    ),
    (
        "size",
        "circuit",
        "{circuit.size} of {circuit.of} {circuit.level}s, {circuit.components} components; "
        "ablation {circuit.ablation}",
    ),
)


def summary(results: Results) -> dict[str, str]:
    """Label and text of each line; a section that was not measured says why."""
    lines = {}
    for label, key, template in _LINES:
        found = results[key]
        if set(found) == {"reason"}:
            lines[label] = f"not measured: {found['reason']}"
        elif template:
            lines[label] = plain(told(template, results))
        else:
            lines[label] = plain(share(results, key if "value" in found else f"{key}.{label}"))
    for number, reason in enumerate(results["verdict"]["reasons"], start=1):
        lines[f"reason {number}"] = reason
    return lines
