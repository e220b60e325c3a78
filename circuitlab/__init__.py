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
    from circuitlab.combining import join_circuits, overlay_circuits
    from circuitlab.comparing import Comparison, compare_circuits, rank_correlation
    from circuitlab.dictionaries import (
        Dictionary,
        DictionaryInfo,
        DictionaryStats,
        read_dictionary,
        write_dictionary,
    )
    from circuitlab.errors import (
        CircuitLabError,
        GraphError,
        ModelError,
        NumericsError,
        OptionError,
        PluginError,
        QualityError,
        RemoteError,
        ResourceError,
        SiteError,
        TaskError,
    )
    from circuitlab.evaluation.evidence import Evidence, evaluate_circuit
    from circuitlab.export import read_circuit, write_circuit
    from circuitlab.folded import HeadWeights, MlpWeights
    from circuitlab.graph import CircuitGraph
    from circuitlab.hookspecs import hookimpl
    from circuitlab.loading import load_model
    from circuitlab.memory import choose_batch_size
    from circuitlab.metrics import Metric
    from circuitlab.model import TracedModel
    from circuitlab.norms import norm_outliers
    from circuitlab.panels import (
        Bar,
        Bars,
        Curve,
        Curves,
        Heatmap,
        Histogram,
        Image,
        Panel,
        Point,
        Scatter,
        TextTable,
        UpSet,
        panels_of,
    )
    from circuitlab.patcher import Mode, Patcher, patchers
    from circuitlab.patching import edge_effects
    from circuitlab.plots import show_plots
    from circuitlab.progress import track
    from circuitlab.prompts import EncodedTask, Tokens
    from circuitlab.report.writing import write_report
    from circuitlab.run import Run
    from circuitlab.selection import check_cut, circuit_of
    from circuitlab.shards import sharded
    from circuitlab.sites import Site
    from circuitlab.task_files import read_task, read_texts, write_task
    from circuitlab.tasks import PromptPair, Task
    from circuitlab.weights import Weights
    from circuitlab.wiring import Edge, ReceiverBlock, Wiring

__version__ = "0.1.0"

_HOME = {
    "Ablation": "ablation",
    "Ablator": "ablation",
    "Architecture": "architectures",
    "Bar": "panels",
    "Bars": "panels",
    "Checkpoint": "checkpoint",
    "CircuitGraph": "export",  # with what draws and saves it
    "CircuitLabError": "errors",
    "Comparison": "comparing",
    "Curve": "panels",
    "Curves": "panels",
    "Dictionary": "dictionaries",
    "DictionaryInfo": "dictionaries",
    "DictionaryStats": "dictionaries",
    "Edge": "wiring",
    "EncodedTask": "prompts",
    "Evidence": "evaluation.evidence",
    "GraphError": "errors",
    "HeadWeights": "folded",
    "MlpWeights": "folded",
    "Heatmap": "panels",
    "Histogram": "panels",
    "Image": "panels",
    "Interval": "bootstrap",
    "Metric": "metrics",
    "Mode": "patcher",
    "ModelError": "errors",
    "NumericsError": "errors",
    "OptionError": "errors",
    "Panel": "panels",
    "Patcher": "patcher",
    "PluginError": "errors",
    "Point": "panels",
    "Projection": "architectures",
    "PromptPair": "tasks",
    "QualityError": "errors",
    "ReceiverBlock": "wiring",
    "RemoteError": "errors",
    "ResourceError": "errors",
    "Run": "run",
    "Scatter": "panels",
    "Site": "sites",
    "SiteError": "errors",
    "Task": "tasks",
    "TaskError": "errors",
    "TextTable": "panels",
    "Tokens": "prompts",
    "TracedModel": "model",
    "UpSet": "panels",
    "Weights": "weights",
    "Wiring": "wiring",
    "build_circuit": "builder",
    "check_cut": "selection",
    "choose_batch_size": "memory",
    "circuit_of": "selection",
    "compare_circuits": "comparing",
    "distinct_rows": "bootstrap",
    "edge_effects": "patching",
    "evaluate_circuit": "evaluation.evidence",
    "hookimpl": "hookspecs",
    "join_circuits": "combining",
    "load_model": "loading",
    "mean_intervals": "bootstrap",
    "overlay_circuits": "combining",
    "panels_of": "panels",
    "norm_outliers": "norms",
    "patchers": "patcher",
    "rank_correlation": "comparing",
    "ratio_interval": "bootstrap",
    "read_circuit": "export",
    "read_dictionary": "dictionaries",
    "read_task": "task_files",
    "read_texts": "task_files",
    "sharded": "shards",
    "show_plots": "plots",
    "track": "progress",
    "write_circuit": "export",
    "write_dictionary": "dictionaries",
    "write_report": "report.writing",
    "write_task": "task_files",
}

__all__ = [
    "Ablation",
    "Ablator",
    "Architecture",
    "Bar",
    "Bars",
    "Checkpoint",
    "CircuitGraph",
    "CircuitLabError",
    "Comparison",
    "Curve",
    "Curves",
    "Dictionary",
    "DictionaryInfo",
    "DictionaryStats",
    "Edge",
    "EncodedTask",
    "Evidence",
    "GraphError",
    "HeadWeights",
    "Heatmap",
    "Histogram",
    "Image",
    "Interval",
    "Metric",
    "MlpWeights",
    "Mode",
    "ModelError",
    "NumericsError",
    "OptionError",
    "Panel",
    "Patcher",
    "PluginError",
    "Point",
    "Projection",
    "PromptPair",
    "QualityError",
    "ReceiverBlock",
    "RemoteError",
    "ResourceError",
    "Run",
    "Scatter",
    "Site",
    "SiteError",
    "Task",
    "TaskError",
    "TextTable",
    "Tokens",
    "TracedModel",
    "UpSet",
    "Weights",
    "Wiring",
    "build_circuit",
    "check_cut",
    "choose_batch_size",
    "circuit_of",
    "compare_circuits",
    "distinct_rows",
    "edge_effects",
    "evaluate_circuit",
    "hookimpl",
    "join_circuits",
    "load_model",
    "mean_intervals",
    "norm_outliers",
    "overlay_circuits",
    "panels_of",
    "patchers",
    "rank_correlation",
    "ratio_interval",
    "read_circuit",
    "read_dictionary",
    "read_task",
    "read_texts",
    "sharded",
    "show_plots",
    "track",
    "write_circuit",
    "write_dictionary",
    "write_report",
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
