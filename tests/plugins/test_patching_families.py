"""Scores of edges, paths and senders on families whose heads share, against the stock model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from circuitlab_edge_attribution import jumps
from circuitlab_edge_attribution.attribution import edge_scores
from circuitlab_edge_attribution.ig_path import InputPath
from circuitlab_edge_attribution.jumps import Jump, _Crossing
from circuitlab_path_patching.effects import Setting
from circuitlab_path_patching.paths.effects import path_effects
from circuitlab_path_patching.paths.language import parse_paths, parse_receivers
from circuitlab_path_patching.paths.senders import sender_effects
from families import ALL_FAMILIES, random_module, unchecked
from family_oracles import Receiver, SplitModel, SplitRun, receiver_gradients
from random_tasks import random_task
from torch import Tensor

from circuitlab import Edge, build_circuit
from circuitlab.edge_sets import edge_masks

FLOAT32 = 2e-5
#: One key for all heads, norms behind, queries and keys normed alone, and all together.
SHARING = ("llama-wide", "gemma2", "qwen3", "olmo2")
MODES = ("noise", "denoise")


class Case:
    """A model of a family, a task, and both prompts of every pair in the stock model."""

    def __init__(self, family: str) -> None:
        self.module = random_module(family).requires_grad_(False)
        self.model, self.split = unchecked(self.module), SplitModel(self.module)
        self.pairs = self.model.encode(random_task([6, 4]))
        self.mask = self.pairs.clean.mask.long()
        with torch.no_grad():
            self.clean = self.split.run(self.pairs.clean.ids, self.mask)
            self.corrupt = self.split.run(self.pairs.corrupt.ids, self.mask)

    def metric(self, logits: Tensor) -> Tensor:
        return self.pairs.score(logits, self.clean.logits[0])

    def sides(self, mode: str) -> tuple[Tensor, SplitRun, SplitRun]:
        """Ids of the base run, the base run, and the other."""
        if mode == "noise":
            return self.pairs.clean.ids, self.clean, self.corrupt
        return self.pairs.corrupt.ids, self.corrupt, self.clean

    def effect(self, logits: Tensor, mode: str) -> Tensor:
        sign = 1 if mode == "noise" else -1
        base = self.sides(mode)[1].logits[0]
        return sign * (self.metric(logits) - self.metric(base)).double()

    @torch.no_grad()
    def path(self, nodes: Sequence[tuple[str, str]], mode: str) -> Tensor:
        """Components on the path are recomputed one by one, at the end everything behind it."""
        ids, base, other = self.sides(mode)
        value, before = other.outputs[nodes[0][0]], nodes[0][0]
        run = base
        for name, ports in nodes[1:]:
            change = value - base.outputs[before]
            reads = {(name, port): base.inputs[name, port] + change for port in ports or ("",)}
            run = self.split.run(ids, self.mask, reads=reads)
            if name != "logits":
                value, before = run.outputs[name], name
        return self.effect(run.logits[0], mode)

    @torch.no_grad()
    def sender(self, sender: str, receivers: Sequence[Receiver], mode: str, mediate: str) -> Tensor:
        """Receivers read what reaches them from the sender past heads as they are (Wang 2022)."""
        ids, base, other = self.sides(mode)
        frozen = dict(base.outputs) | {sender: other.outputs[sender]}
        held = torch.tensor(
            [mediate == "all" or s[0] != "m" or s == sender for s in self.split.sources]
        )
        patched = held[None, :, None].expand(1, -1, len(self.split.receivers))
        first = self.split.run(ids, self.mask, other=frozen, patched=patched)
        reads = {receiver: first.inputs[receiver] for receiver in receivers}
        return self.effect(self.split.run(ids, self.mask, reads=reads).logits[0], mode)

    def scores(self, alphas: Sequence[float]) -> Tensor:
        """(corrupt - clean output) . mean gradient, mean over pairs, ``[sources, receivers]``."""
        start, end = (run.outputs["input"] for run in (self.corrupt, self.clean))
        total = torch.zeros(len(self.split.sources), len(self.split.receivers))
        for alpha in alphas:
            point = start + alpha * (end - start)
            gradients = receiver_gradients(
                self.module, self.pairs.clean.ids, self.mask, self.metric, embedding=point
            )
            for column, (receiver, n_sources) in enumerate(self.split.receivers.items()):
                for row, source in enumerate(self.split.sources[:n_sources]):
                    moved = (self.corrupt.outputs[source] - self.clean.outputs[source]).mul(
                        self.mask[..., None]
                    )
                    total[row, column] += (moved * gradients[receiver]).sum() / len(self.pairs)
        return total / len(alphas)


def close(found: Tensor, expected: Tensor) -> bool:
    size = float(expected.abs().max())
    assert size > 1e-2
    return float((found - expected).abs().max()) < FLOAT32 * max(1.0, size)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradient_scores(family: str) -> None:
    """EAP and EAP-IG: every edge, also into shared keys and values."""
    case = Case(family)
    eap = edge_scores(case.model, case.pairs, method="eap").scores
    assert close(eap, case.scores([1.0]))
    ig = edge_scores(case.model, case.pairs, ig_steps=2, ig_rule="midpoint").scores
    assert close(ig, case.scores([0.25, 0.75]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_a_circuit_and_its_exact_check(family: str) -> None:
    """The whole analysis: scores of a shared key are drawn, and what is patched is exact."""
    case = Case(family)
    circuit = build_circuit(case.model, case.pairs.task, verify=30, allow_weak=True)
    checked = [edge for edge, data in circuit.edges.items() if "exact" in data]
    assert len(checked) >= 30
    assert {port for *_, port in checked} >= {"q", "k", "v"}
    patched = edge_masks(case.model.wiring, [[Edge(*edge)] for edge in checked])
    with torch.no_grad():
        logits = case.split.run(
            case.pairs.clean.ids, case.mask, other=case.corrupt.outputs, patched=patched
        ).logits
    expected = torch.stack([case.effect(row, "noise").mean() for row in logits])
    found = torch.tensor([circuit.edges[edge]["exact"] for edge in checked]).double()
    assert close(found, expected)


@pytest.mark.parametrize("family", ["gemma2", "llama-wide", "olmo2", "phi3"])
def test_pushes_in_front_of_a_jump(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast each edge moves what the last MLP reads, also into a key that others share."""
    monkeypatch.setattr(jumps, "PUSH", 2.0**-9)  # these models bend more than a jump's surroundings
    case, alpha = Case(family), 0.4
    start, end = (run.outputs["input"] for run in (case.corrupt, case.clean))
    difference = torch.stack(
        [case.corrupt.outputs[s] - case.clean.outputs[s] for s in case.split.sources]
    )
    difference = difference * case.mask[..., None]
    clean = case.clean.logits[0]
    ends = case.metric(case.corrupt.logits[0]).double(), case.metric(clean).double()
    path = InputPath(case.model, case.pairs, end, difference, clean, ends)
    torch.manual_seed(0)
    normal = torch.randn(6, 16)
    pushes = {key: torch.zeros_like(end).requires_grad_() for key in case.split.receivers}
    embedding = start + alpha * (end - start)
    run = case.split.run(case.pairs.clean.ids, case.mask, pushes=pushes, embedding=embedding)
    moving = (run.inputs["m1", ""][0] * normal).sum()
    gradients = torch.autograd.grad(moving, list(pushes.values()), materialize_grads=True)
    crossing = _Crossing(path, Jump(0, alpha, 0.0, "m1"), 1)
    for block in list(case.model.wiring.blocks())[:4]:
        found = crossing.pushed(block, normal)
        expected = torch.stack(
            [
                (difference[: block.n_sources, 0] * g[0]).sum((1, 2))
                for g in gradients[block.receivers]
            ],
            1,
        )
        assert float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max()), block


@pytest.fixture(scope="module", params=SHARING)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


PATHS = (
    "input>a0.1:q>a1.2:k>logits",
    "input>a0.1:q>a1.2:k",
    "input>a0.1:k>m1>logits",
    "input>a0.3:v>m0>a1.0:qkv>m1>logits",
    "a0.2>a1.3:qk>logits",
    "a0.2>a1.3:kv",
    "m0>a1.1:v",
    "m0>a1.1:q>m1",
    "input>a0.0:kv",
)


@pytest.mark.parametrize("mode", MODES)
def test_paths(case: Case, mode: Any) -> None:
    """Components on a path, alone; where it ends at a head, all that its write moves."""
    paths = [path for text in PATHS for path in parse_paths(text, case.model.wiring)]
    found = path_effects(Setting(case.model, case.pairs, mode), paths)[mode]
    expected = torch.stack([case.path(path.nodes, mode) for path in paths])
    assert close(found, expected)


RECEIVERS = ("logits", "a1.0:k", "a1.0:q, a1.1:v", "a0.1:kv, m0, a1.*:q", "a0.0, a1.1:k, m1")


@pytest.mark.parametrize(("mode", "mediate"), [("noise", "heads"), ("denoise", "all")])
def test_senders(case: Case, mode: Any, mediate: Any) -> None:
    """Receivers together read what a sender sends them; everything else is recomputed."""
    setting = Setting(case.model, case.pairs, mode)
    senders = ("input", "a0.h1", "m0")
    for text in RECEIVERS:
        receivers = parse_receivers(text, case.model.wiring)
        used = senders if text[:2] != "a0" else senders[:1]
        found = sender_effects(setting, used, receivers, mediate=mediate)[mode]
        expected = torch.stack([case.sender(s, receivers, mode, mediate) for s in used])
        assert close(found, expected), text
