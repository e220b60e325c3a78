"""Sections of an evaluation: each measures one thing and gives plain, finite JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from circuitlab.ablation import Ablation
from circuitlab.errors import CircuitLabError, OptionError
from circuitlab.evaluation.approximation import approximation
from circuitlab.evaluation.bench import Bench
from circuitlab.evaluation.curve import faithfulness_curve
from circuitlab.evaluation.discrimination import discrimination
from circuitlab.evaluation.hypotheses import ALPHA, hypotheses
from circuitlab.evaluation.minimality import minimality
from circuitlab.evaluation.sensitivity import sensitivity
from circuitlab.evaluation.stability import Stability
from circuitlab.evaluation.verdict import verdict
from circuitlab.zoo import MODELS, known_edges

#: Senses in which an edge is known to belong to a true circuit.
Sense = Literal["mechanism", "effective"]


def measured(section: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """A section; where it cannot be measured, ``{"reason": why}``."""
    try:
        return section(bench)
    except CircuitLabError as error:
        return {"reason": str(error)}


def about(bench: Bench) -> dict[str, Any]:
    """The circuit that is evaluated, and its size."""
    facts, wiring = bench.circuit.graph, bench.subject.model.wiring
    size = len(bench.kept)
    total = wiring.n_edges if bench.settings.level == "edge" else len(wiring.sources)
    named = ("analysis", "method", "score", "verdict", "verdict_reason")
    return {
        "model": bench.subject.model.name,
        "model_revision": bench.subject.model.revision,
        "task": bench.subject.task.name,
        "task_digest": bench.subject.task.digest,
        "metric": bench.subject.task.metric,
        "ablation": bench.subject.ablation,
        **{name: facts[name] for name in named if isinstance(facts.get(name), str)},
        "level": bench.settings.level,
        "size": size,
        "of": total,
        "share": size / total,
        "components": bench.circuit.number_of_nodes(),
    }


def base_rates(bench: Bench) -> dict[str, Any]:
    """What the model does on the held-out pairs, clean and corrupt, and the circuit beside it."""
    found = bench.measured.to_json(bench.settings.seed)
    if not isinstance(found["interval"], list):
        found |= {"interval": None, "reason": found["interval"]}
    return found | {
        "per_pair": {
            "number": list(bench.pairs.numbers),
            "clean": bench.measured.clean.tolist(),
            "corrupt": bench.measured.corrupt.tolist(),
            "circuit": bench.metric.tolist(),
            "empty": bench.runs.empty.tolist(),
        }
    }


def random_circuits(bench: Bench) -> dict[str, Any]:
    """The circuit among random ones of its size and kind."""
    if not bench.control.values:
        raise OptionError(f"there are no other circuits of this size ({bench.control.drawn.how})")
    return bench.control.to_json()


def completeness_of(bench: Bench) -> dict[str, Any]:
    """What the model does without the circuit, and both without the same components."""
    return bench.completeness.to_json()


def minimality_of(bench: Bench) -> dict[str, Any]:
    """What each part adds."""
    bench.needs_effect()
    bench.needs_time("minimality")
    return minimality(bench.runs, bench.kept, seed=bench.settings.seed).to_json()


def stability_of(bench: Bench) -> dict[str, Any]:
    """How often other draws of the pairs give the same edges."""
    if not bench.kept:
        raise OptionError("the circuit is empty")
    return bench.stability.to_json()


def approximation_of(bench: Bench) -> dict[str, Any]:
    """Scores beside exact patching, on the pairs they are of."""
    if bench.held_out.source is None:
        raise OptionError("the pairs it was found on are not at hand")
    scored = bench.circuit.graph.get("ablation")  # which need not be that of the evaluation
    found = approximation(
        bench.subject.model,
        bench.subject.model.encode(bench.held_out.source),
        bench.scores,
        ablation=scored if scored in get_args(Ablation) else bench.subject.ablation,
        batch_size=bench.settings.batch_size,
        seed=bench.settings.seed,
    )
    return found.to_json()


def hypotheses_of(bench: Bench) -> dict[str, Any]:
    """Five tests of what a circuit is said to be."""
    bench.needs_effect()
    bench.needs_time("testing hypotheses")
    found = hypotheses(bench.runs, bench.kept, bench.control, seed=bench.settings.seed)
    return {"alpha": ALPHA, "tests": [test.to_json() for test in found]}


def discrimination_of(bench: Bench) -> dict[str, Any]:
    """Scores beside the true circuit, where the model was made by a formula."""
    model = bench.subject.model
    if model.task_name is None or MODELS[model.name].kind != "hand":
        raise OptionError("the true circuit of this model is not known")
    found: dict[str, Any] = {}
    for sense in get_args(Sense):
        known = known_edges(model.name, sense=sense)
        found[sense] = discrimination(model.wiring, bench.scores, known).to_json()
    return found


def verdict_of(bench: Bench) -> dict[str, Any]:
    """The verdict on all of it."""
    undefined = bench.faithfulness.value is None
    level, size = about(bench)["level"], about(bench)["share"]
    found = verdict(
        accuracy=bench.measured.accuracy,
        chance=bench.measured.chance,
        faithfulness=bench.faithfulness,
        control=None if undefined else bench.control,
        complement=bench.faithfulness if undefined else bench.completeness.complement,
        stability=_or_none(lambda: bench.stability),
        size=size,
        independent=bench.held_out.independent,
        what=f"{level}s",
    )
    return found.to_json()


def sensitivity_rows(bench: Bench) -> dict[str, Any]:
    """Faithfulness under other ablations, at both levels, and in the other direction."""
    chosen = {"ablations": (bench.subject.ablation,)} if bench.settings.quick else {}
    rows = sensitivity(
        bench.subject.model,
        bench.pairs,
        bench.circuit,
        seed=bench.settings.seed,
        resamples=bench.settings.resamples,
        batch_size=bench.settings.batch_size,
        **chosen,
    )
    return {"rows": rows}


def curve(bench: Bench) -> dict[str, Any]:
    """Faithfulness by size, from the analysis's scores of all edges."""
    if bench.settings.level != "edge":
        raise OptionError("a curve is of edges; evaluate at level edge")
    return faithfulness_curve(bench.runs, bench.scores, seed=bench.settings.seed).to_json()


def _or_none(stability: Callable[[], Stability]) -> Stability | None:
    try:
        return stability()
    except CircuitLabError:
        return None
