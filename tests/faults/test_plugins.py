"""Installed plugins that are broken: each alone suffers, and stdout stays the result's.

The packages are laid out as an installer does it (module, dist-info, entry point) and found through
``importlib.metadata``, as any other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Callable[..., Any]

#: Faults that show when a plugin is loaded, and what is said about each.
AT_LOAD = {
    "import-error": ("import nobody_has_it", "ModuleNotFoundError: No module named 'nobody_has_it"),
    "syntax": ("def broken(:", "SyntaxError: "),
    "exits": ("raise SystemExit(0)", "SystemExit: 0"),
    "misspelt": (
        """
        import circuitlab

        @circuitlab.hookimpl
        def register_analysis(register):
            register("misspelt", print)
        """,
        "hook 'register_analysis' does not exist; hooks are adapt_architecture, annotate_circuit",
    ),
    "signature": (
        """
        import circuitlab

        @circuitlab.hookimpl
        def register_analyses(register, extra):
            register("signature", print)
        """,
        "PluginValidationError",
    ),
    "no-hooks": ("x = 1", "it implements no hook; mark one with @circuitlab.hookimpl"),
    "untyped": (
        """
        import circuitlab

        def untyped(model, task, *, shape: list = []):
            return None

        @circuitlab.hookimpl
        def register_analyses(register):
            register("untyped", untyped)
        """,
        "parameter 'shape' has type <class 'list'>; options are int, float, str, bool, Path",
    ),
    "clash": (
        """
        import circuitlab

        def clash(model, task, *, seed: int = 1):
            return None

        @circuitlab.hookimpl
        def register_analyses(register):
            register("clash", clash)
        """,
        "parameter 'seed' is a flag that every command has",
    ),
    "raises": (
        """
        import circuitlab

        @circuitlab.hookimpl
        def register_analyses(register):
            raise KeyError("oh")
        """,
        "KeyError: 'oh'",
    ),
}

GOOD = '''
from typing import Annotated

import circuitlab
from circuitlab import CircuitGraph, Site


@circuitlab.hookimpl
def register_analyses(register):
    register("head-norms", head_norms)


def head_norms(model, task, *, heads: Annotated[int, "heads to keep"] = 5):
    """Score each head by how far corruption moves its output."""
    sites = [Site("z", l, h) for l in range(model.n_layers) for h in range(model.n_heads)]
    clean = model.run([p.clean for p in task.pairs], read=sites)
    corrupt = model.run([p.corrupt for p in task.pairs], read=sites)
    moved = {s: (corrupt[s] - clean[s]).norm().item() for s in sites}

    circuit = CircuitGraph(score="L2 norm of the change in z")
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    for site in sorted(sites, key=moved.get, reverse=True)[:heads]:
        head = circuit.add_component(f"a{site.layer}.h{site.head}", kind="head", layer=site.layer)
        circuit.add_effect(head, "logits", moved[site])
    return circuit
'''


def analysis(body: str, name: str = "faulty") -> str:
    """Source of a plugin with one analysis of this body."""
    return (
        "import sys\nimport circuitlab\nfrom circuitlab import CircuitGraph\n"
        f"def run(model, task, *, steps: int = 1):\n    {body}\n"
        "@circuitlab.hookimpl\n"
        f"def register_analyses(register):\n    register({name!r}, run)\n"
    )


@pytest.fixture
def broken(install: Any) -> None:
    """Every plugin of AT_LOAD installed, beside one that works."""
    for name, (source, _) in AT_LOAD.items():
        install(f"circuitlab-{name}", name, source, version="0.3")
    install("circuitlab-head-norms", "head-norms", GOOD)


# --- at load --------------------------------------------------------------------------------------


def test_row_52_plugins_lists_each_broken_one_with_its_reason(
    broken: None, process: Callable[..., Any]
) -> None:
    """A real process, nine broken packages: each has a FAILED row, the others work, exit 0."""
    done = process("plugins")
    assert (done.code, done.err) == (0, "")
    rows = {line.split("\t")[0]: line.split("\t") for line in done.out.splitlines()}
    for name, (_, reason) in AT_LOAD.items():
        assert rows[name][1:3] == [f"circuitlab-{name} 0.3", "FAILED"]
        assert reason in rows[name][3]
    good = ["circuitlab-head-norms 0.1", "register_analyses", "head-norms"]
    assert rows["head-norms"][1:] == good
    assert rows["edge-attribution"][2:] == ["register_analyses", "edge-attribution"]


def test_row_52_help_shows_what_works_and_warns_of_the_rest(
    broken: None, process: Callable[..., Any]
) -> None:
    """The plugin of 25 lines is in ``trace --help`` with its option; each broken one is a line."""
    done = process("trace", "--help")
    assert done.code == 0
    assert "head-norms:" in done.out
    assert "Score each head by how far corruption moves its output." in done.out
    assert "--heads INT" in done.out
    assert "heads to keep" in done.out
    warnings = done.err.splitlines()
    assert len(warnings) == len(AT_LOAD)
    for name, warning in zip(sorted(AT_LOAD), warnings, strict=True):
        assert warning.startswith(f"warning: plugin {name!r} (circuitlab-{name} 0.3) is left out: ")
        assert f"uninstall it, or `circuitlab plugins disable {name}`" in warning


def test_row_52_another_analysis_runs_beside_broken_plugins(
    broken: None, lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """Broken plugins that were not asked for only warn; ``-q`` keeps even that away."""
    command = ("trace", "--model", ids_model, "--task-file", ids_task, "--json")
    done = lab(*command)
    assert done.code == 0
    assert len(done.json["edges"]) == 40
    assert done.err.count("is left out") == len(AT_LOAD)
    quiet = lab(*command, "-q")
    assert (quiet.code, quiet.err) == (0, "")


@pytest.mark.parametrize("name", AT_LOAD)
def test_row_52_a_broken_plugin_that_was_asked_for_is_exit_8(
    name: str, broken: None, lab: Lab
) -> None:
    """Naming it as the analysis, or for annotation, fails with its reason; no model loads."""
    done = lab("trace", name)
    assert (done.code, done.out) == (8, "")
    assert f"error: plugin {name!r} (circuitlab-{name} 0.3) is left out: " in done.err
    assert AT_LOAD[name][1] in done.err
    done = lab("trace", "--annotate", name)
    assert (done.code, done.out) == (8, "")
    assert f"error: --annotate {name}: " in done.err
    assert AT_LOAD[name][1] in done.err
    assert "loading" not in done.err


def test_row_52_the_remedy_of_the_warning_works(broken: None, lab: Lab) -> None:
    """With CIRCUITLAB_PLUGINS nothing else is loaded; strict mode makes any fault an error."""
    done = lab("trace", "--dry-run", env={"CIRCUITLAB_PLUGINS": "edge-attribution"})
    assert (done.code, done.err) == (0, "")
    strict = lab("trace", "--dry-run", env={"CIRCUITLAB_STRICT_PLUGINS": "1"})
    assert strict.code == 8
    assert "is left out" in strict.err


# --- names ----------------------------------------------------------------------------------------


def test_row_52_an_analysis_offered_twice_names_both_packages(
    install: Any, process: Callable[..., Any]
) -> None:
    """Nobody wins quietly: exit 8, and both plugins with their distributions and versions."""
    install("circuitlab-one", "one", analysis("return CircuitGraph()", "twin"), version="1.0")
    install("circuitlab-two", "two", analysis("return CircuitGraph()", "twin"), version="2.0")
    for command in (("trace", "--help"), ("plugins",)):
        done = process(*command)
        assert (done.code, done.out) == (8, "")
        assert "two plugins offer the analysis 'twin': " in done.err
        assert "'one' (circuitlab-one 1.0) and 'two' (circuitlab-two 2.0)" in done.err
        assert done.err.count("\n") == 1
    assert process("trace", "--help", env={"CIRCUITLAB_PLUGINS": "one,edge-attribution"}).code == 0


@pytest.mark.parametrize("plugin", ["head-norms", "edge-attribution"])
def test_row_52_a_plugin_name_in_two_distributions_names_both(
    plugin: str, install: Any, process: Callable[..., Any]
) -> None:
    """A package that takes another's plugin name, even a built-in one, replaces nothing."""
    install("circuitlab-head-norms", "head-norms", GOOD)
    install("circuitlab-impostor", plugin, analysis("return CircuitGraph()"))
    done = process("trace", "--help")
    assert (done.code, done.out) == (8, "")
    assert f"two distributions offer a plugin {plugin!r}: " in done.err
    assert "circuitlab-impostor 0.1" in done.err
    rival = "circuitlab-head-norms 0.1" if plugin == "head-norms" else "circuitlab 0.1.0"
    assert rival in done.err


# --- at work --------------------------------------------------------------------------------------

GRAPH = "c = CircuitGraph(); c.add_component('input', kind='input', layer=0); "
AT_WORK = {
    "raise RuntimeError('out of cheese')": "failed: RuntimeError: out of cheese",
    "sys.exit(0)": "failed: SystemExit: 0",
    "assert steps == 2": "failed: AssertionError",
    "return {'a': 1}": "returned dict, not a CircuitGraph",
    "return None": "returned NoneType, not a CircuitGraph",
    "import networkx; return networkx.MultiDiGraph()": "returned MultiDiGraph, not a CircuitGraph",
    GRAPH + "c.add_edge('input', 'input2', key='', score=float('nan')); return c": "bad circuit: ",
    GRAPH + "c.add_effect('input', 'input', float('nan')); return c": "score must be finite",
    GRAPH + "c.add_edge('input', 'input', key='', score=1.0); return c": "the circuit has a cycle",
    GRAPH + "c.nodes['input']['x'] = float('inf'); return c": "component 'input' has data",
    GRAPH + "c.graph['x'] = object(); return c": "the circuit has data",
    "return model.run(['text'])": "no tokenizer",
}


@pytest.mark.parametrize("body", AT_WORK)
def test_row_52_an_analysis_that_fails_at_work_is_exit_8_and_writes_nothing(
    body: str, install: Any, lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """Raising, leaving, wrong types and NaN: one line names analysis, plugin and fault."""
    install("circuitlab-faulty", "faulty-plugin", analysis(body))
    command = ("trace", "faulty", "--model", ids_model, "--task-file", ids_task, "-o", "c.json")
    done = lab(*command)
    assert done.out == ""
    assert done.code == (3 if "text" in body else 8)
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert AT_WORK[body] in last
    if done.code == 8:
        assert "analysis 'faulty' of plugin 'faulty-plugin'" in last
    assert not Path("c.json").exists()


def test_row_52_a_traceback_is_shown_when_asked_for(
    install: Any, lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """``--debug-traceback`` shows where a plugin raised; without it no traceback is seen."""
    install("circuitlab-faulty", "faulty", analysis("raise RuntimeError('out of cheese')"))
    command = ("trace", "faulty", "--model", ids_model, "--task-file", ids_task)
    assert "Traceback" not in lab(*command).err
    done = lab(*command, "--debug-traceback")
    assert done.code == 8
    assert "circuitlab_faulty.py" in done.err


def test_row_52_what_a_plugin_prints_is_not_the_result(
    install: Any, process: Callable[..., Any], ids_model: Path, ids_task: Path
) -> None:
    """A real process: what is printed at import, registration and work is not on stdout."""
    source = analysis("print('noise at work'); " + GRAPH + "return c", "noisy")
    source = "print('noise at import')\n" + source + "    print('noise at registration')\n"
    install("circuitlab-noisy", "noisy", source)
    done = process("trace", "noisy", "--model", ids_model, "--task-file", ids_task, "--json")
    assert done.code == 0
    assert done.json["provenance"]["analysis"] == "noisy"
    for when in ("import", "registration", "work"):
        assert f"noise at {when}" in done.err
    assert "noise" not in process("plugins").out.replace("noisy", "")


def test_row_52_an_annotator_that_changes_the_nodes_is_exit_8(
    install: Any, lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """Annotation may add data, not components; what it adds must be plain and finite too."""
    source = "import circuitlab\n@circuitlab.hookimpl\ndef annotate_circuit(circuit):\n    {}\n"
    command = ("trace", "--model", ids_model, "--task-file", ids_task, "--annotate", "note")
    install("circuitlab-note", "note", source.format("circuit.nodes['logits']['note'] = 'last'"))
    assert lab(*command, "--output", "c.json").code == 0
    nodes = json.loads(Path("c.json").read_text("utf-8"))["nodes"]
    assert [node["note"] for node in nodes if node["id"] == "logits"] == ["last"]
    for number, (body, fact) in enumerate({
        "circuit.remove_node('logits')": "it added or removed nodes",
        "circuit.nodes['logits']['note'] = float('nan')": "component 'logits' has data",
        "raise SystemExit(0)": "SystemExit: 0",
    }.items()):  # fmt: skip
        name = f"bad-{number}"
        install(f"circuitlab-{name}", name, source.format(body))
        done = lab(*command[:-1], name)
        assert (done.code, done.out) == (8, "")
        assert f"--annotate {name}" in done.err
        assert fact in done.err


# --- one that works -------------------------------------------------------------------------------


def test_row_52_a_plugin_of_25_lines_works_from_outside(
    install: Any, process: Callable[..., Any], ids_model: Path, ids_task: Path
) -> None:
    """Installed as a distribution of its own: its option is a flag, its circuit is drawn."""
    assert len(GOOD.strip().splitlines()) <= 27
    install("circuitlab-head-norms", "head-norms", GOOD)
    done = process(
        "trace", "head-norms", "--model", ids_model, "--task-file", ids_task, "--heads", "3",
        "--output", "heads.svg", "--output", "heads.json", "--json",
    )  # fmt: skip
    assert done.code == 0
    edges = done.json["edges"]
    assert len(edges) == 3
    assert [e["score"] for e in edges] == sorted((e["score"] for e in edges), reverse=True)
    assert done.json["provenance"]["score"] == "L2 norm of the change in z"
    assert done.json["provenance"]["options"] == {"heads": 3}
    again = process("render", "heads.json", "--output", "heads.dot")
    assert (again.code, again.err) == (0, "")


def test_row_52_its_bad_options_are_usage_errors(install: Any, lab: Lab) -> None:
    """A wrong value or a misspelt flag of a plugin is told as for a built-in analysis."""
    install("circuitlab-head-norms", "head-norms", GOOD)
    done = lab("trace", "head-norms", "--heads", "many")
    assert done.code == 2
    assert "--heads 'many' is not a whole number" in done.err
    done = lab("trace", "head-norms", "--haeds", "2")
    assert done.code == 2
    assert "--heads" in done.err
    done = lab("trace", "head-nroms")
    assert done.code == 2
    assert "no command 'head-nroms'; did you mean 'head-norms'?" in done.err


def test_row_52_plugins_are_found_without_importing_the_tests(process_env: dict[str, str]) -> None:
    """With no package added, the built-in plugins alone are there: the other tests' are not."""
    code = "from circuitlab.registry import Registry; print(*Registry.load().plugins)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=process_env, capture_output=True, text=True, check=True
    )
    assert "head-norms" not in done.stdout.split()
    assert {"defaults", "edge-attribution"} <= set(done.stdout.split())
