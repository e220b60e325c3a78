"""Hand-made models whose regions, borders, crossings and normals are known in closed form.

Staircase: a GPT-2 of one layer without norms. The MLP reads ``s = w · x`` of the stream and writes
``u``, which rises by ``rise`` in a ramp of width ``1 / steepness`` at each threshold. Token ``j``
of the first ``n + 1`` has the logit ``gain * (j u / rise - j² / 2)``, so it wins where ``u / rise``
lies within half of j: among embeddings, region j and j + 1 meet in ``w · x = threshold[j] +
1 / (2 steepness)``, where the difference of their logits grows by ``gain * steepness`` per unit of
s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitlab import TracedModel, load_model
from circuitlab.zoo.network import parameters, silent

N_DIRECTIONS = 6
BLOCK = "transformer.h.0.mlp"


@dataclass(frozen=True)
class Staircase:
    """The model and what is true of it.

    Attributes:
        model: One layer; tokens from ``len(thresholds) + 1`` on stand at the places given.
        w: What the MLP reads, ``[d_model]``, of norm 1.
        thresholds: Where the ramps begin.
        steepness: Slope of a ramp.
        gain: Logits per step.
        first: The first token that stands at a place.
    """

    model: TracedModel
    w: Tensor
    thresholds: Sequence[float]
    steepness: float
    gain: float
    rise: float
    first: int

    def border(self, j: int) -> float:
        """``w · x`` on the border of regions j and j + 1."""
        return self.thresholds[j] + 0.5 / self.steepness

    def normal(self, j: int) -> Tensor:
        """Unit normal of that border in the whole stream, ``[d_model]``, towards j + 1.

        The logits read u and the constant from the stream too: beside the MLP's path there is one
        around it.
        """
        normal = self.steepness * self.w.double()
        normal[N_DIRECTIONS], normal[N_DIRECTIONS + 1] = 1 / self.rise, -(j + 0.5)
        return normal / normal.norm()

    def slope(self) -> float:
        """Growth of the logit difference of two neighbours per unit of ``w · x``."""
        return self.gain * self.steepness


def staircase(
    places: Sequence[float],
    thresholds: Sequence[float] = (1.0, 2.0, 3.0),
    *,
    steepness: float = 4.0,
    gain: float = 8.0,
    rise: float = 1.0,
    seed: int = 0,
) -> Staircase:
    """A staircase, and a token at each place of ``w · x`` with noise across ``w``."""
    n, generator = len(thresholds), torch.Generator().manual_seed(seed)
    first, value = n + 1, N_DIRECTIONS
    module = silent(first + len(places), 4, width=value + 2, n_layers=1, n_inner=2 * n)
    weights = parameters(module)
    w = torch.nn.functional.normalize(torch.randn(value, generator=generator), dim=0)
    noise = torch.randn(len(places), value, generator=generator)
    noise -= (noise @ w)[:, None] * w
    embedding = weights["transformer.wte.weight"]
    embedding[first:, :value] = torch.tensor(places)[:, None] * w + noise
    for step, threshold in enumerate(thresholds):
        for side in (0, 1):
            neuron = 2 * step + side
            weights[f"{BLOCK}.c_fc.weight"][:value, neuron] = steepness * w
            weights[f"{BLOCK}.c_fc.bias"][neuron] = -steepness * threshold - side
            weights[f"{BLOCK}.c_proj.weight"][neuron, value] = rise * (1 - 2 * side)
    steps = torch.arange(first)
    # The last coordinate is 1 for every token: it carries the logits' constant terms.
    embedding[:, value + 1] = 1.0
    weights["lm_head.weight"][:first, value] = gain * steps / rise
    weights["lm_head.weight"][:first, value + 1] = -gain * steps.square() / 2
    weights["lm_head.weight"][first:, value + 1] = -1000.0
    normal = torch.zeros(module.config.n_embd)
    normal[:value] = w
    return Staircase(load_model(module), normal, thresholds, steepness, gain, rise, first)
