"""What the path oracles say of a task: the metric of their logits, signed as effects are."""

from __future__ import annotations

from typing import Any

import oracles
import path_oracles
import torch
from hooked_passes import random_neox
from random_tasks import random_task
from torch import Tensor

from circuitlab import EncodedTask, TracedModel, load_model

METRICS = ("logit-difference", "answer-log-prob", "kl-divergence")
#: GPT-NeoX is float32: it takes its softmax in that type, where a float64 mask is minus infinity.
TOLERANCES = {"gpt2": 1e-9, "neox": 1e-4, "float32": 1e-4}


class Brute:
    """The oracles on a task in one mode; effects are ``[batch]``, negative helps."""

    def __init__(
        self, module: Any, pairs: EncodedTask, mode: str = "noise", ablation: str = "counterfactual"
    ) -> None:
        self.module = module
        ids = (pairs.clean.ids, pairs.corrupt.ids, pairs.clean.mask.long())
        with torch.no_grad():
            self.run = path_oracles.runs(module, *ids, mode=mode, ablation=ablation)
            self.clean = path_oracles.runs(module, *ids).base.logits
        self.pairs, self.sign = pairs, 1 if mode == "noise" else -1
        self.base = self.score(self.run.base.logits)

    def score(self, logits: Tensor) -> Tensor:
        return self.pairs.score(logits, self.clean).double()

    def effect(self, logits: Tensor) -> Tensor:
        return self.sign * (self.score(logits) - self.base)


def small_model(family: str, seed: int = 1, n_layers: int = 2) -> tuple[Any, TracedModel]:
    """A random model, plain and traced; ``float32`` is a GPT-2 in that type."""
    if family == "neox":
        parallel: Any = random_neox(n_layers, 2, 16, seed=seed, dtype=torch.float32)
        return parallel, load_model((parallel, None))
    dtype = torch.float32 if family == "float32" else torch.float64
    module = oracles.random_gpt2(n_layers, 2, 16, seed=seed, dtype=dtype)
    return module, load_model((module, None))


def padded_pairs(
    model: TracedModel, metric: str = "logit-difference", seed: int = 0
) -> EncodedTask:
    """Three pairs of different length: two are padded."""
    return model.encode(random_task([6, 4, 3], metric, seed))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
