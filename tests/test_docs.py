"""The documentation is true: code runs, commands print what is shown, links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from installed import describe_project

from circuitlab import hookspecs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "plugins/README.md",
]
PAGES += sorted(DOCS.rglob("*.md"))
#: Pages on which something can be run.
RUN = [
    page
    for page in PAGES
    if re.search(r"^```(python|console|json|toml)", page.read_text("utf-8"), re.M)
]

_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
#: Commands that make an environment or install into it; the rest of a line counts.
_INSTALLS = ("python3 -m venv", "pip install", ".venv/bin/pip install", "pre-commit install", ". ")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command of a console or bash block, and the lines shown under it."""

    text: str
    shown: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match[1], match[2] or "", match[3], line)


def commands(block: Block) -> list[Command]:
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if block.language == "bash" or line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        elif found:
            found[-1][1].append(line)
    return [Command(text, tuple(shown)) for text, shown in found]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def run_page(
    lab: Callable[..., Any], tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path], None]]:
    """Go through a page from the top, as a reader would, in an empty folder."""
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, Any] = {"__name__": "page"}

    def run(page: Path) -> None:
        for block in blocks(page):
            where = f"{name(page)}:{block.line}"
            if block.title:
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
            if block.language == "python":
                run_python(block, where, tmp_path, space)
            elif block.language in ("console", "bash"):
                for command in commands(block):
                    run_command(command, where, lab, tmp_path)

    yield run
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def run_python(block: Block, where: str, folder: Path, space: dict[str, Any]) -> None:
    """A module of tests is imported and its tests are run; other blocks share one namespace."""
    if not block.title.startswith("test_"):
        exec(compile(block.text, where, "exec", dont_inherit=True), space)
        return
    importlib.invalidate_caches()
    module = importlib.import_module(block.title.removesuffix(".py"))
    tests = [value for key, value in vars(module).items() if key.startswith("test_")]
    assert tests, f"{where}: no test in {block.title}"
    for test in tests:
        test()


def run_command(command: Command, where: str, lab: Callable[..., Any], folder: Path) -> None:
    for part in command.text.split(" && "):
        if part.startswith("pip install -e ."):
            install(folder)
        words = shlex.split(part)
        if words[0].endswith("circuitlab"):
            done = lab(*words[1:])
            assert done.code == 0, f"{where}: {part}: {done.err}"
            printed = {numberless(line) for line in done.out.splitlines()}
            for line in command.shown:
                said = line == "…" or numberless(line) in printed
                assert said, f"{where}: {part} does not print {line!r}, but\n{done.out}"
        else:
            assert part.startswith((*_INSTALLS, "python", ".venv/bin/python")), f"{where}: {part}"


def install(folder: Path) -> None:
    """What ``pip install -e .`` leaves behind of the project in ``folder``: its entry points."""
    if not (folder / "pyproject.toml").exists():
        return
    describe_project(folder, folder)
    importlib.invalidate_caches()


def numberless(line: str) -> str:
    """The line with every number the same, since the last digits belong to a machine."""
    return " ".join(_NUMBER.sub("0", line).split())


@pytest.mark.parametrize("page", RUN, ids=name)
def test_page_runs(page: Path, run_page: Callable[[Path], None]) -> None:
    """Every Python block and every circuitlab command works, and prints lines like those shown."""
    run_page(page)


def test_every_page_with_code_is_run() -> None:
    """The pages a reader starts with are among those that are run."""
    assert {"README.md", "docs/tutorial.md", "docs/writing-a-plugin.md", "docs/hooks.md"} <= {
        name(page) for page in RUN
    }


def test_readme_commands_are_those_of_ci() -> None:
    """What CI runs is, character for character, what the README tells a reader to run."""
    readme = ROOT / "README.md"
    told = [c.text for b in blocks(readme) if b.language == "bash" for c in commands(b)]
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert len(told) == 2
    for command in told:
        assert f"'{command}'" in script


def test_picture_is_what_the_readme_command_draws(lab: Callable[..., Any], tmp_path: Path) -> None:
    """The picture of the README shows the components and edges that its command draws now."""
    lab("trace", "--model", "ioi-mini", "--output", "circuit.svg")
    shown, drawn = (
        [
            numberless(title)
            for title in re.findall(r"<title>(.*?)</title>", path.read_text("utf-8"))
        ]
        for path in (DOCS / "pictures/ioi-mini.svg", tmp_path / "circuit.svg")
    )
    assert len(shown) > 40
    assert shown == drawn


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_exist(page: Path) -> None:
    """Every relative link leads to a file, and its anchor to a heading."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    """A path of the repository written as code is a path of the repository."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    tops = "|".join(
        sorted({p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")})
    )
    paths = re.findall(rf"`(?:python |bash )?((?:{tops}|\.ci)/[\w./-]*)`", text)
    paths += re.findall(r"`((?:[a-z-]+\.(?:md|toml)|constraints\.txt|[A-Z]+\.md))`", text)
    for path in paths:
        assert (ROOT / path).exists() or (DOCS / path).exists(), f"{name(page)}: {path}"


def test_hooks_are_documented_with_their_signatures() -> None:
    """hooks.md has a heading for each hook, with its exact signature, and for nothing else."""
    specs = {
        key: value
        for key, value in vars(hookspecs).items()
        if inspect.isfunction(value) and hasattr(value, "circuitlab_spec")
    }
    signatures = [
        f"{key}{inspect.signature(value)}".replace("'", "") for key, value in specs.items()
    ]
    headings = re.findall(r"^## `(.*)`$", (DOCS / "hooks.md").read_text("utf-8"), re.M)
    assert headings == signatures


def test_cli_page_is_up_to_date() -> None:
    """cli.md is what the commands' own help says."""
    script = [sys.executable, str(DOCS / "make_cli.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_of_the_bundled_models_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of measured numbers are what the bundled models give now."""
    monkeypatch.syspath_prepend(DOCS)
    tables = importlib.import_module("make_tables")
    for page, rows in (("concepts.md", tables.gap_rows()), ("models.md", tables.model_rows())):
        text = (DOCS / page).read_text("utf-8")
        for row in rows:
            assert row in text, f"{page} lacks {row}"


def test_decision_on_floors_is_the_contract() -> None:
    """The floors that decision 4 shows are those that import-linter checks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    contract = [sorted(layer.split(" | ")) for layer in layers]
    rows = re.findall(
        r"^\| [a-z ]+ \| (`.*`) \|$", (DOCS / "decisions/0004-floors.md").read_text("utf-8"), re.M
    )
    assert [sorted(re.findall(r"`(\w+)`", row)) for row in rows] == contract


def test_decisions_are_short() -> None:
    """A decision is one screen: at most 40 lines."""
    lengths = {
        page.name: len(page.read_text("utf-8").splitlines()) for page in DOCS.glob("decisions/*.md")
    }
    assert len(lengths) >= 4
    assert {key: n for key, n in lengths.items() if n > 40} == {}


def test_constraints_pin_every_dependency() -> None:
    """constraints.txt pins each dependency exactly, names no host, and allows a public torch."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~ ;\[]", text)[0].lower() for text in wanted}
    assert names <= pins.keys()
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    assert "://" not in "\n".join(lines)
