"""The models of superposition are as described: tables, closed forms, and what linear maps miss."""

from __future__ import annotations

import importlib
import math
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from circuitlab import Site, load_model, zoo
from circuitlab.zoo import superposition, training
from circuitlab.zoo.recipe import split
from circuitlab.zoo.summing import compile_interference, train_gates
from circuitlab.zoo.superposition import (
    GATED_PAIRS,
    HALVES,
    HELD_OUT,
    PLANTED,
    Interference,
    and_value,
    interference_prompt,
    pair_word,
)

DOCS = Path(__file__).parents[2] / "docs"
STATES = [(a, b) for a in (False, True) for b in (False, True)]
SIGNS = [(i, j, k) for i in (1, -1) for j in (1, -1) for k in (1, -1)]


def logits(name: str, prompts: list[str], words: list[str]) -> Tensor:
    module, tokenizer = zoo.load(name)
    ids = tokenizer.convert_tokens_to_ids(words)
    return training.last_logits(module, tokenizer, prompts)[:, ids]


def gate_values(name: str, sets: list[tuple[int, ...]]) -> Tensor:
    words = [pair_word(pair) for pair in GATED_PAIRS[name]]
    return logits(name, [" ".join(f"x{i}" for i in chosen) for chosen in sets], words) / 10


# --- ANDs


def test_halves_are_a_design() -> None:
    """30 sets of 8 inputs; any two inputs share 7 of them, any three 3."""
    assert len(set(HALVES)) == 30
    assert {len(half) for half in HALVES} == {8}
    for size, shared in ((2, 7), (3, 3)):
        counts = {sum({*some} <= half for half in HALVES) for some in combinations(range(16), size)}
        assert counts == {shared}


def test_hand_and_gives_its_closed_form() -> None:
    """Every pair's logit is 10 times the closed form, for random sets of 0 to 8 inputs."""
    rng = Random(0)
    sets = [
        (),
        (3,),
        (0, 15),
        *(tuple(rng.sample(range(16), rng.randint(0, 8))) for _ in range(60)),
    ]
    wanted = [
        [and_value(pair, frozenset(some)) for pair in GATED_PAIRS["hand-and"]] for some in sets
    ]
    assert torch.allclose(gate_values("hand-and", sets), torch.tensor(wanted), atol=1e-4)


def test_hand_and_is_right_for_every_set_of_inputs() -> None:
    """Over all 65,536 sets and 120 pairs: at least 1 if both are active, at most 3/7 if not."""
    points = torch.arange(2**16)
    bits = torch.stack([(points >> i) & 1 for i in range(16)], 1).double()
    halves = torch.tensor([[float(i in half) for half in HALVES] for i in range(16)]).double()
    neurons = (bits @ halves - 1).relu()
    more = (bits.sum(1) - 2).relu()
    for first, second in GATED_PAIRS["hand-and"]:
        read = halves[first] * halves[second]
        value = (neurons @ read - 3 * more) / 7
        both = bits[:, first] * bits[:, second] > 0
        assert (value[both] - 1).abs().max() < 1e-12
        assert value[~both].max() < 3 / 7 + 1e-12


def test_hand_and_has_fewer_neurons_than_pairs() -> None:
    """31 ReLUs for 120 pairs, and 24 for 32."""
    for name, n_neurons, n_pairs in (("hand-and", 31, 120), ("and-superposition", 24, 32)):
        module, _ = zoo.load(name)
        assert module.transformer.h[0].mlp.c_fc.weight.shape[1] == n_neurons
        assert len(GATED_PAIRS[name]) == len(set(GATED_PAIRS[name])) == n_pairs


def interaction(name: str) -> float:
    """value(both) - value(one) - value(other) + value(none), mean over pairs."""
    pairs, total = GATED_PAIRS[name], 0.0
    single = gate_values(name, [(i,) for i in range(16)])
    none, both = gate_values(name, [()])[0], gate_values(name, list(pairs))
    for k, (i, j) in enumerate(pairs):
        total += (both[k, k] - single[i, k] - single[j, k] + none[k]).item()
    return total / len(pairs)


@pytest.mark.parametrize(("name", "least"), [("hand-and", 0.999), ("and-superposition", 0.75)])
def test_ands_are_computed(name: str, least: float) -> None:
    """The interaction of a pair's inputs, which is 0 in every linear function, is near 1."""
    found = zoo.evaluate(name, *zoo.load(name))
    assert found["interaction"] == pytest.approx(interaction(name), abs=1e-5)
    assert found["interaction"] > least
    assert found["recall"] > 0.85
    assert found["precision"] > 0.85
    assert found["linear-recall"] < 0.1


def test_trained_ands_beat_the_best_linear_function() -> None:
    """On held-out sets the squared error is at most half of that of least squares."""
    name = "and-superposition"
    found = zoo.evaluate(name, *zoo.load(name))
    sets = sorted(HELD_OUT)
    bits = torch.tensor([[float(i in some) for i in range(16)] + [1.0] for some in sets]).double()
    wanted = torch.tensor(
        [[float({*pair} <= {*some}) for pair in GATED_PAIRS[name]] for some in sets]
    ).double()
    spread = (wanted - wanted.mean(0)).square().sum()
    normal = bits.T @ bits
    linear = bits @ torch.linalg.solve(normal, bits.T @ wanted)
    error = (gate_values(name, sets).double() - wanted).square().sum() / spread
    assert found["error"] == pytest.approx(error.item(), rel=1e-4)
    assert found["linear-error"] == pytest.approx(
        ((linear - wanted).square().sum() / spread).item(), rel=1e-3
    )
    assert found["error"] < 0.5 * found["linear-error"]


def test_trained_task_is_held_out() -> None:
    """Clean prompts are of sets that training never draws."""
    (task,) = [task for task in zoo.tasks() if task.name == "and-superposition"]
    for pair in task.pairs:
        assert tuple(sorted(int(word[1:]) for word in split(str(pair.clean)))) in HELD_OUT


def test_order_and_number_of_words_do_not_matter() -> None:
    """The head adds up: any order gives the same values, and a longer prompt scales nothing."""
    for name in ("hand-and", "and-superposition"):
        one, other = gate_values(name, [(2, 9, 14), (14, 2, 9)])
        assert torch.allclose(one, other, atol=1e-3)


def test_norms_change_nothing() -> None:
    """The trained model has norms; its values are those of its MLP on the bits alone."""
    module, _ = zoo.load("and-superposition")
    mlp, sums = module.transformer.h[0].mlp, slice(17, 33)
    rng = Random(1)
    sets = [tuple(rng.sample(range(16), rng.randint(0, 4))) for _ in range(40)]
    bits = torch.tensor([[float(i in some) for i in range(16)] for some in sets])
    hidden = (bits @ mlp.c_fc.weight[sums] + mlp.c_fc.bias).relu()
    values = (hidden @ mlp.c_proj.weight + mlp.c_proj.bias)[:, 33:65]
    assert torch.allclose(gate_values("and-superposition", sets), values, atol=2e-3)


def test_recipe_of_ands_is_repeatable_and_learns() -> None:
    """The same seed gives the same weights, another one others; the loss falls."""
    losses: list[float] = []
    before = torch.get_rng_state()
    first = train_gates(
        superposition.RECIPE, steps=60, progress=lambda *report: losses.append(report[2]["loss"])
    )
    assert torch.equal(torch.get_rng_state(), before)
    again = train_gates(superposition.RECIPE, steps=60)
    other = train_gates(superposition.RECIPE, seed=1, steps=60)
    for (key, weight), (_, same) in zip(
        first.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(weight, same), key
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert losses[0] > losses[-1]


def test_table_of_ands_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """models.md shows what the models of ANDs give now."""
    monkeypatch.syspath_prepend(DOCS)
    page = (DOCS / "models.md").read_text("utf-8")
    for row in importlib.import_module("make_tables").and_rows():
        assert row in page


# --- Planted features


def test_planted_bases_are_orthonormal_and_no_coordinates() -> None:
    """Directions of one side are orthonormal, and every one has 16 equal entries."""
    for side in (PLANTED.sources, PLANTED.targets):
        rows = torch.tensor([*side.values()], dtype=torch.float64)
        assert torch.allclose(rows @ rows.T, torch.eye(16, dtype=torch.float64))
        assert ((rows.abs() > 0).sum(1) == 16).all()
    targets = [target for _, target in PLANTED.edges]
    assert {targets.count(name) for name in PLANTED.targets} == {2}
    assert len(PLANTED.edges) == 32


def test_planted_features_are_in_the_model() -> None:
    """At each word mlp_in and mlp_out hold the graph's features with their intensities, exactly."""
    model = load_model("hand-planted")
    text = "f3 f8 f14 f9"
    sites = [Site("mlp_in", 0), Site("mlp_out", 0)]
    run = model.run([text], read=sites)
    words = text.split()
    for place in range(1, 5):
        shown = {w: 2.0 if i == place - 1 else 1.0 for i, w in enumerate(words[:place])}
        source = sum(z * torch.tensor(PLANTED.sources[w]) for w, z in shown.items())
        target = torch.zeros(33)
        for name, direction in PLANTED.targets.items():
            z = sum(w * shown.get(s, 0.0) for (s, t), w in PLANTED.edges.items() if t == name)
            target += max(z, 0.0) * torch.tensor(direction)
        assert torch.allclose(run[sites[0]][0, place], source, atol=1e-4)
        assert torch.allclose(run[sites[1]][0, place], target, atol=1e-4)


def test_planted_jacobian_is_the_graph() -> None:
    """The MLP's Jacobian between the planted features has the graph's edges, and no others."""
    module, _ = zoo.load("hand-planted")
    mlp = module.transformer.h[0].mlp
    sources = torch.tensor([*PLANTED.sources.values()])
    targets = torch.tensor([*PLANTED.targets.values()])
    z = torch.zeros(16)
    z[[0, 2, 4]] = torch.tensor([1.0, 1.0, 2.0])
    z.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: mlp((z @ sources)[None])[0] @ targets.T, z
    )
    wanted = torch.zeros(16, 16)
    for (source, target), weight in PLANTED.edges.items():
        i, j = int(target[1:]), int(source[1:])
        total = sum(w * z[int(s[1:])].item() for (s, t), w in PLANTED.edges.items() if t == target)
        wanted[i, j] = weight if total > 0 else 0.0
    assert (wanted != 0).sum() >= 6
    assert torch.allclose(jacobian, wanted, atol=1e-5)


def test_planted_table_error_is_small() -> None:
    """What evaluate compares with the graph is right to rounding."""
    assert zoo.evaluate("hand-planted", *zoo.load("hand-planted"))["table-error"] < 1e-3


# --- Interference


def states_of(setting: Interference) -> tuple[Tensor, Tensor]:
    """Streams of all states with all noise, ``[4, 8, width]``, and xor, ``[4]``."""
    model = load_model((compile_interference(setting), zoo.load("hand-interference")[1]))
    prompts = [interference_prompt(a, b, signs) for a, b in STATES for signs in SIGNS]
    run = model.run(prompts, read=[Site("resid_post", 0)])
    streams = run[Site("resid_post", 0)][:, -1].double()
    return streams.view(4, 8, -1), torch.tensor([float(a != b) for a, b in STATES])


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 1.0])
def test_interference_is_the_formula(epsilon: float) -> None:
    """The stream is A u + B v + (2 B - 1) A (ε/2) w + noise, and nothing besides the end's mark."""
    setting = Interference(epsilon, 0.03)
    streams, _ = states_of(setting)
    u, v, w, _ = torch.tensor(superposition.hadamard(4), dtype=torch.float64)
    for stream, (a, b) in zip(streams, STATES, strict=True):
        clean = a * u + b * v + (2 * b - 1) * a * (epsilon / 2) * w
        for row, (i, j, k) in zip(stream, SIGNS, strict=True):
            wanted = clean + 0.03 * (i * u + j * v + k * w)
            assert torch.allclose(row[:4], wanted, atol=5e-5)
            assert row[4:-2].abs().max() < 5e-5
    given_b = streams[3].mean(0)[:4] - streams[1].mean(0)[:4]
    given_not_b = streams[2].mean(0)[:4] - streams[0].mean(0)[:4]
    cosine = torch.cosine_similarity(given_b, given_not_b, dim=0).item()
    assert cosine == pytest.approx(setting.cosine, abs=1e-4)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_gap_is_the_distance_of_the_two_classes(epsilon: float) -> None:
    """The closed form is the least distance of the two segments, searched on a fine grid."""
    e = epsilon / 2
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    s, t = grid[:, None], grid[None, :]
    square = ((1 - s) - t).square() + (s - t).square() + (e * (1 - s) + e * t).square()
    assert Interference(epsilon).gap == pytest.approx(square.min().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize(("epsilon", "noise"), [(0.2, 0.05), (1.0, 0.3), (0.1, 0.5)])
def test_d_prime_is_that_of_fisher_s_discriminant(epsilon: float, noise: float) -> None:
    """The closed form is sqrt(d' S^-1 d) of the model's own streams, S within the classes."""
    setting = Interference(epsilon, noise)
    streams, xor = states_of(setting)
    space = streams[..., :4] @ torch.tensor(superposition.hadamard(4)[:3]).double().T
    classes = [space[xor == value].reshape(-1, 3) for value in (0, 1)]
    means = [rows.mean(0) for rows in classes]
    within = (
        sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows) for rows in classes) / 2
    )
    apart = means[1] - means[0]
    found = math.sqrt(apart @ torch.linalg.solve(within, apart))
    assert setting.d_prime == pytest.approx(found, rel=2e-3)


def test_noise_free_axis_reads_xor_exactly() -> None:
    """On v - (2/ε) w every state has its value of xor."""
    setting = Interference(0.4, 0.0)
    streams, xor = states_of(setting)
    _, v, w, _ = torch.tensor(superposition.hadamard(4), dtype=torch.float64)
    read = streams[:, 0, :4] @ (v - 2 / 0.4 * w)
    assert torch.allclose(read, xor.double(), atol=1e-3)
