"""An analysis's keyword-only parameters, read as options a command line can offer."""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from circuitlab.errors import OptionError

#: Flags every command of a plugin has; its options cannot use these names.
COMMON = frozenset(
    {
        "model", "device", "dtype", "seed", "revision", "offline", "trust_remote_code",
        "allow_pickle", "json", "quiet", "progress", "color", "dry_run", "config",
        "debug_traceback", "remote", "log_level", "timeout", "help",
    }
)  # fmt: skip
#: Those of every analysis.
COMMON_TO_ANALYSES = COMMON | {
    "task", "task_file", "clean", "corrupt", "answer", "wrong", "metric", "align", "n_prompts",
    "allow_weak", "output", "force", "annotate", "fail_under", "resume", "run", "shard",
}  # fmt: skip

_SCALARS: tuple[type, ...] = (int, float, str, bool, Path)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an analysis.

    Attributes:
        name: The parameter's name, in snake_case.
        types: Scalar types it accepts, of int, float, str, bool and Path; bool stands alone.
        choices: Words it accepts beside them.
        optional: Whether None is accepted, which leaving the flag out gives.
        default: Value when it is not given.
        help: What it does.
    """

    name: str
    types: tuple[type, ...]
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """``--kebab-case``."""
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value a text means.

        Raises:
            OptionError: it fits none of the types and choices.
        """
        if text in self.choices:
            return text
        for kind in self.types:
            try:
                value = _truth(text) if kind is bool else kind(text)
            except ValueError:
                continue
            if self.accepts(value):
                return value
        raise OptionError(f"{self.flag} {text!r} is not {self.expected}")

    @property
    def expected(self) -> str:
        """What it accepts, for people."""
        words = {int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
        words[bool] = "true or false"
        return " or ".join([*(words[kind] for kind in self.types), *self.choices])

    def accepts(self, value: object) -> bool:
        """Whether a Python value fits."""
        if value is None:
            return self.optional
        if isinstance(value, bool):
            return bool in self.types
        if isinstance(value, float) and not math.isfinite(value):
            return False
        allowed = (*self.types, int) if float in self.types else self.types
        return value in self.choices or isinstance(
            value, tuple(k for k in allowed if k is not bool)
        )


def read_options(
    function: Callable[..., Any], called: tuple[str, ...] = ("model", "task")
) -> tuple[Option, ...]:
    """The options of a plugin's function.

    Args:
        function: An analysis, or a command.
        called: Names of what it is given by position.

    Raises:
        TypeError: a parameter has no default, a type that is no option's, or a common flag's name.
    """
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    name = getattr(function, "__name__", repr(function))
    several = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if len(positional) != len(called) or several:
        given = ", ".join(called)
        raise TypeError(f"{name} must be called as {name}({given}, *, option=default, ...)")
    if positional[-1].default not in (inspect.Parameter.empty, None):
        raise TypeError(f"{name}: its {called[-1]} is given or not; no default but None is right")
    options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    taken = COMMON_TO_ANALYSES if "task" in called else COMMON
    return tuple(_read_option(function, parameter, taken) for parameter in options)


def check_values(options: tuple[Option, ...], values: dict[str, Any], owner: str) -> None:
    """Refuse unknown options and values of the wrong type.

    Raises:
        OptionError: names the option, what was given, and what is accepted.
    """
    known = {option.name: option for option in options}
    for name, value in values.items():
        if name not in known:
            raise OptionError(
                f"{owner} has no option {name!r}; its options are {', '.join(known) or 'none'}"
            )
        if not known[name].accepts(value):
            raise OptionError(f"{owner}: {name}={value!r} is not {known[name].expected}")


def _read_option(
    function: Callable[..., Any], parameter: inspect.Parameter, taken: frozenset[str]
) -> Option:
    label = f"parameter {parameter.name!r}"
    if parameter.default is inspect.Parameter.empty:
        raise TypeError(f"{label} needs a default")
    if parameter.name in taken:
        raise TypeError(f"{label} is a flag that every command has; choose another name")
    annotation = _evaluate(function, parameter)
    text = ""
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        text = next((note for note in notes if isinstance(note, str)), "")
    types_, choices, optional = _parts(annotation, label)
    if bool in types_ and (len(types_) > 1 or choices):
        raise TypeError(f"{label} mixes bool with other types")
    option = Option(parameter.name, types_, choices, optional, parameter.default, text)
    if not option.accepts(parameter.default):
        raise TypeError(f"{label} has default {parameter.default!r}, not {option.expected}")
    return option


def _parts(annotation: Any, label: str) -> tuple[tuple[type, ...], tuple[str, ...], bool]:
    """Scalar types, literal words, and whether None is among them."""
    scalars: list[type] = []
    words: list[str] = []
    optional = False
    unions = (Union, types.UnionType)
    for part in get_args(annotation) if get_origin(annotation) in unions else (annotation,):
        if part is type(None):
            optional = True
        elif get_origin(part) is Literal and all(isinstance(w, str) for w in get_args(part)):
            words += get_args(part)
        elif part in _SCALARS:
            scalars.append(part)
        else:
            raise TypeError(
                f"{label} has type {part!r}; options are int, float, str, bool, Path, Literal of "
                f"words, or a union of these"
            )
    # A number is tried before text, which accepts anything.
    return tuple(sorted(scalars, key=_SCALARS.index)), tuple(words), optional


def _truth(text: str) -> bool:
    words = {"true": True, "false": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _evaluate(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation as an object; only this one, so that names for type checkers do no harm."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return type(parameter.default)
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(function.__module__)
    try:
        return eval(annotation, vars(module) if module else {})  # noqa: S307  (the plugin's own code)
    except NameError as error:
        raise TypeError(
            f"parameter {parameter.name!r} has type {annotation!r}: {error}; import it at run time"
        ) from error
