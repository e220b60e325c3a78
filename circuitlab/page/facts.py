"""Facts: what a page says of a circuit as a whole, from its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from circuitlab.graph import EDGE_SCORE, CircuitGraph
from circuitlab.labels import clip, visible

_WORDS = (
    ("model", "model"),
    ("task", "task"),
    ("metric", "metric"),
    ("method", "method"),
    ("analysis", "analysis"),
    ("ablation", "ablation"),
    ("n_pairs", "pairs"),
)


def about(circuit: CircuitGraph) -> dict[str, Any]:
    """Title, facts, verdict, findings and the meaning of a score, as plain visible text."""
    graph = circuit.graph
    facts = [[words, text] for key, words in _WORDS if (text := _word(graph.get(key)))]
    facts += _baseline(graph.get("baseline")) + _checks(graph) + _comparison(graph)
    verdict, reason = graph.get("verdict"), graph.get("verdict_reason")
    if isinstance(evidence := graph.get("evidence"), Mapping):  # it has looked further
        verdict, reason = evidence.get("word"), evidence.get("sentence")
    findings = graph.get("findings")
    return {
        "title": title(circuit),
        "facts": facts,
        "verdict": _word(verdict) if isinstance(verdict, str) else "",
        "reason": _word(reason, 600),
        "findings": [
            [_word(label), _word(text, 1000)]
            for label, text in (findings.items() if isinstance(findings, Mapping) else ())
        ],
        "score": _word(graph.get("score", EDGE_SCORE), 600),
        "warnings": [_word(text, 600) for text in _list(graph.get("warnings"))],
    }


def title(circuit: CircuitGraph) -> str:
    """What the page is called: the task and the model, or what there is."""
    words = [_word(circuit.graph.get(key)) for key in ("task", "model")]
    if words[0] == words[1]:
        words = words[1:]
    return " · ".join(word for word in words if word) or "Circuit"


def caption(circuit: CircuitGraph) -> str:
    """One line: model, task, metric, method and ablation, each once."""
    keys = ("model", "task", "metric", "method", "ablation")
    words = [word for key in keys if (word := _word(circuit.graph.get(key)))]
    return " · ".join(dict.fromkeys(words))


def _baseline(baseline: Any) -> list[list[str]]:
    if not isinstance(baseline, Mapping):
        return []
    facts = []
    effect, interval = baseline.get("effect"), baseline.get("interval")
    if _is_number(effect):
        text = _figure(effect)
        if isinstance(interval, list | tuple) and all(map(_is_number, interval)):
            text += f" [{', '.join(map(_figure, interval))}]"
        facts.append(["effect", text])
    if _is_number(baseline.get("accuracy")):
        facts.append(["accuracy", f"{baseline['accuracy']:.0%}"])
    return facts


def _checks(graph: Mapping[str, Any]) -> list[list[str]]:
    facts = []
    completeness, exact = graph.get("completeness"), graph.get("exact_check")
    if isinstance(completeness, Mapping) and _is_number(completeness.get("share")):
        share = round(completeness["share"], 2) + 0.0  # never minus 0
        facts.append(["scores explain", f"{share:.0%} of the effect"])
    if isinstance(exact, Mapping) and exact.get("checked"):
        facts.append(["patched", f"{exact.get('confirmed')} of {exact['checked']} confirmed"])
    return [[words, visible(text)] for words, text in facts]


def _comparison(graph: Mapping[str, Any]) -> list[list[str]]:
    found = graph.get("comparison")
    if not isinstance(found, Mapping):
        return []
    told = [str(words).partition(": ") for words in _list(found.get("differences"))]
    facts = [[_word(key), _word(values, 400)] for key, _, values in told]
    if _is_number(found.get("jaccard")):
        facts.append(["Jaccard", f"{found['jaccard']:.2f}"])
    return facts


def _figure(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _word(value: Any, width: int = 120) -> str:
    if isinstance(value, Mapping):
        value = value.get("name", "")
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return clip(visible(str(value)), width) if value not in (None, "") else ""
