"""Formats, commands, tasks, notes, families: each planted fault is found, and sound ones pass."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitlab import OptionError, PluginError, PromptPair, Task, hookimpl
from circuitlab.registry import PluginInfo, Registry
from circuitlab.testing import check_plugin, tiny_model, toy_task
from circuitlab.testing.clause import Clause
from circuitlab.testing.hosts import on_host, unpacked
from circuitlab.testing.others import (
    check_annotator,
    check_command,
    check_exporter,
    check_families,
    check_task,
)
from circuitlab.testing.samples import planted_circuit, sample_circuit

_calls = itertools.count()


def broken(clauses: Iterable[Clause]) -> list[tuple[str, str]]:
    """Rule and reason of each clause that fails."""
    return [(c.rule, c.reason) for c in clauses if c.verdict == "FAILS"]


def registry_with(plugin: object) -> Registry:
    registry = Registry.load([])
    registry.add(plugin, PluginInfo("own", "circuitlab-own", "0.1"))
    assert registry.failed == []
    return registry


# --- formats --------------------------------------------------------------------------------------


def test_sound_exporter_passes() -> None:
    """One that writes what it is given, and nothing else, holds both rules."""
    clauses = list(check_exporter(".own", lambda c, path: path.write_text(c.to_json()) and None))
    assert [clause.verdict for clause in clauses] == ["holds", "holds"]


def printing(circuit: Any, path: Path) -> None:
    print("written")
    path.write_text("x")


def changing(circuit: Any, path: Path) -> None:
    circuit.graph["seen"] = True
    path.write_text("x")


@pytest.mark.parametrize(
    ("write", "rules", "reason"),
    [
        (lambda c, path: None, 2, "wrote no file at the path it was given"),
        (lambda c, path: path.touch(), 1, "wrote an empty file"),
        (lambda c, path: path.write_text(str(next(_calls))) and None, 1, "two different files"),
        (lambda c, path: 1 / 0, 2, "it raised ZeroDivisionError: division by zero"),
        (printing, 2, "printed 'written"),
        (changing, 1, "changed the circuit it was given"),
    ],
)
def test_broken_exporter_is_found(write: Any, rules: int, reason: str) -> None:
    """No file, an empty one, another each time, an exception, a word on stdout, a changed graph."""
    found = broken(check_exporter(".own", write))
    assert len(found) == rules
    assert reason in found[0][1]


def test_sample_circuit_is_the_planted_one() -> None:
    """What exporters and annotators are shown has the planted edges, sizes, and a panel to plot."""
    circuit = sample_circuit()
    model, _, edges = planted_circuit()
    assert set(circuit.edges(keys=True)) == edges
    assert circuit.graph["d_model"] == model.d_model
    assert len(circuit.graph["plots"]) == 1
    assert sorted(score for *_, score in circuit.effects()) == [-1.0] + [1.0] * (len(edges) - 1)


# --- commands -------------------------------------------------------------------------------------


def sizes(model: Any, *, scale: int = 1) -> dict[str, int]:
    """Sizes of a model."""
    return {"layers": model.n_layers * scale}


def wavering(model: Any) -> dict[str, int]:
    """Another number each time."""
    return {"call": next(_calls)}


def odd(model: Any) -> dict[str, Any]:
    """Something that is no JSON."""
    return {"model": model}


def undocumented(model: Any) -> dict[str, int]:
    return {}


def talking(model: Any) -> dict[str, int]:
    """Print."""
    print("hello")
    return {}


def verdicts(function: Any, given: dict[str, Any], *, asked: bool) -> list[Clause]:
    class Plugin:
        @hookimpl
        def register_commands(self, register: Any) -> None:
            register("own sizes", function)

    registry = registry_with(Plugin())
    return list(check_command(registry.commands["own sizes"], given, registry, asked=asked))


def test_command_with_options_runs_when_asked() -> None:
    """It may work for hours by default: it is run only with values for its options."""
    left, run = (verdicts(sizes, {"scale": 2}, asked=asked) for asked in (False, True))
    assert [clause.verdict for clause in left] == ["holds", "not checked"]
    assert "--set 'own sizes.OPTION=VALUE'" in left[1].reason
    assert [clause.verdict for clause in run] == ["holds", "holds"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wavering, "two different results from one seed"),
        (odd, "gave dict (Object of type TracedModel is not JSON serializable); give plain JSON"),
        (undocumented, "has no docstring"),
        (talking, "printed 'hello"),
    ],
)
def test_broken_command_is_found(function: Any, reason: str) -> None:
    """Results that waver or are no JSON, no help, a word on stdout: one rule fails."""
    ((_, found),) = broken(verdicts(function, {}, asked=False))
    assert reason in found


def test_commands_write_into_a_folder_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a command writes beside it by default does not stay."""

    def writing(model: Any) -> dict[str, str]:
        """Write a file here."""
        Path("left.txt").write_text("x")
        return {"file": "left.txt"}

    monkeypatch.chdir(tmp_path)
    assert broken(verdicts(writing, {}, asked=False)) == []
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


# --- tasks, notes, families -----------------------------------------------------------------------


def test_task_that_cannot_travel_is_found() -> None:
    """A task that a file does not give back is named; a plain one passes."""
    task = Task("own", (PromptPair((1,), (2,), (3,), (4,)),))

    class Other(Task):
        def to_json(self) -> dict[str, Any]:
            return {**super().to_json(), "name": "other"}

    assert broken(check_task(task)) == []
    ((_, reason),) = broken(check_task(Other("own", task.pairs)))
    assert "another one when it was written and read again" in reason


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (lambda circuit: circuit.nodes["logits"].update(x=1), None),
        (lambda circuit: circuit.nodes["logits"].update(x=next(_calls)), "two different circuits"),
        (
            lambda circuit: circuit.nodes["logits"].update(x={1, 2}),
            "add plain JSON values, finite",
        ),
        (lambda circuit: circuit.remove_node("logits"), "it added or removed nodes"),
        (lambda circuit: print("hello"), "printed 'hello"),
    ],
)
def test_annotations(note: Any, reason: str | None) -> None:
    """Plain data that is the same twice passes; all else is found."""

    class Plugin:
        @hookimpl
        def annotate_circuit(self, circuit: Any) -> None:
            note(circuit)

    found = broken(check_annotator("own", registry_with(Plugin())))
    assert (reason is None) == (found == [])
    assert not found or str(reason) in found[0][1]


def test_families() -> None:
    """Claiming every family, or GPT-2 with other parts, is found; claiming none passes."""
    known = tiny_model().architecture

    def plugin(answer: Any) -> object:
        class Plugin:
            @hookimpl
            def adapt_architecture(self, config: Any) -> Any:
                return answer(config)

        return Plugin()

    def found(answer: Any) -> list[str]:
        return [reason for _, reason in broken(check_families(registry_with(plugin(answer))))]

    assert found(lambda config: None) == []
    (claims,) = found(lambda config: known)
    assert "claims a family that does not exist" in claims
    wrong = replace(known, parallel=True)
    (differs,) = found(lambda config: wrong if config.model_type == "gpt2" else None)
    assert "claims GPT-2 and describes it wrongly" in differs


# --- hosts ----------------------------------------------------------------------------------------


def test_model_on_a_host_gives_the_same_numbers() -> None:
    """Logits, reads, writes and gradients of the model seen from afar are those of the near one."""
    from circuitlab import Site

    near = tiny_model()
    far = on_host(near)
    assert far.remote
    assert not near.remote
    prompts = [pair.clean for pair in toy_task().pairs]
    asked: dict[str, Any] = {
        "read": [Site("z", 1)],
        "write": {Site("mlp_out", 0): torch.ones(near.d_model)},
        "gradient_of": lambda logits: logits[:, 3],
        "gradient_at": [Site("resid_pre", 1)],
    }
    here, there = near.run(prompts, **asked), far.run(prompts, **asked)
    torch.testing.assert_close(there.logits, here.logits)
    torch.testing.assert_close(there[Site("z", 1)], here[Site("z", 1)])
    for site in asked["gradient_at"]:
        torch.testing.assert_close(there.gradient(site), here.gradient(site))
    weights = [model.weights.heads(1, "v") for model in (far, near)]
    torch.testing.assert_close(*weights)


def test_what_is_sent_is_read_as_a_host_reads_it() -> None:
    """Plain data comes through as it was; a name of this project is refused, by its module."""
    plan = [("write", "transformer.h.0", "output", 0, (slice(None), 3), torch.ones(2, 3))]
    (step,) = unpacked(plan)
    assert step[:4] == plan[0][:4]
    assert torch.equal(step[-1], plan[0][-1])
    for value in (PromptPair((1,), (2,), (3,), (4,)), Path("x"), print_once):
        pickle.dumps(value)
        with pytest.raises(AssertionError, match="which no host has; send plain tensors"):
            unpacked([("write", value)])
    with pytest.raises(AssertionError, match="cannot be packed"):
        unpacked([lambda: None])


def print_once() -> None:
    """A function of a module that no host has."""


# --- what is asked for ----------------------------------------------------------------------------


def test_names_that_are_not_there_are_refused() -> None:
    """Plugin, offer, option and value are looked up before anything runs."""
    with pytest.raises(PluginError, match="plugin 'nobody' is not installed; there are defaults"):
        check_plugin("nobody")
    for options, message in (
        ({"nothing": {}}, "offers no analysis or command 'nothing'; there are path-patching, acdc"),
        ({"acdc": {"nothing": "1"}}, "'acdc' has no option 'nothing'"),
        ({"acdc": {"threshold": "high"}}, "--threshold 'high' is not a finite number"),
    ):
        with pytest.raises(OptionError, match=message):
            check_plugin("path-patching", options)
