"""Compiling: write the weights of a hand-made model down by its formula.

The modules are ordinary GPT-2s with identities in place of the norms. Weights are in row-vector
convention, ``x @ W``. Words, positions and results live in separate coordinates of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from random import Random

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from circuitlab.tasks import PromptPair
from circuitlab.zoo import superposition
from circuitlab.zoo.circle import (
    CIRCLES,
    COS,
    N_COORDINATES,
    SEEN,
    SIN,
    START,
    WORD,
    Circle,
)
from circuitlab.zoo.hand import (
    GATE_POSITIONS,
    GATE_VOCABULARY,
    GATES,
    INDUCTION_POSITIONS,
    INDUCTION_VOCABULARY,
    LETTERS,
    NO,
    ON,
    YES,
    Gate,
    gate_prompt,
)
from circuitlab.zoo.network import parameters, silent
from circuitlab.zoo.recipe import BOS, SPECIAL_WORDS
from circuitlab.zoo.summing import compile_sum
from circuitlab.zoo.training import last_logits
from circuitlab.zoo.word_tokenizer import word_tokenizer

#: Attention score of a match; everything else scores 0. A match takes all, and takes it so early on
#: the way from a corrupt to a clean prompt that 5 gradients between them see no change.
MATCH_SCORE = 400.0
#: Logit of the predicted word of hand-induction, and of the answer of the circles.
CONFIDENCE = 10.0

Ones = Iterable[tuple[int, int]]


def compile_model(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The hand-made model ``name`` in eval mode, its parameters frozen, and its tokenizer."""
    if name in GATES:
        return _gate(GATES[name]), word_tokenizer(GATE_VOCABULARY, GATE_POSITIONS)
    if name in CIRCLES:
        circle = CIRCLES[name]
        return compile_circle(circle), word_tokenizer(circle.vocabulary(), circle.n_positions)
    if name in superposition.MECHANISMS:
        words = superposition.VOCABULARIES[name]
        return compile_sum(name), word_tokenizer(words, superposition.N_POSITIONS)
    return _induction(), word_tokenizer(INDUCTION_VOCABULARY, INDUCTION_POSITIONS)


def gate_error(gate: Gate, module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Largest distance of the model from the gate's table, in logits."""
    logits = last_logits(module, tokenizer, [gate_prompt(bits) for bits in gate.table])
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in (YES, NO))
    return (
        (logits[:, yes] - logits[:, no] - torch.tensor([*gate.table.values()])).abs().max().item()
    )


def compile_circle(
    circle: Circle, *, dtype: torch.dtype = torch.float32, words: Sequence[int] | None = None
) -> GPT2LMHeadModel:
    """The duplicate-token head of a circle, as the one head of a GPT-2 of one layer.

    W_K is the identity on the circle, ``<bos>`` and positions; what they score, times the root of
    d_head, is in W_Q for the circle and the positions, and in b_Q for ``<bos>``. The head writes 1
    from words and -1 from ``<bos>``.

    Args:
        circle: How many words, and how sharp.
        dtype: Of the weights, which are calculated in float64 and rounded once.
        words: Those on the circle that get a token, in this order; all if None.
    """
    words = range(circle.n_words) if words is None else words
    vocabulary = circle.vocabulary(words)
    width, n_words = N_COORDINATES + circle.n_positions, len(vocabulary)
    module = silent(n_words, circle.n_positions, width=width, n_layers=1, n_inner=1, n_heads=1)
    nn.Module.to(module, dtype)
    weights, root, positions = parameters(module), sqrt(width), [*range(N_COORDINATES, width)]
    embedding = weights["transformer.wte.weight"]
    shown = embedding[len(SPECIAL_WORDS) : -2]
    places = torch.tensor([circle.place(word) for word in words], dtype=torch.float64)
    shown[:, [COS, SIN]] = places.to(dtype)
    shown[:, WORD] = 1
    embedding[vocabulary.index(BOS), START] = 1
    weights["transformer.wpe.weight"][:, positions] = torch.eye(circle.n_positions, dtype=dtype)
    query, key, value = weights["transformer.h.0.attn.c_attn.weight"].chunk(3, dim=1)
    query[[COS, SIN], [COS, SIN]] = circle.sharpness * root
    query[positions, positions] = circle.own_place * root
    weights["transformer.h.0.attn.c_attn.bias"][START] = circle.rest * root
    matched = [COS, SIN, START, *positions]
    key[matched, matched] = 1
    value[WORD, SEEN], value[START, SEEN] = 1, -1
    weights["transformer.h.0.attn.c_proj.weight"][SEEN, SEEN] = 1
    unembedding = weights["lm_head.weight"]
    unembedding[vocabulary.index(YES), SEEN] = CONFIDENCE
    unembedding[vocabulary.index(NO), SEEN] = -CONFIDENCE
    return module


def circle_scores(
    module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PromptPair]
) -> dict[str, float]:
    """How well a circle's head attends on its task, and how many words its type can tell apart.

    ``duplicate``: attention of the last word to itself earlier on, least over the clean prompts.
    ``rest``: its attention to ``<bos>``, least over the corrupt ones. ``precision-limit``: see
    :func:`precision_limit`.
    """
    clean, corrupt = (
        tokenizer([str(prompt) for prompt in prompts], padding=True, return_tensors="pt")
        for prompts in zip(*((pair.clean, pair.corrupt) for pair in pairs), strict=True)
    )
    duplicate, _ = _attention(module, clean["input_ids"], clean["attention_mask"])
    _, rest = _attention(module, corrupt["input_ids"], corrupt["attention_mask"])
    return {
        "duplicate": duplicate.min().item(),
        "rest": rest.min().item(),
        "precision-limit": float(precision_limit(module.dtype)),
    }


def precision_limit(dtype: torch.dtype) -> int:
    """The most words whose head finds its place when weights and arithmetic have this type.

    Of the powers of two from 4 on, the last before the first at which a word's attention to itself,
    or to ``<bos>``, falls below ``1 - 2ε``; 0 if 4 is too many. Asked are all words, or 1,024 drawn
    from more.
    """
    n_words = 4
    while all(
        share >= 1 - 2 * Circle.epsilon
        for share in least_attention(Circle(n_words), dtype, sample=1024)
    ):
        n_words *= 2
    return n_words // 2 if n_words > 4 else 0


def least_attention(
    circle: Circle, dtype: torch.dtype, *, sample: int | None = None
) -> tuple[float, float]:
    """How sure a circle's head is when the nearest words are there: two shares of its attention.

    Every word q is asked for in ``<bos> q-1 q q+1 q``, where its attention to itself counts, and in
    ``<bos> q-1 q+1 q``, where that to ``<bos>`` does.

    Args:
        circle: How many words, and how sharp.
        dtype: Of weights and arithmetic.
        sample: At most so many words are asked, drawn at random; all if None.

    Returns:
        The least attention to the duplicate, and to ``<bos>``, over the words; NaN if one is.
    """
    n, rng = circle.n_words, Random(0)  # noqa: S311  # data, not secrets
    asked = range(n) if sample is None or n <= sample else rng.sample(range(n), sample)
    near = [((word - 1) % n, word, (word + 1) % n) for word in asked]
    words = sorted({word for three in near for word in three})
    tokens = {word: len(SPECIAL_WORDS) + index for index, word in enumerate(words)}
    module, start = compile_circle(circle, dtype=dtype, words=words), SPECIAL_WORDS.index(BOS)
    ids = torch.tensor([[start, *(tokens[word] for word in (*t, t[1]))] for t in near])
    least = []
    for which, rows in enumerate((ids, ids[:, [0, 1, 3, 4]])):
        parts = [_attention(module, part)[which] for part in torch.split(rows, 4096)]
        least.append(torch.cat(parts).min().item())
    return least[0], least[1]


@torch.no_grad()
def _attention(
    module: GPT2LMHeadModel, ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the last token to the same one before, and to ``<bos>``, ``[batch]`` each."""
    mask = torch.ones_like(ids) if mask is None else mask
    run = module.transformer(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        output_attentions=True,
    )
    pattern = run.attentions[0][:, 0, -1]
    same = ids == ids[:, -1:]
    same[:, -1] = False
    return (pattern * same).sum(-1), (pattern * (ids == SPECIAL_WORDS.index(BOS))).sum(-1)


def _gate(gate: Gate) -> GPT2LMHeadModel:
    n_words, n_positions = len(GATE_VOCABULARY), GATE_POSITIONS
    bits, value = (n_words + n_positions, n_words + n_positions + 1), n_words + n_positions + 2
    module = silent(n_words, n_positions, width=value + 1, n_layers=1, n_inner=len(gate.neurons))
    weights, last = _one_hot(module), n_words + n_positions - 1
    for head, bit in enumerate(bits):
        _set_head(
            weights,
            (0, head),
            query=[(last, 0)],
            key=[(n_words + 1 + head, 0)],
            value=[(GATE_VOCABULARY.index(ON), 0)],
            output=[(0, bit)],
        )
    mlp = "transformer.h.0.mlp"
    for neuron, (threshold, weight) in enumerate(gate.neurons):
        weights[f"{mlp}.c_fc.weight"][list(bits), neuron] = gate.steepness
        weights[f"{mlp}.c_fc.bias"][neuron] = -gate.steepness * threshold
        weights[f"{mlp}.c_proj.weight"][neuron, value] = weight
    weights[f"{mlp}.c_proj.bias"][value] = gate.offset
    weights["lm_head.weight"][GATE_VOCABULARY.index(YES), value] = 1.0
    return module


def _induction() -> GPT2LMHeadModel:
    n_words, n_positions = len(INDUCTION_VOCABULARY), INDUCTION_POSITIONS
    previous, result = n_words + n_positions, 2 * n_words + n_positions
    module = silent(n_words, n_positions, width=result + n_words, n_layers=2, n_inner=1)
    weights, places = _one_hot(module), range(n_positions)
    letters = [INDUCTION_VOCABULARY.index(letter) for letter in LETTERS]
    # Only letters are passed on: <bos> attends to itself and would fake a word before the first.
    _set_head(
        weights,
        (0, 0),
        query=[(n_words + place, max(place - 1, 0)) for place in places],
        key=[(n_words + place, place) for place in places],
        value=[(letter, letter) for letter in letters],
        output=[(letter, previous + letter) for letter in letters],
    )
    _set_head(
        weights,
        (1, 0),
        query=[(letter, letter) for letter in letters],
        key=[(previous + letter, letter) for letter in letters],
        value=[(letter, letter) for letter in letters],
        output=[(letter, result + letter) for letter in letters],
    )
    weights["lm_head.weight"][letters, [result + letter for letter in letters]] = CONFIDENCE
    return module


def _one_hot(module: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Give every word and every position a coordinate of its own; the module's parameters."""
    weights = parameters(module)
    words, positions = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    n_words, n_positions = len(words), len(positions)
    words[:, :n_words] = torch.eye(n_words)
    positions[:, n_words : n_words + n_positions] = torch.eye(n_positions)
    return weights


def _set_head(
    weights: dict[str, Tensor],
    place: tuple[int, int],
    *,
    query: Ones,
    key: Ones,
    value: Ones,
    output: Ones,
) -> None:
    """Write the matrices of the head at (layer, head), given where their ones are."""
    layer, head = place
    inputs = weights[f"transformer.h.{layer}.attn.c_attn.weight"]
    d_model = len(inputs)
    d_head = d_model // 2
    gain = sqrt(MATCH_SCORE * sqrt(d_head))
    for port, (ones, entry) in enumerate(((query, gain), (key, gain), (value, 1.0))):
        for row, column in ones:
            inputs[row, port * d_model + head * d_head + column] = entry
    for row, column in output:
        weights[f"transformer.h.{layer}.attn.c_proj.weight"][head * d_head + row, column] = 1.0
