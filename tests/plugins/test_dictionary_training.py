"""The training of dictionaries: its loss, what it finds, and that it survives an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.activations import Batch, Place
from circuitlab_feature_interactions.data import generator_of
from circuitlab_feature_interactions.learners import Learner
from circuitlab_feature_interactions.losses import Moments, begin_dictionary, site_loss
from circuitlab_feature_interactions.resampling import resample
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import Pair
from circuitlab_feature_interactions.steering import Steering
from circuitlab_feature_interactions.train_command import train_dictionaries
from circuitlab_feature_interactions.training import Trainer, train

import circuitlab
from circuitlab import NumericsError, OptionError, Site, SiteError

SOURCE, TARGET = Site("mlp_in", 0), Site("mlp_out", 0)
PAIR = Pair(SOURCE, TARGET, "mlp", 0)
SMALL: dict[str, Any] = {
    "steps": 24,
    "batch_tokens": 32,
    "k": 3,
    "expansion": 0.5,
    "checkpoint_every": 5,
    "estimator": "rows:2,tokens:16",
}


class Planted:
    """Batches of known activations: ``make(generator)`` gives the values of each site."""

    def __init__(self, make: Any, sites: tuple[Site, ...] = (SOURCE, TARGET)) -> None:
        self.make, self.sites = make, sites

    def batches(self, start: Place = Place()) -> Iterator[tuple[Batch, Place]]:  # noqa: B008
        number = start.prompt
        while True:
            values = self.make(generator_of(9, number))
            mask = torch.ones(len(values[SOURCE]), dtype=torch.bool)
            number += 1
            yield Batch(values, mask.long(), mask.long(), mask.long(), mask), Place(number)


def planted(n: int = 256, width: int = 12, active: int = 2) -> tuple[Planted, torch.Tensor]:
    """Sums of few out of ``width`` orthonormal directions, beside a large constant."""
    truth = torch.linalg.qr(torch.randn(width, width, generator=generator_of(1)))[0]

    def make(generator: torch.Generator) -> dict[Site, torch.Tensor]:
        chosen = torch.rand(n, width, generator=generator).topk(active, 1).indices
        size = 1 + torch.rand(n, active, generator=generator)
        z = torch.zeros(n, width).scatter(1, chosen, size)
        return {SOURCE: z @ truth + 5, TARGET: 30 * (z @ truth) - 40}

    return Planted(make), truth


def small_model() -> Any:
    return circuitlab.load_model("ioi-mini")


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu", "gated"])
def test_loss_and_gradient_are_those_written_by_hand(arch: Any) -> None:
    """The loss and its gradient in the maps and biases equal formulas without the dictionary."""
    generator = generator_of(2)
    x = torch.randn(40, 6, dtype=torch.float64, generator=generator) + 2
    moments = Moments.of(x, SOURCE)
    settings = TrainSettings(arch=arch, k=3, expansion=2)
    dictionary = begin_dictionary(settings, moments, generator)
    loss = site_loss(dictionary, x, moments, 0.1)
    loss.total.backward()
    names = ("W_e", "b_e", "W_d", "b_d")
    w_e, b_e, w_d, b_d = (getattr(dictionary, n).detach().clone().requires_grad_() for n in names)
    spread = (x - x.mean(0)).pow(2).sum() / 40
    pre = (x - b_d) @ w_e + b_e
    if arch == "topk":
        least = pre.sort(1, descending=True).values[:, 2:3]
        z = torch.where(pre >= least, pre.clamp(min=0), 0.0)
    elif arch == "jumprelu":
        assert dictionary.threshold is not None
        z = torch.where(pre > dictionary.threshold.detach(), pre, 0.0)
    else:
        z = pre.clamp(min=0)
    wanted = (x - z @ w_d - b_d).pow(2).sum() / 40 / spread
    if arch == "relu":
        wanted = wanted + 0.1 * z.sum() / 40 / spread.sqrt()
    if arch == "jumprelu":
        wanted = wanted + 0.1 * (z > 0).sum() / 40
    if arch == "gated":
        # Its latents see the gate's bias not at all: the gate passes no gradient.
        gate, no_bias = pre, (x - b_d) @ w_e
        z = torch.where(gate.detach() > 0, no_bias.clamp(min=0), 0.0)
        wanted = (x - z @ w_d - b_d).pow(2).sum() / 40 / spread
        wanted = wanted + 0.1 * gate.clamp(min=0).sum() / 40 / spread.sqrt()
        frozen = gate.clamp(min=0) @ w_d.detach() + b_d.detach()
        wanted = wanted + (x - frozen).pow(2).sum() / 40 / spread
    wanted.backward()  # type: ignore[no-untyped-call]  # torch's own
    torch.testing.assert_close(loss.total, wanted)
    for name, own in zip(names, (w_e, b_e, w_d, b_d), strict=True):
        torch.testing.assert_close(getattr(dictionary, name).grad, own.grad)


def test_joint_loss_weighs_interactions_by_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a step is that of both sites' losses and of weight times interactions."""
    source, _ = planted(n=30)
    settings = TrainSettings(
        k=2, expansion=1, steps=20, warmup=0.5, strength=0.7, batch_tokens=30, learning_rate=0.01
    )
    seen: list[dict[Site, torch.Tensor]] = []
    scales: list[torch.Tensor] = []

    class Product:
        note = ""

        def __call__(self, a: Any, b: Any, batch: Any, scale: Any, generator: Any) -> torch.Tensor:
            scales.append(scale)
            found: torch.Tensor = a.W_e.sum() * b.W_e.sum()
            return found

        def state(self) -> dict[str, torch.Tensor]:
            return {}

        def load(self, state: Any) -> None:
            pass

    trainer = Trainer.begin(settings, [PAIR], {PAIR: Product()}, source)  # type: ignore[arg-type]
    step = Learner.step

    def recorded(learner: Learner, share: float) -> None:
        site = next(s for s, own in trainer.learners.items() if own is learner)
        assert learner.dictionary.W_e.grad is not None
        seen[-1][site] = learner.dictionary.W_e.grad.clone()
        step(learner, share)

    monkeypatch.setattr(Learner, "step", recorded)
    steps, batches = trainer.steps(source), source.batches()  # type: ignore[arg-type]
    for number in range(7):
        values = next(batches)[0].values
        wanted, sums = {}, {}
        for site, learner in trainer.learners.items():
            loss = site_loss(learner.dictionary, values[site], learner.moments, 0.0)
            (wanted[site],) = torch.autograd.grad(loss.total, learner.dictionary.W_e)
            sums[site] = learner.dictionary.W_e.detach().sum()
        seen.append({})
        next(steps)
        for site, other in ((SOURCE, TARGET), (TARGET, SOURCE)):
            expected = wanted[site] + 0.7 * number / 10 * sums[other]
            torch.testing.assert_close(seen[-1][site], expected, rtol=1e-4, atol=1e-5)
    z = trainer.learners[TARGET]
    first = next(source.batches())[0].values[TARGET]
    fresh = Trainer.begin(settings, [PAIR], {}, source)  # type: ignore[arg-type]
    latents = fresh.learners[TARGET].dictionary.encode(first).detach()
    mean = latents.sum(0) / (latents > 0).sum(0)
    fired = (latents > 0).any(0)
    torch.testing.assert_close(scales[0][fired], mean[fired])
    assert z.dictionary.W_d.norm(dim=1).sub(1).abs().max() < 1e-6


def test_schedules() -> None:
    """Rate and weight rise from their start, stay, and the rate falls to its end."""
    settings = TrainSettings(steps=1000, warmup=0.1, strength=2.0)
    assert settings.rate_share(0) == pytest.approx(0.1)
    assert settings.rate_share(9) == settings.rate_share(799) == 1
    assert settings.rate_share(900) == pytest.approx(0.5)
    assert [settings.weight_at(n) for n in (0, 50, 100, 999)] == [0, 1, 2, 2]
    assert TrainSettings(warmup=0, strength=2.0).weight_at(0) == 2
    assert settings.rate_of(2**14) == pytest.approx(2e-4)


# --- what it finds --------------------------------------------------------------------------------


def test_planted_dictionary_is_recovered() -> None:
    """Each planted direction is a decoder row, whatever the scale and offset of the site."""
    source, truth = planted()
    settings = TrainSettings(
        k=2, expansion=1.5, steps=400, batch_tokens=256, interaction="none", learning_rate=0.01
    )
    trainer = Trainer.begin(settings, [PAIR], {}, source)  # type: ignore[arg-type]
    assert list(trainer.steps(source))[-1] == 400  # type: ignore[arg-type]
    for site, learner in trainer.learners.items():
        cosines = (truth @ learner.dictionary.W_d.detach().T).max(1).values
        assert float(cosines.min()) > 0.95, site
        assert trainer.history[f"r2 {site}"][-1] > 0.97


def test_scale_of_activations_does_not_matter() -> None:
    """Activations a thousand times as large give the same training, in their unit."""
    ends = []
    for factor in (1.0, 1024.0):
        source, _ = planted(n=64)
        make = source.make
        source.make = lambda g, make=make, by=factor: {s: by * v for s, v in make(g).items()}
        settings = TrainSettings(k=2, expansion=1, steps=30, batch_tokens=64, interaction="none")
        trainer = Trainer.begin(settings, [PAIR], {}, source)  # type: ignore[arg-type]
        list(trainer.steps(source))  # type: ignore[arg-type]
        ends.append(trainer.learners[SOURCE].dictionary)
    torch.testing.assert_close(ends[0].W_d, ends[1].W_d, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(1024 * ends[0].b_d, ends[1].b_d, rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu", "gated"])
def test_dead_latents_begin_anew_at_errors(arch: Any) -> None:
    """A dead latent points at the one error there is; the others, and their Adam, stay."""
    moments = Moments.of(torch.randn(50, 6, generator=generator_of(3)), SOURCE)
    settings = TrainSettings(arch=arch, k=3, expansion=2)
    dictionary = begin_dictionary(settings, moments, generator_of(4))
    learner = Learner.of(dictionary, moments, 0.01, Steering(0.1, None))
    x = torch.randn(50, 6, generator=generator_of(5))
    site_loss(dictionary, x, moments, 0.1).total.backward()
    learner.step(1.0)
    before = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    error = torch.zeros(50, 6)
    error[7] = torch.tensor([0.0, 3, 0, 4, 0, 0])
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 5]] = True
    done = resample(dictionary, learner.optimiser, dead, error, moments, 3, generator_of(6))
    assert done == 1
    direction = torch.tensor([0.0, 0.6, 0, 0.8, 0, 0])
    torch.testing.assert_close(dictionary.W_d[2].detach(), direction)
    torch.testing.assert_close(
        dictionary.W_e[:, 2].detach() / dictionary.W_e[:, 2].norm().detach(), direction
    )
    kept = torch.arange(12) != 2
    for name, parameter in dictionary.named_parameters():
        new = parameter.detach().T if name == "W_e" else parameter.detach()
        old = before[name].T if name == "W_e" else before[name]
        state = learner.optimiser.state[parameter]["exp_avg"]
        state = state.T if name == "W_e" else state
        if name == "b_d":
            assert torch.equal(new, old)
            continue
        assert torch.equal(new[kept], old[kept])
        assert not state[2].any()


def test_a_penalty_makes_interactions_smaller(model: Any, tmp_path: Path) -> None:
    """With the penalty, the same training ends with fewer interactions and a worse fit."""
    ends = []
    for strength in (1e-12, 0.3):
        settings = TrainSettings(**SMALL | {"steps": 60, "strength": strength})
        history = train(model, settings, tmp_path / str(strength)).info["history"]
        ends.append((history["interactions mlp.0"][-1], history["r2 mlp_out.0"][-1]))
    assert ends[1][0] < 0.5 * ends[0][0]
    assert ends[0][1] > 0.3


# --- what is refused, and told --------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(model: Any, tmp_path: Path) -> None:
    """Settings out of range, sites that are not there, a loss that grows without bound."""
    for change, message in (
        ({"k": 33}, "32, fewer than k = 33"),
        ({"k": 0}, "k is 0"),
        ({"arch": "vanilla"}, "arch 'vanilla' is unknown"),
        ({"interaction": "l2"}, "interaction 'l2' is unknown"),
        ({"estimator": "rows:0"}, "estimator 'rows:0'"),
        ({"expansion": 0.001, "k": 1}, "gives none latents"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"sparsity": 0.1}, "topk has no sparsity term"),
    ):
        with pytest.raises(OptionError, match=message):
            train(model, TrainSettings(**SMALL | change), tmp_path)
    with pytest.raises(SiteError, match="layers of ioi-mini"):
        train(model, TrainSettings(**SMALL | {"sites": "mlp.9"}), tmp_path)
    with pytest.raises(NumericsError, match="not finite at step"):
        train(model, TrainSettings(**SMALL | {"learning_rate": 1e30}), tmp_path)


def test_the_command_tells_how_good_they_are(model: Any, tmp_path: Path) -> None:
    """The command's numbers are those in the set, and L0 is what topk allows."""
    found = train_dictionaries(model, **SMALL, output=tmp_path / "set")
    assert found["l0 mlp_in.0"] <= 3
    assert found["r2 mlp_out.0"] < 1
    assert found["tokens"] == 24 * 32
    assert found["held out"] is True
    assert found["interactions mlp.0"] > 0
