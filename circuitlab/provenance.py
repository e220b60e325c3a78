"""Provenance: where a circuit comes from, and what the numbers of a run depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import circuitlab
from circuitlab.errors import OptionError
from circuitlab.graph import EDGE_SCORE

if TYPE_CHECKING:
    from circuitlab.model import TracedModel
    from circuitlab.registry import Analysis, Registry
    from circuitlab.tasks import Task

#: Parts of the provenance that a run's numbers depend on; those of the model's shape follow.
_SETTINGS = (
    "analysis", "plugin", "model", "model_revision", "task", "task_digest", "metric", "n_pairs",
    "seed", "dtype", "device",
)  # fmt: skip


def provenance(
    model: TracedModel,
    task: Task | None,
    analysis: Analysis,
    options: dict[str, Any],
    *,
    seed: int,
    pairs: Sequence[str],
) -> dict[str, Any]:
    """Where a circuit comes from.

    Args:
        model: What was analysed.
        task: On what; None where the analysis needs none.
        analysis: By what.
        options: Its options that were given.
        seed: Of what it draws.
        pairs: Digests of the task's pairs that were used.

    Returns:
        Plain JSON values, as a circuit's ``graph`` holds them.

    Raises:
        OptionError: an option is a number that is not finite.
    """
    asked: dict[str, Any] = {}
    if task is not None:
        asked = {
            "task": task.name,
            "task_digest": task.digest,
            "metric": task.metric,
            "n_pairs": len(pairs),
            "pairs_digest": list(pairs),
        }
    given = {option.name: options.get(option.name, option.default) for option in analysis.options}
    return {
        "score": EDGE_SCORE,
        "analysis": analysis.name,
        "plugin": analysis.plugin,
        "options": {name: _plain(value) for name, value in given.items()},
        "model": model.name,
        "model_revision": model.revision,
        "family": model.architecture.family,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "d_model": model.d_model,
        "parallel": model.architecture.parallel,
        **asked,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "remote": model.remote,
        "versions": {
            "circuitlab": circuitlab.__version__,
            **{name: version(name) for name in ("torch", "transformers", "nnsight", "networkx")},
        },
    }


def run_settings(
    origin: dict[str, Any], model: TracedModel, task: Task | None, registry: Registry
) -> dict[str, Any]:
    """What the numbers of a run depend on: only a run of the same may go on from its state."""
    named = {name: origin.get(name) for name in _SETTINGS}
    plugin = registry.plugins[origin["plugin"]]
    return {
        **named,
        **{f"option {name}": value for name, value in origin["options"].items()},
        "align": None if task is None else task.align,
        # A folder, or a module in memory, may hold other weights under the same name.
        "weights": model.weights_digest,
        f"version of {plugin.distribution}": plugin.version,
        **{f"version of {name}": value for name, value in origin["versions"].items()},
    }


def _plain(value: Any) -> Any:
    """An option's value as JSON holds it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"an option has value {value}; give a finite number")
    return value if isinstance(value, bool | int | float | str | None) else str(value)
