"""Sequences: random tokens of which a segment comes twice, at a distance that gives nothing away.

With the same distance every time a head that looks back a fixed number of positions passes for one
that looks for the token. So distance, length of the segment, length of the prefix and the place of
the second copy are all drawn, and no token comes a third time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Tokens, TracedModel

#: Tokens of the longest sequence, where the model reads that many.
LONGEST = 64
#: Tokens of the shortest segment.
SHORTEST = 3
#: Fewest different distances between the copies. At one of four, a head that always looks back that
#: far gets a quarter of a role.
LEAST_DISTANCES = 4
#: Fewest sequences: intervals over fewer say nothing.
LEAST_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Lengths:
    """Which lengths the parts of a sequence may have; all ends count.

    A sequence is a first token, a prefix, the segment, a filler, and the segment again.

    Attributes:
        longest: Tokens in all.
        segment: Shortest and longest segment.
        distance: Smallest and largest distance from a token to its earlier occurrence. The smallest
            is at least the longest segment, so that every distance goes with every length.
    """

    longest: int
    segment: tuple[int, int]
    distance: tuple[int, int]

    @property
    def n_distances(self) -> int:
        """Number of different distances."""
        return self.distance[1] - self.distance[0] + 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that sequences are made of.

    Attributes:
        bos: What begins every sequence; None where the tokenizer puts nothing in front, and any
            token does.
        words: ``[n]``, the ids of all tokens that are not special.
    """

    bos: int | None
    words: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Repeats:
    """Sequences in which a segment comes twice.

    Positions of one sequence count from its own first token; columns are those of ``tokens``.

    Attributes:
        tokens: ``[n, pos]``, padded on the left.
        queries: ``[n, pos]``, True at the second copy.
        distance: ``[n]``, from a token of the second copy back to its earlier occurrence.
        distances: Smallest and largest distance; each is as frequent as the others.
    """

    tokens: Tokens
    queries: Tensor
    distance: Tensor
    distances: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def earlier(self) -> Tensor:
        """Column of the earlier occurrence of each token of the second copy; -1 elsewhere."""
        columns = torch.arange(self.queries.shape[1], device=self.queries.device)
        return torch.where(self.queries, columns - self.distance[:, None], -1)

    @property
    def offsets(self) -> Tensor:
        """Position of the query less that of the key, ``[n, query, key]``."""
        places = self.tokens.position_ids
        return places[:, :, None] - places[:, None, :]

    def rows(self, index: slice) -> Repeats:
        """The chosen sequences."""
        return replace(
            self,
            tokens=self.tokens.rows(index),
            queries=self.queries[index],
            distance=self.distance[index],
        )


def find_vocabulary(model: TracedModel) -> Vocabulary:
    """The tokens sequences can be made of, for this model."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return Vocabulary(None, torch.arange(model.vocab_size))
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    size = min(model.vocab_size, len(tokenizer))
    words = torch.tensor([i for i in range(size) if i not in special], dtype=torch.long)
    # Whether BOS is put in front shows on a text.
    first = tokenizer("a")["input_ids"][:1]
    return Vocabulary(first[0] if first == [tokenizer.bos_token_id] else None, words)


def find_lengths(model: TracedModel, vocabulary: Vocabulary, max_offset: int) -> Lengths | None:
    """The lengths that fit the model; None where no sequence would tell one role from another.

    Args:
        model: Any traced model.
        vocabulary: Its tokens.
        max_offset: Look-back that is a role of its own; where there is room, the repetition is
            further away than that.
    """
    n_words = len(vocabulary.words) - (vocabulary.bos is None)
    room = min(model.n_positions - 1, LONGEST - 1, n_words + SHORTEST)
    longest = max(SHORTEST, room // 3)
    # What is left over is the play of the second copy's place.
    most = room - longest - room // 8
    least = min(max(longest, max_offset + 2), most - LEAST_DISTANCES + 1)
    if least < longest:
        return None
    return Lengths(room + 1, (SHORTEST, longest), (least, most))


def repeated_sequences(
    model: TracedModel, vocabulary: Vocabulary, lengths: Lengths, *, n: int, seed: int
) -> Repeats:
    """Random sequences with a segment that comes twice.

    Length of the segment, distance and place of the second copy are independent of each other, and
    all distances are equally frequent. All other tokens differ from each other and from these.

    Args:
        model: Who will read them.
        vocabulary: What they are made of.
        lengths: Of their parts.
        n: How many.
        seed: Of the draw.

    Returns:
        The sequences, on the model's device.

    Raises:
        OptionError: there are too few.
    """
    if n < LEAST_SEQUENCES:
        raise OptionError(
            f"{n} sequences are too few for an interval; use {LEAST_SEQUENCES} or more"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    least, most = lengths.distance
    spread = least + torch.arange(n) % lengths.n_distances
    distances = spread[torch.randperm(n, generator=generator)]
    prompts, sizes = [], []
    for distance in distances.tolist():
        size = draw(*lengths.segment)
        second = draw(1 + most, lengths.longest - size)
        begin = [] if vocabulary.bos is None else [vocabulary.bos]
        order = torch.randperm(len(vocabulary.words), generator=generator)
        words = begin + vocabulary.words[order[: second - len(begin)]].tolist()
        start = second - distance
        prompts.append((*words, *words[start : start + size]))
        sizes.append(size)
    tokens = model.tokens(prompts)
    width = tokens.ids.shape[1]
    queries = torch.arange(width) >= width - torch.tensor(sizes)[:, None]
    device = model.device
    return Repeats(tokens, queries.to(device), distances.to(device), lengths.distance)
