"""Commands that plugins offer beside ``trace``, as ``circuitlab dict train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from circuitlab.cli import flags, screen
from circuitlab.cli.installed import load_registry, warn_of_broken, warn_of_versions
from circuitlab.cli.stopping import stoppable
from circuitlab.cli.suggesting import Suggesting

if TYPE_CHECKING:
    from circuitlab.registry import Command, Registry

SCHEMA = "circuitlab-result/1"


def offered() -> dict[str, click.Command]:
    """All plugins' commands of one word, and the groups of those of two, by name."""
    registry = load_registry()
    found: dict[str, click.Command] = {}
    for command in sorted(registry.commands.values(), key=lambda command: command.name):
        first, _, second = command.name.partition(" ")
        if not second:
            found[first] = _command(registry, command, first)
            continue
        group = found.setdefault(
            first, Suggesting(first, help=_summary(registry, first), context_settings=_SETTINGS)
        )
        assert isinstance(group, click.Group)  # the registry takes no second use of a word
        group.add_command(_command(registry, command, second))
    return found


_SETTINGS = {"help_option_names": ["-h", "--help"]}


def _summary(registry: Registry, group: str) -> str:
    names = [name.split(" ")[1] for name in registry.commands if name.startswith(f"{group} ")]
    plugins = {registry.commands[f"{group} {name}"].plugin for name in names}
    return f"{', '.join(sorted(names))}: offered by {', '.join(sorted(plugins))}."


def _command(registry: Registry, command: Command, name: str) -> click.Command:
    def run(**values: Any) -> None:
        _act(registry, command, values)

    own = [flags.click_option(option) for option in command.options]
    return click.Command(
        name,
        callback=run,
        params=[*own, *flags.running("induction"), *flags.showing()],
        help=(command.function.__doc__ or "").strip().partition("\n")[0],
        context_settings=_SETTINGS,
    )


def _act(registry: Registry, command: Command, values: dict[str, Any]) -> None:
    flags.heed(values)
    warn_of_broken(registry)
    warn_of_versions()
    if values["dry_run"]:
        flags.show_settings(command.name, "command")
        return
    with screen.progress() as listener, screen.quiet_stdout():
        model = flags.load(values, registry)
        from circuitlab.builder import run_command
        from circuitlab.progress import listening

        given = {option.name: values[option.name] for option in command.options}
        with listening(stoppable(listener), screen.warn):
            found = run_command(command, model, given, seed=values["seed"], registry=registry)
    if values["json"]:
        head = {"schema": SCHEMA, "command": command.name, "model": model.name}
        document = {**head, "result": found}
        screen.out(json.dumps(document, allow_nan=False))
    else:
        screen.pairs(f"{model.name} · {command.name}", dict(_lines(found)))
    sys.stdout.flush()


def _lines(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Label and value of each number, those of what is nested behind the label above them."""
    for label, value in found.items():
        whole = f"{above} {label}".lstrip()
        if isinstance(value, Mapping):
            yield from _lines(value, whole)
        elif value not in ([], None):
            yield whole, _shown(value)


def _shown(value: Any) -> str:
    """A value in one line for people."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
