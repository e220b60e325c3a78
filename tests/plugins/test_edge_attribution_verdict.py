"""Whether scores are presented as a circuit: known circuits, blind spots, and brute force."""

from __future__ import annotations

import re
from typing import Any

import oracles
import pytest
import torch
from circuitlab_edge_attribution.attribution import Completeness, EdgeScores, edge_scores
from circuitlab_edge_attribution.verdict import judge
from torch import Tensor

from circuitlab import CircuitGraph, OptionError, build_circuit, circuit_of, load_model, zoo
from circuitlab.testing import tiny_model, toy_task

METHODS = ("eap", "eap-ig")


def kept(circuit: CircuitGraph) -> set[tuple[str, str, str]]:
    return {effect[:3] for effect in circuit.effects()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gate-and", "gate-add"])
def test_known_circuit_is_found_and_established(name: str, method: str) -> None:
    """Exactly the edges that do something, each confirmed, and the circuit established."""
    circuit = build_circuit(name, method=method)
    assert kept(circuit) == zoo.known_edges(name, sense="effective")
    assert circuit.graph["verdict"] == "established"
    assert "verdict_reason" not in circuit.graph
    check = circuit.graph["exact_check"]
    counts = {key: check[key] for key in ("checked", "confirmed", "confirmed_share")}
    assert counts == {"checked": 5, "confirmed": 5, "confirmed_share": 1.0}
    assert check["missed"]["estimate"] == 0
    assert check["missed"]["interval"] == [0, 0]
    for _, _, data in circuit.edges(data=True):
        assert data["confirmed"]
        assert data["exact"] * data["score"] > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gate-or", "gate-xor", "gate-jump", "hand-induction"])
def test_blind_spot_is_not_established(name: str, method: str) -> None:
    """Where the slope says nothing of the change, most of the effect is missing, which is said."""
    circuit = build_circuit(name, method=method)
    completeness = circuit.graph["completeness"]
    assert completeness["effect"] != 0
    assert completeness["share"] < 0.5
    assert abs(completeness["gap"]) > 0.5 * abs(completeness["effect"])
    assert circuit.graph["verdict"] == "not established"
    assert "of the effect" in circuit.graph["verdict_reason"]


@pytest.mark.parametrize(
    ("name", "least_rank", "least_sign"), [("induction", 0.65, 0.9), ("ioi-mini", 0.9, 0.95)]
)
def test_scores_agree_with_brute_force(name: str, least_rank: float, least_sign: float) -> None:
    """EAP-IG ranks the edges that matter as patching each one does, and knows their sign."""
    module, _ = zoo.load(name)
    model = load_model(name)
    pairs = model.encode(next(task for task in zoo.tasks() if task.name == name).take(32))
    mask = pairs.clean.mask.long()

    def metric(logits: Tensor) -> Tensor:
        return pairs.score(logits, logits)

    exact = oracles.exact_effects(
        module, pairs.clean.ids, pairs.corrupt.ids, metric, attention_mask=mask
    )
    circuit = circuit_of(model.wiring, edge_scores(model, pairs).scores)
    scores = {effect[:3]: effect[3] for effect in circuit.effects()}
    assert set(scores) == set(exact)
    largest = max(map(abs, exact.values()))
    matter = [edge for edge, effect in exact.items() if abs(effect) > 0.01 * largest]
    found = torch.tensor([[scores[edge], exact[edge]] for edge in matter], dtype=torch.float64).T
    ranks = found.argsort(dim=1).argsort(dim=1).double()
    rank = float(torch.corrcoef(ranks)[0, 1])
    sign = float((found[0].sign() == found[1].sign()).double().mean())
    print(
        f"{name}: {len(matter)} of {len(exact)} edges above 1 % of the largest exact effect, "
        f"Spearman rank correlation {rank:.3f}, sign agreement {sign:.1%}"
    )
    assert rank > least_rank
    assert sign > least_sign


def judged(
    scores: dict[tuple[str, str, str], float], share: float = 1.0, verify: int = 10
) -> CircuitGraph:
    """A circuit of ``gate-add`` with these scores, judged as if they explained this share."""
    model = load_model("gate-add")
    pairs = model.encode(next(task for task in zoo.tasks() if task.name == "gate-add"))
    circuit = CircuitGraph()
    for name in (*model.wiring.sources, "logits"):
        component = model.wiring.component(name)
        circuit.add_component(name, kind=component.kind, layer=component.layer)
    matrix = torch.zeros(len(model.wiring.sources), len(model.wiring.receivers))
    columns = {tuple(receiver): n for n, receiver in enumerate(model.wiring.receivers)}
    for (source, target, port), score in scores.items():
        circuit.add_effect(source, target, score, port=port)
        matrix[model.wiring.source_rows[source], columns[target, port]] = score
    completeness = Completeness(effect=-1.0, cuts={"resid_pre.0": -share}, at_clean=-share)
    scored = EdgeScores(matrix, completeness)
    judge(circuit, model, pairs, scored, "counterfactual", verify=verify, batch_size=None)
    return circuit


TRUE = {("input", "a0.h0", "v"): -0.5, ("m0", "logits", ""): -1.0}


def test_confirmed_and_complete_is_established() -> None:
    """Both tests passed; each edge has its exact effect."""
    circuit = judged(TRUE)
    assert circuit.graph["verdict"] == "established"
    assert abs(circuit.edges["input", "a0.h0", "v"]["exact"] + 0.5) < 1e-6
    assert circuit.graph["completeness"]["share"] == 1.0
    assert circuit.graph["completeness"]["gap"] == 0.0


@pytest.mark.parametrize("share", [0.49, 0.0, -1.0])
def test_incomplete_is_not_established(share: float) -> None:
    """Confirmed edges are no circuit when they miss most of the effect."""
    circuit = judged(TRUE, share)
    assert circuit.graph["verdict"] == "not established"
    assert f"explain {share:.0%} of the effect" in circuit.graph["verdict_reason"]
    assert judged(TRUE, 0.51).graph["verdict"] == "established"


@pytest.mark.parametrize(
    "wrong",
    [
        {("input", "a0.h0", "v"): 0.5},
        {("input", "a0.h0", "v"): -50.0},
        {("input", "a0.h0", "q"): -0.5},
    ],
    ids=["sign", "size", "no effect"],
)
def test_unconfirmed_is_not_established(wrong: dict[tuple[str, str, str], float]) -> None:
    """A score of the wrong sign, ten times too large, or of an edge that does nothing."""
    circuit = judged(wrong)
    ((source, target, port),) = wrong
    assert not circuit.edges[source, target, port]["confirmed"]
    assert circuit.graph["verdict"] == "not established"
    assert re.search(r"confirms .*\b0% of the strongest scores", circuit.graph["verdict_reason"])


def test_no_effect_is_not_established() -> None:
    """Without an effect there is no share of it to explain."""
    nothing = Completeness(effect=0.0, cuts={"resid_pre.0": 0.0}, at_clean=0.0)
    assert nothing.share is None
    model = load_model("gate-add")
    pairs = model.encode(next(task for task in zoo.tasks() if task.name == "gate-add"))
    circuit = CircuitGraph()
    matrix = torch.zeros(len(model.wiring.sources), len(model.wiring.receivers))
    scored = EdgeScores(matrix, nothing)
    judge(circuit, model, pairs, scored, "counterfactual", verify=3, batch_size=None)
    assert circuit.graph["verdict"] == "not established"
    assert circuit.graph["verdict_reason"] == "there is no effect to explain"


def test_only_the_strongest_are_checked() -> None:
    """As many as asked for, the strongest; with none the circuit says that it was not checked."""
    one = judged(TRUE, verify=1)
    assert "exact" in one.edges["m0", "logits", ""]
    assert one.graph["exact_check"]["checked"] == 1
    strata = {tuple(e[k] for k in ("source", "target", "port")): e["stratum"]
              for e in one.graph["exact_check"]["sampled"]}  # fmt: skip
    assert [edge for edge, stratum in strata.items() if stratum == "top"] == [("m0", "logits", "")]
    # The other edge of the circuit is all of the middle; the verdict does not ask it.
    assert strata["input", "a0.h0", "v"] == "middle"
    wrong = judged({("m0", "logits", ""): -1.0, ("input", "a0.h0", "v"): 0.5}, verify=1)
    assert not wrong.edges["input", "a0.h0", "v"]["confirmed"]
    assert wrong.graph["verdict"] == "established"
    none = judged(TRUE, verify=0)
    assert none.graph["verdict"] == "not checked"
    assert "exact_check" not in none.graph
    with pytest.raises(OptionError, match="--verify -1: give how many edges to check"):
        build_circuit("gate-add", verify=-1)


def test_circuit_says_how_it_was_made() -> None:
    """Method, ablation and size stand in the circuit; top and threshold are obeyed."""
    options: dict[str, Any] = {"top": 7, "ig_steps": 3, "ig_rule": "left", "ablation": "zero"}
    circuit = build_circuit(tiny_model(), toy_task(), allow_weak=True, **options)
    assert circuit.graph["method"] == "eap-ig, 3 steps, left"
    assert circuit.graph["ablation"] == "zero"
    assert circuit.number_of_edges() == 7
    assert circuit.graph["options"]["top"] == 7
    least = sorted((abs(effect[3]) for effect in circuit.effects()), reverse=True)[3]
    fewer = build_circuit(tiny_model(), toy_task(), allow_weak=True, threshold=least, **options)
    assert kept(fewer) == kept(circuit.top(4))
    plain = build_circuit(tiny_model(), toy_task(), allow_weak=True, method="eap")
    assert plain.graph["method"] == "eap"


@pytest.mark.parametrize("method", METHODS)
def test_same_circuit_twice(method: str) -> None:
    """The whole document is the same, bit for bit, but for the time it took."""
    one, two = (build_circuit("ioi-mini", n_pairs=8, method=method) for _ in range(2))
    for circuit in (one, two):
        del circuit.graph["seconds"]
    assert one.to_json() == two.to_json()
