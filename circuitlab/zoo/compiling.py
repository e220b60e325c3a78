"""Compiling: write the weights of a hand-made model down by its formula.

The modules are ordinary GPT-2s with identities in place of the norms. Weights are in row-vector
convention, ``x @ W``. Words, positions and results live in separate coordinates of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

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
from circuitlab.zoo.network import finished, gpt2, parameters
from circuitlab.zoo.training import last_logits
from circuitlab.zoo.word_tokenizer import word_tokenizer

#: Attention score of a match; everything else scores 0. A match takes all, and takes it so early on
#: the way from a corrupt to a clean prompt that 5 gradients between them see no change.
MATCH_SCORE = 400.0
#: Logit of the predicted word of hand-induction.
CONFIDENCE = 10.0

Ones = Iterable[tuple[int, int]]


def compile_model(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The hand-made model ``name`` in eval mode, its parameters frozen, and its tokenizer."""
    if name in GATES:
        return _gate(GATES[name]), word_tokenizer(GATE_VOCABULARY, GATE_POSITIONS)
    return _induction(), word_tokenizer(INDUCTION_VOCABULARY, INDUCTION_POSITIONS)


def gate_error(gate: Gate, module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Largest distance of the model from the gate's table, in logits."""
    logits = last_logits(module, tokenizer, [gate_prompt(bits) for bits in gate.table])
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in (YES, NO))
    return (
        (logits[:, yes] - logits[:, no] - torch.tensor([*gate.table.values()])).abs().max().item()
    )


def _gate(gate: Gate) -> GPT2LMHeadModel:
    n_words, n_positions = len(GATE_VOCABULARY), GATE_POSITIONS
    bits, value = (n_words + n_positions, n_words + n_positions + 1), n_words + n_positions + 2
    module = _silent(n_words, n_positions, width=value + 1, n_layers=1, n_inner=len(gate.neurons))
    weights, last = parameters(module), n_words + n_positions - 1
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
    module = _silent(n_words, n_positions, width=result + n_words, n_layers=2, n_inner=1)
    weights, places = parameters(module), range(n_positions)
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


def _silent(
    n_words: int, n_positions: int, *, width: int, n_layers: int, n_inner: int
) -> GPT2LMHeadModel:
    """A GPT-2 of two heads without norms that reads words and positions and writes nothing."""
    with torch.random.fork_rng(devices=[]):
        module = gpt2(
            n_words,
            n_positions,
            n_layers=n_layers,
            n_heads=2,
            d_model=width + width % 2,
            n_inner=n_inner,
            activation="relu",
        )
    norms = [name for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)]
    for name in norms:
        module.set_submodule(name, nn.Identity())
    weights = parameters(finished(module))
    for weight in weights.values():
        weight.zero_()
    weights["transformer.wte.weight"][:, :n_words] = torch.eye(n_words)
    positions = weights["transformer.wpe.weight"][:, n_words : n_words + n_positions]
    positions.copy_(torch.eye(n_positions))
    return module


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
