"""Vocabulary: what heads read of all tokens, tokens by their text, and tokens unlike the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel

#: Tokens whose vectors are made float64 at once.
_ROWS = 8192


def read_tokens(model: TracedModel, weight: Tensor) -> Tensor:
    """The embedding of every token times a map ``[d_model, n]``: ``[vocab, n]``, float64."""
    wide = weight.double()
    return torch.cat([rows @ wide for rows in embedding_rows(model)])


def embedding_rows(model: TracedModel) -> Iterator[Tensor]:
    """The embedding in float64, some tokens at a time, ``[n, d_model]``."""
    return _wide(model.weights.embedding(model.dtype))


def token_ids(model: TracedModel, text: str) -> list[int]:
    """Tokens by their text or ``#ID``, separated by commas; spaces belong to them. Each once.

    Raises:
        OptionError: a piece is not one token of the model.
    """
    return list(dict.fromkeys(_token_id(model, piece) for piece in text.split(",")))


def _wide(vectors: Tensor) -> Iterator[Tensor]:
    return (vectors[i : i + _ROWS].double() for i in range(0, len(vectors), _ROWS))


def _token_id(model: TracedModel, text: str) -> int:
    tokenizer, number = model.tokenizer, text.strip().removeprefix("#")
    if number.isdecimal() and (tokenizer is None or text.strip() != number):
        if len(number) < 10 and int(number) < model.vocab_size:
            return int(number)
        fact = f"is no token: ids run from 0 to {model.vocab_size - 1}"
    elif tokenizer is None:
        fact = "is text, but the model has no tokenizer"
    else:
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
        fact = f"is {len(ids)} tokens, not one" if len(ids) != 1 else "is not in the vocabulary"
    raise OptionError(f"--tokens {text!r} {fact}; give the text of single tokens, or #ID")
