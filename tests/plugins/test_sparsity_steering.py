"""Steering: as many latents become active as are wanted, whatever makes them sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.activations import Batch, Place
from circuitlab_feature_interactions.data import generator_of
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import Pair
from circuitlab_feature_interactions.steering import Steering
from circuitlab_feature_interactions.train_command import train_dictionaries
from circuitlab_feature_interactions.training import Trainer, train

import circuitlab
from circuitlab import Site

SOURCE, TARGET = Site("mlp_in", 0), Site("mlp_out", 0)
PAIR = Pair(SOURCE, TARGET, "mlp", 0)


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("induction")


class Sparse:
    """Batches of sums of 2 out of 12 directions, times ``factor``."""

    sites = (SOURCE, TARGET)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def batches(self, start: Place = Place()) -> Iterator[tuple[Batch, Place]]:  # noqa: B008
        number = start.prompt
        truth = torch.linalg.qr(torch.randn(12, 12, generator=generator_of(1)))[0]
        while True:
            generator = generator_of(9, number)
            chosen = torch.rand(64, 12, generator=generator).topk(2, 1).indices
            size = 1 + torch.rand(64, 2, generator=generator)
            x = self.factor * (torch.zeros(64, 12).scatter(1, chosen, size) @ truth)
            mask, number = torch.ones(64, dtype=torch.bool), number + 1
            values = {SOURCE: x, TARGET: -x}
            yield Batch(values, mask.long(), mask.long(), mask.long(), mask), Place(number)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_comes_to_rest_where_it_should(power: float) -> None:
    """L0 that follows a power of the weight, with a lag, ends at what is wanted from both sides."""
    for at_first, wanted in ((128.0, 8), (5.0, 8)):
        steering, level = Steering(0.1, wanted), math.log(at_first)
        for _ in range(3000):
            weight = max(steering.weight / 0.1, 1e-3)
            level += 0.02 * (math.log(at_first) - power * math.log(weight) - level)
            steering.note(math.exp(level))
        assert math.exp(level) == pytest.approx(wanted, rel=0.02)


def test_is_bounded_and_can_be_left_out() -> None:
    """Nothing active without end, or all: the weight has bounds; without a target it stays."""
    for l0, least, most in ((0.0, -1.0, -1.0), (1e9, 1e2, 1e4)):
        steering = Steering(1.0, 4, least=-1.0)
        for _ in range(10_000):
            steering.note(l0)
        assert least <= steering.weight <= most
    fixed = Steering(0.3, None)
    fixed.note(1e9)
    assert fixed.weight == 0.3


@pytest.mark.parametrize(("arch", "least"), [("relu", 0.2), ("jumprelu", 0.6), ("gated", 0.3)])
def test_every_architecture_ends_at_k(model: Any, tmp_path: Path, arch: Any, least: float) -> None:
    """On prompts that were not trained on, L0 is within a quarter of k, and most is explained."""
    k = 8
    found = train_dictionaries(
        model,
        arch=arch,
        k=k,
        expansion=2,
        steps=300,
        batch_tokens=256,
        interaction="none",
        output=tmp_path,
    )
    for site in (SOURCE, TARGET):
        assert 0.75 * k < found[f"l0 {site}"] < 1.25 * k
        assert found[f"r2 {site}"] > least


def test_a_weight_that_is_given_stays(model: Any, tmp_path: Path) -> None:
    """--sparsity fixes the weight; without it, it moves."""
    settings: dict[str, Any] = {
        "arch": "relu",
        "steps": 20,
        "batch_tokens": 32,
        "interaction": "none",
    }
    fixed = train(model, TrainSettings(**settings, sparsity=0.07), tmp_path / "fixed")
    moved = train(model, TrainSettings(**settings), tmp_path / "moved")
    for site in (SOURCE, TARGET):
        assert set(fixed.info["history"][f"sparsity {site}"]) == {0.07}
        assert len(set(moved.info["history"][f"sparsity {site}"])) > 10


def test_the_loss_is_fixed_in_the_end(model: Any, tmp_path: Path) -> None:
    """In the last twentieth of the steps the weight does not move; before, it does."""
    settings = TrainSettings(arch="gated", steps=100, batch_tokens=32, interaction="none")
    weights = train(model, settings, tmp_path).info["history"][f"sparsity {SOURCE}"]
    assert len(weights) == 100
    assert len(set(weights[95:])) == 1
    assert len(set(weights[:95])) == 95


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "gated"])
def test_scale_of_activations_does_not_matter(arch: Any) -> None:
    """Activations a hundred times as large give the same weights of the sparsity term, and L0."""
    ends = []
    for factor in (1.0, 100.0):
        source: Any = Sparse(factor)
        settings = TrainSettings(
            arch=arch, k=2, expansion=2, steps=60, batch_tokens=64, interaction="none"
        )
        trainer = Trainer.begin(settings, [PAIR], {}, source)
        list(trainer.steps(source))
        ends.append(trainer.history)
    for name, values in ends[0].items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(ends[1][name]), rtol=0.02, atol=0.02
        )


def test_the_number_of_parameters_is_told(model: Any, tmp_path: Path) -> None:
    """A gated dictionary has, at the same n, n numbers more for its gain and n for its bias."""
    settings: dict[str, Any] = {"steps": 2, "batch_tokens": 32, "interaction": "none"}
    numbers = {}
    for arch in ("topk", "jumprelu", "gated"):
        told = train_dictionaries(model, arch=arch, **settings, output=tmp_path / arch)
        numbers[arch] = told[f"parameters {SOURCE}"]
        assert told[f"parameters {TARGET}"] == numbers[arch]
    n, d = 256, 64
    plain = 2 * n * d + n + d
    assert numbers == {"topk": plain, "jumprelu": plain + n, "gated": plain + 2 * n}
