"""The example plugins of the documentation are distributions that pass their own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed import describe_project

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.parent for path in (ROOT / "docs/examples").glob("*/pyproject.toml"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Surroundings in which all of them are installed: modules, metadata and entry points."""
    site = tmp_path_factory.mktemp("site")
    for folder in EXAMPLES:
        describe_project(site, folder)
        for module in folder.glob("circuitlab_*.py"):
            shutil.copy(module, site)
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_three() -> None:
    """An analysis, a model family and an exporter."""
    assert [folder.name for folder in EXAMPLES] == ["head-norms", "starcoder2", "tikz"]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_passes_its_own_tests(folder: Path, environment: dict[str, str]) -> None:
    """Installed beside CircuitLab, each example passes the tests it brings."""
    said = run(environment, folder, "pytest", "-q", "-p", "no:cacheprovider", ".")
    assert "passed" in said


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_passes_the_conformance_kit(folder: Path, environment: dict[str, str]) -> None:
    """``circuitlab plugins check`` finds nothing to complain of."""
    run(environment, folder, "circuitlab", "plugins", "check", folder.name)


def test_the_small_one_is_small() -> None:
    """The 25 lines that a plugin takes are 25, of those that do something."""
    module = ROOT / "docs/examples/head-norms/circuitlab_head_norms.py"
    lines = [line for line in module.read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) <= 25
