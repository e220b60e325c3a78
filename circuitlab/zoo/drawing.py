"""New pairs for the tasks of trained models, from the part of the data that training never saw."""

from __future__ import annotations

from collections.abc import Collection

from circuitlab.tasks import PromptPair
from circuitlab.zoo import docstring_mini, greater_than, induction, ioi_mini, superposition

_RECIPES = {
    module.RECIPE.name: module.RECIPE
    for module in (induction, ioi_mini, greater_than, docstring_mini, superposition)
}
#: How many times as many pairs as are wanted are drawn before it is given up.
_TRIES = (1, 2, 4, 8)


def new_pairs(
    name: str, n: int, *, avoid: Collection[str] = (), seed: int = 0
) -> tuple[PromptPair, ...]:
    """Pairs for the task ``name``, drawn as its own are, the same for the same seed.

    Args:
        name: Of the task of a trained model.
        n: How many are wanted.
        avoid: Digests of pairs that must not be among them.
        seed: Of the draw.

    Returns:
        ``n`` different pairs; fewer where there are no more, none where no recipe draws this task.
    """
    recipe = _RECIPES.get(name)
    found: tuple[PromptPair, ...] = ()
    if recipe is None:
        return found
    for times in _TRIES:
        try:
            drawn = recipe.pairs(times * n, seed=f"held out {seed}")
        except ValueError:  # there are no more
            break
        found = tuple(pair for pair in drawn if pair.digest not in avoid)[:n]
        if len(found) == n:
            break
    return found
