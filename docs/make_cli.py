"""Write cli.md from the command line's own help; with ``--check`` only compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 96
HEAD = """# Command line

Made by `python docs/make_cli.py` from the commands' own help; do not edit by hand.

A flag of `trace` may also stand in the environment (`CIRCUITLAB_TOP=60`) or in a TOML file
(`--config`): the command line comes first, then the environment, the file, the default. `--dry-run`
shows each setting and where it is from. stdout has the result and nothing else; all else goes to
stderr. What to do about an error: [errors](errors.md).

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a fault of CircuitLab |
| 2 | a flag or value that does not fit |
| 3 | a prompt, task or circuit file that cannot be used |
| 4 | a model that cannot be had or is not understood |
| 5 | memory, disk or permissions |
| 6 | a host did not do what it was asked |
| 7 | not good enough: a self-check, or `--fail-under` |
| 8 | a plugin that was asked for failed |
| 130, 143 | interrupted, terminated; with `--resume` the state is kept |
| 141 | nobody reads the output |
"""


def main() -> int:
    """Write or check the page; the exit code."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.name} is not what the commands say; run python docs/make_cli.py")
    return 1


def page() -> str:
    """The whole page."""
    # Only what comes with CircuitLab: another plugin here must not change the page.
    ours = [
        e.name for e in entry_points(group="circuitlab") if e.dist and e.dist.name == "circuitlab"
    ]
    os.environ["CIRCUITLAB_PLUGINS"] = ",".join(ours)
    from circuitlab.cli.commands import circuitlab

    root = context(circuitlab, None, "circuitlab")
    parts = [f"## `{path}`\n\n```text\n{text}\n```\n" for path, text in helps(root)]
    return HEAD + "\n" + "\n".join(parts)


def helps(ctx: click.Context) -> Iterator[tuple[str, str]]:
    """Path and help of a command and of all commands under it."""
    command = ctx.command
    yield ctx.command_path, command.get_help(ctx).strip()
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            if below is not None and not below.hidden:
                yield from helps(context(below, ctx, name))


def context(command: click.Command, parent: click.Context | None, name: str) -> click.Context:
    """A context as running the command makes it, of one width on every terminal."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, parent, name, **settings)


if __name__ == "__main__":
    sys.exit(main())
