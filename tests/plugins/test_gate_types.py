"""Gate mathematics on mixture tables: closed forms, identities, and types that are told rightly."""

from __future__ import annotations

from itertools import combinations
from math import comb

import path_oracles
import pytest
import torch
from circuitlab_path_patching.gates.types import (
    FLAT,
    GateType,
    Others,
    classify,
    denoising,
    dividends,
    interaction,
    noising,
    shapley,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitlab import NumericsError, OptionError
from circuitlab.zoo.compiling import compile_model
from circuitlab.zoo.hand import NO, YES, gate_prompt

#: Sums of at most 256 float64 numbers of the size of those in the tables.
EXACT = 1e-10
SEEDS = st.integers(0, 2**16)
SIZES = st.integers(2, 5)
TWO_LEVEL: list[GateType] = ["AND", "OR", "XOR"]
NAMED: list[GateType] = [*TWO_LEVEL, "ADD", "SOLE"]


def bits_of(k: int) -> Tensor:
    """Which members are clean in each row, ``[2**k, k]``."""
    return torch.tensor([[row >> i & 1 for i in range(k)] for row in range(2**k)]).double()


def template(kind: GateType, k: int, weights: Tensor | None = None) -> Tensor:
    """The type's own table, ``[2**k]``; SOLE is the last member's."""
    bits = bits_of(k)
    if kind == "ADD":
        return bits @ (torch.ones(k).double() / k if weights is None else weights)
    tables = {"AND": bits.prod(1), "OR": bits.amax(1), "XOR": bits.sum(1) % 2, "SOLE": bits[:, -1]}
    return tables[kind]


def random_table(k: int, n_pairs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2**k, n_pairs, generator=generator, dtype=torch.float64)


def tables_of(kind: GateType, k: int, n_pairs: int, seed: int) -> Tensor:
    """A table of this type for each pair: each has its own affine map, and ADD its own weights."""
    generator = torch.Generator().manual_seed(seed)

    def away_from_zero(n: int) -> Tensor:
        values = 0.5 + torch.rand(n, generator=generator).double()
        return values * (torch.randint(0, 2, (n,), generator=generator) * 2 - 1)

    columns = [
        float(away_from_zero(1)) * template(kind, k, away_from_zero(k))
        + torch.randn(1, generator=generator).double() * 3
        for _ in range(n_pairs)
    ]
    return torch.stack(columns, 1)


def all_live(f: Tensor) -> Tensor:
    return torch.ones(len(f).bit_length() - 1, f.shape[1], dtype=torch.bool)


def swapped(f: Tensor) -> Tensor:
    """Clean and corrupt exchanged."""
    return f.flip(0)


@pytest.mark.parametrize(
    ("kind", "noise", "denoise", "pair"),
    [("AND", 1.0, 0.0, 1.0), ("OR", 0.0, 1.0, -1.0), ("ADD", 0.5, 0.5, 0.0), ("XOR", -1, 1, -2.0)],
)
def test_gate_table(kind: GateType, noise: float, denoise: float, pair: float) -> None:
    """Two bits: noising, denoising and interaction are those of the gate's truth table."""
    f = template(kind, 2)[:, None]
    assert noising(f).tolist() == [[noise], [noise]]
    assert denoising(f).tolist() == [[denoise], [denoise]]
    assert interaction(f, 0, 1).tolist() == [pair]
    assert dividends(f)[-1].tolist() == [pair]
    assert sum(shapley(f)).tolist() == [float(kind != "XOR")]


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 8), seed=SEEDS)
def test_dividends_invert(k: int, seed: int) -> None:
    """The dividends of a set's subsets sum to its value."""
    f = random_table(k, 3, seed)
    w = dividends(f)
    for row in {0, 1, 2**k - 1, seed % 2**k}:
        subsets = [other for other in range(2**k) if other & row == other]
        assert float((w[subsets].sum(0) - f[row]).abs().max()) < EXACT


@settings(max_examples=30, deadline=None)
@given(k=SIZES, seed=SEEDS)
def test_dividends_are_alternating_sums(k: int, seed: int) -> None:
    """Each dividend is the signed sum of its definition."""
    f = random_table(k, 2, seed)
    w = dividends(f)
    for row in range(2**k):
        subsets = [other for other in range(2**k) if other & row == other]
        signed = [(-1) ** (row.bit_count() - other.bit_count()) * f[other] for other in subsets]
        assert float((w[row] - sum(signed)).abs().max()) < EXACT


@settings(max_examples=30, deadline=None)
@given(k=SIZES, seed=SEEDS)
def test_shapley_is_the_weighted_mean_of_marginal_gains(k: int, seed: int) -> None:
    """The value of each member is the mean gain over all orders of turning members clean."""
    f = random_table(k, 2, seed)
    values = shapley(f)
    for i in range(k):
        others = [row for row in range(2**k) if not row >> i & 1]
        gains = [(f[row | 1 << i] - f[row]) / (k * comb(k - 1, row.bit_count())) for row in others]
        assert float((values[i] - sum(gains)).abs().max()) < EXACT
    assert float((values.sum(0) - (f[-1] - f[0])).abs().max()) < EXACT


@settings(max_examples=30, deadline=None)
@given(k=SIZES, seed=SEEDS)
def test_interaction_is_made_of_dividends(k: int, seed: int) -> None:
    """With the others corrupt it is the pair's dividend, with them clean the sum of all above it.

    On average a dividend of t members counts for 2**(2 - t).
    """
    f = random_table(k, 2, seed)
    w = dividends(f)
    for i, j in combinations(range(k), 2):
        pair = 1 << i | 1 << j
        above = [row for row in range(2**k) if row & pair == pair]
        expected: dict[Others, Tensor] = {
            "corrupt": w[pair],
            "clean": w[above].sum(0),
            "average": sum(
                (w[row] * 2.0 ** (2 - row.bit_count()) for row in above), w.new_zeros(2)
            ),
        }
        for others, value in expected.items():
            for found in (interaction(f, i, j, others), interaction(f, j, i, others)):
                assert float((found - value).abs().max()) < EXACT


@settings(max_examples=20, deadline=None)
@given(k=SIZES, seed=SEEDS)
def test_members_that_add_do_not_interact(k: int, seed: int) -> None:
    """All interactions of ADD are 0, and its single effects sum to the joint one."""
    f = tables_of("ADD", k, 3, seed)
    for i, j in combinations(range(k), 2):
        assert float(interaction(f, i, j).abs().max()) < EXACT
    assert float((noising(f).sum(0) - (f[-1] - f[0])).abs().max()) < EXACT
    assert classify(f, all_live(f), scale=1.0).interaction == pytest.approx(0, abs=EXACT)


@settings(max_examples=30, deadline=None)
@given(k=SIZES, seed=SEEDS)
def test_noising_is_denoising_of_the_swapped_table(k: int, seed: int) -> None:
    """When clean and corrupt change places, gains become losses and interactions stay."""
    f = random_table(k, 3, seed)
    assert torch.equal(noising(swapped(f)), -denoising(f))
    for i, j in combinations(range(k), 2):
        change = interaction(swapped(f), i, j) - interaction(f, i, j)
        assert float(change.abs().max()) < EXACT


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(NAMED), k=SIZES, seed=SEEDS)
def test_type_of_an_exact_table(kind: GateType, k: int, seed: int) -> None:
    """Each type is named, with perfect fit and support; swapped, AND and OR change places."""
    f = tables_of(kind, k, 6, seed)
    gate = classify(f, all_live(f), scale=1.0, resamples=50)
    assert (gate.type, gate.support, gate.n_pairs) == (kind, 1.0, 6)
    assert gate.fit == pytest.approx(1, abs=EXACT)
    assert gate.member == (k - 1 if kind == "SOLE" else None)
    mirror = {"AND": "OR", "OR": "AND"}.get(kind, kind)
    assert classify(swapped(f), all_live(f), scale=1.0, resamples=0).type == mirror


@pytest.mark.parametrize("k", range(2, 6))
def test_redundancy_of_each_type(k: int) -> None:
    """1 for OR, 1 - k for AND, 0 for ADD and SOLE, none for an XOR without total effect."""
    expected = {"AND": 1.0 - k, "OR": 1.0, "ADD": 0.0, "SOLE": 0.0}
    for kind in NAMED:
        f = template(kind, k)[:, None].repeat(1, 4) * 3 - 1
        redundancy = classify(f, all_live(f), scale=3.0).redundancy
        if kind != "XOR":
            assert redundancy == pytest.approx(expected[kind], abs=EXACT)
        else:
            # With an odd number of members all of them make a difference: 1 - k, as for AND.
            assert redundancy == (None if k % 2 == 0 else pytest.approx(1.0 - k))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(NAMED), k=SIZES, seed=SEEDS, data=st.data())
def test_order_of_members_changes_nothing(
    kind: GateType, k: int, seed: int, data: st.DataObject
) -> None:
    """When members change places, so do their values; type, fit and redundancy stay."""
    order = data.draw(st.permutations(range(k)))
    noise = 0.05 * random_table(k, 5, seed)
    f = tables_of(kind, k, 5, seed) + noise
    rows = [sum(1 << order[i] for i in range(k) if row >> i & 1) for row in range(2**k)]
    assert float((shapley(f[rows]) - shapley(f)[order]).abs().max()) < EXACT
    assert torch.equal(noising(f[rows]), noising(f)[order])
    before, after = (
        classify(table, all_live(f), scale=1.0, resamples=20) for table in (f, f[rows])
    )
    assert (before.type, before.support) == (after.type, after.support)
    assert before.fit == pytest.approx(after.fit, abs=EXACT)
    assert before.redundancy == (
        None if after.redundancy is None else pytest.approx(after.redundancy, rel=1e-6, abs=1e-6)
    )
    if before.member is not None:
        assert after.member is not None
        assert order[after.member] == before.member


@pytest.mark.parametrize("kind", NAMED)
def test_members_that_are_not_live_are_left_out(kind: GateType) -> None:
    """A member without difference in a pair is no part of that pair's table.

    A gate of three members of which one is dead in each pair is one of the two others: AND and OR
    of two then fit, although no template of three does.
    """
    k, columns, live = 3, [], torch.ones(3, 6, dtype=torch.bool)
    for pair in range(6):
        # The last member is the SOLE one, so it stays.
        dead = pair % (2 if kind == "SOLE" else 3)
        live[dead, pair] = False
        alive = [i for i in range(k) if i != dead]
        small = template(kind, 2, torch.tensor([1.0, -0.7]).double())
        rows = [sum((row >> i & 1) << bit for bit, i in enumerate(alive)) for row in range(2**k)]
        columns.append(small[rows] * (pair + 1))
    f = torch.stack(columns, 1)
    gate = classify(f, live, scale=1.0, resamples=50)
    assert (gate.type, gate.support, gate.n_pairs) == (kind, 1.0, 6)
    assert gate.fit == pytest.approx(1, abs=EXACT)
    if kind in TWO_LEVEL:
        assert classify(f, torch.ones_like(live), scale=1.0).type == "MIXED"


def test_pairs_with_one_live_member_say_nothing() -> None:
    """Type and fit rest on pairs in which two members change; there may be none."""
    f = tables_of("XOR", 2, 6, 0)
    live = all_live(f)
    live[0, 3:] = False
    f[:, 3:] = template("SOLE", 2)[:, None] * 100
    gate = classify(f, live, scale=1.0)
    assert (gate.type, gate.n_pairs) == ("XOR", 3)
    only = classify(f[:, 3:], live[:, 3:], scale=1.0)
    assert (only.type, only.member, only.fit, only.support, only.n_pairs) == ("SOLE", 1, 1, 1, 0)
    # Now one member, now the other: no pair tells what they do together.
    apart = torch.tensor([[True, True, False], [False, False, True]])
    gate = classify(f[:, 3:], apart, scale=1.0)
    assert (gate.type, gate.fit, gate.support) == ("MIXED", 0.0, 0.0)


def test_flat_table_is_inert() -> None:
    """What varies by less than a hundredth of the task's effect is INERT, whatever its shape."""
    for kind in NAMED:
        f = tables_of(kind, 3, 5, 1)
        largest = float((f.amax(0) - f.amin(0)).max())
        gate = classify(f, all_live(f), scale=-largest / FLAT)
        assert (gate.type, gate.support, gate.redundancy, gate.member) == ("INERT", 1.0, None, None)
        assert classify(f, all_live(f), scale=largest).type == kind
    constant = torch.ones(4, 2)
    assert classify(constant, all_live(constant), scale=0.0).type == "INERT"
    nothing_changes = classify(constant, torch.zeros(2, 2, dtype=torch.bool), scale=1.0)
    assert (nothing_changes.type, nothing_changes.n_pairs) == ("INERT", 0)


def test_table_of_no_type_is_mixed() -> None:
    """Noise, half of the pairs AND and half OR, and (a or b) and c are no gate of one type."""
    noise = random_table(3, 40, 3)
    halves = torch.cat([tables_of("AND", 2, 20, 0), tables_of("OR", 2, 20, 1)], 1)
    bits = bits_of(3)
    nested = (bits[:, :2].amax(1) * bits[:, 2])[:, None].repeat(1, 5)
    for f in (noise, halves, nested):
        gate = classify(f, all_live(f), scale=1.0)
        assert gate.type == "MIXED"
        assert gate.fit < 0.8


def test_free_weights_win_nothing_on_noise() -> None:
    """ADD has as many free numbers as it likes, and yet fits pure noise no better than 0."""
    for k in (2, 3, 4):
        gate = classify(random_table(k, 4000, k), torch.ones(k, 4000).bool(), scale=1.0)
        assert gate.type == "MIXED"
        # Four standard errors of a mean over 4,000 pairs.
        assert abs(gate.fit) < 4 / 4000**0.5


@pytest.mark.parametrize("kind", NAMED)
def test_noise_costs_fit_before_it_costs_the_type(kind: GateType) -> None:
    """Fit falls as noise grows; the type holds until the noise is as large as the gate."""
    for k in (2, 3):
        f, noise = tables_of(kind, k, 200, 7), random_table(k, 200, 8)
        unit = float((f - f.mean(0)).std())
        gates = [
            classify(f + level * unit * noise, all_live(f), scale=1.0, resamples=100)
            for level in (0.0, 0.1, 0.25, 2.0)
        ]
        assert [gate.type for gate in gates] == [kind] * 3 + ["MIXED"]
        assert all(gate.support > 0.9 for gate in gates)
        fits = [gate.fit for gate in gates]
        assert fits == sorted(fits, reverse=True)


def test_support_is_the_share_of_resamples_that_agree() -> None:
    """Where one pair in six decides, the type holds in the resamples that draw it often enough."""
    f = torch.cat([tables_of("AND", 2, 5, 0), 3 * tables_of("XOR", 2, 1, 0)], 1)
    first = classify(f, all_live(f), scale=1.0, resamples=400, seed=1)
    assert 0 < first.support < 1
    assert classify(f, all_live(f), scale=1.0, resamples=400, seed=1) == first
    assert classify(f, all_live(f), scale=1.0, resamples=400, seed=2).support != first.support


def test_a_weak_second_member_does_not_make_a_sum() -> None:
    """A second member of a tenth of the weight leaves the first SOLE; a fifth makes it ADD."""
    for weight, kind in ((0.1, "SOLE"), (0.2, "ADD")):
        f = template("ADD", 2, torch.tensor([1.0, weight]).double())[:, None].repeat(1, 3)
        assert classify(f, all_live(f), scale=1.0).type == kind


@pytest.mark.parametrize("kind", ["AND", "OR", "ADD", "XOR"])
def test_type_of_a_compiled_gate(kind: GateType) -> None:
    """Mixtures of the two heads of a hand-made model, measured by brute force, name its gate."""
    module, tokenizer = compile_model(f"gate-{kind.lower()}")
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in (YES, NO))
    ids = [torch.tensor([tokenizer(gate_prompt(bits)).input_ids]) for bits in ((1, 1), (0, 0))]
    for mode in ("noise", "denoise"):
        run = path_oracles.runs(module, *ids, mode=mode)
        logits = path_oracles.mixtures(run, ["a0.h0", "a0.h1"])
        f = logits[..., yes] - logits[..., no]
        gate = classify(f, all_live(f), scale=1.0, resamples=10)
        assert (gate.type, gate.support) == (kind, 1.0)
        assert gate.interaction == pytest.approx(
            float(interaction(template(kind, 2)[:, None], 0, 1)), abs=1e-3
        )


def test_input_is_left_as_it_was() -> None:
    """The transforms work on a copy, and take float32 and views."""
    f = random_table(3, 4, 0).float()
    before = f.clone()
    for view in (f, f.T.contiguous().T):
        assert torch.equal(dividends(view), dividends(f.double()))
    assert torch.equal(f, before)


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (0, 2), (512, 1), (4,)])
def test_table_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    """A table without 2**k rows, k from 1 to 8, is refused."""
    with pytest.raises(
        OptionError, match=r"mixture table has shape .* must be \[2\*\*k, n_pairs\]"
    ):
        noising(torch.zeros(shape))


def test_other_arguments_that_do_not_fit() -> None:
    """Members that are none, an unknown state, live of another shape, and what is not finite."""
    f = random_table(2, 3, 0)
    for i, j in ((0, 0), (0, 2), (-1, 0)):
        with pytest.raises(OptionError, match="two different members from 0 to 1"):
            interaction(f, i, j)
    with pytest.raises(OptionError, match="choose average, clean or corrupt"):
        interaction(f, 0, 1, "both")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(OptionError, match=r"live is \[2, 2\].*give \[2, 3\]"):
        classify(f, torch.ones(2, 2).bool(), scale=1.0)
    with pytest.raises(NumericsError, match="scale nan"):
        classify(f, all_live(f), scale=float("nan"))
    f[2, 1] = torch.inf
    with pytest.raises(NumericsError, match="row 2, pair 2"):
        dividends(f)
