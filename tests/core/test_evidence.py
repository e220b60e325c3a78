"""Evidence: sections agree with formulas and independent runs; subjects are found or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitlab
from circuitlab import (
    CircuitGraph,
    GraphError,
    NumericsError,
    OptionError,
    Site,
    Task,
    TaskError,
    zoo,
)
from circuitlab.evaluation import evidence as module
from circuitlab.evaluation.evidence import Evidence, evaluate_circuit
from circuitlab.evaluation.held_out import hold_out
from circuitlab.evaluation.subject import find_subject
from circuitlab.registry import Registry

BUNDLED = {task.name: task for task in zoo.tasks()}
CHEAP: dict[str, Any] = {"n_controls": 20, "resamples": 200, "quick": True}


@pytest.fixture(scope="session")
def ioi() -> CircuitGraph:
    """The circuit of ioi-mini, found on most of its pairs."""
    return circuitlab.build_circuit("ioi-mini", n_pairs=54, top=16)


@pytest.fixture(scope="session")
def ioi_evidence(ioi: CircuitGraph) -> Evidence:
    """What a quick evaluation says of it."""
    return evaluate_circuit(ioi, **CHEAP)


def known(name: str) -> CircuitGraph:
    """The true circuit of a hand-made model, without where it comes from."""
    model = circuitlab.load_model(name)
    circuit = CircuitGraph()
    for source, target, port in sorted(zoo.known_edges(name)):
        for part in (source, target):
            kind, layer, _ = model.wiring.component(part)
            circuit.add_component(part, kind=kind, layer=layer)
        circuit.add_effect(source, target, -1.0, port=port)
    circuit.graph.update(model=name, task=name)
    return circuit


def test_results_are_plain_json_in_the_order_of_the_report(ioi_evidence: Evidence) -> None:
    """Finite JSON of the schema; every section is there, and says a reason or measured."""
    results = ioi_evidence.results
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["schema"] == "circuitlab-evidence/1"
    assert list(results) == [
        "schema", "circuit", "settings", "pairs", "base_rates", "checks", "faithfulness",
        "random_circuits", "completeness", "minimality", "stability", "approximation",
        "sensitivity", "curve", "hypotheses", "discrimination", "verdict", "warnings",
    ]  # fmt: skip
    assert set(results["hypotheses"]) == {"reason"}
    assert "quick" in results["hypotheses"]["reason"]
    assert any("at most 20 random circuits" in warning for warning in results["warnings"])


def test_base_rates_are_those_of_plain_runs(ioi_evidence: Evidence) -> None:
    """The metric of each pair, clean and corrupt, is the logit difference of a plain module."""
    model = ioi_evidence.subject.model
    module, tokenizer = zoo.load("ioi-mini")
    rates = ioi_evidence.results["base_rates"]["per_pair"]
    pairs = ioi_evidence.held_out.task.pairs
    for row in (0, 4, 9):
        pair = pairs[row]
        right, wrong = (tokenizer.convert_tokens_to_ids(str(part[0])) for part in
                        (pair.answers, pair.wrong_answers))  # fmt: skip
        for part, prompt in (("clean", pair.clean), ("corrupt", pair.corrupt)):
            ids = model.tokens([prompt]).ids
            logits = module(input_ids=ids).logits[0, -1]
            assert rates[part][row] == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-4)


def test_faithfulness_is_the_ratio_of_the_means_shown(ioi_evidence: Evidence) -> None:
    """The share is that of the per-pair values in the same results, and its interval holds it."""
    results = ioi_evidence.results
    rates = {key: torch.tensor(v).double() for key, v in results["base_rates"]["per_pair"].items()}
    above = rates["circuit"].mean() - rates["empty"].mean()
    below = rates["clean"].mean() - rates["empty"].mean()
    found = results["faithfulness"]
    assert found["value"] == pytest.approx(float(above / below), abs=1e-6)
    assert found["interval"][0] < found["value"] < found["interval"][1]
    assert (found["n_pairs"], results["pairs"]["origin"]) == (10, "unused")


def test_sensitivity_repeats_the_faithfulness(ioi_evidence: Evidence) -> None:
    """The table's row of the circuit's own ablation, level and direction is the same number."""
    results = ioi_evidence.results
    rows = results["sensitivity"]["rows"]
    own = next(r for r in rows if (r["level"], r["direction"]) == ("edge", "noise"))
    assert own["value"] == results["faithfulness"]["value"]
    assert {row["ablation"] for row in rows} == {"counterfactual"}


def test_quick_says_what_it_left_out(ioi_evidence: Evidence) -> None:
    """At most 20 random circuits, and what is dear says that it was left out."""
    results = ioi_evidence.results
    assert results["random_circuits"]["n"] == 20 == results["settings"]["n_controls"]
    assert results["minimality"] == {"reason": "minimality is left out by --quick"}


def test_known_circuits_are_faithful() -> None:
    """The true circuit of an additive gate keeps the whole effect; its complement none of it."""
    results = evaluate_circuit(known("gate-add"), **CHEAP).results
    assert results["faithfulness"]["value"] == pytest.approx(1, abs=1e-5)
    assert results["completeness"]["complement"]["value"] == pytest.approx(0, abs=1e-5)


def test_the_whole_and_the_empty_circuit_are_one_and_zero() -> None:
    """A circuit of all edges keeps everything; a circuit of no edge nothing."""
    whole = circuitlab.build_circuit("gate-add", top="all")
    assert evaluate_circuit(whole, **CHEAP).results["faithfulness"]["value"] == pytest.approx(1)
    empty = whole.top(0)
    empty.add_component("input", kind="input", layer=0)
    empty.add_component("logits", kind="logits", layer=1)
    assert evaluate_circuit(empty, **CHEAP).results["faithfulness"]["value"] == pytest.approx(0)


def test_evaluating_twice_gives_the_same(ioi: CircuitGraph, ioi_evidence: Evidence) -> None:
    """The same seed gives the same results, byte by byte."""
    assert evaluate_circuit(ioi, **CHEAP).results == ioi_evidence.results


def test_the_given_circuit_is_left_as_it_was(ioi: CircuitGraph, ioi_evidence: Evidence) -> None:
    """What was found is written onto a copy: evidence of the whole, inclusion of the edges."""
    assert "evidence" not in ioi.graph
    assert not any("inclusion" in data for *_, data in ioi.edges(data=True))
    written = ioi_evidence.circuit
    assert written.graph["evidence"]["word"] == ioi_evidence.verdict
    shares = {(s, t, p): d["inclusion"] for s, t, p, d in written.edges(keys=True, data=True)}
    listed = ioi_evidence.results["stability"]["inclusion"]
    assert shares == {
        key: edge["inclusion"]
        for edge in listed
        if (key := (edge["source"], edge["target"], edge["port"])) in shares
    }
    written.validate()


def test_a_circuit_is_read_from_its_file(ioi: CircuitGraph, tmp_path: Path) -> None:
    """A path is as good as the circuit."""
    path = tmp_path / "circuit.json"
    path.write_text(ioi.to_json(), encoding="utf-8")
    subject = find_subject(path)
    assert subject.model.name == "ioi-mini"
    assert subject.task.name == "ioi-mini"
    assert subject.ablation == "counterfactual"
    assert subject.warnings == ()


def test_the_metric_is_that_of_the_circuit() -> None:
    """A circuit found by another metric than the task's own is scored by it."""
    circuit = circuitlab.build_circuit("gate-add", metric="answer-log-prob")
    results = evaluate_circuit(circuit, **CHEAP).results
    assert results["circuit"]["metric"] == "answer-log-prob"
    model = circuitlab.load_model("gate-add")
    task = BUNDLED["gate-add"]
    logits = model.run([task.pairs[0].clean], read=[Site("resid_pre", 0)]).logits[0, -1]
    answer = model.encode(task).answers.right[0, 0]
    expected = float(logits.double().log_softmax(-1)[answer])
    assert results["base_rates"]["clean"] == pytest.approx(expected, abs=1e-5)


def test_another_task_is_told(ioi: CircuitGraph) -> None:
    """A task with another digest than the recorded one is scored on, and said to be another."""
    other = Task("mine", BUNDLED["ioi-mini"].pairs[40:52])
    subject = find_subject(ioi, task=other)
    assert len(subject.warnings) == 1
    assert ioi.graph["task_digest"] in subject.warnings[0]
    assert other.digest in subject.warnings[0]


@pytest.mark.parametrize(
    ("facts", "error", "said"),
    [
        ({"model": None}, OptionError, "--model"),
        ({"remote": True}, OptionError, "--remote"),
        ({"task": "who-knows"}, TaskError, r"digest [0-9a-f]{12}.*--task-file"),
        ({"n_layers": 7}, GraphError, "n_layers 7"),
        ({"ablation": "freeze"}, OptionError, "counterfactual"),
    ],
)
def test_circuits_of_nothing_known_are_refused(
    ioi: CircuitGraph, facts: dict[str, Any], error: type[Exception], said: str
) -> None:
    """A circuit that names no model, no known task, or is of another model says what to give."""
    circuit = ioi.copy()
    circuit.graph.update(facts)
    with pytest.raises(error, match=said):
        evaluate_circuit(circuit, **CHEAP)


def test_options_that_exclude_each_other_are_refused(ioi: CircuitGraph) -> None:
    """Quick and thorough, and no random circuit at all, are mistakes."""
    with pytest.raises(OptionError, match="exclude"):
        evaluate_circuit(ioi, quick=True, thorough=True)
    with pytest.raises(OptionError, match="n_controls is 0"):
        evaluate_circuit(ioi, n_controls=0)


def test_a_notebook_shows_the_verdict(ioi_evidence: Evidence) -> None:
    """Text and HTML begin with the verdict; names of strangers are escaped."""
    bundle = ioi_evidence._repr_mimebundle_()
    assert bundle["text/plain"].startswith(ioi_evidence.verdict)
    canary = dict(ioi_evidence.results)
    canary["verdict"] = {"word": "w", "sentence": "<script>\x1b[31m", "reasons": ["<b>"]}
    shown = Evidence(canary, ioi_evidence.circuit, ioi_evidence.subject, ioi_evidence.held_out)
    bundle = shown._repr_mimebundle_()
    assert "<script>" not in bundle["text/html"]
    assert "<b>" not in bundle["text/html"]
    assert "\x1b" not in bundle["text/plain"]


def test_every_section_is_measured_once(monkeypatch: pytest.MonkeyPatch, ioi: CircuitGraph) -> None:
    """A section that fails on purpose says why, and the others are measured all the same."""

    def broken(bench: Any) -> dict[str, Any]:
        raise TaskError("nothing to see")

    monkeypatch.setitem(module._SECTIONS, "completeness", broken)
    results = evaluate_circuit(ioi, **CHEAP).results
    assert results["completeness"] == {"reason": "nothing to see"}
    assert "values" in results["random_circuits"]


@pytest.mark.parametrize("fault", ["raises", "shape"])
def test_a_plugin_that_fails_is_named(ioi: CircuitGraph, fault: str) -> None:
    """Scores of pairs that cannot be had name the plugin; what needs them is not measured."""

    def broken(model: Any, pairs: Any, **options: Any) -> torch.Tensor:
        if fault == "raises":
            raise ValueError("not today")
        return torch.zeros(3)

    registry = Registry.load()
    analysis = registry.analyses["edge-attribution"]
    registry.analyses["edge-attribution"] = replace(analysis, pair_scores=broken)
    results = evaluate_circuit(ioi, registry=registry, **CHEAP).results
    said = {"raises": "ValueError: not today", "shape": r"gave [3], not scores of shape [54,"}[
        fault
    ]
    for name in ("stability", "approximation", "curve"):
        assert set(results[name]) == {"reason"}
        assert "plugin 'edge-attribution'" in results[name]["reason"]
        assert said in results[name]["reason"]


def test_circuits_of_components_are_scored_as_such() -> None:
    """At level node a circuit is its components, among as many random ones."""
    circuit = circuitlab.build_circuit("greater-than", n_pairs=56, top=8)
    results = evaluate_circuit(circuit, level="node", **CHEAP).results
    model = circuitlab.load_model("greater-than")
    named = set(circuit.nodes) - {"logits"}
    assert results["circuit"]["size"] == len(named)
    assert results["circuit"]["of"] == len(model.wiring.sources)
    pairs = model.encode(hold_out(circuit, BUNDLED["greater-than"]).task)
    kept = [edge for edge in model.wiring.edges if edge.source not in named]
    patched = torch.cat([p.sets([kept])[0] for p in circuitlab.patchers(model, pairs)])
    assert results["faithfulness"]["metric"] == pytest.approx(float(patched.mean()), abs=1e-5)
    assert results["curve"] == {"reason": "a curve is of edges; evaluate at level edge"}


def test_circuits_without_provenance_are_scored_as_they_are() -> None:
    """A circuit from another program has no analysis: the rest is measured, and says why not."""
    circuit = known("gate-and")
    circuit.graph.update(analysis=["odd"], options={"top": {}}, seconds="long", method=3)
    results = evaluate_circuit(circuit, **CHEAP).results
    assert results["faithfulness"]["value"] == pytest.approx(1, abs=1e-5)
    assert "reason" in results["stability"]
    assert "method" not in results["circuit"]
    assert results["pairs"]["origin"] == "same"
    assert any("MAY HAVE BEEN FOUND ON" in warning for warning in results["warnings"])
    assert results["verdict"]["word"] != "supported"


def test_a_number_that_is_not_finite_is_refused(
    monkeypatch: pytest.MonkeyPatch, ioi: CircuitGraph
) -> None:
    """NaN in a section is an error that names it, not a file that nobody can read."""
    monkeypatch.setitem(module._SECTIONS, "curve", lambda bench: {"cpr": float("nan")})
    monkeypatch.setitem(module._SECTIONS, "sensitivity", lambda bench: {"rows": []})
    with pytest.raises(NumericsError, match="curve of the results"):
        evaluate_circuit(ioi, **CHEAP)


def test_another_ablation_judges_the_circuit_and_not_its_scores(
    ioi: CircuitGraph, ioi_evidence: Evidence
) -> None:
    """With zero ablation the circuit is scored by zeros; its scores beside their own."""
    results = evaluate_circuit(ioi, ablation="zero", **CHEAP).results
    assert results["circuit"]["ablation"] == "zero"
    assert results["approximation"] == ioi_evidence.results["approximation"]
    assert results["faithfulness"]["empty"] != ioi_evidence.results["faithfulness"]["empty"]
