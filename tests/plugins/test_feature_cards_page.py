"""The page of feature cards: inert whatever tokens say, the same each time."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from card_oracles import write_card_set
from circuitlab_feature_interactions.cards.making import feature_cards
from circuitlab_feature_interactions.cards.measuring import card_data
from circuitlab_feature_interactions.cards.page import page
from circuitlab_feature_interactions.cards.text import shown

import circuitlab
from circuitlab import OptionError
from circuitlab.labels import escape_xml

HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "</style><img src=//x onerror=1>",
    "&lt;b&gt; ]]> <!-- ' javascript:x",
    "\x1b[31m\x00\u202e\ud800",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("induction")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: Any) -> Path:
    return write_card_set(model, tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def cards(model: Any, folder: Path) -> Any:
    return card_data(
        model,
        dictionaries=folder,
        features="mlp_in.1: 3, 11; mlp_out.1: 5",
        n_tokens=400,
    )


class Inert(HTMLParser):
    """Refuses tags and attributes that could do or fetch anything."""

    TAGS = re.compile(
        "html|head|meta|title|style|body|h[123]|p|section|article|header|span|div|br|svg|line|rect"
    )
    ATTRIBUTES = re.compile(
        "lang|charset|http-equiv|content|name|class|style|title|viewbox|preserveaspectratio|role|"
        "aria-label|[xy][12]?|width|height"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self.TAGS.fullmatch(tag)
        for name, value in attrs:
            assert self.ATTRIBUTES.fullmatch(name)
            assert name != "style" or re.fullmatch(r"--a: \d\.\d{3}", value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def hostile(found: Any) -> Any:
    """The data with every token, and what else comes from others, replaced."""
    if isinstance(found, dict):
        texts = {"texts": None, "model": HOSTILE[0], "data": HOSTILE[1], "warnings": [*HOSTILE]}
        return {
            key: texts[key] or [HOSTILE[n % len(HOSTILE)] for n in range(len(value))]
            if key in texts
            else hostile(value)
            for key, value in found.items()
        }
    if isinstance(found, list):
        return [hostile(value) for value in found]
    return HOSTILE[2] if isinstance(found, str) and found not in ("latent", "unknown") else found


def test_hostile_tokens_are_inert(cards: Any) -> None:
    """Whatever tokens, names and warnings hold, only harmless tags and attributes are there."""
    text = page(hostile(cards))
    parser = Inert()
    parser.feed(text)
    parser.close()
    text.encode("utf-8")
    assert not set(text) & {"\x1b", "\x00", "\u202e", "\ud800"}
    for written in ("http:", "https:", "url(", "@import", "href", "src="):
        assert written not in re.sub(r"&lt;img src=.*?&gt;", "", text)
    shown_texts = "".join(parser.texts)
    assert "<script>alert(1)</script>" in shown_texts
    assert "\\u{1b}[31m\\u{0}\\u{202e}\\u{d800}" in shown_texts


def test_text_is_escaped_as_everywhere_else() -> None:
    """Escaping is the framework's own for XML, line ends apart; long texts are cut."""
    every = "".join(map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), *range(0x1F300, 0x1F400)]))
    for start in range(0, len(every), 100):
        part = every[start : start + 100].replace("\n", "")
        assert shown(part) == escape_xml(part)
    assert shown("a\nb") == "a⏎b"
    assert shown("x" * 50, 10) == "x" * 9 + "…"


def test_the_page_is_the_same_each_time_and_shows_the_data(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    """Same seed, same bytes; another seed, others. Names, densities and tops are on the page."""
    pages = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        told = feature_cards(
            model,
            dictionaries=folder,
            features="top:1",
            n_tokens=200,
            output=tmp_path / "new" / f"{name}.html",
            seed=seed,
        )
        json.dumps(told, allow_nan=False)
        pages.append(Path(told["page"]).read_bytes())
    assert pages[0] == pages[1] != pages[2]
    parser = Inert()
    parser.feed(pages[2].decode())
    texts = "".join(parser.texts)
    assert len(told["latents"]) == 2
    for name, facts in told["latents"].items():
        assert name in texts
        assert f"density {100 * facts['density']:.3g} %" in texts
        assert f"{facts['hidden']:.3g}".replace("-", "−") in texts
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "a.html", "b.html", "c.html",
    ]  # fmt: skip


def test_card_data_is_plain_finite_json(cards: Any) -> None:
    """Other pages can show it: it goes through JSON unchanged."""
    assert json.loads(json.dumps(cards, allow_nan=False)) == cards


def test_bad_numbers_and_names_are_refused(model: Any, folder: Path, tmp_path: Path) -> None:
    """No tokens, and an output that is no page, stop before anything is measured or written."""
    with pytest.raises(OptionError, match="--n-tokens 0"):
        feature_cards(model, dictionaries=folder, n_tokens=0, output=tmp_path / "a.html")
    with pytest.raises(OptionError, match=r"end in \.html or \.svg"):
        feature_cards(model, dictionaries=folder, output=tmp_path / "a.pdf")
    assert not [*tmp_path.iterdir()]
