"""Progress: analyses say how far they are; whoever listens decides how to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

#: Called with (what is being done, steps done, steps in all or None).
Listener = Callable[[str, int, int | None], None]

_listener: ContextVar[Listener | None] = ContextVar("circuitlab_progress", default=None)
_warned: ContextVar[Callable[[str], None] | None] = ContextVar("circuitlab_warned", default=None)
_informed: ContextVar[Callable[[str], None] | None] = ContextVar("circuitlab_facts", default=None)


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, done: int = 0
) -> Iterator[Item]:
    """The same items, one step of progress after each.

    Args:
        items: What to go through.
        description: What is being done, for people: "attributing edges".
        total: Number of steps where ``items`` has no length, those done included.
        done: Steps that an interrupted run had done; ``items`` are what is left.
    """
    if total is None and isinstance(items, Sized):
        total = done + len(items)
    listener = _listener.get()
    if listener is None:
        yield from items
        return
    listener(description, done, total)
    for number, item in enumerate(items, start=done + 1):
        yield item
        listener(description, number, total)


def report(description: str, done: int = 0, total: int | None = None) -> None:
    """Say how far something is that is no loop: waiting for someone else, say."""
    listener = _listener.get()
    if listener is not None:
        listener(description, done, total)


def tell(warnings: Iterable[str]) -> None:
    """Tell whoever listens of warnings at once: a long run may follow."""
    warned = _warned.get()
    if warned is not None:
        for warning in warnings:
            warned(warning)


@contextmanager
def unwarned() -> Iterator[None]:
    """Nobody hears of warnings told inside: they are of no use to whoever listens."""
    token = _warned.set(None)
    try:
        yield
    finally:
        _warned.reset(token)


def inform(fact: str) -> None:
    """Tell whoever listens of something that is neither progress nor a warning."""
    informed = _informed.get()
    if informed is not None and fact:
        informed(fact)


@contextmanager
def listening(
    listener: Listener,
    warned: Callable[[str], None] | None = None,
    informed: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Progress made inside goes to ``listener``, warnings to ``warned``, facts to ``informed``."""
    tokens = _listener.set(listener), _warned.set(warned), _informed.set(informed)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _warned.reset(tokens[1])
        _informed.reset(tokens[2])
