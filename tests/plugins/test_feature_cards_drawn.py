"""Feature cards as SVG: nothing leaves its place, nothing runs, and marks are the data."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from card_oracles import write_card_set
from circuitlab_feature_interactions.cards.making import feature_cards
from circuitlab_feature_interactions.cards.measuring import card_data
from circuitlab_feature_interactions.cards.vector import WIDTH, picture

import circuitlab
from circuitlab import OptionError
from circuitlab.scene import text_width

SVG = "{http://www.w3.org/2000/svg}"
ATTRIBUTES = {
    *("width", "height", "viewBox", "role", "class", "x", "y", "x1", "x2", "y1", "y2", "rx"),
    *("fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "font-family"),
    *("font-size", "font-weight", "text-anchor", "textLength", "lengthAdjust"),
}
#: What tokens, names and warnings may hold.
HOSTILE = (
    "<script>alert(1)</script>",
    '" onload="x',
    "]]></text><image href='//x'/>",
    "\x1b[31m\x00\u202e\ud800",
    "日本語日本語日本語日本語日本語",
    "W" * 200,
    "   ",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("induction")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: Any) -> Path:
    return write_card_set(model, tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def cards(model: Any, folder: Path) -> Any:
    chosen = "mlp_in.1: 3, 11; mlp_out.1: 5"
    return card_data(model, dictionaries=folder, features=chosen, n_tokens=400)["cards"]


def hostile(found: Any) -> Any:
    """The same with every token and name replaced."""
    if isinstance(found, dict):
        return {
            key: [HOSTILE[n % len(HOSTILE)] for n in range(len(value))]
            if key == "texts"
            else [[HOSTILE[n % len(HOSTILE)], v] for n, (_, v) in enumerate(value)]
            if key in ("raised", "lowered")
            else HOSTILE[0] * 9
            if key == "name"
            else hostile(value)
            for key, value in found.items()
        }
    return [hostile(value) for value in found] if isinstance(found, list) else found


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def numbers(item: ElementTree.Element, *names: str) -> list[float]:
    return [float(item.get(name, "nan")) for name in names]


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_every_mark_stays_inside_its_card(cards: Any, kind: str) -> None:
    """Texts too, in a face 15 % wider than Helvetica; monospaced ones say how long they are."""
    found = hostile(cards) if kind == "hostile" else cards
    root = parsed(picture(found, "model · data · " + "many words " * 60))
    width, height = (float(root.get(name, "").removesuffix("pt")) for name in ("width", "height"))
    assert width == WIDTH
    boxes, foot = [], 0.0
    for group in root.iter(f"{SVG}g"):
        frame, *marks = group
        x, y, w, h = numbers(frame, "x", "y", "width", "height")
        assert x >= 0
        assert x + w <= width
        boxes.append((x, y, w, h))
        foot = max(foot, y + h)
        for mark in marks:
            if mark.tag == f"{SVG}rect":
                left, top, wide, high = numbers(mark, "x", "y", "width", "height")
            elif mark.tag == f"{SVG}line":
                left, top, right, low = numbers(mark, "x1", "y1", "x2", "y2")
                wide, high = right - left, low - top
            else:
                left, top, size = numbers(mark, "x", "y", "font-size")
                words, bold = mark.text or "", mark.get("font-weight") == "bold"
                wide = float(mark.get("textLength") or text_width(words, size, bold))
                shift = {"middle": 0.5, "end": 1.0}.get(mark.get("text-anchor", ""), 0.0)
                left, top, high = left - shift * wide, top - size, 1.25 * size
            assert left >= x
            assert left + wide <= x + w, mark.text
            assert top >= y
            assert top + high <= y + h + 0.01
    for one, other in pairwise(boxes):
        assert one[0] + one[2] <= other[0] or one[1] + one[3] <= other[1] or other[0] < one[0]
    below = [mark for mark in root if mark.tag == f"{SVG}text"]
    for mark in below:
        x, y, size = numbers(mark, "x", "y", "font-size")
        assert x + text_width(mark.text or "", size) <= width
        assert foot < y - size
        assert y <= height
    assert len(boxes) == sum(1 for pair in cards for card in pair.values() if card)


def test_tokens_of_a_strip_do_not_overlap(cards: Any) -> None:
    """From left to right, each with its own length."""
    for found in (cards, hostile(cards)):
        rows: dict[tuple[float, float], list[tuple[float, float]]] = {}
        for group in parsed(picture(found, "")).iter(f"{SVG}g"):
            for mark in group.iter(f"{SVG}text"):
                if mark.get("textLength"):
                    x, y, wide = numbers(mark, "x", "y", "textLength")
                    card = numbers(group[0], "x")[0]
                    rows.setdefault((card, y), []).append((x, x + wide))
        assert len(rows) > 40
        for tokens in rows.values():
            assert all(one[1] < other[0] for one, other in pairwise(tokens))


def test_hostile_tokens_are_only_text(cards: Any) -> None:
    """Harmless tags and attributes, no reference, no control character, one valid document."""
    text = picture(hostile(cards), HOSTILE[0] + HOSTILE[3])
    assert not set(text) & {"\x1b", "\x00", "\u202e", "\ud800"}
    text.encode("utf-8")
    names = set()
    for item in parsed(text).iter():
        assert item.tag in {SVG + tag for tag in ("svg", "g", "rect", "line", "text", "title")}
        names |= set(item.attrib)
    assert not [name for name in names if name.startswith("on") or "href" in name]
    assert names <= ATTRIBUTES
    assert "style" not in text


def test_marks_are_the_data(cards: Any) -> None:
    """Bars are log(1 + count); the drawn token is tinted by its activation."""
    (group, control), card = [*parsed(picture(cards[:1], "")).iter(f"{SVG}g")], cards[0]["latent"]
    bars = [numbers(m, "height")[0] for m in group if m.get("class") == "bar"]
    counts = [count for count in card["histogram"]["counts"] if count]
    expected = [math.log1p(count) / math.log1p(max(counts)) for count in counts]
    assert [bar / max(bars) for bar in bars] == pytest.approx(expected, abs=1e-3)
    framed = [float(m.get("fill-opacity", "nan")) for m in group
              if m.get("class") == "token" and m.get("stroke")]  # fmt: skip
    examples = [example for found in card["bins"] for example in found["examples"]]
    wanted = [0.85 * example["value"] / card["top"]["value"] for example in examples]
    assert framed[: len(wanted)] == pytest.approx(wanted, abs=6e-4)
    assert len(framed) == len(wanted) + 3
    assert [group[0].get("stroke-dasharray"), control[0].get("stroke-dasharray")] == [None, "3,2"]


def test_names_and_densities_are_written(cards: Any) -> None:
    """Every latent, its density, and a random direction beside it."""
    texts = [item.text or "" for item in parsed(picture(cards, "a note")).iter(f"{SVG}text")]
    for pair in cards:
        assert pair["latent"]["name"] in texts
        assert (f"beside {pair['latent']['name']}" in texts) == (pair["control"] is not None)
        if pair["control"] is None:
            continue
        density = 100 * pair["latent"]["density"]["density"]
        assert any(text.startswith(f"density {density:.3g} %") for text in texts)
    assert texts[-1] == "a note"


def test_silent_latents_have_no_examples() -> None:
    """Alone, without a control, and the words that say how many tokens are needed."""
    density = {"tokens": 9, "active": 0, "tokens_needed": 46050, "below": 0.4, "dead": "unknown"}
    lens = {"raised": [], "lowered": [["a", -1.0]], "masked": 3}
    card = {"name": "mlp_in.0.f1", "kind": "latent", "density": density, "lens": lens}
    root = parsed(picture([{"latent": card, "control": None}], ""))
    texts = " ".join(item.text or "" for item in root.iter(f"{SVG}text"))
    assert len([*root.iter(f"{SVG}g")]) == 1
    assert "46,050 tokens are needed to call it dead" in texts
    assert "none" in texts
    assert "3 of unlike norm left out" in texts


def test_one_picture_or_one_of_each(model: Any, folder: Path, tmp_path: Path) -> None:
    """An .svg holds all, a folder one file of each latent; the same bytes each time."""
    options: dict[str, Any] = {"dictionaries": folder, "features": "top:1", "n_tokens": 200}
    told = [
        feature_cards(model, **options, output=tmp_path / name)
        for name in ("all.svg", "again.svg", "each")
    ]
    json.dumps(told, allow_nan=False)
    assert (tmp_path / "all.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    names = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert names == sorted(f"{name}.svg" for name in told[0]["latents"])
    whole = (tmp_path / "all.svg").read_text()
    for name in names:
        one = (tmp_path / "each" / name).read_text()
        assert one.count('class="card"') == 2
        assert set(re.findall(r">([^<]+)</text>", one)) <= set(
            re.findall(r">([^<]+)</text>", whole)
        )
    assert told[2]["page"] == str(tmp_path / "each")


def test_a_file_in_the_place_of_a_folder_is_refused(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    """It is not overwritten."""
    (tmp_path / "cards").write_text("mine")
    with pytest.raises(OptionError, match="no page"):
        feature_cards(model, dictionaries=folder, output=tmp_path / "cards")
    assert (tmp_path / "cards").read_text() == "mine"
