"""The command group and every command but ``trace``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from circuitlab.cli import screen
from circuitlab.cli.compare import compare
from circuitlab.cli.evidence import evaluate, report
from circuitlab.cli.flags import how_to_load, loading
from circuitlab.cli.plugins import plugins
from circuitlab.cli.runs import runs
from circuitlab.cli.suggesting import Suggesting
from circuitlab.errors import PluginError
from circuitlab.labels import visible

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


class Lazy(Suggesting):
    """A group whose ``trace``, and commands of plugins, are made only when they are asked for."""

    _offered: dict[str, click.Command] | None = None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, ``trace`` first, then plugins' and our own by name."""
        own = [name for name in super().list_commands(ctx) if name != "trace"]
        return ["trace", *sorted([*own, *self._plugins_commands()])]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command; the real ``trace`` unless only its help line is wanted."""
        if name == "trace":
            from circuitlab.cli.trace import trace

            return trace
        return super().get_command(ctx, name) or self._plugins_commands().get(name)

    def _plugins_commands(self) -> dict[str, click.Command]:
        if self._offered is None:
            from circuitlab.cli.actions import offered

            try:
                self._offered = offered()
            except PluginError as error:  # the others still have their help
                screen.warn(str(error))
                self._offered = {}
        return self._offered


EXAMPLES = """\b
Examples:
  circuitlab trace --model ioi-mini --output circuit.svg
  circuitlab trace --model ./my-gpt2 --task-file pairs.json --top 60 --output circuit.json
  circuitlab render circuit.json --output circuit.pdf
"""


def _built_in_alone(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Have every registry of this process know only our own plugins; plugins are loaded later."""
    if value:
        os.environ["CIRCUITLAB_NO_PLUGINS"] = "1"
        ctx.call_on_close(lambda: os.environ.pop("CIRCUITLAB_NO_PLUGINS", None))


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(package_name="circuitlab")
@click.option("--no-color", is_flag=True, envvar="CIRCUITLAB_NO_COLOR", help="No escape sequences.")
@click.option("--debug-traceback", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--no-plugins", is_flag=True, is_eager=True, expose_value=False, callback=_built_in_alone,
    help="Load only the plugins that come with CircuitLab.",
)  # fmt: skip
def circuitlab(no_color: bool, debug_traceback: bool) -> None:
    """Find which components of a transformer do the work, and through which edges."""
    if no_color:
        screen.Screen.color = False


circuitlab.add_command(plugins)
circuitlab.add_command(runs)
circuitlab.add_command(compare)
circuitlab.add_command(evaluate)
circuitlab.add_command(report)


@circuitlab.command()
@click.argument("circuit", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), multiple=True, required=True,
    help="File to write; its suffix names the format. May be given several times.",
)  # fmt: skip
@click.option("--top", type=click.IntRange(min=0), help="Draw only the strongest edges.")
def render(circuit: Path, output: tuple[Path, ...], top: int | None) -> None:
    """Draw or convert a circuit that was traced before."""
    from circuitlab.cli.installed import load_registry
    from circuitlab.export import check_target, read_circuit, write_circuit

    exporters = load_registry().exporters
    for path in output:
        check_target(path, exporters)
    graph = read_circuit(circuit)
    if top is not None:
        graph = graph.top(top)
    for path in output:
        for warning in write_circuit(graph, path, exporters):
            screen.warn(warning)
        screen.out(visible(str(path)))


@circuitlab.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """Show the bundled models; check or train one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_models)


@models.command("list")
def list_models() -> None:
    """One row for each bundled model."""
    from circuitlab import zoo

    rows = [(m.name, m.kind, m.shape, m.description) for m in zoo.MODELS.values()]
    screen.table(("model", "weights", "shape", "what it does"), rows)


@models.command("check", params=loading())
@click.argument("model")
def check_model(model: str, **values: Any) -> None:
    """Load MODEL and show its self-check."""
    _show_checks(model, values)


@models.command("train")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to save it in.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Fewer or more than the recipe's.")
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    help="Save it as it is after every so many steps too, in folders step-… of the folder.",
)
def train_model(
    model: str, output: Path | None, seed: int, steps: int | None, checkpoint_every: int | None
) -> None:
    """Train a bundled MODEL again by its recipe."""
    from circuitlab import zoo

    folder = output or Path(f"{model}-seed{seed}")
    if folder.exists():
        raise click.UsageError(f"folder {str(folder)!r} exists; give another with --output")
    with screen.progress() as listener:

        def show(step: int, total: int, values: dict[str, float]) -> None:
            listener(f"training {model}", step, total)

        def keep(step: int, module: GPT2LMHeadModel) -> None:
            zoo.save(module, zoo.tokenizer(model), folder / f"step-{step:06d}")

        module, tokenizer, metrics = zoo.train(
            model,
            seed=seed,
            steps=steps,
            progress=show,
            keep=keep if checkpoint_every else None,
            keep_every=checkpoint_every or 1,
        )
    zoo.save(module, tokenizer, folder)
    found = {name: f"{value:.4g}" for name, value in metrics.items()}
    screen.pairs(model, {**found, "saved in": str(folder)})


@circuitlab.group(invoke_without_command=True)
@click.pass_context
def tasks(ctx: click.Context) -> None:
    """Show named tasks; begin or check a task file."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_tasks)


@tasks.command("list")
def list_tasks() -> None:
    """One row for each named task."""
    from circuitlab.cli.installed import load_registry

    registry = load_registry()
    rows = [(t.name, str(len(t.pairs)), t.metric, t.description) for t in registry.tasks.values()]
    screen.table(("task", "pairs", "metric", "what the model has to do"), rows)


@tasks.command("show")
@click.argument("name")
def show_task(name: str) -> None:
    """Print the task NAME in the layout of a task file."""
    import json

    from circuitlab.cli.installed import load_registry

    registry = load_registry()
    screen.out(json.dumps(registry.task(name).to_json(), indent=1))


@tasks.command("init")
@click.argument("path", type=click.Path(path_type=Path))
def init_task(path: Path) -> None:
    """Write an example task file at PATH to start from."""
    from circuitlab.task_files import write_task
    from circuitlab.tasks import Task

    if path.exists():
        raise click.UsageError(f"{str(path)!r} exists; give another name")
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupt = "When Mary and John went to the store, Mary gave a drink to"
    write_task(Task.from_pair(clean, corrupt, " Mary", " John", name="my-task"), path)
    screen.out(visible(str(path)))


@tasks.command("validate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="Also check the prompts against this model's tokenizer.")
def validate_task(path: Path, model: str | None) -> None:
    """Check the task file at PATH."""
    from circuitlab.task_files import read_task

    task = read_task(path)
    values = {"task": task.name, "pairs": str(len(task.pairs)), "metric": task.metric}
    if model is not None:
        from circuitlab.loading import load_model

        with screen.quiet_stdout():
            pairs = load_model(model).encode(task)
        for warning in pairs.warnings:
            screen.warn(warning)
        values["positions"] = str(pairs.clean.ids.shape[1])
    screen.pairs("valid", values)


@circuitlab.command(params=loading())
@click.argument("model", required=False)
def doctor(model: str | None, **flags: Any) -> None:
    """Show what is installed and whether it works; with MODEL, its self-check too."""
    given = [name for name in flags if _on_command_line(name)]
    if model is None and given:
        flag = given[0].replace("_", "-")
        raise click.UsageError(f"--{flag} says how a model is loaded, and no MODEL is given")
    from circuitlab.cli.installed import load_registry, versions
    from circuitlab.render import graphviz_version

    values = {"python": sys.version.split()[0]}
    for package, found, tested in versions():
        values[package] = f"{found} (tested with {tested})" if tested else found
    values["graphviz"] = (
        graphviz_version() or "NOT FOUND: pictures use the built-in layout, SVG only"
    )
    torch = importlib.import_module("torch")
    values["devices"] = "cpu" + (f", cuda x{n}" if (n := torch.cuda.device_count()) else "")
    registry = load_registry()
    values["plugins"] = ", ".join(n for n, i in registry.plugins.items() if not i.failure)
    for info in registry.failed:
        values[f"plugin {info.name}"] = f"NOT LOADED: {info.failure}"
    for info in registry.off.values():
        values[f"plugin {info.name}"] = f"off: {info.off}"
    screen.pairs("CircuitLab", values)
    if model is not None:
        _show_checks(model, flags)


def _on_command_line(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def _show_checks(source: str, values: dict[str, Any]) -> None:
    """Load a model without refusing it, show every check, and fail when one does."""
    settings = how_to_load(values)
    from circuitlab.checks import require, run_checks
    from circuitlab.cli.installed import load_registry
    from circuitlab.loading import load_unchecked
    from circuitlab.progress import listening

    with (
        screen.progress() as listener,
        listening(listener, screen.warn),
        screen.quiet_stdout(),
    ):
        model, plain = load_unchecked(source, **settings)
        checks = run_checks(model, plain)
    rows = [
        ("holds" if c.passed else "FAILS", c.name, f"{c.difference:.1e}", f"{c.tolerance:.1e}")
        for c in checks
    ]
    screen.out(repr(model))
    screen.table(("", "check", "difference", "tolerance"), rows)
    require(model, checks)
    if model.architecture.blocks_only:
        works = ", ".join(load_registry().of_streams)
        screen.pairs(
            f"{model.architecture.family}: no plugin describes this family",
            {"known": "the stream between blocks", "works on it": works or "nothing installed"},
        )
