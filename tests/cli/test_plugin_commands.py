"""``circuitlab plugins``: list, new, check, disable, enable, and ``--no-plugins``."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Callable[..., Any]

SOUND = """
    import circuitlab

    @circuitlab.hookimpl
    def register_analyses(register):
        register("heads", heads)

    def heads(model, task, *, count: int = 1):
        "Some heads."
        circuit = circuitlab.CircuitGraph(score="how many")
        circuit.add_component("logits", kind="logits", layer=model.n_layers)
        for head in range(count):
            circuit.add_component(f"a0.h{head}", kind="head", layer=0)
            circuit.add_effect(f"a0.h{head}", "logits", float(count))
        return circuit
"""


def rows(done: Any) -> dict[str, list[str]]:
    """Rows of a table by their first cell."""
    return {line.split("\t")[0]: line.split("\t")[1:] for line in done.out.splitlines()}


# --- disable, enable ------------------------------------------------------------------------------


def test_disabled_plugin_is_not_imported(install: Any, lab: Lab, tmp_path: Path) -> None:
    """It is a row that says how to take it back, leaves a mark nowhere, and enabling undoes it."""
    mark = tmp_path / "imported"
    install("circuitlab-own", "own", f"open({str(mark)!r}, 'w').close()\n" + _dedent(SOUND))
    done = lab("plugins", "disable", "own")
    assert (done.code, done.out) == (0, "own: disabled\n")
    assert lab("plugins", "disable", "own").out == "own: was disabled already\n"
    listed = rows(lab("plugins"))
    assert listed["own"][:2] == ["circuitlab-own 0.1", "off"]
    assert "`circuitlab plugins enable own` takes it back" in listed["own"][2]
    assert "plugin own: off: disabled" in lab("doctor").out
    refused = lab("trace", "heads")
    assert refused.code == 2
    assert not mark.exists()
    assert lab("plugins", "enable", "own").out == "own: enabled\n"
    assert rows(lab("plugins"))["own"] == ["circuitlab-own 0.1", "register_analyses", "heads"]
    assert mark.exists()


def test_disabling_mends_what_a_duplicate_broke(install: Any, lab: Lab) -> None:
    """Two plugins of one analysis stop every command; the remedy of the message ends that."""
    install("circuitlab-one", "one", SOUND)
    install("circuitlab-two", "two", SOUND)
    done = lab("plugins")
    assert done.code == 8
    assert "uninstall one, or `circuitlab plugins disable two`" in done.err
    assert lab("plugins", "disable", "two").code == 0
    assert rows(lab("plugins"))["one"][2] == "heads"


def test_disabled_built_in_is_named_where_it_is_missed(lab: Lab) -> None:
    """The default analysis without its plugin: usage error; the API says what is not loaded."""
    from circuitlab import PluginError
    from circuitlab.registry import Registry

    assert lab("plugins", "disable", "edge-attribution").code == 0
    with pytest.raises(PluginError, match="plugin 'edge-attribution' is not loaded: disabled"):
        Registry.load().analysis("edge-attribution")
    assert lab("plugins", "enable", "edge-attribution").code == 0
    assert Registry.load().analysis("edge-attribution").name == "edge-attribution"


def test_switches_that_cannot_be(lab: Lab, tmp_path: Path) -> None:
    """The core's own plugin, one that is not there, a list that cannot be read: exit 8, and why."""
    for name, reason in (("defaults", "nothing works without it"), ("nobody", "is not installed")):
        done = lab("plugins", "disable", name)
        assert (done.code, done.out) == (8, "")
        assert reason in done.err
    damaged = tmp_path / "settings" / "circuitlab" / "disabled-plugins.txt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"\xff\xfe\x00")
    done = lab("plugins")
    assert done.code == 8
    assert "cannot be read" in done.err
    assert "mend or remove it" in done.err


def test_uninstalled_plugin_can_be_enabled(lab: Lab, tmp_path: Path) -> None:
    """A name left on the list by a plugin that is gone can be taken off it, and harms nothing."""
    listed = tmp_path / "settings" / "circuitlab" / "disabled-plugins.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("gone\n\n")
    assert lab("plugins").code == 0
    assert lab("plugins", "enable", "gone").out == "gone: enabled\n"
    assert listed.read_text() == ""


# --- --no-plugins ---------------------------------------------------------------------------------


def test_no_plugins_leaves_strangers_out(install: Any, lab: Lab) -> None:
    """Built-in plugins stay, others are listed and not imported; afterwards all are back."""
    install("circuitlab-own", "own", "raise RuntimeError('imported')")
    done = lab("--no-plugins", "plugins")
    assert (done.code, done.err) == (0, "")
    assert rows(done)["own"] == ["circuitlab-own 0.1", "off", "left out by --no-plugins"]
    assert rows(done)["edge-attribution"][1] == "register_analyses"
    assert "CIRCUITLAB_NO_PLUGINS" not in os.environ
    assert rows(lab("plugins"))["own"][1] == "FAILED"
    assert rows(lab("plugins", env={"CIRCUITLAB_NO_PLUGINS": "1"}))["own"][1] == "off"
    help_text = lab("--no-plugins", "trace", "--help")
    assert help_text.code == 0
    assert "is left out" not in help_text.err


# --- new ------------------------------------------------------------------------------------------


def test_new_plugin_installs_and_passes_its_own_tests(lab: Lab, tmp_path: Path) -> None:
    """Written, built by pip without a network, and tested in a process of its own; lint-clean."""
    done = lab("plugins", "new", "edge-effects")
    assert done.code == 0
    assert done.out.splitlines()[0] == "circuitlab-edge-effects/pyproject.toml"
    assert "next: pip install -e circuitlab-edge-effects" in done.err
    project = tmp_path / "circuitlab-edge-effects"
    assert all((tmp_path / line).exists() for line in done.out.splitlines())
    apart = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    site = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", *apart, "--target", str(site)]
    subprocess.run([*pip, str(project)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        words = [sys.executable, "-m", *tool]
        linted = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("Head_Norms", 2, "is not kebab-case: small letters and digits, words joined by '-'"),
        ("Head_Norms", 2, "how about 'head-norms'"),
        ("../x", 2, "is not kebab-case"),
        ("acdc", 2, "there is an installed analysis 'acdc'; choose another name"),
        ("attention-heads", 2, "there is an installed plugin 'attention-heads'"),
        ("a" * 41, 2, "is longer than 40 letters; shorten it"),
        ("taken", 5, "folder 'circuitlab-taken' exists; give another with --output"),
    ],
)
def test_new_refuses(name: str, code: int, reason: str, lab: Lab, tmp_path: Path) -> None:
    """Names that are no names, or taken, and a folder that exists: nothing is written."""
    (tmp_path / "circuitlab-taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = lab("plugins", "new", name)
    assert (done.code, done.out) == (code, "")
    assert reason in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_new_where_nothing_can_be_written(lab: Lab, tmp_path: Path) -> None:
    """A path below a file is an error of resources, in one line."""
    (tmp_path / "file").touch()
    done = lab("plugins", "new", "own-plugin", "--output", "file/below")
    assert (done.code, done.out) == (5, "")
    assert "cannot be written: " in done.err


# --- check ----------------------------------------------------------------------------------------


def test_check_takes_values_for_options(install: Any, lab: Lab) -> None:
    """--set reaches the analysis: two heads are fine; a head the model does not have is named."""
    install("circuitlab-own", "own", SOUND)
    done = lab("plugins", "check", "own", "--set", "heads.count=2")
    assert done.code == 0
    assert done.err.splitlines()[-1].endswith("clauses hold, 4 not checked")
    done = lab("plugins", "check", "own", "--set", "heads.count=3")
    assert done.code == 8
    assert "component 'a0.h2' does not exist in a model of 2 layers" in done.err


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("nobody",), 8, "plugin 'nobody' is not installed; there are defaults"),
        (("model-families", "--set", "x"), 2, "--set 'x' is not OFFER.OPTION=VALUE"),
        (("model-families", "--set", "a.b=1"), 2, "offers no analysis or command 'a'"),
    ],
)
def test_check_refuses(words: tuple[str, ...], code: int, reason: str, lab: Lab) -> None:
    """Plugins, offers and values that are not there: one line, and no table."""
    done = lab("plugins", "check", *words)
    assert (done.code, done.out) == (code, "")
    assert reason in done.err


def test_the_list_of_disabled_is_replaced_whole(lab: Lab, tmp_path: Path) -> None:
    """No draft stays beside it, and a folder that may not be written is told."""
    assert lab("plugins", "disable", "path-patching").code == 0
    folder = tmp_path / "settings" / "circuitlab"
    assert [path.name for path in folder.iterdir()] == ["disabled-plugins.txt"]
    (folder / "disabled-plugins.txt").unlink()
    folder.rmdir()
    folder.touch()
    done = lab("plugins", "disable", "path-patching")
    assert done.code == 8
    assert "CIRCUITLAB_PLUGINS" in done.err or "cannot be read" in done.err
    assert stat.S_ISREG(folder.stat().st_mode)


def _dedent(source: str) -> str:
    return textwrap.dedent(source)
