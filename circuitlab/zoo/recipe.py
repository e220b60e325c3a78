"""Recipe: how a bundled model is made, from words to weights, as plain data."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import NamedTuple

from circuitlab.tasks import PromptPair, Task

BOS, PAD, UNK = "<bos>", "<pad>", "<unk>"
SPECIAL_WORDS = (BOS, PAD, UNK)

#: One token: two digits, a word, or one punctuation mark. Tokenizer and recipes share it.
TOKEN_PATTERN = r"\d\d|\w+|[^\w\s]"  # noqa: S105  # no password

#: Pairs in the task of a trained model.
N_PAIRS = 64

Succession = tuple[str, str]


class Question(NamedTuple):
    """A place in an example where the next word is learned.

    Attributes:
        position: Token whose successor is asked for; 0 is ``<bos>``, -1 the last token.
        answers: Words the next one is drawn from, all equally likely.
    """

    position: int
    answers: tuple[str, ...]


class Example(NamedTuple):
    """One training text and what is learned from it."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Recipe:
    """Architecture, data and optimiser settings of one trained model.

    Attributes:
        words: Vocabulary after the three special words.
        example: Draws a training example.
        pair: Draws the ``i``-th contrast from the held-out part of the data.
        attention_only: Whether the MLPs' output weights stay zero.
        embedding_std: Initial spread of token and position embeddings. GPT-2's 0.02 leaves small
            models in diffuse solutions without a previous-token head; 0.2 does not.
        weight_std: Initial spread of the other weights. GPT-2's 0.02 suits a width of 768; here it
            keeps attention near uniform for hundreds of steps.
    """

    name: str
    n_layers: int
    n_positions: int
    words: tuple[str, ...]
    example: Callable[[Random], Example]
    pair: Callable[[Random, int], PromptPair]
    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    attention_only: bool = False
    n_heads: int = 4
    d_model: int = 64
    embedding_std: float = 0.2
    weight_std: float = 0.1

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All words in the order of their token ids."""
        return SPECIAL_WORDS + self.words

    @property
    def n_inner(self) -> int:
        """Width of the MLPs; 1 where they are silent, so that they cost nothing."""
        return 1 if self.attention_only else 4 * self.d_model

    def pairs(self, n: int, *, seed: str) -> tuple[PromptPair, ...]:
        """``n`` held-out contrasts with different clean prompts, the same for the same seed."""
        rng = Random(f"{self.name} {seed}")  # noqa: S311  # data, not secrets
        chosen: dict[object, PromptPair] = {}
        for index in count():
            if len(chosen) == n:
                break
            pair = self.pair(rng, len(chosen))
            chosen.setdefault(pair.clean, pair)
            if index > 100 * n:
                raise ValueError(f"recipe {self.name!r} has fewer than {n} different pairs")
        return tuple(chosen.values())

    def task(self, description: str) -> Task:
        """The task of this model: its name, and 64 contrasts of held-out data."""
        return Task(self.name, self.pairs(N_PAIRS, seed="task"), description=description)


def split(text: str) -> list[str]:
    """The words of a text, as the bundled tokenizers see them, without ``<bos>``."""
    return re.findall(TOKEN_PATTERN, text)


def hold_out(items: Sequence[Succession], share: float, *, seed: str) -> tuple[Succession, ...]:
    """The part of ``items`` that training must not see, in a fixed random order."""
    rng = Random(seed)  # noqa: S311  # data, not secrets
    return tuple(rng.sample(items, round(share * len(items))))


def distinct_words(
    rng: Random, words: Sequence[str], n: int, *, avoid: Collection[Succession]
) -> list[str]:
    """``n`` different words of which no two neighbours are a succession to avoid."""
    while True:
        chosen: list[str] = []
        for word in rng.sample(words, len(words)):
            if not chosen or (chosen[-1], word) not in avoid:
                chosen.append(word)
            if len(chosen) == n:
                return chosen
