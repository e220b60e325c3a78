"""The six hooks a plugin can implement.

A plugin is a module named by an entry point of the group ``circuitlab``. Arguments are only ever
added, and an implementation may take a subset of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from circuitlab.architectures import Architecture
    from circuitlab.graph import CircuitGraph
    from circuitlab.model import TracedModel
    from circuitlab.tasks import Task

    AnalysisFunction = Callable[..., CircuitGraph]
    Exporter = Callable[[CircuitGraph, Path], Any]
    CommandFunction = Callable[..., Mapping[str, Any]]

#: A plugin's module may state the version it is written for, as ``circuitlab_api = 1``.
API_VERSION = 1

hookspec = pluggy.HookspecMarker("circuitlab")
hookimpl = pluggy.HookimplMarker("circuitlab")


@hookspec
def register_analyses(register: Callable[..., None]) -> None:
    """Offer analyses: call ``register(name, function)`` once for each.

    ``function(model: TracedModel, task: Task, *, option=default, ...) -> CircuitGraph``. The name
    is kebab-case and unique over all installed plugins. Keyword-only parameters are the options,
    typed int, float, str, bool, Path or Literal, or a union of these with Literal or None; help
    text by ``Annotated[int, "..."]``. The docstring's first line is the analysis's help. With
    ``task=None`` for the second parameter the analysis also runs where no task is given and the
    model has none of its own. With ``register(name, function, stream_only=True)`` it also runs on a
    model whose family no plugin describes: there are only ``resid_pre``, ``resid_post`` and
    logits, and no ``wiring``. With ``shards={"scope": "edges"}`` it can be split into shards when
    these options have these values (``{}``: always), see ``circuitlab.sharded``. With
    ``pair_scores=function`` its scores can be had of each pair: ``function(model, pairs,
    **options)``, ``pairs`` from ``model.encode(task)``, gives ``[n_pairs, n_sources, n_receivers]``
    whose mean over pairs are the circuit's scores. Called for ``--help`` too: do not import torch
    or run a model here.
    """


@hookspec
def register_tasks(register: Callable[[Task], None]) -> None:
    """Offer named tasks for ``--task NAME``: call ``register(task)`` once for each."""


@hookspec(firstresult=True)
def adapt_architecture(config: PretrainedConfig) -> Architecture | None:
    """Say where a model family keeps its attention, MLPs and norms; None if it is not yours.

    The first answer wins; the core's own come last, so a plugin can override them.
    """


@hookspec
def register_exporters(register: Callable[[str, Exporter], None]) -> None:
    """Offer file formats: call ``register(".suffix", write)``.

    ``write(circuit: CircuitGraph, path: Path)`` writes the whole file at ``path``; CircuitLab moves
    it into place once it is complete.
    """


@hookspec
def register_commands(register: Callable[..., None]) -> None:
    """Offer commands beside ``trace``: call ``register("group name", function)`` once for each.

    One or two kebab-case words: ``circuitlab dict train`` is ``dict train``. It is called as
    ``function(model: TracedModel, *, option=default, ...)``; its options are read as those of an
    analysis, and so is ``stream_only``. It returns what it found by label, plain JSON, and shows
    progress by ``circuitlab.track``. Do not import torch or run a model here.
    """


@hookspec
def annotate_circuit(circuit: CircuitGraph, model: TracedModel, task: Task | None) -> None:
    """Add node or edge data to a finished circuit, in place; never add or remove nodes.

    Called only for plugins named by ``--annotate``. ``task`` is None where the analysis had none.
    """
