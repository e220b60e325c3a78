"""Pictures of circuits: DOT, SVG, PNG and PDF.

Graphviz lays small circuits out and draws every PNG and PDF. It comes with the ``pygraphviz``
wheel, else as the ``dot`` program; this is the only module that reaches for either. It runs in a
process of its own that is ended after :data:`BUDGET` seconds, because a layout can take minutes and
cannot be interrupted. An SVG needs no Graphviz: without it, or when it does not answer, places are
computed by ``layout.grid`` and a warning says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from circuitlab.components import Component, Effect, number
from circuitlab.errors import OptionError, ResourceError
from circuitlab.graph import CircuitGraph, show_by
from circuitlab.labels import escape
from circuitlab.layout import (
    MAX_EDGES,
    OWNED,
    Selection,
    grid,
    helps,
    opacity,
    select,
)
from circuitlab.legend import caption, compose, meanings, owner_words, sign_words, verdict
from circuitlab.routes import Places, at_gates, line_width
from circuitlab.scene import FONT, Point, Scene, arrow_length, to_pinned_dot, to_svg

__all__ = ["BUDGET", "SUFFIXES", "draw", "graphviz_version", "svg", "to_dot"]

#: Seconds that Graphviz has for one picture.
BUDGET = 10.0
#: Suffixes that :func:`draw` knows.
SUFFIXES = (".svg", ".png", ".pdf", ".dot")

#: Widest or highest bitmap, in pixels, that Graphviz can write.
_MAX_PIXELS = 30_000
_DPI = 200

#: What comes closest to a gate's symbol among Graphviz's own shapes; the word is inside.
_GATE_SHAPES = {"AND": "box", "OR": "house", "XOR": "house", "ADD": "circle", "mixed": "diamond"}

#: What the child runs: engine and format as arguments, DOT in, a picture out.
_CHILD = """
import sys, pygraphviz
graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
sys.stdout.buffer.write(graph.draw(format=sys.argv[2], prog=sys.argv[1]))
"""


def draw(circuit: CircuitGraph, path: Path, *, max_edges: int = MAX_EDGES) -> list[str]:
    """Write a picture of the circuit; the suffix says which: ``.svg .png .pdf .dot``.

    Args:
        circuit: A well-formed circuit.
        path: Where to; an older file is overwritten.
        max_edges: How many effects are shown, strongest first; the caption says of how many.

    Returns:
        Warnings, such as that Graphviz did not answer and the built-in layout was used.

    Raises:
        OptionError: another suffix.
        ResourceError: Graphviz cannot be had and the picture is a PNG or a PDF, or the file cannot
            be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(
            f"picture {path.name!r} has suffix {suffix!r}; pictures are {', '.join(SUFFIXES)}"
        )
    warnings: list[str] = []
    if suffix == ".dot":
        content = to_dot(circuit, max_edges=max_edges).encode()
    else:
        scene, warnings = _scene(circuit, max_edges)
        content = to_svg(scene).encode() if suffix == ".svg" else _paint(scene, suffix[1:])
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ResourceError(
            f"picture {path.name!r} cannot be written: {error.strerror}; "
            f"check free space and permissions of its folder"
        ) from error
    return warnings


def svg(circuit: CircuitGraph, *, max_edges: int = MAX_EDGES) -> str:
    """The picture as one ``<svg>`` element, safe to stand inside a notebook or an HTML page."""
    scene, _ = _scene(circuit, max_edges)
    return to_svg(scene)


show_by(svg)


def to_dot(circuit: CircuitGraph, *, max_edges: int = MAX_EDGES) -> str:
    """The circuit as DOT for ``dot -Tsvg``: the same circuit gives the same bytes.

    Names and labels are quoted and escaped; nodes are called ``n0``, ``n1``, …; no attribute refers
    to a file or an address.
    """
    selection = select(circuit, max_edges)
    lines = [*caption(circuit, selection), _colour_line(circuit, selection), *meanings(selection)]
    if warning := verdict(circuit):
        lines.insert(0, warning)
    return _dot(selection, "".join(escape(line) + "\\l" for line in lines))


# --- layout by Graphviz ---------------------------------------------------------------------------


def _scene(circuit: CircuitGraph, max_edges: int) -> tuple[Scene, list[str]]:
    selection = select(circuit, max_edges)
    warnings = []
    places = None
    if selection.small and selection.components and not selection.broken:
        try:
            places = _places(selection, json.loads(_graphviz(_dot(selection, ""), "dot", "json")))
        except _GraphvizError as error:
            warnings.append(f"{error}; the built-in layout was used")
        except (KeyError, ValueError, IndexError):
            warnings.append("Graphviz gave no usable layout; the built-in layout was used")
    places = at_gates(selection.components, selection.effects, places or grid(selection))
    return compose(circuit, selection, places), warnings


def _dot(selection: Selection, label: str) -> str:
    """DOT with ranks but no places; ``label`` is escaped already."""
    ids = {name: f"n{index}" for index, name in enumerate(selection.components)}
    # The gap also separates the lines that pass a rank: many lines would make the picture a strip.
    gap = max(0.08, 0.25 - 0.003 * len(selection.effects))
    lines = [
        "digraph circuit {",
        f'graph [rankdir="BT", ranksep="0.45", nodesep="{gap:.2f}", outputorder="edgesfirst", '
        f'fontname="{FONT}", fontsize="9", labelloc="b", labeljust="l", label="{label}"];',
        f'node [fontname="{FONT}", fontsize="11", fixedsize="true", margin="0"];',
        f'edge [fontname="{FONT}", fontsize="8"];',
    ]
    ranks = selection.ranks()
    for index, row in enumerate(ranks):
        lines.append(f'{{ rank="same"; r{index} [style="invis", shape="point", width="0.01"];')
        lines += [f"  {ids[component.name]} {_node(component)}" for component in row]
        lines.append("}")
    # dot ranks by edges alone; without the spine the logits end up below a late MLP.
    lines += [
        f'r{index} -> r{index + 1} [style="invis", weight="0"];' for index in range(len(ranks) - 1)
    ]
    lines += _by_position(ranks, ids)
    # Ties between layouts fall to the order of edges; strongest first keeps those straightest.
    numbered = list(enumerate(selection.effects))
    for index, effect in reversed(numbered):
        target = selection.components[effect.target]
        foot = f":p{target.ports.index(effect.port)}:s" if effect.port in target.ports else ""
        foot = ":s" if target.symbol else foot
        top = ":n" if selection.components[effect.source].symbol else ""
        lines.append(
            f"{ids[effect.source]}{top} -> {ids[effect.target]}{foot} "
            f"{_edge(index, effect, selection)}"
        )
    return "\n".join([*lines, "}"]) + "\n"


def _by_position(ranks: list[list[Component]], ids: dict[str, str]) -> list[str]:
    """Token positions from left to right, as the prompt is read, each above itself."""
    lines = []
    below: dict[int, str] = {}
    for row in ranks:
        placed = [component for component in row if component.positional]
        for left, right in pairwise(placed):
            lines.append(f'{ids[left.name]} -> {ids[right.name]} [style="invis"];')
        for component in placed:
            lower = below.get(component.column[0])
            if lower and component.rank[:2] != (-1, 1):
                lines.append(f'{lower} -> {ids[component.name]} [style="invis", weight="30"];')
        below |= {c.column[0]: ids[c.name] for c in reversed(placed)}
    return lines


def _node(component: Component) -> str:
    fill, stroke, ink, radius = component.style
    text = escape(component.label) + ("\\n" + escape(component.role) if component.role else "")
    styles = ["filled"] + ["rounded"] * (radius > 0) + ["dashed"] * (not component.known)
    shape = _GATE_SHAPES[component.label] if component.symbol else "box"
    if component.ports:
        shape = "Mrecord"
        feet = "|".join(f"<p{i}> {_field(p)}" for i, p in enumerate(component.ports))
        text = f"{{{_field(component.label)}" + (
            "\\n" + _field(component.role) if component.role else ""
        )
        text += f"|{{{feet}}}}}"
        styles = [style for style in styles if style != "rounded"]
    stack = 'peripheries="2", ' if component.stacked else ""
    return (
        f'[label="{text}", shape="{shape}", style="{",".join(styles)}", fillcolor="{fill}", '
        f'color="{stroke}", fontcolor="{ink}", width="{component.width / 72:.3f}", '
        f'height="{component.height / 72:.3f}", {stack}tooltip="{escape(component.tooltip)}"];'
    )


def _field(text: str) -> str:
    """``text`` inside a record label, whose own marks are braces, bars and angle brackets."""
    return "".join("\\" + c if c in "{}|<> " else c for c in escape(text))


def _edge(index: int, effect: Effect, selection: Selection) -> str:
    width = line_width(effect.strength)
    label = f'label=" {number(effect.score)} ", ' if selection.numbered else ""
    shade, dash = selection.ink(effect)
    faint = f"{round(255 * opacity(effect)):02x}" if effect.inclusion < 1 else ""
    arrow = f'arrowsize="{arrow_length(width) / 10:.2f}"' if effect.directed else 'dir="none"'
    return (
        f'[id="e{index}", {label}color="{shade}{faint}", fontcolor="{shade}", '
        f'penwidth="{width:.2f}", '
        f"{arrow}, "
        f'weight="{1 + round(9 * effect.strength)}", '
        f'style="{dash}", '
        f'tooltip="{escape(effect.tooltip)}"];'
    )


def _colour_line(circuit: CircuitGraph, selection: Selection) -> str:
    if owners := owner_words(circuit, selection):
        return "; ".join([f"{OWNED[owner][1]}: {text}" for owner, text in owners.items()])
    negative, positive = sign_words(circuit)
    colours = ("blue", "orange") if helps(circuit) else ("purple", "green")
    return f"{colours[0]}: {negative}; {colours[1]}: {positive}; width: root of |score|"


def _places(selection: Selection, document: dict[str, object]) -> Places:
    """Places from what Graphviz's ``json`` format says."""
    objects, edges = document["objects"], document.get("edges", [])
    if not isinstance(objects, list) or not isinstance(edges, list):
        raise ValueError("no objects")
    found = {item["name"]: _point(item["pos"]) for item in objects if "pos" in item}
    nodes = {name: found[f"n{index}"] for index, name in enumerate(selection.components)}
    paths: dict[int, tuple[tuple[Point, ...], Point]] = {}
    figures: dict[int, Point] = {}
    for item in edges:
        if "id" not in item:
            continue
        index = int(item["id"][1:])
        head, *rest = item["pos"].split()
        effect = selection.effects[index]
        if not effect.directed:
            head, rest = rest[-1], [head, *rest]
        points = tuple(_point(text) for text in rest)
        points = _from_inside(nodes[effect.source], points)
        if not effect.directed:
            points = _from_inside(nodes[effect.target], points[::-1])[::-1]
        paths[index] = points, _point(head.removeprefix("e,"))
        if "lp" in item:
            figures[index] = _point(item["lp"])
    ordered = [paths[index] for index in range(len(selection.effects))]
    return Places(nodes, tuple(p for p, _ in ordered), tuple(t for _, t in ordered), figures)


def _from_inside(centre: Point, points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Begin under the box: where it is rounded, an edge that ends at its rectangle would float."""
    (x, y), (cx, cy) = points[0], centre
    steps = [(x + (cx - x) * part, y + (cy - y) * part) for part in (0.5, 0.33, 0.17)]
    return (*steps, *points)


def _point(text: str) -> Point:
    x, y = (float(part) for part in text.split(","))
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"place {text!r} is not finite")
    return x, y


# --- running Graphviz -----------------------------------------------------------------------------


class _GraphvizError(Exception):
    """Graphviz is missing, crashed, or did not answer; the text says which."""


def _paint(scene: Scene, suffix: str) -> bytes:
    longest = max(scene.width, scene.height) / 72
    dpi = max(36, min(_DPI, int(_MAX_PIXELS / longest)))
    try:
        return _graphviz(to_pinned_dot(scene, dpi), "nop2", suffix)
    except _GraphvizError as error:
        raise ResourceError(
            f"a {suffix.upper()} needs Graphviz, but {error}; "
            f"run `pip install pygraphviz`, or write an .svg, which needs none"
        ) from error


def _graphviz(dot: str, engine: str, suffix: str) -> bytes:
    """What Graphviz makes of ``dot``; whichever Graphviz answers first within the budget."""
    commands = _commands(engine, suffix)
    if not commands:
        raise _GraphvizError("Graphviz is not installed")
    deadline = time.monotonic() + BUDGET
    failure = ""
    for command in commands:
        try:
            return _run(command, dot.encode(), max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            failure = failure or f"Graphviz did not answer in {BUDGET:g} s"
        except (OSError, ValueError) as error:
            failure = failure or f"Graphviz failed ({error})"
    raise _GraphvizError(failure)


def graphviz_version() -> str | None:
    """Where Graphviz would come from: the pygraphviz wheel, else ``dot``; None without either."""
    if importlib.util.find_spec("pygraphviz") is not None:
        from importlib.metadata import version

        return f"in pygraphviz {version('pygraphviz')}"
    return shutil.which("dot")


def _commands(engine: str, suffix: str) -> list[list[str]]:
    commands = []
    if importlib.util.find_spec("pygraphviz") is not None:
        # -P: a file called pygraphviz.py in the working directory must not be run.
        commands.append([sys.executable, "-P", "-c", _CHILD, engine, suffix])
    if program := shutil.which("dot"):
        commands.append([program, f"-K{engine}", f"-T{suffix}"])
    return commands


def _run(command: list[str], text: bytes, seconds: float) -> bytes:
    process = subprocess.Popen(  # noqa: S603  (our own interpreter, or dot, with no shell)
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, complaint = process.communicate(text, timeout=seconds)
    except BaseException:
        _end(process)
        raise
    if process.returncode != 0 or not output:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"exit {process.returncode}{': ' + last[0][:200] if last else ''}")
    return output


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child and its children: an older pygraphviz starts ``dot`` itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
