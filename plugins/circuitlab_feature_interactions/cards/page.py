"""Page: cards as one static file of HTML, which asks for nothing and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from circuitlab_feature_interactions.cards.style import STYLE
from circuitlab_feature_interactions.cards.text import (
    SHOWN,
    UNKNOWN,
    context_words,
    density_words,
    number,
    shown,
)

#: Strongest tint of a token.
TINT = 0.85

_ABOUT = """Left a latent, right a random direction that went the same way: cut off so that it is
active at as many tokens. What both show is no property of the latent. Examples are drawn from the
whole range of the activation, each fifth alike; colour is activation, as a share of the feature's
largest; the outlined token is the one drawn. Context dependence is the share of the activation that
is lost when a token stands alone at the beginning, or when the tokens before it are hidden from
attention: 0 where the token alone decides."""

#: Ways to change a token of the context.
_WAYS = ("replaced", "removed", "hidden")


def page(found: Mapping[str, Any]) -> str:
    """The page of :func:`measuring.card_data`."""
    facts = (
        f"{shown(found['model'])} · {shown(found['data'])} · {found['tokens']:,} tokens of "
        f"{found['prompts']:,} prompts · seed {found['seed']}"
    )
    warnings = "".join(f'<p class="warning">{shown(w, 2000)}</p>\n' for w in found["warnings"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Feature cards: {shown(found['model'])}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<h1>Feature cards</h1>\n<p class="soft">{facts}</p>\n'
        f'<p class="soft">{_ABOUT}</p>\n{warnings}'
        f"{''.join(map(_pair, found['cards']))}</body>\n</html>\n"
    )


def _pair(cards: Mapping[str, Any]) -> str:
    inside = "".join(_card(cards[name]) for name in ("latent", "control") if cards[name])
    return f'<section class="pair">\n{inside}</section>\n'


def _card(card: Mapping[str, Any]) -> str:
    control = card["kind"] != "latent"
    name, kind = card["name"], card["kind"]
    if control:
        name, kind = kind, f"beside {name}"
    parts = [
        f'<article class="card{" control" if control else ""}">\n'
        f"<header><h2>{shown(name)}</h2>"
        f'<span class="kind">{shown(kind)}</span></header>\n',
        f"<p>{_density(card['density'])}</p>\n",
    ]
    if "bins" in card:
        parts += [
            _histogram(card["histogram"]),
            f"<p>{_context(card['context'])}</p>\n",
            "<h3>Examples over the range of activation</h3>\n",
            *_bins(card),
            "<h3>The largest activation, with one token before it changed</h3>\n",
            *_ablations(card["ablations"]),
        ]
    parts += [_lens(card["lens"]), "</article>\n"]
    return "".join(parts)


def _density(facts: Mapping[str, Any]) -> str:
    first, *rest = density_words(facts)
    return " ".join([first, *(f'<span class="soft">{words}</span>' for words in rest)])


def _context(facts: Mapping[str, Any]) -> str:
    told = [
        " ".join([score, *(f'<span class="soft">{words}</span>' for words in interval)])
        for score, *interval in context_words(facts)
    ]
    return f"context dependence: {' · '.join(told) or UNKNOWN}"


def _histogram(facts: Mapping[str, Any]) -> str:
    """Bars whose height is the logarithm of 1 + the count."""
    counts = facts["counts"]
    most, wide = math.log1p(max(counts)), 480 / len(counts)
    bars = []
    for place, count in enumerate(counts):
        high = 60 * math.log1p(count) / most
        bars.append(
            f'<rect x="{place * wide + 0.5:.1f}" y="{62 - high:.2f}" width="{wide - 1:.1f}" '
            f'height="{high:.2f}"></rect>'
        )
    label = f"Histogram of activations, {len(counts)} bars, logarithmic"
    return (
        f'<svg viewBox="0 0 480 64" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<line x1="0" y1="62.5" x2="480" y2="62.5"></line>{"".join(bars)}</svg>\n'
        f'<div class="axis"><span>0</span><span>activation; height: log of 1 + tokens, at most '
        f"{max(counts):,}</span><span>{number(facts['edges'][-1])}</span></div>\n"
    )


def _bins(card: Mapping[str, Any]) -> list[str]:
    largest = card["top"]["value"]
    rows = []
    for found in card["bins"]:
        strips = "".join(_example(example, largest) for example in found["examples"])
        name = f"{number(found['low'])} – {number(found['high'])}<br>{found['tokens']:,} tokens"
        empty = '<p class="soft">none</p>'
        rows.append(_row(name, strips or empty))
    return rows


def _example(example: Mapping[str, Any], largest: float) -> str:
    here = example["position"] - example["first"]
    tokens = [
        _token(text, "hot", value / largest, number(value), here=place == here)
        for place, (text, value) in enumerate(zip(example["texts"], example["values"], strict=True))
    ]
    before = "…" if example["first"] else ""
    after = "…" if example["first"] + len(tokens) < example["length"] else ""
    return f'<p class="strip">{before}{"".join(tokens)}{after}</p>'


def _ablations(facts: Mapping[str, Any]) -> list[str]:
    """A strip for each way; blue where the activation falls, green where it grows."""
    last = len(facts["texts"]) - 1
    rows = []
    for name in _WAYS:
        tokens = []
        for place, (text, left) in enumerate(zip(facts["texts"], facts[name], strict=True)):
            if left is None:
                tokens.append(_token(text, "none", 0, "", here=place == last))
                continue
            lost = 1 - left / facts["value"] if facts["value"] else 0.0
            tint, told = "less" if lost > 0 else "more", f"{number(left)} is left"
            tokens.append(_token(text, tint, abs(lost), told, here=place == last))
        before = "…" if facts["first"] else ""
        strip = f'<p class="strip">{before}{"".join(tokens)}</p>'
        rows.append(_row(name, strip))
    told = (
        f'<p class="soft">{number(facts["value"])} as it is. Each token in turn is replaced by '
        f"others of the data, removed, or hidden from attention. Blue: the activation falls, full "
        f"colour: to 0. Green: it grows.</p>\n"
    )
    return [*rows, told]


def _lens(facts: Mapping[str, Any]) -> str:
    rows = [
        _row(name, f'<p class="strip">{_ranked(facts[name], tint)}</p>')
        for name, tint in (("raised", "hot"), ("lowered", "less"))
    ]
    masked = f"; {facts['masked']:,} tokens of unlike norm left out" if facts["masked"] else ""
    return f"<h3>Logits that its direction raises and lowers most{masked}</h3>\n{''.join(rows)}"


def _ranked(tokens: Sequence[Sequence[Any]], tint: str) -> str:
    if not tokens:
        return '<span class="none">none</span>'
    most = abs(tokens[0][1])
    return " ".join(
        _token(text, tint, 0.5 * abs(value) / most, number(value), here=False)
        for text, value in tokens
    )


def _token(text: str, tint: str, share: float, told: str, *, here: bool) -> str:
    alpha = TINT * min(max(share, 0.0), 1.0)
    style = f' style="--a: {alpha:.3f}"' if alpha else ""
    full = shown(text) if len(text) > SHOWN else ""
    title = " · ".join(filter(None, (full, told)))
    note = f' title="{title}"' if title else ""
    kind = " ".join(filter(None, (tint if alpha or tint == "none" else "", "here" * here)))
    named = f' class="{kind}"' if kind else ""
    return f"<span{named}{style}{note}>{shown(text, SHOWN)}</span>"


def _row(name: str, content: str) -> str:
    return f'<div class="row"><div class="name">{name}</div><div>{content}</div></div>\n'
