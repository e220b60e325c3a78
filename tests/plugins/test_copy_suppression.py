"""Copy suppression: heads compiled by hand with either sign, and plain Hugging Face as oracle."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from circuitlab_attention_heads.roles import find_roles, summarise
from circuitlab_attention_heads.sequences import (
    Repeats,
    find_lengths,
    find_vocabulary,
    repeated_sequences,
)
from circuitlab_attention_heads.suppression import find_predictions, measure
from oracles import random_gpt2
from torch import Tensor, nn

from circuitlab import Site, TracedModel, load_model
from circuitlab.zoo.network import finished, gpt2, parameters

WORDS, PLACES = 30, 24
#: Where words, positions, the word before, and what is predicted stand in the stream.
BEFORE, PREDICTED = WORDS + PLACES, 2 * WORDS + PLACES
WIDTH = PREDICTED + WORDS
#: Logit of what is predicted.
CONFIDENCE = 8.0

Pairs = Iterable[tuple[int, int]]


class Compiled:
    """A GPT-2 without norms, of two heads a layer, that does nothing until heads are written."""

    def __init__(self, n_layers: int) -> None:
        self.module = gpt2(
            WORDS, PLACES, n_layers=n_layers, n_heads=2, d_model=2 * WIDTH, n_inner=1
        )
        names = [name for name, part in self.module.named_modules() if type(part) is nn.LayerNorm]
        for name in names:
            self.module.set_submodule(name, nn.Identity())
        self.weights = parameters(finished(self.module))
        for weight in self.weights.values():
            weight.zero_()
        self.weights["transformer.wte.weight"][:, :WORDS] = torch.eye(WORDS)
        self.weights["transformer.wpe.weight"][:, WORDS:BEFORE] = torch.eye(PLACES)
        unembedding = self.weights["lm_head.weight"]
        unembedding[:, PREDICTED:WIDTH] = CONFIDENCE * torch.eye(WORDS)

    def head(
        self, layer: int, number: int, query: Pairs, key: Pairs, output: Pairs, size: float
    ) -> None:
        """Match ``query`` and ``key`` pairs (from, matched); write ``output`` pairs (from, to)."""
        block = f"transformer.h.{layer}.attn"
        inputs, first = self.weights[f"{block}.c_attn.weight"], number * WIDTH
        for port, pairs, gain in ((0, query, 80.0), (1, key, 80.0)):
            for row, column in pairs:
                inputs[row, port * 2 * WIDTH + first + column] = gain
        for count, (row, column) in enumerate(output):
            inputs[row, 4 * WIDTH + first + count] = 1.0
            self.weights[f"{block}.c_proj.weight"][first + count, column] = size

    def back(self, layer: int, number: int, offsets: list[int], output: Pairs, size: float) -> None:
        """A head that looks back by position: position p by ``offsets[p % n]``."""
        spots = range(PLACES)
        looks = [(WORDS + p, max(p - offsets[p % len(offsets)], 0)) for p in spots]
        self.head(layer, number, looks, [(WORDS + p, p) for p in spots], output, size)

    @property
    def model(self) -> TracedModel:
        return load_model(self.module)


def moved(start: int, end: int) -> list[tuple[int, int]]:
    return [(start + word, end + word) for word in range(WORDS)]


def with_induction(size: float) -> TracedModel:
    """Induction in layers 0 and 1; in layer 2, a head that looks where the predicted word stood."""
    compiled = Compiled(3)
    compiled.back(0, 0, [1], moved(0, BEFORE), 1.0)
    compiled.head(1, 0, moved(0, 0), moved(BEFORE, 0), moved(0, PREDICTED), 1.0)
    compiled.head(2, 0, moved(PREDICTED, 0), moved(0, 0), moved(0, PREDICTED), size)
    return compiled.model


def drawn(model: TracedModel) -> Repeats:
    vocabulary = find_vocabulary(model)
    lengths = find_lengths(model, vocabulary, 4)
    assert lengths is not None
    return repeated_sequences(model, vocabulary, lengths, n=64, seed=0)


# --- by hand --------------------------------------------------------------------------------------


def test_suppression_head_is_named() -> None:
    """A head that looks where the predicted word stood, and takes half of its logit, is named."""
    table = find_roles(with_induction(-0.5))
    found = table.of(2, 0)
    assert found["role"] == "copy-suppression"
    # By attention alone it is an induction head: the word that is predicted stood there.
    assert found["roles"] == ["copy-suppression", "induction"]
    one = found["role_scores"]["predicted-token"]
    assert one["score"] == pytest.approx(1, abs=1e-6)
    assert one["control"] == pytest.approx(0, abs=1e-6)
    # Of one logit among WORDS the mean takes its part.
    lowered = -0.5 * CONFIDENCE * (1 - 1 / WORDS)
    assert one["direct_effect"]["score"] == pytest.approx(lowered, rel=1e-5)
    assert one["direct_effect"]["lo"] <= one["direct_effect"]["hi"] < 0
    assert table.findings()["copy-suppression"].startswith("a2.h0 1.00 [1.00, 1.00], control 0.00")
    assert table.findings()["copy-suppression"].endswith(
        "direct effect -3.87 [-3.87, -3.87] logits"
    )


def test_copying_head_is_not() -> None:
    """The same head with the other sign raises the logit by as much, and is no suppressor."""
    found = find_roles(with_induction(0.5)).of(2, 0)
    assert found["roles"] == ["induction"]
    one = found["role_scores"]["predicted-token"]
    assert one["score"] == pytest.approx(1, abs=1e-6)
    raised = 0.5 * CONFIDENCE * (1 - 1 / WORDS)
    assert one["direct_effect"]["score"] == pytest.approx(raised, rel=1e-5)


def test_nothing_predicted_is_not_measured() -> None:
    """Before the induction head has written, no word is ahead: no score, rather than a guess."""
    table = find_roles(with_induction(-0.5))
    for layer, head in product((0, 1), (0, 1)):
        assert "predicted-token" not in table.of(layer, head)["role_scores"]
    assert table.of(0, 0)["role"] == "previous-token"
    assert table.of(1, 0)["role"] == "induction"


def test_suppression_that_looks_elsewhere_is_not_named() -> None:
    """A head that lowers the predicted word from where it looks one back has no such role."""
    compiled = Compiled(3)
    compiled.back(0, 0, [1], moved(0, BEFORE), 1.0)
    compiled.head(1, 0, moved(0, 0), moved(BEFORE, 0), moved(0, PREDICTED), 1.0)
    # At the place before, the word that followed the word there is predicted: the query's own.
    compiled.back(2, 0, [1], moved(PREDICTED, PREDICTED), -0.5)
    assert find_roles(compiled.model).of(2, 0)["roles"] == ["previous-token"]


def test_looking_back_is_not_looking_for_what_is_predicted() -> None:
    """What is predicted stands 6 or 7 back by turns; a head that looks 6 back meets its control."""
    compiled = Compiled(2)
    compiled.back(0, 0, [6, 7], moved(0, PREDICTED), 1.0)
    compiled.back(1, 0, [6], moved(0, PREDICTED), -0.5)
    compiled.head(1, 1, moved(PREDICTED, 0), moved(0, 0), moved(0, PREDICTED), -0.5)
    table = find_roles(compiled.model)
    positional = table.of(1, 0)["role_scores"]["predicted-token"]
    assert 0.4 < positional["score"] < 0.6
    assert positional["control"] == pytest.approx(1 - positional["score"], abs=1e-6)
    assert "copy-suppression" not in table.of(1, 0).get("roles", [])
    assert table.of(1, 1)["role"] == "copy-suppression"


def test_one_offset_alone_is_not_measured() -> None:
    """Where what is predicted always stands 6 back, position and content cannot be told apart."""
    compiled = Compiled(2)
    compiled.back(0, 0, [6], moved(0, PREDICTED), 1.0)
    compiled.head(1, 0, moved(PREDICTED, 0), moved(0, 0), moved(0, PREDICTED), -0.5)
    assert "predicted-token" not in find_roles(compiled.model).of(1, 0)["role_scores"]


def parts(n: int, predicted: float, induction: float) -> dict[str, Tensor]:
    """One head, equally in ``n`` sequences of 40; the predicted token is lowered by 1."""
    scores = torch.tensor([induction, predicted])[:, None, None].repeat(1, 40, 1)
    scores[1, n:] = torch.nan
    effect = torch.where(scores[1:].isnan(), torch.nan, -1.0)
    return {
        "scores": scores,
        "controls": torch.zeros_like(scores),
        "effect": effect,
        "n_eff": torch.full((1, 40, 1), 2.0),
    }


def test_suppression_stands_first() -> None:
    """What is done to the prediction names a head, though by place alone it attends a bit more."""
    names = ["induction", "predicted-token"]
    (head,) = summarise(parts(40, 0.6, 0.9), names, 0.4, 0)
    assert head["roles"] == ["copy-suppression", "induction"]
    assert head["role"] == "copy-suppression"


@pytest.mark.parametrize(("n", "told"), [(16, True), (15, False), (0, False)])
def test_a_score_of_few_sequences_is_left_out(n: int, told: bool) -> None:
    """Sixteen sequences give a score and an interval; of fewer nothing is said."""
    (head,) = summarise(parts(n, 0.6, 0.3), ["induction", "predicted-token"], 0.4, 0)
    assert ("predicted-token" in head["role_scores"]) == told
    assert ("role" in head) == told
    assert head["role_scores"]["induction"]["score"] == pytest.approx(0.3)


# --- against plain Hugging Face -------------------------------------------------------------------


class Plain:
    """One sequence through a stock module: what each quantity is by its definition."""

    def __init__(self, module: Any, ids: Tensor) -> None:
        self.module, self.streams, self.writes = module, [], []
        hooks = [block.register_forward_pre_hook(self._stream) for block in module.transformer.h]
        hooks += [
            block.attn.c_proj.register_forward_pre_hook(self._write)
            for block in module.transformer.h
        ]
        hooks.append(module.transformer.ln_f.register_forward_pre_hook(self._stream))
        self.patterns = module(ids[None], output_attentions=True).attentions
        for hook in hooks:
            hook.remove()

    def _stream(self, module: Any, inputs: Any) -> None:
        self.streams.append(inputs[0][0])

    def _write(self, module: Any, inputs: Any) -> None:
        self.writes.append(inputs[0][0])

    def lens(self, layer: int, query: int) -> Tensor:
        """Logits of the stream before a layer, through the module's own norm and unembedding."""
        return self.module.lm_head(self.module.transformer.ln_f(self.streams[layer][query]))

    def effect(self, layer: int, head: int, query: int, token: int) -> float:
        """What taking away the head's write does to the token's centred logit, the scale held."""
        size = self.module.config.n_embd // self.module.config.n_head
        part = slice(head * size, (head + 1) * size)
        projection = self.module.transformer.h[layer].attn.c_proj.weight
        write = self.writes[layer][query, part] @ projection[part]
        norm, last = self.module.transformer.ln_f, self.streams[-1][query]
        scale = (last.var(correction=0) + norm.eps).sqrt()
        logits = self.module.lm_head.weight @ (norm.weight * (write - write.mean()) / scale)
        return float(logits[token] - logits.mean())


def looped(plain: Plain, ids: list[int], start: int, layer: int) -> list[tuple[int, int, int]]:
    """(query, place, token) of all queries that count, by search."""
    found = []
    for query in range(start, len(ids)):
        logits = plain.lens(layer, query)
        words = sorted(set(ids[1:query]) - {ids[query]}, key=lambda word: -float(logits[word]))
        if ids[:query].count(words[0]) == 1:
            found.append((query, ids.index(words[0]), words[0]))
    return found


@torch.no_grad()
def test_scores_are_those_of_plain_loops() -> None:
    """Attention, control and direct effect of random heads, sequence by sequence, unpadded."""
    module = random_gpt2(seed=7)
    model = load_model(module)
    repeats = drawn(model)
    whole = slice(0, len(repeats))
    reader, predictions = find_predictions(model, repeats, [slice(0, 40), slice(40, 64)])
    sites = [Site(kind, layer) for kind in ("pattern", "z") for layer in (0, 1)]
    run = model.run(repeats.tokens, read=[*sites, Site("resid_post", 1)], logits="none")
    rows = [repeats.tokens.ids[row][repeats.tokens.mask[row]] for row in range(len(repeats))]
    plains = [Plain(module, ids) for ids in rows]
    for layer in (0, 1):
        found = measure(model, run, repeats, reader, predictions, whole, layer)
        used = [
            looped(plain, ids.tolist(), len(ids) - int(repeats.queries[row].sum()), layer)
            for row, (plain, ids) in enumerate(zip(plains, rows, strict=True))
        ]
        offsets = [query - place for queries in used for query, place, _ in queries]
        for row, head in product(range(len(rows)), range(2)):
            mass, control, effect = [], [], []
            for query, place, token in used[row]:
                attention = plains[row].patterns[layer][0, head, query]
                others = [o for o in offsets if o != query - place and query - o > 0]
                mass.append(float(attention[place]))
                control.append(sum(float(attention[query - o]) for o in others) / len(others))
                effect.append(plains[row].effect(layer, head, query, token))
            means = [
                sum(part) / len(part) if part else torch.nan for part in (mass, control, effect)
            ]
            values = [float(part[row, head]) for part in (found.mass, found.control, found.effect)]
            assert values == pytest.approx(means, abs=1e-10, nan_ok=True)
