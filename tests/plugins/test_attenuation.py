"""Attenuation of virtual heads and shares of the final stream, against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from circuitlab_attention_heads.attenuation import Attenuation, attenuation
from norm_oracles import EXACT, FAMILIES, TASK, geometric, grown, plain_module, seen

from circuitlab import NumericsError, Task, load_model


@pytest.mark.parametrize("layer_norm", [True, False])
def test_attenuation_is_that_of_a_loop(layer_norm: bool) -> None:
    """|o| / |r| and o . r / |r|² for each component, later reader and token, one by one."""
    family = "gpt2" if layer_norm else "no-norm"
    module = plain_module(family)
    circuit = grown(module, batch_size=3)
    readers = {"layer 1": 1, "layer 2": 2, "logits": 3}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    norms: dict[str, list[float]] = {}
    for pair in TASK.pairs:
        with torch.no_grad():
            run = oracles.run(module, torch.tensor([pair.clean]))
        for source, output in run.outputs.items():
            depth = -1 if source == "input" else int(source[1])
            for place in range(1, len(pair.clean)):
                o = seen(output[0, place], family)
                norms.setdefault(source, []).append(float(o.norm()))
                for reader, layer in readers.items():
                    target = ("logits", "") if layer == 3 else (f"a{layer}.h0", "q")
                    r = seen(run.inputs[target][0, place], family)
                    if layer > depth:
                        told = (float(o.norm() / r.norm()), float(o @ r / (r @ r)))
                        found.setdefault((source, reader), []).append(told)
    for source in norms:
        node = circuit.nodes[source]
        assert node["write_norm"] == pytest.approx(geometric(norms[source]), **EXACT)
        named = {reader for name, reader in found if name == source}
        assert set(node["size"]) == set(node["projection"]) == named
        for reader in named:
            sizes, projections = zip(*found[source, reader], strict=True)
            assert node["size"][reader] == pytest.approx(np.mean(sizes), **EXACT)
            assert node["projection"][reader] == pytest.approx(np.mean(projections), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_components_and_biases_sum_to_1(family: str) -> None:
    """Nothing else is in the final stream; Llama's attention has no bias."""
    circuit = grown(plain_module(family))
    total = math.fsum(score for *_, score in circuit.effects()) + circuit.graph["bias_share"]
    assert total == pytest.approx(1, abs=1e-10 if family in ("gpt2", "no-norm") else 1e-5)
    assert (circuit.graph["bias_share"] != 0) == (family != "llama")


def test_shares_are_those_of_a_loop() -> None:
    """Of the stream of the last token of each prompt; the interval is over pairs."""
    module = plain_module("gpt2")
    circuit = grown(module, batch_size=1)
    shares: dict[str, list[float]] = {}
    for pair in TASK.pairs:
        with torch.no_grad():
            run = oracles.run(module, torch.tensor([pair.clean]))
        r = seen(run.inputs["logits", ""][0, -1], "gpt2")
        for source, output in run.outputs.items():
            share = float(seen(output[0, -1], "gpt2") @ r / (r @ r))
            shares.setdefault(source, []).append(share)
    assert {name for name, *_ in circuit.effects()} == set(shares)
    for name, _, _, score in circuit.effects():
        low, high = circuit.edges[name, "logits", ""]["interval"]
        assert score == pytest.approx(np.mean(shares[name]), **EXACT)
        assert min(shares[name]) <= low < score < high <= max(shares[name])


def test_intervals_of_shares_are_over_different_pairs() -> None:
    """A task told twice has the same scores and intervals; one pair has none."""
    module = plain_module("gpt2")
    once, twice = grown(module), grown(module, Task("twice", TASK.pairs * 2))
    alone = grown(module, Task("alone", TASK.pairs[:1]))
    for name, *_, score in once.effects():
        edge, other = (circuit.edges[name, "logits", ""] for circuit in (once, twice))
        assert other["score"] == pytest.approx(score, **EXACT)
        assert other["interval"] == pytest.approx(edge["interval"], **EXACT)
        assert "interval" not in alone.edges[name, "logits", ""]


def test_tokens_without_a_write_count_for_sizes_alone() -> None:
    """A norm of 0 is a size of 0 and has no logarithm; batches add up."""
    model = load_model((plain_module("no-norm", 1), None))
    generator = torch.Generator().manual_seed(0)
    outputs = torch.rand(4, 6, 16, dtype=torch.float64, generator=generator)
    outputs[1, :2], outputs[2] = 0, 0
    streams = torch.rand(2, 6, 16, dtype=torch.float64, generator=generator)
    found = Attenuation.joined(
        [
            attenuation(model, outputs[:, part], streams[:, part], centred=False)
            for part in (slice(0, 4), slice(4, 6))
        ]
    )
    norms, lengths = outputs.norm(dim=-1), streams.norm(dim=-1)
    assert found.write_norms() == [
        pytest.approx(geometric(norms[0].tolist())),
        pytest.approx(geometric(norms[1, 2:].tolist())),
        None,
        pytest.approx(geometric(norms[3].tolist())),
    ]
    assert torch.allclose(found.size()[:, 1], (norms / lengths[1]).mean(1), rtol=1e-12)
    assert found.size()[:, 0].isnan().tolist() == [False, True, True, True]


def test_empty_streams_are_left_out_or_refused() -> None:
    """A token with a stream of 0 somewhere has no shares of it; a last one of 0 is an error."""
    module: Any = plain_module("no-norm")
    task = Task("one", TASK.pairs[:1])
    clean: Any = task.pairs[0].clean
    with torch.no_grad():
        module.transformer.wpe.weight[2] = -module.transformer.wte.weight[clean[2]]
    whole, part = grown(plain_module("no-norm"), task), grown(module, task)
    assert "at 5 tokens" in whole.graph["method"]
    assert "at 4 tokens" in part.graph["method"]
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            parameter.zero_()
        module.transformer.wpe.weight[:5] = 1
    with pytest.raises(NumericsError, match=r"pair 1: the last residual stream .* is 0, so"):
        grown(module, task)
