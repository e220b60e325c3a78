"""The page of errors speaks of messages that exist, and every message leads to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitlab import errors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/errors.md").read_text("utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \| .+ \| .+ \|$", PAGE, re.M)


@pytest.fixture(scope="module")
def said() -> str:
    """Every text of the program, as it is said: implicitly joined, holes as …."""
    texts = []
    for folder in ("circuitlab", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_messages_are_listed() -> None:
    """Every kind of error has messages on the page."""
    assert len(MESSAGES) >= 35


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_said(message: str, said: str) -> None:
    """What the page quotes stands in the program word for word."""
    assert message in said


def test_every_exit_code_has_its_place() -> None:
    """Each class of errors leads to a heading that names it."""
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(kinds) >= 10
    for kind in kinds:
        section = PAGE.partition(f"## Exit {kind.exit_code}\n")[2].partition("\n## ")[0]
        assert section, kind
        if kind is not errors.CircuitLabError:
            assert f"`{kind.__name__}`" in section, kind


def test_a_message_leads_to_the_page(lab: Callable[..., Any]) -> None:
    """An error on the screen ends with the heading of its kind."""
    done = lab("render", "nothing.json", "--output", "nothing.svg")
    assert done.code == 3
    assert done.err.rstrip().endswith("(more: docs/errors.md#exit-3)")
