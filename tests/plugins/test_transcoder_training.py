"""Transcoders: their pairs of sites, their loss, what is found, and their folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.activations import Batch, Place
from circuitlab_feature_interactions.data import generator_of
from circuitlab_feature_interactions.dictionary_sets import read_set
from circuitlab_feature_interactions.learners import Learner
from circuitlab_feature_interactions.losses import Moments, begin_transcoder, site_loss
from circuitlab_feature_interactions.resampling import resample
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.sites import (
    make_pair,
    site_pairs,
    sites_of,
    written_by,
    written_site,
)
from circuitlab_feature_interactions.steering import Steering
from circuitlab_feature_interactions.training import Trainer, train
from torch import Tensor

import circuitlab
from circuitlab import ModelError, OptionError, Site, SiteError, write_dictionary

F64 = torch.float64
READ, WRITTEN = Site("mlp_in", 0), Site("mlp_out", 0)
SMALL: dict[str, Any] = {
    "sites": "transcoder.0",
    "steps": 12,
    "batch_tokens": 32,
    "k": 3,
    "expansion": 0.5,
    "checkpoint_every": 5,
    "estimator": "rows:2,tokens:16",
}


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("ioi-mini")


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_of_transcoders(model: Any) -> None:
    """A transcoder is of what an MLP reads; each MLP's goes with the next one's."""
    (pair,) = site_pairs("transcoder.1", model)
    assert (pair.source, pair.target) == (Site("mlp_in", 1), Site("mlp_in", 2))
    pairs = site_pairs("transcoder", model)
    assert list(map(str, pairs)) == ["transcoder.0", "transcoder.1"]
    assert sites_of(pairs) == [Site("mlp_in", layer) for layer in range(3)]
    assert written_by(pairs) == {
        Site("mlp_in", layer): Site("mlp_out", layer) for layer in range(3)
    }
    both = site_pairs("block.1, transcoder.0", model)
    assert written_by(both)[Site("resid_pre", 1)] == Site("resid_pre", 1)


def test_pairs_that_cannot_be_are_refused(model: Any) -> None:
    """The last MLP has none after it; a site has one dictionary, not two."""
    with pytest.raises(SiteError, match=r"transcoder\.2 do not exist: ioi-mini has 3 MLPs"):
        site_pairs("transcoder.2", model)
    with pytest.raises(SiteError, match=r"transcoder\.0 do not exist: and-superposition has 1"):
        site_pairs("transcoder", circuitlab.load_model("and-superposition"))
    with pytest.raises(OptionError, match=r"autoencoder and a transcoder of mlp_in\.1"):
        site_pairs("transcoder.0, mlp.1", model)


def test_a_transcoder_says_what_it_writes() -> None:
    """One that does not is refused, and the message's remedy works."""
    x, y = some()
    moments = Moments.of(y, WRITTEN)
    one = begin_transcoder(TrainSettings(k=3), x, y, moments, generator_of(0))
    with pytest.raises(SiteError, match=r"does not say what it writes.*target='mlp_out\.0'"):
        written_site(READ, one)
    one.info = circuitlab.DictionaryInfo(site="mlp_in.0", target="mlp_out.0")
    assert written_site(READ, one) == WRITTEN


# --- the loss -------------------------------------------------------------------------------------


def some(n: int = 60) -> tuple[Tensor, Tensor]:
    """What is read and written at some tokens; large means."""
    generator = generator_of(2)
    x = torch.randn(n, 6, dtype=F64, generator=generator) + 7
    return x, torch.relu(x - 7) @ torch.randn(6, 5, dtype=F64, generator=generator) - 3


def begun(arch: Any) -> tuple[Any, Tensor, Tensor, Moments]:
    x, y = some()
    moments = Moments.of(y, WRITTEN)
    settings = TrainSettings(arch=arch, k=3, expansion=2)
    return begin_transcoder(settings, x, y, moments, generator_of(3)), x, y, moments


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu"])
def test_loss_is_that_of_what_is_written(arch: Any) -> None:
    """Loss and gradients equal formulas without the dictionary; the spread is the target's."""
    dictionary, x, y, moments = begun(arch)
    loss = site_loss(dictionary, x, moments, 0.1, y)
    loss.total.backward()  # type: ignore[no-untyped-call]  # torch's own
    names = ("W_e", "b_e", "W_d", "b_d")
    w_e, b_e, w_d, b_d = (getattr(dictionary, n).detach().clone().requires_grad_() for n in names)
    pre = x @ w_e + b_e
    if arch == "topk":
        least = pre.sort(1, descending=True).values[:, 2:3]
        z = torch.where(pre >= least, pre.clamp(min=0), 0.0)
    elif arch == "jumprelu":
        z = torch.where(pre > dictionary.threshold.detach(), pre, 0.0)
    else:
        z = pre.clamp(min=0)
    spread = (y - y.mean(0)).pow(2).sum() / len(y)
    wanted = (y - z @ w_d - b_d).pow(2).sum() / len(y) / spread
    if arch == "relu":
        wanted = wanted + 0.1 * z.sum() / len(y) / spread.sqrt()
    if arch == "jumprelu":
        wanted = wanted + 0.1 * (z > 0).sum() / len(y)
    wanted.backward()  # type: ignore[no-untyped-call]  # torch's own
    torch.testing.assert_close(loss.total, wanted)
    torch.testing.assert_close(loss.error, (y - z @ w_d - b_d).detach())
    for name, own in zip(names, (w_e, b_e, w_d, b_d), strict=True):
        torch.testing.assert_close(getattr(dictionary, name).grad, own.grad)


def test_latents_begin_as_large_as_what_they_write() -> None:
    """Encoders take the mean off; their columns are of one length, from what predicts the row."""
    dictionary, x, y, moments = begun("relu")
    pre = dictionary.pre(x).detach()
    assert pre.mean(0).abs().max() < 1e-9
    assert float(pre.square().mean().sqrt()) == pytest.approx(moments.unit, rel=0.3)
    norms = dictionary.W_e.detach().norm(dim=0)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    along = (y - y.mean(0)) @ dictionary.W_d.detach().T
    assert (pre * along).mean(0).min() > 0


def test_a_step_is_one_about_the_mean_of_what_is_read() -> None:
    """Steps are those of plain Adam on an encoder that reads x less its mean."""
    dictionary, x, y, moments = begun("relu")
    read = Moments.of(x, READ)
    learner = Learner.of(dictionary, moments, 0.01, Steering(0.1, None), read)
    parts = [dictionary.W_e, dictionary.b_e + read.mean @ dictionary.W_e, dictionary.b_d]
    w_e, bias, b_d = (part.detach().clone().requires_grad_() for part in parts)
    unit, per = moments.unit, moments.unit / read.unit
    groups = [{"params": [w_e], "lr": 0.01 * per}, {"params": [bias, b_d], "lr": 0.01 * unit}]
    adam = torch.optim.Adam(groups, eps=1e-10)
    for _ in range(5):
        w_d = dictionary.W_d.detach().clone()
        site_loss(dictionary, x, moments, 0.1, y).total.backward()  # type: ignore[no-untyped-call]
        learner.step(1.0)
        z = ((x - read.mean) @ w_e + bias).relu()
        loss = (y - z @ w_d - b_d).square().sum(1).mean() / moments.spread
        loss = loss + 0.1 * z.sum(1).mean() / moments.spread**0.5
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(dictionary.W_e, w_e, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dictionary.b_e, bias - read.mean @ w_e, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dictionary.b_d, b_d, rtol=1e-7, atol=1e-9)


def test_dead_latents_read_where_the_error_is() -> None:
    """Decoder rows go along a token's error, encoders along what was read there, less the mean."""
    dictionary, x, y, moments = begun("topk")
    read = Moments.of(x, READ)
    learner = Learner.of(dictionary, moments, 0.01, Steering(0.1, None), read)
    loss = site_loss(dictionary, x, moments, 0.0, y)
    loss.total.backward()  # type: ignore[no-untyped-call]  # torch's own
    learner.step(1.0)
    error = torch.zeros_like(y)
    error[4] = loss.error[4]
    dead = torch.arange(dictionary.n) == 2
    given = (error, moments, 3, generator_of(0), (x, read.mean))
    assert resample(dictionary, learner.optimiser, dead, *given) == 1
    row, column = dictionary.W_d[2].detach(), dictionary.W_e[:, 2].detach()
    torch.testing.assert_close(row, error[4] / error[4].norm())
    centred = x[4] - read.mean
    torch.testing.assert_close(column / column.norm(), centred / centred.norm())
    torch.testing.assert_close(dictionary.b_e[2].detach(), -(read.mean @ column))


# --- what it finds --------------------------------------------------------------------------------


class Planted:
    """Few of some features are on; the MLP turns each into another direction."""

    def __init__(self, read: float = 1.0, written: float = 1.0) -> None:
        self.sites, width = (READ, WRITTEN), 12
        self.inputs, self.outputs = (
            torch.linalg.qr(torch.randn(width, width, generator=generator_of(n)))[0] for n in (1, 2)
        )
        self.scales = (read, written)

    def batches(self, start: Place = Place()) -> Iterator[tuple[Batch, Place]]:  # noqa: B008
        number = start.prompt
        while True:
            generator = generator_of(9, number)
            chosen = torch.rand(256, 12, generator=generator).topk(2, 1).indices
            size = 1 + torch.rand(256, 2, generator=generator)
            z = torch.zeros(256, 12).scatter(1, chosen, size)
            read, written = self.scales
            values = {
                READ: read * (z @ self.inputs + 5),
                WRITTEN: written * ((z - 0.5).relu() @ self.outputs - 4),
            }
            mask, number = torch.ones(256, dtype=torch.bool), number + 1
            yield Batch(values, mask.long(), mask.long(), mask.long(), mask), Place(number)


def trained(source: Planted, steps: int) -> Trainer:
    """A transcoder of MLP 0; the second, which is not there, is left out."""
    settings = TrainSettings(
        k=2, expansion=1.5, steps=steps, batch_tokens=256, interaction="none", learning_rate=0.01
    )
    pair = make_pair("transcoder", 0, circuitlab.load_model("ioi-mini"))
    alone = type(pair)(pair.source, pair.source, "transcoder", 0)
    trainer = Trainer.begin(settings, [alone], {}, source)  # type: ignore[arg-type]
    assert list(trainer.steps(source))[-1] == steps  # type: ignore[arg-type]
    return trainer


def test_a_planted_transcoder_is_recovered() -> None:
    """Decoder rows are what features are turned into; encoders, as a rule, read one feature."""
    source = Planted()
    trainer = trained(source, 400)
    dictionary = trainer.learners[READ].dictionary
    cosines = source.outputs @ dictionary.W_d.detach().T
    assert float(cosines.max(1).values.min()) > 0.95
    assert trainer.history[f"r2 {READ}"][-1] > 0.97
    columns = dictionary.W_e.detach()[:, cosines.argmax(1)]
    read = torch.cosine_similarity(source.inputs.T, columns, dim=0)
    assert float(read.median()) > 0.95


def test_scales_of_activations_do_not_matter() -> None:
    """What is read and what is written, in other units, give the same training."""
    ends = [trained(Planted(*scales), 40).history for scales in ((1, 1), (1024, 1 / 64))]
    assert ends[0][f"r2 {READ}"][-1] == pytest.approx(ends[1][f"r2 {READ}"][-1], abs=2e-3)
    assert ends[0][f"r2 {READ}"][-1] > ends[0][f"r2 {READ}"][0] + 0.1


# --- folders --------------------------------------------------------------------------------------


def test_transcoders_are_trained_together(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read back as what they are; a training that was stopped ends the same."""
    found = train(model, TrainSettings(**SMALL), tmp_path / "set")
    again = read_set(tmp_path / "set", model)
    for layer in (0, 1):
        one = again.dictionaries[Site("mlp_in", layer)]
        assert one.transcoder
        assert (one.info.site, one.info.target) == (f"mlp_in.{layer}", f"mlp_out.{layer}")
    assert found.info["history"]["interactions transcoder.0"][-1] > 0
    step, calls = Trainer._step, []

    def stopping(trainer: Trainer, batch: Batch) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(model, TrainSettings(**SMALL), tmp_path / "stopped")
    monkeypatch.undo()
    ended = train(model, TrainSettings(**SMALL), tmp_path / "stopped")
    for site, one in found.dictionaries.items():
        for name, value in one.state_dict().items():
            assert torch.equal(value, ended.dictionaries[site].state_dict()[name])


def test_what_is_told_is_of_what_is_written(model: Any, tmp_path: Path) -> None:
    """R² of the training's check is that of the MLP's output on the same prompts."""
    found = train(model, TrainSettings(**SMALL | {"interaction": "none"}), tmp_path / "set")
    one = found.dictionaries[READ]
    run = model.run(model.corpus(300, seed=7), read=[READ, WRITTEN], logits="none")
    x, y = (run[site][run.mask] for site in (READ, WRITTEN))
    r2 = 1 - float(one.error(x, y).square().sum() / (y - y.mean(0)).square().sum())
    assert found.info["statistics"]["mlp_in.0"]["r2"] == pytest.approx(r2, abs=0.05)


def test_a_penalty_makes_interactions_fewer(model: Any, tmp_path: Path) -> None:
    """Of a bundled model's transcoders, beside a block's autoencoders, at a worse fit."""
    ends = []
    for strength in (1e-12, 0.3):
        changed = {"sites": "transcoder.0, block.2", "steps": 50, "strength": strength}
        found = train(model, TrainSettings(**SMALL | changed), tmp_path / str(strength))
        history = found.info["history"]
        ends.append((history["interactions transcoder.0"][-1], history["r2 mlp_in.1"][-1]))
    assert ends[1][0] < 0.5 * ends[0][0]
    assert ends[0][1] > 0.3


def test_an_autoencoder_in_the_place_of_a_transcoder_is_refused(model: Any, tmp_path: Path) -> None:
    """A set says which of its dictionaries are transcoders, and files must agree."""
    found = train(model, TrainSettings(**SMALL | {"interaction": "none"}), tmp_path / "set")
    one = found.dictionaries[READ]
    other = circuitlab.Dictionary(
        one.W_e, one.b_e, one.W_d, one.b_d, k=3, apply_b_dec_to_input=False,
        info=circuitlab.DictionaryInfo(site="mlp_in.0", model=model.name),
    )  # fmt: skip
    write_dictionary(other, tmp_path / "set" / "mlp_in.0")
    with pytest.raises(ModelError, match=r"no transcoder to mlp_out\.0 from mlp_in\.0"):
        read_set(tmp_path / "set", model)


def test_gated_transcoders_are_refused(model: Any, tmp_path: Path) -> None:
    """A gate learns by giving back what it reads; other architectures are named."""
    with pytest.raises(OptionError, match=r"gated transcoders.*relu"):
        train(model, TrainSettings(**SMALL | {"arch": "gated"}), tmp_path)
