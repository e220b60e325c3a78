"""``circuitlab trace``: one command for each installed analysis, its options from its signature."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from circuitlab.cli import flags, result, screen, thresholds
from circuitlab.cli.flags import option
from circuitlab.cli.installed import load_registry, warn_of_broken, warn_of_versions
from circuitlab.cli.runs import MERGE, place
from circuitlab.cli.stopping import resumable, stoppable
from circuitlab.cli.suggesting import Suggesting
from circuitlab.errors import CircuitLabError, OptionError
from circuitlab.export import check_target, write_circuit
from circuitlab.registry import DEFAULT_ANALYSIS, Analysis, Registry
from circuitlab.shards import ShardDone, check_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from circuitlab.checkpoint import StateFile
    from circuitlab.graph import CircuitGraph
    from circuitlab.tasks import Task

METRICS = ("logit-difference", "answer-log-prob", "kl-divergence")

EPILOG = """\b
Examples:
  circuitlab trace --model ioi-mini --output circuit.svg
  circuitlab trace --model induction --method eap --top 60 --output a.json --output a.pdf
  circuitlab trace --model ./gpt2 --clean "..." --corrupt "..." --answer " Mary" --wrong " John"
"""


class TraceGroup(Suggesting):
    """Installed analyses as commands; without a name, the default one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._registry: Registry | None = None

    @property
    def registry(self) -> Registry:
        """The installed plugins, loaded once."""
        if self._registry is None:
            self._registry = load_registry()
        return self._registry

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The analysis named; where there is none, broken plugins may be the reason."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            warn_of_broken(self.registry)
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put in the default analysis where none is named."""
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = [DEFAULT_ANALYSIS, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all analyses, the default first."""
        return sorted(self.registry.analyses, key=lambda name: (name != DEFAULT_ANALYSIS, name))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of one analysis."""
        if name in self.registry.analyses:
            return _command(self.registry, self.registry.analyses[name])
        failed = self.registry.plugins.get(name)
        if failed is not None and failed.failure:
            self.registry.analysis(name)  # raises: it was asked for
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Every analysis with its summary, and its options under it."""
        warn_of_broken(self.registry)
        for name in self.list_commands(ctx):
            analysis = self.registry.analyses[name]
            default = " (the default)" if name == DEFAULT_ANALYSIS else ""
            with formatter.section(f"{name}{default}"):
                if analysis.summary:
                    formatter.write_text(analysis.summary)
                rows = [
                    r for o in analysis.options if (r := flags.click_option(o).get_help_record(ctx))
                ]
                if rows:
                    formatter.write_dl(rows)
        formatter.write_paragraph()
        formatter.write_text(
            f"Options of every analysis: circuitlab trace {DEFAULT_ANALYSIS} --help"
        )


trace = TraceGroup(
    name="trace",
    help="Find a circuit: run an analysis of a model on a task.",
    epilog=EPILOG,
    subcommand_metavar="[ANALYSIS] [OPTIONS]",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(registry: Registry, analysis: Analysis) -> click.Command:
    """The command of one analysis: its own options first, then those every analysis has."""

    def run(**values: Any) -> None:
        _trace(registry, analysis, values)

    return click.Command(
        analysis.name,
        callback=run,
        params=[*(flags.click_option(option) for option in analysis.options), *_common()],
        help=analysis.summary,
        epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _common() -> list[click.Option]:
    """The flags every analysis has."""
    path = click.Path(path_type=Path)
    model, *running = flags.running("ioi-mini")
    return [
        model,
        option("-t", "--task", help="Named task, or a task file; by default the model's own."),
        option("-f", "--task-file", type=path, help="Task file: .json .jsonl .csv .toml"),
        option("--clean", help="Clean prompt of a single pair."),
        option("--corrupt", help="Its corrupt prompt."),
        option("--answer", multiple=True, help="Right next token; may be repeated."),
        option("--wrong", multiple=True, help="Wrong next token; may be repeated."),
        option("--metric", type=click.Choice(METRICS), help="Instead of the task's own."),
        option("--align", type=click.Choice(("refuse", "pad", "drop")),
               help="Pairs whose prompts differ in length."),
        option("--n-prompts", type=click.IntRange(min=1), help="Use only the first pairs."),
        option("--allow-weak", is_flag=True, help="Go on when the effect is within its noise."),
        option("-o", "--output", type=path, multiple=True,
               help="File to write; the suffix names the format. May be repeated."),
        option("--annotate", multiple=True, help="Plugin that annotates the finished circuit."),
        option("--resume", type=path,
               help="Keep the state of the run in this file; go on from what is there."),
        option("--run", type=path,
               help="Keep command and state of the run in this folder; go on from what is there."),
        option("--shard", metavar="I/N",
               help="Do only part I of N, in the folder of --run; merge puts the parts together."),
        option("--force-new", is_flag=True, envvar=None,
               help="Begin the kept run anew, whatever is in the file or folder."),
        option("--fail-under", multiple=True, metavar="NAME=X",
               help="Exit 7 when a metric of the result is below X."),
        *running,
        *flags.showing(),
    ]  # fmt: skip


def _trace(registry: Registry, analysis: Analysis, values: dict[str, Any]) -> None:
    """Resolve the settings, run the analysis, write the files, show the result."""
    flags.heed(values)
    warn_of_broken(registry)
    warn_of_versions()
    if values["dry_run"]:
        flags.show_settings(analysis.name, "analysis")
        return
    # Everything that can be refused without loading a model is refused first.
    asked = thresholds.read(values["fail_under"], result.METRIC_NAMES)
    registry.check_annotators(values["annotate"])
    for path in values["output"]:
        check_target(path, registry.exporters)
        if values["resume"] is not None and path.resolve() == values["resume"].resolve():
            raise OptionError(f"--output and --resume both name {str(path)!r}; name two files")
    task = _task(registry, values)
    if values["shard"] not in (None, MERGE):
        given = {option.name: values[option.name] for option in analysis.options}
        check_shards(analysis, given, registry.analyses.values())
    where = place(values)
    values = {**values, "resume": where.state}
    # The state is there until the result is written: what took hours may meet a full disk.
    with resumable(where.state, where.shard, anew=where.anew) as state:
        where.gather(state)
        with screen.progress() as listener, screen.quiet_stdout():
            circuit = _build(registry, analysis, task, values, state, listener)
            if circuit is None:
                where.shard_done()
                return
            warnings = list(circuit.graph["warnings"])
            warnings += _write(circuit, values["output"], registry)
        run_id = uuid.uuid4().hex[:12]
        result.show(circuit, values["output"], warnings, run_id, as_json=values["json"])
    if (jobs := _job_log(values)) is not None:
        jobs.unlink(missing_ok=True)
    where.finish()
    thresholds.hold(asked, result.metrics(circuit).get)


def _write(circuit: CircuitGraph, paths: Sequence[Path], registry: Registry) -> list[str]:
    """Write every file that can be written, whichever one fails; warnings about them."""
    warnings: list[str] = []
    failed: CircuitLabError | None = None
    for path in paths:
        try:
            warnings += write_circuit(circuit, path, registry.exporters)
        except CircuitLabError as error:
            failed = failed or error
    for warning in warnings:
        screen.warn(warning)
    if failed is not None:
        raise failed
    return warnings


def _build(
    registry: Registry,
    analysis: Analysis,
    task: Task | None,
    values: dict[str, Any],
    state: StateFile,
    listener: Any,
) -> Any:
    """The circuit; None where this is a shard, and done."""
    from circuitlab.builder import build_circuit
    from circuitlab.progress import listening

    if state.complete:
        return None
    with suppress(ShardDone), listening(stoppable(listener), screen.warn, screen.say):
        model = flags.load(values, registry, _job_log(values))
        return build_circuit(
            model,
            task,
            analysis.name,
            metric=values["metric"],
            n_pairs=values["n_prompts"],
            align=values["align"],
            allow_weak=values["allow_weak"],
            annotate=values["annotate"],
            seed=values["seed"],
            resume=state,
            registry=registry,
            **{option.name: values[option.name] for option in analysis.options},
        )
    return None


def _job_log(values: dict[str, Any]) -> Path | None:
    """Where ids of remote jobs are kept: beside the state of the run."""
    state: Path | None = values["resume"]
    if state is None or not values["remote"]:
        return None
    return state.with_name(f"{state.name}.jobs")


def _task(registry: Registry, values: dict[str, Any]) -> Task | None:
    """The task the flags mean: a name, a file, or one pair; at most one of them."""
    pair = [values["clean"], values["corrupt"], values["answer"], values["wrong"]]
    ways = [values["task"], values["task_file"], any(pair)]
    if sum(map(bool, ways)) > 1:
        raise click.UsageError(
            "give one of --task, --task-file, or --clean with --corrupt and --answer"
        )
    if any(pair):
        from circuitlab.tasks import Task

        if not (values["clean"] and values["corrupt"] and values["answer"]):
            raise click.UsageError("a single pair needs --clean, --corrupt and --answer")
        return Task.from_pair(
            _prompt(values["clean"]),
            _prompt(values["corrupt"]),
            [_answer(text) for text in values["answer"]],
            [_answer(text) for text in values["wrong"]],
        )
    name = values["task"]
    path = values["task_file"] or (Path(name) if name and Path(name).suffix else None)
    if path is not None:
        from circuitlab.task_files import read_task

        return read_task(path)
    return registry.task(name) if name else None


def _prompt(text: str) -> str | list[int]:
    """Text, or token ids written as ``[3, 14, 15]``."""
    if text.startswith("[") and text.endswith("]"):
        parts = text[1:-1].replace(",", " ").split()
        if parts and all(part.isdecimal() for part in parts):
            return [int(part) for part in parts]
    return text


def _answer(text: str) -> str | int:
    """Text, or a token id written as ``[7]``."""
    ids = _prompt(text)
    return ids[0] if isinstance(ids, list) and len(ids) == 1 else text
