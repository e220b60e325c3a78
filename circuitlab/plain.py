"""Plain records: frozen dataclasses that check their fields by their types, and are JSON.

What a stranger's file holds becomes a record or an error, never a crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from circuitlab.errors import GraphError
from circuitlab.labels import excerpt

#: Largest size of a number: beyond it no axis holds.
LARGEST = 1e100
#: Whole numbers below it are floats too.
EXACT = 2**53
#: Values that one record holds at most.
MAX_VALUES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Record:
    """A frozen dataclass whose fields hold what their types say.

    The types are str, bool, float, other records, None, Literal, and sequences and mappings of
    these. Sequences become tuples. A float is any finite real number; a whole one stays an int.

    Raises:
        GraphError: a field holds something else.
    """

    noun: ClassVar[str]

    def __post_init__(self) -> None:
        name = getattr(self, "title", getattr(self, "name", ""))
        record: Any = type(self)
        try:
            for field in fields(self):
                value = _checked(getattr(self, field.name), _types(record)[field.name])
                object.__setattr__(self, field.name, value)
            self._check()
        except _UnfitError as error:
            reason = f"{field.name} has {error}"
        except ValueError as error:
            reason = str(error)
        else:
            return
        named = f" {excerpt(name)!r}" if isinstance(name, str) else ""
        raise GraphError(f"{self.noun}{named}: {reason}")

    def _check(self) -> None:
        """Check how the fields go together.

        Raises:
            ValueError: says what is wrong and what to do.
        """

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON; those that have their default are left out."""
        return {
            field.name: _plain(value)
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The record that :meth:`to_json` wrote.

        Raises:
            GraphError: the data have another form.
        """
        if not isinstance(data, Mapping):
            raise GraphError(f"a {cls.noun} is a {type(data).__name__} and not an object")
        known = {field.name: field for field in fields(cls)}
        if unknown := [str(name) for name in data if name not in known]:
            raise GraphError(f"a {cls.noun} has no {excerpt(unknown[0])!r}")
        needed = [name for name, field in known.items() if field.default is MISSING]
        if missing := [name for name in needed if name not in data]:
            raise GraphError(f"a {cls.noun} lacks {', '.join(missing)}")
        return cls(**data)


def few(n: int, what: str) -> None:
    """Refuse more values than memory and the eye hold.

    Raises:
        ValueError: there are more than :data:`MAX_VALUES`.
    """
    if n > MAX_VALUES:
        raise ValueError(f"it has {n:,} {what}, more than {MAX_VALUES:,}; leave some out")


def shaped(table: Sequence[Sequence[Any]], n_rows: int, n_columns: int, name: str) -> None:
    """Refuse a table of another shape.

    Raises:
        ValueError: says which shape it has.
    """
    if len(table) != n_rows:
        raise ValueError(f"{name} has {len(table)} rows, not {n_rows}; give one for each")
    for row in table:
        if len(row) != n_columns:
            raise ValueError(
                f"{name} has a row of {len(row)}, not {n_columns}; give a cell for each column"
            )


class _UnfitError(Exception):
    """A value that does not have its field's type; the text says what it is."""


@cache
def _types(record: type[Any]) -> dict[str, Any]:
    return get_type_hints(record)


def _checked(value: object, kind: Any) -> Any:
    """The value as plain data of a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        if isinstance(value, str) and str in args:
            return value
        (kind,) = [one for one in args if one not in (str, type(None))]
        return _checked(value, kind)
    if origin is Sequence:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise _UnfitError(
                f"a {type(value).__name__} and not a list; of a tensor, give .tolist()"
            )
        return tuple(_checked(one, args[0]) for one in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _UnfitError(f"a {type(value).__name__} and not a mapping")
        return {_checked(name, args[0]): _checked(one, args[1]) for name, one in value.items()}
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise _UnfitError(f"{excerpt(str(value))!r}; give one of {', '.join(args)}")
        return value
    return _single(value, kind)


def _single(value: object, kind: Any) -> Any:
    """A text, a truth value, a number or a record."""
    if kind is float:
        return _number(value)
    if isinstance(value, kind):
        return value
    if issubclass(kind, Record) and isinstance(value, Mapping):
        return kind.from_json(value)
    noun = {str: "text", bool: "true or false"}.get(kind, kind.__name__)
    raise _UnfitError(f"a {type(value).__name__} where {noun} must be")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _UnfitError(f"a {type(value).__name__} where a number must be")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not abs(number) <= LARGEST:
        raise _UnfitError(f"a number that is not finite, or above {LARGEST:g}; leave it out")
    return number if abs(number) < EXACT else float(number)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value
