"""The path language: ``input>a0.1:k>a1.0>logits`` and lists of it, read against a wiring.

A path is a chain of components, each of which reads the one before it:

* ``input``, heads ``a0.1`` (or ``a0.h1``), MLPs ``m0``, ``logits``, joined by ``>``;
* ``:q``, ``:k``, ``:v`` or several, as ``:qk``: the ports through which a head reads the component
  before it; without them all three together;
* ``*`` for any layer or any head (``a0.*``, ``a*.*``, ``m*``), ``:*`` for each port by itself: one
  path for each combination that runs forward in the model;
* commas or line ends between paths.

A path begins at anything that writes to the residual stream and ends at anything that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from circuitlab import GraphError, OptionError, Wiring

PORTS = "qkv"
#: Most paths that one text or one model may stand for.
LIMIT = 100_000

# Six digits are more than any model has, and are read in no time.
_HEAD = re.compile(r"a([0-9]{1,6}|\*)\.h?([0-9]{1,6}|\*)")
_MLP = re.compile(r"m([0-9]{1,6}|\*)")


@dataclass(frozen=True)
class Path:
    """A chain of components through which a change runs.

    Attributes:
        nodes: ``(component, ports)`` from the first that writes to the last that reads. ``ports``
            is a part of ``"qkv"`` in this order for a head that reads, and ``""`` for the first
            component, for MLPs and for ``logits``.
    """

    nodes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """The path in its own language: ``input>a0.h1:k>a1.h0>logits``."""
        return ">".join(
            component if ports in ("", PORTS) else f"{component}:{ports}"
            for component, ports in self.nodes
        )

    def split(self) -> list[Path]:
        """The paths of one port for each head that this one stands for, in order of q, k, v."""
        choices = [[(name, port) for port in ports or ("",)] for name, ports in self.nodes]
        return [Path(nodes) for nodes in product(*choices)]


def parse_paths(text: str, wiring: Wiring, *, limit: int = LIMIT) -> list[Path]:
    """The paths that ``text`` names, wildcards expanded, each path once.

    Order: as written; where there is a wildcard, components in the order they run, ports q, k, v.

    Raises:
        OptionError: a component, port or step does not exist in ``wiring``, a wildcard stands for
            nothing that runs forward, there is no path at all, or there are more than ``limit``.
    """
    paths: dict[Path, None] = {}
    for piece in _pieces(text, "path"):
        steps = [_step(word, wiring) for word in _words(piece)]
        _check_ends(steps)
        count = _count(steps, wiring)
        if count > limit:
            raise OptionError(
                f"path {_clip(piece)!r} stands for {count:,} paths, more than {limit:,}; put names "
                f"in place of wildcards"
            )
        paths.update(dict.fromkeys(_expand(steps, wiring)))
    return list(paths)


def parse_components(text: str, wiring: Wiring) -> list[str]:
    """The sources that a list such as ``"a*.*, m0"`` names, each once, in the order written.

    Raises:
        OptionError: a name is not one of a component that writes, or the list is empty.
    """
    names: dict[str, None] = {}
    for piece in _pieces(text, "component"):
        step = _step(_Word("component", piece, 1, piece), wiring)
        _check_writes(step)
        names.update(dict.fromkeys(step.components))
    return list(names)


def parse_receivers(text: str, wiring: Wiring) -> list[tuple[str, str]]:
    """The receivers that a list such as ``"a2.3:q, logits"`` names: ``(component, port)``.

    A head without ports stands for its three; the port is ``""`` for MLPs and ``logits``.

    Raises:
        OptionError: a name is not one of a component that reads, or the list is empty.
    """
    receivers: dict[tuple[str, str], None] = {}
    for piece in _pieces(text, "receiver"):
        step = _step(_Word("receiver", piece, 1, piece), wiring)
        _check_reads(step)
        for component in step.components:
            ports = "".join(step.ports) if component.startswith("a") else ("",)
            receivers.update(dict.fromkeys((component, port) for port in ports))
    return list(receivers)


def all_paths(wiring: Wiring, max_hops: int | None = None, limit: int = LIMIT) -> list[Path]:
    """Every path from ``input`` to ``logits``, one port for each head, in forward order.

    Args:
        wiring: The model's.
        max_hops: Most steps of a path; ``input>logits`` is one.
        limit: Most paths.

    Raises:
        OptionError: there are more than ``limit``.
    """
    count = count_paths(wiring, max_hops)
    if count > limit:
        raise OptionError(
            f"a model of {wiring.n_layers} layers and {wiring.n_heads} heads has {count:,} paths, "
            f"more than {limit:,}; allow fewer hops, or name the paths"
        )
    heard, rows = _heard(wiring), wiring.source_rows

    def extend(nodes: tuple[tuple[str, str], ...]) -> Iterator[Path]:
        if max_hops is not None and len(nodes) > max_hops:
            return
        for target, n_sources in heard.items():
            if rows[nodes[-1][0]] >= n_sources:
                continue
            for port in PORTS if target.startswith("a") else ("",):
                longer = (*nodes, (target, port))
                if target == "logits":
                    yield Path(longer)
                else:
                    yield from extend(longer)

    return list(extend((("input", ""),)))


def count_paths(wiring: Wiring, max_hops: int | None = None) -> int:
    """Number of paths from ``input`` to ``logits`` with q, k and v apart, without listing them.

    196 for 2 layers of 2 heads and an MLP. ``max_hops`` as in :func:`all_paths`.
    """
    longest = 2 * wiring.n_layers + 1
    # Sums over the first n sources of their number of paths from input, by number of hops.
    sums = [[0] * (longest + 1), [1] + [0] * longest]
    for block in wiring.blocks():
        reached = [0, *sums[block.n_sources][:-1]]
        if block.kind == "logits":
            return sum(reached if max_hops is None else reached[: max(0, max_hops) + 1])
        heads = block.kind == "attention"
        for _ in range(wiring.n_heads if heads else 1):
            ways = 3 if heads else 1
            sums.append([a + ways * b for a, b in zip(sums[-1], reached, strict=True)])
    raise AssertionError("a wiring ends with logits")


class _Word(NamedTuple):
    """A piece of a text between two ``>``: what kind of text, all of it, and where this stands."""

    kind: str
    text: str
    column: int
    word: str

    def error(self, fact: str, remedy: str) -> OptionError:
        where = f"{self.kind} {_clip(self.text)!r}"
        if self.word != self.text:
            where += f", column {self.column}"
        return OptionError(f"{where}: {fact}; {remedy}")


class _Step(NamedTuple):
    """A word read: the components it may stand for, and the sets of ports, each by itself."""

    word: _Word
    name: str
    components: tuple[str, ...]
    ports: tuple[str, ...]
    has_ports: bool


def _pieces(text: str, kind: str) -> list[str]:
    pieces = [piece.strip() for piece in re.split(r"[,\r\n]", text)]
    if not any(pieces):
        example = {"path": "input>a0.0>logits", "component": "a0.*, m0", "receiver": "a0.0:q, m0"}
        raise OptionError(f"{kind} list is empty; name one, as in '{example[kind]}'")
    return [piece for piece in pieces if piece]


def _words(piece: str) -> Iterator[_Word]:
    start = 0
    for part in piece.split(">"):
        column = start + len(part) - len(part.lstrip()) + 1
        yield _Word("path", piece, column, part.strip())
        start += len(part) + 1


def _step(word: _Word, wiring: Wiring) -> _Step:
    name, colon, letters = (part.strip() for part in word.word.partition(":"))
    components = _components(word, name, wiring)
    if colon and not components[0].startswith("a"):
        raise word.error(f"{name} has no ports", f"leave ':{_clip(letters)}' out")
    return _Step(word, name, components, _ports(word, letters if colon else PORTS), bool(colon))


def _ports(word: _Word, letters: str) -> tuple[str, ...]:
    if letters == "*":
        return tuple(PORTS)
    if not letters:
        raise word.error("no port stands behind ':'", "add q, k, v, several of them, or *")
    for letter in letters:
        if letter not in PORTS:
            raise word.error(f"{_clip(letters)!r} is no port", "use q, k, v, several of them, or *")
        if letters.count(letter) > 1:
            raise word.error(f"port {letter} is named twice", "name it once")
    return ("".join(sorted(letters, key=PORTS.index)),)


def _components(word: _Word, name: str, wiring: Wiring) -> tuple[str, ...]:
    """The components a name or pattern stands for, in the order they run."""
    if name in ("input", "logits"):
        return (name,)
    n_layers, n_heads = wiring.n_layers, wiring.n_heads
    if match := _HEAD.fullmatch(name):
        layers, heads = _numbers(match[1], n_layers), _numbers(match[2], n_heads)
        names = [f"a{layer}.h{head}" for layer in layers for head in heads]
        near = f"a{min(layers[0], n_layers - 1)}.{min(heads[0], n_heads - 1)}"
    elif match := _MLP.fullmatch(name):
        layers = _numbers(match[1], n_layers)
        names = [f"m{layer}" for layer in layers]
        near = f"m{min(layers[0], n_layers - 1)}"
    else:
        _refuse(word, name, wiring)
    try:
        for component in names:
            wiring.component(component)
    except GraphError:
        raise word.error(
            f"{name} does not exist in a model of {n_layers} layers and {n_heads} heads",
            f"the nearest is {near}; layers and heads are counted from 0",
        ) from None
    return tuple(names)


def _numbers(text: str, count: int) -> Sequence[int]:
    return range(count) if text == "*" else [int(text)]


def _refuse(word: _Word, name: str, wiring: Wiring) -> None:
    if not name:
        raise word.error("a component is missing", "put one before and behind each '>'")
    close = get_close_matches(name[:40], [*wiring.sources, "logits"], 1)
    remedy = f"did you mean {close[0]}?" if close else "use input, a0.0, a0.*, m0, m* or logits"
    raise word.error(f"{_clip(name)!r} is no component", remedy)


def _check_ends(steps: Sequence[_Step]) -> None:
    first, *rest = steps
    if not rest:
        raise first.word.error(
            "a path has two components or more", f"add what reads it, as in {first.name}>logits"
        )
    for step in steps[:-1]:
        _check_writes(step, "end the path with it")
    if first.has_ports:
        raise first.word.error(
            "ports say how a component reads, and the first one only writes",
            f"write {first.name}",
        )
    for step in rest:
        _check_reads(step, "begin the path with it")


def _check_writes(step: _Step, remedy: str = "name input, heads or MLPs") -> None:
    if step.name == "logits":
        raise step.word.error("logits writes nothing", remedy)
    if step.has_ports and step.word.kind == "component":
        raise step.word.error("what a component writes has no ports", f"write {step.name}")


def _check_reads(step: _Step, remedy: str = "name heads, MLPs or logits") -> None:
    if step.name == "input":
        raise step.word.error("input reads nothing", remedy)


def _count(steps: Sequence[_Step], wiring: Wiring) -> int:
    """How many forward paths the steps stand for.

    Raises:
        OptionError: none; the step at which the last of them ends is named.
    """
    rows, heard = wiring.source_rows, _heard(wiring)
    ways = dict.fromkeys(steps[0].components, 1)
    for before, step in pairwise(steps):
        ways = {
            target: len(_alternatives(step, target)) * found
            for target in step.components
            if (found := sum(n for name, n in ways.items() if rows[name] < heard[target]))
        }
        if not ways:
            order = "heads and MLP side by side" if wiring.parallel else "heads before the MLP"
            raise step.word.error(
                f"{step.name} reads nothing of {before.name}, which does not run before it",
                f"name components in the order they run: layer by layer, {order}",
            )
    return sum(ways.values())


def _expand(steps: Sequence[_Step], wiring: Wiring) -> Iterator[Path]:
    rows, heard = wiring.source_rows, _heard(wiring)
    # Only what leads to the end: else the search could be lost in paths that stop half way.
    alive = [steps[-1].components]
    for step in reversed(steps[:-1]):
        latest = max(heard[target] for target in alive[0])
        alive.insert(0, tuple(name for name in step.components if rows[name] < latest))

    def extend(nodes: tuple[tuple[str, str], ...]) -> Iterator[Path]:
        place = len(nodes)
        if place == len(steps):
            yield Path(nodes)
            return
        for target in alive[place]:
            if rows[nodes[-1][0]] < heard[target]:
                for ports in _alternatives(steps[place], target):
                    yield from extend((*nodes, (target, ports)))

    for component in alive[0]:
        yield from extend(((component, ""),))


def _alternatives(step: _Step, component: str) -> tuple[str, ...]:
    return step.ports if component.startswith("a") else ("",)


@lru_cache(maxsize=16)
def _heard(wiring: Wiring) -> dict[str, int]:
    """How many of the sources each component that reads can hear, in forward order."""
    return {
        wiring.receivers[column].component: block.n_sources
        for block in wiring.blocks()
        for column in range(block.receivers.start, block.receivers.stop)
    }


def _clip(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"
