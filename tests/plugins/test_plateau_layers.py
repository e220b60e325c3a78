"""Through the layers: closed forms of made-up walks, the nine verdicts, and a real model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from circuitlab_activation_plateaus.sharpness.layers import (
    VERDICTS,
    add_layers,
    layer_sites,
    layer_table,
    speed_map,
    split_or_sharpen,
)
from circuitlab_activation_plateaus.walks.walking import Walks, walk
from families import family_model
from torch import Tensor

from circuitlab import CircuitGraph, Heatmap, OptionError, Site, load_model, panels_of

Curve = Callable[[Tensor], Tensor]
N_ROWS, N_STEPS = 6, 401
#: A slope k is sampled in steps h: between two of them it is lower by up to (k h)² / 12; k is 80.
SAMPLED = (80 / (N_STEPS - 1)) ** 2 / 10


def logistic(slope: float, *places: float) -> Curve:
    """Steps at some places, together from about 0 to about 1."""
    return lambda t: sum(torch.sigmoid(slope * (t - p)) for p in places) / len(places)  # type: ignore[return-value]  # at least one


def even(t: Tensor) -> Tensor:
    return t


def walks_of(streams: list[Curve], logits: Curve, jitter: float = 0.0) -> Walks:
    """Walks whose streams and logits move along one direction as curves say, shifted by pair."""
    shift = jitter * torch.linspace(-1, 1, N_ROWS, dtype=torch.float64)[:, None]
    t = torch.linspace(0, 1, N_STEPS, dtype=torch.float64).expand(N_ROWS, -1)

    def along(curve: Curve, width: int) -> Tensor:
        moved = t if curve is even else curve(t + shift)
        return moved[..., None] * torch.linspace(1, 2, width, dtype=torch.float64)

    read = {Site("resid_post", layer): along(curve, 4) for layer, curve in enumerate(streams)}
    return Walks(t, along(even, 4), read, along(logits, 5))


def test_table_has_the_closed_forms() -> None:
    """Slope, width and participation of a logistic curve, one boundary, none on the even way."""
    table = layer_table(walks_of([logistic(40, 0.4)], logistic(80, 0.3, 0.7)))
    assert table.sites == ("walked", "resid_post.0", "logits")
    assert table.boundaries[:, 0].tolist() == [0, 1, 2]
    expected = {"max_slope": [1, 10, 10], "width": [0.8, 2 * math.log(9) / 40, None]}
    expected["participation"] = [1, 6 / 40, 2 * 6 / 80]
    for name, numbers in expected.items():
        for found, number in zip(getattr(table, name)[:, 0].tolist(), numbers, strict=True):
            assert number is None or found == pytest.approx(number, rel=SAMPLED), name
    assert table.rows.all()


CHANGES = {
    (0, 0): (logistic(60, 0.5), logistic(60, 0.5)),
    (0, 1): (logistic(40, 0.5), logistic(80, 0.5)),
    (0, -1): (logistic(80, 0.5), logistic(40, 0.5)),
    (1, 0): (logistic(40, 0.5), logistic(80, 0.3, 0.7)),
    (1, 1): (logistic(40, 0.5), logistic(160, 0.3, 0.7)),
    (1, -1): (logistic(80, 0.5), logistic(80, 0.3, 0.7)),
    (-1, 0): (logistic(80, 0.3, 0.7), logistic(40, 0.5)),
    (-1, 1): (logistic(80, 0.3, 0.7), logistic(80, 0.5)),
    (-1, -1): (logistic(160, 0.3, 0.7), logistic(40, 0.5)),
}


def noisy(curve: Curve) -> Curve:
    """The curve, steeper in some pairs and flatter in others by a tenth."""
    factors = torch.tensor([0.9, 1.1] * (N_ROWS // 2), dtype=torch.float64)[:, None]
    return lambda t: torch.lerp(t, curve(t), factors)


@pytest.mark.parametrize("signs", sorted(VERDICTS))
def test_verdict(signs: tuple[int, int]) -> None:
    """Boundaries and slope that rise, fall or stay give the words for it, for all nine cases."""
    first, last = CHANGES[signs]
    verdict = split_or_sharpen(layer_table(walks_of([first], noisy(last))))
    assert verdict is not None
    assert (verdict.boundaries.sign, verdict.max_slope.sign) == signs
    assert verdict.words == VERDICTS[signs]
    assert verdict.ends == ("resid_post.0", "logits")
    blank = split_or_sharpen(layer_table(walks_of([], last)))
    assert blank is None


def test_first_boundary_is_no_split() -> None:
    """From no boundary to one regions sharpen, and to two they split; rounding changes nothing."""
    cases = {
        "regions sharpen": (even, logistic(80, 0.5)),
        "regions split and sharpen": (even, logistic(80, 0.3, 0.7)),
        "regions blur": (logistic(80, 0.5), even),
        "regions stay as they are": (even, lambda t: t + 1e-4 * t * (1 - t)),
    }
    for words, (first, last) in cases.items():
        verdict = split_or_sharpen(layer_table(walks_of([first], last)))
        assert verdict is not None
        assert verdict.words == words


def test_verdict_words_say_what_changed() -> None:
    """The words of a case name the change of each number."""
    for (boundaries, slope), words in VERDICTS.items():
        assert ("split" in words, "merge" in words) == (boundaries > 0, boundaries < 0)
        assert ("sharpen" in words, "blur" in words) == (slope > 0, slope < 0)


def test_speed_map_is_the_derivative() -> None:
    """A site that moves as t² has speed 2t over its mean, the even way 1; the last comes first."""
    shown = speed_map(walks_of([lambda t: t**2], logistic(80, 0.5)))
    assert list(shown.rows) == ["logits", "resid_post.0", "walked"]
    n = len(shown.columns)
    middles = [2 * (place + 0.5) / n for place in range(n)]
    assert shown.values[1] == pytest.approx(middles, rel=1e-6)
    assert shown.values[2] == pytest.approx([1.0] * n)
    jump = [value for value in shown.values[0] if value is not None]
    assert max(range(n), key=jump.__getitem__) in (n // 2 - 1, n // 2)
    assert sum(jump) / n == pytest.approx(1)


def test_pairs_that_stand_still_are_left_out() -> None:
    """A pair with the same ends at some site is in no row; with no pair left there is no table."""
    walks = walks_of([logistic(40, 0.5)], logistic(80, 0.5))
    walks.read[Site("resid_post", 0)][2] = 1.0
    table = layer_table(walks)
    assert table.rows.tolist() == [True, True, False, True, True, True]
    assert table.max_slope.shape == (3, 5)
    walks.logits[:] = 0
    with pytest.raises(OptionError, match="no distance can be told"):
        layer_table(walks)


def test_divergences_of_streams_are_refused() -> None:
    """A stream has distances, no divergence."""
    with pytest.raises(OptionError, match="d-sym or d-rel"):
        layer_table(walks_of([], even), "kl")


def test_layers_go_into_the_circuit() -> None:
    """Data are plain JSON with an interval each, the verdict is told, two panels are drawn."""
    circuit = CircuitGraph()
    table = add_layers(circuit, walks_of([logistic(40, 0.5)], noisy(logistic(80, 0.5))))
    data = json.loads(json.dumps(circuit.graph, allow_nan=False))["layers"]
    assert [site["site"] for site in data["sites"]] == list(table.sites)
    assert data["verdict"]["words"] == "regions sharpen"
    low, high = data["verdict"]["max_slope"]["interval"]
    assert low < data["verdict"]["max_slope"]["mean"] < high
    assert data["sites"][1]["max_slope"]["median"] == pytest.approx(10, rel=SAMPLED)
    assert data["sites"][2]["boundaries"] == {"mean": 1, "interval": [1, 1]}
    assert circuit.graph["findings"]["through the layers"].startswith("regions sharpen: from resid")
    heat, curves = panels_of(circuit)
    assert isinstance(heat, Heatmap)
    assert curves.title == "Split or sharpen"


def test_sites_of_a_model() -> None:
    """All later streams are read; the walked stream of a real model comes out as its points."""
    model = load_model("induction")
    site = Site("resid_pre", 1)
    assert [str(s) for s in layer_sites(model, site)] == ["resid_mid.1", "resid_post.1"]
    assert layer_sites(model, Site("resid_post", 0)) == layer_sites(model, site)
    neox = layer_sites(family_model("neox"), Site("resid_pre", 0))
    assert [str(s) for s in neox] == ["resid_post.0", "resid_post.1"]
    tokens = model.tokens(model.corpus(2))
    points = torch.randn(2, 3, model.d_model)
    walks = walk(model, tokens, site, points, read=layer_sites(model, site))
    table = layer_table(walks)
    assert table.sites == ("walked", "resid_mid.1", "resid_post.1", "logits")
    moved = walks.read[Site("resid_post", 1)]
    apart = (moved - moved[:, :1]).norm(dim=-1), (moved - moved[:, -1:]).norm(dim=-1)
    d = apart[0] / (apart[0] + apart[1])
    assert torch.allclose(table.max_slope[2].float(), (d.diff(dim=-1) / 0.5).amax(-1), atol=1e-5)
