"""The whole analysis: closed forms, controls, options, and what stands in the circuit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus import trace
from circuitlab_activation_plateaus.comparison import QUANTITIES
from circuitlab_activation_plateaus.trace import Options
from circuitlab_activation_plateaus.walks.bundle import Bundle
from feature_oracles import random_dictionary
from oracles import random_gpt2

from circuitlab import (
    CircuitGraph,
    Curves,
    ModelError,
    OptionError,
    PromptPair,
    QualityError,
    Site,
    Task,
    TaskError,
    TracedModel,
    load_model,
    panels_of,
    write_dictionary,
)
from circuitlab.testing import check_analysis, tiny_model, toy_task

QUICK: dict[str, Any] = {"bank_size": 5, "steps": 7, "refine": 1}
BARE: dict[str, Any] = {**QUICK, "freeze": "none", "read": "none", "controls": 0}


def traced(model: TracedModel, task: Task | None, **options: Any) -> CircuitGraph:
    """The analysis with these options."""
    return trace.activation_plateaus(model, task, Options(**options))


def quantities(circuit: CircuitGraph) -> dict[str, dict[str, Any]]:
    """The numbers of the curves, by name."""
    return {row["name"]: row for row in circuit.graph["plateaus"]["quantities"]}


def panel(circuit: CircuitGraph, title: str) -> Any:
    """The panel whose title begins so."""
    return next(each for each in panels_of(circuit) if each.title.startswith(title))


def linear_model() -> TracedModel:
    """Two layers without norms, the second of which writes nothing."""
    module: Any = random_gpt2(layer_norm=False, mlp=False)
    with torch.no_grad():
        for parameter in module.transformer.h[1].attn.c_proj.parameters():
            parameter.zero_()
    return load_model((module, None))


def test_linear_model() -> None:
    """Through the whole analysis a linear map has width .8, slope 1 and nothing that sharpens."""
    circuit = traced(
        linear_model(), toy_task(), **QUICK | {"path": "lerp", "response": "d-rel"}, controls=0
    )
    found = {name: row["value"] for name, row in quantities(circuit).items()}
    assert found == pytest.approx(
        {
            "width": 0.8,
            "max_slope": 1.0,
            "excess": 1.0,
            "location": 0.5,
            "participation": 1.0,
            "boundaries": 0.0,
            "flat_start": 0.1,
            "flat_end": 0.1,
            "deviation": 0.0,
        },
        abs=1e-6,
    )
    assert all(abs(score) < 1e-6 for *_, score in circuit.effects())
    curve = panel(circuit, "From A to B").curves[0]
    assert list(curve.mean) == pytest.approx(panel(circuit, "From A to B").x, abs=1e-6)


def test_trained_against_untrained() -> None:
    """The trained induction model jumps, the one before training does not: intervals apart."""
    model = load_model("induction")
    circuit = traced(model, None, bank_size=12, steps=21, freeze="none", read="none")
    width, slope = quantities(circuit)["width"], quantities(circuit)["max_slope"]
    assert width["difference"] == pytest.approx(width["value"] - width["control"], abs=1e-9)
    assert width["difference_interval"][1] < -0.2
    assert slope["difference_interval"][0] > 1
    for row in (width, slope):
        assert row["control"] == pytest.approx(row["reference"], abs=0.03)
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    said = circuit.graph["findings"]["median width"]
    assert f"difference {width['difference']:+.3g} [" in said
    assert len(circuit.graph["plateaus"]["pairs"]) == 12


def test_controls_are_other_models() -> None:
    """Each control has weights of its own, drawn by the seed, and is walked on the same pairs."""
    model = tiny_model()

    def controlled(seed: int, controls: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        options = BARE | {"controls": controls, "pairs": "task"}
        return quantities(traced(model, toy_task(), **options))["width"]

    one, again, several, other = (controlled(*with_) for with_ in ((0, 1), (0, 1), (0, 3), (1, 1)))
    assert one == again
    assert one["value"] == several["value"] == other["value"]
    assert len({one["control"], several["control"], other["control"]}) == 3


def test_contract() -> None:
    """The analysis does what CircuitLab expects of every analysis."""

    def quick(
        model: TracedModel, task: Task | None = None, *, batch_size: int | None = None
    ) -> CircuitGraph:
        """Few pairs and steps."""
        few = QUICK | {"bank_size": 3, "steps": 5}
        return traced(model, task, **few, batch_size=batch_size)

    circuit = check_analysis(quick)
    assert circuit.number_of_edges() > 0
    assert {"layers", "gate_flips", "freezing", "plateaus"} <= circuit.graph.keys()
    titles = [each.title for each in panels_of(circuit)]
    assert titles[0] == "From A to B: slerp at resid_pre.1, pairs last-token"
    assert titles[1].startswith("How sharp")
    assert len(set(titles)) == len(titles)
    assert list(circuit.graph["findings"])[:3] == [
        "median width",
        "median max slope",
        "boundaries",
    ]
    assert circuit.graph["method"].startswith("3 pairs (last-token) walked by slerp")


def test_bare() -> None:
    """Nothing held, nothing read, no control: curves and numbers alone, in a valid circuit."""
    circuit = traced(tiny_model(), toy_task(), **BARE)
    assert list(circuit.nodes) == ["logits"]
    assert "nothing was held" in circuit.graph["score"]
    assert [each.kind for each in panels_of(circuit)] == ["curves", "table"]
    assert not {"layers", "gate_flips", "freezing"} & circuit.graph.keys()
    rows = circuit.graph["plateaus"]["pairs"]
    assert rows[0].keys() == {"pair", "a", "b", "reach", *QUANTITIES}
    assert all("control" not in row for row in quantities(circuit).values())
    circuit.validate()
    circuit.to_json()


@pytest.mark.parametrize("response", ["d-sym", "d-rel", "kl", "jsd"])
def test_responses(response: str) -> None:
    """Every response is told of the logits; layers and parts take a distance in any case."""
    options = QUICK | {"response": response, "controls": 0, "freeze": "mlp"}
    circuit = traced(tiny_model(), toy_task(), **options)
    distance = response if response.startswith("d") else "d-sym"
    assert circuit.graph["layers"]["response"] == distance
    assert distance in circuit.graph["score"]
    curves = panel(circuit, "From A to B")
    assert isinstance(curves, Curves)
    last = curves.curves[0].mean[-1]
    assert last is not None
    assert (last == pytest.approx(1)) == response.startswith("d")


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_other_families(family: str) -> None:
    """Padded prompts of other families are walked; B's activation gives what B gives."""
    from plateau_oracles import build

    _, model = build(family)
    circuit = traced(model, toy_task(), **QUICK | {"controls": 1})
    assert circuit.graph["plateaus"]["same_prefix"]
    reach = [row["reach"] for row in circuit.graph["plateaus"]["pairs"]]
    assert reach == pytest.approx([1] * 5, abs=1e-4)


def test_pairs_of_the_task() -> None:
    """Where prompts differ earlier too, it is told how much the walked stream carries."""
    circuit = traced(tiny_model(), toy_task(), **BARE | {"pairs": "task"})
    assert not circuit.graph["plateaus"]["same_prefix"]
    said = circuit.graph["findings"]["carried by the stream"]
    reach = sorted(row["reach"] for row in circuit.graph["plateaus"]["pairs"])[2]
    assert said.startswith(f"{reach:.0%} of the way")


def test_embedding_path() -> None:
    """The path through the embeddings walks the first stream, straight."""
    circuit = traced(tiny_model(), toy_task(), **BARE | {"path": "embed"})
    assert circuit.graph["plateaus"]["site"] == "resid_pre.0"
    reference = panel(circuit, "From A to B").curves[1]
    assert list(reference.mean) == pytest.approx(panel(circuit, "From A to B").x, abs=1e-5)


def test_read() -> None:
    """Only the streams that are named are in the table through the layers."""
    options = BARE | {"read": "resid_post.1"}
    circuit = traced(tiny_model(), toy_task(), **options)
    sites = [row["site"] for row in circuit.graph["layers"]["sites"]]
    assert sites == ["walked", "resid_post.1", "logits"]


def test_directions(tmp_path: Path) -> None:
    """Families are pushed along from each centre; all are those that have what they need."""
    model, folder = tiny_model(), tmp_path / "dictionary"
    named = BARE | {"directions": "iso, cov-mixture", "centers": "real"}
    circuit = traced(model, toy_task(), **named)
    rows = circuit.graph["directions"]["families"]
    assert [(row["centre"], row["family"]) for row in rows] == [
        ("real", "iso"),
        ("real", "cov-mixture"),
    ]
    write_dictionary(random_dictionary(), folder)
    every = BARE | {"directions": "all", "centers": "real", "bank_size": 3}
    counts = []
    for dictionary, task in ((None, toy_task()), (folder, toy_task())):
        circuit = traced(model, task, **every | {"dictionary": dictionary})
        counts.append([row["family"] for row in circuit.graph["directions"]["families"]])
    assert set(counts[1]) - set(counts[0]) == {"dictionary", "dictionary-error"}
    assert "mean-difference" in counts[0]


def test_protocol() -> None:
    """A published protocol stands beside the analysis, under its own label."""
    circuit = traced(tiny_model(), toy_task(), **BARE | {"protocol": "shinkle"})
    label = circuit.graph["protocols"]["shinkle"]["label"]
    assert label.startswith("Shinkle and Heimersheim 2025")
    assert panel(circuit, label).curves[-1].name == "the site itself"
    every = traced(tiny_model(), toy_task(), **BARE | {"protocol": "all"})
    assert len(every.graph["protocols"]) == 5


def test_checkpoints(tmp_path: Path) -> None:
    """The steps of a training run are walked on the same pairs, the last as the model itself."""
    model = tiny_model()
    for step, saved in ((0, model.reinitialised(5)), (20, model)):
        saved._module.save_pretrained(tmp_path / f"step-{step:06d}")
    options = BARE | {"checkpoints": tmp_path}
    circuit = traced(model, toy_task(), **options)
    first, last = circuit.graph["checkpoints"]["models"]
    own = quantities(circuit)["width"]["value"]
    assert last["width"]["median"] == pytest.approx(own, abs=1e-6)
    assert first["width"]["median"] != pytest.approx(own, abs=1e-3)


def test_left_out() -> None:
    """Pairs without a curve are counted in a warning, and the method says how many are left."""
    module: Any = random_gpt2()
    with torch.no_grad():
        module.transformer.wte.weight[5] = module.transformer.wte.weight[4]
    prompts = [((1, 2, 4), (1, 2, 5)), ((1, 2, 4), (1, 2, 6)), ((7, 3), (7, 5))]
    task = Task("ends", tuple(PromptPair(a, b, (1,), (2,)) for a, b in prompts))
    circuit = traced(load_model((module, None)), task, **BARE | {"pairs": "task"})
    assert "1 of 3 pairs are left out" in circuit.graph["warnings"][0]
    assert circuit.graph["method"].startswith("2 pairs")
    assert [row["pair"] for row in circuit.graph["plateaus"]["pairs"]] == [1, 2]


def test_ends_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk that does not end where B is, is an error and not a curve."""
    plain = trace.measure

    def off(*given: Any, **named: Any) -> Bundle:
        found = plain(*given, **named)
        return replace(found, misfit=found.misfit + 0.01)

    monkeypatch.setattr(trace, "measure", off)
    with pytest.raises(QualityError, match="circuitlab doctor"):
        traced(tiny_model(), toy_task(), **BARE)
    circuit = traced(tiny_model(), toy_task(), **BARE | {"pairs": "task"})
    assert not circuit.graph["plateaus"]["same_prefix"]


@pytest.mark.parametrize(
    ("option", "value", "error", "said"),
    [
        ("path", "arc", OptionError, "slerp"),
        ("response", "cosine", OptionError, "jsd"),
        ("controls", -1, OptionError, "0 for none"),
        ("protocol", "nobody", OptionError, "giglemiani"),
        ("site", "z.0", OptionError, "resid_post"),
        ("read", "resid_post.9", OptionError, "--read"),
        ("freeze", "neurons", OptionError, "heads"),
        ("pairs", "nearest", OptionError, "unrelated"),
        ("pairs", "no.jsonl", TaskError, "no.jsonl"),
        ("bank_size", 0, OptionError, "1 or more"),
        ("steps", 2, OptionError, "3"),
        ("directions", "sideways", OptionError, "iso"),
        ("centers", "middle", OptionError, "gaussian"),
        ("dictionary", Path("nowhere"), ModelError, "nowhere"),
        ("checkpoints", Path("nowhere"), OptionError, "nowhere"),
        ("top", -1, OptionError, "top"),
    ],
)
def test_refused(option: str, value: object, error: type[Exception], said: str) -> None:
    """What an option cannot be is refused in one line that says what it can."""
    given = BARE | {"directions": "iso"} if option == "centers" else dict(BARE)
    given |= {"freeze": "mlp"} if option == "top" else {}
    with pytest.raises(error) as caught:
        traced(tiny_model(), toy_task(), **given | {option: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_last_stream() -> None:
    """Behind the last block only the final norm is left, and the analysis still runs."""
    model = load_model((random_gpt2(1), None))
    circuit = traced(model, toy_task(), **QUICK | {"controls": 0})
    assert circuit.graph["plateaus"]["site"] == str(Site("resid_post", 0))
    assert [row["name"] for row in circuit.graph["freezing"]] == ["logits.norm"]
    assert list(circuit.nodes) == ["logits"]
