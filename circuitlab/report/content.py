"""What a report says, in order; every number comes from the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from circuitlab.report.blocks import Block, Code, Drawing, Items, Part, Rows
from circuitlab.report.telling import Line, Name, Number, figure, share, told

Results = Mapping[str, Any]

#: Components shown in a table; the page has all of them.
_SHOWN = 30


def parts(results: Results, reproduce: str) -> list[Part]:
    """The parts of a report, those first that a reader needs most."""
    made = [
        _verdict(results),
        _subject(results),
        _faithfulness(results),
        _optional("Random circuits", results, "random_circuits", _random),
        _optional("Complement", results, "completeness", _completeness),
        _optional("Parts", results, "minimality", _minimality),
        _optional("Stability", results, "stability", _stability),
        _optional("Scores", results, "approximation", _approximation),
        _optional("Sensitivity", results, "sensitivity", _sensitivity),
        _optional("Curve", results, "curve", _curve),
        _optional("Tests", results, "hypotheses", _hypotheses),
        _optional("Known circuit", results, "discrimination", _discrimination),
        _components(results),
        Part("Reproduce", [Code(reproduce), *_warnings(results)]),
    ]
    return [part for part in made if part.blocks]


def _optional(
    title: str, results: Results, key: str, blocks: Callable[[Results], list[Block]]
) -> Part:
    """A section, or why it was not measured."""
    found = results[key]
    if set(found) == {"reason"}:
        return Part(title, [told(f"Not measured: {{{key}.reason}}.", results)])
    return Part(title, blocks(results))


def _verdict(results: Results) -> Part:
    rows = []
    for n, rule in enumerate(results["verdict"]["criteria"]):
        asked = "yes" if rule["necessary"] else ""
        met = "yes" if rule["met"] else "NO"
        rows.append([*_cells(results, f"verdict.criteria.{n}", "name", "found"), (asked,), (met,)])
    return Part(
        "Verdict",
        [
            told("{verdict.word:strong}: {verdict.sentence}", results),
            Rows(("rule", "what was found", "necessary", "met"), rows),
        ],
    )


def _subject(results: Results) -> Part:
    lines = [
        told(
            "Model {circuit.model:name}, task {circuit.task:name}, metric {circuit.metric:name}, "
            "ablation {circuit.ablation:name}.",
            results,
        ),
        told(
            "The circuit is a set of {circuit.size} of {circuit.of} {circuit.level}s "
            "({circuit.share:%}), {circuit.components} components.",
            results,
        ),
        told(
            "Scored on {pairs.n_pairs} pairs: {pairs.how}. Found on {pairs.found_on}; prompts "
            "in both: {pairs.shared_prompts}.",
            results,
        ),
        told(
            "On these pairs the model has accuracy {base_rates.accuracy:%} (chance "
            "{base_rates.chance:%}); its metric is {base_rates.clean} on clean prompts and "
            "{base_rates.corrupt} on corrupt ones, difference {base_rates.effect} "
            "{base_rates.interval}.",
            results,
        ),
    ]
    if {"analysis", "method"} <= set(results["circuit"]):
        lines.insert(1, told("Found by {circuit.analysis:name} ({circuit.method}).", results))
    if "verdict" in results["circuit"]:
        lines.append(told("When it was found its scores were {circuit.verdict:name}.", results))
    return Part("Subject", [Items(lines), Drawing("circuit", "The circuit.")])


def _faithfulness(results: Results) -> Part:
    rest = told(
        ". Its metric is {faithfulness.metric}, that of the whole model {faithfulness.whole}, that "
        "of the empty circuit {faithfulness.empty} ({settings.confidence:%} intervals over "
        "{faithfulness.n_pairs} pairs, BCa bootstrap of {settings.resamples} resamples).",
        results,
    )
    line = ("The circuit keeps of the effect: ", *share(results, "faithfulness"), *rest)
    check = told(
        "Self-check: run as a circuit, the whole model is off by {checks.whole.difference}, the "
        "empty one by {checks.empty.difference}; at most {checks.whole.tolerance} is rounding.",
        results,
    )
    shown = Drawing("pairs", "Each held-out pair: metric of the model and of the circuit.")
    return Part("Faithfulness", [line, check, shown])


def _random(results: Results) -> list[Block]:
    return [
        told(
            "Faithfulness of {random_circuits.n} random circuits ({random_circuits.how}): median "
            "{random_circuits.median:%}, the middle {settings.confidence:%} from "
            "{random_circuits.low:%} to {random_circuits.high:%}. "
            "{random_circuits.percentile} % of them lie below this circuit; p = "
            "{random_circuits.p}.",
            results,
        ),
        Drawing("controls", "Faithfulness of random circuits, and of this one."),
    ]


def _completeness(results: Results) -> list[Block]:
    first = (
        "What is left of the effect without the circuit (near none for one that is needed): ",
        *share(results, "completeness.complement"),
        ".",
    )
    if results["completeness"]["worst"] is None:
        return [first]
    return [
        first,
        told(
            "The same components knocked out of circuit and model, the set that tells them apart "
            "most: without {completeness.worst.removed:name} the circuit keeps "
            "{completeness.worst.circuit:%}, the model {completeness.worst.model:%}.",
            results,
        ),
    ]


def _minimality(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for key, word in (("components", "component"), ("edges", "edge")):
        rows = []
        for n, part in enumerate(results["minimality"][key][:_SHOWN]):
            at = f"minimality.{key}.{n}"
            interval = "" if part["interval"] is None else f" {{{at}.interval:%}}"
            drop = told(f"{{{at}.drop:%}}{interval}", results)
            largest = told(f"{{{at}.largest:%}}", results)
            idle = ("does nothing" if part["idle"] else "",)
            rows.append([(Name(part["name"]),), drop, *([largest] * (key == "components")), idle])
        if rows:
            more = ("largest drop",) * (key == "components")
            blocks.append(Rows((word, "drop without it", *more, "note"), rows))
    blocks.append(
        told(
            "drop: faithfulness lost when it alone is taken out; largest: of the drops when some "
            "of the others are out before. Without all {circuit.level}s that do nothing the "
            "circuit keeps {minimality.without_idle:%} of the effect, with them "
            "{minimality.whole:%}.",
            results,
        )
    )
    return blocks


def _stability(results: Results) -> list[Block]:
    return [
        told(
            "Found again {stability.n_resamples} times on {stability.n_pairs} pairs drawn with "
            "replacement ({stability.how}): {stability.recurring:%} of its edges recur in nearly "
            "all; two draws share {stability.jaccard:%} of their edges (mean Jaccard index).",
            results,
        ),
        Drawing("stability", "How often each edge of the circuit is found again."),
    ]


def _approximation(results: Results) -> list[Block]:
    n = len(results["approximation"]["sampled"])
    return (
        [
            told(
                "Scores against exact patching of a sample of edges, from the strongest to the "
                "weakest: rank correlation {approximation.rank_correlation}, right sign "
                "{approximation.sign:%}.",
                results,
            ),
        ]
        if n
        else [("No edge was sampled.",)]
    )


def _discrimination(results: Results) -> list[Block]:
    rows = []
    for sense in results["discrimination"]:
        at = f"discrimination.{sense}"
        rows.append([(sense,), *_cells(results, at, "n_known", "auroc", "average_precision")])
    return [
        told("The model was made by a formula, so its true circuit is known.", results),
        Rows(("sense", "edges known", "AUROC", "average precision"), rows),
    ]


def _sensitivity(results: Results) -> list[Block]:
    rows = []
    for n in _range(results["sensitivity"]["rows"]):
        at = f"sensitivity.rows.{n}"
        rows.append([*_cells(results, at, "ablation", "level", "direction"), share(results, at)])
    return [
        Rows(("ablation", "level", "direction", "faithfulness"), rows),
        told(
            "noise: everything outside the circuit is ablated in the clean run; denoise: the "
            "circuit alone is restored in the corrupt run.",
            results,
        ),
    ]


def _curve(results: Results) -> list[Block]:
    line = told(
        "Area under the faithfulness (CPR) {curve.cpr}, of its distance from one (CMD) "
        "{curve.cmd}; {curve.rule}.",
        results,
    )
    rows = [
        [
            told(f"{{curve.fractions.{n}:%}}", results),
            told(f"{{curve.n_edges.{n}}}", results),
            share(results, f"curve.points.{n}"),
        ]
        for n in _range(results["curve"]["points"])
    ]
    return [
        line,
        Rows(("share of edges", "edges", "faithfulness"), rows),
        Drawing("curve", "Faithfulness of the strongest edges, by how many are kept."),
    ]


def _components(results: Results) -> Part:
    nodes = results.get("nodes", {})
    effects = {name: data["effects"] for name, data in nodes.items() if data.get("effects")}
    ranked = sorted(effects, key=lambda name: (-abs(effects[name]["noise"]), name))[:_SHOWN]
    if not ranked:
        return Part("Components")
    rows: list[Sequence[Line]] = [
        [
            (Name(name),),
            *((Number(figure(effects[name][mode])),) for mode in ("noise", "denoise")),
        ]
        for name in ranked
    ]
    return Part(
        "Components",
        [
            Rows(("component", "noise", "denoise"), rows),
            told(
                "Change of the metric by a component, negative = it helps. noise: it alone carries "
                "what it writes on the corrupt prompt, in the clean run; denoise: what the corrupt "
                "run lacks of it. Strongest first.",
                results,
            ),
        ],
    )


def _warnings(results: Results) -> list[Block]:
    lines = [told(f"{{warnings.{n}}}", results) for n in _range(results["warnings"])]
    return [("Warnings:",), Items(lines)] if lines else []


def _cells(results: Results, at: str, *fields: str) -> list[Line]:
    return [told(f"{{{at}.{field}}}", results) for field in fields]


def _range(values: Sequence[object]) -> range:
    return range(len(values))


def _hypotheses(results: Results) -> list[Block]:
    rows = []
    for n in _range(results["hypotheses"]["tests"]):
        at = f"hypotheses.tests.{n}"
        holds = "holds" if results["hypotheses"]["tests"][n]["holds"] else "does not hold"
        cells = _cells(results, at, "name", "null", "statistic", "p", "corrected")
        rows.append([*cells, (holds,)])
    return [
        Rows(("test", "null hypothesis", "statistic", "p", "corrected", ""), rows),
        told(
            "Corrected by Holm's method; a null hypothesis is rejected at {hypotheses.alpha}. An "
            "ideal that is not rejected is not shown either.",
            results,
        ),
    ]
