"""Illusions of subspace patching: built by hand, told from directions that are used, and sure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from circuitlab_path_patching.subspaces import is_illusion, subspace_patching
from torch import Tensor

from circuitlab import CircuitGraph, PromptPair, Task, TracedModel, load_model


def score(circuit: CircuitGraph, name: str) -> float:
    return float(circuit.edges[name, "logits", ""]["score"])


ON, OFF, YES, NO = 1, 2, 3, 4
TASK = Task("bit", tuple(PromptPair((word, ON), (word, OFF), (YES,), (NO,)) for word in (5, 6, 7)))


def bit_model(dormant: float = 2.0) -> TracedModel:
    """yes - no is ``dormant`` times neuron 1, which is always on, plus neuron 2, which is the bit.

    They write to dimensions of their own. Neuron 0 is the bit too, and nobody reads it.
    """
    module: Any = oracles.random_gpt2(1, 2, 8, layer_norm=False, activation="relu")
    for weight in module.parameters():
        weight.requires_grad_(False).zero_()
    module.transformer.wte.weight[ON, 0] = 1.0
    mlp = module.transformer.h[0].mlp
    mlp.c_fc.weight[0, [0, 2]] = 1.0
    mlp.c_fc.bias[1] = 1.0
    mlp.c_proj.weight[1, 5], mlp.c_proj.weight[2, 6] = dormant, 1.0
    module.lm_head.weight[YES, [5, 6]] = 1.0
    return load_model((module, None))


def neurons(**sizes: float) -> Tensor:
    vector = torch.zeros(32)
    for name, size in sizes.items():
        vector[int(name[1:])] = size
    return vector


SITE = "mlp_post.0[-1]"


def test_illusion_of_makelov_lange_and_nanda(saved: Callable[[Tensor], Path]) -> None:
    """Half of the unread neuron and half of the constant one do the whole task; alone nothing."""
    direction = saved(neurons(n0=1, n1=1))
    circuit = subspace_patching(bit_model(), TASK, site=SITE, direction=direction)
    # v = (1, 1) / √2 and the change is (-1, 0): neuron 1 falls by a half, times 2.
    assert score(circuit, "direction") == pytest.approx(-1)
    assert score(circuit, "visible") == pytest.approx(0, abs=1e-12)
    assert score(circuit, "hidden") == pytest.approx(0, abs=1e-12)
    assert score(circuit, SITE) == pytest.approx(-1)
    summary = circuit.graph["subspace"]
    assert summary["illusion"] == ["noise", "denoise"]
    assert (summary["visible_share"], summary["share"]) == (pytest.approx(0.5), pytest.approx(1))
    assert summary["n_seen"] == 2
    first, _ = circuit.graph["warnings"]
    assert first.startswith(f"ILLUSION in mode noise: patching the direction at {SITE} does -1, ")
    hidden, visible = (circuit.nodes[part] for part in ("hidden", "visible"))
    assert (hidden["clean_mean"], hidden["corrupt_mean"]) == (-1, 0)
    assert abs(visible["clean_mean"]) == abs(visible["corrupt_mean"]) == 1


def test_no_illusion_where_the_model_uses_the_direction(saved: Callable[[Tensor], Path]) -> None:
    """The neuron that carries the bit to the readers, with an unread companion of its own size."""
    direction = saved(neurons(n2=1, n3=1))
    circuit = subspace_patching(bit_model(0.0), TASK, site=SITE, direction=direction)
    assert score(circuit, "direction") == pytest.approx(-0.5)
    assert score(circuit, "visible") == pytest.approx(-1)
    assert circuit.graph["subspace"]["illusion"] == []
    assert circuit.graph["warnings"] == []
    assert circuit.graph["subspace"]["share"] == pytest.approx(0.5)
    data = circuit.nodes["visible"]
    assert (data["clean_mean"], data["corrupt_mean"]) == (pytest.approx(-1), pytest.approx(0))
    assert data["separation"] is None


def test_separation_of_known_values(saved: Callable[[Tensor], Path]) -> None:
    """Neuron 0 is 1 or 3 in clean prompts and 0 or 2 in corrupt ones: means 2 and 1, spread 1."""
    model = bit_model()
    module: Any = model._module
    module.transformer.wte.weight[[8, 9, 10, 11], 0] = torch.tensor([1.0, 3.0, 0.0, 2.0]).double()
    pairs = [PromptPair((5, a), (5, b), (YES,), (NO,)) for a, b in ((8, 10), (9, 11))]
    circuit = subspace_patching(
        model, Task("two", tuple(pairs)), site=SITE, direction=saved(neurons(n0=2))
    )
    data = circuit.nodes["hidden"]
    found = [data[k] for k in ("clean_mean", "corrupt_mean", "clean_std", "corrupt_std")]
    # Oriented from clean to corrupt: neuron 0 falls.
    assert found == pytest.approx([-2, -1, 1, 1])
    assert data["separation"] == pytest.approx(1)


def test_an_illusion_is_sure_or_not_named() -> None:
    """Twice each part and a tenth of the task, in 97.5 % of the resamples."""

    def found(joint: float, visible: float, hidden: float, noise: float = 0.0) -> bool:
        spread = noise * torch.linspace(-1, 1, 8).double()
        effects = {"direction": joint + spread, "visible": visible + 0 * spread}
        effects |= {"hidden": hidden + 0 * spread, "task": -1 + 0 * spread}
        return is_illusion(effects, list(range(8)), seed=0)

    assert found(-0.5, 0.0, 0.0)
    assert found(0.5, 0.24, -0.24)
    assert not found(-0.5, -0.26, 0.0)
    assert not found(-0.5, 0.0, 0.26)
    assert not found(-0.09, 0.0, 0.0)
    assert found(-0.5, 0.0, 0.0, noise=0.5)
    assert not found(-0.5, 0.0, 0.0, noise=3.0)
    one = torch.ones(1).double()
    assert is_illusion(
        {"direction": one, "visible": 0 * one, "hidden": 0 * one, "task": one}, [0], 0
    )
    assert not is_illusion({"direction": one, "visible": one, "task": one}, [0], 0)
