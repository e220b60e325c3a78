"""The analysis ``path-patching``: from what was asked to a circuit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import ModelError, OptionError, check_cut
from circuitlab_path_patching.effects import (
    Setting,
    edge_circuit,
    node_circuit,
    stream_circuit,
)
from circuitlab_path_patching.gates.finding import add_gates
from circuitlab_path_patching.gates.groups import parse_groups
from circuitlab_path_patching.panels import add_panels
from circuitlab_path_patching.paths.circuits import (
    hypothesis_circuit,
    path_circuit,
    sender_circuit,
)
from circuitlab_path_patching.paths.hypothesis_files import read_hypotheses

if TYPE_CHECKING:
    from circuitlab import Ablation, CircuitGraph, Task, TracedModel
    from circuitlab_path_patching.measures import Modes

Scope = Literal["edges", "nodes", "residual", "paths"]

#: Options that only some scopes have.
_SCOPES: dict[str, tuple[Scope, ...]] = {
    "positions": ("nodes",),
    "senders": ("edges", "nodes", "paths"),
    "receivers": ("edges", "paths"),
    "path": ("paths",),
    "max_hops": ("paths",),
    "mediate": ("paths",),
    "hypothesis": ("paths",),
    "gates": ("edges", "nodes"),
    "groups": ("edges", "nodes"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of ``path-patching``; see its help."""

    scope: Scope
    mode: Modes
    ablation: Ablation
    positions: bool
    senders: str | None
    receivers: str | None
    path: str | None
    max_hops: int | None
    mediate: Literal["heads", "all"] | None
    hypothesis: Path | None
    gates: bool
    groups: str | None
    top: int | Literal["all"]
    threshold: float | None
    batch_size: int | Literal["auto"]

    def check(self) -> None:
        """Refuse options that do not go together, before anything is run.

        Raises:
            OptionError: names them.
        """
        check_cut(self.top, self.threshold)
        for name, scopes in _SCOPES.items():
            if getattr(self, name) and self.scope not in scopes:
                raise OptionError(
                    f"--{name.replace('_', '-')} means nothing with --scope {self.scope}; use "
                    f"--scope {' or '.join(scopes)}"
                )
        ways = [n for n in ("path", "mediate", "hypothesis") if getattr(self, n)]
        if len(ways) > 1:
            raise OptionError(f"--{ways[0]} and --{ways[1]} ask for different runs; give one")
        if self.mediate and not self.receivers:
            raise OptionError("--mediate goes from --senders to --receivers; give --receivers")
        if self.receivers and self.scope == "paths" and not self.mediate:
            raise OptionError(
                "--receivers of --scope paths go with --mediate heads or all; paths themselves end "
                "at logits, or where --path says"
            )
        if self.mode != "noise" and self.ablation != "counterfactual":
            raise OptionError(
                f"--mode {self.mode} needs the corrupt run, which --ablation {self.ablation} does "
                f"not have; add --mode noise"
            )


def run(model: TracedModel, task: Task, asked: Asked) -> CircuitGraph:
    """Run the analysis.

    Raises:
        OptionError: options do not go together, or name what the model does not have.
        ModelError: only the blocks of the model are known, and edges or paths are asked for.
        TaskError: positions of clean and corrupt prompts do not correspond.
    """
    asked.check()
    circuit = _measured(model, task, asked)
    add_panels(circuit, task.metric)
    return circuit


def _measured(model: TracedModel, task: Task, asked: Asked) -> CircuitGraph:
    if model.architecture.blocks_only and asked.scope in ("edges", "paths"):
        raise ModelError(
            f"--scope {asked.scope} needs the heads and MLPs of model {model.name!r}, and no "
            f"plugin describes family {model.architecture.family!r}: only its blocks can be "
            f"patched; use --scope nodes or --scope residual"
        )
    if asked.groups:
        parse_groups(asked.groups, model.wiring)
    hypotheses = asked.hypothesis and read_hypotheses(asked.hypothesis, model.wiring)
    setting = Setting(
        model,
        model.encode(task),
        asked.mode,
        asked.ablation,
        None if asked.batch_size == "auto" else asked.batch_size,
        torch.initial_seed(),
    )
    cut: dict[str, Any] = {"top": asked.top, "threshold": asked.threshold}
    if asked.scope == "residual":
        return stream_circuit(setting, **cut)
    if asked.scope in ("edges", "nodes"):
        if asked.scope == "nodes":
            circuit = node_circuit(setting, positions=asked.positions, senders=asked.senders, **cut)
        else:
            circuit = edge_circuit(setting, senders=asked.senders, receivers=asked.receivers, **cut)
        if asked.gates or asked.groups:
            add_gates(setting, circuit, automatic=asked.gates, groups=asked.groups)
        return circuit
    if hypotheses:
        return hypothesis_circuit(setting, hypotheses, **cut)
    if asked.mediate:
        assert asked.receivers is not None
        return sender_circuit(
            setting,
            senders=asked.senders,
            receivers=asked.receivers,
            mediate=asked.mediate,
            **cut,
        )
    return path_circuit(
        setting, path=asked.path, senders=asked.senders, max_hops=asked.max_hops, **cut
    )
