"""Hypothesis files: named sets of paths, read from TOML or from plain text."""

from __future__ import annotations

import pathlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from circuitlab import OptionError, ResourceError, Wiring
from circuitlab_path_patching.paths.language import Path, parse_paths

#: Largest file read; more than a hundred thousand paths fit.
MAX_BYTES = 16 * 2**20

_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")
_ENTRY = re.compile(r"^[ \t]*\[\[[ \t]*[\"']?hypothesis[\"']?[ \t]*\]\]", re.MULTILINE)


@dataclass(frozen=True)
class Hypothesis:
    """A claim that these paths alone carry the behaviour."""

    name: str
    paths: tuple[Path, ...]


def read_hypotheses(path: str | pathlib.Path, wiring: Wiring) -> list[Hypothesis]:
    """The hypotheses that a file states, in its order.

    * ``.toml``: tables ``[[hypothesis]]`` with ``name`` and ``paths``, a list of paths;
    * any other suffix: one hypothesis, called after the file, with a path on each line; what
      follows ``#`` is a comment.

    Paths are written in the path language, wildcards and all; each counts once.

    Raises:
        OptionError: the file is missing or malformed, or a path does not exist in ``wiring``; with
            file and line.
        ResourceError: the file may not be read.
    """
    path = pathlib.Path(path)
    text = _read(path)
    if path.suffix.lower() == ".toml":
        return _from_toml(path, text, wiring)
    lines = enumerate(text.split("\n"), 1)
    numbered = [(number, line.partition("#")[0].strip()) for number, line in lines]
    return [Hypothesis(path.stem, _paths(path, [p for p in numbered if p[1]], None, wiring))]


def _read(path: pathlib.Path) -> str:
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise ResourceError(
            f"{_shown(path)}: reading is not permitted; change its permissions"
        ) from error
    except FileNotFoundError:
        raise OptionError(f"{_shown(path)}: file does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise OptionError(f"{_shown(path)}: cannot be read ({error}); check the path") from error
    if len(data) > MAX_BYTES:
        _refuse(path, None, f"file is larger than {MAX_BYTES >> 20} MiB", "use wildcards")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _refuse(path, line, f"byte 0x{data[error.start]:02x} is not UTF-8", "save it as UTF-8")


def _from_toml(path: pathlib.Path, text: str, wiring: Wiring) -> list[Hypothesis]:
    try:
        top = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and numbers too long for int
        place = _PLACE.search(str(error))
        fact = f"not TOML: {_PLACE.sub('', str(error))}"
        column = f" at column {place[2]}" if place else ""
        _refuse(path, int(place[1]) if place else None, fact + column, "correct it")
    except RecursionError:
        _refuse(path, None, "tables are nested too deeply", "write [[hypothesis]] tables")
    _check_keys(path, None, top, ("hypothesis",))
    entries = top.get("hypothesis")
    if not isinstance(entries, list) or not entries:
        _refuse(path, None, "no [[hypothesis]] stands in it", "write one with name and paths")
    starts = [match.start() for match in _ENTRY.finditer(text)]
    hypotheses: dict[str, Hypothesis] = {}
    for number, entry in enumerate(entries):
        start = starts[number] if len(starts) == len(entries) else None
        hypothesis = _from_entry(path, text, start, entry, wiring)
        if hypothesis.name in hypotheses:
            line = _line(text, start)
            fact = f"name {hypothesis.name!r} is given to a second hypothesis"
            _refuse(path, line, fact, "give each its own")
        hypotheses[hypothesis.name] = hypothesis
    return list(hypotheses.values())


def _from_entry(
    path: pathlib.Path, text: str, start: int | None, entry: Any, wiring: Wiring
) -> Hypothesis:
    line = _line(text, start)
    if not isinstance(entry, dict):
        _refuse(path, line, "hypothesis is no table", "write [[hypothesis]] with name and paths")
    _check_keys(path, line, entry, ("name", "paths"))
    name, paths = entry.get("name"), entry.get("paths")
    if not isinstance(name, str) or not name.strip():
        _refuse(path, line, "hypothesis has no name", 'add name = "…"')
    if not isinstance(paths, list) or not all(isinstance(item, str) for item in paths):
        _refuse(path, line, "paths is no list of texts", 'write paths = ["input>a0.0>logits"]')
    numbered = []
    for item in paths:
        found = -1 if start is None else text.find(item, start)
        numbered.append((line if found < 0 else _line(text, found), item))
    return Hypothesis(name, _paths(path, numbered, line, wiring))


def _paths(
    path: pathlib.Path,
    numbered: Iterable[tuple[int | None, str]],
    line: int | None,
    wiring: Wiring,
) -> tuple[Path, ...]:
    """The paths of all texts, each once; an error gets the file and the text's line in front."""
    paths: dict[Path, None] = {}
    for number, text in numbered:
        try:
            paths.update(dict.fromkeys(parse_paths(text, wiring)))
        except OptionError as error:
            raise OptionError(f"{_shown(path, number)}: {error}") from None
    if not paths:
        _refuse(path, line, "hypothesis has no paths", "name one, as in input>a0.0>logits")
    return tuple(paths)


def _check_keys(
    path: pathlib.Path, line: int | None, table: dict[str, Any], known: tuple[str, ...]
) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key[:40], known, 1, 0.5)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            _refuse(path, line, f"key {key[:40]!r} is unknown", remedy)


def _refuse(path: pathlib.Path, line: int | None, fact: str, remedy: str) -> NoReturn:
    raise OptionError(f"{_shown(path, line)}: {fact}; {remedy}")


def _line(text: str, place: int | None) -> int | None:
    return None if place is None else text.count("\n", 0, place) + 1


def _shown(path: pathlib.Path, line: int | None = None) -> str:
    """The path as a message quotes it, its invisible characters spelled out."""
    shown = repr(str(path))[1:-1]
    return shown if line is None else f"{shown}:{line}"
