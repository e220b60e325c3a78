"""How far a push goes before the output answers: against plain passes and closed forms."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.pushes.directions import stream_activations
from circuitlab_activation_plateaus.pushes.families import FAMILIES, Pool
from circuitlab_activation_plateaus.pushes.panels import sensitivity_row
from circuitlab_activation_plateaus.pushes.sensitivity import (
    Sensitivity,
    add_directions,
    sensitivities,
)
from circuitlab_activation_plateaus.walks.pairs import Bank, make_bank
from dictionary_oracles import random_dictionary
from families import family_model, traced, unchecked
from oracles import random_gpt2
from random_tasks import random_task
from torch import Tensor

from circuitlab import CircuitGraph, OptionError, Site, TracedModel, load_model, panels_of

SITE = Site("resid_pre", 1)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16, 17]]


def activations(model: TracedModel, site: Site = SITE) -> Tensor:
    return stream_activations(model, [model.tokens(PROMPTS)], site)


def divergences(module: Any, prompt: list[int], starts: Tensor, layer: int) -> Tensor:
    """KL(P_first || P) of streams ``[n, d]`` put before a block at the last position, by a hook."""

    def replace(block: Any, args: Any) -> Any:
        stream = args[0].clone()
        stream[:, -1] = starts
        return (stream, *args[1:])

    handle = module.transformer.h[layer].register_forward_pre_hook(replace)
    with torch.no_grad():
        logits = module(torch.tensor([prompt] * len(starts))).logits[:, -1].double()
    handle.remove()
    log_p = logits.log_softmax(-1)
    return (log_p[0].exp() * (log_p[0] - log_p)).sum(-1)


def linear_model(seed: int = 0) -> tuple[Any, TracedModel]:
    """A GPT-2 whose blocks write nothing and whose norms do nothing: logits are ``x @ W``."""
    module: Any = random_gpt2(layer_norm=False, seed=seed)
    with torch.no_grad():
        for block in module.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
    return module, unchecked(module)


@pytest.mark.parametrize("centre", ["real", "gaussian"])
def test_crossings_are_those_of_plain_passes(centre: str) -> None:
    """On a random GPT-2, prompts padded, each crossing is where plain passes on a fine grid cross.

    What is measured follows from ``crossing``, ``kl`` and the same draws alone.
    """
    module = random_gpt2()
    model = unchecked(module)
    pool = Pool(model, SITE, activations(model))
    tokens = model.tokens(PROMPTS)
    found = sensitivities(
        model, tokens, pool, families=["real-mixture", "iso-perp"], centers=[centre], reach=1.5
    )
    assert [each.family for each in found] == ["real-mixture", "iso-perp"]
    for each in found:
        base, drawn = each.base, each.directions
        for row, prompt in enumerate(PROMPTS):
            push = pool.unit * drawn[row]
            coarse = divergences(
                module, prompt, base[row] + each.alphas[:, None] * push, SITE.layer or 0
            )
            torch.testing.assert_close(each.kl[row], coarse, atol=1e-9, rtol=1e-7)
            fine = torch.linspace(0, 1.5, 3001, dtype=torch.float64)
            kl = divergences(module, prompt, base[row] + fine[:, None] * push, SITE.layer or 0)
            places = fine[kl >= 0.1].tolist()
            expected = places[0] if places else math.inf
            assert float(each.crossing[row]) == pytest.approx(expected, abs=2e-3)


def test_real_centres_are_clean_activations_and_gaussian_ones_are_not() -> None:
    """The real centre of a row is what the plain model holds at the last position of its prompt."""
    module = random_gpt2()
    model = unchecked(module)
    pool = Pool(model, SITE, activations(model))
    real, other = sensitivities(
        model,
        model.tokens(PROMPTS),
        pool,
        families=["iso"],
        centers=["real", "gaussian"],
        steps=2,
    )
    with torch.no_grad():
        states = [module(torch.tensor([p]), output_hidden_states=True) for p in PROMPTS]
    clean = torch.stack([state.hidden_states[1][0, -1] for state in states])
    torch.testing.assert_close(real.base, clean)
    assert float((other.base - clean).norm(dim=-1).min()) > 0.1
    assert torch.equal(real.directions, other.directions)


def test_linear_model_crosses_at_the_root_of_its_quadratic_form() -> None:
    """Where logits are linear and τ small, α = √(2τ / u F u), F the Fisher matrix at the centre."""
    module, model = linear_model()
    pool = Pool(model, SITE, activations(model))
    tau = 1e-6
    families = ["iso", "cov", "real-mixture", "towards-real-perp"]
    found = sensitivities(
        model, model.tokens(PROMPTS), pool, families=families, threshold=tau, reach=0.01
    )
    unembed = module.lm_head.weight.detach().T
    for each in found:
        for row in range(len(PROMPTS)):
            p = (each.base[row] @ unembed).softmax(-1)
            change = each.directions[row] @ unembed
            fisher = p @ change.square() - (p @ change).square()
            expected = math.sqrt(2 * tau / float(fisher)) / pool.unit
            assert float(each.crossing[row]) == pytest.approx(expected, rel=0.01)


def test_directions_that_the_model_does_not_read_cross_nowhere() -> None:
    """Activations live in 4 of 16 dimensions and only these are read: iso acts √4 times later.

    Exactly, a direction acts as its part inside does: α times the share inside is what the part
    alone needs.
    """
    module, _ = linear_model()
    with torch.no_grad():
        for weight in (module.transformer.wte.weight, module.transformer.wpe.weight):
            weight[:, 4:] = 0
        module.lm_head.weight[:, 4:] = 0
    model = unchecked(module)
    pool = Pool(model, SITE, activations(model))
    tokens = model.tokens([[i, i + 1, i + 2] for i in range(30)])
    iso, mixture = sensitivities(
        model, tokens, pool, families=["iso", "real-mixture"], threshold=1e-3, reach=1.0
    )
    assert float(mixture.directions[:, 4:].norm()) < 1e-12
    inside = iso.directions[:, :4].norm(dim=-1)
    assert float(inside.square().mean()) == pytest.approx(4 / 16, abs=0.1)
    assert 1.4 < iso.median / mixture.median < 2.8
    for row in range(0, 30, 7):
        p = (iso.base[row] @ module.lm_head.weight.detach().T).softmax(-1)
        change = iso.directions[row] @ module.lm_head.weight.detach().T
        fisher = float(p @ change.square() - (p @ change).square())
        expected = math.sqrt(2e-3 / fisher) / pool.unit
        assert float(iso.crossing[row]) == pytest.approx(expected, rel=0.15)


def test_crossings_beyond_the_reach_are_infinite() -> None:
    """A threshold that no row reaches leaves every crossing infinite; a low one none."""
    model = unchecked(random_gpt2())
    pool, tokens = Pool(model, SITE, activations(model)), model.tokens(PROMPTS)
    settings: dict[str, Any] = {"families": ["iso"], "reach": 0.5, "steps": 5}
    high = sensitivities(model, tokens, pool, threshold=1e3, **settings)[0]
    assert bool(high.crossing.isinf().all())
    assert math.isinf(high.median)
    low = sensitivities(model, tokens, pool, threshold=1e-15, **settings)[0]
    assert bool(((low.crossing > 0) & (low.crossing < 0.5)).all())


def test_families_do_not_depend_on_one_another() -> None:
    """A family gives the same result alone and among others, and in any order of centres."""
    model = unchecked(random_gpt2())
    pool, tokens = Pool(model, SITE, activations(model)), model.tokens(PROMPTS)
    many = sensitivities(
        model,
        tokens,
        pool,
        families=["cov", "iso", "pca"],
        centers=["gaussian", "real"],
        steps=4,
    )
    alone = sensitivities(model, tokens, pool, families=["iso"], steps=4)[0]
    other = next(each for each in many if (each.family, each.centre) == ("iso", "real"))
    assert torch.equal(alone.directions, other.directions)
    torch.testing.assert_close(alone.kl, other.kl)
    seeded = sensitivities(model, tokens, pool, families=["iso"], steps=4, seed=1)[0]
    assert not torch.equal(seeded.directions, alone.directions)


def test_centres_and_directions_are_drawn_apart() -> None:
    """A gaussian centre less the mean is not along the ``cov`` direction of its row."""
    model = unchecked(random_gpt2())
    pool = Pool(model, SITE, activations(model))
    tokens = model.tokens([[i, i + 1, i + 2] for i in range(30)])
    found = sensitivities(model, tokens, pool, families=["cov"], centers=["gaussian"], steps=2)[0]
    shifted = found.base - pool.activations.mean(0)
    cosine = torch.cosine_similarity(shifted, found.directions, dim=-1)
    assert abs(float(cosine.mean())) < 0.4


def test_cosine_names_what_only_shrinks() -> None:
    """``towards-real`` has a cosine below 0 with its centre, its ``-perp`` of 0."""
    model = unchecked(random_gpt2())
    pool, tokens = Pool(model, SITE, activations(model)), model.tokens(PROMPTS)
    plain, perp = sensitivities(
        model, tokens, pool, families=["towards-real", "towards-real-perp"], steps=2
    )
    expected = torch.stack(
        [u @ b / b.norm() for u, b in zip(plain.directions, plain.base, strict=True)]
    )
    torch.testing.assert_close(plain.cosine, expected)
    assert float(plain.cosine.mean()) < -0.3
    assert float(perp.cosine.abs().max()) < 1e-12


def made(crossing: list[float], kl: list[list[float]]) -> Sensitivity:
    n = len(crossing)
    return Sensitivity(
        family="iso",
        centre="real",
        alphas=torch.tensor([0.0, 1.0, 2.0]).double(),
        kl=torch.tensor(kl).double(),
        crossing=torch.tensor(crossing).double(),
        cosine=torch.zeros(n).double(),
        base=torch.zeros(n, 2).double(),
        directions=torch.zeros(n, 2).double(),
    )


@pytest.mark.parametrize(
    ("crossing", "median"),
    [
        ([0.3, 0.1, math.inf], 0.3),
        ([0.3, 0.1], 0.2),
        ([0.3, math.inf, 0.1, math.inf], None),
        ([math.inf, 0.2, math.inf], None),
        ([0.5], 0.5),
    ],
)
def test_rows_beyond_the_reach_count_in_the_median(
    crossing: list[float], median: float | None
) -> None:
    """They are larger than all others; where the median is one of them it is not measured."""
    kl = [[0.0, 0.1, 0.2]] * len(crossing)
    row = sensitivity_row(made(crossing, kl), 0)
    assert row.get("median") == (None if median is None else pytest.approx(median))
    assert row["beyond"] == sum(map(math.isinf, crossing))
    assert math.isfinite(sum(json.loads(json.dumps(row))["mean"]))
    finite = [value for value in row.values() if isinstance(value, float)]
    assert all(map(math.isfinite, finite))


def test_area_is_the_mean_over_lengths() -> None:
    """Trapezoids: KL 0, 0.1, 0.4 at 0, 1, 2 has the mean 0.15, and of two rows the mean of both."""
    found = made([1.0, 1.0], [[0.0, 0.1, 0.4], [0.0, 0.2, 0.8]])
    assert found.area.tolist() == pytest.approx([0.15, 0.3])
    row = sensitivity_row(found, 0)
    assert row["area"] == pytest.approx(0.225)
    assert row["mean"] == pytest.approx([0, 0.15, 0.6])
    assert (row["lo"][2], row["hi"][2]) == pytest.approx((0.4, 0.8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "above 0"),
        ({"reach": -1.0}, "above 0"),
        ({"steps": 1}, "no curve"),
        ({"families": []}, "no family"),
        ({"centers": []}, "no centre"),
        ({"families": ["sae"]}, "unknown"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """Each is named with what is wrong."""
    model = unchecked(random_gpt2())
    pool, tokens = Pool(model, SITE, activations(model)), model.tokens(PROMPTS)
    with pytest.raises(OptionError, match=message):
        sensitivities(model, tokens, pool, **{"families": ["iso"], **options})


def bank_of(model: TracedModel) -> Bank:
    a = model.tokens(PROMPTS)
    b = model.tokens([[*prompt[:-1], 30 + i] for i, prompt in enumerate(PROMPTS)])
    return Bank(a, b, [("a", "b")] * len(PROMPTS), True, "last-token")


def test_circuit_tells_of_every_family_and_centre() -> None:
    """Every family, also perpendicular, from every centre, on float32: data, findings, panels."""
    model = traced(random_gpt2(dtype=torch.float32))
    circuit = CircuitGraph()
    circuit.graph["findings"] = {"before": "stays"}
    found = add_directions(
        circuit,
        model,
        bank_of(model),
        SITE,
        families=" iso, " + ",".join([*FAMILIES, "dictionary-error-perp"]),
        centers="real,gaussian,dictionary-bag,dictionary-structured",
        task=random_task([5, 6]),
        dictionary=random_dictionary(d_in=16, n=24, dtype=torch.float32),
        steps=4,
    )
    assert len(found) == 4 * (len(FAMILIES) + 1)
    graph = json.loads(json.dumps(circuit.graph, allow_nan=False))
    assert [row["family"] for row in graph["directions"]["families"]][: len(FAMILIES)] == list(
        FAMILIES
    )
    assert len(graph["findings"]) == 1 + 4 + 3
    assert [panel.kind for panel in panels_of(circuit)] == ["curves"] * 4 + ["table"]
    table = graph["plots"][-1]
    assert len(table["rows"]) == len(found)
    finding = graph["findings"]["length to 0.1 nats from real"].split("; ")
    medians = [each.median for each in found if each.centre == "real"]
    assert len(finding) == len(medians)
    shown = [part.split(" ")[1] for part in finding]
    values = [math.inf if value == ">" else float(value) for value in shown]
    assert all(a <= b for a, b in pairwise(values))


def test_pool_of_the_bank_holds_both_prompts_and_may_be_given() -> None:
    """Activations are those of all positions of A and B, each prefix once, unless others are."""
    model = traced(random_gpt2(dtype=torch.float32))
    bank, circuit = bank_of(model), CircuitGraph()
    add_directions(circuit, model, bank, SITE, families="iso", centers="real", steps=2)
    # Positions 2 to the end of each A, and the last of each B.
    assert circuit.graph["directions"]["n_activations"] == (4 + 2 + 3 + 4) + 4
    given = 10 * torch.eye(16)
    add_directions(
        circuit, model, bank, SITE, families="iso", centers="real", steps=2, activations=given
    )
    assert circuit.graph["directions"]["unit"] == pytest.approx(10)


def test_other_families_of_models_are_measured() -> None:
    """A model with RMSNorm, rotary positions, shared keys and a gated MLP, on padded prompts."""
    model = family_model("llama")
    pool = Pool(model, SITE, activations(model))
    families = [name for name in FAMILIES if "dictionary" not in name and name != "mean-difference"]
    padded = sensitivities(model, model.tokens(PROMPTS), pool, families=families, steps=5)
    alone = sensitivities(model, model.tokens(PROMPTS[:1]), pool, families=families, steps=5)
    for many, one in zip(padded, alone, strict=True):
        assert bool(many.kl.isfinite().all())
        if torch.equal(many.directions[:1], one.directions):
            torch.testing.assert_close(many.kl[:1], one.kl, atol=1e-4, rtol=1e-3)
    assert any(
        torch.equal(m.directions[:1], o.directions) for m, o in zip(padded, alone, strict=True)
    )


@pytest.mark.parametrize(
    ("crossing", "share"), [([0.1, 0.4, 1.0, math.inf], 0.625), ([math.inf] * 4, 0.25)]
)
def test_share_of_rows_that_answer_sooner(crossing: list[float], share: float) -> None:
    """Shorter counts 1, equal and both beyond a half, longer 0."""
    kl = [[0.0, 0.1, 0.2]] * 4
    real = made([0.2, 0.3, math.inf, math.inf], kl)
    row = sensitivity_row(made(crossing, kl), 0, real)
    assert row["sooner"] == pytest.approx(share)
    assert row["sooner_lo"] <= row["sooner"] <= row["sooner_hi"]


def test_real_activations_sit_on_plateaus_of_a_trained_model() -> None:
    """On trained `induction` a normal centre answers at under half the push that a real one takes.

    On its fresh weights, of a threshold as low as they answer, at about the same push. Heimersheim
    & Mendel 2024 saw it in GPT-2.
    """
    trained = load_model("induction")
    bank, ratios = make_bank(trained, None, n=48), []
    for model, tau in ((trained, 0.1), (trained.reinitialised(0), 1e-4)):
        circuit = CircuitGraph()
        add_directions(circuit, model, bank, SITE, families="iso", steps=16, threshold=tau)
        real, normal = circuit.graph["directions"]["families"]
        ratios.append(normal["median"] / real["median"])
    assert normal["beyond"] == 0
    assert ratios[0] < 0.5
    assert 0.8 < ratios[1] < 1.25
