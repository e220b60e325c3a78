"""Notebooks: every object shows itself as text and HTML; nothing of a stranger is markup."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from format_samples import TEXTS, planted
from hypothesis import given, settings
from hypothesis import strategies as st
from path_scores import small_model

import circuitlab
from circuitlab import CircuitGraph, PromptPair, Site, Task, compare_circuits
from circuitlab.notebook import MAX_ROWS, html_table
from circuitlab.run import AwaitedRun

#: Elements and attributes that our HTML is made of; a picture has more.
ELEMENTS = {"table", "caption", "tr", "th", "td", "p"}
CANARY = '<img src=x onerror=alert(1)><script>alert(2)</script>"]]>&amp;\x1b[2J\u202e'


class Outline(HTMLParser):
    """The elements, attributes and text of a fragment, as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        if tag in ("td", "th", "caption", "p"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def shown(value: Any) -> tuple[str, Outline]:
    """What a notebook would take: text always, and HTML of tables alone."""
    bundle = value._repr_mimebundle_(include=None, exclude=None)
    assert set(bundle) == {"text/plain", "text/html"}
    outline = Outline(bundle["text/html"])
    assert set(outline.elements) <= ELEMENTS
    assert outline.attributes == []
    text = bundle["text/plain"]
    assert text
    assert all(c.isprintable() for c in text + "".join(outline.cells))
    return text, outline


# --- tables ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), TEXTS)
def test_any_text_is_text_in_a_table(rows: list[tuple[str, str]], caption: str) -> None:
    """Cells come out as they went in, but for characters that have no glyph."""
    outline = Outline(html_table(("a", "b"), rows, caption=caption))
    assert set(outline.elements) == {"table", "caption", "tr", "th", "td"}
    assert outline.attributes == []
    expected = [circuitlab.labels.visible(cell) for cell in (caption, "a", "b", *sum(rows, ()))]
    assert outline.cells == expected


def test_long_tables_and_cells_are_cut() -> None:
    """The first rows, and a line that says how many there are."""
    outline = Outline(html_table((), [("x" * 5000,)] * 1234))
    assert outline.elements.count("tr") == MAX_ROWS
    assert outline.cells[-1] == f"the first {MAX_ROWS} of 1,234 rows"
    assert max(map(len, outline.cells)) <= 200


# --- objects --------------------------------------------------------------------------------------


def test_task_shows_its_first_pairs() -> None:
    """Prompts and answers, escaped, and how many there are."""
    pair = PromptPair(CANARY, "corrupt", (" yes", "<b>"), ())
    text, outline = shown(Task("canary", (pair,) * 30, description=CANARY))
    assert text == "Task 'canary': 30 pairs, metric logit-difference"
    assert outline.cells[1:5] == ["clean", "corrupt", "answers", "wrong answers"]
    assert outline.cells[5:9] == [
        circuitlab.labels.visible(CANARY), "corrupt", " yes, <b>", "",
    ]  # fmt: skip
    assert outline.cells[-1] == "the first 20 of 30 rows"


def test_task_of_ids_is_shown() -> None:
    """A prompt of token ids is its numbers."""
    _, outline = shown(Task("ids", (PromptPair((1, 2), (1, 3), (4,), (5,)),)))
    assert outline.cells[5:9] == ["1, 2", "1, 3", "4", "5"]


def test_model_says_what_it_is() -> None:
    """Family, sizes, edges and device; text is its repr."""
    model = circuitlab.load_model("ioi-mini")
    text, outline = shown(model)
    assert text == repr(model)
    facts = dict(zip(outline.cells[1::2], outline.cells[2::2], strict=True))
    assert facts["family"] == "GPT-2"
    assert (facts["blocks"], facts["heads"], facts["edges"]) == ("3", "4", "262")
    assert facts["task"] == "ioi-mini"


def test_encoded_task_shows_its_tokens() -> None:
    """The clean prompts as the model reads them, with the number of their pair."""
    model = circuitlab.load_model("ioi-mini")
    task = next(t for t in circuitlab.zoo.tasks() if t.name == "ioi-mini").take(3)
    pairs = model.encode(task).rows([2, 0])
    text, outline = shown(pairs)
    assert text.startswith("2 pairs of task 'ioi-mini', ")
    assert outline.cells[4] == "3"
    assert outline.cells[5] == " ".join(pairs.tokens_text[0])
    assert outline.cells[6] == ", ".join(task.pairs[2].answers)


@pytest.mark.parametrize("read", [[], [Site("z", 1), Site("resid_post", 0), Site("embed")]])
def test_run_shows_sites_and_shapes(read: list[Site]) -> None:
    """Every site that can be looked up, in the order they run, with its shape."""
    _, model = small_model("gpt2")
    run = model.run([[1, 2, 3], [4, 5]], read=read)
    text, outline = shown(run)
    table = [tuple(outline.cells[i : i + 3]) for i in range(4, len(outline.cells), 3)]
    names = [name for name, *_ in table]
    assert names[-1] == "logits"
    assert {str(site) for site in read} <= set(names)
    for site in read:
        shape = ", ".join(map(str, run[site].shape))
        assert (str(site), shape, "torch.float64") in table
    assert text == f"Run of 2 prompts: {', '.join(names)}"
    if not read:
        assert names == ["logits"]


def test_run_on_a_host_is_not_waited_for() -> None:
    """Showing a run that has not been looked at asks the host nothing; afterwards it is a run."""
    _, model = small_model("gpt2")
    done = model.run([[1, 2, 3]], read=[Site("z", 0)])
    asked = []

    def outcome() -> Any:
        asked.append(1)
        return done

    run = AwaitedRun(done.tokens, done._locator, outcome)
    text, _ = shown(run)
    assert text == "Run of 1 prompt on a host, not looked at yet"
    assert asked == []
    assert run.logits.shape == done.logits.shape
    assert shown(run)[0] == shown(done)[0]


def test_comparison_shows_its_numbers() -> None:
    """The table has the lines of the comparison, the text too."""
    found = compare_circuits(planted(), planted())
    bundle = found._repr_mimebundle_()
    for key, value in found.lines().items():
        assert f"{key}: {value}" in bundle["text/plain"]


# --- circuits -------------------------------------------------------------------------------------


def test_circuit_saves_itself(tmp_path: Path) -> None:
    """In any format, by its suffix; warnings of the format are Python's."""
    circuit = planted()
    for name in ("a.json", "a.svg", "a.html", "a.graphml"):
        circuit.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    circuit.save(str(tmp_path / "b.json"))
    assert circuitlab.read_circuit(tmp_path / "b.json").to_json() == circuit.to_json()
    with pytest.raises(circuitlab.OptionError, match="no known suffix"):
        circuit.save(tmp_path / "a.jpeg")


def test_warnings_of_a_format_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an exporter warns of is a Python warning, at the caller's line."""
    monkeypatch.setattr("circuitlab.graph._writer", lambda circuit, path: ["lost the colours"])
    with pytest.warns(UserWarning, match="lost the colours") as caught:
        planted().save(tmp_path / "a.json")
    assert caught[0].filename == __file__


def test_circuit_explores_itself() -> None:
    """A sandboxed frame with the page; a name of a stranger closes nothing."""
    circuit = planted()
    circuit.add_component(CANARY, kind="feature", layer=1, role='"></iframe>')
    circuit.add_effect(CANARY, "logits", 1.0)
    html = circuit.explore()._repr_html_()

    found: list[dict[str, str | None]] = []

    class Frames(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag == "iframe"
            found.append(dict(attrs))

    Frames().feed(html)
    (frame,) = found
    assert frame["sandbox"] == "allow-scripts"
    assert "src" not in frame
    assert frame["srcdoc"]
    assert "Content-Security-Policy" in frame["srcdoc"]


def test_circuit_shows_a_picture_without_markup_of_strangers() -> None:
    """The picture of a circuit with a hostile name holds no script, handler or link."""
    circuit = planted()
    circuit.add_component(CANARY, kind="feature", layer=1, role=CANARY)
    circuit.add_effect(CANARY, "logits", 1.0)
    bundle = circuit._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/svg+xml"}
    tags: list[str] = []

    class Picture(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not any(name.startswith("on") or "href" in name for name, _ in attrs)

    Picture().feed(bundle["image/svg+xml"])
    assert set(tags) <= {"svg", "title", "rect", "g", "path", "polygon", "text"}


def test_graph_module_alone_says_what_is_missing() -> None:
    """Saving and exploring stand above the graph; the remedy of the message works."""
    code = (
        "from {} import CircuitGraph\n"
        "for act in (CircuitGraph().explore, lambda: CircuitGraph().save('x.json')):\n"
        "    try: act(); print('done')\n"
        "    except Exception as error: print(error)"
    )
    said = {}
    for module in ("circuitlab.graph", "circuitlab"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
        )
        said[module] = done.stdout.splitlines()
    assert all("import CircuitGraph from circuitlab" in line for line in said["circuitlab.graph"])
    assert said["circuitlab"] == ["done", "done"]


def test_every_public_result_has_a_text() -> None:
    """What an analysis gives, and what is given to it, shows itself."""
    for kind in (CircuitGraph, Task, circuitlab.EncodedTask, circuitlab.Run,
                 circuitlab.TracedModel, circuitlab.Comparison):  # fmt: skip
        assert callable(kind._repr_mimebundle_), kind
