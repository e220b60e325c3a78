"""Labels: text of strangers is shown literally and can do nothing else."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitlab.labels import clip, escape, escape_xml, visible

ANY_TEXT = st.text(st.characters(), max_size=60)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
def test_visible_text_has_no_invisible_character(text: str) -> None:
    """What reaches a terminal or a document has only characters with a glyph of their own."""
    categories = {unicodedata.category(character) for character in visible(text)}
    assert not categories & {"Cc", "Cs", "Cf", "Co", "Cn", "Zl", "Zp"}


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
def test_escaped_text_cannot_end_its_quotes(text: str) -> None:
    """Read by DOT's rules, the escaped text is one string and gives the visible text back."""
    out, rest = [], escape(text)
    while rest:
        assert rest[0] != '"', "a bare quote ends the string"
        if rest[0] == "\\":
            assert rest[1:2] in ("\\", '"'), "a bare backslash is an escape of Graphviz's"
            out.append(rest[1])
            rest = rest[2:]
        elif rest[0] == "&":
            assert rest.startswith("&amp;"), "a bare ampersand begins an entity"
            out.append("&")
            rest = rest[5:]
        else:
            out.append(rest[0])
            rest = rest[1:]
    assert "".join(out) == visible(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x00", "\\u{0}"),
        ("\x1b[31m", "\\u{1b}[31m"),
        ("\u202eabc", "\\u{202e}abc"),
        ("\ud800", "\\u{d800}"),
        ("a\nb", "a\\u{a}b"),
        ("\u2028", "\\u{2028}"),
        (" Mary", " Mary"),
        ("é漢😀", "é漢😀"),
    ],
)
def test_control_characters_are_shown_by_number(text: str, shown: str) -> None:
    """A character without a glyph is shown as its code point; every other one as itself."""
    assert visible(text) == shown


def test_xml_marks_are_escaped() -> None:
    """No character of XML's own survives in text or in a quoted attribute."""
    assert escape_xml("<a b=\"c\" d='e'>&") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;"


@given(st.text(max_size=40), st.integers(1, 40))
def test_clipped_text_fits(text: str, width: int) -> None:
    """The result is never longer than asked, and is the text itself where that fits."""
    clipped = clip(text, width)
    assert len(clipped) <= width
    assert clipped == text if len(text) <= width else clipped.endswith("…")
