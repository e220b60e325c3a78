"""Comparison of bundles: medians, references, controls on the same pairs, and what is said."""

from __future__ import annotations

import random
from dataclasses import fields
from statistics import median

import pytest
import torch
from circuitlab_activation_plateaus.comparison import (
    QUANTITIES,
    add_panels,
    common,
    compare,
    findings,
    plain,
)
from circuitlab_activation_plateaus.walks.bundle import Bundle
from circuitlab_activation_plateaus.walks.summaries import Summary
from torch import Tensor

from circuitlab import CircuitGraph, Curves, TaskError, TextTable, panels_of


def summary(width: Tensor, seed: int) -> Summary:
    """A summary with these widths, and other numbers at random."""
    generator = torch.Generator().manual_seed(seed)
    names = [field.name for field in fields(Summary)]
    rest = {name: torch.rand(len(width), generator=generator).double() for name in names}
    boundaries = torch.arange(len(width)) % 3
    return Summary(**rest | {"width": width.double(), "boundaries": boundaries})


def a_bundle(width: list[float], rows: list[int] | None = None, seed: int = 0) -> Bundle:
    """Straight curves with made-up numbers."""
    n = len(width)
    t = torch.linspace(0, 1, 5, dtype=torch.float64).expand(n, -1)
    ones = torch.ones(n, dtype=torch.float64)
    out = summary(torch.tensor(width), seed)
    inside = summary(torch.full((n,), 0.8), seed + 100)
    curve = t * (seed + 1)
    return Bundle(rows or list(range(n)), t, curve, t, out, inside, ones, 0 * ones)


def test_quantities() -> None:
    """Values are medians, those of controls first over these, and differences are theirs."""
    draw = random.Random(0)
    own, one, two, three = ([draw.random() for _ in range(9)] for _ in range(4))
    controls = [a_bundle(width, seed=n) for n, width in enumerate((one, two, three), 1)]
    found = {each.name: each for each in compare(a_bundle(own), controls)}
    assert list(found) == list(QUANTITIES)
    width = found["width"]
    middle = [median(values) for values in zip(one, two, three, strict=True)]
    assert width.value == pytest.approx(median(own), abs=1e-6)
    assert width.reference == pytest.approx(0.8, abs=1e-6)
    assert width.control == pytest.approx(median(middle), abs=1e-6)
    assert width.difference == pytest.approx(median(own) - median(middle), abs=1e-6)
    slopes = a_bundle(own)
    ratio = (slopes.out.max_slope / slopes.inside.max_slope).tolist()
    assert found["excess"].value == pytest.approx(median(ratio))
    assert found["excess"].reference is None


def test_paired_interval() -> None:
    """Pairs are drawn for both: where each pair loses the same, the interval has no width."""
    own = [0.1, 0.5, 0.2, 0.9, 0.4]
    other = a_bundle([width + 0.3 for width in own], seed=1)
    width = compare(a_bundle(own), [other])[0]
    assert width.difference == pytest.approx(-0.3, abs=1e-6)
    assert width.difference_interval == pytest.approx((-0.3, -0.3), abs=1e-6)
    assert width.interval is not None
    assert width.interval[0] < width.value < width.interval[1]


def test_without_controls() -> None:
    """Nothing is said of controls that are not there, in words, data and table."""
    quantities = compare(a_bundle([0.5, 0.6, 0.7]), [])
    assert "re-initialised" not in quantities[0].told
    assert plain(quantities)[0].keys() == {"name", "value", "interval", "reference"}
    circuit = CircuitGraph()
    add_panels(circuit, a_bundle([0.5, 0.6, 0.7]), [], quantities, response="d-sym", title="A to B")
    curves, table = panels_of(circuit)
    assert isinstance(curves, Curves)
    assert isinstance(table, TextTable)
    assert [curve.name for curve in curves.curves] == ["logits", "the site itself"]
    assert len(table.header) == 3


def test_panels() -> None:
    """Curves are the mean over pairs, of controls over these too; the table has every number."""
    own, controls = a_bundle([0.5, 0.6]), [a_bundle([0.8, 0.8], seed=n) for n in (1, 2)]
    quantities = compare(own, controls)
    circuit = CircuitGraph()
    add_panels(circuit, own, controls, quantities, response="kl", title="A to B")
    curves, table = panels_of(circuit)
    assert isinstance(curves, Curves)
    assert isinstance(table, TextTable)
    by_name = {curve.name: list(curve.mean) for curve in curves.curves}
    x = list(curves.x)
    assert by_name["logits"] == pytest.approx(x)
    assert by_name["re-initialised"] == pytest.approx([2.5 * place for place in x])
    assert by_name["the site itself"] == pytest.approx(x)
    assert "nats" in curves.y_label
    assert [row[0] for row in table.rows] == list(QUANTITIES.values())
    assert table.rows[0][4] == "-0.25 [-0.3, -0.2]"


def test_common() -> None:
    """Bundles are cut to the pairs that all have, in the model's order; none is refused."""
    first, second = a_bundle([0.1, 0.2, 0.3], [0, 2, 5]), a_bundle([0.4, 0.5, 0.6], [5, 2, 7])
    one, two = common([first, second])
    assert one.rows == two.rows == [2, 5]
    assert two.out.width.tolist() == pytest.approx([0.5, 0.4])
    with pytest.raises(TaskError, match="--controls 0"):
        common([first, a_bundle([0.1], [1])])


def test_findings() -> None:
    """Boundaries are counted by pair; the lines name value, site, control and difference."""
    own = a_bundle([0.5] * 7)
    said = findings(compare(own, [a_bundle([0.8] * 7, seed=1)]), own)
    back = int((own.out.deviation > 0.1).sum())
    assert (
        said["boundaries"] == f"one in 2 of 7 pairs, more in 2, none in 3; forth and back in {back}"
    )
    for part in ("0.5 [0.5, 0.5]", "at the site 0.8", "re-initialised 0.8", "difference -0.3"):
        assert part in said["median width"]


def test_single_pair() -> None:
    """A single pair has numbers and no intervals."""
    quantities = compare(a_bundle([0.5]), [a_bundle([0.8], seed=1)])
    row = plain(quantities)[0]
    assert row.keys() == {"name", "value", "reference", "control", "difference"}
    assert "[" not in quantities[0].told
