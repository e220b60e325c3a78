"""Vector: cards as static SVG for a paper, a latent and its random direction side by side."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from circuitlab_feature_interactions.cards.page import TINT
from circuitlab_feature_interactions.cards.text import (
    UNKNOWN,
    context_words,
    density_words,
    number,
    plain,
)

#: Of the picture, in points: as wide as the text of a page of 8.5 inches with usual margins.
WIDTH = 504.0
_GAP, _INSET, _NAMES = 10.0, 8.0, 46.0
_CARD = (WIDTH - _GAP) / 2
#: Advance of a monospaced character in em, and what any other is taken to be at most, on average.
CELL, LETTER = 0.602, 0.6
_TOKEN, _SMALL, _LINE = 6.5, 6.5, 10.5
#: Characters of a token.
_LONGEST = 14
_INK, _SOFT, _RULE, _PAPER = "#222222", "#666666", "#dddddd", "#fafafa"
_SANS, _MONO = "Helvetica,Arial,sans-serif", "DejaVu Sans Mono,Menlo,Consolas,monospace"
_TINTS = {"hot": "#d55e00", "less": "#0072b2", "more": "#009e73"}
_BAR, _NULL = "#0072b2", "#999999"

#: A token: its text, its tint, how much of it, whether it is the one that is meant.
_Token = tuple[str, str, float, bool]


def picture(cards: Sequence[Mapping[str, Any]], note: str) -> str:
    """Pairs of cards below each other as one SVG: no script, no link; the same cards, same bytes.

    Args:
        cards: As in :func:`measuring.card_data`.
        note: One line under them: model, data, tokens, seed.
    """
    parts, note = list[str](), plain(note)
    y = 0.5
    for pair in cards:
        sides = [_Card(pair[name], n * (_CARD + _GAP), y) for n, name in enumerate(_SIDES)
                 if pair[name]]  # fmt: skip
        height = max(side.height for side in sides)
        for side in sides:
            parts += side.framed(height)
        y += height + _GAP
    lines = _wrapped(note, WIDTH, _SMALL)
    for line in lines:
        parts.append(_text(0, y + _SMALL, line, _SMALL, _SOFT))
        y += 1.4 * _SMALL
    height = y + 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(WIDTH)}pt" height="{_n(height)}pt"'
            f' viewBox="0 0 {_n(WIDTH)} {_n(height)}" role="img" font-family="{_SANS}">',
            f"<title>Feature cards: {_escaped(note)}</title>",
            f'<rect width="{_n(WIDTH)}" height="{_n(height)}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


_SIDES = ("latent", "control")


class _Card:
    """One card, drawn from the top down.

    Attributes:
        height: How much was drawn.
    """

    def __init__(self, card: Mapping[str, Any], x: float, y: float) -> None:
        self._x, self._y, self._inner = x, y, _CARD - 2 * _INSET
        self.height, self._parts = _INSET, list[str]()
        self._control = card["kind"] != "latent"
        self._heading(card)
        self._say(" ".join(density_words(card["density"])))
        if "bins" in card:
            self._histogram(card["histogram"])
            told = " · ".join(" ".join(words) for words in context_words(card["context"]))
            self._say(f"context dependence: {told or UNKNOWN}")
            self._title("Examples over the range of activation")
            self._examples(card)
            self._title("The largest, with one token before it changed")
            self._ablations(card["ablations"])
        masked = card["lens"]["masked"]
        left_out = f"; {masked:,} of unlike norm left out" if masked else ""
        self._title(f"Logits raised and lowered most{left_out}")
        for name, tint in (("raised", "hot"), ("lowered", "less")):
            ranked = card["lens"][name]
            most = abs(ranked[0][1]) if ranked else 1.0
            tokens = [(text, tint, 0.5 * abs(v) / most, False) for text, v in ranked]
            self._strip(name, [*_fitting(tokens, self._room)])
        self.height += _INSET / 2

    def framed(self, height: float) -> list[str]:
        """The card in a frame of this height."""
        dash = ' stroke-dasharray="3,2"' if self._control else ""
        return [
            f'<g class="card"><rect x="{_n(self._x + 0.5)}" y="{_n(self._y)}" '
            f'width="{_n(_CARD - 1)}" height="{_n(height)}" rx="4" fill="{_PAPER}" '
            f'stroke="{_RULE}"{dash}/>',
            *self._parts,
            "</g>",
        ]

    @property
    def _room(self) -> float:
        """Width of a strip."""
        return self._inner - _NAMES

    def _down(self, by: float) -> float:
        """The height where the next thing begins, ``by`` points high."""
        y = self._y + self.height
        self.height += by
        return y

    def _heading(self, card: Mapping[str, Any]) -> None:
        name, kind = plain(card["name"]), plain(card["kind"])
        if self._control:
            name, kind = kind, f"beside {name}"
        y = self._down(14) + 9
        left, right = self._x + _INSET, self._x + _CARD - _INSET
        kind = _cut(kind, self._inner * 0.4, _SMALL)
        self._parts.append(_text(left, y, _cut(name, self._inner * 0.58, 9), 9, _INK, bold=True))
        self._parts.append(_text(right, y, kind, _SMALL, _SOFT, anchor="end"))

    def _say(self, words: str) -> None:
        for line in _wrapped(words, self._inner, _SMALL):
            self._parts.append(_text(self._x + _INSET, self._down(9.5) + 7, line, _SMALL, _INK))

    def _title(self, words: str) -> None:
        y = self._down(14) + 11
        line = _cut(words, self._inner, _SMALL)
        self._parts.append(_text(self._x + _INSET, y, line, _SMALL, _SOFT, bold=True))

    def _histogram(self, facts: Mapping[str, Any]) -> None:
        """Bars whose height is the logarithm of 1 + the count."""
        counts, high = facts["counts"], 34.0
        most, wide = math.log1p(max(counts)), self._inner / len(counts)
        left, foot = self._x + _INSET, self._down(high + 12) + high + 2
        shade = _NULL if self._control else _BAR
        for place, count in enumerate(counts):
            tall = high * math.log1p(count) / most
            if count:
                self._parts.append(
                    f'<rect class="bar" x="{_n(left + place * wide + 0.4)}" y="{_n(foot - tall)}" '
                    f'width="{_n(wide - 0.8)}" height="{_n(tall)}" fill="{shade}"/>'
                )
        right = left + self._inner
        self._parts.append(
            f'<line x1="{_n(left)}" y1="{_n(foot)}" x2="{_n(right)}" y2="{_n(foot)}" '
            f'stroke="{_SOFT}" stroke-width="0.5"/>'
        )
        told = f"activation; height: log of 1 + tokens, at most {max(counts):,}"
        middle, y = left + self._inner / 2, foot + 7.5
        self._parts += [
            _text(left, y, "0", 5.5, _SOFT),
            _text(middle, y, told, 5.5, _SOFT, anchor="middle"),
            _text(right, y, number(facts["edges"][-1]), 5.5, _SOFT, anchor="end"),
        ]

    def _examples(self, card: Mapping[str, Any]) -> None:
        largest = card["top"]["value"]
        for found in card["bins"]:
            name = f"{number(found['low'])} – {number(found['high'])}"
            for place, example in enumerate(found["examples"]):
                here = example["position"] - example["first"]
                tokens: list[_Token] = [
                    (text, "hot", value / largest, n == here)
                    for n, (text, value) in enumerate(
                        zip(example["texts"], example["values"], strict=True)
                    )
                ]
                kept = _around(tokens, here, self._room)
                self._strip(name if place == 0 else f"{found['tokens']:,} tokens", kept)
            if not found["examples"]:
                self._strip(name, [])

    def _ablations(self, facts: Mapping[str, Any]) -> None:
        last = len(facts["texts"]) - 1
        for name in ("replaced", "removed", "hidden"):
            tokens: list[_Token] = []
            for place, (text, left) in enumerate(zip(facts["texts"], facts[name], strict=True)):
                lost = 0.0
                if left is not None and facts["value"]:
                    lost = 1 - left / facts["value"]
                tokens.append((text, "less" if lost > 0 else "more", abs(lost), place == last))
            self._strip(name, _around(tokens, last, self._room))
        self._say("blue: it falls, full colour: to 0; green: it grows")

    def _strip(self, name: str, tokens: Sequence[_Token]) -> None:
        """Tokens on one line, tinted, with a name before them."""
        y, x = self._down(_LINE), self._x + _INSET
        self._parts.append(_text(x, y + 7.5, _cut(name, _NAMES, 5.5), 5.5, _SOFT))
        x += _NAMES
        if not tokens:
            self._parts.append(_text(x, y + 7.5, "none", _SMALL, _SOFT))
        for text, tint, share, here in tokens:
            words, wide = _cell(text), _wide(text)
            alpha = TINT * min(max(share, 0.0), 1.0)
            frame = f' stroke="{_INK}" stroke-width="0.7"' if here else ""
            if alpha >= 0.0005 or here:
                self._parts.append(
                    f'<rect class="token" x="{_n(x)}" y="{_n(y + 0.5)}" width="{_n(wide - 0.6)}" '
                    f'height="{_n(_LINE - 1.5)}" rx="1.2" fill="{_TINTS[tint]}" '
                    f'fill-opacity="{alpha:.3f}"{frame}/>'
                )
            # Whatever face the reader has, the text is as long as its cell.
            length = f' textLength="{_n(wide - 2)}" lengthAdjust="spacingAndGlyphs"'
            self._parts.append(
                f'<text x="{_n(x + 0.7)}" y="{_n(y + 7.5)}" font-family="{_MONO}" '
                f'font-size="{_n(_TOKEN)}" fill="{_INK}"{length}>{_escaped(words)}</text>'
            )
            x += wide


# --- widths ---------------------------------------------------------------------------------------


def _cells(text: str) -> int:
    """Monospaced columns that a text takes."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _cell(text: str) -> str:
    """A token as it is drawn: blanks kept, not longer than others may be."""
    words = plain(text, _LONGEST)
    while _cells(words) > 2 * _LONGEST:
        words = words[: len(words) // 2] + "…"
    return words.replace(" ", "\u00a0") or "\u00a0"


def _wide(text: str) -> float:
    return _cells(_cell(text)) * CELL * _TOKEN + 2


def _fitting(tokens: Sequence[_Token], room: float) -> Sequence[_Token]:
    """As many of the first as there is room for."""
    for n, token in enumerate(tokens):
        room -= _wide(token[0])
        if room < 0:
            return tokens[:n]
    return tokens


def _around(tokens: Sequence[_Token], here: int, room: float) -> Sequence[_Token]:
    """As many about one of them as there is room for: two before it for one after it."""
    first, end = here, here + 1
    room -= _wide(tokens[here][0])
    turn = 0
    while first > 0 or end < len(tokens):
        before = first > 0 and (turn % 3 < 2 or end == len(tokens))
        turn += 1
        if not before and end == len(tokens):
            continue
        room -= _wide(tokens[first - 1 if before else end][0])
        if room < 0:
            break
        first, end = (first - 1, end) if before else (first, end + 1)
    return tokens[first:end]


def _cut(words: str, room: float, size: float) -> str:
    most = int(room / (LETTER * size))
    return words if len(words) <= most else words[: most - 1] + "…"


def _wrapped(text: str, room: float, size: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and len(joined) * LETTER * size <= room:
            lines[-1] = joined
        else:
            lines.append(_cut(word, room, size))
    return lines


# --- marks ----------------------------------------------------------------------------------------


def _text(
    x: float,
    y: float,
    words: str,
    size: float,
    shade: str,
    *,
    anchor: str = "start",
    bold: bool = False,
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{shade}" '
        f'text-anchor="{anchor}"{weight}>{_escaped(words)}</text>'
    )


def _escaped(words: str) -> str:
    return escape(words, quote=True)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
