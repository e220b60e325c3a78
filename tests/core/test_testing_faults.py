"""``circuitlab plugins check``: each fault planted in an installed distribution is found and named.

Every distribution is laid out as an installer does it, and checked by the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

HEAD = """
from __future__ import annotations
import functools, itertools, os, random, sys, time
from typing import Annotated
import circuitlab
from circuitlab import Checkpoint, CircuitGraph, Site

@circuitlab.hookimpl
def register_analyses(register):
    register("subject", subject)

def direct(model, task, scale=1.0):
    pairs = model.encode(task)
    circuit = CircuitGraph(score="mean size of z")
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    sites = [Site("z", n, h) for n in range(model.n_layers) for h in range(model.n_heads)]
    run = model.run(pairs.clean, read=sites)
    for site in sites:
        name = f"a{site.layer}.h{site.head}"
        circuit.add_component(name, kind="head", layer=site.layer)
        circuit.add_effect(name, "logits", scale * float(run[site][pairs.clean.mask].norm()))
    return circuit
"""
SOUND = '''
def subject(model, task, *, scale: Annotated[float, "factor"] = 1.0):
    """Sizes of z."""
    return direct(model, task, scale)
'''

Lab = Callable[..., Any]


@pytest.fixture
def checked(install: Any, lab: Lab) -> Callable[..., tuple[Any, dict[str, str]]]:
    """Install a module as the plugin ``subject``, check it, give what failed: rule to reason."""

    def check(source: str, *flags: str) -> tuple[Any, dict[str, str]]:
        install("circuitlab-subject", "subject", source)
        done = lab("plugins", "check", "subject", *flags)
        assert done.code in (0, 8), done.err
        rows = [line.split("\t") for line in done.out.splitlines()]
        assert rows[0] == ["", "what", "rule", "reason"]
        return done, {rule: reason for verdict, _, rule, reason in rows[1:] if verdict == "FAILS"}

    return check


def test_a_sound_plugin_passes(checked: Any) -> None:
    """Exit 0 and no row that fails: the faults below are not seen where there are none."""
    done, failed = checked(HEAD + SOUND)
    assert (done.code, failed) == (0, {})
    assert done.err.splitlines()[-1].endswith(" clauses hold, 4 not checked")


# --- at load --------------------------------------------------------------------------------------

LOADING = "it loads, in time"
AT_LOAD = {
    "import": ("import nobody_has_it", LOADING, "No module named 'nobody_has_it'"),
    "hook": (
        HEAD.replace("def register_analyses", "def register_analysis") + SOUND,
        LOADING,
        "hook 'register_analysis' does not exist; hooks are adapt_architecture",
    ),
    "type": (
        HEAD + SOUND.replace("float,", "flaot,"),
        LOADING,
        "name 'flaot' is not defined; import it at run time",
    ),
    "api": (HEAD + SOUND + "circuitlab_api = 2\n", LOADING, "version 2 of the plugin API"),
    "hangs": ("import time\ntime.sleep(60)", LOADING, "it is not loaded after 3 s; do what takes"),
    "ends": ("import os\nos._exit(3)", LOADING, "loading it ends the process: exit code 3"),
    "heavy": (HEAD + SOUND + "import torch\n", "loading it imports no model library", "torch"),
    "noisy": (HEAD + SOUND + "print('hello')\n", "loading it prints nothing", "prints 'hello"),
    "noisy below": (
        HEAD + SOUND + "os.write(1, b'psst\\n')\n", "loading it prints nothing", "prints 'psst"
    ),
    "clash": (
        HEAD.replace('"subject", subject', '"acdc", subject') + SOUND,
        "no other installed plugin has its names",
        "two plugins offer the analysis 'acdc': 'path-patching' (circuitlab 0.1.0) and 'subject'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", AT_LOAD)
def test_a_fault_at_load_is_found(
    fault: str, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row fails and says how to mend it; the command ends with 8, even where loading hangs."""
    if fault == "hangs":
        monkeypatch.setattr("circuitlab.testing.processes.LOAD_LIMIT", 3.0)
    source, rule, reason = AT_LOAD[fault]
    done, failed = checked(source)
    assert list(failed) == [rule]
    assert reason in failed[rule]
    assert done.code == 8
    assert "error: plugin 'subject' fails 1 of " in done.err


# --- at work --------------------------------------------------------------------------------------

PLAIN = "def subject(model, task):\n    'Sizes of z.'\n"
#: The body of an analysis, the rules that fail, and what is said of the first of them.
AT_WORK = {
    "print('hello'); return direct(model, task)": (
        ["it writes nothing to stdout"],
        "printed 'hello",
    ),
    "return direct(model, task, 1 + random.random())": (
        ["one seed, one circuit"],
        "two different circuits from one seed; draw random numbers from torch's global generator",
    ),
    "return direct(model, task, float('nan'))": (
        ["it gives a circuit"],
        "GraphError: effect a0.h0 → logits has score nan",
    ),
    "c = direct(model, task); c.add_component('a9.h9', kind='head', layer=9); return c": (
        ["names, scores and data are well formed"],
        "component 'a9.h9' does not exist in a model of 2 layers",
    ),
    "model._module.lm_head.weight.data += 1; return direct(model, task)": (
        ["it leaves the model as it was", "it runs on a host, and sends plain data"],
        "changed the model's weights (lm_head.weight); write to a copy",
    ),
    "return {'a0.h0': 1.0}": (["it gives a circuit"], "returned dict; build and return"),
    "return direct(model, task, 1 / 0)": (["it gives a circuit"], "ZeroDivisionError: division"),
    "c = direct(model, task); del c.graph['score']; return c": (
        ["it finds the planted circuit"],
        "on gate-add, where that edge does nothing; its scores are said to be 'metric(edge",
    ),
}


@pytest.mark.parametrize("body", AT_WORK)
def test_a_fault_at_work_is_found(body: str, checked: Any) -> None:
    """Only the rows of the rules it breaks fail, and the reason says which and what to do."""
    rules, reason = AT_WORK[body]
    done, failed = checked(f"{HEAD}\n{PLAIN}    {body}\n")
    assert list(failed) == rules
    assert reason in failed[rules[0]]
    assert done.code == 8


BATCH = '''
def subject(model, task, *, batch_size: Annotated[int, "pairs per pass"] = 5):
    """Sizes of z, of batches."""
    return direct(model, task, 1 / batch_size)
'''
SWALLOWED = '''
def subject(model, task, *, scale: Annotated[float, "factor"] = 1.0):
    """Sizes of z."""
    return direct(model, task)
'''
WRAPPED = '''
def cached(function):
    @functools.wraps(function)
    def inner(model, task, **options):
        return function(model, task)
    return inner

@cached
def subject(model, task, *, scale: Annotated[float, "factor"] = 1.0):
    """Sizes of z."""
    return direct(model, task, scale)
'''
UNCLEAN = '''
def subject(model, task):
    """Sizes of z, with one of them written as a tensor of its own kind."""
    import torch

    class Labelled(torch.Tensor):
        pass

    globals()["Labelled"], Labelled.__qualname__ = Labelled, "Labelled"
    written = torch.zeros(model.d_head).as_subclass(Labelled)
    model.run([[1, 2]], write={Site("z", 0, 0): written}).logits
    return direct(model, task)
'''
AROUND = '''
def subject(model, task):
    """Sizes of what blocks give, seen by a hook of the module itself."""
    import torch

    seen = []
    block = model._module.get_submodule(model.architecture.block(0, "attn"))
    hook = block.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    model.run([pair.clean for pair in task.pairs]).logits
    hook.remove()
    return direct(model, task, 1.0 + sum(float(value.norm()) for value in seen))
'''
FORGETS = '''
def subject(model, task):
    """Sizes of z, twice; what was done is forgotten."""
    import torch

    with Checkpoint("steps") as saved:
        state = saved.load() or {"done": torch.tensor(0)}
        total = 0.0
        for step in range(int(state["done"]), 3):
            total += 1.0
            saved.keep({"done": torch.tensor(step + 1)})
    return direct(model, task, total)
'''
OF_OPTIONS = {
    "batch": (BATCH, "scores do not depend on the batch", "must not depend on its batch"),
    "swallowed": (SWALLOWED, "its options are heeded", "never reads its option 'scale'"),
    "wrapped": (WRAPPED, "its options are heeded", "scale=0.75 and its function gets 1.0; pass"),
    "unclean": (
        UNCLEAN,
        "it runs on a host, and sends plain data",
        "names circuitlab_subject.Labelled, which no host has; send plain tensors",
    ),
    "around": (AROUND, "it runs on a host, and sends plain data", "use model.run, model.weights"),
    "forgets": (
        FORGETS,
        "stopped and resumed, it gives the same circuit",
        "keep in its Checkpoint all that the rest of the stage needs",
    ),
}


@pytest.mark.parametrize("fault", OF_OPTIONS)
def test_a_fault_of_conduct_is_found(fault: str, checked: Any) -> None:
    """Options, batches, hosts and states: exactly the rule that is broken fails."""
    source, rule, reason = OF_OPTIONS[fault]
    done, failed = checked(HEAD + source)
    assert list(failed) == [rule]
    assert reason in failed[rule]
    assert done.code == 8
