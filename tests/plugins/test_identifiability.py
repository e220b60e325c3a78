"""Identifiability: planted dictionaries are found by the penalty alone, and by training with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.penalties import penalty
from circuitlab_feature_interactions.sites import make_pair
from oracles import random_gpt2
from torch import Tensor, nn

from circuitlab import Dictionary, TracedModel, load_model

#: Starts of one planted problem, side by side in one model, and the width of each.
STARTS, D = 4, 8


def rotations(n: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrices, ``[n, D, D]``."""
    return torch.linalg.qr(torch.randn(n, D, D, generator=generator))[0]


def planted(w_in: Tensor, b_in: Tensor, w_out: Tensor) -> TracedModel:
    """A GPT-2 without norms whose MLP is ``relu(x w_in + b_in) w_out``."""
    module: Any = random_gpt2(
        1, 1, len(w_in), layer_norm=False, activation="relu", dtype=torch.float32
    )
    mlp, width = module.transformer.h[0].mlp, w_in.shape[1]
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
        mlp.c_fc.weight[:, :width] = w_in
        mlp.c_fc.bias[:width] = b_in
        mlp.c_proj.weight[:width] = w_out
    return load_model((module, None))


class Orthogonal:
    """A dictionary of the directions of orthogonal matrices and their opposites.

    It reconstructs everything, and exactly half its latents are active, whatever the matrices are:
    Cayley's formula makes them from free parameters.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._start = rotations(STARTS, generator)
        self.free = nn.Parameter(0.3 * torch.randn(STARTS, D, D, generator=generator))
        d, zeros = STARTS * D, torch.zeros
        self._dictionary = Dictionary(
            zeros(d, 2 * d), zeros(2 * d), zeros(2 * d, d), zeros(d), apply_b_dec_to_input=False
        )
        for name in ("W_e", "W_d"):
            del self._dictionary._parameters[name]

    def bases(self) -> Tensor:
        """The matrices, a column per direction, ``[STARTS, D, D]``."""
        skew = self.free - self.free.mT
        eye = torch.eye(D)
        return self._start @ torch.linalg.solve(eye + skew, eye - skew)

    def dictionary(self) -> Dictionary:
        """The dictionary of all matrices as they are now."""
        whole = torch.block_diag(*self.bases())
        self._dictionary.W_e = torch.cat([whole, -whole], 1)
        self._dictionary.W_d = self._dictionary.W_e.T
        return self._dictionary

    def alone(self, start: int) -> Dictionary:
        """The dictionary of one matrix."""
        basis = self.bases()[start].detach()
        rows, zeros = torch.cat([basis, -basis], 1), torch.zeros
        return Dictionary(rows, zeros(2 * D), rows.T, zeros(D), apply_b_dec_to_input=False)


def recovered(kind: str, rows: int | None, steps: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Least |cos| of true directions with learned ones, source and target, ``[STARTS]`` each.

    Gaussian inputs look the same in every orthogonal dictionary, so that only the interactions can
    tell the one in which each input direction makes one output direction.

    Returns:
        Those, and the start that the penalty itself calls best.
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = rotations(1, generator), rotations(1, generator)
    both = (torch.block_diag(*one.expand(STARTS, D, D)) for one in (q, r))
    model = planted(next(both), torch.zeros(STARTS * D), next(both))
    route, measure = make_route(model, make_pair("mlp", 0, model)), penalty(kind)
    source, target = Orthogonal(generator), Orthogonal(generator)
    optimiser = torch.optim.Adam([source.free, target.free], betas=(0.9, 0.99))
    sums = torch.zeros(2, 2 * STARTS * D)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.06 * min(1.0, 2 * (steps - step) / steps)
        x = torch.randn(96, STARTS * D, generator=generator)
        found = route.attributions(
            source.dictionary(), target.dictionary(), x, rows=rows, generator=generator
        )
        z = found.z_target.detach().flatten()
        new = torch.stack([z, (z > 0).float()])
        sums = (0.95 * sums).index_add(1, found.target_index.flatten(), new)
        scale = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-9), 1.0)
        optimiser.zero_grad()
        measure(found, scale).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimiser.step()
    with torch.no_grad():
        single = planted(q[0], torch.zeros(D), r[0])
        route, x = make_route(single, make_pair("mlp", 0, single)), torch.randn(2048, D)
        # In one unit for all latents: the mean of one that is hardly ever active tells nothing.
        penalties = [
            float(
                measure(route.attributions(source.alone(n), target.alone(n), x), torch.ones(2 * D))
            )
            for n in range(STARTS)
        ]
        cosines = [
            (truth.mT @ learned).abs().amax(2).amin(1)
            for truth, learned in ((q, source.bases()), (r.mT, target.bases()))
        ]
    return cosines[0], cosines[1], min(range(STARTS), key=penalties.__getitem__)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "rows"),
    [("l1", None), ("l1", 8), ("l1l2", None), ("hoyer", None), ("log", None), ("group", None)],
)
def test_sparse_interactions_identify_the_dictionaries(
    kind: str, rows: int | None, seed: int
) -> None:
    """Of all orthogonal dictionaries the penalty alone finds the planted ones.

    Some starts end in a local minimum; the penalty itself says which of four is best.
    """
    sources, targets, best = recovered(kind, rows, 400, seed)
    assert min(float(sources[best]), float(targets[best])) > 0.99


@pytest.mark.parametrize("seed", range(4))
def test_the_frobenius_control_does_not(seed: int) -> None:
    """Small Jacobians are no sparse ones: the sum of squares leaves dictionaries where they are."""
    for found in recovered("frobenius", None, 100, seed)[:2]:
        assert found.max() < 0.9


# --- dictionaries that are trained ----------------------------------------------------------------


def unit(n: int, d: int, generator: torch.Generator) -> Tensor:
    return nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def learner(n: int, d: int, k: int, generator: torch.Generator) -> Dictionary:
    """A TopK dictionary of random unit rows, its encoder the decoder's transpose."""
    rows, zeros = unit(n, d, generator), torch.zeros(n)
    return Dictionary(rows.T, zeros, rows, torch.zeros(d), apply_b_dec_to_input=False, k=k)


def test_planted_pairs_are_found_by_training() -> None:
    """Reconstruction plus penalty finds an MLP's features, and that each output has two inputs."""
    generator = torch.Generator().manual_seed(0)
    d, n_pairs = 16, 8
    inputs = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    outputs = torch.linalg.qr(torch.randn(d, d, generator=generator))[0][:n_pairs]
    reads = torch.zeros(d, n_pairs)
    reads[torch.arange(d), torch.arange(d) // 2] = 1
    model = planted(inputs.T @ reads, torch.zeros(n_pairs), outputs)
    route, measure = make_route(model, make_pair("mlp", 0, model)), penalty("l1")
    n_source, n_target = 24, 12
    pair = [learner(n_source, d, 3, generator), learner(n_target, d, 3, generator)]
    optimiser = torch.optim.Adam([p for one in pair for p in one.parameters()])
    for step in range(600):
        optimiser.param_groups[0]["lr"] = 0.01 * min(1.0, 2 * (600 - step) / 600)
        on = torch.rand(512, d, generator=generator).argsort(1) < 3
        x = (on * (0.5 + torch.rand(512, d, generator=generator))) @ inputs
        y = route(x, on)
        found = route.attributions(*pair, x, tokens=64, generator=generator)
        loss = sum(one.error(v).square().sum(1).mean() for one, v in zip(pair, (x, y), strict=True))
        loss = loss + 0.02 * min(1.0, step / 100) * measure(found, torch.ones(n_target))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for one in pair:
                one.W_d.copy_(nn.functional.normalize(one.W_d, dim=1))
    cosines = [
        (truth @ one.W_d.T).detach() for truth, one in zip((inputs, outputs), pair, strict=True)
    ]
    assert all(cosine.amax(1).min() > 0.95 for cosine in cosines)
    with torch.no_grad():
        found = route.attributions(*pair, x)
    sizes = torch.zeros(n_target, n_source)
    where = (
        found.target_index[..., None].expand_as(found.values),
        found.source_index[:, None].expand_as(found.values),
    )
    sizes.index_put_(where, found.values.abs(), accumulate=True)
    source, target = (cosine.argmax(1) for cosine in cosines)
    strongest = sizes[target][:, source].topk(2).indices.sort(1).values
    assert strongest.tolist() == [[2 * n, 2 * n + 1] for n in range(n_pairs)]
