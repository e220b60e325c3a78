"""Controls trained on the spot: the same training without a penalty, or on new weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, read_set, write_set
from circuitlab_feature_interactions.evaluating import evaluate_dictionaries
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.training import train

import circuitlab
from circuitlab import ModelError, OptionError

SHORT = {"steps": 12, "batch_tokens": 64, "k": 3, "expansion": 2.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("ioi-mini")


def test_independent_dictionaries_are_trained_alike(model: Any, tmp_path: Path) -> None:
    """`train` gives what a training with the same settings and seed, without penalty, gives."""
    train(model, TrainSettings(**SHORT, strength=0.01, seed=3), tmp_path / "own")
    train(model, TrainSettings(**SHORT, interaction="none", seed=3), tmp_path / "none")
    asked = {"dictionaries": tmp_path / "own", "n_tokens": 200}
    now = evaluate_dictionaries(model, **asked, independent="train")
    assert now == evaluate_dictionaries(model, **asked, independent=tmp_path / "none")
    assert now["controls"]["independent"]["pairs"] != now["pairs"]


def test_new_weights_are_trained_on_alike(model: Any, tmp_path: Path) -> None:
    """The control is the same training on the model with new weights, measured there."""
    train(model, TrainSettings(**SHORT, seed=2), tmp_path / "own")
    fresh = model.reinitialised(2)
    train(fresh, TrainSettings(**SHORT, seed=2), tmp_path / "fresh")
    found = evaluate_dictionaries(model, dictionaries=tmp_path / "own", n_tokens=100, controls=True)
    wanted = evaluate_dictionaries(fresh, dictionaries=tmp_path / "fresh", n_tokens=100)
    control = found["controls"]["new-weights"]
    assert control == {"sites": wanted["sites"], "pairs": wanted["pairs"]}
    assert not any("new weights" in text for text in found["warnings"])


def test_transcoders_have_the_controls_that_fit(model: Any, tmp_path: Path) -> None:
    """What rebuilds a site is no control of what rebuilds an MLP's output; the rest is there."""
    train(model, TrainSettings(**SHORT, sites="transcoder.0"), tmp_path)
    asked = {"dictionaries": tmp_path, "n_tokens": 80, "controls": True, "independent": "train"}
    found = evaluate_dictionaries(model, **asked)
    assert set(found["controls"]) == {"independent", "shuffled", "new-weights"}
    assert set(found["pairs"]) == set(found["controls"]["new-weights"]["pairs"])


def test_a_control_is_trained_on_the_same_texts(model: Any, tmp_path: Path) -> None:
    """Of a set trained on a file no control is trained on the corpus; with the file it is."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps(text) for text in model.corpus(200)))
    settings = TrainSettings(**SHORT, data=texts)
    train(model, settings, tmp_path / "own")
    asked = {"dictionaries": tmp_path / "own", "n_tokens": 100, "independent": "train"}
    with pytest.raises(OptionError, match=r"trained on other texts.*--data FILE"):
        evaluate_dictionaries(model, **asked)
    assert "independent" in evaluate_dictionaries(model, **asked, data=texts)["controls"]


def test_what_cannot_be_trained_again_is_told(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set without settings has no such controls: refused where asked, else a warning."""
    folder = tmp_path / "bare"
    train(model, TrainSettings(**SHORT), tmp_path / "own")
    own = read_set(tmp_path / "own", model)
    write_set(DictionarySet(own.dictionaries, own.pairs, {"about": {}}), folder)
    asked = {"dictionaries": folder, "n_tokens": 100}
    with pytest.raises(OptionError, match="does not say with what"):
        evaluate_dictionaries(model, **asked, independent="train")
    found = evaluate_dictionaries(model, **asked, controls=True)
    assert any("no control with new weights" in text for text in found["warnings"])
    assert "new-weights" not in found["controls"]

    def unknown(*_: Any) -> Any:
        raise ModelError("nobody knows how it begins")

    monkeypatch.setattr(type(model), "reinitialised", unknown)
    found = evaluate_dictionaries(model, dictionaries=tmp_path / "own", n_tokens=100, controls=True)
    assert any("nobody knows how it begins" in text for text in found["warnings"])
