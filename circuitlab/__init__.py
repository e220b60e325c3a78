"""CircuitLab: which components of a transformer do the work, and through which edges.

The names below are the whole public interface; everything heavy is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuitlab.ablation import Ablation, Ablator
    from circuitlab.architectures import Architecture, Projection
    from circuitlab.bootstrap import Interval, distinct_rows, mean_intervals, ratio_interval
    from circuitlab.builder import build_circuit
    from circuitlab.checkpoint import Checkpoint
    from circuitlab.errors import (
        CircuitLabError,
        GraphError,
        ModelError,
        NumericsError,
        OptionError,
        PluginError,
        QualityError,
        ResourceError,
        SiteError,
        TaskError,
    )
    from circuitlab.export import read_circuit, write_circuit
    from circuitlab.graph import CircuitGraph
    from circuitlab.hookspecs import hookimpl
    from circuitlab.loading import load_model
    from circuitlab.memory import choose_batch_size
    from circuitlab.metrics import Metric
    from circuitlab.model import TracedModel
    from circuitlab.patcher import Mode, Patcher, patchers
    from circuitlab.patching import edge_effects
    from circuitlab.progress import track
    from circuitlab.prompts import EncodedTask, Tokens
    from circuitlab.run import Run
    from circuitlab.selection import check_cut, circuit_of
    from circuitlab.sites import Site
    from circuitlab.task_files import read_task, write_task
    from circuitlab.tasks import PromptPair, Task
    from circuitlab.weights import HeadWeights, Weights
    from circuitlab.wiring import Edge, ReceiverBlock, Wiring

__version__ = "0.1.0"

_HOME = {
    "Ablation": "ablation",
    "Ablator": "ablation",
    "Architecture": "architectures",
    "Checkpoint": "checkpoint",
    "CircuitGraph": "render",  # with what draws it in notebooks
    "CircuitLabError": "errors",
    "Edge": "wiring",
    "EncodedTask": "prompts",
    "GraphError": "errors",
    "HeadWeights": "weights",
    "Interval": "bootstrap",
    "Metric": "metrics",
    "Mode": "patcher",
    "ModelError": "errors",
    "NumericsError": "errors",
    "OptionError": "errors",
    "Patcher": "patcher",
    "PluginError": "errors",
    "Projection": "architectures",
    "PromptPair": "tasks",
    "QualityError": "errors",
    "ReceiverBlock": "wiring",
    "ResourceError": "errors",
    "Run": "run",
    "Site": "sites",
    "SiteError": "errors",
    "Task": "tasks",
    "TaskError": "errors",
    "Tokens": "prompts",
    "TracedModel": "model",
    "Weights": "weights",
    "Wiring": "wiring",
    "build_circuit": "builder",
    "check_cut": "selection",
    "choose_batch_size": "memory",
    "circuit_of": "selection",
    "distinct_rows": "bootstrap",
    "edge_effects": "patching",
    "hookimpl": "hookspecs",
    "load_model": "loading",
    "mean_intervals": "bootstrap",
    "patchers": "patcher",
    "ratio_interval": "bootstrap",
    "read_circuit": "export",
    "read_task": "task_files",
    "track": "progress",
    "write_circuit": "export",
    "write_task": "task_files",
}

__all__ = [
    "Ablation",
    "Ablator",
    "Architecture",
    "Checkpoint",
    "CircuitGraph",
    "CircuitLabError",
    "Edge",
    "EncodedTask",
    "GraphError",
    "HeadWeights",
    "Interval",
    "Metric",
    "Mode",
    "ModelError",
    "NumericsError",
    "OptionError",
    "Patcher",
    "PluginError",
    "Projection",
    "PromptPair",
    "QualityError",
    "ReceiverBlock",
    "ResourceError",
    "Run",
    "Site",
    "SiteError",
    "Task",
    "TaskError",
    "Tokens",
    "TracedModel",
    "Weights",
    "Wiring",
    "build_circuit",
    "check_cut",
    "choose_batch_size",
    "circuit_of",
    "distinct_rows",
    "edge_effects",
    "hookimpl",
    "load_model",
    "mean_intervals",
    "patchers",
    "ratio_interval",
    "read_circuit",
    "read_task",
    "track",
    "write_circuit",
    "write_task",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'circuitlab' has no attribute {name!r}")
    value = getattr(import_module(f"circuitlab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
