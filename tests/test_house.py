"""House rules that a test can hold: sizes, folders, hooks, versions, and who may print."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import circuitlab
from circuitlab import hookspecs

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("circuitlab/**/*.py"), *ROOT.glob("plugins/*/**/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
HOOKS = sorted(name for name, value in vars(hookspecs).items() if hasattr(value, "circuitlab_spec"))
LINES_OF_MODULE, LINES_OF_FUNCTION = 400, 50

Function = ast.FunctionDef | ast.AsyncFunctionDef


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, Function):
            yield node


def test_there_is_something_to_check() -> None:
    """The rules below look at the core, the plugins and the tests."""
    names = set(map(short, MODULES))
    assert {"circuitlab/graph.py", "plugins/circuitlab_edge_attribution/verdict.py"} <= names
    assert len(TESTS) > 20
    assert len(HOOKS) == 6


def test_source_roots_are_no_packages() -> None:
    """An __init__.py here would let `import plugins` shadow, or be shadowed by, a real package."""
    found = [
        short(path)
        for folder in ("plugins", "tests", "docs", "benchmarks", "scripts")
        for path in [ROOT / folder / "__init__.py"]
        if path.exists()
    ]
    assert found == []
    assert [short(p) for p in (ROOT / "tests").rglob("__init__.py")] == []


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=short)
def test_module_is_short_enough(path: Path) -> None:
    """A module of more lines is about two things."""
    assert len(path.read_text("utf-8").splitlines()) <= LINES_OF_MODULE


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_functions_are_short_enough(path: Path) -> None:
    """A function of more lines of code does two things; its docstring does not count."""
    long = []
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if ast.get_docstring(function):
            first = function.body[0]
            lines -= (first.end_lineno or 0) - first.lineno + 1
        if lines > LINES_OF_FUNCTION:
            long.append(f"{function.name}: {lines} lines")
    assert long == []


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_library_does_not_print(path: Path) -> None:
    """Results are returned and progress is told; only the command line writes, through rich."""
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "pprint", "input")
    ]
    assert calls == []


@pytest.mark.parametrize("path", [p for p in MODULES if p.stat().st_size], ids=short)
def test_module_says_what_it_is_for(path: Path) -> None:
    """The first thing in a module is a sentence."""
    first = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n\n")[0]
    assert first.endswith((".", "::", ":")), first


@pytest.mark.parametrize("path", TESTS, ids=short)
def test_tests_say_what_must_hold(path: Path) -> None:
    """Every test has a docstring."""
    tests = [function for function in functions(path) if function.name.startswith("test_")]
    assert [test.name for test in tests if not ast.get_docstring(test)] == []


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_a_test(hook: str) -> None:
    """Each hook is exercised by a test that bears its name."""
    names = {function.name for path in TESTS for function in functions(path)}
    assert f"test_hook_{hook}" in names


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_documented(hook: str) -> None:
    """Each hook has a heading in the reference, with its arguments in their order."""
    text = (ROOT / "docs" / "hooks.md").read_text("utf-8")
    headings = re.findall(rf"^#+ .*\b{hook}\((.*)$", text, re.MULTILINE)
    assert len(headings) == 1
    places = [headings[0].find(f"{name}:") for name in _arguments(hook)]
    assert -1 not in places
    assert places == sorted(places)


def test_reference_documents_no_other_hook() -> None:
    """A heading of a hook that is gone is taken out."""
    text = (ROOT / "docs" / "hooks.md").read_text("utf-8")
    assert set(re.findall(r"^## `?(\w+)\(", text, re.MULTILINE)) == set(HOOKS)


def _arguments(hook: str) -> list[str]:
    return list(inspect.signature(getattr(hookspecs, hook)).parameters)


def test_version_is_one() -> None:
    """The version stands in two places and is the same in both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == circuitlab.__version__


def test_plugins_are_declared() -> None:
    """Each folder of plugins is an entry point, type-checked, and under the import contracts."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = {path.parent.name for path in ROOT.glob("plugins/*/__init__.py")}
    entries = settings["project"]["entry-points"]["circuitlab"]
    assert folders == set(entries.values()) - {"circuitlab.defaults"}
    for name, module in entries.items():
        if name != "defaults":
            assert module == "circuitlab_" + name.replace("-", "_")
    assert folders <= set(settings["tool"]["mypy"]["packages"])
    assert folders <= set(settings["tool"]["importlinter"]["root_packages"])
