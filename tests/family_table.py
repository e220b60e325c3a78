"""What runs on which model family: every built-in analysis, here and on a loopback host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_module
from oracles import random_gpt2
from random_tasks import random_task

from circuitlab import (
    CircuitGraph,
    CircuitLabError,
    PluginError,
    TracedModel,
    build_circuit,
    load_model,
)
from circuitlab.builder import run_command
from circuitlab.registry import Registry

#: What each analysis is given beside its defaults, so that it is short.
OPTIONS: dict[str, dict[str, Any]] = {
    "edge-attribution": {"verify": 3, "ig_steps": 2},
    "path-patching": {},
    "acdc": {"threshold": 1.0},
    "token-ablation": {},
    "dose-response": {"steps": 3},
    "subspace-patching": {},
    "attention-heads": {},
    "head-circuits": {"head": "a1.h0"},
    "attention-scores": {},
    "norm-growth": {},
    "feature-interactions": {"verify": 3, "min_coactivation": 2, "n_tokens": 1},
    "activation-plateaus": {
        "pairs": "task",
        "bank_size": 2,
        "steps": 3,
        "refine": 1,
        "controls": 0,
    },
    "plateau-regions": {"pairs": "task", "bank_size": 3, "steps": 5, "slice_steps": 3},
    "injection-scan": {"steps": 4, "controls": 1},
}
TRAINING = "dict train"
#: Everything that has a row.
WORK = (*OPTIONS, TRAINING)
#: What is tried where a model refuses that: flags of the same work that need less.
INSTEAD: dict[str, tuple[dict[str, Any], ...]] = {
    "path-patching": ({"scope": "residual"},),
    "activation-plateaus": ({"freeze": "none"},),
    TRAINING: ({"interaction": "none"}, {"sites": "block.0", "interaction": "none"}),
}
#: Columns of the table: how a family is called here, and for people.
COLUMNS = {
    "gpt2": "GPT-2",
    "neox": "GPT-NeoX (Pythia)",
    "neox-sequential": "NeoX, sequential",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "olmo2": "OLMo 2",
    "phi3": "Phi-3",
    "opt": "not described (OPT)",
}
#: What says where and how long a run was, and nothing of what it found.
ABOUT_THE_RUN = {"seconds", "remote", "model", "model_digest", "folder", "dictionaries"}


def module_of(family: str) -> Any:
    """A small random model of a column, float32."""
    if family == "gpt2":
        return random_gpt2(dtype=torch.float32, seed=3)
    if family != "opt":
        return random_module(family)
    import transformers

    size: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "pad_token_id": 0}
    config = transformers.OPTConfig(
        **size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        module = transformers.OPTForCausalLM(config).eval()
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def save(folder: Path, families: tuple[str, ...] = tuple(COLUMNS)) -> dict[str, Path]:
    """Models on the disk, by what a host calls them."""
    for family in families:
        module_of(family).save_pretrained(folder / family)
    return {f"test/{family}": folder / family for family in families}


@dataclass(frozen=True)
class Outcome:
    """What a piece of work gave on one model.

    Attributes:
        found: Every number and text of it, by where it stands; None where it was refused.
        refused: Why, by class of error and words; with ``found``, why it was without ``flags``.
        flags: What was needed to have it done.
    """

    found: dict[str, Any] | None
    refused: tuple[str, str] | None = None
    flags: str = ""

    @cached_property
    def cell(self) -> str:
        """``yes``; ``yes`` with the flags that are needed; or ``no``, with the reason."""
        if self.refused is None:
            return "yes"
        # Without remedies, and without numbers that rounding may change.
        reason = re.split("; | \\(asked| \\(embed| \\(z is|: [0-9]| by [0-9]", self.refused[1])[0]
        return (
            f"no: {reason}" if self.found is None else f"yes: with `{self.flags}` alone: {reason}"
        )


@dataclass
class Place:
    """A family's model, here or on a host, and what was trained for it there."""

    model: TracedModel
    workdir: Path
    done: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, workdir: Path, host: str = "", key: str = "") -> Place:
        """The model of a folder; with a host's address, there."""
        remote: dict[str, Any] = {"remote": host, "remote_key": key} if host else {}
        workdir.mkdir(parents=True, exist_ok=True)
        return cls(load_model(folder, **remote), workdir)

    def do(self, work: str) -> Outcome:
        """An analysis, or the training of dictionaries; done once."""
        if work not in self.done:
            self.done[work] = self._tried(work)
        return self.done[work]

    def _tried(self, work: str) -> Outcome:
        first = self._attempt(work, {})
        if first.found is not None:
            return first
        for options in INSTEAD.get(work, ()):
            found = self._attempt(work, options).found
            if found is not None:
                flags = " ".join(f"--{name} {value}" for name, value in options.items())
                return Outcome(found, first.refused, flags)
        return first

    def _attempt(self, work: str, options: dict[str, Any]) -> Outcome:
        torch.manual_seed(0)
        try:
            return Outcome(self._train(options) if work == TRAINING else self._trace(work, options))
        except PluginError:  # a fault, and no refusal
            raise
        except CircuitLabError as error:
            words = str(error).replace(f"model {self.model.name!r}", "this model")
            words = words.replace(self.model.name, "this model")
            return Outcome(None, (type(error).__name__, words.replace(f"{work} needs", "it needs")))

    def _trace(self, name: str, more: dict[str, Any]) -> dict[str, Any]:
        options = OPTIONS[name] | more
        if name == "feature-interactions":
            if self.do(TRAINING).refused is not None:  # what it needs was not trained
                self._train({})
            options["dictionaries"] = self.workdir / "dictionaries"
        task = random_task([6, 4, 7, 5])
        return data(build_circuit(self.model, task, name, allow_weak=True, **options))

    def _train(self, more: dict[str, Any]) -> dict[str, Any]:
        """Dictionaries of the first MLP, of a few steps."""
        texts = self.workdir / "texts.jsonl"
        prompts = torch.randint(0, 40, (64, 6), generator=torch.Generator().manual_seed(0))
        texts.write_text("\n".join(json.dumps(ids) for ids in prompts.tolist()))
        options = {"sites": "mlp.0", "data": texts, "steps": 2, "batch_tokens": 32}
        options |= more | {"output": self.workdir / f"dictionaries{''.join(more)}"}
        command = Registry.load().commands[TRAINING]
        return dict(facts(run_command(command, self.model, options)))


def facts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of plain data, with where it stands."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ABOUT_THE_RUN:
                yield from facts(part, f"{path}/{key}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from facts(part, f"{path}/{number}")
    else:
        yield path, value


def data(circuit: CircuitGraph) -> dict[str, Any]:
    """All that a circuit holds, but texts in which numbers are rounded."""
    edges = {"→".join(edge): circuit.edges[edge] for edge in circuit.edges(keys=True)}
    graph = {
        name: part for name, part in circuit.graph.items() if name not in ("findings", "plots")
    }
    whole = {"graph": graph, "nodes": dict(circuit.nodes(data=True)), "edges": edges}
    return dict(facts(json.loads(json.dumps(whole))))


def assert_same(there: Outcome, here: Outcome) -> None:
    """The same components, edges, texts and refusals; numbers within 1e-5 of the largest."""
    assert there.cell == here.cell
    assert there.refused == here.refused
    if there.found is None or here.found is None:
        return
    assert there.found.keys() == here.found.keys()
    numbers = {key: value for key, value in here.found.items() if isinstance(value, float)}
    scale = max([1.0, *map(abs, numbers.values())])
    for key, value in here.found.items():
        if key in numbers:
            assert there.found[key] == pytest.approx(value, abs=1e-5 * scale), key
        else:
            assert there.found[key] == value, key


# --- the table ------------------------------------------------------------------------------------


def rows(cells: Mapping[tuple[str, str], str]) -> list[str]:
    """The table in Markdown, and below it a note for each reason.

    Args:
        cells: Of a family and a piece of work, see :attr:`Outcome.cell`.
    """
    notes: list[str] = []

    def short(cell: str) -> str:
        answer, _, reason = cell.partition(": ")
        if not reason:
            return answer
        if reason not in notes:
            notes.append(reason)
        return f"{answer} ({notes.index(reason) + 1})"

    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for work in WORK:
        shown = [short(cells[family, work]) for family in COLUMNS]
        lines.append(f"| `{work}` | {' | '.join(shown)} |")
    return [*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]


def read(page: str) -> dict[tuple[str, str], str]:
    """The cells of a page that has such a table: what :func:`rows` was given."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", page, re.M))
    families = {label: family for family, label in COLUMNS.items()}
    header: list[str] = []
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1:] and set(cells[1:]) <= families.keys():
            header = cells[1:]
        elif header and len(cells) == len(header) + 1 and cells[0].startswith("`"):
            for label, cell in zip(header, cells[1:], strict=True):
                answer, _, number = cell.rstrip(")").partition(" (")
                whole = f"{answer}: {notes[number]}" if number else answer
                found[families[label], cells[0].strip("`")] = whole
    return found
