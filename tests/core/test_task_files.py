"""Task files: what is read, what is refused and how, and the round trip."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitlab.errors import CircuitLabError, ResourceError, TaskError
from circuitlab.task_files import MAX_BYTES, read_task, write_task
from circuitlab.tasks import PromptPair, Task, slug

ROW = {"clean": "a b", "corrupt": "c b", "answers": [" x"], "wrong_answers": [" y"]}
PAIR = PromptPair("a b", "c b", (" x",), (" y",))

texts = st.text(min_size=1, max_size=20)
ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)
answers = st.lists(texts, min_size=1, max_size=3) | st.lists(
    st.integers(0, 99), min_size=1, max_size=3
)
pairs = st.builds(
    lambda prompts, right, wrong: PromptPair(prompts[0], prompts[1], tuple(right), tuple(wrong)),
    st.tuples(texts, texts) | st.tuples(ids, ids),
    answers,
    answers | st.just([]),
)
tasks = st.builds(
    Task,
    st.text(max_size=20).map(slug),
    st.lists(pairs, min_size=1, max_size=4).map(tuple),
    st.sampled_from(["logit-difference", "kl-divergence"]),
    st.text(max_size=20),
)


def put(folder: Path, name: str, content: str | bytes) -> Path:
    """Write the content, byte by byte, and give its path."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    """The message with which a file is refused, less its folder; exit code 3, one line."""
    with pytest.raises(TaskError) as caught:
        read_task(path)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.isprintable()
    return message.replace(f"{path.parent}{os.sep}", "")


def outcome(path: Path) -> str:
    """The message with which a file is refused, or that it was read; other errors escape."""
    try:
        return f"read {len(read_task(path).pairs)} pairs"
    except CircuitLabError as error:
        return str(error)


@given(tasks)
@settings(deadline=None)
def test_json_round_trip(task: Task) -> None:
    """What ``write_task`` writes, ``read_task`` gives back, digest and all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        write_task(task, path)
        again = read_task(path)
    assert again == task
    assert again.digest == task.digest


@given(st.lists(pairs, min_size=1, max_size=4))
@settings(deadline=None)
def test_jsonl_round_trip(written: list[PromptPair]) -> None:
    """One JSON prompt a line reads as the same pairs, whatever line ends its text holds."""
    task = Task("rows", tuple(written))
    lines = [json.dumps(row, ensure_ascii=False) for row in task.to_json()["prompts"]]
    with tempfile.TemporaryDirectory() as folder:
        assert read_task(put(Path(folder), "rows.jsonl", "\n\n".join(lines) + "\n")) == task


@given(
    st.lists(
        st.tuples(texts, texts, st.integers(0, 99), st.lists(st.integers(0, 99), max_size=3)),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None)
def test_csv_round_trip(rows: list[tuple[str, str, int, list[int]]]) -> None:
    """EAP-IG's columns read as pairs, quoted text, lists of ids and extra columns included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", "clean", "corrupted", "correct_idx", "incorrect_idx", "label"])
            for i, (clean, corrupt, right, wrong) in enumerate(rows):
                writer.writerow([i, clean, corrupt, right, json.dumps(wrong), "x"])
        task = read_task(path)
    assert task.pairs == tuple(PromptPair(c, k, (r,), tuple(w)) for c, k, r, w in rows)


@given(st.sampled_from([".json", ".jsonl", ".toml", ".csv"]), st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_arbitrary_bytes_never_escape(suffix: str, content: bytes) -> None:
    """Any bytes at all are read or refused with an error of ours, never with another."""
    with tempfile.TemporaryDirectory() as folder:
        assert outcome(put(Path(folder), f"t{suffix}", content)).isprintable()


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ROW, "prompts", "name", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
@settings(deadline=None, max_examples=200)
def test_arbitrary_json_never_escapes(value: Any) -> None:
    """Any JSON value, in the place of the file, the list or a row, is read or refused."""
    for content in (value, {"prompts": value}, {"prompts": [ROW, value]}):
        with tempfile.TemporaryDirectory() as folder:
            assert outcome(put(Path(folder), "t.json", json.dumps(content))).isprintable()


def test_auto_circuit_file_is_read(tmp_path: Path) -> None:
    """auto-circuit's own layout is accepted; its position labels are passed over."""
    content = {"seq_labels": ["a", "b"], "word_idxs": {"end": 1}, "prompts": [ROW]}
    assert read_task(put(tmp_path, "docstring.json", json.dumps(content))) == Task(
        "docstring", (PAIR,)
    )


def test_toml_file_is_read(tmp_path: Path) -> None:
    """TOML tables read as pairs; a single answer needs no list."""
    content = (
        'name = "ids"\nmetric = "kl-divergence"\ndescription = "d"\n'
        "[[prompts]]\nclean = [1, 2]\ncorrupt = [3, 2]\nanswers = 4\nwrong_answers = [5]\n"
    )
    expected = Task("ids", (PromptPair((1, 2), (3, 2), (4,), (5,)),), "kl-divergence", "d")
    assert read_task(put(tmp_path, "t.toml", content)) == expected


def test_metric_argument_wins(tmp_path: Path) -> None:
    """A metric given to ``read_task`` replaces the file's; a suffix may be in capitals."""
    path = put(tmp_path, "t.JSON", json.dumps({"metric": "kl-divergence", "prompts": [ROW]}))
    assert read_task(path).metric == "kl-divergence"
    assert read_task(path, metric="answer-log-prob").metric == "answer-log-prob"


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.toml", "t.csv"])
def test_byte_order_mark_is_accepted_and_other_encodings_are_not(tmp_path: Path, name: str) -> None:
    """Row 19: UTF-8 with a mark reads as without; Latin-1 and UTF-16 are refused with the line."""
    content = {
        "t.json": json.dumps({"prompts": [{**ROW, "clean": "é"}]}, ensure_ascii=False),
        "t.jsonl": json.dumps({**ROW, "clean": "é"}, ensure_ascii=False),
        "t.toml": '[[prompts]]\nanswers = " x"\ncorrupt = "c"\nclean = "é"\n',
        "t.csv": "clean,corrupted,correct_idx,incorrect_idx\né,c,1,2\n",
    }[name]
    assert read_task(put(tmp_path, name, content.encode("utf-8-sig"))).pairs[0].clean == "é"
    line = content[: content.index("é")].count("\n") + 1
    message = refusal(put(tmp_path, name, content.encode("latin-1")))
    assert message == f"{name}:{line}: byte 0xe9 is not UTF-8; save the file as UTF-8"
    assert "not UTF-8" in refusal(put(tmp_path, name, content.encode("utf-16")))


@pytest.mark.parametrize(
    ("name", "content", "start"),
    [
        ("t.json", '{\n "prompts": [,]}', "t.json:2:14: not JSON: "),
        ("t.json", "", "t.json:1:1: not JSON: "),
        ("t.jsonl", json.dumps(ROW) + '\n{"clean": }', "t.jsonl:2:11: not JSON: "),
        ("t.toml", 'name = "x"\n[[prompts]\n', "t.toml:2:10: not TOML: "),
        ("t.toml", 'name = "x', "t.toml: not TOML: "),
        ("t.csv", 'clean,corrupted,correct_idx,incorrect_idx\n"a"b,c,1,2', "t.csv:2: not CSV: "),
    ],
)
def test_bad_syntax_names_its_place(tmp_path: Path, name: str, content: str, start: str) -> None:
    """Row 8: bad syntax is refused with file, line and, where the format tells, column."""
    assert refusal(put(tmp_path, name, content)).startswith(start)


def rows_after_one(bad: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """A good and a bad row in each format that can say it, and the bad row's line."""
    head = {"name": "t", "word_idxs": {"prompts": [1, "{\n"]}}
    spread = json.dumps({**head, "prompts": [ROW, bad]}, indent=1)
    compact = json.dumps({**head, "prompts": [ROW, bad]})
    line = next(i for i, text in reversed(list(enumerate(spread.split("\n"), 1))) if text == "  {")
    toml = "".join(
        "\n[[prompts]]\n" + "".join(f"{key} = {json.dumps(row[key])}\n" for key in row)
        for row in (ROW, bad)
    )
    heading = toml.split("\n").index("[[prompts]]", 3) + 1
    return {
        "a.json": (spread, line),
        "b.json": (compact, 1),
        "c.jsonl": (json.dumps(ROW) + "\n\n" + json.dumps(bad), 3),
        "d.toml": (toml, heading),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": 3}, "clean is a number; it must be text or a list of token ids"),
        ({"clean": True}, "clean is a boolean; it must be text or a list of token ids"),
        ({"clean": [1, True], "corrupt": [1, 2]}, "clean holds a boolean where a token id was"),
        ({"clean": [1, -2], "corrupt": [1, 2]}, "clean holds the negative token id -2"),
        ({"clean": [1, 2]}, "clean is token ids, corrupt is text; write both as text or both"),
        ({"corrupt": ""}, "corrupt holds empty text"),
        ({"answers": []}, "answers is empty; name at least one right answer"),
        ({"answers": [False]}, "answers holds a boolean; an answer must be text or a token id"),
        ({"wrong_answers": 1.5}, "wrong_answers holds a number; an answer must be text or a"),
        ({"wrong_answer": " y"}, "key 'wrong_answer' is unknown; did you mean 'wrong_answers'?"),
        ({"corrupted": "c"}, "key 'corrupted' is unknown; did you mean 'corrupt'?"),
        ({"zzz": 1}, "key 'zzz' is unknown; keys are clean, corrupt, answers, wrong_answers"),
    ],
)
def test_bad_row_names_file_line_pair_and_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Row 8: a bad value is refused with file, line, pair, key and what was expected."""
    for name, (content, line) in rows_after_one({**ROW, **change}).items():
        found = refusal(put(tmp_path, name, content))
        assert found.startswith(f"{name}:{line}: pair 2: {message}")


def test_missing_key_and_rows_that_are_no_tables(tmp_path: Path) -> None:
    """A row must be a table with its three keys."""
    short = {key: ROW[key] for key in ("clean", "answers")}
    assert refusal(put(tmp_path, "t.jsonl", json.dumps(short))) == (
        "t.jsonl:1: pair 1: key 'corrupt' is missing; a pair needs clean, corrupt, answers"
    )
    assert refusal(put(tmp_path, "t.jsonl", "[1]")).startswith("t.jsonl:1: pair 1: is a list; it")
    inline = "prompts = [1]\n"
    assert refusal(put(tmp_path, "t.toml", inline)).startswith("t.toml: pair 1: is a number; it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "t.json holds a list; it must be a table with a list 'prompts'"),
        ("{}", "t.json: key 'prompts' is missing; it lists the prompt pairs"),
        ('{"prompts": {}}', "t.json: prompts is a table; it must be a list of tables"),
        ('{"prompts": []}', "t.json has no prompt pairs; give at least one"),
        ('{"promts": []}', "t.json: key 'promts' is unknown; did you mean 'prompts'? keys are "),
        ('{"metric": 3, "prompts": []}', "t.json: metric is a number; it must be text"),
        ('{"name": "../x", "prompts": [ROW]}', "t.json: task name '../x' looks like a path"),
        ('{"prompts": [], "prompts": []}', "t.json:1: key 'prompts' stands twice in one table"),
        ('{"prompts": NaN}', "t.json: prompts is a number; it must be a list of tables"),
    ],
)
def test_bad_top_level(tmp_path: Path, content: str, message: str) -> None:
    """Rows 7 to 9: what stands beside the pairs is checked too, and no pairs are no task."""
    path = put(tmp_path, "t.json", content.replace("ROW", json.dumps(ROW)))
    assert refusal(path).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clean,corrupted,correct_idx\n", "t.csv:1: column 'incorrect_idx' is missing; the first"),
        ("", "t.csv:1: column 'clean' is missing"),
        ("H,clean\n", "t.csv:1: column 'clean' stands twice"),
        ("H\n", "t.csv has no prompt pairs; give at least one"),
        ("H\na,b,1\n", "t.csv:2: pair 1 has 3 cells, the first line names 4; put text"),
        ("H\na,b,1,2,3\n", "t.csv:2: pair 1 has 5 cells"),
        ('H\n"a\nb",b,1,2\na,b,x,2\n', "t.csv:4: pair 2: correct_idx is 'x'; it must be a token"),
        ("H\na,b,1,2.5\n", "t.csv:2: pair 1: incorrect_idx is '2.5'; it must be a token id or"),
        ("H\na,b,1,true\n", "t.csv:2: pair 1: incorrect_idx is 'true'; it must be a token id or"),
        ("H\na,b,-1,2\n", "t.csv:2: pair 1: answers holds the negative token id -1"),
        ("H\n,b,1,2\n", "t.csv:2: pair 1: clean holds empty text"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, message: str) -> None:
    """Row 8 for CSV: the header, the number of cells and the ids are checked, with the line."""
    content = content.replace("H", "clean,corrupted,correct_idx,incorrect_idx")
    assert refusal(put(tmp_path, "t.csv", content)).startswith(message)


def test_paths_that_are_no_task_file(tmp_path: Path) -> None:
    """A missing file, a folder, a device, another suffix and a mad path are refused in words."""
    assert refusal(tmp_path / "no.json") == "no.json: no such file; check the path"
    (tmp_path / "dir.json").mkdir()
    assert refusal(tmp_path / "dir.json").startswith("dir.json is a folder; name a task file")
    assert refusal(put(tmp_path, "t.yaml", "")).startswith("t.yaml: suffix '.yaml' is no task")
    assert "cannot be read" in refusal(tmp_path / ("x" * 5000 + ".json"))
    assert "\\u{1b}" in refusal(tmp_path / "\x1b[31m.json")
    os.mkfifo(tmp_path / "pipe.json")
    assert refusal(tmp_path / "pipe.json").startswith("pipe.json is not a regular file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", "[" * 100_000),
        ("t.json", '{"a":' * 100_000),
        ("t.jsonl", "[" * 100_000),
        ("t.toml", "a = " + "[" * 100_000),
        ("t.json", '{"prompts": ' + "9" * 5000 + "}"),
        ("t.json", '{"' + "k" * 100_000 + '": 1}'),
        ("t.csv", '"' + "x" * 200_000 + '"'),
        ("t.csv", "clean,corrupted,correct_idx,incorrect_idx\na,b,1," + "[" * 100_000),
    ],
)
def test_hostile_content_is_refused_shortly(tmp_path: Path, name: str, content: str) -> None:
    """Depth, huge numbers and huge names end in a short refusal."""
    assert len(refusal(put(tmp_path, name, content))) < 500


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """A file past the limit is refused, with the limit and a remedy."""
    path = tmp_path / "t.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert refusal(path) == "t.json is larger than 64 MiB; split it, or leave prompts out"


def test_unreadable_file_is_a_matter_of_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that may not be opened ends in exit code 5."""
    path = put(tmp_path, "t.json", "{}")

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match="reading is not permitted") as caught:
        read_task(path)
    assert caught.value.exit_code == 5


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the old file stays whole and no other is left behind."""
    path = tmp_path / "t.json"
    write_task(Task("old", (PAIR,)), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_task(Task("new", (PAIR,)), path)
    assert read_task(path).name == "old"
    assert os.listdir(tmp_path) == ["t.json"]


def test_write_refuses_other_suffixes_and_missing_folders(tmp_path: Path) -> None:
    """Only ``.json`` is written, since only that would be read back."""
    with pytest.raises(TaskError, match=r"let the name end in '\.json'"):
        write_task(Task("t", (PAIR,)), tmp_path / "t.toml")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_task(Task("t", (PAIR,)), tmp_path / "no" / "t.json")


def test_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    """A task file can be read by whom any new file of the user can be read by."""
    write_task(Task("t", (PAIR,)), tmp_path / "t.json")
    (tmp_path / "plain").touch()
    assert (tmp_path / "t.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
