"""ioi-mini: of two people, name the one who does not act a second time.

The task is that of Wang et al. 2022 (arXiv:2211.00593) in a closed world of four sentences. The
model finds an algorithm of its own: do not expect the circuit of GPT-2 small in it.
"""

from __future__ import annotations

from random import Random

from circuitlab.tasks import PromptPair
from circuitlab.zoo.recipe import Example, Question, Recipe, hold_out, split

NAMES = tuple(
    split(
        "Mary John Tom Anna Paul Kate Jack Lucy Mark Emma Luke Sara Adam Jane Nick Rose Dan Amy "
        "Sam Eve Max Lily Ben Zoe"
    )
)
PLACES = ("store", "park", "school", "office", "beach", "garden")
THINGS = ("drink", "book", "ring", "ball", "letter", "bone")
TEMPLATES = (
    "When {first} and {second} went to the {place}, {subject} gave a {thing} to",
    "Then {first} and {second} had fun at the {place}. Later {subject} handed a {thing} to",
    "After {first} and {second} went to the {place} today, {subject} gave the {thing} to",
    "Today {first} and {second} had a {thing} at the {place}, so {subject} gave a {thing} to",
)
WORDS = tuple(
    split("When Then After Today and went had fun at to the a gave handed today so Later , .")
)

_COUPLES = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]

#: Couples that never meet in training, in either order.
HELD_OUT = hold_out(_COUPLES, 0.2, seed="ioi-mini")
TRAINED = tuple(couple for couple in _COUPLES if couple not in HELD_OUT)


def example(rng: Random) -> Example:
    """A sentence about two people who met; the answer is who does not act."""
    text, _, indirect_object, _ = _sentence(rng, TRAINED, rng.choice(TEMPLATES), rng.random() < 0.5)
    return Example(text, (Question(-1, (indirect_object,)),))


def pair(rng: Random, index: int) -> PromptPair:
    """ABBA and BABA in turn over all templates; corrupt: the other person acts."""
    template = TEMPLATES[index // 2 % len(TEMPLATES)]
    clean, corrupt, indirect_object, subject = _sentence(rng, HELD_OUT, template, index % 2 == 0)
    return PromptPair(clean, corrupt, (indirect_object,), (subject,))


def _sentence(
    rng: Random, couples: tuple[tuple[str, str], ...], template: str, abba: bool
) -> tuple[str, str, str, str]:
    """Text, text with the other subject, indirect object, subject."""
    first, second = rng.sample(rng.choice(couples), 2)
    subject, indirect_object = (second, first) if abba else (first, second)
    place, thing = rng.choice(PLACES), rng.choice(THINGS)

    def told(acting: str) -> str:
        return template.format(first=first, second=second, subject=acting, place=place, thing=thing)

    return told(subject), told(indirect_object), indirect_object, subject


RECIPE = Recipe(
    name="ioi-mini",
    n_layers=3,
    n_positions=20,
    words=WORDS + PLACES + THINGS + NAMES,
    example=example,
    pair=pair,
    steps=1000,
    weight_decay=1.0,
    weight_std=0.2,
)
TASK = RECIPE.task("name the person who receives (indirect object identification)")
