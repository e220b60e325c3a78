"""Commands of plugins: found, run with their flags, shown as lines or as one document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

Lab = Callable[..., Any]

SIZES = '''
    from typing import Annotated
    import circuitlab

    @circuitlab.hookimpl
    def register_commands(register):
        register("model sizes", sizes)
        register("model name", lambda model: {"name": model.name})
        register("count", sizes)

    def sizes(model, *, scale: Annotated[int, "what the number is multiplied by"] = 1):
        """Count layers and heads."""
        for _ in circuitlab.track(range(3), "counting"):
            pass
        heads = {"per head": 1 / model.n_heads, "sizes": [2.5, 1], "none": None}
        return {"layers": scale * model.n_layers, "model": heads}
    '''


@pytest.fixture
def sized(lab: Lab, install: Any) -> Lab:
    """The command line with a plugin that offers three commands."""
    install("circuitlab-sizes", "sizes", SIZES)
    return lab


def test_a_command_is_found_and_shown(sized: Lab) -> None:
    """Help names the group, the group its commands; the result is one line for each label."""
    assert re.search(
        r"^  model +name, sizes: offered by sizes\.$", sized("--help").out, re.MULTILINE
    )
    assert "Count layers and heads." in sized("model", "--help").out
    assert "what the number is multiplied by" in sized("model", "sizes", "--help").out
    done = sized("model", "sizes", "--model", "gate-and", "--scale", "3")
    assert done.code == 0
    assert done.out.splitlines() == ["layers: 3", "model per head: 0.5", "model sizes: 2.5, 1"]
    assert "counting" in done.err


def test_a_command_of_one_word(sized: Lab) -> None:
    """A command need not have a group: it stands beside CircuitLab's own, with its own help."""
    assert re.search(r"^  count +Count layers and heads\.$", sized("--help").out, re.MULTILINE)
    done = sized("count", "--model", "gate-and")
    assert (done.code, done.out.splitlines()[0]) == (0, "layers: 1")


def test_a_word_is_no_group_as_well(sized: Lab, install: Any) -> None:
    """What one plugin offers as a command, no other can have as a group."""
    install(
        "circuitlab-counts",
        "counts",
        SIZES.replace('"count"', '"count heads"').replace("model", "m"),
    )
    done = sized("plugins")
    assert "two plugins offer the command 'count heads' and 'count'" in done.err


def test_a_command_gives_one_document(sized: Lab) -> None:
    """With --json stdout is one JSON document, and with --quiet stderr is empty."""
    done = sized("model", "sizes", "--model", "gate-and", "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == {
        "schema": "circuitlab-result/1",
        "command": "model sizes",
        "model": "gate-and",
        "result": {"layers": 1, "model": {"per head": 0.5, "sizes": [2.5, 1], "none": None}},
    }


def test_settings_of_a_command_are_shown(sized: Lab) -> None:
    """--dry-run shows each setting and where it is from, and runs nothing."""
    done = sized("model", "sizes", "--dry-run", env={"CIRCUITLAB_SCALE": "5"})
    assert "scale\t5\tenvironment" in done.out
    assert "command\tmodel sizes\tcommand" in done.out


def test_a_word_that_is_no_command_is_named(sized: Lab) -> None:
    """A misspelt group or command is a usage error with the nearest name."""
    assert "did you mean 'sizes'?" in sized("model", "size").err
    assert "did you mean 'model" in sized("modle").err
    assert sized("model", "sizes", "--scale", "many").code == 2
