"""Task data that cannot be used, or that deserves a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
PAIR = {"clean": CLEAN, "corrupt": CORRUPT, "answers": [" Mary"], "wrong_answers": [" John"]}

Lab = Callable[..., Any]
Pairs = list[dict[str, Any]]


def refused(done: Any, code: int = 3) -> str:
    """The one error line of a command that was refused, and nothing on stdout."""
    assert (done.code, done.out) == (code, "")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.err
    return errors[0]


# --- 8, 9: files ----------------------------------------------------------------------------------

BROKEN = {
    "syntax.json": ('{\n "prompts": [\n  {]\n}', ":3:", "not JSON"),
    "syntax.toml": ('name = "x"\nmetric = \n', ":2:", "not TOML"),
    "syntax.jsonl": ('{"clean": "a", "corrupt": "b", "answers": "c"}\n{,}\n', ":2:", "not JSON"),
    "unknown.json": (
        '{"prompts": [\n {"clean": "a", "corupt": "b", "answers": "c"}]}', ":2:",
        "key 'corupt' is unknown; did you mean 'corrupt'?",
    ),
    "top.json": ('{"metrik": "x", "prompts": []}', "", "did you mean 'metric'?"),
    "type.toml": (
        'name = "t"\n[[prompts]]\nclean = 3\ncorrupt = "b"\nanswers = "c"\n', ":2:",
        "clean is a number; it must be text or a list of token ids",
    ),
    "answers.json": (
        '{"prompts": [\n\n{"clean": "a", "corrupt": "b", "answers": {"x": 1}}]}', ":3:",
        "answers holds a table; an answer must be text or a token id",
    ),
    "missing.jsonl": ('{"clean": "a", "corrupt": "b"}\n', ":1:", "key 'answers' is missing"),
    "rows.csv": (
        "clean,corrupted,correct_idx,incorrect_idx\na,b,x,2\n", ":2:", "correct_idx is 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_row_08_a_broken_task_file_is_named_by_file_and_line(
    name: str, lab: Lab, tmp_path: Path
) -> None:
    """File, line, key, expected type and nearest name stand in the message; no model is loaded."""
    text, line, fact = BROKEN[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    for command in (("trace", "--task-file", name), ("tasks", "validate", name)):
        done = lab(*command)
        message = refused(done)
        assert f"{name}{line}" in message
        assert fact in message
        assert "loading" not in done.err


@pytest.mark.parametrize("text", ['{"prompts": []}', "[]", "", "null"])
def test_row_09_a_task_without_pairs_is_refused(text: str, lab: Lab, tmp_path: Path) -> None:
    """An empty file, or an empty list of pairs, is no task."""
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    message = refused(lab("trace", "--task-file", "t.json"))
    assert "t.json" in message
    assert "no prompt pairs" in message or "must be" in message or "not JSON" in message


def test_row_09_one_pair_runs_without_an_interval(
    lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """One prompt pair is traced; that no interval can be given is said, in words and in JSON."""
    task = write_pairs(ids_pairs[:1])
    done = lab("trace", "--model", ids_model, "--task-file", task, "--json")
    assert done.code == 0
    assert "1 pair: no interval can be given" in done.err
    assert done.json["provenance"]["baseline"]["interval"] == "undefined (1 pair)"


# --- 10, 11: effects ------------------------------------------------------------------------------


def test_row_10_equal_prompts_have_no_metric_gap(
    lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """A pair whose prompts are the same tokens is refused by number before anything is divided."""
    same = {**ids_pairs[0], "corrupt": ids_pairs[0]["clean"]}
    task = write_pairs([ids_pairs[1], same, ids_pairs[2]])
    message = refused(lab("trace", "--model", ids_model, "--task-file", task))
    assert "pair 2: the metric gap is 0" in message
    assert "change corrupt or leave the pair out" in message


def test_row_10_an_effect_of_zero_everywhere_is_refused(lab: Lab, tmp_path: Path) -> None:
    """Different prompts that score the same leave nothing to explain, and no share of nothing."""
    # hand-induction knows nothing but repetition, so its answer does not hang on the first word.
    pairs = [{"clean": [1, 2, 3], "corrupt": [2, 2, 3], "answers": [4], "wrong_answers": [5]}]
    (tmp_path / "t.json").write_text(json.dumps({"prompts": pairs}), encoding="utf-8")
    done = lab("trace", "--model", "hand-induction", "--task-file", "t.json")
    message = refused(done)
    assert "the metric gap is 0 for every pair" in message
    assert "attributing" not in done.err


@pytest.fixture
def weak_task(write_pairs: Any, ids_pairs: Pairs) -> Path:
    """Every pair once as it is and once the other way round: the mean effect is zero."""
    turned = [{**p, "clean": p["corrupt"], "corrupt": p["clean"]} for p in ids_pairs]
    return write_pairs([*ids_pairs, *turned])


def test_row_11_an_effect_within_its_noise_is_refused(
    lab: Lab, ids_model: Path, weak_task: Path
) -> None:
    """An interval that holds 0 stops the run, with its numbers, before any attribution."""
    done = lab("trace", "--model", ids_model, "--task-file", weak_task)
    message = refused(done)
    assert "over 16 pairs: its 95 % interval holds 0" in message
    assert "add pairs, or go on with --allow-weak" in message
    assert "attributing" not in done.err


def test_row_11_allow_weak_goes_on_and_shares_are_undefined(
    lab: Lab, ids_model: Path, weak_task: Path
) -> None:
    """The remedy works: it warns loudly, establishes nothing, and divides by nothing."""
    command = ("trace", "--model", ids_model, "--task-file", weak_task, "--allow-weak")
    done = lab(*command, "--json")
    assert done.code == 0
    assert "warning: WEAK TASK:" in done.err
    assert done.json["metrics"]["explained_share"] is None
    assert done.json["provenance"]["verdict"] == "not established"
    assert "within its own noise" in done.json["provenance"]["verdict_reason"]
    said = lab(*command).out
    assert "share is undefined" in said
    assert "NOT ESTABLISHED: the effect to explain is within its own noise" in said
    assert "inf" not in said.replace("information", "")
    assert lab(*command, "--fail-under", "explained_share=0").code == 7


# --- 12: lengths ----------------------------------------------------------------------------------


@pytest.fixture
def uneven(write_pairs: Any, ids_pairs: Pairs) -> Path:
    """Six even pairs, and two whose corrupt prompt lacks its first token."""
    return write_pairs(
        [p if i < 6 else {**p, "corrupt": p["corrupt"][1:]} for i, p in enumerate(ids_pairs)]
    )


def test_row_12_prompts_of_different_length_are_named(
    lab: Lab, ids_model: Path, uneven: Path
) -> None:
    """The pairs, their lengths and their tokens are named, and both ways out offered."""
    message = refused(lab("trace", "--model", ids_model, "--task-file", uneven))
    assert "pairs 7, 8: clean and corrupt differ in length" in message
    assert "pair 7: clean has 6 tokens [" in message
    assert "corrupt 5 [" in message
    assert "--align drop" in message
    assert "--align pad" in message


def test_row_12_align_drop_leaves_the_pairs_out(lab: Lab, ids_model: Path, uneven: Path) -> None:
    """The first remedy: the other six pairs are traced, and the two are named."""
    done = lab("trace", "--model", ids_model, "--task-file", uneven, "--align", "drop", "--json")
    assert done.code == 0
    assert "pairs 7, 8: left out" in done.err
    assert done.json["provenance"]["n_pairs"] == 6


def test_row_12_align_pad_is_refused_where_positions_must_correspond(
    lab: Lab, ids_model: Path, uneven: Path
) -> None:
    """The second remedy: swapping outputs position by position is refused, other ablations run."""
    command = ("trace", "--model", ids_model, "--task-file", uneven, "--align", "pad")
    message = refused(lab(*command))
    assert "their positions do not correspond" in message
    assert "--ablation zero or mean" in message
    for ablation in ("zero", "mean"):
        assert lab(*command, "--ablation", ablation).code == 0


# --- 13: answers ----------------------------------------------------------------------------------


def pair(text_model: Path, **changed: str) -> list[str | Path]:
    """A command that traces one text pair."""
    values = {"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary", "wrong": " John", **changed}
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    return ["trace", "--model", text_model, *flags]


def test_row_13_a_missing_space_shows_the_tokens_and_the_right_spelling(
    lab: Lab, text_model: Path
) -> None:
    """Without its leading space a name is several tokens; the message gives the one that works."""
    message = refused(lab(*pair(text_model, answer="Mary")))
    assert 'answer "Mary" is 2 tokens [Mar|y], not one; ' in message
    assert 'write " Mary", which is one token' in message
    assert lab(*pair(text_model, answer=" Mary")).code == 0


def test_row_13_several_tokens_without_a_remedy_by_space(lab: Lab, text_model: Path) -> None:
    """A word the tokenizer splits either way is refused with its tokens."""
    message = refused(lab(*pair(text_model, wrong=" Xavier")))
    assert 'wrong answer " Xavier" is ' in message
    assert "[ " in message
    assert "choose an answer that is one token" in message


def test_row_13_a_word_outside_the_vocabulary(lab: Lab) -> None:
    """A tokenizer of whole words says which word it does not know, in answers and in prompts."""
    task = json.loads(lab("tasks", "show", "ioi-mini").out)["prompts"][0]
    flags = ("trace", "--model", "ioi-mini", "--clean", task["clean"], "--corrupt", task["corrupt"])
    message = refused(lab(*flags, "--answer", "Zaphod", "--wrong", task["wrong_answers"][0]))
    assert 'answer "Zaphod" is not in the vocabulary' in message
    strange = ("--clean", f"Zaphod {task['clean']}", "--answer", task["answers"][0])
    assert 'does not know: "Zaphod"' in refused(lab(*flags, *strange))


# --- 14, 15: what the model does, and how often ---------------------------------------------------


def test_row_14_a_model_that_fails_the_task_is_said_before_attribution(
    lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """Accuracy and chance are given before the long work, and ``--fail-under`` makes it fatal."""
    swapped = [
        {**p, "answers": p["wrong_answers"], "wrong_answers": p["answers"]} for p in ids_pairs
    ]
    command = ("trace", "--model", ids_model, "--task-file", write_pairs(swapped))
    done = lab(*command)
    assert done.code == 0
    warning = "the model does not do the task: accuracy 12%, chance 50%"
    assert warning in done.err
    assert done.err.index(warning) < done.err.index("attributing")
    assert done.err.count(warning) == 1
    fatal = lab(*command, "--fail-under", "accuracy=0.9")
    assert fatal.code == 7
    assert "accuracy is 0.125, below the 0.9 that --fail-under asks for" in fatal.err


def test_row_15_repeated_pairs_are_counted_and_widen_no_evidence(
    lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """Repeats are counted and named, and the interval is that of the pairs without them."""
    command = ("trace", "--model", ids_model, "--json", "--task-file")
    once = lab(*command, write_pairs(ids_pairs))
    thrice = lab(*command, write_pairs(ids_pairs * 3))
    assert once.code == thrice.code == 0
    assert "repeat" not in once.err
    assert "16 of 24 pairs repeat an earlier one" in thrice.err
    intervals = [done.json["provenance"]["baseline"]["interval"] for done in (once, thrice)]
    assert intervals[1] == pytest.approx(intervals[0], rel=1e-6)
    assert thrice.json["provenance"]["baseline"]["effect"] == pytest.approx(
        once.json["provenance"]["baseline"]["effect"], rel=1e-6
    )


# --- 16, 17: length and BOS -----------------------------------------------------------------------


def test_row_16_a_prompt_longer_than_the_context_names_pair_and_lengths(
    lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """The pair, its length and the model's limit are named."""
    long = {**ids_pairs[0], "clean": [1] * 17, "corrupt": [2] * 17}
    task = write_pairs([ids_pairs[1], long])
    message = refused(lab("trace", "--model", ids_model, "--task-file", task))
    assert "pair 2: clean has 17 tokens, the model reads at most 16" in message
    assert "shorten it or leave the pair out" in message


def test_row_17_bos_twice_is_noticed(lab: Lab, bos_model: Path) -> None:
    """Writing out the BOS that the tokenizer adds anyway runs, with a warning."""
    changed = {"clean": "<|endoftext|>" + CLEAN, "corrupt": "<|endoftext|>" + CORRUPT}
    done = lab(*pair(bos_model, **changed))
    assert done.code == 0
    assert "begins with BOS '<|endoftext|>' twice" in done.err
    assert "BOS" not in lab(*pair(bos_model)).err


def test_row_17_missing_bos_is_noticed(lab: Lab, bos_model: Path) -> None:
    """Token ids without the BOS that the tokenizer adds to text run, with a warning."""
    done = lab(
        "trace", "--model", bos_model, "--clean", "[40, 50, 60]", "--corrupt", "[41, 50, 60]",
        "--answer", "[70]", "--wrong", "[71]",
    )  # fmt: skip
    assert done.code == 0
    assert "does not begin with BOS '<|endoftext|>', which the tokenizer adds to text" in done.err
