"""R², L0 and dead latents: sums over batches equal all at once, and hold what they promise."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import dictionary_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitlab import DictionaryStats, NumericsError, OptionError, SiteError
from circuitlab.dictionaries.stats import tokens_needed

LAST = {0: 0, 1: 1, 2: 3, 4: 7}


def data(seed: int = 0, *, batch: int = 10, pos: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, latents of which a third are active, reconstructions that explain most."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(batch, pos, 5, generator=generator, dtype=torch.float64) + 2.0
    z = torch.rand(batch, pos, 9, generator=generator, dtype=torch.float64)
    z = z.where(z > 0.66, 0.0) * (torch.arange(9) > 1)
    noise = torch.randn(batch, pos, 5, generator=generator, dtype=torch.float64)
    return target, z, target + 0.4 * noise + 0.1


def at_once(target: Tensor, z: Tensor, found: Tensor) -> dict[str, float]:
    """The same numbers from rows, each of its own definition."""
    rows, guesses = target.tolist(), found.tolist()
    mean = [math.fsum(row[i] for row in rows) / len(rows) for i in range(5)]
    spread = math.fsum((row[i] - mean[i]) ** 2 for row in rows for i in range(5))
    pairs = list(zip(rows, guesses, strict=True))
    missed = math.fsum((a[i] - b[i]) ** 2 for a, b in pairs for i in range(5))
    offset = [math.fsum(b[i] - a[i] for a, b in pairs) / len(rows) for i in range(5)]
    return {
        "tokens": len(rows),
        "r2": 1 - missed / spread,
        "bias": len(rows) * math.fsum(o * o for o in offset) / spread,
        "l0": sum(value > 0 for row in z.tolist() for value in row) / len(rows),
    }


def stats_of(*parts: Any, **options: Any) -> DictionaryStats:
    stats = DictionaryStats(9)
    stats.add(*parts, **options)
    return stats


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=4, unique=True), st.booleans(), st.booleans())
def test_batches_add_up(cuts: list[int], padded: bool, sparse: bool) -> None:
    """Any split into batches gives what all rows give at once, in all and at each position."""
    target, z, found = data()
    lengths = torch.arange(10) % 7 + 1 if padded else torch.full((10,), 7)
    mask = torch.arange(7) >= 7 - lengths[:, None]
    stats = DictionaryStats(9)
    edges = [0, *sorted(cuts), 10]
    for first, last in itertools.pairwise(edges):
        part = slice(first, last)
        latents: Any = z[part]
        if sparse:
            values, indices = z[part].topk(8, -1)
            latents = indices, values
        stats.add(target[part], latents, found[part], mask=mask[part])
    summary = stats.summary()
    wanted = at_once(target[mask], z[mask], found[mask])
    assert {name: summary[name] for name in wanted} == pytest.approx(wanted, rel=1e-10)
    assert stats.tokens == int(mask.sum())
    torch.testing.assert_close(stats.densities, (z[mask] > 0).double().mean(0))
    places = mask.long().cumsum(1) - 1
    for bucket in summary["positions"]:
        here = mask & (places >= bucket["first"]) & (places <= bucket["last"])
        wanted = at_once(target[here], z[here], found[here])
        assert {name: bucket[name] for name in wanted} == pytest.approx(wanted, rel=1e-10)
    assert {b["first"]: b["last"] for b in summary["positions"]} == LAST
    json.dumps(summary, allow_nan=False)


def test_positions_may_be_given() -> None:
    """Activations out of their prompts keep their positions."""
    target, z, found = data(batch=1, pos=6)
    positions = torch.tensor([[0, 1, 5, 1000, 1023, 1024]])
    summary = stats_of(target, z, found, positions=positions).summary()
    buckets = [(b["first"], b["last"], b["tokens"]) for b in summary["positions"]]
    assert buckets == [(0, 0, 1), (1, 1, 1), (4, 7, 1), (512, 1023, 2), (1024, 2047, 1)]


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 1e6])
def test_r2_is_blind_to_a_constant(offset: float) -> None:
    """A constant added to both changes nothing; a formula that leaves the mean out rises to 1."""
    target, z, found = data()
    there = stats_of(target, z, found).summary()
    moved = stats_of(target + offset, z, found + offset).summary()
    assert moved["r2"] == pytest.approx(there["r2"], rel=1e-6)
    assert moved["bias"] == pytest.approx(there["bias"], rel=1e-6)
    rows, guesses = (target + offset).flatten(0, 1), (found + offset).flatten(0, 1)
    missed = (rows - guesses).square().sum()
    uncentred = float(1 - missed / rows.square().sum())
    if offset:
        assert uncentred > there["r2"] + 0.1


def test_r2_sees_a_wrong_mean() -> None:
    """1 - Var(error) / Var(x) calls a reconstruction perfect that is off by a constant; R² not.

    The constant is what ``bias`` says is missing.
    """
    target, z, _ = data()
    summary = stats_of(target, z, target + 2.0).summary()
    spread = float((target - target.mean((0, 1))).square().sum())
    missing = 70 * 5 * 4.0 / spread
    assert summary["r2"] == pytest.approx(1 - missing)
    assert summary["bias"] == pytest.approx(missing)
    assert float((2.0 + torch.zeros_like(target)).var()) == 0.0


def test_r2_has_its_ends() -> None:
    """1 for a copy, 0 for the mean, and nothing where targets do not vary."""
    target, z, _ = data()
    assert stats_of(target, z, target).summary()["r2"] == 1.0
    mean = target.mean((0, 1)).expand_as(target)
    assert stats_of(target, z, mean).summary()["r2"] == pytest.approx(0.0, abs=1e-12)
    rounding = 1e-7 * (target.float() - 2.0)
    same = target[:1, :1].float().expand(10, 7, 5) * (1 + rounding)
    summary = stats_of(same, z, same + 1).summary()
    assert "r2" not in summary
    assert "bias" not in summary
    assert summary["l0"] > 0


def test_how_many_tokens_silence_takes() -> None:
    """(1 - p)^n is at most delta for the number, and not for one less; 46,050 for 1e-4 and 0.01."""
    assert tokens_needed(1e-4) == 46_050
    assert tokens_needed(1e-5) == 460_515
    for density, delta in ((0.3, 0.05), (1e-3, 0.01), (1e-6, 1e-3)):
        n = tokens_needed(density, delta)
        assert n * math.log1p(-density) <= math.log(delta) < (n - 1) * math.log1p(-density)
    for density, delta in ((0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (math.nan, 0.1)):
        with pytest.raises(OptionError, match="give a number between 0 and 1"):
            tokens_needed(density, delta)


def test_too_few_tokens_say_nothing_of_dead_latents() -> None:
    """With fewer tokens than needed the share is unknown, with enough it is a number."""
    target, z, found = data()
    stats = stats_of(target, z, found)
    dead = stats.summary()["dead"]
    assert dead == {
        "share": "unknown",
        "density": 1e-4,
        "delta": 0.01,
        "tokens_needed": 46_050,
    }
    # 70 tokens: enough for a density of 0.1 (44), too few for 0.05 (90).
    assert stats.summary(density=0.1)["dead"]["share"] == pytest.approx(2 / 9)
    assert stats.summary(density=0.05)["dead"]["share"] == "unknown"
    # 10 tokens at position 0.
    assert stats.summary(density=0.1)["positions"][0]["dead"]["share"] == "unknown"


def test_rarely_active_latents_are_seldom_called_dead() -> None:
    """Of latents with the excluded density, about delta are silent in the needed tokens."""
    n, density, delta = 4000, 0.05, 0.02
    tokens = tokens_needed(density, delta)
    generator = torch.Generator().manual_seed(3)
    z = (torch.rand(1, tokens, n, generator=generator) < density).float()
    stats = DictionaryStats(n)
    stats.add(torch.ones(1, tokens, 2), z, torch.zeros(1, tokens, 2))
    share = stats.summary(density=density, delta=delta)["dead"]["share"]
    expected = (1 - density) ** tokens
    assert expected <= delta
    assert abs(share - expected) < 4 * math.sqrt(delta / n)


def test_latents_of_a_dictionary_are_counted() -> None:
    """Dense and sparse latents of a dictionary give the same summary."""
    x = oracles.inputs()
    for kind in oracles.KINDS:
        d = oracles.random_dictionary(kind, "input bias")
        dense = stats_of(x, d.encode(x), d(x)).summary(density=0.2)
        assert dense == stats_of(x, d.active(x), d(x)).summary(density=0.2)
        assert 0 < dense["l0"] < 9


def test_what_does_not_fit_is_refused() -> None:
    """Shapes, NaN and an empty sum each have their message."""
    target, z, found = data()
    with pytest.raises(SiteError, match=r"give \[batch, pos, ...\], 9 latents"):
        stats_of(target, z[..., :8], found)
    with pytest.raises(SiteError, match="do not fit"):
        stats_of(target, z, found[:, 1:])
    with pytest.raises(SiteError, match="do not fit"):
        stats_of(target[0], z[0], found[0])
    with pytest.raises(SiteError, match="do not fit"):
        stats_of(target, z, found, mask=torch.ones(10, 6, dtype=torch.bool))
    with pytest.raises(NumericsError, match="hold NaN or infinity"):
        stats_of(target, z, found * torch.nan)
    with pytest.raises(OptionError, match="no token was added"):
        DictionaryStats(9).summary()
    with pytest.raises(OptionError, match="no token was added"):
        _ = DictionaryStats(9).densities


def test_nan_under_padding_does_not_count() -> None:
    """What stands where no token is real is never looked at."""
    target, z, found = data()
    mask = torch.ones(10, 7, dtype=torch.bool)
    mask[:, :2] = False
    wanted = stats_of(target, z, found, mask=mask).summary()
    target[:, :2], found[:, :2] = torch.nan, torch.inf
    assert stats_of(target, z, found, mask=mask).summary() == wanted
