"""Progress reaches who listens, and changes nothing for who does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from circuitlab import track
from circuitlab.progress import listening

Told = list[tuple[str, int, int | None]]


@pytest.fixture
def told() -> Iterator[Told]:
    """What a listener was told during the test."""
    messages: Told = []
    with listening(lambda *message: messages.append(message)):
        yield messages


def test_every_step_is_told(told: Told) -> None:
    """A start, then one message after each item, with the total where there is one."""
    assert list(track("abc", "spelling")) == ["a", "b", "c"]
    assert told == [("spelling", n, 3) for n in range(4)]


def test_total_of_a_generator(told: Told) -> None:
    """A generator has no total unless it is given one."""
    assert list(track(iter("ab"), "x")) == list(track(iter("ab"), "y", total=2)) == ["a", "b"]
    assert told == [("x", n, None) for n in range(3)] + [("y", n, 2) for n in range(3)]


def test_what_was_done_before_counts(told: Told) -> None:
    """A run that goes on begins at what an earlier one had done, of all there is to do."""
    assert list(track("de", "spelling", done=3)) == ["d", "e"]
    assert told == [("spelling", n, 5) for n in (3, 4, 5)]
    told.clear()
    assert list(track(iter("e"), "x", total=5, done=4)) == ["e"]
    assert told == [("x", 4, 5), ("x", 5, 5)]


def test_step_is_told_when_it_is_done(told: Told) -> None:
    """A step counts once its work is done, not when it begins; a broken loop stops counting."""
    for item in track([10, 20, 30], "work"):
        assert told[-1][1] == item / 10 - 1
        if item == 20:
            break
    assert told[-1] == ("work", 1, 3)


def test_nobody_listens() -> None:
    """Without a listener the items come through as they are, lazily."""
    items = track((n for n in range(10**12)), "x")
    assert [next(items), next(items)] == [0, 1]


def test_listener_is_forgotten() -> None:
    """After the block, also after an error in it, the listener before it is heard again."""
    outer: Told = []
    inner: Told = []
    with listening(lambda *message: outer.append(message)):
        with pytest.raises(ZeroDivisionError), listening(lambda *m: inner.append(m)):
            [1 / n for n in track([0], "x")]
        list(track([], "y"))
    list(track([], "z"))
    assert outer == [("y", 0, 0)]
    assert inner == [("x", 0, 1)]
