"""Built-in plugins use nothing that a stranger cannot: each works as a distribution of its own.

All folders of ``plugins/`` are taken out of CircuitLab, made projects and installed by pip, beside
a CircuitLab without them, in an environment that does not have the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
from installed import describe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ENTRIES: dict[str, str] = PROJECT["entry-points"]["circuitlab"]
PLUGINS = {name: module for name, module in ENTRIES.items() if name != "defaults"}

#: Values for options, so that each analysis is short.
SHORT: dict[str, dict[str, dict[str, Any]]] = {
    "activation-plateaus": {
        "activation-plateaus": {"bank_size": 8, "steps": 11, "freeze": "heads"},
        "plateau-regions": {"pairs": "task", "bank_size": 3, "steps": 5, "slice_steps": 3},
        "injection-scan": {"steps": 4, "controls": 1},
    },
    "attention-heads": {"head-circuits": {"head": "a1.h0"}},
    "edge-attribution": {"edge-attribution": {"verify": 3, "ig_steps": 2}},
    "feature-interactions": {
        "feature-interactions": {
            "dictionaries": "dictionaries",
            "verify": 3,
            "min_coactivation": 2,
            "n_tokens": 1,
        }
    },
}
#: A few tests of the plugin's own; all of them where this is set, which takes many minutes.
WHOLE = os.environ.get("CIRCUITLAB_WHOLE_SUITES") == "1"
TESTS = {
    "activation-plateaus": "test_plateau_medians.py",
    "attention-heads": "test_norm_rates.py",
    "edge-attribution": "test_edge_attribution_verdict.py",
    "feature-interactions": "test_dictionary_sets.py",
    "model-families": "../core/test_families.py",
    "path-patching": "test_groups.py",
}
GENERATED = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "circuitlab-{name}"
version = "7.0"

[project.entry-points.circuitlab]
{name} = "{module}"

[tool.setuptools.packages.find]
include = ["{module}*"]
"""
WORK = """
import json, sys
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
from circuitlab.registry import Registry
from circuitlab.testing import check_plugin, tiny_model

name, module, options, tests, root = json.loads(sys.argv[1])
torch.set_num_threads(1)
info = Registry.load([name]).plugins[name]
if name == "feature-interactions":
    from feature_oracles import dictionaries
    from circuitlab import DictionaryInfo
    from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
    from circuitlab_feature_interactions.sites import site_pairs
    model = tiny_model()
    pairs = site_pairs("mlp", model)
    found = dictionaries(pairs)
    for site, one in found.items():
        one.info = DictionaryInfo(site=str(site), model=model.name, context_length=16)
    write_set(DictionarySet(found, pairs, {}), Path("dictionaries"))
clauses = [(c.subject, c.rule, c.verdict, c.reason) for c in check_plugin(name, options)]
flags = ["-q", "-p", "no:cacheprovider", "-c", f"{root}/pyproject.toml", "--rootdir", root, *tests]
done = {
    "origin": find_spec(module).origin,
    "distribution": f"{info.distribution} {info.version}",
    "clauses": clauses,
    "tests": int(pytest.main(flags)),
}
print()
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``core``, CircuitLab without plugins, and ``site``, each plugin installed."""
    folder = tmp_path_factory.mktemp("free")
    core = folder / "core"
    core.mkdir()
    (core / "circuitlab").symlink_to(ROOT / "circuitlab")
    describe(core, "circuitlab", PROJECT["version"], {"defaults": ENTRIES["defaults"]})
    projects = []
    for name, module in PLUGINS.items():
        project = folder / "projects" / name
        shutil.copytree(
            ROOT / "plugins" / module, project / module, ignore=shutil.ignore_patterns("__pyc*")
        )
        text = GENERATED.format(name=name, module=module)
        (project / "pyproject.toml").write_text(text, encoding="utf-8")
        projects.append(str(project))
    apart = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", "-q", *apart, "--target"]
    done = subprocess.run(
        [*command, str(folder / "site"), *projects], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def suite(name: str) -> list[str]:
    """Files of tests to run of a plugin."""
    folder = ROOT / "tests" / "plugins"
    files = [folder / TESTS[name]]
    if WHOLE:
        files += [f for f in folder.glob("*.py") if PLUGINS[name] in f.read_text("utf-8")]
    return sorted({str(file) for file in files})


def test_every_plugin_is_here() -> None:
    """A plugin that is added is set free too, with a test of its own."""
    assert set(TESTS) == set(PLUGINS)


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_works_as_a_distribution_of_its_own(name: str, free: Path, tmp_path: Path) -> None:
    """It is found there, keeps every clause of the contract, and passes tests of its own."""
    # -S: the packages are there, the links from them to this checkout are not.
    paths = [free / "site", free / "core", Path(sysconfig.get_paths()["purelib"]), ROOT / "tests"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CIRCUITLAB_", "PYTEST_"))}
    given = json.dumps([name, PLUGINS[name], SHORT.get(name, {}), suite(name), str(ROOT)])
    path = os.pathsep.join(map(str, paths))
    # pytest's own plugins are not those under test, and want to be loaded first.
    alone = {"PYTHONPATH": path, "HOME": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", WORK, given],
        env=kept | alone,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["origin"] == str(free / "site" / PLUGINS[name] / "__init__.py")
    assert found["distribution"] == f"circuitlab-{name} 7.0"
    assert [clause for clause in found["clauses"] if clause[2] == "FAILS"] == []
    held = [clause for clause in found["clauses"] if clause[2] == "holds"]
    assert len(held) >= 6
    assert found["tests"] == 0, done.stdout + done.stderr
