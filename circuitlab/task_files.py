"""Task files: a task read from JSON, JSONL, TOML or an EAP-IG CSV, and written as JSON."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
import re
import secrets
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitlab.errors import ResourceError, TaskError
from circuitlab.labels import excerpt
from circuitlab.tasks import Prompt, PromptPair, Task, kind_of, slug

#: Largest task file read; a million short prompts fit.
MAX_BYTES = 64 * 2**20

_ROW_KEYS = ("clean", "corrupt", "answers", "wrong_answers")
_TEXT_KEYS = ("name", "metric", "description")
#: auto-circuit labels positions with the last two; they say nothing about the task itself.
_TOP_KEYS = ("prompts", *_TEXT_KEYS, "seq_labels", "word_idxs")
_CSV_COLUMNS = {
    "clean": "clean",
    "corrupted": "corrupt",
    "correct_idx": "answers",
    "incorrect_idx": "wrong_answers",
}

_JSON_GAP = re.compile(r"[ \t\n\r,:]*")
_TOML_PLACE = re.compile(r"\(at line (\d+), column (\d+)\)$")
_TOML_ROW = re.compile(r"^[ \t]*\[\[[ \t]*[\"']?prompts[\"']?[ \t]*\]\]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Document:
    """What a file says, before any of it is believed."""

    top: dict[str, Any]
    rows: Sequence[object]
    #: Line of a row, counted from 0, or None where the format does not tell.
    line_of: Callable[[int], int | None]


def read_task(path: str | Path, *, metric: str | None = None) -> Task:
    """The task a file describes.

    * ``.json``, auto-circuit's layout: ``{"prompts": [{"clean", "corrupt", "answers",
      "wrong_answers"}]}``, with ``name``, ``metric`` and ``description`` beside ``prompts`` if
      wanted; ``seq_labels`` and ``word_idxs`` are passed over.
    * ``.jsonl``: one such prompt on each line.
    * ``.toml``: ``[[prompts]]`` with the same keys.
    * ``.csv``, EAP-IG's layout: columns ``clean, corrupted, correct_idx, incorrect_idx``; an index
      is a token id or a JSON list of them.

    Prompts are text or lists of token ids, answers the same or a list of them. UTF-8, with or
    without a byte order mark. A file without a name is called after its file name.

    Args:
        path: The suffix says the format.
        metric: Taken instead of the file's.

    Raises:
        TaskError: the file is missing, malformed, or says what no task can be; with file and line.
        ResourceError: the file may not be read.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TaskError(
            f"{_shown(path)}: suffix {path.suffix!r} is no task format; use {', '.join(_READERS)}"
        )
    document = reader(path, _read_text(path))
    for key in _TEXT_KEYS:
        if not isinstance(document.top.get(key, ""), str):
            kind = kind_of(document.top[key])
            raise TaskError(f"{_shown(path)}: {key} is {kind}; it must be text")
    pairs = tuple(_read_row(path, document, i) for i in range(len(document.rows)))
    if not pairs:
        raise TaskError(f"{_shown(path)} has no prompt pairs; give at least one")
    try:
        return Task(
            document.top.get("name", slug(path.stem)),
            pairs,
            metric or document.top.get("metric", "logit-difference"),
            document.top.get("description", ""),
        )
    except TaskError as error:
        raise TaskError(f"{_shown(path)}: {error}") from None


def read_texts(path: str | Path) -> list[Prompt]:
    """The prompts of a file of plain texts: what a model is to read, without answers.

    * ``.txt``: one prompt on each line; empty lines are passed over.
    * ``.jsonl``: on each line a text, a list of token ids, or an object with one of these under
      ``text``.

    Raises:
        TaskError: the file is missing, empty, or malformed; with file and line.
        ResourceError: the file may not be read.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise TaskError(f"{_shown(path)}: texts are read from .txt or .jsonl; give one of these")
    lines = [(n, line) for n, line in enumerate(_read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise TaskError(f"{_shown(path)} holds no text; give at least one line")
    if path.suffix.lower() == ".txt":
        return [line.rstrip("\r") for _, line in lines]
    return [_text_of(path, line, _parse_json(path, line, number), number) for number, line in lines]


def _text_of(path: Path, line: str, value: Any, number: int) -> Prompt:
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(part) is int for part in value):
        return tuple(value)
    raise TaskError(
        f"{_shown(path)}:{number}: {excerpt(line, 60)} is neither a text nor a list of token ids, "
        f"nor has one under 'text'"
    )


def write_task(task: Task, path: str | Path) -> None:
    """Write the task as JSON in auto-circuit's layout, so that :func:`read_task` gives it back.

    A file that stands there is replaced in one step; it is never half written.

    Raises:
        TaskError: the path does not end in ``.json``.
        ResourceError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise TaskError(f"{_shown(path)}: a task is written as JSON; let the name end in '.json'")
    text = json.dumps(task.to_json(), indent=1, ensure_ascii=False) + "\n"
    # Beside the target, since a rename is one step only within a file system; not tempfile, whose
    # files nobody else may read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ResourceError(
            f"{_shown(path)}: cannot be written ({error.strerror}); choose another folder"
        ) from error


def _read_text(path: Path) -> str:
    shown = _shown(path)
    try:
        if not path.exists():
            raise TaskError(f"{shown}: no such file; check the path")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise TaskError(f"{shown} is {kind}; name a task file ({', '.join(_READERS)})")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except PermissionError as error:
        raise ResourceError(f"{shown}: reading is not permitted; change its permissions") from error
    except (OSError, ValueError) as error:
        raise TaskError(f"{shown}: cannot be read ({error}); check the path") from error
    if len(data) > MAX_BYTES:
        raise TaskError(
            f"{shown} is larger than {MAX_BYTES >> 20} MiB; split it, or leave prompts out"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(
            f"{shown}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _read_json(path: Path, text: str) -> _Document:
    top = _parse_json(path, text, 1)
    if not isinstance(top, dict):
        raise TaskError(
            f"{_shown(path)} holds {kind_of(top)}; it must be a table with a list 'prompts'"
        )
    return _Document(top, _rows_of(path, top), lambda row: _json_row_line(text, row))


def _read_jsonl(path: Path, text: str) -> _Document:
    # Not splitlines: U+2028 may stand inside a JSON string.
    numbered = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [_parse_json(path, line, i) for i, line in numbered]
    return _Document({}, rows, lambda row: numbered[row][0])


def _read_toml(path: Path, text: str) -> _Document:
    try:
        top = tomllib.loads(text)
    except RecursionError:
        raise TaskError(f"{_shown(path)} is nested too deeply; a task needs four levels") from None
    except ValueError as error:
        place = _TOML_PLACE.search(str(error))
        where = f":{place[1]}:{place[2]}" if place else ""
        fact = excerpt(_TOML_PLACE.sub("", str(error)).strip())
        raise TaskError(f"{_shown(path)}{where}: not TOML: {fact}; mend the file there") from None
    rows = _rows_of(path, top)
    starts = [text.count("\n", 0, match.start()) + 1 for match in _TOML_ROW.finditer(text)]
    # Headings inside strings, or rows in an inline list, make the count differ: then no line.
    known = len(starts) == len(rows)
    return _Document(top, rows, lambda row: starts[row] if known else None)


def _read_csv(path: Path, text: str) -> _Document:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[object] = []
    lines: list[int] = []
    try:
        header = next(reader, [])
        _check_header(path, header)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                where = f"{_shown(path)}:{line}: pair {len(rows) + 1}"
                rows.append(_csv_row(where, header, cells))
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise TaskError(
            f"{_shown(path)}:{reader.line_num}: not CSV: {error}; mend the file there"
        ) from None
    return _Document({}, rows, lambda row: lines[row])


_READERS: dict[str, Callable[[Path, str], _Document]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".toml": _read_toml,
    ".csv": _read_csv,
}


def _check_header(path: Path, header: list[str]) -> None:
    for column in _CSV_COLUMNS:
        if header.count(column) != 1:
            fact = "stands twice" if column in header else "is missing"
            raise TaskError(
                f"{_shown(path)}:1: column {column!r} {fact}; "
                f"the first line must name {', '.join(_CSV_COLUMNS)}"
            )


def _csv_row(where: str, header: list[str], cells: list[str]) -> dict[str, object]:
    if len(cells) != len(header):
        raise TaskError(
            f"{where} has {len(cells)} cells, the first line names {len(header)}; "
            f"put text that holds a comma in double quotes"
        )
    row: dict[str, object] = {}
    for column, cell in zip(header, cells, strict=True):
        if column in ("clean", "corrupted"):
            row[_CSV_COLUMNS[column]] = cell
        elif column in _CSV_COLUMNS:
            row[_CSV_COLUMNS[column]] = _csv_ids(f"{where}: {column}", cell)
    return row


def _csv_ids(where: str, cell: str) -> list[int]:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        value = None
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise TaskError(
            f"{where} is '{excerpt(cell, 40)}'; it must be a token id or a JSON list of token ids"
        )
    return ids


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{_shown(path)}:{error.lineno + first_line - 1}:{error.colno}: not JSON: "
            f"{excerpt(error.msg)}; mend the file there"
        ) from None
    except RecursionError:
        raise TaskError(
            f"{_shown(path)}:{first_line}: nested too deeply; a task needs four levels"
        ) from None
    except ValueError as error:
        raise TaskError(f"{_shown(path)}:{first_line}: {excerpt(str(error))}") from None


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(items)
    if len(table) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one table; keep one")
    return table


def _rows_of(path: Path, top: dict[str, Any]) -> list[object]:
    _check_keys(_shown(path), top, _TOP_KEYS)
    if "prompts" not in top:
        raise TaskError(f"{_shown(path)}: key 'prompts' is missing; it lists the prompt pairs")
    rows = top["prompts"]
    if not isinstance(rows, list):
        raise TaskError(f"{_shown(path)}: prompts is {kind_of(rows)}; it must be a list of tables")
    return rows


def _read_row(path: Path, document: _Document, index: int) -> PromptPair:
    row = document.rows[index]
    try:
        if not isinstance(row, dict):
            raise TaskError(f"is {kind_of(row)}; it must be a table with {', '.join(_ROW_KEYS)}")
        _check_keys("", row, _ROW_KEYS)
        for key in _ROW_KEYS[:3]:
            if key not in row:
                raise TaskError(f"key {key!r} is missing; a pair needs {', '.join(_ROW_KEYS[:3])}")
        return PromptPair(
            row["clean"], row["corrupt"], row["answers"], row.get("wrong_answers", ())
        )
    except TaskError as error:
        line = document.line_of(index)
        place = "" if line is None else f":{line}"
        raise TaskError(f"{_shown(path)}{place}: pair {index + 1}: {error}") from None


def _check_keys(where: str, table: dict[str, Any], known: Collection[str]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            prefix = f"{where}: " if where else ""
            raise TaskError(
                f"{prefix}key '{excerpt(key, 60)}' is unknown; {hint}keys are {', '.join(known)}"
            )


def _json_row_line(text: str, row: int) -> int:
    """Line of a prompt in JSON that has been parsed before; found only when an error needs it."""
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("{") + 1)
    while True:
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if key == "prompts":
            break
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
    at = _skip(text, at + 1)
    for _ in range(row):
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
    return text.count("\n", 0, at) + 1


def _skip(text: str, at: int) -> int:
    gap = _JSON_GAP.match(text, at)
    return at if gap is None else gap.end()


def _shown(path: Path) -> str:
    return excerpt(str(path), 500)
