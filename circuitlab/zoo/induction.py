"""induction: a word that came before is followed by what followed it then.

The repeated segment has a random length and a random place. With a fixed offset the model learns to
look back that many positions instead, and no induction head forms.
"""

from __future__ import annotations

from random import Random

from circuitlab.tasks import PromptPair
from circuitlab.zoo.recipe import BOS, Example, Question, Recipe, distinct_words, hold_out, split

N_POSITIONS = 32
SEGMENT = (4, 15)
WORDS = tuple(
    split(
        "ant bag bat bed bee bell boat book box bread bus cake cap cat coin corn cow cup desk "
        "dog door drum duck ear egg fan farm fish flag fox frog gate goat hat hill horse ink "
        "jar key kite lamp leaf lion milk moon nest nut owl pan pear pen pig rain ring road "
        "rope ship shoe snow star sun"
    )
)

#: Successions no training segment contains; those the held-out pairs ask for.
HELD_OUT = hold_out([(a, b) for a in WORDS for b in WORDS if a != b], 0.1, seed="induction")
_AVOID = frozenset(HELD_OUT)


def example(rng: Random) -> Example:
    """Words, then a segment over and over; asked at every word from the second copy on."""
    n = rng.randint(*SEGMENT)
    segment = distinct_words(rng, WORDS, n, avoid=_AVOID)
    prefix = _prefix(rng, segment, room=N_POSITIONS - 1 - 2 * n)
    words = [BOS, *prefix, *segment * N_POSITIONS][:N_POSITIONS]
    second = 1 + len(prefix) + n
    questions = tuple(
        Question(at, (words[at + 1],))
        for at in range(second, N_POSITIONS - 1)
        if (words[at], words[at + 1]) not in _AVOID
    )
    return Example(" ".join(words[1:]), questions)


def pair(rng: Random, index: int) -> PromptPair:
    """A segment repeated up to a query word; corrupt: its first occurrence is another word."""
    n = rng.randint(*SEGMENT)
    query, answer = rng.choice(HELD_OUT)
    others = rng.sample([word for word in WORDS if word not in (query, answer)], n - 1)
    place = rng.randrange(n - 1)
    stranger = others.pop()
    segment = [*others[:place], query, answer, *others[place:]]
    prefix = _prefix(rng, [*segment, stranger], room=N_POSITIONS - 2 - n - place)
    wrong = rng.choice([word for word in segment[1:] if word not in (query, answer)])
    broken = [stranger if word == query else word for word in segment]
    repeated = segment[: place + 1]
    return PromptPair(
        clean=" ".join([*prefix, *segment, *repeated]),
        corrupt=" ".join([*prefix, *broken, *repeated]),
        answers=(answer,),
        wrong_answers=(wrong,),
    )


def _prefix(rng: Random, segment: list[str], *, room: int) -> list[str]:
    # A segment word in the prefix would make its successor ambiguous.
    return rng.choices([word for word in WORDS if word not in segment], k=rng.randint(0, room))


RECIPE = Recipe(
    name="induction",
    n_layers=2,
    n_positions=N_POSITIONS,
    words=WORDS,
    example=example,
    pair=pair,
    steps=1600,
    learning_rate=3e-3,
    # Small initial weights that decay leave less noise in the trained ones: by their weights alone
    # the previous-token head and the induction heads then compose at twice chance, not 1.6 times.
    weight_decay=0.05,
    weight_std=0.03,
)
TASK = RECIPE.task("complete a repeated series of random words")
