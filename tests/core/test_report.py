"""Reports: a folder that is whole or not there, whose every number is in its results."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import circuitlab
from circuitlab import Evidence, OptionError, ResourceError, Site, evaluate_circuit, write_report
from circuitlab.report import figures as drawing
from circuitlab.report import writing
from circuitlab.report.details import details
from circuitlab.report.record import commit
from circuitlab.report.writing import check_folder

FILES = {
    "REPRODUCE", "circuit.json", "report.html", "report.md", "results.json", "run.json",
    "figures/circuit.svg", "figures/controls.svg", "figures/curve.svg", "figures/pairs.svg",
    "figures/stability.svg",
}  # fmt: skip


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    """All that is measured of a circuit of ioi-mini, on few pairs."""
    circuit = circuitlab.build_circuit("ioi-mini", top=12, n_pairs=56)
    return evaluate_circuit(circuit, n_controls=20, resamples=200)


@pytest.fixture(scope="session")
def folder(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    path = tmp_path_factory.mktemp("reports") / "report"
    assert write_report(evidence, path, argv=["circuitlab", "report"]) == []
    return path


@pytest.fixture
def drawn_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are those of the report that was drawn already: drawing takes a second."""
    found = {path.stem: path.read_text("utf-8") for path in (folder / "figures").iterdir()}
    monkeypatch.setattr(writing, "figures", lambda circuit, results: (found, []))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path there."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def numbers(value: Any) -> Iterator[float | str]:
    """All numbers of a document, and all texts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield value


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def allowed(results: dict[str, Any]) -> set[str]:
    """How each number of the results may be written, and the numbers in its texts."""
    found: set[str] = set()
    for value in numbers(results):
        if isinstance(value, str):
            found.update(NUMBER.findall(value))
            continue
        for one in (value, 100 * value):
            found.add(f"{one + 0.0:.3g}" if abs(one) < 1000 else f"{one:,.0f}")
        if abs(value) < 1e-5:
            found.add("0")
        if isinstance(value, int):
            found.add(f"{value:,}")
    return found


def told(text: str) -> set[str]:
    """Numbers in the text of a report, without code and pictures."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"(`+).*?(?<!`)\1(?!`)", "", text)
    return set(NUMBER.findall(text.replace("\\", "")))


def test_the_folder_has_every_file(folder: Path) -> None:
    """Page, text, results, circuit, record, command and figures; nothing temporary beside it."""
    assert set(files(folder)) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


def test_every_number_of_the_text_is_in_the_results(folder: Path) -> None:
    """Numbers are rounded to three digits, shares in percent; others stand in a text there."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    text = (folder / "report.md").read_text("utf-8")
    assert len(told(text)) > 100
    assert told(text) - allowed(results) == set()


def test_the_number_test_can_fail(folder: Path) -> None:
    """A number that was not measured is found."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert told("The circuit keeps 12.3457 % of it.") - allowed(results) == {"12.3457"}


def test_the_page_says_what_the_text_says(folder: Path) -> None:
    """The sections of the page hold the same numbers, and the whole is one file."""
    page = (folder / "report.html").read_text("utf-8")
    results = json.loads((folder / "results.json").read_text("utf-8"))
    body = page.split('<section class="part"', 1)[1].split("<script")[0]
    body = re.sub(r"<(code|pre)>.*?</\1>|<figure>.*?</figure>", "", body, flags=re.S)
    shown = set(NUMBER.findall(re.sub(r"<[^>]*>|&#?\w+;", " ", body)))
    assert len(shown) > 100
    assert shown - allowed(results) == set()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_the_record_hashes_every_other_file(folder: Path) -> None:
    """The run record has the SHA-256 of each file, versions, digests and how it was asked for."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    written = {name: data for name, data in files(folder).items() if name != "run.json"}
    assert record["files"] == {n: hashlib.sha256(d).hexdigest() for n, d in written.items()}
    assert record["status"] == "done"
    assert record["argv"] == ["circuitlab", "report"]
    assert record["model"]["name"] == "ioi-mini"
    assert record["versions"]["circuitlab"] == circuitlab.__version__
    assert re.fullmatch(r"[0-9a-f]{64}", record["tokenizer_digest"])
    assert record["started"] <= record["ended"]


def test_reports_differ_in_their_times_alone(
    evidence: Evidence, folder: Path, tmp_path: Path
) -> None:
    """The same evidence gives the same bytes, but for the record's times."""
    write_report(evidence, tmp_path / "again", argv=["circuitlab", "report"])
    first, second = files(folder), files(tmp_path / "again")
    records = [json.loads(made.pop("run.json")) for made in (first, second)]
    assert first == second
    for record in records:
        del record["started"], record["ended"]
    assert records[0] == records[1]


def test_the_circuit_of_the_report_can_be_read(folder: Path, evidence: Evidence) -> None:
    """circuit.json is a circuit with the verdict and the frequency of its edges."""
    circuit = circuitlab.read_circuit(folder / "circuit.json")
    assert circuit.graph["evidence"]["word"] == evidence.verdict
    assert any("inclusion" in data for *_, data in circuit.edges(data=True))


def test_effects_of_components_are_those_of_plain_runs(evidence: Evidence) -> None:
    """Patching a head or MLP both ways is writing its output of the other run, and no more."""
    model = evidence.subject.model
    pairs = model.encode(evidence.held_out.task)
    heads = {"a1.h0": Site("z", 1, head=0), "m0": Site("mlp_out", 0)}
    found = details(evidence)
    clean, corrupt = (
        model.run(part, read=list(heads.values())) for part in (pairs.clean, pairs.corrupt)
    )
    bases = [pairs.score(run.logits[:, -1], clean.logits[:, -1]) for run in (clean, corrupt)]
    for name, site in heads.items():
        for base, other, mode, sign in (
            (0, corrupt, "noise", 1), (1, clean, "denoise", -1),
        ):  # fmt: skip
            prompts = (pairs.clean, pairs.corrupt)[base]
            run = model.run(prompts, write={site: other[site]})
            scores = pairs.score(run.logits[:, -1], clean.logits[:, -1])
            change = sign * float((scores - bases[base]).double().mean())
            assert found[name]["effects"][mode] == pytest.approx(change, abs=1e-4)


def test_patterns_are_means_over_prompts_of_one_length(evidence: Evidence) -> None:
    """Each row sums to 1 over the tokens of one prompt; the values are those of plain runs."""
    model = evidence.subject.model
    pattern = details(evidence)["a1.h0"]["pattern"]
    n = len(pattern["tokens"])
    lengths = [len(tokens) for tokens in model.encode(evidence.held_out.task).tokens_text]
    common = max(set(lengths), key=lambda length: (lengths.count(length), -length))
    assert n == common
    prompts = [
        pair.clean
        for pair, length in zip(evidence.held_out.task.pairs, lengths, strict=True)
        if length == n
    ][:8]
    site = Site("pattern", 1)
    expected = model.run(prompts, read=[site])[site][:, 0].mean(0)
    for row, wanted in zip(pattern["values"], expected.tolist(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
        assert sum(row) == pytest.approx(1, abs=1e-2)


@pytest.mark.usefixtures("drawn_once")
def test_a_report_does_not_take_the_place_of_anything_else(
    evidence: Evidence, tmp_path: Path
) -> None:
    """Files of others, links and older reports stay; an empty folder is taken."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name, said in (("mine", "something else"), ("file", "not a folder"), ("link", "not a fo")):
        with pytest.raises(OptionError, match=said):
            write_report(evidence, tmp_path / name, force=True)
    with pytest.raises(ResourceError, match="does not exist"):
        check_folder(tmp_path / "no" / "report", force=False)
    assert (tmp_path / "mine" / "notes.txt").read_text("utf-8") == "mine"
    (tmp_path / "empty").mkdir()
    write_report(evidence, tmp_path / "empty")
    assert "report.md" in files(tmp_path / "empty")
    with pytest.raises(OptionError, match="--force"):
        write_report(evidence, tmp_path / "empty")
    (tmp_path / "empty" / "figures" / "old.svg").write_text("old", encoding="utf-8")
    write_report(evidence, tmp_path / "empty", force=True)
    assert "figures/old.svg" not in files(tmp_path / "empty")


@pytest.mark.parametrize(
    ("function", "number", "error"),
    [
        ("replace", 0, OSError),
        ("replace", 1, OSError),
        ("fsync", 3, OSError),
        ("replace", 1, KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_the_old_report_and_nothing_else(
    function: str,
    number: int,
    error: type[BaseException],
    evidence: Evidence,
    drawn_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the disk is full, a rename fails or Ctrl-C comes, the folder is as it was, alone."""
    target = tmp_path / "report"
    write_report(evidence, target)
    before = files(target)
    calls, real = iter(range(100)), getattr(os, function)

    def once(*arguments: Any) -> None:
        if next(calls) == number:
            raise error(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, function, once)
    told = ResourceError if error is OSError else error
    with pytest.raises(told, match="No space left on device"):
        write_report(evidence, target, force=True)
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_names_of_strangers_are_inert(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task names, tokens and reasons may hold markup; the page's guard lets the sections pass."""
    canary = "<img src=x onerror=alert(1)></script><script>alert(1)</script>"
    results = json.loads(json.dumps(evidence.results))
    results["circuit"]["task"] = results["verdict"]["sentence"] = canary
    results["curve"] = {"reason": canary}
    results["warnings"] = [canary]
    circuit = evidence.circuit.copy()
    circuit.graph["task"] = canary
    pattern = {"tokens": [canary, "</script>\x1b"], "values": [[1.0, 0.0], [0.5, 0.5]]}
    monkeypatch.setattr(writing, "details", lambda evidence: {"a1.h0": {"pattern": pattern}})
    write_report(replace(evidence, results=results, circuit=circuit), tmp_path / "report")
    made = files(tmp_path / "report")
    page = made["report.html"].decode()
    assert "<img src=x" not in page
    assert page.count("</script>") == page.count("<script")
    assert "\x1b" not in page
    assert "<script>alert" not in page
    assert b"<img src=x" not in made["figures/circuit.svg"]
    text = made["report.md"].decode()
    assert "\\<img" in text
    assert not re.search(r"(?<!\\)<img", re.sub(r"`.*?`", "", text))


def test_without_matplotlib_the_report_has_one_figure(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where plots cannot be drawn the rest is written, and a warning says so."""

    def missing(circuit: Any) -> None:
        raise ResourceError("the picture needs matplotlib; run `pip install circuitlab[plots]`")

    monkeypatch.setattr(drawing, "show_plots", missing)
    warnings = write_report(evidence, tmp_path / "report")
    assert len(warnings) == 1
    assert "matplotlib" in warnings[0]
    made = files(tmp_path / "report")
    assert [name for name in made if name.startswith("figures")] == ["figures/circuit.svg"]
    assert json.loads(made["run.json"])["warnings"][-1:] == warnings


def test_the_commit_of_a_checkout_is_read(tmp_path: Path) -> None:
    """Loose, packed and detached heads are read without git; no checkout gives None."""
    inner = tmp_path / "repo" / "package"
    inner.mkdir(parents=True)
    assert commit(inner) is None or commit(inner) == commit(tmp_path)
    git = tmp_path / "repo" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n", encoding="ascii")
    (git / "packed-refs").write_text(f"{'b' * 40} refs/heads/main\n", encoding="ascii")
    assert commit(inner) == "b" * 40
    (git / "refs" / "heads" / "main").write_text(f"{'a' * 40}\n", encoding="ascii")
    assert commit(inner) == "a" * 40
    (git / "HEAD").write_text(f"{'c' * 40}\n", encoding="ascii")
    assert commit(inner) == "c" * 40
