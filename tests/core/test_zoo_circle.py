"""The duplicate-token heads on a circle attend as their formula says, as far as types allow."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import circuitlab
from circuitlab import zoo
from circuitlab.tasks import Task
from circuitlab.zoo.circle import CIRCLES, Circle
from circuitlab.zoo.compiling import compile_circle, precision_limit

DOCS = Path(__file__).parents[2] / "docs"
NAMES = list(CIRCLES)
BOS, N_SPECIAL = 0, 3
LEAST = 0.98

Edge = tuple[str, str, str]


def task_of(name: str) -> Task:
    return next(task for task in zoo.tasks() if task.name == name)


def pattern(module: GPT2LMHeadModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Attention ``[prompt, query, key]`` of prompts of words, given as tokens after ``<bos>``."""
    ids = torch.tensor([[BOS, *(N_SPECIAL + word for word in row)] for row in rows])
    return torch.cat(
        [
            module.transformer(part, output_attentions=True).attentions[0][:, 0]
            for part in ids.split(4096)
        ]
    )


def by_formula(words: Sequence[int], n_words: int, n_positions: int) -> list[list[float]]:
    """The same for one prompt in plain Python, from angles; lower triangle only."""
    gap = 1 - math.cos(2 * math.pi / n_words)
    bits = math.log(n_positions / 0.01)
    beta = 2 / gap * bits
    table = [[1.0]]
    for at, query in enumerate(words):
        scores = [beta * (1 + math.cos(2 * math.pi / n_words)) / 2]
        scores += [
            beta * math.cos(2 * math.pi * (query - key) / n_words) for key in words[: at + 1]
        ]
        scores[-1] -= 2 * bits
        shares = [math.exp(score - max(scores)) for score in scores]
        table.append([share / math.fsum(shares) for share in shares])
    return table


# --- Attention


def test_attention_is_the_formula_s() -> None:
    """At V = 64 each attention probability is the softmax of the exact scores, within 1e-4."""
    module, _ = zoo.load("hand-duplicate")
    prompts = [
        [9],
        [9, 9],
        [0, 63, 1, 0],
        [5, 6, 4, 5, 40, 5, 6],
        [20, 21, 22, 23, 24, 23],
        [31, 33, 32],
        [*range(58)],
        [7] * 58,
    ]
    for words in prompts:
        measured = pattern(module, [words])[0]
        for query, expected in enumerate(by_formula(words, 64, 59)):
            found = measured[query].tolist()
            assert found[: len(expected)] == pytest.approx(expected, abs=1e-4), (words, query)
            assert not any(found[len(expected) :])


def test_constants_are_those_of_the_source() -> None:
    """With 16 positions and 64 words β is 3064; <bos> stands halfway; the gap does not cancel."""
    circle = Circle(64, n_positions=16)
    assert circle.sharpness == pytest.approx(3064, abs=0.5)
    assert circle.rest == pytest.approx(circle.sharpness * (1 + math.cos(math.pi / 32)) / 2)
    assert circle.sharpness * (1 - circle.gap) == pytest.approx(
        circle.sharpness + circle.own_place, abs=1e-6
    )
    assert Circle(10**9).gap == pytest.approx(2 * math.pi**2 * 1e-18, rel=1e-12, abs=0)


def test_all_copies_share_the_attention() -> None:
    """Of 57 copies before the last word each gets 1/57; <bos> and the last word get nothing."""
    module, _ = zoo.load("hand-duplicate")
    last = pattern(module, [[7] * 58])[0, -1]
    assert last[1:-1].tolist() == pytest.approx([1 / 57] * 57, abs=1e-5)
    assert last[0] + last[-1] < 0.01 / 57


def test_full_context_keeps_the_promise() -> None:
    """In the longest prompt, with both neighbours, less than ε of the attention goes astray."""
    module, _ = zoo.load("hand-duplicate")
    for word in range(64):
        others = [(word + step) % 64 for step in (-1, 1, *range(2, 57))]
        absent, present = pattern(module, [[*others, word], [*others[:-1], word, word]])
        assert absent[-1, 0] > 1 - 0.01
        assert present[-1, -2] > 1 - 0.01


def neighbourhood(words: Sequence[int], n_words: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that end in each word: with it and both its neighbours before, and without it."""
    present = [[(w - 1) % n_words, w, (w + 1) % n_words, w] for w in words]
    return present, [[row[0], (row[1] + n_words // 2) % n_words, *row[2:]] for row in present]


def test_every_word_of_4096_finds_its_place() -> None:
    """In float32 each of 4,096 words finds itself, or rests, beside both its neighbours."""
    module, _ = zoo.load("hand-duplicate-4096")
    present, absent = neighbourhood(range(4096), 4096)
    assert pattern(module, present)[:, -1, 2].min() >= LEAST
    assert pattern(module, absent)[:, -1, 0].min() >= LEAST


def on_the_circle(n_words: int, dtype: torch.dtype, n: int = 300) -> tuple[Tensor, Tensor]:
    """The two shares, ``[word]``, of words spread over a circle whose other words have no token."""
    asked = [round(k * n_words / n) % n_words for k in range(n)]
    prompts = neighbourhood(asked, n_words)
    words = sorted({word for rows in prompts for row in rows for word in row})
    module = compile_circle(Circle(n_words), dtype=dtype, words=words)
    token = {word: at for at, word in enumerate(words)}
    present, absent = (
        pattern(module, [[token[word] for word in row] for row in rows])[:, -1] for rows in prompts
    )
    return present[:, 2], absent[:, 0]


def test_50257_words_need_float64() -> None:
    """A gap of 8e-9 drowns in float32, where most words fail, and stands in float64."""
    coarse, fine = (on_the_circle(50_257, dtype) for dtype in (torch.float32, torch.float64))
    assert all((shares < LEAST).float().mean() > 0.5 for shares in coarse)
    assert all(shares.min() < 0.01 for shares in coarse)
    assert all(shares.min() > 0.999 for shares in fine)


def test_words_without_a_token_change_nothing() -> None:
    """A head made for some words of the circle attends as the one made for all of them."""
    some, every = [3, 4, 5, 40], compile_circle(Circle(64))
    few = compile_circle(Circle(64), words=some)
    for rows in itertools.product(range(4), repeat=3):
        assert torch.equal(pattern(few, [rows]), pattern(every, [[some[at] for at in rows]]))


# --- Precision


def test_precision_limit_is_where_it_fails() -> None:
    """float32: 4,096 words hold and 8,192 do not, as measured here; the loaded models say so."""
    assert precision_limit(torch.float32) == 4096
    assert all(shares.min() >= LEAST for shares in on_the_circle(4096, torch.float32, 4096))
    assert any(shares.min() < LEAST for shares in on_the_circle(8192, torch.float32, 8192))


def test_precision_limit_grows_with_the_type() -> None:
    """In every type the gap at the limit, 2π²/V², is a small multiple of the type's rounding."""
    limits = {
        dtype: precision_limit(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    }
    for dtype, limit in limits.items():
        assert 1 < 2 * math.pi**2 / limit**2 / torch.finfo(dtype).eps < 100
    assert list(limits.values()) == sorted(set(limits.values()))


def test_evaluation_is_of_the_module_it_is_given() -> None:
    """The shares are the least over prompts run one by one; the limit is that of the type."""
    for name in NAMES:
        module, tokenizer = zoo.load(name)
        metrics = zoo.evaluate(name, module, tokenizer)
        found: dict[str, list[float]] = {"duplicate": [], "rest": []}
        for pair in task_of(name).pairs:
            clean, corrupt = ([int(w[1:]) for w in p.split()] for p in (pair.clean, pair.corrupt))
            place = 1 + clean.index(clean[-1])
            found["duplicate"].append(pattern(module, [clean])[0, -1, place].item())
            found["rest"].append(pattern(module, [corrupt])[0, -1, 0].item())
        assert metrics["accuracy"] == 1
        assert metrics["precision-limit"] == 4096
        for key, shares in found.items():
            assert metrics[key] == pytest.approx(min(shares), abs=2e-3)
            assert metrics[key] >= LEAST


def test_without_its_own_place_a_word_finds_itself() -> None:
    """Without the positions' term the last word takes half from its copy, and all from <bos>."""
    module, tokenizer = zoo.load("hand-duplicate")
    module.transformer.wpe.weight.zero_()
    metrics = zoo.evaluate("hand-duplicate", module, tokenizer)
    assert metrics["duplicate"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["rest"] < 0.01
    assert metrics["corrupt-logit-difference"] == pytest.approx(20, abs=0.1)


def test_a_type_too_coarse_is_seen_to_fail() -> None:
    """bfloat16 tells fewer than 64 words apart, and the same model in it does not do its task."""
    module, tokenizer = zoo.load("hand-duplicate")
    metrics = zoo.evaluate("hand-duplicate", module.bfloat16(), tokenizer)
    assert metrics["precision-limit"] < 64
    assert min(metrics["duplicate"], metrics["rest"]) < LEAST


# --- Task and circuit


@pytest.mark.parametrize("name", NAMES)
def test_corruption_is_the_nearest_word(name: str) -> None:
    """The last word came once before; in the corrupt prompt its neighbour on the circle did."""
    pairs, n_words = task_of(name).pairs, CIRCLES[name].n_words
    assert len({pair.clean for pair in pairs}) == 64
    places = set()
    for pair in pairs:
        clean, corrupt = ([int(w[1:]) for w in p.split()] for p in (pair.clean, pair.corrupt))
        (place,) = [at for at, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        assert clean[place] == clean[-1] == corrupt[-1]
        assert (corrupt[place] - clean[place]) % n_words in (1, n_words - 1)
        assert len(set(clean)) == len(clean) - 1
        assert len(set(corrupt)) == len(corrupt)
        assert (pair.answers, pair.wrong_answers) == (("yes",), ("no",))
        places.add((len(clean), place))
    assert len({length for length, _ in places}) > 8
    assert len(places) > 30


class Forward:
    """Runs a one-layer, one-head GPT-2 without norms edge by edge; edges may carry other values."""

    edges: tuple[Edge, ...] = (
        *(("input", "a0.h0", port) for port in "qkv"),
        ("input", "m0", ""),
        ("a0.h0", "m0", ""),
        *((source, "logits", "") for source in ("input", "a0.h0", "m0")),
    )

    def __init__(self, name: str) -> None:
        self.module, self.tokenizer = zoo.load(name)

    def embed(self, text: str) -> Tensor:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"][0]
        return self.module.transformer.wte(ids) + self.module.transformer.wpe.weight[: len(ids)]

    def __call__(
        self, embedded: Tensor, carried: dict[Edge, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs by component; ``carried`` replaces what edges carry."""
        out, block = {"input": embedded}, self.module.transformer.h[0]

        def read(target: str, port: str = "") -> Tensor:
            edges = [edge for edge in self.edges if edge[1:] == (target, port)]
            return sum((carried or {}).get(edge, out[edge[0]]) for edge in edges)

        q, k, v = (
            block.attn.c_attn(read("a0.h0", port)).chunk(3, -1)[at] for at, port in enumerate("qkv")
        )
        scores = (q @ k.T / 8).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        out["a0.h0"] = block.attn.c_proj(scores.softmax(-1) @ v)
        out["m0"] = block.mlp(read("m0"))
        out["logits"] = self.module.lm_head(read("logits"))
        return out

    def difference(self, out: dict[str, Tensor]) -> float:
        yes, no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        return (out["logits"][-1, yes] - out["logits"][-1, no]).item()


@pytest.mark.parametrize("name", NAMES)
def test_known_edges_are_what_patching_finds(name: str) -> None:
    """Alone, exactly the effective edges change the metric on corrupt values, and by all of it."""
    run = Forward(name)
    for pair in task_of(name).pairs[:4]:
        clean, corrupt = (run(run.embed(text)) for text in (pair.clean, pair.corrupt))
        stock = run.module(**run.tokenizer(pair.clean, return_tensors="pt")).logits[0]
        assert torch.allclose(clean["logits"], stock, atol=0.05, rtol=0)
        effects = {
            edge: run.difference(run(clean["input"], {edge: corrupt[edge[0]]}))
            - run.difference(clean)
            for edge in run.edges
        }
        effective = zoo.known_edges(name, sense="effective")
        for edge, effect in effects.items():
            assert effect == pytest.approx(-40 if edge in effective else 0, abs=0.2), edge


@pytest.mark.parametrize("name", NAMES)
def test_mechanism_suffices_and_nothing_in_it_is_spare(name: str) -> None:
    """Zero in all other edges changes no answer; zero in any one of the mechanism's does."""
    run, mechanism = Forward(name), zoo.known_edges(name)

    def changes(zeroed: set[Edge]) -> float:
        largest = 0.0
        for pair in task_of(name).pairs[:4]:
            for text in (pair.clean, pair.corrupt):
                embedded = run.embed(text)
                cut = run(embedded, dict.fromkeys(zeroed, torch.zeros_like(embedded)))
                largest = max(largest, abs(run.difference(cut) - run.difference(run(embedded))))
        return largest

    assert mechanism < set(run.edges)
    assert changes(set(run.edges) - mechanism) < 1e-3
    assert {edge for edge in mechanism if changes({edge}) < 1} == set()


@pytest.mark.parametrize("name", NAMES)
def test_tracing_finds_the_circuit_of_one_head(name: str) -> None:
    """A model of one head is traced like any other: 8 edges, the effective ones established."""
    circuit = circuitlab.build_circuit(name, top=2)
    assert {effect[:3] for effect in circuit.effects()} == zoo.known_edges(name, sense="effective")
    assert circuit.graph["verdict"] == "established"
    assert circuitlab.Wiring(1, 1).n_edges == len(Forward.edges) == 8


def test_folded_weights_score_by_angle() -> None:
    """Folded, two words score β cos(2π(i - j)/V), and <bos> scores by the query's bias alone."""
    model = circuitlab.load_model("hand-duplicate")
    head, circle = model.weights.folded(0, torch.float64), Circle(64)
    embedding = model.weights.embedding(torch.float64)
    words, start = embedding[N_SPECIAL : N_SPECIAL + 64], embedding[BOS]
    keys = words @ head.k[0]
    angles = 2 * math.pi * (torch.arange(64)[:, None] - torch.arange(64)).double() / 64
    by_word = head.scale * words @ head.q[0] @ keys.T
    assert torch.allclose(by_word, circle.sharpness * angles.cos(), atol=1e-2, rtol=0)
    assert not (head.q_bias[0] @ keys.T).any()
    rest = head.scale * head.q_bias[0] @ (start @ head.k[0])
    assert rest.item() == pytest.approx(circle.rest, rel=1e-6)
    assert not (words @ head.q[0] @ (start @ head.k[0])).any()


@pytest.mark.parametrize("name", NAMES)
def test_load_leaves_the_random_state_alone(name: str) -> None:
    """Loading a circle does not change what torch draws next."""
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    zoo.load(name)
    assert torch.equal(torch.rand(4), wanted)


def test_documented_table_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page on models shows what the heads of 64, 4,096 and 50,257 words give now."""
    monkeypatch.syspath_prepend(DOCS)
    rows = importlib.import_module("make_tables").precision_rows()
    assert len(rows) == 3
    page = (DOCS / "models.md").read_text("utf-8")
    assert [row for row in rows if row not in page] == []
