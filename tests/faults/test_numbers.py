"""Numbers that are none, that are all alike, or that a check refuses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitlab
from circuitlab import CircuitGraph, GraphError, OptionError, QualityError, Site

Lab = Callable[..., Any]
Pairs = list[dict[str, Any]]


def trace(model: Path | str, task: Path, *more: str | Path) -> list[str | Path]:
    """The command that traces a model on a task file."""
    return ["trace", "--model", model, "--task-file", task, *more]


@pytest.fixture
def saved(tmp_path: Path, ids_module: Any) -> Callable[[Callable[[Any], None]], Path]:
    """``saved(change)``: folder of the ids model after a change to its weights."""

    def save(change: Callable[[Any], None]) -> Path:
        module = copy.deepcopy(ids_module)
        with torch.no_grad():
            change(module)
        module.save_pretrained(tmp_path / "changed")
        return tmp_path / "changed"

    return save


# --- 20: NaN and infinity -------------------------------------------------------------------------


def test_row_20_nan_in_the_weights_stops_at_the_first_site(
    lab: Lab, saved: Any, ids_task: Path
) -> None:
    """A NaN is found before anything is scored; the first site that has it is named."""

    def spoil(module: Any) -> None:
        module.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan

    done = lab(*trace(saved(spoil), ids_task, "--output", "c.json"))
    assert done.code == 3
    assert "NaN at site mlp_out.1" in done.err
    assert "attributing" not in done.err
    assert not Path("c.json").exists()


def test_row_20_nan_on_one_prompt_names_task_and_pair(
    lab: Lab, saved: Any, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """A NaN that only one word causes passes the self-check; the run names the pairs and prompt."""
    # The self-check draws its prompts from a fixed seed; this word must not be among them.
    generator = torch.Generator().manual_seed(0)
    seen = set(torch.randint(0, 40, (2, 6), generator=generator).flatten().tolist())
    word = next(i for i in range(40) if i not in seen)

    def spoil(module: Any) -> None:
        module.transformer.wte.weight[word] = torch.inf

    pairs = [{**p, "clean": [w for w in p["clean"] if w != word] or [1]} for p in ids_pairs]
    width = min(len(p["clean"]) for p in pairs)
    pairs = [{**p, "clean": p["clean"][:width], "corrupt": p["corrupt"][:width]} for p in pairs]
    for p in pairs:
        p["corrupt"] = [w if w != word else (word + 1) % 40 for w in p["corrupt"]]
    pairs[4]["clean"][0] = word
    done = lab(*trace(saved(spoil), write_pairs(pairs, name="odd")))
    assert done.code == 3
    assert "task 'odd', clean prompts of pairs 1, 2, 3, 4, 5, 6, 7, 8" in done.err
    assert "infinity at site resid_pre.0, prompt 5 of the batch" in done.err


def test_row_20_overflow_in_half_precision_suggests_float32(
    lab: Lab, saved: Any, ids_task: Path
) -> None:
    """What overflows in float16 stops with the remedy, and the remedy works."""

    def enlarge(module: Any) -> None:
        # Past 65,504, undone by the norm that reads it.
        module.transformer.h[1].mlp.c_proj.weight.mul_(3e4)

    folder = saved(enlarge)
    done = lab(*trace(folder, ids_task, "--dtype", "float16"))
    assert done.code == 3
    assert "infinity at site mlp_out.1" in done.err
    assert "--dtype float32" in done.err
    assert lab(*trace(folder, ids_task, "--dtype", "float32", "--allow-weak")).code == 0


# --- 21, 22: ties, zeros, and sizes ---------------------------------------------------------------


def test_row_21_all_scores_zero_is_said_and_nothing_is_chosen(
    lab: Lab, ids_model: Path, write_pairs: Any
) -> None:
    """Where no component's output changes every score is 0, and no edge is kept by accident."""
    # One token, the same in every clean prompt: each output is its own mean.
    pairs = [{"clean": [3], "corrupt": [i], "answers": [5], "wrong_answers": [6]} for i in (7, 9)]
    command = trace(ids_model, write_pairs(pairs), "--ablation", "mean", "--allow-weak", "--json")
    done = lab(*command)
    assert done.code == 0
    assert "every score is zero: nothing distinguishes one edge from another" in done.err
    assert done.json["edges"] == []
    everything = lab(*command, "--top", "all").json["edges"]
    assert len(everything) == 46
    assert {edge["score"] for edge in everything} == {0.0}


def test_row_21_scores_that_are_rounding_establish_nothing(
    lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """KL divergence is flat at the clean prompt: what EAP sees there is called no circuit."""
    command = trace(ids_model, ids_task, "--metric", "kl-divergence", "--method", "eap")
    done = lab(*command)
    assert done.code == 0
    assert "circuit: NOT ESTABLISHED: the scores explain 0% of the effect" in done.out
    assert "candidate, not found 1: " in done.out


def test_row_21_ties_are_broken_by_name_and_reported() -> None:
    """Equal scores are kept in the order of their names, and how many tie is said."""
    wiring = circuitlab.Wiring(1, 2, False)
    scores = torch.full((len(wiring.sources), len(wiring.receivers)), -0.5)
    circuit = circuitlab.circuit_of(wiring, scores, top=3)
    names = [effect[:3] for effect in circuit.effects()]
    every = circuitlab.circuit_of(wiring, scores, top="all")
    assert names == sorted(effect[:3] for effect in every.effects())[:3]
    assert circuit.graph["warnings"] == [
        f"{every.number_of_edges()} edges tie at the cut (score 0.5); kept by name"
    ]
    assert "warnings" not in every.graph


def test_row_22_none_and_more_than_all(lab: Lab, ids_model: Path, ids_task: Path) -> None:
    """``--top 0`` is the empty circuit, a number past the edges the whole one, both exit 0."""
    outputs = ("--output", "e.json", "--output", "e.svg")
    empty = lab(*trace(ids_model, ids_task, "--top", "0", "--json", *outputs))
    assert empty.code == 0
    assert empty.json["edges"] == []
    assert set(circuitlab.read_circuit(Path("e.json"))) == {"input", "logits"}
    whole = lab(*trace(ids_model, ids_task, "--top", "999999", "--json"))
    assert whole.code == 0
    assert len(whole.json["edges"]) == 46
    high = lab(*trace(ids_model, ids_task, "--threshold", "1e9", "--json"))
    assert high.code == 0
    assert high.json["edges"] == []
    low = lab(*trace(ids_model, ids_task, "--threshold", "0", "--top", "all", "--json"))
    assert len(low.json["edges"]) == 46


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--top", "-1"), ("--top", "most"), ("--top", "1.5"), ("--threshold", "-1"),
     ("--threshold", "nan"), ("--threshold", "inf"), ("--verify", "-1"), ("--ig-steps", "0"),
     ("--batch-size", "0"), ("--n-prompts", "0"), ("--fail-under", "accuracy=nan"),
     ("--fail-under", "accurcy=1"), ("--dtype", "int8"), ("--device", "abacus")],
)  # fmt: skip
def test_row_22_values_out_of_range_are_usage_errors(
    flag: str, value: str, lab: Lab, ids_model: Path, ids_task: Path
) -> None:
    """A size or threshold that cannot be meant is refused; flag, value and range are named."""
    done = lab(*trace(ids_model, ids_task, flag, value, "--output", "c.json"))
    assert (done.code, done.out) == (2, "")
    message = done.err.splitlines()[-1]
    assert re.sub(r"[-_ ]", " ", flag.lstrip("-")) in re.sub(r"[-_ ]", " ", message)
    assert value in message
    assert not Path("c.json").exists()


# --- 23, 24: self-checks --------------------------------------------------------------------------


def test_row_23_everything_kept_is_the_model_and_nothing_kept_the_ablated_one(
    ids_module: Any, ids_task: Path
) -> None:
    """Writing what each component wrote changes nothing; the corrupt input is the corrupt run."""
    model = circuitlab.load_model(ids_module)
    pairs = model.encode(circuitlab.read_task(ids_task))
    clean = model.run(pairs.clean, read=model.source_sites)
    corrupt = model.run(pairs.corrupt, read=model.source_sites)
    same = model.run(pairs.clean, write={site: clean[site] for site in model.source_sites})
    torch.testing.assert_close(same.logits, clean.logits, rtol=0, atol=1e-5)
    start = Site("resid_pre", 0)
    ablated = model.run(pairs.clean, write={start: corrupt[start]})
    torch.testing.assert_close(ablated.logits, corrupt.logits, rtol=0, atol=1e-5)


MISREAD = {
    'mlp="ln_2"': "components sum to the residual stream: off by",
    'mlp="mlp.c_fc"': "cannot be traced as GPT-2: the value written at mlp_out.0 has shape",
    "n_heads=4": "cannot be traced as GPT-2: ",
    'attention_norm="ln_2"': "q, k and v are projected from the residual stream: off by",
}


@pytest.mark.parametrize("change", MISREAD)
def test_row_23_a_wrong_description_of_a_model_fails_its_self_check(
    change: str, lab: Lab, install: Any, ids_model: Path, ids_task: Path
) -> None:
    """A plugin that misplaces a part is caught when the model is loaded: exit 7, and the fact."""
    install("circuitlab-wrong", "wrong", f"""
        import dataclasses
        import circuitlab

        @circuitlab.hookimpl
        def adapt_architecture(config):
            from circuitlab.architectures import gpt2
            return dataclasses.replace(gpt2(config), {change})
        """)  # fmt: skip
    for command in (("models", "check", ids_model), trace(ids_model, ids_task)):
        done = lab(*command)
        assert done.code == 7
        assert MISREAD[change] in done.err
        assert "attributing" not in done.err


def test_row_24_logits_that_differ_from_plain_hugging_face_stop_the_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, ids_module: Any, ids_task: Path
) -> None:
    """The largest difference and the tolerance of the type are printed; nothing is written."""
    from circuitlab import loading

    honest = loading.probe

    def shifted(module: Any) -> Any:
        probe = honest(module)
        logits = probe.logits + 0.01 * probe.logits.abs().max()
        return replace(probe, answer=lambda: logits)

    monkeypatch.setattr(loading, "probe", shifted)
    done = lab("trace", "--model", "ioi-mini", "--output", "c.json")
    assert done.code == 7
    assert "fails its self-check: logits equal plain Hugging Face: off by 0.01" in done.err
    assert f"at most {256 * torch.finfo(torch.float32).eps:.2g}" in done.err
    assert not Path("c.json").exists()
    shown = lab("models", "check", "ioi-mini")
    assert shown.code == 7
    assert "FAILS\tlogits equal plain Hugging Face" in shown.out
    assert "holds\tcomponents sum to the residual stream" in shown.out
    with pytest.raises(QualityError, match=r"off by 0\.01"):
        circuitlab.load_model(ids_module)


# --- 28: NaN in JSON ------------------------------------------------------------------------------


def test_row_28_nan_is_refused_by_the_writer_and_by_the_reader(lab: Lab, tmp_path: Path) -> None:
    """No circuit with a NaN can be made, written or read: JSON has none."""
    circuit = CircuitGraph()
    circuit.add_component("input", kind="input", layer=0)
    circuit.add_component("logits", kind="logits", layer=1)
    with pytest.raises(GraphError, match="must be finite"):
        circuit.add_effect("input", "logits", float("nan"))
    circuit.add_effect("input", "logits", 1.0, exact=float("nan"))
    with pytest.raises(GraphError, match="cannot be written as JSON"):
        circuit.to_json()
    del circuit.edges["input", "logits", ""]["exact"]
    text = circuit.to_json().replace("1.0", "NaN")
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    done = lab("render", "c.json", "--output", "c.svg")
    assert done.code == 3
    assert "'c.json'" in done.err
    assert "NaN is not JSON" in done.err
    assert not (tmp_path / "c.svg").exists()


def test_row_28_undefined_numbers_are_null_with_a_reason(
    lab: Lab, ids_model: Path, write_pairs: Any, ids_pairs: Pairs
) -> None:
    """Where a number cannot be given, the document has null or words, never NaN."""
    same = [{**ids_pairs[0], "clean": [*ids_pairs[0]["clean"]]} for _ in range(3)]
    done = lab(*trace(ids_model, write_pairs(same), "--json", "--verify", "0"))
    assert done.code == 0
    assert "undefined" in done.json["provenance"]["baseline"]["interval"]
    assert "confirmed_share" not in done.json["metrics"]
    json.dumps(done.json, allow_nan=False)


def test_row_28_an_option_cannot_be_nan(ids_module: Any, ids_task: Path) -> None:
    """The Python interface refuses a NaN option as the command line does."""
    with pytest.raises(OptionError, match="threshold=nan is not a finite number"):
        circuitlab.build_circuit(ids_module, circuitlab.read_task(ids_task), threshold=float("nan"))
