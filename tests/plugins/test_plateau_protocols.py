"""The published protocols: closed forms on a linear model, brute force, and their labels."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.protocols import measures
from circuitlab_activation_plateaus.protocols.published import (
    PROTOCOLS,
    ProtocolResult,
    add_protocols,
    run_protocol,
)
from circuitlab_activation_plateaus.pushes.directions import stream_activations
from circuitlab_activation_plateaus.walks.pairs import make_bank
from feature_oracles import random_dictionary
from oracles import random_gpt2
from plateau_oracles import Hooked, put, same

from circuitlab import (
    CircuitGraph,
    Curves,
    OptionError,
    Site,
    TextTable,
    TracedModel,
    load_model,
    panels_of,
)
from circuitlab.testing import toy_task

FIRST, FINAL = Site("resid_pre", 1), Site("resid_post", 1)


def linear_model() -> TracedModel:
    """Two layers, the second of which writes nothing: the final stream is that after the first."""
    module: Any = random_gpt2(mlp=False, layer_norm=False)
    with torch.no_grad():
        for parameter in module.transformer.h[1].attn.c_proj.parameters():
            parameter.zero_()
    return load_model((module, None))


def ran(name: str, model: TracedModel, site: Site = FIRST, **options: Any) -> ProtocolResult:
    """A protocol on a few pairs of its own kind, of which no task has unrelated ones."""
    kind = PROTOCOLS[name].pairs
    bank = make_bank(model, toy_task(), "task" if kind == "unrelated" else kind, 5)
    return run_protocol(name, model, bank, site, **options)


def numbers(result: ProtocolResult) -> dict[str, float]:
    """Medians by name."""
    return {n.name: n.value for n in result.measured.numbers}


@pytest.fixture(scope="module")
def linear() -> TracedModel:
    """Shared, nothing writes to it."""
    return linear_model()


def test_janiak_linear(linear: TracedModel) -> None:
    """A final stream that is the walked one moves evenly: slope 1, width .8, d = t on 50 points."""
    result = ran("janiak", linear)
    assert numbers(result)["final stream: max slope"] == pytest.approx(1, abs=1e-6)
    assert numbers(result)["final stream: width, 10 to 90 %"] == pytest.approx(0.8, abs=1e-6)
    assert len(result.measured.x) == 50
    for curve in result.measured.curves:
        assert list(curve.mean) == pytest.approx(result.measured.x, abs=1e-9)


def test_janiak_by_hooks() -> None:
    """The curve of a random model is that of a stock model under hooks, in the context of A."""
    module = random_gpt2()
    model = load_model((module, None))
    bank = make_bank(model, toy_task(), "task", 3)
    result = run_protocol("janiak", model, bank, Site("resid_mid", 0))
    hooked, curves, slopes = Hooked(module, "gpt2"), [], []
    for row in range(3):
        a, b = (side.ids[row][side.mask[row]] for side in (bank.a, bank.b))
        first, second = (hooked.run(ids, {FIRST: same})[1][FIRST][-1] for ids in (a, b))
        streams = []
        for step in range(50):
            point = first + step / 49 * (second - first)
            seen = hooked.run(a, {FIRST: put(-1, point), FINAL: same})[1]
            streams.append(seen[FINAL][-1])
        far = [float((stream - streams[0]).norm()) for stream in streams]
        curves.append([d / far[-1] for d in far])
        slopes.append(max(49 * (y - x) for x, y in zip(curves[-1], curves[-1][1:], strict=False)))
    mean = [sum(column) / 3 for column in zip(*curves, strict=True)]
    assert list(result.measured.curves[0].mean) == pytest.approx(mean, abs=1e-6)
    assert numbers(result)["final stream: max slope"] == pytest.approx(median(slopes), abs=1e-5)


def test_shinkle_linear(linear: TracedModel) -> None:
    """A linear map answers the arc as the arc itself, at the stream and at the logits."""
    result = ran("shinkle", linear)
    by_name = {curve.name: list(curve.mean) for curve in result.measured.curves}
    assert list(by_name) == ["resid_mid.1", "resid_post.1", "logits", "the site itself"]
    for name in ("resid_mid.1", "resid_post.1"):
        assert by_name[name] == pytest.approx(by_name["the site itself"], abs=1e-6)


def test_shinkle_sites() -> None:
    """Every site of the paper behind the walked one is told, those before it are not."""
    result = ran("shinkle", load_model((random_gpt2(), None)), Site("resid_mid", 0))
    names = [curve.name for curve in result.measured.curves]
    first = ["mlp_post.0", "mlp_out.0", "resid_post.0"]
    second = ["attn_out.1", "resid_mid.1", "mlp_post.1", "mlp_out.1", "resid_post.1"]
    assert names == [*first, *second, "logits", "the site itself"]
    assert all(0 <= value <= 1 for curve in result.measured.curves for value in curve.mean if value)


def test_heimersheim_linear(linear: TracedModel) -> None:
    """Around every centre the final stream of a linear model moves as far as it is pushed."""
    found = numbers(ran("heimersheim", linear))
    halves = [value for name, value in found.items() if "half / full" in name]
    assert halves == pytest.approx([0.5] * 3, abs=1e-6)


def test_giglemiani_linear(linear: TracedModel) -> None:
    """The steepest slope is the unit of length, and a tenth of the way is flat."""
    result = ran("giglemiani", linear)
    bank = make_bank(linear, toy_task(), "last-token", 5)
    unit = float(stream_activations(linear, [bank.a, bank.b], FIRST).norm(dim=-1).mean())
    for name, value in numbers(result).items():
        assert value == pytest.approx(0.1 if "flat" in name else unit, rel=1e-5), name
    assert result.measured.x[-1] == 2
    assert "no dictionary" in result.measured.note


def test_lee() -> None:
    """Divergences grow from 0; a family that never answers is beyond the longest push."""
    model = load_model((random_gpt2(), None))
    result = ran("lee", model)
    names = [curve.name for curve in result.measured.curves]
    assert names == ["iso", "cov-mixture", "real-mixture"]
    assert all(curve.mean[0] == 0 for curve in result.measured.curves)
    deaf: Any = random_gpt2()
    with torch.no_grad():
        deaf.lm_head.weight.mul_(1e-6)
    silent = ran("lee", load_model((deaf, None)))
    lengths = [n for n in silent.measured.numbers if "length to" in n.name]
    assert [n.value for n in lengths] == [math.inf] * 3
    assert [n.interval for n in lengths] == [(math.inf, math.inf)] * 3


def test_dictionary() -> None:
    """With a dictionary its directions and its centres are there, and no note says otherwise."""
    model = load_model((random_gpt2(), None))
    dictionary = random_dictionary()
    lee = ran("lee", model, dictionary=dictionary)
    assert [curve.name for curve in lee.measured.curves][3:] == ["dictionary", "dictionary-error"]
    centres = ran("giglemiani", model, dictionary=dictionary)
    names = [curve.name for curve in centres.measured.curves]
    assert names == ["real", "gaussian", "dictionary-bag", "dictionary-structured"]
    assert lee.measured.note == centres.measured.note == ""


def test_numbers() -> None:
    """Medians are those of the values; a single pair has no interval; half infinite is infinite."""
    numbers_ = [
        measures.number("x", torch.tensor(values), 0)
        for values in ([3.0, 1.0, 2.0, 9.0], [4.0], [1.0, math.inf, math.inf])
    ]
    assert [n.value for n in numbers_] == [2.5, 4.0, math.inf]
    assert numbers_[1].interval is None
    assert numbers_[2].interval == (1.0, math.inf)
    assert [n.n for n in numbers_] == [4, 1, 3]


def test_labels() -> None:
    """Each protocol has authors, a source, what it asks and what is otherwise than published."""
    assert list(PROTOCOLS) == ["janiak", "shinkle", "heimersheim", "lee", "giglemiani"]
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.authors.lower().startswith(name)
        assert protocol.citation.startswith(("arXiv:", "LessWrong "))
        assert protocol.asks
        assert protocol.differs
    assert len({protocol.label for protocol in PROTOCOLS.values()}) == 5


def test_add_protocols() -> None:
    """All protocols stand apart: a panel under its label each, one table, data and a finding."""
    model = load_model((random_gpt2(), None))
    circuit = CircuitGraph()
    add_protocols(circuit, model, toy_task(), FIRST, names=list(PROTOCOLS), n_pairs=4)
    *curves, table = panels_of(circuit)
    assert [panel.title for panel in curves] == [p.label for p in PROTOCOLS.values()]
    assert all(isinstance(panel, Curves) for panel in curves)
    assert isinstance(table, TextTable)
    published = {(p.authors, p.citation) for p in PROTOCOLS.values()}
    assert {(row[0], row[1]) for row in table.rows} == published
    for name, protocol in PROTOCOLS.items():
        data = circuit.graph["protocols"][name]
        assert data["label"] == protocol.label
        assert data["pairs"] == protocol.pairs
        told = [n for n in data["numbers"] if protocol.headline in n["name"]]
        assert told
        assert circuit.graph["findings"][f"protocol {name}"].startswith(told[0]["name"])
        assert all(number.keys() >= {"name", "n"} for number in data["numbers"])
    circuit.to_json()


def test_beyond() -> None:
    """What lies beyond the longest push is written so, and is not in the data."""
    module: Any = random_gpt2()
    with torch.no_grad():
        module.lm_head.weight.mul_(1e-6)
    circuit, model = CircuitGraph(), load_model((module, None))
    add_protocols(circuit, model, toy_task(), FIRST, names=["lee"], n_pairs=4)
    length, level = circuit.graph["protocols"]["lee"]["numbers"][:2]
    assert length == {"name": "iso: length to 0.1 nats", "n": 4}
    assert level.keys() == {"name", "n", "median", "lo", "hi"}
    assert panels_of(circuit)[-1].rows[0][3] == "> 2 [> 2, > 2]"
    circuit.to_json()


def test_refused() -> None:
    """Unknown names, and what a model cannot answer; among several that is left out and told."""
    model = load_model((random_gpt2(1), None))
    last = Site("resid_post", 0)
    with pytest.raises(OptionError, match="janiak, shinkle"):
        run_protocol("nobody", model, make_bank(model, toy_task(), "task"), last)
    with pytest.raises(OptionError, match="--protocol shinkle"):
        ran("janiak", model, last)
    circuit = CircuitGraph()
    names = ["janiak", "heimersheim"]
    found = add_protocols(circuit, model, toy_task(), last, names=names, n_pairs=4)
    assert [result.protocol.name for result in found] == ["heimersheim"]
    assert "protocol janiak is left out" in circuit.graph["warnings"][0]
    with pytest.raises(OptionError, match="the model has one"):
        add_protocols(circuit, model, toy_task(), last, names=["janiak"], n_pairs=4)
    deaf: Any = random_gpt2()
    with torch.no_grad():
        deaf.transformer.wte.weight.copy_(deaf.transformer.wte.weight[:1].expand(40, -1))
    alike = load_model((deaf, None))
    for name in ("janiak", "shinkle"):
        with pytest.raises(OptionError):
            ran(name, alike)
