"""Sets of dictionaries side by side: numbers are brute force's, and copies do not differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions import compare_command, comparing
from circuitlab_feature_interactions.comparing import Comparison, name_settings, numbers_of
from circuitlab_feature_interactions.data import PromptStream
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, read_set, write_set
from circuitlab_feature_interactions.evaluating import (
    draw,
    evaluate_dictionaries,
    make_batches,
    measure,
    measure_pairs,
    measure_sites,
)
from circuitlab_feature_interactions.frontier import Drawn
from circuitlab_feature_interactions.intervals import GROUPS, draw_groups, group_prompts
from circuitlab_feature_interactions.sites import site_pairs, sites_of
from circuitlab_feature_interactions.sparsity import TAU
from torch import Tensor

import circuitlab
from circuitlab import Dictionary, DictionaryInfo, OptionError, Site

LENGTH = 20


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("ioi-mini")


def make(model: Any, text: str, k: int, seed: int, n: int = 60) -> dict[Site, Dictionary]:
    """Random dictionaries that reconstruct a part, more with a larger k."""
    found = {}
    for number, site in enumerate(sites_of(site_pairs(text, model))):
        generator = torch.Generator().manual_seed(100 * seed + number)
        rows = torch.randn(n, model.d_model, generator=generator) / math.sqrt(model.d_model)
        found[site] = Dictionary(
            w_e=rows.T,
            b_e=torch.zeros(n),
            w_d=rows,
            b_d=torch.zeros(model.d_model),
            apply_b_dec_to_input=True,
            k=k,
            info=DictionaryInfo(site=str(site), model=model.name, context_length=LENGTH),
        )
    return found


def write(
    model: Any, folder: Path, *, k: int, seed: int = 0, like: int | None = None, **about: Any
) -> Path:
    """A set that says it was trained with these settings; ``like``: the seed of its numbers."""
    text = about.get("sites", "mlp.0")
    facts = {"sites": text, "k": k, "seed": seed, "interaction": "none", "strength": 0.0} | about
    made = make(model, text, k, seed if like is None else like)
    write_set(DictionarySet(made, site_pairs(text, model), {"about": facts}), folder)
    return folder


def prompts(model: Any, n_tokens: int = 200) -> list[Tensor]:
    return draw(PromptStream(model, None, None, 5), n_tokens)[1]


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mlp.0", "block.1"])
def test_a_prompt_that_counts_twice_is_a_prompt_given_twice(model: Any, text: str) -> None:
    """Numbers under weights are those of the prompts repeated so often; so every interval is."""
    dictionaries, pairs = make(model, text, 5, 0), site_pairs(text, model)
    rows = sorted(prompts(model), key=len)
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 3, (len(rows),), generator=generator)
    once = measure(model, pairs, dictionaries, make_batches(rows, model))
    many = [row for row, n in zip(rows, counts.tolist(), strict=True) for _ in range(n)]
    batches = make_batches(many, model)
    # The mean that an attribution is a share of is taken as known.
    again = measure_pairs(model, pairs, dictionaries, once.sites, batches)
    wanted_sites = measure_sites(model, sites_of(pairs), dictionaries, batches)
    assert len(rows) < GROUPS
    in_groups = torch.zeros(1, len(rows)).double()
    in_groups[0, group_prompts(len(rows))] = counts.double()
    for pair, sums in once.pairs.items():
        told = again[pair].summary()
        for name, values in sums.numbers(in_groups).items():
            assert float(values) == pytest.approx(told[name], rel=1e-6, abs=1e-9), name
        assert ("skip_share" in told) == (pair.route == "block")
    for site, sums in once.sites.items():
        told = wanted_sites[site].summary()
        found = sums.numbers(counts[None].double())
        assert float(found["r2"]) == pytest.approx(told["r2"], abs=1e-6)
        assert float(found["kl"]) == pytest.approx(told["ce"]["kl_recovered"], abs=1e-6)
        assert ("ce" in found) == ("recovered" in told["ce"])
        if "ce" in found:
            assert float(found["ce"]) == pytest.approx(told["ce"]["recovered"], abs=1e-6)


@torch.no_grad()
def test_shares_of_the_mass_are_brute_force(model: Any) -> None:
    """What the stream carries, what errors make, and the strongest pairs, summed one by one."""
    from circuitlab_feature_interactions.interactions import make_route

    dictionaries, pair = make(model, "block.1", 4, 2), site_pairs("block.1", model)[0]
    rows = prompts(model)
    measured = measure(model, [pair], dictionaries, make_batches(rows, model))
    source, target = dictionaries[pair.source], dictionaries[pair.target]
    scale = measured.sites[pair.target].means
    route = make_route(model, pair)
    carried = errors = edges = tokens = 0.0
    table = torch.zeros(target.n, source.n).double()
    for row in rows:
        x = model.run(model.tokens([row.tolist()]), read=[pair.source], logits="none")[pair.source]
        found = route.attributions(source, target, x, with_error=True)
        for t in range(len(row)):
            for a, i in enumerate(found.target_index[t].tolist()):
                if not scale[i] > 0:
                    continue
                carried += float((found.skip[t, a].double() / scale[i]).abs().sum())
                for b, j in enumerate(found.source_index[t].tolist()):
                    size = abs(float(found.values[t, a, b])) / float(scale[i])
                    errors += size * (j == source.n)
                    if j < source.n:
                        table[i, j] += size
                        edges += size > TAU
        tokens += len(row)
    told, mass = measured.pairs[pair].summary(), float(table.sum())
    assert told["tokens"] == tokens
    assert told["edges_per_token"] == pytest.approx(edges / tokens, rel=1e-3)
    assert told["skip_share"] == pytest.approx(carried / (carried + mass + errors), rel=1e-4)
    assert told["error_share"] == pytest.approx(errors / (mass + errors), rel=1e-4)
    strongest = table.flatten().sort(descending=True).values
    assert told["top_share"] == pytest.approx(float(strongest[:100].sum()) / mass, rel=1e-4)
    held = strongest.cumsum(0) / mass
    assert told["edges_90"] == int((held < 0.9).sum()) + 1


def test_evaluation_has_intervals_that_hold_the_number(model: Any, tmp_path: Path) -> None:
    """Every number of interactions has one but the count, which grows with the prompts."""
    found = evaluate_dictionaries(model, dictionaries=write(model, tmp_path, k=5), n_tokens=200)
    told = found["pairs"]["mlp.0"]
    for name in ("edges_per_token", "edges_90", "top_share", "gini", "hoyer", "error_share"):
        low, high = told[f"{name}_interval"]
        assert low < told[name] < high, name
    assert "edges_interval" not in told
    tighter = evaluate_dictionaries(model, dictionaries=tmp_path, n_tokens=3200)["pairs"]["mlp.0"]
    widths = [h - low for low, h in (t["edges_per_token_interval"] for t in (told, tighter))]
    assert widths[1] < widths[0] / 2


def test_numbers_are_means_over_sites_and_pairs(model: Any) -> None:
    """Of several pairs each number is the mean; of each site its own is told too."""
    pairs, dictionaries = site_pairs("mlp", model), make(model, "mlp", 4, 1)
    rows = prompts(model)
    measured = measure(model, pairs, dictionaries, make_batches(rows, model))
    found = numbers_of(measured, len(rows))
    sites = [float(found[f"r2 {site}"][0]) for site in sites_of(pairs)]
    assert float(found["r2"][0]) == pytest.approx(sum(sites) / len(sites))
    summaries = [measured.pairs[pair].summary() for pair in pairs]
    for name in ("edges_per_token", "gini", "error_share"):
        wanted = sum(told[name] for told in summaries) / len(pairs)
        assert float(found[name][0]) == pytest.approx(wanted)
    assert float(found["l0"][0]) == pytest.approx(4)


# --- settings -------------------------------------------------------------------------------------


def test_settings_are_named_by_what_differs() -> None:
    """The penalty and what varies; without one the penalty's own settings say nothing."""
    base = {"k": 8, "steps": 100, "seed": 0, "warmup": 0.05, "estimator": "exact"}
    own = base | {"interaction": "l1", "strength": 0.01}
    none = base | {"interaction": "none", "strength": 0.003, "estimator": "rows:4", "seed": 1}
    small = none | {"k": 4}
    names = name_settings([own, none, small, own | {"strength": 0.0}, own | {"seed": 3}])
    assert names == [
        ("l1 0.01, k 8", "k 8"),
        ("independent, k 8", "k 8"),
        ("independent, k 4", "k 4"),
        ("independent, k 8", "k 8"),
        ("l1 0.01, k 8", "k 8"),
    ]
    assert [name for name, _ in name_settings([own, own | {"estimator": "rows:2"}])] == [
        "l1 0.01 exact", "l1 0.01 rows:2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sets(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Independent sets of two k, and copies of them that say they were penalised."""
    folder = tmp_path_factory.mktemp("sets")
    penalty = {"interaction": "l1", "strength": 0.01}
    for seed in (0, 1):
        write(model, folder / f"a{seed}", k=3, seed=seed)
        write(model, folder / f"b{seed}", k=12, seed=seed)
        write(model, folder / f"p{seed}", k=3, seed=seed, **penalty)
        write(model, folder / f"q{seed}", k=6, seed=seed, **penalty)
    return folder


def compare(model: Any, where: Any, folder: Path, **options: Any) -> dict[str, Any]:
    options = {"n_tokens": 120, "output": folder / "x.plot.svg", **options}
    return compare_command.compare_dictionaries(model, dictionaries=str(where), **options)


def test_copies_do_not_differ(model: Any, sets: Path, tmp_path: Path) -> None:
    """A penalised set with an independent one's numbers differs by 0 at equal reconstruction."""
    found = compare(model, sets, tmp_path, output=tmp_path / "x.json")
    whole = circuitlab.read_circuit(tmp_path / "x.json").graph["comparison"]
    told = whole["at_equal_reconstruction"]["l1 0.01, k 3"]
    numbers = {name: value for name, value in told.items() if not name.endswith("_interval")}
    assert {"r2", "edges_per_token", "gini", "top_share", "error_share"} <= set(numbers)
    assert max(map(abs, numbers.values())) < 1e-9
    assert whole["at_same_settings"]["l1 0.01, k 3"] == told
    assert "l1 0.01, k 6" not in whole["at_same_settings"]
    assert set(found["settings"]["independent, k 3"]) < set(whole["settings"]["independent, k 3"])
    json.dumps(found, allow_nan=False)


def test_a_setting_between_two_is_set_beside_their_line(
    model: Any, sets: Path, tmp_path: Path
) -> None:
    """The difference and its interval are those of the line through the neighbours, by hand."""
    found = compare(model, sets, tmp_path)
    settings, name = found["settings"], "edges_per_token"
    low, own, high = (settings[key] for key in (
        "independent, k 3", "l1 0.01, k 6", "independent, k 12",
    ))  # fmt: skip
    assert low["r2"] < own["r2"] < high["r2"]
    share = (own["r2"] - low["r2"]) / (high["r2"] - low["r2"])
    line = low[name] + share * (high[name] - low[name])
    told = found["at_equal_reconstruction"]["l1 0.01, k 6"]
    assert told[name] == pytest.approx(own[name] - line)
    assert told[f"{name}_share"] == pytest.approx(own[name] / line - 1)
    assert told["r2"] == pytest.approx(0, abs=1e-9)
    ends = told[f"{name}_share_interval"]
    assert ends[0] < told[f"{name}_share"] < ends[1]
    text = found["findings"]["l1 0.01, k 6"]
    assert f"{abs(told[f'{name}_share']):.1%}" in text
    assert found["equal"].startswith("the same centred R², mean over sites and over the 2 seeds")


def test_the_picture_has_every_setting(model: Any, sets: Path, tmp_path: Path) -> None:
    """Settings as points by kind, both frontiers as curves with bands, differences as bars."""
    some = ",".join(str(sets / name) for name in ("a0", "b0", "p0", "q0"))
    compare(model, some, tmp_path, output=tmp_path / "x.json", controls=True)
    circuit = circuitlab.read_circuit(tmp_path / "x.json")
    first, curves, bars, errors, beside = circuitlab.panels_of(circuit)
    assert {point.name: point.kind for point in first.points} == {
        "independent, k 3": "independent", "independent, k 12": "independent",
        "l1 0.01, k 3": "penalised", "l1 0.01, k 6": "penalised",
    }  # fmt: skip
    assert [curve.name for curve in curves.curves] == ["penalised", "independent"]
    assert all(
        low < mean < high
        for curve in curves.curves
        for low, mean, high in zip(curve.lo, curve.mean, curve.hi, strict=True)
        if mean is not None and low is not None
    )
    assert [bar.name for bar in bars.bars] == [bar.name for bar in errors.bars]
    assert {p.name for p in beside.points if p.kind == "control"} >= {
        "pca", "ica", "random-directions",
    }  # fmt: skip
    again = compare(model, some, tmp_path, controls=True)
    assert (tmp_path / "x.plot.svg").read_text().startswith("<?xml")
    told = circuit.graph["comparison"]["at_equal_reconstruction"]
    for name, numbers in again["at_equal_reconstruction"].items():
        assert numbers.items() <= told[name].items(), "the same sets and seed, the same numbers"


def test_what_is_beyond_the_frontier_is_told(model: Any, sets: Path, tmp_path: Path) -> None:
    """No number where no independent setting reconstructs as much; the remedy gives one."""
    some = f"{sets / 'a0'},{sets / 'q0'}"
    found = compare(model, some, tmp_path)
    text = found["at_equal_reconstruction"]["l1 0.01, k 6"]
    assert "reconstructs more" in text
    assert "a larger k" in text
    assert found["findings"]["l1 0.01, k 6"] == text
    remedied = compare(model, f"{some},{sets / 'b0'}", tmp_path)
    assert isinstance(remedied["at_equal_reconstruction"]["l1 0.01, k 6"], dict)


# --- what is refused ------------------------------------------------------------------------------


def test_comparisons_that_cannot_be_are_refused(model: Any, sets: Path, tmp_path: Path) -> None:
    """One kind alone, a set twice, no set, other sites, a number that is not there, a suffix."""
    with pytest.raises(OptionError, match=r"without a penalty.*--interaction none"):
        compare(model, f"{sets / 'p0'},{sets / 'q0'}", tmp_path)
    with pytest.raises(OptionError, match=r"with a penalty.*--interaction l1"):
        compare(model, f"{sets / 'a0'},{sets / 'b0'}", tmp_path)
    with pytest.raises(OptionError, match="names a set twice"):
        compare(model, f"{sets / 'a0'},{sets}", tmp_path)
    with pytest.raises(OptionError, match="holds no set of dictionaries"):
        compare(model, f"{sets / 'a0'},{tmp_path}", tmp_path)
    copy = write(model, tmp_path / "copy", k=3, seed=0)
    with pytest.raises(OptionError, match="the same training, 'independent, k 3' of seed 0"):
        compare(model, f"{sets},{copy}", tmp_path)
    other = write(model, tmp_path / "other", k=3, sites="mlp.1")
    with pytest.raises(OptionError, match=r"is of mlp.1 and .* of mlp.0"):
        compare(model, f"{sets},{other}", tmp_path)
    with pytest.raises(OptionError, match="no suffix of a comparison"):
        compare(model, sets, tmp_path, output=tmp_path / "x.svg")
    with pytest.raises(OptionError, match="--n-tokens 0"):
        compare(model, sets, tmp_path, n_tokens=0)


def test_a_set_without_its_settings_is_refused(model: Any, sets: Path, tmp_path: Path) -> None:
    """One that does not say how it was trained belongs to no setting."""
    pairs = site_pairs("mlp.0", model)
    write_set(DictionarySet(make(model, "mlp.0", 3, 0), pairs, {"about": {}}), tmp_path / "bare")
    with pytest.raises(OptionError, match="does not say how it was trained"):
        compare(model, f"{sets},{tmp_path / 'bare'}", tmp_path)


def test_loss_that_zero_does_not_harm_is_refused() -> None:
    """Where no loss can be recovered it cannot be made equal; kl, the remedy, can."""
    numbers = {name: torch.ones(1001).double() for name in ("r2", "kl", "edges_per_token")}
    drawn = [Drawn(str(p), "", p, 0, numbers) for p in (True, False)]
    with pytest.raises(OptionError, match="--reconstruction ce cannot be told"):
        Comparison.of(drawn, "ce")
    assert "divergence" in compare_command.what_is_equal(Comparison.of(drawn, "kl"))


def test_sets_are_read_once_each(model: Any, sets: Path) -> None:
    """A folder of sets stands for all in it, by name; the model's own sets have no warning."""
    folders = comparing.find_folders(str(sets))
    assert [folder.name for folder in folders] == ["a0", "a1", "b0", "b1", "p0", "p1", "q0", "q1"]
    bench = comparing.Bench.read(model, folders[:2], None, 100, None, 0)
    assert bench.warnings == tuple(
        dict.fromkeys(text for one in folders[:2] for text in read_set(one, model).warnings)
    )
    assert bench.prompts == len(draw_groups(bench.prompts)[0])
