"""Identifiability through the trainer: penalty, steps and running means find what is planted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.activations import Batch, Place
from circuitlab_feature_interactions.coupling import Coupling
from circuitlab_feature_interactions.interactions import Route, make_route
from circuitlab_feature_interactions.learners import Learner
from circuitlab_feature_interactions.losses import Moments
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import Pair, make_pair
from circuitlab_feature_interactions.steering import Steering
from circuitlab_feature_interactions.training import Trainer
from oracles import random_gpt2
from torch import Tensor, nn

from circuitlab import Dictionary, TracedModel, load_model

#: Random beginnings, side by side in one model that has the same problem as often; its width.
STARTS, D = 4, 8
WIDTH = STARTS * D


def rotations(n: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrices, ``[n, D, D]``."""
    return torch.linalg.qr(torch.randn(n, D, D, generator=generator))[0]


def planted(w_in: Tensor, w_out: Tensor) -> TracedModel:
    """A GPT-2 without norms whose MLP is ``relu(x w_in) w_out``."""
    module: Any = random_gpt2(1, 1, WIDTH, layer_norm=False, activation="relu", dtype=torch.float32)
    mlp = module.transformer.h[0].mlp
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
        mlp.c_fc.weight[:, :WIDTH] = w_in
        mlp.c_proj.weight[:WIDTH] = w_out
    return load_model((module, None))


class Orthogonal(Learner):
    """Learns directions of orthogonal matrices and their opposites.

    It reconstructs everything, and exactly half its latents are active, whatever the matrices are:
    Cayley's formula makes them from free parameters.
    """

    @classmethod
    def begin(cls, generator: torch.Generator) -> Orthogonal:
        """Random matrices."""
        zeros, n = torch.zeros, 2 * WIDTH
        dictionary = Dictionary(
            zeros(WIDTH, n), zeros(n), zeros(n, WIDTH), zeros(WIDTH), apply_b_dec_to_input=False
        )
        for name in ("W_e", "W_d"):
            del dictionary._parameters[name]
        free = nn.Parameter(0.3 * torch.randn(STARTS, D, D, generator=generator))
        found = cls(
            dictionary,
            torch.optim.Adam([free], betas=(0.9, 0.99)),
            Moments(zeros(WIDTH), float(WIDTH)),
            zeros(n).long(),
            zeros(2, n).double(),
            Steering(0.0, None),
        )
        found.free, found.at_first = free, rotations(STARTS, generator)
        found.make()
        return found

    def bases(self) -> Tensor:
        """The matrices, a column per direction, ``[STARTS, D, D]``."""
        skew, eye = self.free - self.free.mT, torch.eye(D)
        return self.at_first @ torch.linalg.solve(eye + skew, eye - skew)

    def make(self) -> None:
        """Make the dictionary of the matrices as they are now."""
        whole = torch.block_diag(*self.bases())
        self.dictionary.W_e = torch.cat([whole, -whole], 1)
        self.dictionary.W_d = self.dictionary.W_e.T

    def step(self, share: float) -> None:
        """A step of the free parameters alone."""
        self.optimiser.param_groups[0]["lr"] = 0.06 * share
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.make()


class Gaussian:
    """Gaussian inputs, the same in every orthogonal dictionary, and what an MLP makes of them."""

    def __init__(self, pair: Pair, route: Route) -> None:
        self.pair, self.route = pair, route

    def batches(self, start: Place = Place()) -> Iterator[tuple[Batch, Place]]:  # noqa: B008
        number = start.prompt
        while True:
            generator, number = torch.Generator().manual_seed(number), number + 1
            x, mask = torch.randn(96, WIDTH, generator=generator), torch.ones(96).bool()
            values = {self.pair.source: x, self.pair.target: self.route(x, mask)}
            yield Batch(values, mask.long(), mask.long(), mask.long(), mask), Place(number)


@torch.no_grad()
def edges_of_each(source: Learner, target: Learner, route: Any) -> Tensor:
    """Σ_ij √(mean |R_ij|) of each beginning's own latents, from many tokens, ``[STARTS]``."""
    x = torch.randn(2048, WIDTH, generator=torch.Generator().manual_seed(7))
    found = route.attributions(source.dictionary, target.dictionary, x)
    dense = torch.zeros(2 * WIDTH, 2 * WIDTH)
    sizes = found.normalised(target.scale).abs()
    where = (
        found.target_index[..., None].expand_as(sizes),
        found.source_index[:, None].expand_as(sizes),
    )
    dense.index_put_(where, sizes / len(x), accumulate=True)
    return dense.sqrt().sum(1).view(2, STARTS, D).sum((0, 2))


@pytest.mark.parametrize("kind", ["l1", "group"])
def test_the_trainer_finds_the_planted_dictionaries(kind: Any) -> None:
    """Of several beginnings, the one with the fewest edges is the truth; ``group`` has its mean."""
    generator = torch.Generator().manual_seed(0)
    q, r = rotations(2, generator)
    model = planted(torch.block_diag(*[q] * STARTS), torch.block_diag(*[r] * STARTS))
    pair = make_pair("mlp", 0, model)
    settings = TrainSettings(
        arch="relu",
        sparsity=0.0,
        interaction=kind,
        strength=1.0,
        expansion=2.0,
        steps=250,
        batch_tokens=96,
        warmup=0.0,
    )
    route = make_route(model, pair)
    learners = {site: Orthogonal.begin(generator) for site in (pair.source, pair.target)}
    trainer = Trainer(settings, [pair], {pair: Coupling(model, pair, settings)}, learners)
    source: Any = Gaussian(pair, route)
    assert list(trainer.steps(source))[-1] == 250
    best = edges_of_each(learners[pair.source], learners[pair.target], route).argmin()
    for site, truth in ((pair.source, q), (pair.target, r.T)):
        learned = learners[site].bases().detach()[best]
        assert (truth.T @ learned).abs().amax(1).min() > 0.99
