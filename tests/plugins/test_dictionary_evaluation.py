"""Evaluation of dictionaries: each number is brute force's, whatever the batches."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions import evaluating
from circuitlab_feature_interactions.controls import centred_r2
from circuitlab_feature_interactions.data import PromptStream, seed_of
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.evaluating import draw, evaluate_dictionaries
from circuitlab_feature_interactions.reconstruction import Losses
from circuitlab_feature_interactions.sites import site_pairs, sites_of
from circuitlab_feature_interactions.sparsity import gini, hoyer
from torch import Tensor

import circuitlab
from circuitlab import Dictionary, DictionaryInfo, OptionError, Site
from circuitlab.zoo.superposition import PLANTED, planted_values

N_TOKENS = 600


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("ioi-mini")


@pytest.fixture(scope="module")
def planted() -> Any:
    return circuitlab.load_model("hand-planted")


def write(model: Any, folder: Path, made: Any, text: str = "mlp.0", length: int = 20) -> Path:
    """A set with ``made(site)``: keyword arguments of each dictionary."""
    pairs = site_pairs(text, model)
    found = {
        site: Dictionary(
            **made(site),
            info=DictionaryInfo(site=str(site), model=model.name, context_length=length),
        )
        for site in sites_of(pairs)
    }
    write_set(DictionarySet(found, pairs, {"about": {}}), folder)
    return folder


def random_parts(d: int, n: int = 40) -> dict[str, Any]:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n)) / math.sqrt(d)
    return {
        "w_e": rows.T,
        "b_e": torch.zeros(n),
        "w_d": rows,
        "b_d": torch.full((d,), 0.1),
        "apply_b_dec_to_input": False,
        "k": 6,
    }


def exact_parts(d: int) -> dict[str, Any]:
    """Both signs of every coordinate: reconstructs everything."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    parts = random_parts(d, 2 * d) | {"w_e": both.T, "w_d": both, "b_d": torch.zeros(d)}
    del parts["k"]
    return parts


def planted_parts(site: Site) -> dict[str, Any]:
    """The true features of hand-planted."""
    side = PLANTED.sources if site.kind == "mlp_in" else PLANTED.targets
    rows = torch.tensor([*side.values()])
    return {
        "w_e": rows.T,
        "b_e": torch.zeros(16),
        "w_d": rows,
        "b_d": torch.zeros(33),
        "apply_b_dec_to_input": False,
        "threshold": torch.full((16,), 0.05),
    }


def prompts(model: Any, seed: int = 0) -> list[Tensor]:
    stream = PromptStream(model, None, None, seed_of(seed, evaluating.EVALUATION))
    return draw(stream, N_TOKENS)[1]


def brute_losses(model: Any, site: Site, write_value: Any) -> list[list[float]]:
    """Loss of each predicted token of each prompt, one prompt at a time."""
    found = []
    for row in prompts(model):
        tokens = model.tokens([row.tolist()])
        run = model.run(tokens, read=[site], logits="all")
        changed = write_value(run[site])
        if changed is not None:
            run = model.run(tokens, write={site: changed}, logits="all")
        chances = run.logits[0].double().log_softmax(-1)
        found.append([-chances[i, token].item() for i, token in enumerate(row.tolist()[1:])])
    return found


@pytest.mark.parametrize("size", [40, 2048])
def test_reconstruction_and_loss_are_brute_force(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """R², L0 and CE recovered of two sites, for small batches and large, to rounding."""
    monkeypatch.setattr(evaluating, "_PASS", size)
    folder = write(model, tmp_path, lambda site: random_parts(model.d_model))
    found = evaluate_dictionaries(model, dictionaries=folder, n_tokens=N_TOKENS)
    assert found["tokens"] == sum(map(len, prompts(model))) >= N_TOKENS
    json.dumps(found, allow_nan=False)
    for kind in ("mlp_in", "mlp_out"):
        site, parts = Site(kind, 0), random_parts(model.d_model)
        values = torch.cat(
            [
                model.run(model.tokens([row.tolist()]), read=[site], logits="none")[site][0]
                for row in prompts(model)
            ]
        ).double()

        def rebuilt(x: Tensor, parts: dict[str, Any] = parts) -> Tensor:
            pre = x @ parts["w_e"].to(x)
            top = pre.topk(6, -1)
            z = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
            return z @ parts["w_d"].to(x) + parts["b_d"].to(x)

        numbers = found["sites"][str(site)]
        missed = (values - rebuilt(values)).square().sum()
        r2 = 1 - missed / (values - values.mean(0)).square().sum()
        assert numbers["r2"] == pytest.approx(r2.item(), abs=1e-5)
        low, high = numbers["r2_interval"]
        assert low < numbers["r2"] < high
        clean, rec, zero = (
            sum(map(sum, brute_losses(model, site, change)))
            for change in (lambda _: None, rebuilt, torch.zeros_like)
        )
        ce = numbers["ce"]
        assert ce["tokens"] == sum(len(row) - 1 for row in prompts(model))
        assert ce["clean"] == pytest.approx(clean / ce["tokens"], abs=1e-4)
        assert ce["reconstructed"] == pytest.approx(rec / ce["tokens"], abs=1e-4)
        assert ce["zero"] == pytest.approx(zero / ce["tokens"], abs=1e-4)
        assert ("recovered" in ce) == (zero > clean)
        low, high = ce["kl_recovered_interval"]
        assert low < ce["kl_recovered"] < high


def test_recovered_is_a_ratio_of_sums() -> None:
    """A short prompt does not count as much as a long one; where zero is better there is none."""
    columns = [[2.0, 40.0], [3.0, 42.0], [0.5, 3.0], [4.0, 60.0], [2.0, 10.0], [1.0, 20.0]]
    found = Losses(*(torch.tensor(column).double() for column in columns)).summary()
    assert found["recovered"] == pytest.approx((64 - 45) / (64 - 42))
    assert found["kl_recovered"] == pytest.approx(1 - 3.5 / 12)
    assert (found["clean"], found["tokens"]) == (pytest.approx(2.0), 21)
    columns[0], columns[3] = columns[3], columns[0]
    reverse = Losses(*(torch.tensor(column).double() for column in columns)).summary()
    assert "recovered" not in reverse
    assert reverse["kl_recovered"] == found["kl_recovered"]


def test_divergence_is_brute_force(model: Any, tmp_path: Path) -> None:
    """KL with zero in place is that of the two distributions, token by token."""
    folder = write(model, tmp_path, lambda site: random_parts(model.d_model))
    found = evaluate_dictionaries(model, dictionaries=folder, n_tokens=N_TOKENS)
    site, total, n = Site("mlp_out", 0), 0.0, 0
    for row in prompts(model):
        tokens = model.tokens([row.tolist()])
        clean = model.run(tokens, read=[site], logits="all")
        changed = model.run(tokens, write={site: torch.zeros_like(clean[site])}, logits="all")
        p, q = (run.logits[0, :-1].double().log_softmax(-1) for run in (clean, changed))
        total, n = total + float((p.exp() * (p - q)).sum()), n + len(row) - 1
    assert found["sites"]["mlp_out.0"]["ce"]["kl_zero"] == pytest.approx(total / n, rel=1e-3)


def test_losses_by_position_are_brute_force(model: Any, tmp_path: Path) -> None:
    """With per_position a bucket has the mean loss of its positions, in prompts of any length."""
    folder = write(model, tmp_path, lambda site: random_parts(model.d_model))
    found = evaluate_dictionaries(model, dictionaries=folder, n_tokens=N_TOKENS, per_position=True)
    losses = brute_losses(model, Site("mlp_out", 0), lambda _: None)
    buckets = found["sites"]["mlp_out.0"]["positions"]
    assert [bucket["first"] for bucket in buckets] == [0, 1, 2, 4, 8, 16]
    for bucket in buckets:
        part = [x for row in losses for x in row[bucket["first"] : bucket["last"] + 1]]
        if part:
            assert bucket["ce"]["tokens"] == len(part)
            assert bucket["ce"]["clean"] == pytest.approx(sum(part) / len(part), abs=1e-4)


def test_perfect_and_empty_dictionaries(model: Any, tmp_path: Path) -> None:
    """What reconstructs all recovers all; what writes zero recovers nothing."""
    exact = write(model, tmp_path / "a", lambda site: exact_parts(model.d_model))
    nothing = {"w_d": torch.zeros(40, model.d_model), "b_d": torch.zeros(model.d_model)}
    empty = write(model, tmp_path / "b", lambda site: random_parts(model.d_model) | nothing)
    for folder, recovered in ((exact, 1.0), (empty, 0.0)):
        found = evaluate_dictionaries(model, dictionaries=folder, n_tokens=200)
        numbers = found["sites"]["mlp_out.0"]
        assert numbers["ce"]["kl_recovered"] == pytest.approx(recovered, abs=1e-4)
        if recovered:
            assert numbers["r2"] == pytest.approx(1, abs=1e-6)
            assert found["pairs"]["mlp.0"]["error_share"] < 1e-4


def test_longer_prompts_than_in_training_are_told(model: Any, tmp_path: Path) -> None:
    """A set of a shorter context length gets a warning with both lengths."""
    folder = write(model, tmp_path, lambda site: random_parts(model.d_model), length=8)
    found = evaluate_dictionaries(model, dictionaries=folder, n_tokens=50)
    assert any("8 tokens per prompt" in text and "20" in text for text in found["warnings"])


def test_planted_graph_is_as_sparse_as_it_is(planted: Any, tmp_path: Path) -> None:
    """With the true features, edges per token and the set of pairs are those of the known graph."""
    folder = write(planted, tmp_path, planted_parts, length=12)
    found = evaluate_dictionaries(planted, dictionaries=folder, n_tokens=N_TOKENS)
    edges, seen = 0, set()
    for row in prompts(planted):
        words = planted.tokenizer.convert_ids_to_tokens(row.tolist())[1:]
        for end in range(1, len(words) + 1):
            shown = words[:end]
            values = planted_values(" ".join(shown))
            for source, target in PLANTED.edges:
                if source in shown and values[int(target[1:])] > 0:
                    edges += 1
                    seen.add((source, target))
    numbers = found["pairs"]["mlp.0"]
    assert numbers["edges_per_token"] == pytest.approx(edges / found["tokens"])
    assert numbers["edges"] == len(seen) <= len(PLANTED.edges)
    assert numbers["error_share"] < 1e-3
    assert found["sites"]["mlp_out.0"]["r2"] == pytest.approx(1, abs=1e-5)


def test_controls_do_worse_than_the_truth(planted: Any, tmp_path: Path) -> None:
    """Random directions, PCA and k-means explain less; shuffled pairs are as many at a token."""
    folder = write(planted, tmp_path, planted_parts, length=12)
    asked = {"dictionaries": folder, "n_tokens": 2000, "seed": 1}
    found = evaluate_dictionaries(planted, **asked, controls=True, independent=folder)
    controls = found["controls"]
    assert set(controls) == {
        "independent", "random-directions", "pca", "ica", "k-means", "shuffled",
    }  # fmt: skip
    json.dumps(found, allow_nan=False)
    for name in ("random-directions", "pca", "k-means"):
        for site, numbers in controls[name]["sites"].items():
            assert numbers["r2"] < found["sites"][site]["r2"] - 0.02, (name, site)
    own, null = found["pairs"]["mlp.0"], controls["shuffled"]["pairs"]["mlp.0"]
    assert null["edges_per_token"] == own["edges_per_token"]
    assert null["error_share"] == own["error_share"]
    assert null["edges_90"] > 3 * own["edges_90"]
    assert null["gini"] < own["gini"]
    assert own["edges_90"] < controls["random-directions"]["pairs"]["mlp.0"]["edges_90"]
    assert controls["independent"] == {"sites": found["sites"], "pairs": found["pairs"]}
    assert found == evaluate_dictionaries(planted, **asked, controls=True, independent=folder)


def test_blocks_are_evaluated_too(model: Any, tmp_path: Path) -> None:
    """Streams around a block have the same numbers, and interactions from all positions."""
    folder = write(model, tmp_path, lambda site: random_parts(model.d_model), "block.1")
    found = evaluate_dictionaries(model, dictionaries=folder, n_tokens=100)
    assert set(found["sites"]) == {"resid_pre.1", "resid_pre.2"}
    numbers = found["pairs"]["block.1"]
    assert numbers["tokens"] == found["tokens"]
    assert 0 < numbers["edges_per_token"] <= 36 * 20
    assert 0 < numbers["edges_90"] <= 1600


def test_no_tokens_are_refused(model: Any, tmp_path: Path) -> None:
    """Less than one token is no evaluation."""
    with pytest.raises(OptionError, match="--n-tokens 0"):
        evaluate_dictionaries(model, dictionaries=tmp_path, n_tokens=0)


def test_fresh_prompts_are_not_those_before(model: Any) -> None:
    """Drawing on from the number after the last one gives the prompts that follow."""
    stream = PromptStream(model, None, None, 3)
    number, first = draw(stream, 100)
    _, second = draw(stream, 100, first=number)
    assert torch.equal(second[0], stream[len(first)].long())


def test_gini_and_hoyer_meet_their_definitions() -> None:
    """Gini is the mean absolute difference over twice the mean; both count the zeros."""
    sizes = torch.tensor([3.0, 1.0, 4.0])
    whole = torch.cat([sizes, torch.zeros(5)]).double()
    mean = (whole[:, None] - whole[None]).abs().mean() / (2 * whole.mean())
    assert gini(sizes, 8) == pytest.approx(mean.item())
    ratio = whole.sum() / whole.square().sum().sqrt()
    assert hoyer(sizes, 8) == pytest.approx(((math.sqrt(8) - ratio) / (math.sqrt(8) - 1)).item())
    assert gini(torch.ones(4), 4) == pytest.approx(0)
    assert hoyer(torch.ones(4), 4) == pytest.approx(0)
    assert (gini(torch.ones(1), 10), hoyer(torch.ones(1), 10)) == pytest.approx((0.9, 1))


def test_centred_r2_does_not_see_an_offset() -> None:
    """A constant added to both sides changes nothing, and a bias of the reconstruction counts."""
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).double()
    noisy = x + 0.5 * torch.randn(100, 4, generator=torch.Generator().manual_seed(1)).double()
    values = [centred_r2(x + offset, noisy + offset) for offset in (0.0, 3.0, 30.0)]
    assert all(a == pytest.approx(b) for a, b in pairwise(values))
    assert centred_r2(x, noisy + 1) < values[0] - 0.5
