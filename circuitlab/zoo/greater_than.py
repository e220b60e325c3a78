"""greater-than: something that began in '32 ends in a later year of the century.

After Hanna et al. 2023 (arXiv:2305.00586), with two-digit years that are single words.
"""

from __future__ import annotations

from random import Random

from circuitlab.tasks import PromptPair
from circuitlab.zoo.recipe import Example, Question, Recipe, hold_out

NOUNS = (
    "war",
    "siege",
    "reign",
    "strike",
    "famine",
    "voyage",
    "truce",
    "drought",
    "plague",
    "feud",
)
CENTURIES = tuple(str(century) for century in range(11, 19))
YEARS = tuple(f"{year:02d}" for year in range(100))
LOW_YEAR = "01"
TEMPLATE = "The {noun} lasted from the year {century}{year} to the year {century}"

_STARTS = [(century, year) for century in CENTURIES for year in YEARS[:-1]]

#: Starting years, with their century, that training never shows.
HELD_OUT = hold_out([start for start in _STARTS if start[1] > LOW_YEAR], 0.2, seed="greater-than")
TRAINED = tuple(start for start in _STARTS if start not in HELD_OUT)


def example(rng: Random) -> Example:
    """A sentence with a start; the end is any later year, all equally likely."""
    century, year = rng.choice(TRAINED)
    text = TEMPLATE.format(noun=rng.choice(NOUNS), century=century, year=year)
    return Example(text, (Question(-1, YEARS[int(year) + 1 :]),))


def pair(rng: Random, index: int) -> PromptPair:
    """A held-out start; corrupt: the century's year 01, after which nearly every year is right."""
    (century, year), noun = rng.choice(HELD_OUT), rng.choice(NOUNS)
    return PromptPair(
        clean=TEMPLATE.format(noun=noun, century=century, year=year),
        corrupt=TEMPLATE.format(noun=noun, century=century, year=LOW_YEAR),
        answers=YEARS[int(year) + 1 :],
        wrong_answers=YEARS[: int(year) + 1],
    )


RECIPE = Recipe(
    name="greater-than",
    n_layers=2,
    n_positions=16,
    words=("The", "lasted", "from", "the", "year", "to", *NOUNS, *YEARS),
    example=example,
    pair=pair,
    steps=1500,
)
TASK = RECIPE.task("end later than the start (greater-than)")
