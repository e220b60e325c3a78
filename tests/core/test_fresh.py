"""New weights: the same shape as before training, the same for the same seed, nothing kept."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, family_model
from torch import Tensor

from circuitlab import ModelError, TracedModel, load_model
from circuitlab.fresh import fresh_weights
from circuitlab.testing import tiny_model
from circuitlab.zoo import induction, training


def weights(model: TracedModel) -> dict[str, Tensor]:
    """The weights by name."""
    return dict(model._module.named_parameters())


@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_nothing_is_kept_and_the_seed_decides(family: str) -> None:
    """Every matrix is new, the same for the same seed alone; the model itself is unchanged."""
    model = tiny_model() if family == "gpt2" else family_model(family)
    with torch.no_grad():
        for weight in weights(model).values():
            weight.add_(1.0)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    state = torch.get_rng_state()
    one, again, other = (weights(model.reinitialised(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name])
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], weight)
        assert not torch.equal(one[name], other[name]) or weight.ndim == 1


def test_the_spread_is_that_of_the_family() -> None:
    """GPT-2 begins with its config's spread, its residual projections with less."""
    model = tiny_model()
    std = model._module.config.initializer_range
    fresh = model.reinitialised(3)._module
    with torch.no_grad():
        assert abs(float(fresh.transformer.wte.weight.std()) / std - 1) < 0.1
        part = float(fresh.transformer.h[0].mlp.c_proj.weight.std())
    assert abs(part * (2 * model.n_layers) ** 0.5 / std - 1) < 0.1


def test_a_bundled_model_begins_as_its_recipe_says() -> None:
    """The weights are those that training starts from, bit for bit."""
    start = training.train(induction.RECIPE, seed=4, steps=0)
    fresh = weights(load_model("induction").reinitialised(4))
    assert all(torch.equal(fresh[name], weight) for name, weight in start.named_parameters())


def test_what_was_put_in_by_hand_stays() -> None:
    """A model without norms has none afterwards; type and prompts stay too."""
    model = load_model("gate-jump", dtype="float64")
    fresh = model.reinitialised()
    assert isinstance(fresh._module.transformer.ln_f, torch.nn.Identity)
    assert (fresh.dtype, fresh.task_name) == (torch.float64, model.task_name)
    assert fresh.corpus(3) == model.corpus(3)
    assert fresh.name == "gate-jump, new weights of seed 0"
    assert fresh.run(fresh.corpus(2)).logits.shape == model.run(model.corpus(2)).logits.shape


def test_a_family_that_leaves_a_weight_is_refused() -> None:
    """A weight that stays as trained would make the control no control."""
    module = copy.deepcopy(tiny_model()._module)
    module._init_weights = lambda part: None
    with pytest.raises(ModelError, match=r"does not say how transformer\.wte\.weight begins"):
        fresh_weights(module, 0)
