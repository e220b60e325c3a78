"""A training of dictionaries that is stopped, killed, repeated or mixed up with another."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.states import locked
from circuitlab_feature_interactions.training import Trainer, train

import circuitlab
from circuitlab import ModelError, OptionError

SMALL: dict[str, Any] = {
    "steps": 24,
    "batch_tokens": 32,
    "k": 3,
    "expansion": 0.5,
    "checkpoint_every": 5,
    "estimator": "rows:2,tokens:16",
}


def small_model() -> Any:
    return circuitlab.load_model("ioi-mini")


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def weights(found: Any) -> dict[str, torch.Tensor]:
    return {
        f"{site}/{name}": value
        for site, dictionary in found.dictionaries.items()
        for name, value in dictionary.state_dict().items()
    }


def same(a: Any, b: Any) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(("sites", "interaction"), [("mlp.0", "group"), ("block.0", "l1")])
def test_goes_on_bit_for_bit(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: str, interaction: str
) -> None:
    """Stopped twice, after a checkpoint and at one, it ends as if it had not been stopped.

    The weight of the sparsity term, which is steered, and the running mean of ``group`` are part of
    what it goes on from.
    """
    changes = {"sites": sites, "arch": "jumprelu", "interaction": interaction}
    settings = TrainSettings(**SMALL | changes)
    straight = train(model, settings, tmp_path / "straight")
    steps = Trainer.steps
    for stop in (12, 15):

        def stopping(self: Trainer, source: Any, stop: int = stop) -> Iterator[int]:
            for step in steps(self, source):
                yield step
                if step == stop:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "steps", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(model, settings, tmp_path / "stopped")
    monkeypatch.setattr(Trainer, "steps", steps)
    resumed = train(model, settings, tmp_path / "stopped")
    assert same(straight, resumed)
    assert straight.info == resumed.info
    assert not (tmp_path / "stopped" / "training.safetensors").exists()


def test_a_killed_process_loses_nothing(tmp_path: Path, process_env: dict[str, str]) -> None:
    """Killed in the middle of writing its third checkpoint, it goes on from the second."""
    program = """
        import os, signal, torch
        torch.set_num_threads(1)
        from pathlib import Path
        import circuitlab
        from circuitlab_feature_interactions import states
        from circuitlab_feature_interactions.settings import TrainSettings
        from circuitlab_feature_interactions.training import train
        replace, calls = os.replace, []
        def killing(a, b):
            calls.append(b)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(a, b)
        os.replace = killing
        train(circuitlab.load_model("ioi-mini"), TrainSettings(**SETTINGS), Path("killed"))
    """
    code = textwrap.dedent(program).replace("SETTINGS", repr(SMALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=process_env, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    model, settings = small_model(), TrainSettings(**SMALL)
    resumed = train(model, settings, tmp_path / "killed")
    assert same(resumed, train(model, settings, tmp_path / "straight"))


def test_stopped_while_the_set_is_written(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step nothing is trained again; the set is written from the state."""
    settings = TrainSettings(**SMALL)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr("circuitlab_feature_interactions.training.write_set", stop)
        with pytest.raises(KeyboardInterrupt):
            train(model, settings, tmp_path / "stopped")
    with monkeypatch.context() as idle:
        idle.setattr(Trainer, "_step", None)
        found = train(model, settings, tmp_path / "stopped")
    assert same(found, train(model, settings, tmp_path / "straight"))


def test_a_finished_training_is_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again reads the set; other settings are refused with both values."""
    settings = TrainSettings(**SMALL)
    found = train(model, settings, tmp_path)
    monkeypatch.setattr(Trainer, "steps", None)
    assert same(found, train(model, settings, tmp_path))
    other = TrainSettings(**SMALL | {"k": 4, "strength": 0.5})
    with pytest.raises(OptionError, match=r"k was 3 and is 4, strength was 0\.024 and is 0\.5"):
        train(model, other, tmp_path)


def test_an_unfinished_training_of_other_settings_is_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of other settings, or a damaged one, is neither used nor overwritten."""
    monkeypatch.setattr("circuitlab_feature_interactions.training._finish", lambda *_: None)
    train(model, TrainSettings(**SMALL), tmp_path)
    path = tmp_path / "training.safetensors"
    content = path.read_bytes()
    with pytest.raises(OptionError, match="seed was 0 and is 1"):
        train(model, TrainSettings(**SMALL, seed=1), tmp_path)
    assert path.read_bytes() == content
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match="its digest does not fit"):
        train(model, TrainSettings(**SMALL), tmp_path)
    path.write_bytes(content[:50])
    with pytest.raises(ModelError, match="is damaged"):
        train(model, TrainSettings(**SMALL), tmp_path)


def test_two_trainings_do_not_share_a_folder(model: Any, tmp_path: Path) -> None:
    """While one process trains in a folder, another is refused."""
    with locked(tmp_path), pytest.raises(OptionError, match="in use by another training"):
        train(model, TrainSettings(**SMALL), tmp_path)
