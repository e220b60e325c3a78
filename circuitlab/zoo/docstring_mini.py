"""docstring-mini: document the arguments of a function in their order.

After Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
transformer". The MLPs' output weights are zero, so an ordinary GPT-2 runs as attention alone.
"""

from __future__ import annotations

from random import Random

from circuitlab.tasks import PromptPair
from circuitlab.zoo.recipe import Example, Question, Recipe, distinct_words, hold_out, split

N_ARGUMENTS = (3, 5)
WORDS = tuple(
    split(
        "axis base body city code cost data date file flag form goal host item keys line list "
        "load mode name node part path port rate root rule self size text"
    )
)
SYNTAX = ("def", "param", "(", ")", ",", ":")

#: Successions of arguments no training example contains; those the held-out pairs ask for.
HELD_OUT = hold_out([(a, b) for a in WORDS for b in WORDS if a != b], 0.1, seed="docstring-mini")
_AVOID = frozenset(HELD_OUT)


def example(rng: Random) -> Example:
    """A function of three to five arguments, the first few documented."""
    n = rng.randint(*N_ARGUMENTS)
    arguments = distinct_words(rng, WORDS, n, avoid=_AVOID)
    name = rng.choice([word for word in WORDS if word not in arguments])
    n_documented = rng.randint(1, n - 1)
    text = _prompt(name, arguments, arguments[:n_documented])
    return Example(text, (Question(-1, (arguments[n_documented],)),))


def pair(rng: Random, index: int) -> PromptPair:
    """Corrupt: the function has other arguments than those documented."""
    n = rng.randint(*N_ARGUMENTS)
    last, answer = rng.choice(HELD_OUT)
    others = rng.sample([word for word in WORDS if word not in (last, answer)], 2 * n - 1)
    name, replacements, rest = others[0], others[1 : n + 1], others[n + 1 :]
    place = rng.randrange(n - 1)
    arguments = [*rest[:place], last, answer, *rest[place:]]
    documented = arguments[: place + 1]
    return PromptPair(
        clean=_prompt(name, arguments, documented),
        corrupt=_prompt(name, replacements, documented),
        answers=(answer,),
        wrong_answers=(rng.choice([word for word in arguments if word != answer]),),
    )


def _prompt(name: str, arguments: list[str], documented: list[str]) -> str:
    lines = "".join(f" :param {argument}" for argument in documented)
    return f"def {name}({', '.join(arguments)}):{lines} :param"


RECIPE = Recipe(
    name="docstring-mini",
    n_layers=3,
    n_positions=32,
    words=SYNTAX + WORDS,
    example=example,
    pair=pair,
    steps=600,
    attention_only=True,
)
TASK = RECIPE.task("document a function's next argument")
