"""Random tasks that several tests run models on."""

from __future__ import annotations

import torch

from circuitlab import PromptPair, Task


def random_task(lengths: list[int], metric: str = "logit-difference", seed: int = 0) -> Task:
    """Contrasts of these lengths; clean and corrupt differ in half of their tokens or more."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number, length in enumerate(lengths):
        clean, corrupt = torch.randint(0, 20, (2, length), generator=generator)
        corrupt[length // 2 :] += 20
        pairs.append(
            PromptPair(tuple(clean.tolist()), tuple(corrupt.tolist()), (number,), (number + 9,))
        )
    return Task("random", tuple(pairs), metric)
