"""Where a setting comes from: flag, environment, file or default; and what is refused early."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lab = Callable[..., Any]


def settings(done: Any) -> dict[str, tuple[str, str]]:
    """Value and origin of each setting that ``--dry-run`` shows."""
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert rows[0] == ["setting", "value", "from"]
    return {name: (value, origin) for name, value, origin in rows[1:]}


def test_dry_run_shows_every_setting_and_its_origin(lab: Lab, tmp_path: Path) -> None:
    """Flag beats environment beats file beats default, and each row says which it was."""
    (tmp_path / "c.toml").write_text('top = 5\nmethod = "eap"\nseed = 3\nverify = 2\n', "utf-8")
    done = lab(
        "trace", "--config", "c.toml", "--top", "7", "--dry-run",
        env={"CIRCUITLAB_TOP": "6", "CIRCUITLAB_METHOD": "eap-ig", "CIRCUITLAB_IG_STEPS": "9"},
    )  # fmt: skip
    shown = settings(done)
    assert shown["top"] == ("7", "flag")
    assert shown["method"] == ("eap-ig", "environment")
    assert shown["ig-steps"] == ("9", "environment")
    assert shown["seed"] == ("3", "config file")
    assert shown["verify"] == ("2", "config file")
    assert shown["model"] == ("ioi-mini", "default")
    assert shown["analysis"] == ("edge-attribution", "command")
    assert "loading" not in done.err


def test_every_flag_of_the_help_is_in_the_dry_run(lab: Lab) -> None:
    """No setting is hidden: what ``--help`` offers, ``--dry-run`` resolves."""
    lines = lab("trace", "edge-attribution", "--help").out.splitlines()
    offered = {
        next(word for word in line.replace("/", " ").split() if word.startswith("--")).strip(",")
        for line in lines
        if line.startswith(("  -", "  --"))
    }
    shown = {f"--{name}" for name in settings(lab("trace", "--dry-run"))}
    assert len(offered) > 30
    assert offered - shown == {"--dry-run", "--config", "--help"}


def test_environment_and_file_reach_the_run(
    lab: Lab, ids_model: Path, ids_task: Path, tmp_path: Path
) -> None:
    """What the dry run shows is what is used."""
    (tmp_path / "c.toml").write_text(
        f"model = {str(ids_model)!r}\ntask-file = {str(ids_task)!r}\noutput = 'out.json'\n",
        "utf-8",
    )
    done = lab("trace", "--config", "c.toml", "--json", env={"CIRCUITLAB_TOP": "3"})
    assert done.code == 0
    assert len(done.json["edges"]) == 3
    assert done.json["provenance"]["model"] == str(ids_model)
    assert done.json["paths"] == ["out.json"]
    assert Path("out.json").is_file()


def test_a_list_in_the_file_is_several_values(lab: Lab, tmp_path: Path) -> None:
    """``output = ["a.json", "b.svg"]`` is two outputs, one text is one, never its letters."""
    (tmp_path / "c.toml").write_text('output = ["a.json", "b.svg"]\nanswer = " Mary"\n', "utf-8")
    shown = settings(lab("trace", "--config", "c.toml", "--dry-run"))
    assert shown["output"] == ("a.json, b.svg", "config file")
    assert shown["answer"] == (" Mary", "config file")


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [("tpo = 5", 3, "no flag is called 'tpo'; did you mean 'top'?"),
     ("zzzzzz = 5", 3, "no flag is called 'zzzzzz'; flags are "),
     ("[trace]\ntop = 5", 3, "no flag is called 'trace'"),
     ("top = ", 3, "is not TOML"),
     ('top = "many"', 2, "--top 'many' is not a whole number or all"),
     ('n-prompts = "x"', 2, "'x' is not a valid integer"),
     ('dtype = "int3"', 2, "'int3' is not one of")],
)  # fmt: skip
def test_a_bad_config_file_is_refused(
    text: str, code: int, fact: str, lab: Lab, tmp_path: Path
) -> None:
    """An unknown key gets the nearest flag; a wrong value the flag and what it accepts."""
    (tmp_path / "c.toml").write_text(text, "utf-8")
    done = lab("trace", "--config", "c.toml")
    assert (done.code, done.out) == (code, "")
    assert fact in done.err
    assert "loading" not in done.err


def test_a_config_file_that_is_not_there(lab: Lab) -> None:
    """A missing file is named with the reason."""
    done = lab("trace", "--config", "none.toml")
    assert done.code == 3
    assert "config 'none.toml' cannot be read: No such file" in done.err


@pytest.mark.parametrize(
    ("command", "fact"),
    [(("trace", "--mdoel", "x"), "--model"),
     (("trace", "--otput", "x"), "--output"),
     (("trac",), "did you mean 'trace'?"),
     (("trace", "edge-atribution"), "did you mean 'edge-attribution'?"),
     (("model", "list"), "did you mean 'models'?"),
     (("trace", "--task", "a", "--task-file", "b.json"), "give one of --task, --task-file"),
     (("trace", "--clean", "a"), "a single pair needs --clean, --corrupt and --answer"),
     (("trace", "--metric", "logit-diff"), "'logit-difference'"),
     (("trace", "--fail-under", "accuracy"), "is not NAME=NUMBER, as accuracy=0.9"),
     (("trace", "--fail-under", "accurcy=1"), "a result has no metric 'accurcy'; its metrics are"),
     (("trace", "x", "y"), "no command 'x'"),
     (("render", "c.json"), "--output"),
     (("models", "check"), "MODEL")],
)  # fmt: skip
def test_usage_errors_are_exit_2_and_say_the_nearest(
    command: tuple[str, ...], fact: str, lab: Lab
) -> None:
    """One line, exit 2, the nearest name or what is accepted, and where the help is."""
    done = lab(*command)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert fact in done.err
    assert "loading" not in done.err


@pytest.mark.parametrize(
    ("path", "code", "fact"),
    [("x.foo", 2, "has no known suffix; give it one of .dot .gexf .graphml .html .json .mib.json"),
     (".json", 2, "has no known suffix"),
     ("nowhere/x.json", 5, "nowhere' does not exist; create it first"),
     ("folder.json", 5, "is not a file; choose another name"),
     ("file/x.json", 5, "does not exist")],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_the_model_loads(
    path: str, code: int, fact: str, lab: Lab, tmp_path: Path, circuit_file: Path
) -> None:
    """Unknown suffix, missing folder, folder of that name: nothing has been computed yet."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    for command in (("trace",), ("render", circuit_file)):
        done = lab(*command, "--output", path)
        assert (done.code, done.out) == (code, "")
        assert fact in done.err
        assert "loading" not in done.err


def test_a_folder_that_may_not_be_written_is_refused_before_the_model_loads(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder is found out by asking, not after the work."""
    # By fault injection, since nothing is read-only to root.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: not mode & os.W_OK and allowed(p, mode))
    done = lab("trace", "--output", "x.json")
    assert (done.code, done.out) == (5, "")
    assert "may not be written; choose another one" in done.err
    assert "loading" not in done.err


def test_a_full_disk_leaves_no_file(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, circuit_file: Path, tmp_path: Path
) -> None:
    """A write that fails half way is exit 5; the older file stays and no draft is left."""
    (tmp_path / "c.dot").write_text("older", encoding="utf-8")
    before = sorted(tmp_path.iterdir())

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    done = lab("render", circuit_file, "--output", "c.dot")
    assert (done.code, done.out) == (5, "")
    assert "No space left on device" in done.err
    assert (tmp_path / "c.dot").read_text(encoding="utf-8") == "older"
    assert sorted(tmp_path.iterdir()) == before


def test_annotators_are_checked_before_the_model_loads(lab: Lab) -> None:
    """A plugin that does not exist, or cannot annotate, is told at once: exit 8."""
    for name, fact in (("nobody", "no such plugin"), ("defaults", "it cannot annotate a circuit")):
        done = lab("trace", "--annotate", name)
        assert (done.code, done.out) == (8, "")
        assert f"--annotate {name}: {fact}; plugins that annotate: " in done.err
        assert "loading" not in done.err
