"""Text of strangers, in circuits, tasks and names: shown as it is, never obeyed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from circuitlab import CircuitGraph

SVG = "{http://www.w3.org/2000/svg}"
FORMATS = (".svg", ".dot", ".graphml")


@pytest.fixture
def drawn(lab: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    """Draws, by the command line, a circuit with one component called by a text; gives a folder."""

    def draw(text: str) -> Path:
        circuit = CircuitGraph(model=text, task=text, metric="logit-difference")
        circuit.add_component(text, kind="head", layer=0)
        circuit.add_component("logits", kind="logits", layer=1)
        circuit.add_effect(text, "logits", -1.0)
        (tmp_path / "circuit.json").write_text(circuit.to_json(), encoding="utf-8")
        outputs = [part for suffix in FORMATS for part in ("-o", f"drawn{suffix}")]
        done = lab("render", "circuit.json", *outputs)
        assert (done.code, done.err) == (0, "")
        return tmp_path

    return draw


def texts(folder: Path) -> list[str]:
    """What the SVG shows, tooltips too."""
    root = ET.parse(folder / "drawn.svg").getroot()
    return ["".join(e.itertext()) for e in root.iter() if e.tag in (f"{SVG}text", f"{SVG}title")]


def nodes_by_graphviz(folder: Path) -> dict[str, str]:
    """Labels that Graphviz itself reads in the DOT file, by node; the spine of ranks left out."""
    import pygraphviz

    graph = pygraphviz.AGraph(filename=str(folder / "drawn.dot"))
    return {n: n.attr["label"] for n in graph.nodes() if n.attr["style"] != "invis"}


@pytest.mark.parametrize("token", ["<|endoftext|>", "<b>", "<s>"])
def test_row_01_tokens_that_look_like_markup_are_shown_literally(
    token: str, drawn: Callable[[str], Path]
) -> None:
    """A token such as ``<s>`` stands in the picture and the GraphML file letter by letter."""
    folder = drawn(token)
    assert token in texts(folder)
    assert token in nx.read_graphml(folder / "drawn.graphml")
    assert token in nodes_by_graphviz(folder).values()


@pytest.mark.parametrize("text", ['"]; evil [label="x', r"\N", "\\", "a\\", r"\n", "{a|b}"])
def test_row_02_dot_syntax_stays_one_node(text: str, drawn: Callable[[str], Path]) -> None:
    """Quotes and backslashes end no string in DOT: Graphviz finds two nodes, and the text."""
    folder = drawn(text)
    labels = nodes_by_graphviz(folder)
    assert len(labels) == 2
    # Graphviz keeps its own escapes in a label it was given: undo exactly those.
    assert text in [label.replace("\\\\", "\\") for label in labels.values()]
    assert any(text in shown for shown in texts(folder))


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", '<img src=x onerror="alert(1)">', "javascript:alert(1)",
     "</title><script>alert(1)</script>", '" onload="alert(1)'],
)  # fmt: skip
def test_row_03_scripts_are_inert(text: str, drawn: Callable[[str], Path]) -> None:
    """No text becomes an element, an event handler or a link of the SVG."""
    folder = drawn(text)
    for element in ET.parse(folder / "drawn.svg").getroot().iter():
        assert element.tag.removeprefix(SVG) in {
            "svg", "title", "desc", "g", "rect", "text", "tspan", "path", "polygon", "line",
        }  # fmt: skip
        names = {name.rpartition("}")[2].lower() for name in element.attrib}
        assert "href" not in names
        assert not [name for name in names if name.startswith("on")]
    assert any(text in shown for shown in texts(folder))


@pytest.mark.parametrize(
    "text", ["bell\x07", "\x1b[31mred\x1b[0m", "nul\0", "\u202ea", "half\ud800"]
)
def test_row_04_invisible_characters_become_visible(
    text: str, drawn: Callable[[str], Path], lab: Callable[..., Any]
) -> None:
    """Controls, bidi marks and surrogates are written out; XML stays valid, no ESC gets out."""
    folder = drawn(text)
    bad = next(c for c in text if not c.isprintable())
    shown = text.replace(bad, f"\\u{{{ord(bad):x}}}")
    assert shown in texts(folder)
    assert shown in nx.read_graphml(folder / "drawn.graphml")
    for suffix in FORMATS:
        assert bad.encode("utf-8", "surrogatepass") not in (folder / f"drawn{suffix}").read_bytes()
    for command in (("trace", "--task", text), ("tasks", "show", text), ("trace", text)):
        done = lab(*command)
        assert done.code in (2, 3)
        assert bad not in done.out + done.err
        assert f"{ord(bad):x}" in done.err


@pytest.mark.parametrize("text", ["&lt;", "&amp;amp;", "]]>", "<!--", "-->", "&#65;"])
def test_row_05_entities_round_trip(text: str, drawn: Callable[[str], Path]) -> None:
    """Text that looks like an entity or a comment is read back as it was written."""
    folder = drawn(text)
    assert any(text in shown for shown in texts(folder))
    assert text in nx.read_graphml(folder / "drawn.graphml")


@pytest.mark.parametrize("length", [200, 5000])
def test_row_06_long_labels_are_clipped_with_a_tooltip(
    length: int, drawn: Callable[[str], Path]
) -> None:
    """A label of thousands of letters is cut in the picture, and whole in its tooltip."""
    text = "x" * length
    folder = drawn(text)
    root = ET.parse(folder / "drawn.svg").getroot()
    shown = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert any(s.startswith("xxx") and s.endswith("…") and len(s) < 60 for s in shown)
    assert any(text in "".join(e.itertext()) for e in root.iter(f"{SVG}title"))
    assert float(root.attrib["width"].removesuffix("pt")) < 2000


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\r\nb", "..", "C:\\x"])
def test_row_07_task_names_cannot_be_paths(
    name: str, lab: Callable[..., Any], write_pairs: Callable[..., Path],
    ids_pairs: list[dict[str, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    """A task file named like a path, or with a line end, is refused, and nothing is written."""
    path = write_pairs(ids_pairs, name=name)
    before = sorted(tmp_path.parent.rglob("*"))
    done = lab("trace", "--task-file", path, "--output", "out.json")
    assert done.code == 3
    assert "task name" in done.err
    facts = ("looks like a path", "invisible character", "is empty")
    assert [fact for fact in facts if fact in done.err]
    assert done.err.count("\n") == 1
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\nb"])
def test_row_07_named_tasks_are_looked_up_not_opened(name: str, lab: Callable[..., Any]) -> None:
    """``--task`` with a path-like name is no task; the tasks there are are listed."""
    done = lab("trace", "--task", name)
    assert done.code == 3
    assert "does not exist; tasks are" in done.err
    assert "ioi-mini" in done.err
    assert "loading" not in done.err
