"""Tasks: names, pairs and digests."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from circuitlab.errors import OptionError, TaskError
from circuitlab.labels import excerpt
from circuitlab.tasks import ID_LIMIT, NAME_LIMIT, PromptPair, Task, slug

PAIR = PromptPair("John gave it to", "Mary gave it to", (" Mary",), (" John",))


def test_import_is_light() -> None:
    """Importing tasks and task files loads neither torch, transformers nor networkx."""
    code = (
        "import sys, circuitlab.tasks, circuitlab.task_files; "
        "print({'torch', 'transformers', 'networkx', 'nnsight'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "name",
    ["a\nb", "a\rb", "../x", "/etc/x", "a/b", "a\\b", "C:x", "a..b", "", " ", ".", "..", ".x",
     "x\x1b[31m", "x\u202ey", "x\u2028y", "x\ud800", "x" * (NAME_LIMIT + 1)],
)  # fmt: skip
def test_name_that_is_no_file_name_is_refused(name: str) -> None:
    """Row 7: a name that could leave a folder or break a line is refused, and shown harmlessly."""
    with pytest.raises(TaskError, match="task name") as caught:
        Task(name, (PAIR,))
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["ioi", "greater-than 2", "ioi_mini.v2", "größer", "任务"])
def test_plain_names_are_kept(name: str) -> None:
    """Names in any script, with inner spaces, dots and dashes, are fine."""
    assert Task(name, (PAIR,)).name == name


@given(st.text(st.characters()))
@example("x" * 500)
@example("../" * 50)
def test_slug_is_always_a_usable_name(text: str) -> None:
    """Whatever the text, its slug is accepted as a task name and stays as it is a second time."""
    assert Task(slug(text), (PAIR,)).name == slug(slug(text))


def test_empty_task_is_refused() -> None:
    """Row 9: a task without pairs is refused; one pair is enough."""
    with pytest.raises(TaskError, match="task 'ioi' has no prompt pairs; give at least one"):
        Task("ioi", ())
    assert len(Task("ioi", (PAIR,)).pairs) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("", "b", ("c",)), "clean holds empty text"),
        (("a", (), ("c",)), "corrupt is empty"),
        (("a", 3, ("c",)), "corrupt is a number; it must be text or a list of token ids"),
        ((None, "b", ("c",)), "clean is null"),
        (("a", (1, 2), ("c",)), "clean is text, corrupt is token ids"),
        (((1, 2), "b", (3,)), "clean is token ids, corrupt is text"),
        (((1, "x"), (1, 2), (3,)), "clean holds text ('x') where a token id was expected"),
        (((1, True), (1, 2), (3,)), "clean holds a boolean where a token id"),
        (((1, 2.0), (1, 2), (3,)), "clean holds a number where a token id"),
        (((1, -2), (1, 2), (3,)), "clean holds the negative token id -2"),
        (((1, ID_LIMIT), (1, 2), (3,)), "token id of 2147483648 or more"),
        (("a", "b", ()), "answers is empty; name at least one right answer"),
        (("a", "b", ("",)), "answers holds empty text"),
        (("a", "b", (True,)), "answers holds a boolean; an answer must be text or a token id"),
        (("a", "b", (-1,)), "answers holds the negative token id -1"),
        (("a", "b", (" c", 3)), "answers mixes text and token ids"),
        (("a", "b", ("c",), (1.5,)), "wrong_answers holds a number"),
        (("a\ud800", "b", ("c",)), "clean 'a\\u{d800}' holds half a surrogate pair"),
    ],
)
def test_pair_refuses_what_is_no_prompt(values: tuple[Any, ...], message: str) -> None:
    """A pair names the value that is wrong, what it is, and what it must be."""
    with pytest.raises(TaskError) as caught:
        PromptPair(*values)
    assert message in str(caught.value)


def test_pair_keeps_lists_and_single_answers_as_tuples() -> None:
    """A text answer without a tuple is one answer, never its letters; pairs stay hashable."""
    loose: Any = ([1, 2], [3, 2], 7, [8])
    assert PromptPair(*loose) == PromptPair((1, 2), (3, 2), (7,), (8,))
    single: Any = ("a", "b", " Mary", " John")
    assert PromptPair(*single).answers == (" Mary",)
    assert len({PromptPair(*single), PromptPair(*single)}) == 1


def test_from_pair_makes_one_pair() -> None:
    """``from_pair`` takes single answers, several, or no wrong one."""
    assert Task.from_pair("John gave it to", "Mary gave it to", " Mary", " John").pairs == (PAIR,)
    task = Task.from_pair([1, 2], [3, 2], [4, 5], name="ids", metric="answer-log-prob")
    assert task == Task("ids", (PromptPair((1, 2), (3, 2), (4, 5)),), "answer-log-prob")


def test_take_gives_the_first_pairs() -> None:
    """``take`` keeps order, gives the whole task when it is short, and refuses to take nothing."""
    pairs = tuple(PromptPair((i, 1), (i, 2), (3,)) for i in range(5))
    task = Task("t", pairs)
    assert task.take(2).pairs == pairs[:2]
    assert task.take(9) == task
    with pytest.raises(OptionError, match="cannot take 0 pairs; take 1 or more"):
        task.take(0)


def test_digest_tells_tasks_apart_and_outlives_the_process() -> None:
    """The digest is the same in another process, and changes with any part of the task."""
    task = Task("ioi", (PAIR,))
    code = (
        "from circuitlab.tasks import Task; "
        "print(Task.from_pair('John gave it to', 'Mary gave it to', ' Mary', ' John', "
        "name='ioi').digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == task.digest
    assert len(task.digest) == 12
    int(task.digest, 16)
    others = [
        Task("ioi2", (PAIR,)),
        Task("ioi", (PAIR, PAIR)),
        Task("ioi", (PAIR,), "kl-divergence"),
        Task("ioi", (PromptPair(PAIR.corrupt, PAIR.clean, PAIR.answers, PAIR.wrong_answers),)),
    ]
    assert len({task.digest, *(other.digest for other in others)}) == 5


def test_digest_of_a_pair_is_of_its_canonical_json() -> None:
    """It can be computed by anyone from the pair alone, and changes with any part of the pair."""
    pair = PromptPair((1, 2), (3, 2), (4,), (5, 6))
    written = b'{"answers":[4],"clean":[1,2],"corrupt":[3,2],"wrong_answers":[5,6]}'
    assert pair.digest == hashlib.sha256(written).hexdigest()[:12]
    changed = {"clean": (9, 2), "corrupt": (9, 2), "answers": (9,), "wrong_answers": (5, 9)}
    others = [replace(pair, **{key: value}) for key, value in changed.items()]
    assert len({pair.digest, *(other.digest for other in others)}) == 5


def test_to_json_is_plain_json() -> None:
    """``to_json`` holds lists and text only, in auto-circuit's layout."""
    data = Task("ids", (PromptPair((1, 2), (3, 2), (4,)),)).to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["prompts"] == [
        {"clean": [1, 2], "corrupt": [3, 2], "answers": [4], "wrong_answers": []}
    ]


@pytest.mark.parametrize(("key", "value"), [("metric", 3), ("description", None)])
def test_task_texts_must_be_text(key: str, value: object) -> None:
    """A metric or description that is not text is refused by name."""
    bad: Any = {key: value}
    with pytest.raises(TaskError, match=f"task 'ioi': {key} is .*; it must be text"):
        Task("ioi", (PAIR,), **bad)


def test_excerpt_escapes_and_clips() -> None:
    """Shown text has no control characters and no more than the asked length before escaping."""
    assert excerpt("a\x1b[0m\n") == "a\\u{1b}[0m\\u{a}"
    assert excerpt("é任") == "é任"
    assert excerpt("x" * 10, 5) == "xxxx…"
