"""Superposition: small models that compute with more features than they have room for.

All add up, with one head, what the words of a prompt stand for, and give the sum to one layer of
ReLUs (see :mod:`circuitlab.zoo.summing`). The head rests on ``<bos>``: a word's share of its
attention, about 1 / :data:`SINK`, does not depend on how many words there are.

* ``hand-and``: the ANDs of all 120 pairs of 16 inputs, by 31 ReLUs, in closed form.
* ``and-superposition``: those of 32 pairs, by 24 ReLUs that were trained.
* ``hand-planted``: 16 features, each made of two others, in directions that are no coordinates; the
  true feature graph is :data:`PLANTED`.
* ``hand-interference``: says A, and holds A xor B by an interference of size ε, see
  :class:`Interference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from random import Random

from circuitlab.tasks import PromptPair, Task
from circuitlab.zoo.hand import NO, YES, Edge
from circuitlab.zoo.recipe import N_PAIRS, SPECIAL_WORDS, Example, Recipe

Pair = tuple[int, int]
Vector = tuple[float, ...]

#: Weight of ``<bos>`` in the head's softmax, where a word's is 1: with n words the head's sum is
#: short of the true one by the part n / SINK.
SINK = 2.0**20

N_INPUTS = 16
INPUTS = tuple(f"x{index}" for index in range(N_INPUTS))
#: Most inputs that a prompt of the ANDs names.
MOST_ACTIVE = 4
ALL_PAIRS: tuple[Pair, ...] = tuple(combinations(range(N_INPUTS), 2))

_DRAWN = Random("and-superposition").sample(ALL_PAIRS, 32)  # noqa: S311  # data, not secrets
#: All sets of up to :data:`MOST_ACTIVE` inputs, by size.
SETS: tuple[tuple[int, ...], ...] = tuple(
    chosen for n in range(MOST_ACTIVE + 1) for chosen in combinations(range(N_INPUTS), n)
)
_HELD_OUT = Random("and-superposition held out")  # noqa: S311  # data, not secrets
#: Sets of active inputs that training never shows: a tenth.
HELD_OUT: frozenset[tuple[int, ...]] = frozenset(_HELD_OUT.sample(SETS, len(SETS) // 10))

#: The pairs of each model of ANDs, in the order of their words.
GATED_PAIRS: dict[str, tuple[Pair, ...]] = {
    "hand-and": ALL_PAIRS,
    "and-superposition": tuple(sorted(_DRAWN)),
}
#: A pair counts as found where its value, a tenth of its logit, is above this.
THRESHOLDS = {"hand-and": 5 / 7, "and-superposition": 0.5}
N_POSITIONS = 12


def pair_word(pair: Pair) -> str:
    """The word that answers for a pair of inputs: ``x3_x7``."""
    return f"{INPUTS[pair[0]]}_{INPUTS[pair[1]]}"


# --- hand-and


#: The sets of inputs that a ReLU of hand-and listens to. Inputs are the points of the affine space
#: of 4 dimensions over two elements, and these its 30 halves: each has 8 points, two points lie in
#: 7 common halves, three in 3.
HALVES: tuple[frozenset[int], ...] = tuple(
    frozenset(point for point in range(N_INPUTS) if (point & normal).bit_count() % 2 == side)
    for normal in range(1, N_INPUTS)
    for side in (0, 1)
)
#: Halves in which two inputs lie.
SHARED = 7
#: What one of two inputs gives with each further one, times :data:`SHARED`.
CROSSTALK = 3


def and_value(pair: Pair, active: frozenset[int]) -> float:
    """What hand-and gives for a pair when these inputs are active, before its gain of 10.

    The ReLU of half B gives ``max(|A ∩ B| - 1, 0)``, and one more ``max(|A| - 2, 0)``. A pair is
    read as the mean of the first over its 7 halves minus 3/7 of the second. With two or more
    active inputs that is 1 if both of the pair are active, 3/7 if one is, and
    ``(n - 1) / 7 <= 3/7`` if none is, where n of its halves hold no active input; with fewer, 0.
    """
    if len(active) < 2:
        return 0.0
    both = len(active & {*pair})
    if both:
        return 1.0 if both == 2 else CROSSTALK / SHARED
    halves = (half for half in HALVES if {*pair} <= half)
    return (sum(not half & active for half in halves) - 1) / SHARED


# --- hand-planted


@dataclass(frozen=True)
class FeatureGraph:
    """The true features of an MLP, and which of them make which.

    Attributes:
        source_site, target_site: Where the features are, as text of a :class:`circuitlab.Site`.
        sources, targets: Direction of each feature in the stream, of norm 1, by name. Those of one
            side are orthogonal to each other.
        edges: Weight of source in target. With z the intensities of the sources, a target's is
            ``max(sum of weight * z, 0)``.
    """

    source_site: str
    target_site: str
    sources: Mapping[str, Vector]
    targets: Mapping[str, Vector]
    edges: Mapping[tuple[str, str], float]


#: Weights of a target's two sources, for even and odd targets. No intensities 0, 1, 2 of the two
#: put a ReLU on its kink, except where both are 0.
PLANTED_WEIGHTS = ((1.0, 0.5), (1.0, -0.75))


def hadamard(order: int) -> tuple[Vector, ...]:
    """Orthonormal rows whose entries are all ``± 1/sqrt(order)``; the order is a power of two."""
    size = 1 / sqrt(order)
    return tuple(
        tuple(size * (-1) ** (row & column).bit_count() for column in range(order))
        for row in range(order)
    )


def _planted() -> FeatureGraph:
    """Sources in the first 16 coordinates, targets in the next, ``<bos>`` in the last."""
    basis, nothing, n = hadamard(N_INPUTS), (0.0,) * N_INPUTS, N_INPUTS
    flips = [1 if (index * index + index // 4) % 3 else -1 for index in range(n)]
    turned = [tuple(flip * entry for flip, entry in zip(flips, row, strict=True)) for row in basis]
    edges = {}
    for target in range(n):
        first, second = PLANTED_WEIGHTS[target % 2]
        edges[f"f{target}", f"g{target}"] = first
        edges[f"f{(target + 5) % n}", f"g{target}"] = second
    return FeatureGraph(
        "mlp_in.0",
        "mlp_out.0",
        {f"f{index}": (*row, *nothing, 0.0) for index, row in enumerate(basis)},
        {f"g{index}": (*nothing, *row, 0.0) for index, row in enumerate(turned)},
        edges,
    )


#: The features of hand-planted. Words are sources: 1 for each that came before, 2 for the last.
PLANTED = _planted()


def planted_values(text: str) -> Vector:
    """The intensities of hand-planted's targets after a prompt, in order of their number."""
    words = text.split()
    sources = {word: 2.0 if index == len(words) - 1 else 1.0 for index, word in enumerate(words)}
    sums = dict.fromkeys(PLANTED.targets, 0.0)
    for (source, target), weight in PLANTED.edges.items():
        sums[target] += weight * sources.get(source, 0.0)
    return tuple(max(total, 0.0) for total in sums.values())


# --- hand-interference


@dataclass(frozen=True)
class Interference:
    """A stream that holds A and B, and a little of A and B together, as by interference.

    At the last token it is ``A u + B v + (2 B - 1) A (ε/2) w`` with orthonormal u, v, w, plus or
    minus τ in each of the three, as the prompt's noise words say. What is written for A differs a
    little with B, and from that a linear probe can read A xor B, though nothing was made for it.

    Attributes:
        epsilon: ε, distance of what is written for A given B from that given not B.
        noise: τ, standard deviation in each direction.
    """

    epsilon: float = 0.2
    noise: float = 0.05

    @property
    def cosine(self) -> float:
        """Between what is written for A given B and given not B, ``(1 - ε²/4) / (1 + ε²/4)``."""
        square = self.epsilon**2 / 4
        return (1 - square) / (1 + square)

    @property
    def gap(self) -> float:
        """Between the two values of xor on the best axis, without noise: ``ε / sqrt(4 + ε²)``.

        It is the distance of the segment from v to ``u - (ε/2) w`` from that between 0 and
        ``u + v + (ε/2) w``. On the axis ``v - (2/ε) w`` every state has its value of xor exactly.
        """
        return self.epsilon / sqrt(4 + self.epsilon**2)

    @property
    def d_prime(self) -> float:
        """Of Fisher's linear discriminant: distance of the two means in standard deviations.

        All four states are equally likely. With e = ε/2 it is
        ``(e / τ) / sqrt(1 + e² / (1 + 4 τ²))``, close to gap / τ where τ is small: each class has
        two states, whose distance from each other counts as spread within the class.
        """
        e = self.epsilon / 2
        return e / self.noise / sqrt(1 + e**2 / (1 + 4 * self.noise**2))


#: The bundled one.
INTERFERENCE = Interference()
#: Words for A, B, and neither; then plus and minus τ in each direction; then the end.
A, B, BLANK, END = "a", "b", "blank", "="
NOISE = tuple((f"{axis}_plus", f"{axis}_minus") for axis in ("u", "v", "w"))
N_DIRECTIONS = 4


def interference_prompt(a: bool, b: bool, signs: tuple[int, int, int]) -> str:
    """The prompt for a state and the noise's signs, 1 or -1."""
    noise = (words[sign < 0] for words, sign in zip(NOISE, signs, strict=True))
    return " ".join([A if a else BLANK, B if b else BLANK, *noise, END])


# --- texts and tasks


def gates_text(rng: Random) -> str:
    """Up to four inputs, none twice, in any order; at least one."""
    return " ".join(rng.sample(INPUTS, rng.randint(1, MOST_ACTIVE)))


def planted_text(rng: Random) -> str:
    """Two to four sources, none twice, in any order."""
    return " ".join(rng.sample(list(PLANTED.sources), rng.randint(2, 4)))


def interference_text(rng: Random) -> str:
    """Any state with any noise, all equally likely."""
    a, b, *signs = (rng.random() < 0.5 for _ in range(5))
    first, second, third = (1 if sign else -1 for sign in signs)
    return interference_prompt(a, b, (first, second, third))


def gates_pair(pairs: tuple[Pair, ...], sets: Sequence[tuple[int, ...]], rng: Random) -> PromptPair:
    """One listed pair is active, and no other; corrupt: another one, as one input is replaced.

    Args:
        pairs: The pairs listed.
        sets: Sets of inputs for the clean prompt, each with exactly one listed pair.
        rng: Draws it.
    """
    while True:
        chosen = rng.choice(sets)
        active = rng.sample(chosen, len(chosen))
        place = rng.randrange(len(active))
        other = rng.choice([index for index in range(N_INPUTS) if index not in active])
        changed = [*active[:place], other, *active[place + 1 :]]
        (right,), wrong = _listed(pairs, active), _listed(pairs, changed)
        if len(wrong) == 1 and wrong != [right]:
            clean, corrupt = (" ".join(INPUTS[i] for i in some) for some in (active, changed))
            return PromptPair(clean, corrupt, (pair_word(right),), (pair_word(wrong[0]),))


def _listed(pairs: tuple[Pair, ...], active: Sequence[int]) -> list[Pair]:
    """The pairs both of whose inputs are active."""
    return [pair for pair in pairs if pair[0] in active and pair[1] in active]


def _planted_pair(rng: Random) -> PromptPair:
    """Both sources of an even target, and a third; corrupt: without the first, another's is."""
    target = 2 * rng.randrange(N_INPUTS // 2)
    first, second = target, (target + 5) % N_INPUTS
    other = rng.choice([index for index in range(0, N_INPUTS, 2) if index != target])
    clean, corrupt = (f"f{(other + 5) % N_INPUTS} f{second} f{i}" for i in (first, other))
    return PromptPair(clean, corrupt, (f"g{target}",), (f"g{other}",))


def _interference_pair(rng: Random) -> PromptPair:
    b, *signs = (rng.random() < 0.5 for _ in range(4))
    first, second, third = (1 if sign else -1 for sign in signs)
    clean, corrupt = (interference_prompt(a, b, (first, second, third)) for a in (True, False))
    return PromptPair(clean, corrupt, (YES,), (NO,))


def _distinct(name: str, n: int, draw: Callable[[Random], PromptPair]) -> tuple[PromptPair, ...]:
    rng = Random(name)  # noqa: S311  # data, not secrets
    pairs: dict[object, PromptPair] = {}
    while len(pairs) < n:
        pair = draw(rng)
        pairs.setdefault(pair.clean, pair)
    return tuple(pairs.values())


@dataclass(frozen=True)
class GatesRecipe(Recipe):
    """A recipe for ANDs, learned as values: every pair's logit is to be 10 or 0.

    Attributes:
        n_neurons: Width of the MLP, fewer than pairs.
        active_weight: Weight of a squared error where the pair is active; 1 elsewhere. Without it
            the rare active pairs are learned as too small a value.
    """

    n_neurons: int = 24
    active_weight: float = 3.0

    @property
    def n_inner(self) -> int:
        """Width of the MLP."""
        return self.n_neurons


def _example(rng: Random) -> Example:
    """A prompt; every pair of it is learned, not the next word."""
    return Example(gates_text(rng), ())


#: Held-out sets with exactly one pair of and-superposition.
_CLEAN = [
    some for some in sorted(HELD_OUT) if len(_listed(GATED_PAIRS["and-superposition"], some)) == 1
]


def _trained_pair(rng: Random, index: int) -> PromptPair:
    return gates_pair(GATED_PAIRS["and-superposition"], _CLEAN, rng)


RECIPE = GatesRecipe(
    name="and-superposition",
    n_layers=1,
    n_positions=N_POSITIONS,
    words=(*INPUTS, *map(pair_word, GATED_PAIRS["and-superposition"])),
    example=_example,
    pair=_trained_pair,
    steps=3000,
    batch_size=512,
    learning_rate=1e-2,
    weight_decay=0.0,
    n_heads=1,
    d_model=68,
)

VOCABULARIES: dict[str, tuple[str, ...]] = {
    "hand-and": (*SPECIAL_WORDS, *INPUTS, *map(pair_word, ALL_PAIRS)),
    "and-superposition": RECIPE.vocabulary,
    "hand-planted": (*SPECIAL_WORDS, *PLANTED.sources, *PLANTED.targets),
    "hand-interference": (
        *SPECIAL_WORDS,
        *(A, B, BLANK, END),
        *(word for words in NOISE for word in words),
        *(NO, YES),
    ),
}
#: Texts like those a hand-made model is for, drawn at random.
TEXTS: dict[str, Callable[[Random], str]] = {
    "hand-and": gates_text,
    "hand-planted": planted_text,
    "hand-interference": interference_text,
}
TASK = RECIPE.task("name the pair of inputs that is there")
TASKS = (
    Task(
        "hand-and",
        _distinct("hand-and", N_PAIRS, lambda rng: gates_pair(ALL_PAIRS, ALL_PAIRS, rng)),
        description="name the pair of inputs that is there",
    ),
    Task(
        "hand-planted",
        _distinct("hand-planted", 32, _planted_pair),
        description="name the feature that two words make",
    ),
    Task(
        "hand-interference",
        _distinct("hand-interference", 16, _interference_pair),
        description='say yes if there is an "a"',
    ),
)

_READ: frozenset[Edge] = frozenset({("input", "a0.h0", "k"), ("input", "a0.h0", "v")})
_COMPUTED: frozenset[Edge] = frozenset({("a0.h0", "m0", ""), ("m0", "logits", "")})
#: Edges of the mechanism, see :data:`circuitlab.zoo.hand.MECHANISMS`.
MECHANISMS: dict[str, frozenset[Edge]] = {
    "hand-and": _READ | _COMPUTED,
    "hand-planted": _READ | _COMPUTED | {("input", "m0", "")},
    "hand-interference": _READ | {("a0.h0", "logits", ""), ("input", "logits", "")},
}
#: Of them, what changes the metric when it alone is patched: not what both prompts share, the key
#: of ``<bos>`` and the last word of hand-interference.
EFFECTIVE: dict[str, frozenset[Edge]] = {
    name: edges - {("input", "a0.h0", "k"), ("input", "logits", "")}
    for name, edges in MECHANISMS.items()
}
