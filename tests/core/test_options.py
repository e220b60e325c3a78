"""Options: read from a signature, parsed from text, checked as values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

import pytest

from circuitlab import OptionError
from circuitlab.options import COMMON, COMMON_TO_ANALYSES, Option, check_values, read_options

if TYPE_CHECKING:
    from nowhere import Unknown

    from circuitlab import CircuitGraph, Task, TracedModel


def analysis(
    model: TracedModel,
    task: Task,
    *,
    method: Annotated[Literal["eap", "eap-ig"], "how"] = "eap",
    top: Annotated[int | Literal["all"], "how many"] = 40,
    threshold: float | None = None,
    old: Optional[Union[int, float]] = None,  # noqa: UP007, UP045  (written as older code does)
    quick: bool = False,
    where: Path = Path("."),
    label: str = "",
    bare=3,
) -> CircuitGraph:
    """Does nothing."""
    raise NotImplementedError


OPTIONS = {option.name: option for option in read_options(analysis)}


def test_names_for_type_checkers_do_no_harm() -> None:
    """Annotations under TYPE_CHECKING elsewhere in the signature are never evaluated."""
    assert "TracedModel" not in globals()
    assert list(OPTIONS) == [
        *("method", "top", "threshold", "old", "quick", "where", "label", "bare"),
    ]


@pytest.mark.parametrize(
    ("name", "types", "choices", "optional", "text"),
    [
        ("method", (), ("eap", "eap-ig"), False, "how"),
        ("top", (int,), ("all",), False, "how many"),
        ("threshold", (float,), (), True, ""),
        ("old", (int, float), (), True, ""),
        ("quick", (bool,), (), False, ""),
        ("where", (Path,), (), False, ""),
        ("label", (str,), (), False, ""),
        ("bare", (int,), (), False, ""),
    ],
)
def test_annotation_is_read(
    name: str, types: tuple[type, ...], choices: tuple[str, ...], optional: bool, text: str
) -> None:
    """Types, words, None and help text come out of every spelling."""
    option = OPTIONS[name]
    assert (option.types, option.choices, option.optional, option.help) == (
        *(types, choices, optional, text),
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("method", "eap-ig", "eap-ig"),
        ("top", "12", 12),
        ("top", "all", "all"),
        ("threshold", "1e-3", 1e-3),
        ("threshold", "2", 2.0),
        ("old", "2", 2),
        ("old", "2.5", 2.5),
        ("quick", "false", False),
        ("quick", "True", True),
        ("where", "a/b", Path("a/b")),
        ("label", "all", "all"),
    ],
)
def test_text_is_parsed(name: str, text: str, value: object) -> None:
    """Words first, then the narrowest type that fits."""
    found = OPTIONS[name].parse(text)
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("method", "EAP", "eap or eap-ig"),
        ("top", "1.5", "a whole number or all"),
        ("threshold", "x", "a finite number"),
        ("threshold", "None", "a finite number"),
        ("threshold", "nan", "a finite number"),
        ("quick", "maybe", "true or false"),
    ],
)
def test_text_that_does_not_fit(name: str, text: str, expected: str) -> None:
    """The flag, the text and what is accepted are named."""
    with pytest.raises(OptionError, match=f"^--{name} '{text}' is not {expected}$"):
        OPTIONS[name].parse(text)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("method", ["eap"], ["", "EAP", 1, None, True, ["eap"]]),
        ("top", [0, 10**9, "all"], ["most", 1.0, True, None]),
        ("threshold", [1, 0.5, None], ["0.5", False, float("nan"), float("inf")]),
        ("quick", [True, False], [0, 1, "yes", None]),
        ("where", [Path("x")], ["x", None]),
        ("label", ["", "x"], [1, None]),
    ],
)
def test_values_are_checked(name: str, good: list[Any], bad: list[Any]) -> None:
    """A Python value must have the very type; a bool is no number and a number no bool."""
    for value in good:
        check_values((OPTIONS[name],), {name: value}, "analysis 'x'")
    for value in bad:
        with pytest.raises(OptionError, match=f"analysis 'x': {name}="):
            check_values((OPTIONS[name],), {name: value}, "analysis 'x'")


def test_bool_is_named_in_errors() -> None:
    """What a switch accepts can be said."""
    with pytest.raises(OptionError, match="quick=1 is not true or false"):
        check_values((OPTIONS["quick"],), {"quick": 1}, "x")


def test_unknown_option_lists_options() -> None:
    """A misspelt option is answered with those there are."""
    with pytest.raises(OptionError, match="no option 'topp'; its options are method, top, thr"):
        check_values(tuple(OPTIONS.values()), {"topp": 1}, "analysis 'x'")
    with pytest.raises(OptionError, match="its options are none"):
        check_values((), {"top": 1}, "analysis 'x'")


def test_flag_is_kebab_case() -> None:
    """Underscores never reach the command line."""
    assert Option("ig_steps", (int,), (), False, 5, "").flag == "--ig-steps"


def unnamed(model, task, *, x):  # type: ignore[no-untyped-def]
    ...


def listed(model: object, task: object, *, x: list[int] = []) -> None: ...  # noqa: B006


def mixed(model: object, task: object, *, x: bool | int = 1) -> None: ...


def numbers(model: object, task: object, *, x: Literal[1, 2] = 1) -> None: ...


def wrong(model: object, task: object, *, x: int = "1") -> None: ...  # type: ignore[assignment]


def hidden(model: object, task: object, *, x: Unknown = 1) -> None: ...


def common(model: object, task: object, *, seed: int = 0) -> None: ...


def positional(model: object, task: object, top: int = 1) -> None: ...


def anything(model: object, task: object, **options: object) -> None: ...


def alone(model: object) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unnamed, "'x' needs a default"),
        (listed, "options are int, float, str, bool, Path, Literal of words"),
        (mixed, "mixes bool with other types"),
        (numbers, "Literal of words"),
        (wrong, "has default '1', not a whole number"),
        (hidden, "'Unknown'.*import it at run time"),
        (common, "'seed' is a flag that every command has"),
        (positional, r"must be called as positional\(model, task, \*"),
        (anything, r"must be called as anything\(model, task, \*"),
        (alone, r"must be called as alone\(model, task, \*"),
    ],
)
def test_signature_that_is_refused(function: Any, message: str) -> None:
    """A parameter that no command line could offer is named at registration."""
    with pytest.raises(TypeError, match=message):
        read_options(function)


def test_method_has_its_own_arguments() -> None:
    """A bound method is read like a function: its self is not counted."""

    class Holder:
        def run(self, model: object, task: object, *, top: int = 1) -> None: ...

    assert [option.name for option in read_options(Holder().run)] == ["top"]


def test_common_names_are_parameter_names() -> None:
    """Every reserved name can be a parameter; otherwise reserving it would do nothing."""
    assert all(name.isidentifier() for name in COMMON_TO_ANALYSES)
    assert {"model", "seed", "device", "dtype"} <= COMMON
    assert {"task", "output"} <= COMMON_TO_ANALYSES - COMMON
