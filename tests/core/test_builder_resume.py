"""build_circuit with a state file: who may go on from it, and who is told that nothing is kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitlab import (
    Checkpoint,
    CircuitGraph,
    PluginError,
    Task,
    TaskError,
    TracedModel,
    build_circuit,
    hookimpl,
)
from circuitlab.registry import PluginInfo, Registry
from circuitlab.testing import tiny_model, toy_task


def stepping(model: TracedModel, task: Task, *, stop: bool = False) -> CircuitGraph:
    """Keeps a state once."""
    with Checkpoint("steps") as saved:
        done = saved.load()
        saved.keep({"x": torch.ones(1)})
        if done is None:
            raise KeyboardInterrupt
    return resting(model, task)


def resting(model: TracedModel, task: Task) -> CircuitGraph:
    """Keeps nothing."""
    return CircuitGraph()


def nesting(model: TracedModel, task: Task) -> CircuitGraph:
    """Builds another circuit on the way."""
    with Checkpoint("steps"), pytest.raises(KeyboardInterrupt):
        build_circuit(model, task, "stepping", registry=registry(), allow_weak=True)
    return resting(model, task)


def repeating(model: TracedModel, task: Task) -> CircuitGraph:
    """Has two stages of one name."""
    for _ in range(2):
        with Checkpoint("steps"):
            pass
    return resting(model, task)


def registry(version: str = "0.1") -> Registry:
    class Plugin:
        @hookimpl
        def register_analyses(self, register: Callable[..., None]) -> None:
            for function in (stepping, resting, nesting, repeating):
                register(function.__name__, function)

    found = Registry.load()
    found.add(Plugin(), PluginInfo("own", "circuitlab-own", version))
    return found


def build(path: Path | None, analysis: str = "stepping", **options: Any) -> CircuitGraph:
    settings = {"registry": registry(), "allow_weak": True, "resume": path, **options}
    return build_circuit(
        settings.pop("model", None) or tiny_model(), toy_task(), analysis, **settings
    )


def keeps_no_state(circuit: CircuitGraph) -> list[str]:
    return [text for text in circuit.graph["warnings"] if "keeps no state" in text]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The file that an interrupted build has left."""
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s")
    return tmp_path / "s"


def test_build_goes_on_and_cleans_up(stopped: Path) -> None:
    """The second build with the same settings gets the state, and removes the file."""
    circuit = build(stopped)
    assert list(stopped.parent.iterdir()) == []
    assert keeps_no_state(circuit) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"stop": True}, "option stop was False and is True"),
        ({"metric": "answer-log-prob"}, "metric was logit-difference and is answer-log-prob"),
        ({"n_pairs": 2}, "n_pairs was 5 and is 2"),
        ({"align": "pad"}, "align was refuse and is pad"),
        ({"analysis": "resting"}, "analysis was stepping and is resting"),
        ({"registry": registry("0.2")}, "version of circuitlab-own was 0.1 and is 0.2"),
    ],
)
def test_build_refuses_a_state_of_other_settings(
    stopped: Path, change: dict[str, Any], named: str
) -> None:
    """Whatever the numbers depend on is compared, named with both values."""
    with pytest.raises(TaskError, match=re.escape(named)):
        build(stopped, **change)
    build(stopped)


def test_build_refuses_a_state_of_other_weights(stopped: Path) -> None:
    """A model of the same name whose weights have changed is another model, and is alone named."""
    with pytest.raises(TaskError, match=r"another run: weights was \w{12} and is \w{12}; go"):
        build(stopped, model=tiny_model(seed=1))


def test_build_says_when_an_analysis_keeps_no_state(tmp_path: Path) -> None:
    """With ``resume``, and only then, an analysis without checkpoints has a warning."""
    assert keeps_no_state(build(tmp_path / "s", "resting")) == [
        f"analysis 'resting' keeps no state: nothing was written to '{tmp_path / 's'}', and an "
        f"interrupted run of it begins again"
    ]
    assert keeps_no_state(build(None, "resting")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_circuit_built_on_the_way_has_its_own_stages(tmp_path: Path) -> None:
    """An analysis that builds another circuit does not mix that one's state with its own."""
    assert keeps_no_state(build(tmp_path / "s", "nesting")) == []


def test_two_stages_of_one_name_are_the_plugins_fault() -> None:
    """It is told where no state is kept, too, so that an author sees it early."""
    with pytest.raises(PluginError, match=r"'repeating' .* failed: ValueError: this run has had"):
        build(None, "repeating")
