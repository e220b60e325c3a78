"""Models and tasks, bundled or random, on which effects are measured."""

from __future__ import annotations

from typing import Any, get_args

import oracles
from circuitlab_path_patching.effects import Setting
from random_tasks import random_task

from circuitlab import Edge, Mode, load_model, zoo

#: Float64 sums behind norms that amplify what is small.
EXACT = 1e-9
MODES: tuple[Mode, ...] = get_args(Mode)
#: Both edges into the MLP of a hand-made gate.
BITS = (Edge("a0.h0", "m0"), Edge("a0.h1", "m0"))


def bundled(name: str, **changes: Any) -> Setting:
    """A bundled model on its task, or on the first ``n_pairs`` of it."""
    model = load_model(name)
    task = next(task for task in zoo.tasks() if task.name == name)
    if n := changes.pop("n_pairs", None):
        task = task.take(n)
    return Setting(model, model.encode(task), **changes)


def random_setting(**changes: Any) -> tuple[Setting, Any]:
    """A random float64 model and a task of prompts that differ in length; also its module."""
    module = oracles.random_gpt2(2, 2, 16, seed=1)
    model = load_model((module, None))
    return Setting(model, model.encode(random_task([7, 4, 6])), **changes), module
