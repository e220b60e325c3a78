"""The commands, each driven from its flags to its files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import oracles
import pytest
import torch

import circuitlab

Lab = Callable[..., Any]
Pairs = list[dict[str, Any]]


# --- trace ----------------------------------------------------------------------------------------


def test_trace_writes_every_format_asked_for(lab: Lab, ids_model: Path, ids_task: Path) -> None:
    """Several ``--output``: each file in the format of its suffix, listed in the result."""
    names = ["c.json", "c.mib.json", "c.svg", "c.png", "c.pdf", "c.dot", "c.graphml"]
    outputs = [part for name in names for part in ("--output", name)]
    done = lab("trace", "--model", ids_model, "--task-file", ids_task, "--json", *outputs)
    assert done.code == 0
    assert done.json["paths"] == names
    circuit = circuitlab.read_circuit(Path("c.json"))
    assert circuit.number_of_edges() == 40
    document = json.loads(Path("c.mib.json").read_text("utf-8"))
    assert sum(edge["in_graph"] for edge in document["edges"].values()) == 40
    assert ET.parse("c.svg").getroot().tag.endswith("svg")
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert Path("c.pdf").read_bytes().startswith(b"%PDF")
    assert Path("c.dot").read_text("utf-8").startswith("digraph")
    assert nx.read_graphml("c.graphml").number_of_edges() == 40


def test_one_is_not_counted_as_many(lab: Lab) -> None:
    """One pair, one edge, one effect; none and two are several."""
    done = lab("trace", "path-patching", "--model", "gate-and", "--top", "1")
    assert "task: 1 pair, metric" in done.out
    assert "size: 1 of 13 edges, 4 components" in done.out
    done = lab("trace", "path-patching", "--model", "gate-and", "--top", "1", "--scope", "nodes")
    assert "size: 1 effect, 2 components" in done.out


def test_trace_stamps_where_a_circuit_came_from(lab: Lab, ids_model: Path, ids_task: Path) -> None:
    """Model, task and its digest, options, seed, types and versions are in the file."""
    flags = ("--seed", "7", "--top", "3", "--method", "eap", "--output", "c.json")
    assert lab("trace", "--model", ids_model, "--task-file", ids_task, *flags).code == 0
    facts = circuitlab.read_circuit(Path("c.json")).graph
    task = circuitlab.read_task(ids_task)
    assert facts["model"] == str(ids_model)
    assert (facts["task"], facts["task_digest"]) == (task.name, task.digest)
    assert (facts["seed"], facts["dtype"], facts["device"]) == (7, "float32", "cpu")
    assert facts["options"]["top"] == 3
    assert facts["options"]["method"] == "eap"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["baseline"]["n_pairs"] == 8
    assert facts["n_edges_total"] == 46


def test_trace_of_the_default_model_and_analysis(lab: Lab) -> None:
    """``circuitlab trace`` alone runs: the bundled model on its own task."""
    done = lab("trace", "--n-prompts", "4", "--json")
    assert done.code == 0
    assert done.json["provenance"]["model"] == "ioi-mini"
    assert done.json["provenance"]["analysis"] == "edge-attribution"
    assert done.json["metrics"]["accuracy"] == 1.0


def test_the_same_seed_gives_the_same_file(lab: Lab, ids_model: Path, ids_task: Path) -> None:
    """Row 26: two runs agree to the last bit, all but the time they took."""
    files = []
    for name in ("a.json", "b.json"):
        flags = ("--top", "all", "--output", name)
        assert lab("trace", "--model", ids_model, "--task-file", ids_task, *flags).code == 0
        document = json.loads(Path(name).read_text("utf-8"))
        document["graph"].pop("seconds")
        files.append(document)
    assert files[0] == files[1]


def test_fail_under_passes_and_fails_by_the_number(
    lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """Exit 7 below the number, with the result still printed and written; 0 at or above it."""
    command = ("trace", "--model", ids_model, "--task-file", ids_task, "--json", "-o", "c.json")
    share = lab(*command).json["metrics"]["explained_share"]
    assert lab(*command, "--fail-under", f"explained_share={share}").code == 0
    Path("c.json").unlink()
    done = lab(*command, "--fail-under", f"explained-share={share + 0.01}")
    assert done.code == 7
    assert done.json["metrics"]["explained_share"] == share
    assert Path("c.json").is_file()
    assert "below the" in done.err


# --- scores against the definition ----------------------------------------------------------------


def mib_scores(path: Path) -> dict[tuple[str, str, str], float]:
    """Scores of an EAP-IG circuit file by (source, target, port)."""
    found = {}
    for name, edge in json.loads(path.read_text("utf-8"))["edges"].items():
        source, _, rest = name.partition("->")
        target, _, port = rest.partition("<")
        found[source, target, port.rstrip(">")] = edge["score"]
    return found


@pytest.mark.parametrize("flags", [
    ("--method", "eap"),
    ("--method", "eap-ig", "--ig-rule", "midpoint"),
    ("--method", "eap-ig", "--ig-rule", "left", "--ig-steps", "3", "--batch-size", "3"),
])  # fmt: skip
def test_trace_of_all_edges_equals_the_definition(
    flags: tuple[str, ...],
    lab: Lab,
    ids_model: Path,
    ids_module: Any,
    ids_task: Path,
    ids_pairs: Pairs,
) -> None:
    """``--top all --output x.mib.json`` on token ids: every edge, to 1e-5 of the strongest."""
    command = ("trace", "--model", ids_model, "--task-file", ids_task, *flags, "--top", "all")
    assert lab(*command, "--output", "x.mib.json").code == 0
    found = mib_scores(Path("x.mib.json"))
    assert set(found) == set(oracles.edge_names(2, 2))
    clean, corrupt = (torch.tensor([p[part] for p in ids_pairs]) for part in ("clean", "corrupt"))
    right, wrong = (torch.tensor([p[k] for p in ids_pairs]) for k in ("answers", "wrong_answers"))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits.gather(-1, right) - logits.gather(-1, wrong)).squeeze(-1)

    if "eap" in flags:
        expected = oracles.eap(ids_module, clean, corrupt, metric)
    else:
        left = "left" in flags
        rule, steps = ("left", 3) if left else ("midpoint", 5)
        expected = oracles.eap_ig(ids_module, clean, corrupt, metric, rule=rule, steps=steps)
    largest = max(abs(score) for score in expected.values())
    worst = max(abs(found[edge] - score) for edge, score in expected.items())
    assert worst <= 1e-5 * largest


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_left_padding_changes_no_score(
    method: str, lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """Row 18: pairs of different lengths in one batch score as the mean of each pair alone."""
    cut = [
        {**p, "clean": p["clean"][i % 4 :], "corrupt": p["corrupt"][i % 4 :]}
        for i, p in enumerate(ids_pairs)
    ]
    cut = [p for p in cut if p["clean"] != p["corrupt"]]
    command = ("trace", "--model", ids_model, "--method", method, "--top", "all", "--allow-weak")

    def scores(pairs: Pairs) -> dict[tuple[str, str, str], float]:
        done = lab(*command, "--task-file", write_pairs(pairs), "--output", "x.mib.json")
        assert done.code == 0
        return mib_scores(Path("x.mib.json"))

    together, alone = scores(cut), [scores([pair]) for pair in cut]
    assert len({len(pair["clean"]) for pair in cut}) == 4
    for edge, score in together.items():
        mean = sum(one[edge] for one in alone) / len(alone)
        assert score == pytest.approx(mean, abs=1e-4)


# --- render ---------------------------------------------------------------------------------------


def test_render_draws_and_converts_what_was_traced(lab: Lab, circuit_file: Path) -> None:
    """A circuit file becomes a picture or another file; the names written are printed."""
    done = lab("render", circuit_file, "-o", "c.svg", "-o", "copy.json", "--top", "2")
    assert (done.code, done.out, done.err) == (0, "c.svg\ncopy.json\n", "")
    kept = [effect[:3] for effect in circuitlab.read_circuit(Path("copy.json")).effects()]
    assert kept == [("a0.h1", "logits", ""), ("input", "a0.h1", "q")]


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [("none.json", None, "'none.json' does not exist; `circuitlab trace --output none.json`"),
     ("bad.json", "{", "circuit 'bad.json': not a circuit"),
     ("list.json", "[]", "the JSON has no graph, nodes and edges"),
     ("bytes.json", b"\xff\xfe", "circuit 'bytes.json' is not UTF-8 text")],
)  # fmt: skip
def test_render_refuses_what_is_no_circuit(
    name: str, text: str | bytes | None, fact: str, lab: Lab, tmp_path: Path
) -> None:
    """A missing or foreign file is exit 3, with what would write one; no picture appears."""
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    done = lab("render", name, "-o", "c.svg")
    assert (done.code, done.out) == (3, "")
    assert fact in done.err
    assert not Path("c.svg").exists()


# --- models, doctor -------------------------------------------------------------------------------


def test_models_lists_the_bundled_ones(lab: Lab) -> None:
    """A row for each bundled model, and ``trace`` finds each by that name."""
    done = lab("models")
    assert (done.code, done.err) == (0, "")
    names = [line.split("\t")[0] for line in done.out.splitlines()[1:]]
    assert {"ioi-mini", "induction", "greater-than", "docstring-mini", "gate-and"} <= set(names)
    assert lab("models", "list").out == done.out


@pytest.mark.parametrize("name", ["ioi-mini", "gate-and", "hand-induction"])
def test_models_check_of_bundled_models(name: str, lab: Lab) -> None:
    """Each bundled model passes its self-check: every row holds."""
    done = lab("models", "check", name)
    assert (done.code, done.err) == (0, "")
    assert "FAILS" not in done.out
    assert done.out.count("holds\t") >= 4


def test_models_train_saves_a_model_that_can_be_traced(lab: Lab) -> None:
    """A few steps of a recipe give a folder in Hugging Face layout, and its metrics."""
    done = lab("models", "train", "induction", "--steps", "3", "--output", "mine", "--seed", "1")
    assert done.code == 0
    keys = [line.partition(": ")[0] for line in done.out.splitlines()]
    assert {"accuracy", "saved in"} <= set(keys)
    assert "training induction" in done.err
    assert lab("models", "check", "mine").code == 0
    flags = ("--task", "induction", "--n-prompts", "4", "--allow-weak")
    traced = lab("trace", "--model", "mine", *flags)
    assert traced.code == 0
    again = lab("models", "train", "induction", "--steps", "1", "--output", "mine")
    assert again.code == 2
    assert "folder 'mine' exists; give another with --output" in again.err


@pytest.mark.parametrize("name", ["docstring-mini", "and-superposition"])
def test_models_train_saves_checkpoints(name: str, lab: Lab, tmp_path: Path) -> None:
    """Every so many steps, from before the first to the end, the model as it was is saved."""
    done = lab("models", "train", name, "--steps", "5", "--checkpoint-every", "2", "-o", "mine")
    assert done.code == 0
    assert sorted(p.name for p in Path("mine").glob("step-*")) == [
        f"step-{step:06d}" for step in (0, 2, 4, 5)
    ]
    weights = [
        Path("mine", part, "model.safetensors").read_bytes()
        for part in ("step-000000", "step-000004", "step-000005", "")
    ]
    assert weights[2] == weights[3]
    assert len(set(weights)) == 3
    assert lab("models", "check", "mine/step-000004").code == 0


@pytest.mark.parametrize(
    ("name", "fact"),
    [("inducton", "did you mean 'induction'?"), ("gate-and", "compiled, not trained")],
)
def test_models_train_refuses_what_has_no_recipe(name: str, fact: str, lab: Lab) -> None:
    """A misspelt name gets the nearest; a hand-made model says that it is made by a formula."""
    done = lab("models", "train", name)
    assert (done.code, done.out) == (4, "")
    assert fact in done.err


def test_doctor_shows_versions_plugins_and_checks(lab: Lab, install: Any) -> None:
    """Everything a report of a fault needs; a broken plugin has a line; a model its checks."""
    install("circuitlab-broken", "broken", "import nothing_like_this")
    done = lab("doctor", "gate-and")
    assert done.code == 0
    values = dict(line.split(": ", 1) for line in done.out.splitlines() if ": " in line)
    assert values["torch"].split()[0] == torch.__version__
    assert values["nnsight"].startswith("0.8")
    assert values["graphviz"].startswith("in pygraphviz")
    assert values["plugins"].startswith("defaults, ")
    assert values["plugin broken"].startswith("NOT LOADED: ModuleNotFoundError")
    assert "holds\tlogits equal plain Hugging Face" in done.out


# --- tasks ----------------------------------------------------------------------------------------


def test_tasks_lists_and_shows(lab: Lab) -> None:
    """A row for each named task; ``show`` prints a task file that validates and gives the same."""
    done = lab("tasks")
    assert (done.code, done.err) == (0, "")
    assert "ioi-mini" in [line.split("\t")[0] for line in done.out.splitlines()]
    shown = lab("tasks", "show", "ioi-mini")
    assert (shown.code, shown.err) == (0, "")
    Path("copy.json").write_text(shown.out, encoding="utf-8")
    assert lab("tasks", "validate", "copy.json").code == 0
    again = circuitlab.read_task("copy.json")
    assert again.to_json() == shown.json
    missing = lab("tasks", "show", "ioi-min")
    assert (missing.code, missing.out) == (3, "")
    assert "task 'ioi-min' does not exist; did you mean 'ioi-mini'?" in missing.err


def test_tasks_init_writes_a_file_that_validates(lab: Lab, text_model: Path) -> None:
    """The example is a task, for a model's tokenizer too; it is never written over."""
    done = lab("tasks", "init", "mine.json")
    assert (done.code, done.out, done.err) == (0, "mine.json\n", "")
    valid = lab("tasks", "validate", "mine.json")
    assert (valid.code, valid.err) == (0, "")
    assert "pairs: 1" in valid.out
    checked = lab("tasks", "validate", "mine.json", "--model", text_model)
    assert checked.code == 0
    assert "positions: " in checked.out
    before = Path("mine.json").read_bytes()
    again = lab("tasks", "init", "mine.json")
    assert again.code == 2
    assert "'mine.json' exists; give another name" in again.err
    assert Path("mine.json").read_bytes() == before
    assert "let the name end in '.json'" in lab("tasks", "init", "mine.txt").err


def test_tasks_validate_against_a_model_names_the_pair(
    lab: Lab, write_pairs: Any, ids_model: Path
) -> None:
    """What only a model can tell, such as an id outside its vocabulary, is told with the pair."""
    good = {"clean": [1, 2], "corrupt": [3, 2], "answers": [4], "wrong_answers": [5]}
    path = write_pairs([good, {**good, "answers": [99]}])
    assert lab("tasks", "validate", path).code == 0
    done = lab("tasks", "validate", path, "--model", ids_model)
    assert (done.code, done.out) == (3, "")
    assert "pair 2" in done.err
    assert "the model's vocabulary has 40" in done.err


def test_a_byte_order_mark_is_no_fault(lab: Lab, ids_task: Path) -> None:
    """Row 19: a task file that an editor marked as UTF-8 is read; other encodings are named."""
    text = ids_task.read_bytes()
    ids_task.write_bytes(b"\xef\xbb\xbf" + text)
    assert lab("tasks", "validate", ids_task).code == 0
    ids_task.write_bytes(text.decode().encode("utf-16"))
    done = lab("tasks", "validate", ids_task)
    assert done.code == 3
    assert "is not UTF-8; save the file as UTF-8" in done.err


def test_one_output_that_fails_costs_no_other(lab: Lab, tmp_path: Path) -> None:
    """A plot of a circuit that has nothing to plot is refused; the files after it are written."""
    plot, kept = tmp_path / "a.plot.png", tmp_path / "a.json"
    done = lab("trace", "acdc", "--model", "gate-and", "-o", plot, "-o", kept)
    assert done.code == 2
    assert "nothing to plot" in done.err
    assert kept.exists()
    assert not plot.exists()


def test_circuit_without_an_edge_of_the_model_is_no_mib_file(lab: Lab, tmp_path: Path) -> None:
    """Total effects of tokens are no edges: refused, where an empty circuit would be written."""
    done = lab("trace", "token-ablation", "--model", "gate-or", "-o", tmp_path / "t.mib.json")
    assert (done.code, (tmp_path / "t.mib.json").exists()) == (3, False)
    assert "write a .json" in done.err
