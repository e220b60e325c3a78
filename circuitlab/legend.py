"""Legend and caption: what colours and widths mean, and where the circuit came from.

:func:`compose` puts them under the drawn components and effects and gives the whole picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from circuitlab.components import number
from circuitlab.errors import GraphError
from circuitlab.graph import CircuitGraph
from circuitlab.labels import clip, visible
from circuitlab.layout import (
    OWNED,
    Selection,
    boxes,
    curves,
    helps,
    numbers,
)
from circuitlab.routes import Places, line_width
from circuitlab.scene import Box, Curve, Point, Scene, Text, text_width
from circuitlab.symbols import SYMBOLS, Outline
from circuitlab.wiring import Wiring

_MARGIN = 12.0
_MIN_WIDTH = 300.0
_SIZE = 8.5
_ROW = 14.0
_SAMPLE = 22.0
_GREY, _RED = "#555555", "#C00000"

#: Layers, and heads in a layer, of the largest model whose edges are counted.
_LARGEST = 1000

_Item = tuple[float, list[Curve], list[Text]]


def compose(circuit: CircuitGraph, selection: Selection, places: Places) -> Scene:
    """The whole picture: components and effects, the legend under them, the caption under that."""
    drawn = boxes(selection, places)
    lines = curves(selection, places)
    written = numbers(selection, places)
    left, bottom, right, top = _extent(drawn, lines, written)
    content = max(right - left, _MIN_WIDTH)
    rows = _flow(_legend(circuit, selection), content)
    text = _caption_rows(circuit, selection, content)
    under = _ROW * (len(rows) + len(text)) + (10 if rows else 0) + 10
    width, height = content + 2 * _MARGIN, top - bottom + under + 2 * _MARGIN

    dx = _MARGIN + (content - (right - left)) / 2 - left
    dy = _MARGIN + under - bottom
    drawn = [_move_box(box, dx, dy) for box in drawn]
    lines = [_move_curve(curve, dx, dy) for curve in lines]
    written = [replace(t, x=t.x + dx, y=t.y + dy) for t in written]
    y = _MARGIN + under - 16
    for items in rows:
        x = _MARGIN
        for item_width, item_lines, item_texts in items:
            lines += [_move_curve(curve, x, y) for curve in item_lines]
            written += [replace(t, x=t.x + x, y=t.y + y) for t in item_texts]
            x += item_width + 16
        y -= _ROW
    y -= 4 if rows else 0
    for line in text:
        written.append(replace(line, x=_MARGIN, y=y))
        y -= _ROW
    return Scene(width, height, " ".join(caption(circuit, selection)), lines, drawn, written)


def caption(circuit: CircuitGraph, selection: Selection) -> list[str]:
    """The caption, without its verdict: model, task, metric and method; then what is shown."""
    graph = circuit.graph
    words = [_word(graph.get(key)) for key in ("model", "task", "metric")]
    words.append(_word(graph.get("method") or graph.get("analysis")))
    first = " · ".join(word for word in words if word)
    shown, whole = len(selection.effects), selection.n_effects
    total = n_edges(circuit)
    noun = "edge" + "s" * (shown != 1)
    if any(c.symbol for c in selection.components.values()) or _totals(circuit):
        # An arrow to a gate is no edge of the model, nor is one that stands for all paths.
        noun, total = noun.replace("edge", "effect"), None
    if shown < whole:
        second = f"showing the strongest {shown:,} of {whole:,} {noun}"
        second += f" (the model has {total:,})" if total is not None and total > whole else ""
        second += "; equal scores by name" if selection.tied else ""
    elif total is not None and total > shown:
        second = f"showing {shown:,} of {total:,} edges"
    else:
        second = f"showing all {shown:,} {noun}" if shown != 1 else f"showing 1 {noun}"
    score = graph.get("score")
    third = f"score: {_word(score, 200)}" if score and not helps(circuit) else ""
    return [line for line in (first, second, third) if line]


def verdict(circuit: CircuitGraph) -> str:
    """The warning that a circuit which its own check did not establish must carry, or ``""``."""
    if circuit.graph.get("verdict") != "not established":
        return ""
    reason = _word(circuit.graph.get("verdict_reason"), 400) or "no reason was recorded"
    return f"NOT ESTABLISHED: {reason}"


def n_edges(circuit: CircuitGraph) -> int | None:
    """How many edges there were to choose from: the model's, unless the circuit says else."""
    graph = circuit.graph
    stated = graph.get("n_edges_total")
    if isinstance(stated, int) and not isinstance(stated, bool):
        return stated
    layers, heads = graph.get("n_layers"), graph.get("n_heads")
    if not isinstance(layers, int) or not isinstance(heads, int):
        return None
    if not (0 < layers <= _LARGEST and 0 < heads <= _LARGEST):
        return None  # a stranger's file may say anything, and edges are counted layer by layer
    wiring = Wiring(layers, heads, bool(graph.get("parallel", False)))
    try:
        for name in circuit:
            wiring.component(name)
    except (GraphError, TypeError):
        return None
    return wiring.n_edges


def meanings(selection: Selection) -> list[str]:
    """What each type of gate means, and a redundant effect: those that the picture shows."""
    types = {c.label.upper() for c in selection.components.values() if c.symbol}
    words = [f"{name}: {s.meaning}" for name, s in SYMBOLS.items() if name in types]
    if any(c.symbol and c.symbol.figure and c.role for c in selection.components.values()):
        words.append("number in a gate: interaction of its members")
    if any(c.stacked for c in selection.components.values()):
        words.append("stacked: features active together, and how many")
    if any(effect.redundant for effect in selection.effects):
        words.append("dashed: redundant, others can stand in")
    if any(effect.inclusion < 1 for effect in selection.effects):
        words.append("faint: found again in few resamples")
    return words


def _totals(circuit: CircuitGraph) -> bool:
    return any(data.get("kind") == "total" for *_, data in circuit.edges(data=True))


def sign_words(circuit: CircuitGraph) -> tuple[str, str]:
    """What a negative and a positive score mean."""
    if helps(circuit):
        return "helps the task (−)", "hurts the task (+)"
    return "negative", "positive"


def owner_words(circuit: CircuitGraph, selection: Selection) -> dict[str, str]:
    """What each colour says where two circuits are compared; empty elsewhere."""
    names = circuit.graph.get("compared")
    first, second = names if isinstance(names, list) and len(names) == 2 else ("A", "B")
    shown = {effect.owner for effect in selection.effects}
    words = {"a": f"only {_word(first, 40)}", "b": f"only {_word(second, 40)}", "both": "both"}
    return {owner: words[owner] for owner in OWNED if owner in shown}


def _owners(circuit: CircuitGraph, selection: Selection) -> list[_Item]:
    words = owner_words(circuit, selection)
    return [_line_item(*OWNED[owner], text) for owner, text in words.items()]


def _legend(circuit: CircuitGraph, selection: Selection) -> list[_Item]:
    if not selection.effects:
        return []
    dashed = not selection.established
    items = _owners(circuit, selection)
    signs = [s for s in (-1.0, 1.0) if any(effect.score * s > 0 for effect in selection.effects)]
    if items or (signs == [1.0] and not selection.helps):
        signs = []  # colours say something else, or the score knows no sign
    for sign, words in zip((-1.0, 1.0), sign_words(circuit), strict=True):
        if sign in signs:
            items.append(_line_item(selection.colour(sign), _dash(dashed), words))
    low, high = selection.scores
    texts, lines, x = [_words(0, "|score|")], [], _wide("|score|") + 6
    for size in (low, high) if low < high else (high,):
        figure = number(size).lstrip("+")
        width = line_width(size / high if high else 0.0)
        lines.append(_sample(x, width, "#555555", _dash(dashed)))
        texts.append(_words(x + _SAMPLE + 4, figure))
        x += _SAMPLE + 4 + _wide(figure) + 8
    items.append((x - 8, lines, texts))
    ports = {effect.port for effect in selection.effects}
    if ports & {"q", "k", "v"}:
        words = "q, k, v: read as query, key, value"
        items.append((_wide(words), [], [_words(0, words)]))
    for words in meanings(selection):
        symbol = SYMBOLS.get(words.partition(":")[0])
        x, lines = 0.0, []
        if symbol:
            x, lines = 17.0, [_miniature(outline) for outline in symbol.outlines]
        elif words.startswith("dashed"):
            x, lines = _SAMPLE + 5, [_sample(0.0, 1.6, "#555555", "dashed")]
        items.append((x + _wide(words), lines, [_words(x, words)]))
    return items


def _flow(items: list[_Item], width: float) -> list[list[_Item]]:
    rows: list[list[_Item]] = []
    used = width + 1
    for item in items:
        if used + 16 + item[0] > width:
            rows.append([])
            used = -16.0
        rows[-1].append(item)
        used += 16 + item[0]
    return rows


def _caption_rows(circuit: CircuitGraph, selection: Selection, width: float) -> list[Text]:
    rows: list[Text] = []
    warning = verdict(circuit)
    rows += [
        Text(0, 0, line, 9.5, _RED, True, "start") for line in _wrap(warning, width, 9.5, bold=True)
    ]
    for index, line in enumerate(caption(circuit, selection)):
        shade = "#222222" if index == 0 else _GREY
        rows += [Text(0, 0, part, 9.0, shade, False, "start") for part in _wrap(line, width, 9.0)]
    return rows


def _wrap(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size, bold) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    most = max(8, int(width / (0.6 * size)))
    return [clip(line, most) if text_width(line, size) > width else line for line in lines]


def _word(value: Any, width: int = 60) -> str:
    if isinstance(value, Mapping):
        value = value.get("name", "")
    return clip(visible(str(value)), width) if value not in (None, "") else ""


def _words(x: float, text: str) -> Text:
    return Text(x, 0, text, _SIZE, _GREY, anchor="start")


def _wide(text: str) -> float:
    return text_width(text, _SIZE)


def _line_item(shade: str, dash: str, words: str) -> _Item:
    line = _sample(0.0, 2.2, shade, dash)
    return _SAMPLE + 5 + _wide(words), [line], [_words(_SAMPLE + 5, words)]


def _dash(dashed: bool) -> str:
    return "dashed" if dashed else "solid"


def _sample(x: float, width: float, shade: str, dash: str) -> Curve:
    third = _SAMPLE / 3
    points = tuple((x + step * third, 0.0) for step in range(4))
    return Curve(points, shade, width, dash=dash)


def _miniature(outline: Outline) -> Curve:
    return Curve(tuple((6 + 0.24 * x, 0.24 * y) for x, y in outline), "#555555", 0.9)


def _extent(
    drawn: list[Box], lines: list[Curve], written: list[Text]
) -> tuple[float, float, float, float]:
    points: list[Point] = [point for curve in lines for point in curve.points]
    for box in drawn:
        points += [(box.x - box.width / 2, box.y - box.height / 2)]
        points += [(box.x + box.width / 2, box.y + box.height / 2)]
    for text in written:
        half = text_width(text.text, text.size) / 2
        points += [(text.x - half, text.y), (text.x + half, text.y)]
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] or [0.0]
    return min(xs), min(ys), max(xs), max(ys)


def _move_box(box: Box, dx: float, dy: float) -> Box:
    texts = tuple(replace(text, x=text.x + dx, y=text.y + dy) for text in box.texts)
    return replace(box, x=box.x + dx, y=box.y + dy, texts=texts)


def _move_curve(curve: Curve, dx: float, dy: float) -> Curve:
    tip = None if curve.tip is None else (curve.tip[0] + dx, curve.tip[1] + dy)
    return replace(curve, points=tuple((x + dx, y + dy) for x, y in curve.points), tip=tip)
