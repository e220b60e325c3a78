"""The hand-made models are what they are said to be: tables, true edges, and what gradients see."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from circuitlab import zoo
from circuitlab.tasks import PromptPair, Task
from circuitlab.wiring import Wiring
from circuitlab.zoo import hand

HAND = [name for name, model in zoo.MODELS.items() if model.kind == "hand"]
GATES = [name for name in HAND if name.startswith("gate-")]

Edge = tuple[str, str, str]


def task_of(name: str) -> Task:
    return next(task for task in zoo.tasks() if task.name == name)


def last_logits(module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return module(**tokenizer(text, return_tensors="pt")).logits[0, -1]


class Forward:
    """Runs a GPT-2 without norms edge by edge; edges may carry other values."""

    def __init__(self, module: GPT2LMHeadModel) -> None:
        self.module, config = module, module.config
        self.wiring = Wiring(config.n_layer, config.n_head)
        self.edges: list[Edge] = [
            (source, receiver.component, receiver.port)
            for block in self.wiring.blocks()
            for receiver in self.wiring.receivers[block.receivers]
            for source in self.wiring.sources[: block.n_sources]
        ]

    def __call__(
        self,
        embedded: Tensor,
        carried: Mapping[Edge, Tensor] | None = None,
        steer: Mapping[tuple[str, str], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Outputs by component; ``carried`` replaces edges, ``steer`` is added to receivers."""
        out = {"input": embedded}
        for block in self.wiring.blocks():
            heard = self.wiring.sources[: block.n_sources]
            read: dict[tuple[str, str], Tensor] = {}
            for component, port in self.wiring.receivers[block.receivers]:
                parts = [
                    (carried or {}).get((source, component, port), out[source]) for source in heard
                ]
                read[component, port] = torch.stack(parts).sum(0)
                if steer and (component, port) in steer:
                    read[component, port] = read[component, port] + steer[component, port]
            for component in dict.fromkeys(name for name, _ in read):
                out[component] = self.component(component, read)
        return out

    def component(self, name: str, read: Mapping[tuple[str, str], Tensor]) -> Tensor:
        kind, layer, head = self.wiring.component(name)
        if kind == "logits":
            return self.module.lm_head(read[name, ""])
        block = self.module.transformer.h[layer]
        if kind == "mlp":
            return block.mlp(read[name, ""])
        width = self.module.config.n_embd
        d_head, inputs = width // self.module.config.n_head, block.attn.c_attn
        queries, keys, values = (
            read[name, port] @ inputs.weight[:, start:][:, :d_head] + inputs.bias[start:][:d_head]
            for port, start in zip("qkv", range(head * d_head, 3 * width, width), strict=True)
        )
        scores = queries @ keys.T / math.sqrt(d_head)
        future = torch.ones_like(scores).triu(1).bool()
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        return pattern @ values @ block.attn.c_proj.weight[head * d_head :][:d_head]


def embed(module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return module.transformer.wte(ids) + module.transformer.wpe(torch.arange(len(ids)))


def difference(logits: Tensor, tokenizer: PreTrainedTokenizerFast, pair: PromptPair) -> Tensor:
    right, wrong = tokenizer.convert_tokens_to_ids([pair.answers[0], pair.wrong_answers[0]])
    return logits[-1, right] - logits[-1, wrong]


def exact_effects(name: str, pair: PromptPair) -> dict[Edge, float]:
    """metric(edge carries the corrupt run's value) - metric(clean) of every edge, one by one."""
    module, tokenizer = zoo.load(name)
    run = Forward(module)
    clean, corrupt = (run(embed(module, tokenizer, text)) for text in (pair.clean, pair.corrupt))
    base = difference(clean["logits"], tokenizer, pair)
    return {
        edge: (
            difference(run(clean["input"], {edge: corrupt[edge[0]]})["logits"], tokenizer, pair)
            - base
        ).item()
        for edge in run.edges
    }


def gradient_scores(name: str, pair: PromptPair, share: float = 1.0) -> dict[Edge, float]:
    """(corrupt - clean source) . gradient at the receiver, of every edge.

    The gradient is taken at ``share`` of the clean and the rest of the corrupt input.
    """
    module, tokenizer = zoo.load(name)
    run = Forward(module)
    clean, corrupt = (run(embed(module, tokenizer, text)) for text in (pair.clean, pair.corrupt))
    steer = {
        (target, port): torch.zeros_like(clean["input"], requires_grad=True)
        for _, target, port in run.edges
    }
    here = run(corrupt["input"] + share * (clean["input"] - corrupt["input"]), steer=steer)
    metric = difference(here["logits"], tokenizer, pair)
    gradients = dict(zip(steer, torch.autograd.grad(metric, list(steer.values())), strict=True))
    return {
        (source, target, port): ((corrupt[source] - clean[source]) * gradients[target, port])
        .sum()
        .item()
        for source, target, port in run.edges
    }


@pytest.mark.parametrize("name", HAND)
def test_edge_by_edge_pass_is_the_model(name: str) -> None:
    """The forward pass the following tests patch gives the stock model's logits."""
    module, tokenizer = zoo.load(name)
    for pair in task_of(name).pairs[:3]:
        mine = Forward(module)(embed(module, tokenizer, pair.clean))["logits"][-1]
        assert torch.allclose(mine, last_logits(module, tokenizer, pair.clean), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GATES)
def test_gate_table_is_exact(name: str) -> None:
    """logit("yes") - logit("no") is the gate's value for all four inputs."""
    module, tokenizer = zoo.load(name)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    for (a, b), value in hand.GATES[name].table.items():
        logits = last_logits(module, tokenizer, f"{('off', 'on')[a]} {('off', 'on')[b]} =")
        assert (logits[yes] - logits[no]).item() == pytest.approx(value, abs=1e-3)


def test_gate_tables_are_the_gates() -> None:
    """The tables are those of logic: and, or, half the sum, exclusive or."""
    truth = {
        "gate-and": lambda a, b: a and b,
        "gate-or": lambda a, b: a or b,
        "gate-add": lambda a, b: (a + b) / 2,
        "gate-xor": lambda a, b: a ^ b,
        "gate-jump": lambda a, b: a and b,
    }
    assert list(truth) == GATES
    for name, function in truth.items():
        for (a, b), value in hand.GATES[name].table.items():
            assert value == function(a, b), (name, a, b)


@pytest.mark.parametrize("name", GATES)
def test_no_input_lies_on_a_kink(name: str) -> None:
    """At every position of every input each ReLU is clearly on or clearly off."""
    module, tokenizer = zoo.load(name)
    before: list[Tensor] = []
    handle = module.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda _, inputs, output: before.append(output[0, -1])
    )
    for bits in hand.GATES[name].table:
        last_logits(module, tokenizer, hand.gate_prompt(bits))
    handle.remove()
    assert len(before) == 4
    assert torch.stack(before).abs().min() >= 0.2


@pytest.mark.parametrize("name", HAND)
def test_effective_edges_are_what_patching_finds(name: str) -> None:
    """Of all edges, exactly the listed ones change the metric when they alone are patched."""
    found: dict[Edge, float] = {}
    for pair in task_of(name).pairs[:3]:
        for edge, effect in exact_effects(name, pair).items():
            found[edge] = max(found.get(edge, 0.0), abs(effect))
    assert {edge for edge, effect in found.items() if effect > 0.1} == zoo.known_edges(
        name, sense="effective"
    )
    assert all(effect < 1e-3 or effect > 0.1 for effect in found.values())


def mechanism_prompts(name: str) -> list[str]:
    if name in GATES:
        return [hand.gate_prompt(bits) for bits in hand.GATES[name].table]
    return [pair.clean for pair in task_of(name).pairs[:3]]


@pytest.mark.parametrize("name", HAND)
def test_mechanism_suffices_and_nothing_in_it_is_spare(name: str) -> None:
    """Zero in all other edges changes no answer; zero in any one of the mechanism's does."""
    module, tokenizer = zoo.load(name)
    run, mechanism = Forward(module), zoo.known_edges(name)

    def changes(zeroed: set[Edge]) -> float:
        largest = 0.0
        for text in mechanism_prompts(name):
            embedded = embed(module, tokenizer, text)
            zeros = dict.fromkeys(zeroed, torch.zeros_like(embedded))
            clean, cut = run(embedded)["logits"][-1], run(embedded, zeros)["logits"][-1]
            largest = max(largest, (cut - clean).abs().max().item())
        return largest

    assert mechanism < set(run.edges)
    assert changes(set(run.edges) - mechanism) < 1e-3
    assert {edge for edge in mechanism if changes({edge}) < 0.1} == set()


def test_gate_and_gradient_is_exact() -> None:
    """gate-and: at the clean prompt each edge's gradient score is its exact effect, -1."""
    (pair,) = task_of("gate-and").pairs
    gradient, exact = gradient_scores("gate-and", pair), exact_effects("gate-and", pair)
    for edge in zoo.known_edges("gate-and", sense="effective"):
        assert gradient[edge] == pytest.approx(-1, abs=1e-3), edge
        assert exact[edge] == pytest.approx(-1, abs=1e-3), edge


def test_gate_or_gradient_is_blind() -> None:
    """gate-or: each bit's gradient and single effect are 0, yet both together do everything."""
    (pair,) = task_of("gate-or").pairs
    gradient, exact = gradient_scores("gate-or", pair), exact_effects("gate-or", pair)
    for head in ("a0.h0", "a0.h1"):
        for edge in (("input", head, "v"), (head, "m0", "")):
            assert abs(gradient[edge]) < 1e-6
            assert abs(exact[edge]) < 1e-3
    module, tokenizer = zoo.load("gate-or")
    run = Forward(module)
    clean, corrupt = (run(embed(module, tokenizer, text)) for text in (pair.clean, pair.corrupt))
    both = {(head, "m0", ""): corrupt[head] for head in ("a0.h0", "a0.h1")}
    change = difference(run(clean["input"], both)["logits"], tokenizer, pair) - difference(
        clean["logits"], tokenizer, pair
    )
    assert change.item() == pytest.approx(-1, abs=1e-3)


def test_gate_add_is_additive() -> None:
    """gate-add: gradient and exact effect of each bit are -0.5, and both sum to the whole."""
    (pair,) = task_of("gate-add").pairs
    for scores in (gradient_scores("gate-add", pair), exact_effects("gate-add", pair)):
        assert scores["a0.h0", "m0", ""] == pytest.approx(-0.5, abs=1e-3)
        assert scores["a0.h1", "m0", ""] == pytest.approx(-0.5, abs=1e-3)
        assert scores["m0", "logits", ""] == pytest.approx(-1, abs=1e-3)


def test_gate_xor_gradient_has_the_wrong_sign() -> None:
    """gate-xor: switching the second bit on costs 1, and the gradient promises a gain of 1."""
    for pair, head in zip(task_of("gate-xor").pairs, ("a0.h1", "a0.h0"), strict=True):
        gradient, exact = gradient_scores("gate-xor", pair), exact_effects("gate-xor", pair)
        for edge in (("input", head, "v"), (head, "m0", "")):
            assert exact[edge] == pytest.approx(-1, abs=1e-3)
            assert gradient[edge] == pytest.approx(1, abs=1e-3)


def test_gate_jump_is_invisible_to_gradients() -> None:
    """gate-jump: no gradient at either end or at 5 steps between, left or midpoint, sees the -1."""
    (pair,) = task_of("gate-jump").pairs
    bits = [
        (source, target, port)
        for source, target, port in zoo.known_edges("gate-jump", sense="effective")
        if target != "logits"
    ]
    assert len(bits) == 4
    for share in (*(k / 5 for k in range(6)), *((k + 0.5) / 5 for k in range(5))):
        scores = gradient_scores("gate-jump", pair, share)
        assert all(abs(scores[edge]) < 1e-6 for edge in bits), share
    exact = exact_effects("gate-jump", pair)
    assert all(exact[edge] == pytest.approx(-1, abs=1e-3) for edge in bits)


def test_hand_induction_gradient_vanishes_in_queries_and_keys() -> None:
    """hand-induction: the key edge's exact effect is the whole task, its gradient nothing."""
    for pair in task_of("hand-induction").pairs[:3]:
        gradient, exact = (
            scores("hand-induction", pair) for scores in (gradient_scores, exact_effects)
        )
        for edge in (("a0.h0", "a1.h0", "k"), ("input", "a0.h0", "v")):
            assert exact[edge] < -8
            assert abs(gradient[edge]) < 1e-6
        attention = [score for (_, _, port), score in gradient.items() if port in ("q", "k")]
        assert max(map(abs, attention)) < 1e-6


def test_hand_induction_is_right_by_a_margin() -> None:
    """hand-induction: on every prompt the answer beats each other word by 9 logits."""
    module, tokenizer = zoo.load("hand-induction")
    for pair in task_of("hand-induction").pairs:
        (best, second), (answer, _) = last_logits(module, tokenizer, pair.clean).topk(2)
        assert (tokenizer.decode(answer),) == pair.answers
        assert best - second >= 9
