"""The sharpening circuit: brute force with hooks, hand-made models, what it says and leaves out."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.sharpness.circuits import freeze, sharpening_circuit
from circuitlab_activation_plateaus.sharpness.freezing import NOTHING, parts_after
from circuitlab_activation_plateaus.walks.bundle import Settings
from circuitlab_activation_plateaus.walks.pairs import Bank
from families import random_module, silent, traced
from freeze_oracles import Plain
from torch import Tensor

from circuitlab import (
    Bars,
    CircuitGraph,
    OptionError,
    Site,
    TaskError,
    Tokens,
    TracedModel,
    load_model,
    panels_of,
)

SITE = Site("resid_pre", 1)
STEPS = 9
SETTINGS = Settings(SITE, "lerp", "d-sym", STEPS, refine=0)
N_PAIRS = 4


def bank_of(rows: list[tuple[list[int], list[int]]]) -> Bank:
    """Pairs of prompts of any length, padded on the left."""
    width = max(len(a) for a, _ in rows)
    sides = []
    for side in (0, 1):
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, pair in enumerate(rows):
            ids[row, width - len(pair[side]) :] = torch.tensor(pair[side])
            mask[row, width - len(pair[side]) :] = True
        sides.append(Tokens(ids, mask))
    return Bank(sides[0], sides[1], [("a", "b")] * len(rows), False, "test")


PAIRS = [([3, 4, 5], [3, 4, 9]), ([7, 8, 2, 1], [6, 5, 4, 3]), ([1, 2], [1, 30]), ([9, 8], [2, 8])]


@cache
def random_model() -> tuple[Any, TracedModel]:
    module = random_module("llama", 3)
    return module, traced(module)


@cache
def circuit() -> CircuitGraph:
    return sharpening_circuit(random_model()[1], bank_of(PAIRS), SETTINGS)


def d_sym(values: Tensor) -> Tensor:
    """The share of the way, step by step, of ``[n_steps, width]``."""
    values = values.double()
    a, b = ((values - values[end]).norm(dim=-1) for end in (0, -1))
    return a / (a + b)


def steepest(values: Tensor) -> float:
    return float(d_sym(values).diff().max() * (STEPS - 1))


def participation(values: Tensor) -> float:
    speed = values.double().diff(dim=0).norm(dim=-1)
    return float(speed.mean() ** 2 / (speed**2).mean())


@cache
def brute() -> dict[tuple[str, int], list[tuple[float, float, float]]]:
    """Excess, participation and span by pair, of each part held at each end, by hooks."""
    module, model = random_model()
    plain, bank = Plain(module, model.architecture), bank_of(PAIRS)
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for row in range(N_PAIRS):
        ends, ids = [], []
        for side in (bank.a, bank.b):
            ids.append(side.ids[row][side.mask[row]])
            hidden = module(ids[-1][None], output_hidden_states=True).hidden_states[SITE.layer]
            ends.append(hidden[0, -1])
        way = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, STEPS)[:, None]).detach()
        logits, free = plain.walk(ids[0], 1, way, {})
        names = {name: (name,) for name in free}
        names["all norms"] = tuple(name for name in free if name.endswith("norm"))
        names["all MLPs"] = ("m1", "m2")
        names["nothing"] = ()
        for name, members in names.items():
            for end in (0, 1):
                hold = {member: free[member][-end] for member in members}
                values = plain.walk(ids[0], 1, way, hold)[0]
                found.setdefault((name, end), []).append(
                    (
                        steepest(values) / steepest(way),
                        participation(values),
                        float((values[-1] - values[0]).norm() / (logits[-1] - logits[0]).norm()),
                    )
                )
    return found


def test_changes_are_those_of_hooks() -> None:
    """Score, excess, participation and span of every component are those of held plain walks."""
    graph, found = circuit(), brute()
    free = torch.tensor(found["nothing", 0])
    assert graph.graph["excess_sharpness"]["mean"] == pytest.approx(float(free[:, 0].mean()), 1e-3)
    told = {data["name"]: data for data in graph.graph["freezing"]}
    assert set(told) == {part.name for part in parts_after(random_model()[1], SITE)}
    for name in sorted(set(told) - {"all attention"}):
        ends = [torch.tensor(found[name, end]) for end in (0, 1)]
        for key, held in zip("ab", ends, strict=True):
            data = told[name][key]
            change = (held - free).mean(0).tolist()
            assert data["excess"] == pytest.approx(change[0], rel=5e-3, abs=2e-3), name
            assert data["participation"] == pytest.approx(change[1], rel=5e-3, abs=2e-3), name
            assert data["span"] == pytest.approx(float(held[:, 2].mean()), rel=2e-3), name
        score = (told[name]["a"]["excess"] + told[name]["b"]["excess"]) / 2
        assert told[name]["score"] == pytest.approx(score)
        assert told[name]["n_pairs"] == N_PAIRS
        assert told[name]["interval"][0] <= score <= told[name]["interval"][1]


def test_graph_has_components_that_do_not_overlap() -> None:
    """Heads and MLPs are drawn, strongest first; whole attentions only where heads are not."""
    graph = circuit()
    sources = {source for source, *_ in graph.effects()}
    heads = {f"a{layer}.h{head}" for layer in (1, 2) for head in range(4)}
    assert sources == heads | {"m1", "m2"}
    told = {data["name"]: data for data in graph.graph["freezing"]}
    for source, target, port, score in graph.effects():
        assert (target, port, score) == ("logits", "", told[source]["score"])
        assert graph.edges[source, target, port]["a"] == told[source]["a"]
    assert graph.nodes["a2.h1"] == {"kind": "head", "layer": 2, "head": 1}
    assert "negative = it sharpens" in graph.graph["score"]
    few = sharpening_circuit(
        random_model()[1], bank_of(PAIRS[:2]), SETTINGS, kinds=["attn", "mlp"], top=3
    )
    assert few.number_of_edges() == 3
    names = {data["name"] for data in few.graph["freezing"] if data["kind"] != "all"}
    assert names == {"a1", "a2", "m1", "m2"}
    assert {data["kind"] for _, data in few.nodes(data=True)} <= {"attention", "mlp", "logits"}


def test_what_is_told() -> None:
    """Findings name components, sums and norms apart, strongest first; all data are plain."""
    graph = circuit()
    json.dumps(graph.graph, allow_nan=False)
    graph.validate()
    findings = graph.graph["findings"]
    strongest = next(iter(graph.effects()))[0]
    assert findings["held one by one"].startswith(strongest)
    assert "all MLPs" in findings["held together"]
    assert ".norm" in findings["norms held"]
    assert "not_held" not in graph.graph
    assert "4 pairs" in graph.graph["method"]
    (panel,) = panels_of(graph)
    assert isinstance(panel, Bars)
    assert panel.bars[0].name == f"{graph.graph['freezing'][0]['name']} at A"


def test_swapped_ends_swap_a_and_b() -> None:
    """In one context the walk from B to A has the same scores, with held at A and at B swapped."""
    _, model = random_model()
    same = [([3, 4, 5], [3, 4, 9]), ([7, 8, 2], [7, 8, 11])]
    there = sharpening_circuit(model, bank_of(same), SETTINGS, kinds=["mlp", "ln"])
    back = [(b, a) for a, b in same]
    again = sharpening_circuit(model, bank_of(back), SETTINGS, kinds=["mlp", "ln"])
    found = {data["name"]: data for data in again.graph["freezing"]}
    for data in there.graph["freezing"]:
        other = found[data["name"]]
        assert data["score"] == pytest.approx(other["score"], abs=1e-4)
        for name, swapped in ("ab", "ba"):
            assert data[name]["excess"] == pytest.approx(other[swapped]["excess"], abs=1e-4)


def test_component_that_writes_nothing_has_no_effect() -> None:
    """A head whose output weights are 0 changes nothing when held; others do."""
    module: Any = random_module("llama", 2)
    module.model.layers[1].self_attn.o_proj.weight.data[:, 4:8] = 0
    graph = sharpening_circuit(traced(module), bank_of(PAIRS), SETTINGS, kinds=["heads"])
    scores = {source: score for source, _, _, score in graph.effects()}
    assert scores.pop("a1.h1") == pytest.approx(0, abs=1e-6)
    assert min(map(abs, scores.values())) > 1e-5


def test_mlp_that_makes_the_jump() -> None:
    """In a gate that jumps the MLP makes it: held, no output moves, which is told and unscored."""
    model = load_model("gate-jump")
    tokens = [model.tokens([text]).ids[0].tolist() for text in ("on on =", "off off =")]
    site = Site("resid_mid", 0)
    settings = Settings(site, "lerp", "d-sym", 21, refine=0)
    graph = sharpening_circuit(model, bank_of([(tokens[0], tokens[1])]), settings)
    assert graph.graph["still"] == ["m0"]
    assert "m0" not in graph
    # From one bit's worth on to the other the output jumps within one of 20 steps.
    assert graph.graph["excess_sharpness"] == {"mean": pytest.approx(20, rel=1e-3)}
    assert "100% of the pairs jump within one step" in graph.graph["findings"]["grid"]
    assert graph.graph["findings"]["still when held"].startswith("m0")
    norm = next(data for data in graph.graph["freezing"] if data["name"] == "m0.norm")
    assert norm["score"] == pytest.approx(0, abs=1e-4)  # it has no norm that scales


def test_pairs_that_do_not_move_are_left_out() -> None:
    """A pair of one prompt counts for nothing, and is told; with no other it is refused."""
    _, model = random_model()
    with_still = bank_of([*PAIRS[:2], ([1, 2, 3], [1, 2, 3])])
    graph = sharpening_circuit(model, with_still, SETTINGS, kinds=["mlp"])
    assert {data["n_pairs"] for data in graph.graph["freezing"]} == {2}
    alone = sharpening_circuit(model, bank_of(PAIRS[:2]), SETTINGS, kinds=["mlp"])
    assert alone.number_of_edges() == 2
    for edge, data in alone.edges.items():
        assert graph.edges[edge]["score"] == pytest.approx(data["score"], abs=1e-5)
    with pytest.raises(TaskError, match="does not move"):
        sharpening_circuit(model, with_still.rows([2]), SETTINGS, kinds=["mlp"])


def test_chunks_of_pairs_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few pairs are walked together, the sharpness of each is the same."""
    _, model = random_model()
    parts = parts_after(model, SITE, ["mlp"])
    whole = freeze(model, bank_of(PAIRS), SETTINGS, parts)
    monkeypatch.setattr("circuitlab_activation_plateaus.sharpness.circuits.LOGITS", 1)
    single = freeze(model, bank_of(PAIRS), SETTINGS, parts)
    for part in parts:
        for one, other in zip(whole.held[part], single.held[part], strict=True):
            assert torch.allclose(one.excess, other.excess, atol=1e-4)
    assert torch.allclose(whole.free.span, single.free.span, rtol=1e-4)
    assert NOTHING not in whole.held


def test_norms_that_cannot_be_held_are_told() -> None:
    """Where the MLP is not described its norm is left out with the reason; the rest is there."""
    model = silent(random_module("neox-sequential", 2))
    graph = sharpening_circuit(model, bank_of(PAIRS), SETTINGS, kinds=["ln", "mlp"])
    assert set(graph.graph["not_held"]) == {"m1.norm", "all norms"}
    assert "hidden layer" in graph.graph["not_held"]["m1.norm"]
    assert {data["name"] for data in graph.graph["freezing"]} == {"a1.norm", "logits.norm", "m1"}


def test_bad_options_are_refused() -> None:
    """Nothing after the site, and a top below 0, are errors."""
    _, model = random_model()
    with pytest.raises(OptionError, match="runs after"):
        sharpening_circuit(model, bank_of(PAIRS), Settings(Site("resid_post", 2)), kinds=["mlp"])
    with pytest.raises(OptionError, match="top"):
        sharpening_circuit(model, bank_of(PAIRS), SETTINGS, top=-1)
