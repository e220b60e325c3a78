"""Page: one file that asks for nothing, runs one script, and shows text as text alone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitlab.errors import GraphError
from circuitlab.export import write_circuit
from circuitlab.graph import CircuitGraph
from circuitlab.labels import visible
from circuitlab.page import Section, compose, figure, frame
from circuitlab.page.data import embed, page_data
from circuitlab.page.fragments import anchors

NASTY = [
    "<|endoftext|>",
    '"]; evil [label="x',
    "</script><script>alert(1)</script>",
    "</style>",
    "<!-- x -->",
    "--!><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "]]>",
    "&lt;&amp;",
    "${data}$$",
    "__proto__",
    "a\x00b\x1b[31m‮\ud800",
    "two  spaces ",
]
ANY_TEXT = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), min_size=1, max_size=30))


class Parts(HTMLParser):
    """What a parser that is not ours makes of a page: its tags, attributes and raw texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.styles: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._open == "style":
            self.styles[-1] += data
        else:
            self.text += data


def circuit_of(word: str = "induction", node: str = "a0.h1", port: str = "v") -> CircuitGraph:
    """A small circuit in which one word stands wherever a stranger's word can stand."""
    circuit = CircuitGraph(
        model=word, task={"name": word}, metric="logit-difference", method=word, verdict=word,
        verdict_reason=word, findings={word: word}, warnings=[word],
    )  # fmt: skip
    circuit.add_component("input", kind="input", layer=0, token=word)
    circuit.add_component(node, kind=word, layer=0, role=word, label=word, extra={word: [word]})
    circuit.add_component("logits", kind="logits", layer=1)
    circuit.add_effect("input", node, -1.5, port=port, note=word)
    circuit.add_effect(node, "logits", 0.25)
    return circuit


def full(word: str) -> str:
    """A page with a word in every place that takes one."""
    circuit = circuit_of(word)
    return compose(
        circuit,
        sections=[Section(word, "<p>text</p>")],
        details={"a0.h1": {
            "role": word, "card": [word], "effects": {"noise": -1.0, "denoise": -0.5},
            "pattern": {"tokens": [word, word], "values": [[1.0, 0.0], [0.5, 0.5]]},
        }},
        other=circuit_of(word, node=f"{word}2"),
        head=[word],
    )  # fmt: skip


def data_of(page: str) -> Any:
    """The data in a page."""
    return json.loads(Parts(page).scripts[0][1])


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_policy_lets_through_this_script_and_this_style_alone() -> None:
    """The hashes in the policy are those of the texts between the tags; all else is refused."""
    parts = Parts(full("word"))
    policy = next(v for tag, name, v in parts.attributes if (tag, name) == ("meta", "content"))
    assert [kind for kind, _ in parts.scripts] == ["application/json", None]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'{digest(parts.scripts[1][1])}'",
        "style-src": f"'{digest(parts.styles[0])}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert len(parts.styles) == 1


def test_page_refers_to_nothing_outside_itself() -> None:
    """No address, no source, no style attribute and no handler stands in a page."""
    page = full("word")
    parts = Parts(page)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|import\(|\bfetch\(|XMLHttp", page)
    for tag, name, value in parts.attributes:
        assert name not in ("src", "style", "srcset", "action", "data"), (tag, name)
        assert not name.startswith("on")
        assert name != "href" or re.fullmatch(r"#[a-z0-9-]+", value)
    assert not parts.tags["link"]


def test_script_puts_text_in_as_text_alone() -> None:
    """Nothing in the script can turn text into markup or code."""
    script = Parts(full("word")).scripts[1][1]
    assert "textContent" in script
    banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|DOMParser"
    assert not re.search(banned, script)
    assert "</script" not in script.lower()
    assert "<!--" not in script


@given(ANY_TEXT)
@settings(max_examples=120, deadline=None)
def test_no_text_becomes_markup(word: str) -> None:
    """Whatever a stranger's text holds, the page has the tags of any other page."""
    plain, page = Parts(full("word")), Parts(full(word))
    assert page.tags == plain.tags
    assert [a[:2] for a in page.attributes] == [a[:2] for a in plain.attributes]
    assert page.scripts[1] == plain.scripts[1]
    assert not set("<>&") & set(page.scripts[0][1])
    full(word).encode("utf-8")


@given(ANY_TEXT.map(lambda text: text[:12]))  # no longer than a verdict is shown
@settings(max_examples=60, deadline=None)
def test_text_arrives_as_it_is_written_elsewhere(word: str) -> None:
    """Text in the data is the word with what has no glyph made visible, and nothing else."""
    found = data_of(compose(circuit_of(word), head=[word]))
    assert found["about"]["verdict"] == visible(word)
    node = next(n for n in found["nodes"] if n["name"] == "a0.h1")
    assert node["full_role"] == visible(word)
    assert node["data"]["extra"] == {visible(word): [visible(word)]}
    assert visible(word) in found["edges"]["columns"]["note"]["is"]


def test_head_and_caption_need_no_script() -> None:
    """What the page says first stands in its text."""
    page = compose(circuit_of(), head=["recovers 87 % of the effect", "a < b"])
    text = Parts(page).text
    assert "recovers 87 % of the effect" in text
    assert "a < b" in text
    assert "induction · logit-difference" in text
    assert "<title>induction</title>" in page


def test_same_circuit_gives_same_bytes() -> None:
    """Nothing in a page depends on the time or on the order of sets."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from circuitlab.graph import CircuitGraph\n"
        "from circuitlab.page import compose\n"
        "circuit = CircuitGraph(model='m', task='t')\n"
        "for i in range(30): circuit.add_component(f'a{i}.h0', kind='head', layer=i, role='r')\n"
        "for i in range(29):\n"
        "    circuit.add_effect(f'a{i}.h0', f'a{i + 1}.h0', 1.0, port='qkv'[i % 3])\n"
        "sys.stdout.buffer.write(compose(circuit, other=circuit).encode())\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parent.parent.parent
    pages = [
        subprocess.run(
            [sys.executable, "-c", program, str(root)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert pages[0] == pages[1]
    assert len(pages[0]) > 10_000


def test_exporter_writes_the_page(tmp_path: Path) -> None:
    """A path that ends in .html gets the page."""
    circuit = circuit_of()
    assert write_circuit(circuit, tmp_path / "x.html") == []
    assert (tmp_path / "x.html").read_text("utf-8") == compose(circuit)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_embedded_data_reads_back(value: Any) -> None:
    """JSON in a page is read back as it was, and holds no mark of HTML."""
    text = embed({"value": value})
    assert json.loads(text) == {"value": value}
    assert not set("<>&") & set(text)


def test_page_of_an_empty_circuit() -> None:
    """A circuit of nothing has a page."""
    found = data_of(compose(CircuitGraph()))
    assert (found["nodes"], found["edges"]["score"], found["n_effects"]) == ([], [], 0)


@pytest.mark.parametrize(
    ("fragment", "fault"),
    [
        ("<script>1</script>", "<script>"),
        ("<p>a</p><iframe></iframe>", "<iframe>"),
        ("<style>p {}</style>", "<style>"),
        ("<p style='color: red'>a</p>", "'style'"),
        ("<img src=x onerror=alert(1)>", "'src'"),
        ("<svg onload=alert(1)></svg>", "'onload'"),
        ("<a href=' java\nscript:alert(1)'>a</a>", "'href'"),
        ("<img src='https://example.org/a.png'>", "'src'"),
        ("<svg><use xlink:href='x.svg#a'/></svg>", "'xlink:href'"),
        ("<FORM ACTION=x>", "<form>"),
    ],
)
def test_section_refuses_what_could_run_or_load(fragment: str, fault: str) -> None:
    """A section with a script, a style, a handler or a reference is refused, and says which."""
    with pytest.raises(GraphError, match=re.escape(fault)):
        Section("part", fragment)


def test_section_takes_tables_links_within_and_pictures() -> None:
    """Plain markup, anchors of the page and pictures in the file pass."""
    section = Section(
        "Curve",
        "<table><tr><td>1</td></tr></table><a href='#circuit'>up</a>" + figure("<svg/>", "c"),
    )
    page = compose(circuit_of(), sections=[section])
    assert section.html in page
    assert '<a href="#s-curve">Curve</a>' in page


def test_figure_keeps_its_own_style_to_itself() -> None:
    """A figure is an image whose data are the very SVG, with the name space images need."""
    svg = '<?xml version="1.0"?>\n<svg viewBox="0 0 1 1"><path style="fill:red" d="M0 0"/></svg>'
    text = figure(svg, 'a "b" <c>')
    found = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert found is not None
    drawn = base64.b64decode(found[1]).decode()
    assert drawn == svg[svg.index("<svg") :].replace(
        "<svg", '<svg xmlns="http://www.w3.org/2000/svg"'
    )
    assert text.count("a &quot;b&quot; &lt;c&gt;") == 2
    with pytest.raises(GraphError, match="no SVG"):
        figure("<p>", "a")


def test_anchors_are_unique_ids() -> None:
    """Each section can be reached, also where titles are alike or have no letters."""
    titles = ["Base rates", "base  rates!", "Base rates", "…", "∅"]
    found = anchors([Section(title, "") for title in titles])
    assert found == ["s-base-rates", "s-base-rates-2", "s-base-rates-3", "s-part", "s-part-2"]


def test_frame_holds_the_page_and_gives_it_scripts_alone() -> None:
    """A notebook shows the very page, in a frame that may run scripts and nothing else."""
    circuit = circuit_of('x"y&z')
    html = frame(circuit, height=333)._repr_html_()
    parts = Parts(html)
    assert parts.tags == Counter(iframe=1)
    found = {name: value for _, name, value in parts.attributes}
    assert found["srcdoc"] == compose(circuit)
    assert unescape(found["srcdoc"]) != ""
    assert (found["sandbox"], found["height"]) == ("allow-scripts", "333")


def test_page_data_are_plain_json() -> None:
    """The data have no NaN, whatever an analysis left on a node."""
    circuit = circuit_of()
    circuit.nodes["a0.h1"].update(a=float("nan"), b={"c": float("inf")}, d=(1, 2), e=object)
    text = embed(page_data(circuit, {}))
    node = next(n for n in json.loads(text)["nodes"] if n["name"] == "a0.h1")
    assert node["data"]["a"] == "nan"
    assert node["data"]["b"] == {"c": "inf"}
    assert node["data"]["d"] == [1, 2]
