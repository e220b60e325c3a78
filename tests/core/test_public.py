"""The public face: its names, that each leads somewhere, and that importing it is light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import circuitlab

NAMES = [
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

LIGHT = (
    "circuitlab",
    "circuitlab.checkpoint",
    "circuitlab.cli",
    "circuitlab.cli.commands",
    "circuitlab.registry",
    "circuitlab.options",
    "circuitlab.graph",
    "circuitlab.sites",
    "circuitlab.tasks",
    "circuitlab.zoo",
    "circuitlab.hookspecs",
    "circuitlab.defaults",
    "circuitlab.panels",
    "circuitlab.plots",
    "circuitlab.render",
    "circuitlab.export",
    "circuitlab_edge_attribution",
)
HEAVY = ("torch", "transformers", "nnsight", "tokenizers", "pygraphviz", "matplotlib")


def test_public_names_are_pinned() -> None:
    """A name is made public, or taken back, on purpose: here and in the changelog."""
    assert sorted(circuitlab.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_public_name_leads_somewhere(name: str) -> None:
    """Every name can be imported, comes from CircuitLab, and is explained."""
    value = getattr(circuitlab, name)
    assert name in dir(circuitlab)
    if name not in ("Ablation", "Interval", "Mode", "hookimpl"):  # aliases, and pluggy's marker
        assert value.__module__.startswith("circuitlab.")
        assert (value.__doc__ or "").strip()


def test_name_that_is_not_there() -> None:
    """Any other attribute is an AttributeError, as of every module."""
    with pytest.raises(
        AttributeError, match="module 'circuitlab' has no attribute 'build_circuits'"
    ):
        _ = circuitlab.build_circuits  # type: ignore[attr-defined]


def test_every_error_is_public() -> None:
    """Whatever is raised on purpose can be caught by its public name."""
    from circuitlab import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(NAMES)
    assert all(
        issubclass(getattr(circuitlab, name), circuitlab.CircuitLabError) for name in classes
    )


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module: str) -> None:
    """What help, lists and pictures need loads no model library."""
    code = f"import sys, {module}; print(*(n for n in {HEAVY!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_listing_plugins_is_light() -> None:
    """Loading every installed plugin imports no model library either."""
    code = (
        "import sys; from circuitlab.registry import Registry; r = Registry.load(); "
        f"assert r.analyses and r.tasks; print(*(n for n in {HEAVY!r} if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
