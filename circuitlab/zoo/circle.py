"""Circle: a duplicate-token head that tells any number of words apart in two dimensions.

Word v of V is embedded at ``e_v = (cos 2πv/V, sin 2πv/V)``, and query q scores key k with
``β e_q · e_k``: the same word scores β, each neighbour on the circle ``β (1 - g)`` with the gap
``g = 1 - cos(2π/V)``. Halfway between the two stands ``<bos>``, whatever the query: the head rests
there unless the word came before. A word stands last among its own keys, so a term of its position
takes it down to the score of a neighbour.

With n positions and ``β = (2/g) ln(n/ε)`` either half of the gap is ``ln(n/ε)``, and less than ε of
the attention goes where it should not, however many words there are. In floating point the gap,
``2π²/V²``, must not drown in the rounding of β, and that limits V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, log, pi, sin
from random import Random

from circuitlab.tasks import PromptPair, Task
from circuitlab.zoo.hand import NO, YES, Edge
from circuitlab.zoo.recipe import N_PAIRS, SPECIAL_WORDS

#: Coordinates of the residual stream before those of the positions: the two of the circle, 1 for a
#: word on it, 1 for ``<bos>``, and the head's answer: 1 if the word came before, -1 if not.
COS, SIN, WORD, START, SEEN = range(5)
N_COORDINATES = 5

#: Words of the task's prompts, at most.
LONGEST = 16

#: Edges of the mechanism, see :data:`circuitlab.zoo.hand.MECHANISMS`.
MECHANISM: frozenset[Edge] = frozenset(
    {
        ("input", "a0.h0", "q"),
        ("input", "a0.h0", "k"),
        ("input", "a0.h0", "v"),
        ("a0.h0", "logits", ""),
    }
)
#: Of them, what changes the metric when it alone is patched: the prompts of a pair differ in a key.
EFFECTIVE: frozenset[Edge] = frozenset({("input", "a0.h0", "k"), ("a0.h0", "logits", "")})


@dataclass(frozen=True)
class Circle:
    """Words on a circle, and the scores that tell them apart.

    Attributes:
        n_words: Words on the circle, V; at least 4.
        n_positions: Longest prompt with its ``<bos>``, n. With 59 the head has 64 dimensions, and
            to divide by their root, 8, rounds nothing.
        epsilon: Attention that may go astray.
    """

    n_words: int
    n_positions: int = 59
    epsilon: float = 0.01

    @property
    def gap(self) -> float:
        """1 minus the product of two neighbours; written so that nothing cancels."""
        return 2 * sin(pi / self.n_words) ** 2

    @property
    def margin(self) -> float:
        """``ln(n/ε)``: the same word beats ``<bos>``, and that all others, by this score."""
        return log(self.n_positions / self.epsilon)

    @property
    def sharpness(self) -> float:
        """β, the score of the same word."""
        return 2 * self.margin / self.gap

    @property
    def rest(self) -> float:
        """The score of ``<bos>``, ``β (1 + cos(2π/V)) / 2``."""
        return self.sharpness - self.margin

    @property
    def own_place(self) -> float:
        """What a position adds to its score of itself, where the word is the same."""
        return -2 * self.margin

    def place(self, word: int) -> tuple[float, float]:
        """Where a word stands on the circle."""
        angle = 2 * pi * word / self.n_words
        return cos(angle), sin(angle)

    def vocabulary(self, words: Sequence[int] | None = None) -> tuple[str, ...]:
        """The special words, the circle's (``w0``, ``w1``, ...; all if None), and the answers."""
        names = (f"w{word}" for word in (range(self.n_words) if words is None else words))
        return (*SPECIAL_WORDS, *names, NO, YES)

    def task(self, name: str) -> Task:
        """64 prompts that end in a word that came before; corrupt: then, its neighbour came."""
        rng = Random(name)  # noqa: S311  # data, not secrets
        pairs: dict[object, PromptPair] = {}
        while len(pairs) < N_PAIRS:
            pair = self._pair(rng)
            pairs.setdefault(pair.clean, pair)
        return Task(
            name, tuple(pairs.values()), description="say whether the last word came before"
        )

    def _pair(self, rng: Random) -> PromptPair:
        word = rng.randrange(self.n_words)
        neighbour = (word + rng.choice((-1, 1))) % self.n_words
        n_others = rng.randrange(LONGEST - 1)
        drawn = rng.sample(range(self.n_words), n_others + 2)
        others = [f"w{other}" for other in drawn if other not in (word, neighbour)][:n_others]
        place = rng.randint(0, n_others)
        clean, corrupt = (
            " ".join([*others[:place], f"w{first}", *others[place:], f"w{word}"])
            for first in (word, neighbour)
        )
        return PromptPair(clean, corrupt, (YES,), (NO,))


#: The bundled ones.
CIRCLES: dict[str, Circle] = {
    "hand-duplicate": Circle(64),
    "hand-duplicate-4096": Circle(4096),
}
TASKS = tuple(circle.task(name) for name, circle in CIRCLES.items())
