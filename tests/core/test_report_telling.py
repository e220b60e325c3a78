"""How a report tells: numbers only from the results, names of strangers shown and harmless."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitlab import GraphError
from circuitlab.page import Section
from circuitlab.report.blocks import Code, Drawing, Items, Part, Rows
from circuitlab.report.fragments import fragment
from circuitlab.report.markdown import markdown
from circuitlab.report.telling import Name, Strong, figure, plain, share, told

RESULTS = {
    "a": {"value": 0.8346, "interval": [0.78, 0.9], "reason": ""},
    "b": {"value": None, "interval": None, "reason": "nothing to divide by"},
    "c": {"value": 1.0, "interval": None, "reason": "all pairs give the same share"},
    "names": ["a0.h1", "m2"],
    "n": 32491,
}


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.83456, "", "0.835"),
        (0.83456, "%", "83.5 %"),
        (12345.6, "", "12,346"),
        (32491, "", "32,491"),
        (-0.0, "", "0"),
        (1e-7, "%", "0 %"),
        (-1e-7, "%", "0 %"),
        (1e-7, "", "1e-07"),
        ([0.1, 0.25], "%", "[10 %, 25 %]"),
        (None, "%", "undefined"),
        (True, "", "yes"),
        ("text 7", "", "text 7"),
    ],
)
def test_figures_are_rounded_by_one_rule(value: object, form: str, shown: str) -> None:
    """Three digits; shares in percent, rounding as 0; whole numbers as they are."""
    assert figure(value, form) == shown


def test_a_template_has_no_number_of_its_own() -> None:
    """A digit in a template, or a path that leads nowhere, is a fault."""
    with pytest.raises(GraphError, match="number of its own"):
        told("95 % of {n}", RESULTS)
    with pytest.raises(GraphError, match=r"have no .a\.nothing."):
        told("{a.nothing}", RESULTS)


def test_sentences_are_made_of_what_was_measured() -> None:
    """Values, names and shares are put where the template says."""
    assert plain(told("{n} edges, {a.interval.1:%}", RESULTS)) == "32,491 edges, 90 %"
    assert told("without {names:name}", RESULTS) == ("without ", Name("a0.h1, m2"))
    assert told("{b.reason:strong}", RESULTS) == (Strong("nothing to divide by"),)
    assert plain(share(RESULTS, "a")) == "83.5 % [78 %, 90 %]"
    assert plain(share(RESULTS, "b")) == "undefined: nothing to divide by"
    assert plain(share(RESULTS, "c")) == "100 %"


CANARY = "</code><script>alert(1)</script>`` | **x** [y](javascript:z) \x1b[31m ‮ \ud800 \n# H"


def _part(text: str) -> Part:
    cells = [[(Name(text),), (text,), (Strong(text),)]]
    return Part(
        "Part",
        [(text, Name(text)), Items([(text,)]), Rows(("a", "b", "c"), cells), Code(text),
         Drawing("figure", text)],
    )  # fmt: skip


@given(
    st.one_of(
        st.sampled_from([CANARY, "a\\|b", "|", "\\"]),
        st.text(alphabet=st.characters(), max_size=40),
    )
)
def test_names_are_inert_in_html(text: str) -> None:
    """Whatever a name is, the fragment passes the page's guard and shows the name as text."""
    made = fragment(_part(text), {"figure": "<svg></svg>"})
    Section("Part", made)
    assert not re.search(r"<(script|img(?! alt=)|a |style|b>|/?iframe)", made, re.I)
    assert "\x1b" not in made
    made.encode("utf-8")


@given(
    st.one_of(
        st.sampled_from([CANARY, "a\\|b", "|", "\\"]),
        st.text(alphabet=st.characters(), max_size=40),
    )
)
def test_names_are_inert_in_markdown(text: str) -> None:
    """No name begins a line, a tag, a link or another cell, and the document is UTF-8."""
    made = markdown("t", [_part(text)], ["figure"])
    made.encode("utf-8")
    assert "\x1b" not in made
    rows = [line for line in made.splitlines() if line.startswith("| ")]
    assert len(rows) == 2
    assert re.sub(r"\\.", "", rows[1]).count("|") == 4
    outside = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", made.replace("```bash", "").replace("```", ""))
    assert "<script" not in outside or "\\<script" in outside
    assert not re.search(r"(?<!\\)\]\((?!figures/)", outside.split("\n")[2])


def test_html_shows_the_name_itself() -> None:
    """Escaping hides nothing that can be shown."""
    made = fragment(Part("p", [('a<b>&"c"',)]), {})
    assert html.unescape(made) == '<p>a<b>&"c"</p>'


def test_figures_that_were_not_drawn_are_left_out() -> None:
    """A report without plots has no broken picture."""
    part = Part("p", [Drawing("curve", "A curve.")])
    assert "curve" not in markdown("t", [part], [])
    assert fragment(part, {}) == ""
