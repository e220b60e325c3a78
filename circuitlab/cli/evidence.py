"""``circuitlab evaluate`` and ``circuitlab report``: what speaks for a circuit, and against it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from circuitlab.cli import flags, screen, thresholds
from circuitlab.cli.flags import option
from circuitlab.cli.installed import load_registry, warn_of_broken, warn_of_versions
from circuitlab.cli.stopping import stoppable

if TYPE_CHECKING:
    from circuitlab.evaluation.evidence import Evidence
    from circuitlab.registry import Registry
    from circuitlab.tasks import Task

REPORT_SCHEMA = "circuitlab-report/1"

#: Names that ``--fail-under`` takes, and where the results have them.
METRICS = {
    "faithfulness": "faithfulness.value",
    "faithfulness_low": "faithfulness.interval.0",
    "accuracy": "base_rates.accuracy",
    "percentile": "random_circuits.percentile",
}

EXAMPLES = """\b
Examples:
  circuitlab evaluate circuit.json
  circuitlab evaluate circuit.json --task-file held-out.json --fail-under faithfulness=0.8
  circuitlab report circuit.json --output report
"""


def _common() -> list[click.Parameter]:
    """What both commands take."""
    path = click.Path(path_type=Path)
    _, *running = flags.running("")
    return [
        click.Argument(["circuit"], type=path),
        option("-m", "--model", help="By default the circuit's own."),
        option("-t", "--task", help="Named task, or a task file; by default the circuit's own."),
        option("-f", "--task-file", type=path, help="The file of the task it was found on."),
        option("--held-out", type=path, help="Task file with pairs to score it on."),
        option("--ablation", type=click.Choice(("counterfactual", "zero", "mean")),
               help="What stands outside the circuit; by default what it was found with."),
        option("--level", type=click.Choice(("edge", "node")), default="edge", show_default=True,
               help="What the circuit is a set of."),
        option("--n-controls", type=click.IntRange(min=1), default=100, show_default=True,
               help="Random circuits to hold it against."),
        option("--resamples", type=click.IntRange(min=1), default=2000, show_default=True,
               help="Bootstrap resamples of each interval."),
        option("--quick", is_flag=True, help="Only what is cheap; at most 20 random circuits."),
        option("--thorough", is_flag=True, help="Also what is dear."),
        option("--batch-size", type=click.IntRange(min=1), help="Pairs per pass; else by memory."),
        option("--fail-under", multiple=True, metavar="NAME=X",
               help="Exit 7 when a number of the result is below X."),
        *running,
        *flags.showing(),
    ]  # fmt: skip


def _evaluate(**values: Any) -> None:
    flags.heed(values)
    output: Path | None = values["output"]
    if values["dry_run"]:
        flags.show_settings("evaluate", "command")
        return
    asked = thresholds.read(values["fail_under"], METRICS)
    if output is not None:
        from circuitlab.report.writing import check_results

        check_results(output)
    evidence = _measure(values)
    if output is not None:
        from circuitlab.report.writing import write_results

        write_results(evidence.results, output)
    if values["json"]:
        screen.out(json.dumps(evidence.results, allow_nan=False))
    else:
        _show(evidence, {"written": str(output)} if output is not None else {})
    sys.stdout.flush()
    thresholds.hold(asked, lambda name: _number(evidence.results, METRICS[name]))


def _report(**values: Any) -> None:
    flags.heed(values)
    folder: Path = values["output"]
    if values["dry_run"]:
        flags.show_settings("report", "command")
        return
    asked = thresholds.read(values["fail_under"], METRICS)
    from circuitlab.report.writing import check_folder

    check_folder(folder, force=values["force"])
    started = datetime.now(UTC)
    evidence = _measure(values)
    from circuitlab.report.record import reproduction
    from circuitlab.report.writing import write_report

    given = {name: value for name, value in _given().items() if name not in _NOT_REPEATED}
    with screen.progress(), screen.quiet_stdout():
        warnings = write_report(
            evidence,
            folder,
            reproduce=reproduction(evidence, _task_file(values), given),
            argv=["circuitlab", *sys.argv[1:]],
            settings={name: _plain(value) for name, value in values.items()},
            started=started,
            force=values["force"],
        )
    for warning in warnings:
        screen.warn(warning)
    if values["json"]:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        document = {
            "schema": REPORT_SCHEMA,
            "folder": str(folder),
            "files": files,
            "verdict": evidence.results["verdict"],
            "faithfulness": evidence.results["faithfulness"],
            "warnings": [*evidence.results["warnings"], *warnings],
        }
        screen.out(json.dumps(document, allow_nan=False))
    else:
        _show(evidence, {"written": str(folder), "next": f"open {folder / 'report.html'}"})
    sys.stdout.flush()
    thresholds.hold(asked, lambda name: _number(evidence.results, METRICS[name]))


_path = click.Path(path_type=Path)
_SETTINGS = {"help_option_names": ["-h", "--help"]}

evaluate = click.Command(
    "evaluate",
    callback=_evaluate,
    params=[
        *_common(),
        option("-o", "--output", type=_path, help="File for all results, .json."),
    ],
    help="Measure how much of the behaviour CIRCUIT keeps, beside controls, on pairs it never saw.",
    epilog=EXAMPLES,
    context_settings=_SETTINGS,
)
report = click.Command(
    "report",
    callback=_report,
    params=[
        *_common(),
        option("-o", "--output", type=_path, required=True, help="Folder to write."),
        option("--force", is_flag=True, help="Replace an older report."),
    ],
    help="Evaluate CIRCUIT and write a report: a page, Markdown, results, figures, a run record.",
    epilog=EXAMPLES,
    context_settings=_SETTINGS,
)


def _measure(values: dict[str, Any]) -> Evidence:
    """The evidence that the flags ask for."""
    from circuitlab.export import read_circuit

    circuit = read_circuit(values["circuit"])
    registry = load_registry()
    warn_of_broken(registry)
    warn_of_versions()
    task = _task(registry, values)
    held_out = None
    if values["held_out"] is not None:
        from circuitlab.task_files import read_task

        held_out = read_task(values["held_out"])
    with screen.progress() as listener, screen.quiet_stdout():
        from circuitlab.evaluation.evidence import evaluate_circuit
        from circuitlab.evaluation.subject import check_subject, recorded_model
        from circuitlab.progress import listening

        check_subject(circuit, task, registry)
        model = dict(values)
        if values["model"] is None:
            name, dtype, revision = recorded_model(circuit, on_host=bool(values["remote"]))
            model["model"] = name
            if "dtype" not in _given() and not values["remote"]:
                model["dtype"] = dtype
            model["revision"] = values["revision"] or revision
        with listening(stoppable(listener), screen.warn):
            return evaluate_circuit(
                circuit,
                flags.load(model, registry),
                task,
                held_out=held_out,
                registry=registry,
                **{name: values[name] for name in _PASSED},
            )


#: Flags that go to ``evaluate_circuit`` as they are.
_PASSED = (
    "ablation", "level", "n_controls", "resamples", "quick", "thorough", "seed", "batch_size",
)  # fmt: skip
#: Flags that say nothing about the numbers, or are told otherwise.
_NOT_REPEATED = (
    "circuit", "output", "force", "json", "quiet", "progress", "color", "debug_traceback",
    "dry_run", "task", "task_file", "fail_under", "config",
)  # fmt: skip


def _task(registry: Registry, values: dict[str, Any]) -> Task | str | None:
    path = _task_file(values)
    if path is not None:
        from circuitlab.task_files import read_task

        return read_task(path)
    return registry.task(values["task"]) if values["task"] else None


def _task_file(values: dict[str, Any]) -> Path | None:
    """The task file that the flags name."""
    name, path = values["task"], values["task_file"]
    if name and path:
        raise click.UsageError("give one of --task and --task-file")
    return Path(name) if name and Path(name).suffix else path


def _given() -> dict[str, Any]:
    """Values of the flags that were given, not left at their defaults."""
    ctx = click.get_current_context()
    return {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _show(evidence: Evidence, end: dict[str, str]) -> None:
    from circuitlab.report.summary import summary

    title = f"{evidence.subject.model.name} · {evidence.subject.task.name} · evidence"
    screen.pairs(title, {**summary(evidence.results), **end})


def _number(results: dict[str, Any], path: str) -> float | None:
    from circuitlab.errors import GraphError
    from circuitlab.report.telling import look_up

    share = results["faithfulness"]
    if path == METRICS["faithfulness_low"] and share["interval"] is None and share["n_pairs"] > 1:
        path = METRICS["faithfulness"]  # all pairs give the same share
    try:
        found = look_up(results, path)
    except GraphError:
        return None
    return None if found is None else float(found)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
