"""ACDC against the plain sequential search over brute force, on gates, interrupted and resumed."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from circuitlab_path_patching.search import acdc
from random_tasks import random_task
from torch import Tensor

from circuitlab import CircuitGraph, OptionError, Patcher, Task, TracedModel, load_model, zoo
from circuitlab.checkpoint import StateFile
from circuitlab.progress import listening

#: The module; the package has a function of the same name.
SEARCH = importlib.import_module("circuitlab_path_patching.search")
TOLERANCE = 1e-9
TASK = random_task([6, 3, 5])


class Stopped(BaseException):
    """What ends a run here, as Ctrl-C would."""


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(2, 2, 16, seed=3)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


def documented_order(n_layers: int, n_heads: int) -> list[oracles.Edge]:
    """Edges in the order that the module's first lines give."""
    edges = oracles.edge_names(n_layers, n_heads)
    receivers = [("logits", "")]
    for layer in reversed(range(n_layers)):
        heads = [f"a{layer}.h{head}" for head in reversed(range(n_heads))]
        receivers += [(f"m{layer}", ""), *((head, port) for port in "vkq" for head in heads)]
    return [edge for receiver in receivers for edge in reversed(edges) if edge[1:] == receiver]


class Plain:
    """ACDC one edge after the other, each in a forward pass of its own."""

    def __init__(self, module: Any, model: TracedModel, mode: str, ablation: str) -> None:
        pairs = model.encode(TASK)
        self.module, self.mask = module, pairs.clean.mask.long()
        ids = [pairs.clean.ids, pairs.corrupt.ids]
        self.base_ids, other_ids = ids if mode == "noise" else ids[::-1]
        self.other = oracles.ablated_outputs(module, self.base_ids, other_ids, ablation, self.mask)
        clean = oracles.run(module, pairs.clean.ids, self.mask).logits[:, -1]
        self.score = partial(pairs.score, reference=clean)
        self.base = self.logits(set())

    @torch.no_grad()
    def logits(self, removed: set[oracles.Edge]) -> Tensor:
        mixes = {edge: self.other[edge[0]] for edge in removed}
        return oracles.run(self.module, self.base_ids, self.mask, mixes=mixes).logits[:, -1]

    def metric(self, removed: set[oracles.Edge]) -> float:
        return float(self.score(self.logits(removed)).mean())

    def distance(self, removed: set[oracles.Edge], kind: str) -> float:
        logits = self.logits(removed)
        if kind == "metric":
            return float((self.score(logits) - self.score(self.base)).abs().mean())
        base, now = self.base.log_softmax(-1), logits.log_softmax(-1)
        return float((base.exp() * (base - now)).sum(-1).mean())

    def search(self, kind: str, threshold: float) -> dict[oracles.Edge, float]:
        """The edges kept, each with the growth of the distance when it was tried."""
        removed: set[oracles.Edge] = set()
        distance, kept = 0.0, {}
        for edge in documented_order(2, 2):
            now = self.distance(removed | {edge}, kind)
            if now - distance < threshold:
                removed.add(edge)
                distance = now
            else:
                kept[edge] = now - distance
        return kept


def kept(circuit: CircuitGraph, value: str = "increase") -> dict[tuple[str, str, str], float]:
    return {(s, t, p): data[value] for s, t, p, data in circuit.edges(keys=True, data=True)}


@pytest.mark.parametrize(
    ("mode", "ablation"),
    [
        ("noise", "counterfactual"),
        ("denoise", "counterfactual"),
        ("noise", "zero"),
        ("noise", "mean"),
    ],
)
@pytest.mark.parametrize(
    ("distance", "thresholds"), [("kl", (1e-3, 0.02, 0.2)), ("metric", (1e-3, 0.05, 0.5))]
)
def test_it_is_the_sequential_search(
    module: Any,
    model: TracedModel,
    mode: Any,
    ablation: Any,
    distance: Any,
    thresholds: tuple[float, ...],
) -> None:
    """The same edges kept, with the same increases and scores, and the same distance."""
    plain = Plain(module, model, mode, ablation)
    sizes = []
    for threshold in thresholds:
        circuit = acdc(
            model, TASK, mode=mode, ablation=ablation, distance=distance, threshold=threshold
        )
        expected, found = plain.search(distance, threshold), kept(circuit)
        assert found.keys() == expected.keys()
        assert all(abs(found[edge] - expected[edge]) < TOLERANCE for edge in expected)
        removed = set(oracles.edges_of(module)) - set(expected)
        whole, sign = plain.metric(removed), 1 if mode == "noise" else -1
        for edge, score in kept(circuit, "score").items():
            assert abs(score - sign * (plain.metric(removed | {edge}) - whole)) < TOLERANCE
        said = circuit.graph["findings"]["distance from the base run"]
        assert said.startswith(f"{plain.distance(removed, distance):.4g} ")
        sizes.append(len(found))
    # The thresholds are where the search has something to decide.
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("threshold", [1e-3, 0.02])
def test_guesses_and_batches_change_nothing(
    model: TracedModel, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    """However many edges a pass tries and however many pairs it holds, the circuit is the same."""
    expected = kept(acdc(model, TASK, threshold=threshold))
    assert 0 < len(expected) < model.wiring.n_edges
    for smallest, largest, size in ((1, 1, 3), (1, 3, 2), (64, 64, 1)):
        monkeypatch.setattr(SEARCH, "MIN_WINDOW", smallest)
        monkeypatch.setattr(SEARCH, "MAX_WINDOW", largest)
        found = kept(acdc(model, TASK, threshold=threshold, batch_size=size))
        assert found.keys() == expected.keys()
        assert all(abs(found[edge] - expected[edge]) < TOLERANCE for edge in expected)


def test_many_edges_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are several times fewer than edges tried, and few tries are in vain."""
    rows: list[int] = []
    original = Patcher.sets

    def counted(self: Patcher, sets: Any) -> Tensor:
        rows.append(len(sets))
        return original(self, sets)

    monkeypatch.setattr(Patcher, "sets", counted)
    model = load_model((oracles.random_gpt2(3, 4, 32, seed=1), None))
    circuit = acdc(model, TASK, threshold=0.005)
    tried = int(circuit.graph["findings"]["edges tried"].split(";")[0])
    scored = circuit.number_of_edges() + 1
    assert len(rows) < tried / 3
    assert sum(rows) - scored < 2 * tried


def test_edges_into_what_nobody_reads_are_not_tried(model: TracedModel) -> None:
    """With a threshold above everything, only the edges into the logits are tried."""
    circuit = acdc(model, TASK, threshold=100)
    assert circuit.number_of_edges() == 0
    assert set(circuit) == {"input", "logits"}
    findings = circuit.graph["findings"]
    n_sources = len(model.wiring.sources)
    assert findings["edges tried"].startswith(f"{n_sources}; the other {46 - n_sources} ")
    assert findings["edges kept"] == "0 of 46"
    assert findings["effect recovered"].startswith("0.0% ")
    assert "no edge is kept" in circuit.graph["warnings"][0]


def test_everything_kept_is_told() -> None:
    """A threshold below every increase keeps the model, which has the whole effect."""
    model = load_model((oracles.random_gpt2(1, 1, 16), None))
    circuit = acdc(model, TASK, threshold=1e-6)
    assert set(kept(circuit)) == set(model.wiring.edges)
    assert "every edge is kept" in circuit.graph["warnings"][0]
    assert circuit.graph["findings"]["effect recovered"].startswith("100.0% ")


# --- known circuits -------------------------------------------------------------------------------


def bundled(name: str) -> tuple[TracedModel, Task]:
    return load_model(name), next(task for task in zoo.tasks() if task.name == name)


@pytest.mark.parametrize("distance", ["kl", "metric"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("gate-and", "noise"),
        ("gate-add", "noise"),
        ("gate-add", "denoise"),
        ("gate-or", "denoise"),
        ("hand-induction", "noise"),
    ],
)
def test_known_circuits_are_found(name: str, mode: Any, distance: Any) -> None:
    """All inputs of AND by noising, all of OR by denoising, of ADD by either."""
    model, task = bundled(name)
    expected = zoo.known_edges("gate-and" if name == "gate-or" else name, sense="effective")
    circuit = acdc(model, task, mode=mode, distance=distance)
    assert kept(circuit).keys() == expected
    # Whatever is kept is needed: without it the base run's answer is lost.
    assert all(score < -0.4 for score in kept(circuit, "score").values())


@pytest.mark.parametrize(("name", "mode"), [("gate-and", "denoise"), ("gate-or", "noise")])
def test_one_of_two_that_suffice_is_removed(name: str, mode: Any) -> None:
    """Of inputs of which either suffices, the one tried first goes, and then the other stays."""
    model, task = bundled(name)
    circuit = acdc(model, task, mode=mode)
    edges = {("input", "a0.h0", "v"), ("a0.h0", "m0", ""), ("m0", "logits", "")}
    assert kept(circuit).keys() == edges


@pytest.mark.parametrize("name", ["induction", "ioi-mini"])
def test_trained_models(name: str) -> None:
    """Less than half of the edges recovers most of the effect."""
    model, task = bundled(name)
    pairs = Task(task.name, task.pairs[:8], task.metric)
    circuit = acdc(model, pairs, threshold=0.02)
    assert 3 < circuit.number_of_edges() < model.wiring.n_edges / 2
    share = circuit.graph["findings"]["effect recovered"].split("%")[0]
    assert 60 < float(share) < 110


# --- the same again -------------------------------------------------------------------------------


def test_every_process_finds_the_same(tmp_path: Path, process_env: dict[str, str]) -> None:
    """Byte for byte, whatever the hash seed."""
    script = tmp_path / "search.py"
    script.write_text(
        "from circuitlab import Task, load_model, zoo\n"
        "from circuitlab_path_patching.search import acdc\n"
        "task = next(task for task in zoo.tasks() if task.name == 'induction')\n"
        "task = Task(task.name, task.pairs[:4], task.metric)\n"
        "print(acdc(load_model('induction'), task, threshold=0.05).to_json())\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, str(script)],
            env=process_env | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "1")
    }
    (text,) = texts
    assert b"increase" in text


def stopping(patch: pytest.MonkeyPatch, passes: int) -> None:
    """The engine ends the run before its pass of that number."""
    original, left = Patcher.sets, iter(range(passes))

    def counted(self: Patcher, sets: Any) -> Tensor:
        if next(left, None) is None:
            raise Stopped
        return original(self, sets)

    patch.setattr(Patcher, "sets", counted)


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_an_interrupted_search_goes_on(
    model: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """Stopped wherever, and again, it ends with the same circuit, and does no pass twice."""
    search = partial(acdc, model, TASK, mode=mode, threshold=5e-3)
    expected = search().to_json()
    path, runs = tmp_path / "acdc.state", 0
    while runs < 100:
        with monkeypatch.context() as patch:
            stopping(patch, 3)
            try:
                with StateFile(path) as state, state.used({}, model.device):
                    found = search()
                break
            except Stopped:
                runs += 1
    assert found.to_json() == expected
    assert runs > 3
    assert not path.exists()


def test_progress_counts_edges(model: TracedModel, tmp_path: Path) -> None:
    """One step for each edge, those not tried too; a resumed run begins where the first stopped."""
    seen: list[tuple[str, int, int | None]] = []
    with listening(lambda *step: seen.append(step)):
        acdc(model, TASK, threshold=0.02)
    first = [(done, total) for text, done, total in seen if text == "ACDC: 46 edges"]
    assert first == [(done, 46) for done in range(47)]

    def stop(text: str, done: int, total: int | None) -> None:
        if done == 20:
            raise Stopped

    path = tmp_path / "acdc.state"
    with pytest.raises(Stopped), StateFile(path) as state, state.used({}, model.device):
        with listening(stop):
            acdc(model, TASK, threshold=0.02)
    seen.clear()
    with StateFile(path) as state, state.used({}, model.device):
        with listening(lambda *step: seen.append(step)):
            acdc(model, TASK, threshold=0.02)
    assert 20 <= seen[0][1] < 46
    assert ("ACDC: 46 edges", 46, 46) in seen


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_decides_nothing_is_refused(model: TracedModel, threshold: float) -> None:
    """At 0, edges without any effect would be decided by rounding."""
    with pytest.raises(OptionError, match="give a number above 0"):
        acdc(model, TASK, threshold=threshold)


@pytest.mark.parametrize("distance", ["kl", "metric"])
def test_denoising_needs_the_corrupt_run(model: TracedModel, distance: Any) -> None:
    """Zero and mean have no run to denoise, whatever the distance."""
    with pytest.raises(OptionError, match="ablation zero has no such run"):
        acdc(model, TASK, mode="denoise", distance=distance, ablation="zero")
