"""``circuitlab plugins``: list, begin, check, disable and enable plugins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from circuitlab.cli import screen
from circuitlab.cli.suggesting import Suggesting
from circuitlab.errors import PluginError
from circuitlab.labels import counted, visible

if TYPE_CHECKING:
    from circuitlab.testing import Clause


@click.group(cls=Suggesting, invoke_without_command=True)
@click.pass_context
def plugins(ctx: click.Context) -> None:
    """List installed plugins; begin, check, disable or enable one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_plugins)


@plugins.command("list")
def list_plugins() -> None:
    """One row for each plugin: what it offers, or why it does not work or is not loaded."""
    from circuitlab.cli.installed import load_registry

    registry = load_registry()
    rows = []
    for info in [*registry.plugins.values(), *registry.off.values()]:
        offers = ", ".join(offer.partition(":")[2] for offer in info.offers)
        hooks = "FAILED" if info.failure else "off" if info.off else ", ".join(info.hooks)
        origin = f"{info.distribution} {info.version}"
        rows.append((info.name, origin, hooks, info.failure or info.off or offers))
    screen.table(("plugin", "distribution", "hooks", "offers"), rows)


@plugins.command("new")
@click.argument("name")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="Folder to make it in; by default circuitlab-NAME, here.",
)  # fmt: skip
def new_plugin(name: str, output: Path | None) -> None:
    """Write a plugin NAME to start from: one analysis, its tests, and what installs it."""
    from circuitlab.scaffold import write_plugin

    folder = output or Path(f"circuitlab-{name}")
    for path in write_plugin(name, folder):
        screen.out(visible(str(path)))
    screen.say(f"next: pip install -e {visible(str(folder))}, then circuitlab plugins check {name}")


@plugins.command("check")
@click.argument("name")
@click.option(
    "--set", "settings", multiple=True, metavar="OFFER.OPTION=VALUE",
    help="Value for an option of its analyses or commands. May be given several times.",
)  # fmt: skip
def check_plugin(name: str, settings: tuple[str, ...]) -> None:
    """Hold the installed plugin NAME to everything CircuitLab expects; exit 8 where it fails."""
    options = _settings(settings)
    with screen.progress() as listener, screen.quiet_stdout():
        from circuitlab.progress import listening
        from circuitlab.testing import check_plugin as check

        with listening(listener, screen.warn):
            clauses = check(name, options)
    rows = [(c.verdict, c.subject, c.rule, c.reason) for c in clauses]
    screen.table(("", "what", "rule", "reason"), rows)
    _conclude(name, clauses)


@plugins.command("disable")
@click.argument("name")
def disable(name: str) -> None:
    """Leave the plugin NAME out of every command from now on."""
    _switch(name, off=True)


@plugins.command("enable")
@click.argument("name")
def enable(name: str) -> None:
    """Take back the plugin NAME that was disabled."""
    _switch(name, off=False)


def _switch(name: str, *, off: bool) -> None:
    from circuitlab.entries import set_disabled

    changed = set_disabled(name, off)
    word = "disabled" if off else "enabled"
    screen.out(f"{visible(name)}: {word}" if changed else f"{visible(name)}: was {word} already")


def _settings(texts: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Values by offer and option; the offer may have a space in its name."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        offer, dot, option = place.rpartition(".")
        if not (equals and dot and offer and option):
            raise click.UsageError(f"--set {text!r} is not OFFER.OPTION=VALUE")
        found.setdefault(offer, {})[option.removeprefix("--").replace("-", "_")] = value
    return found


def _conclude(name: str, clauses: list[Clause]) -> None:
    """Fail when a clause does.

    Raises:
        PluginError: names the first clause that fails.
    """
    failed = [clause for clause in clauses if clause.verdict == "FAILS"]
    if failed:
        first = failed[0]
        raise PluginError(
            f"plugin {name!r} fails {len(failed)} of {counted(len(clauses), 'clause')}, first: "
            f"{first.subject}: {first.rule}: {first.reason}"
        )
    open_ = sum(clause.verdict == "not checked" for clause in clauses)
    screen.say(f"{counted(len(clauses) - open_, 'clause')} hold, {open_} not checked")
