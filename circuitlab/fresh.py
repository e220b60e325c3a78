"""Fresh weights: a module of the same shape as before any training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from circuitlab.errors import ModelError


@torch.no_grad()
def fresh_weights(module: Any, seed: int) -> Any:
    """A copy of a Hugging Face module with the random weights its family begins training with.

    The same seed gives the same weights; torch's global random state is left alone. Modules that
    were put in by hand, such as an identity in a norm's place, stay.

    Args:
        module: With ``_init_weights`` of its family. It is not changed.
        seed: Of all weights.

    Raises:
        ModelError: the family leaves a weight as it was.
    """
    made = copy.deepcopy(module).to("cpu")
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    for weight in made.parameters():
        # Set by the loader, and heeded by the family's own initialisation.
        weight._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Parts before the whole: a whole may begin its parts in a way of its own.
        made.apply(made._init_weights)
        made.tie_weights()
    for name, weight in made.named_parameters():
        if torch.equal(weight, before[name]) and not _constant(weight):
            raise ModelError(
                f"the family of {type(module).__name__} does not say how {name} begins, so it "
                f"cannot be initialised anew; leave out controls with new weights"
            )
    return made.to(next(module.parameters()).device)


def _constant(weight: Tensor) -> bool:
    """Whether all numbers of a weight are the same, as those of a new norm or bias."""
    return bool((weight == weight.flatten()[0]).all())
