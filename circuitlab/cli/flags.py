"""Flags: the options of a plugin's function as click reads them, and those commands share."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from circuitlab.cli import screen
from circuitlab.errors import OptionError, TaskError
from circuitlab.options import Option

if TYPE_CHECKING:
    from circuitlab.model import TracedModel
    from circuitlab.registry import Registry

#: What ``--remote`` alone means: nnsight's own setting.
NDIF = "ndif"
#: Below this many weights a second thread costs more in waiting than it does work.
ONE_THREAD = 5_000_000


class AnalysisOption(click.ParamType[Any]):
    """An analysis's option as click reads it: any of its types, or one of its words."""

    def __init__(self, option: Option) -> None:
        self.option = option
        self.name = "|".join([*(kind.__name__.upper() for kind in option.types), *option.choices])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value that a text means, or a usage error that says what is accepted."""
        if not isinstance(value, str):
            if self.option.accepts(value):
                return value
            value = str(value)
        try:
            return self.option.parse(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)


def click_option(option: Option) -> click.Option:
    """A function's option as a flag."""
    settings: dict[str, Any] = {
        "default": option.default,
        "help": option.help or None,
        "show_default": option.default is not None,
        "envvar": f"CIRCUITLAB_{option.name.upper()}",
    }
    if option.types == (bool,):
        return click.Option([f"{option.flag}/--no-{option.flag[2:]}"], **settings)
    kind = AnalysisOption(option)
    # Upper case would be wrong for the words among the choices.
    return click.Option([option.flag], type=kind, metavar=kind.name, **settings)


def option(*names: str, **settings: Any) -> click.Option:
    """A flag that may also stand in the environment."""
    flag = max(names, key=len).split("/")[0].lstrip("-").replace("-", "_")
    settings.setdefault("envvar", f"CIRCUITLAB_{flag.upper()}")
    return click.Option(list(names), **settings)


def running(default_model: str) -> list[click.Option]:
    """The flags that say what is run, and on what; ``--model`` first."""
    return [
        option("-m", "--model", default=default_model, show_default=True,
               help="Bundled name, folder, or hub id."),
        option("--seed", default=0, show_default=True, help="For what is drawn at random."),
        *loading(),
    ]  # fmt: skip


def loading() -> list[click.Option]:
    """The flags that say how a model is loaded."""
    return [
        option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
        option("--device-map", metavar="WORD|FILE",
               help="Spread the weights over devices: auto, balanced, sequential, or a JSON file "
                    "with a device for each part. Needs accelerate."),
        option("--offload", type=click.Path(path_type=Path), metavar="FOLDER",
               help="Where weights go that fit into no memory; alone, --device-map is auto."),
        option("--dtype", type=click.Choice(("float32", "bfloat16", "float16", "float64")),
               default="float32", show_default=True, help="Type the weights are loaded in."),
        option("--revision", help="Commit, branch or tag of a hub model."),
        option("--offline", is_flag=True, help="Never ask the hub."),
        option("--remote", is_flag=False, flag_value=NDIF, metavar="[HOST]",
               help="Run on a host that has the model: NDIF, or this address."),
        option("--remote-key", metavar="MODEL", help="What the host calls the model."),
        option("--timeout", type=click.FloatRange(min=0, min_open=True), default=3600.0,
               show_default=True, metavar="SECONDS", help="Longest wait for one remote job."),
        option("--trust-remote-code", is_flag=True, help="Run code the model carries."),
        option("--allow-pickle", is_flag=True, help="Read weights from a pickle."),
    ]  # fmt: skip


def showing() -> list[click.Option]:
    """The flags that say where settings are from and what is shown."""
    path = click.Path(path_type=Path)
    return [
        option("--config", type=path, is_eager=True, expose_value=False, callback=_read_config,
               help="TOML file with any of these flags."),
        option("--dry-run", is_flag=True, help="Show every setting and where it is from; stop."),
        option("--json", is_flag=True, help="The result as one JSON document on stdout."),
        option("-q", "--quiet", is_flag=True, help="Only errors on stderr."),
        option("--progress/--no-progress", default=True, help="Show progress."),
        option("--color/--no-color", default=True, help="Colours on a terminal."),
        option("--debug-traceback", is_flag=True, help="Show the traceback of an error."),
    ]  # fmt: skip


def heed(values: dict[str, Any]) -> None:
    """Take the flags about the screen to heart."""
    screen.Screen.quiet = values["quiet"]
    screen.Screen.progress = values["progress"]
    screen.Screen.color = screen.Screen.color and values["color"]


def load(values: dict[str, Any], registry: Registry, job_log: Path | None = None) -> TracedModel:
    """The model that the flags name; ids of remote jobs are kept in ``job_log``."""
    settings = how_to_load(values)
    screen.say(f"loading {values['model']} …")
    from circuitlab.loading import load_model

    model = load_model(values["model"], **settings, job_log=job_log, registry=registry)
    if model.n_parameters < ONE_THREAD:
        importlib.import_module("torch").set_num_threads(1)
    revision = f" at {model.revision}" if model.revision else ""
    screen.say(f"{model!r}{revision}")
    return model


def how_to_load(values: dict[str, Any]) -> dict[str, Any]:
    """What the flags of :func:`loading` mean to ``load_model``; from now on the hub is not asked.

    The latter where ``--offline`` says so.
    """
    remote = values["remote"]
    if values["offline"]:
        _go_offline()
    if remote and values["offline"]:
        raise OptionError("--remote asks a host, and --offline asks nobody; leave one of them out")
    same = ("device", "dtype", "revision", "trust_remote_code", "allow_pickle", "offload",
            "remote_key", "timeout")  # fmt: skip
    return {
        **{name: values[name] for name in same},
        "device_map": _device_map(values["device_map"]),
        "remote": True if remote == NDIF else remote or False,
    }


def _device_map(text: str | None) -> Any:
    """A word, or what a JSON file holds."""
    if text is None or not text.endswith(".json"):
        return text
    try:
        found = json.loads(Path(text).read_text("utf-8"))
    except OSError as error:
        raise OptionError(f"--device-map {text!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OptionError(f"--device-map {text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"--device-map {text!r} holds no object; give a device for each part")
    return found


def _go_offline() -> None:
    """Have the hub's library ask nobody; it looks at its variable once, when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:
        vars(importlib.import_module("huggingface_hub.constants"))["HF_HUB_OFFLINE"] = True


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Take a TOML file's values as defaults; an unknown key is refused."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise TaskError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TaskError(f"config {str(path)!r} is not TOML: {error}") from error
    flags = {(p.name or "").replace("_", "-"): p for p in ctx.command.params}
    for key, value in values.items():
        flag = flags.get(key.replace("_", "-"))
        if flag is None:
            near = difflib.get_close_matches(key, flags, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"flags are {', '.join(flags)}"
            raise TaskError(f"config {str(path)!r}: no flag is called {key!r}; {hint}")
        # click would take a text given where several values may stand for a list of letters.
        several = flag.multiple and not isinstance(value, list)
        ctx.default_map = {
            **(ctx.default_map or {}),
            flag.name or key: [value] if several else value,
        }


def show_settings(command: str, what: str) -> None:
    """Print every setting of the command that is running, and where it is from."""
    ctx = click.get_current_context()
    origins = {
        ParameterSource.COMMANDLINE: "flag",
        ParameterSource.ENVIRONMENT: "environment",
        ParameterSource.DEFAULT_MAP: "config file",
        ParameterSource.DEFAULT: "default",
    }
    rows = [(what, command, "command")]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in ctx.params or name in ("dry_run", "help"):
            continue
        value = ctx.params[name]
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        source = ctx.get_parameter_source(name)
        origin = origins.get(source, "default") if source else "default"
        rows.append((name.replace("_", "-"), shown, origin))
    screen.table(("setting", "value", "from"), rows)
    sys.stdout.flush()
