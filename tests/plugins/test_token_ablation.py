"""Token ablation equals plain runs of ablated prompts, one at a time; gates are those known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from circuitlab_path_patching.features import Feature, parse_site, read_feature
from circuitlab_path_patching.tokens import effects as engine
from circuitlab_path_patching.tokens.ablation import token_ablation
from circuitlab_path_patching.tokens.effects import How, TokenEffects, token_effects
from random_tasks import random_task
from safetensors.torch import save_file
from torch import Tensor

from circuitlab import (
    EncodedTask,
    NumericsError,
    OptionError,
    PromptPair,
    Run,
    Site,
    SiteError,
    Task,
    TracedModel,
    load_model,
)

#: float64 sums of some hundred terms, taken in another order.
TOLERANCE = 1e-11
LENGTHS = [6, 3, 5, 1]
HOWS: tuple[How, ...] = ("remove", "replace", "knock-out")
#: A token that is in none of the random prompts.
NEW = 39


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(2, 2, 16, vocab=40)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


@torch.no_grad()
def plain(module: Any, ids: list[int], gone: Sequence[int], how: str, new: int = NEW) -> Any:
    """The model's output for one prompt, unpadded, without the tokens at the places ``gone``."""
    places = list(range(len(ids)))
    if how == "replace":
        ids = [new if place in gone else token for place, token in enumerate(ids)]
    else:
        kept = [place for place in places if place not in gone]
        ids = [ids[place] for place in kept]
        places = kept if how == "knock-out" else list(range(len(kept)))
    return module(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([places]),
        output_hidden_states=True,
    )


def ids_of(pairs: EncodedTask, row: int) -> list[int]:
    return pairs.clean.ids[row][pairs.clean.mask[row]].tolist()


def brute_force(module: Any, pairs: EncodedTask, subset: Sequence[int], how: str) -> Tensor:
    """Score of a set of positions from the end in each pair, NaN where it cannot be ablated."""
    scores = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    for row in range(len(pairs)):
        ids = ids_of(pairs, row)
        if min(subset) < -len(ids) or (max(subset) == -1 and how != "replace"):
            continue
        gone = [len(ids) + position for position in subset]
        clean, changed = (plain(module, ids, g, how).logits[:, -1] for g in ([], gone))
        pair = pairs.rows([row])
        scores[row] = (pair.score(changed, clean) - pair.score(clean, clean))[0]
    return scores


def measured(effects: TokenEffects, subset: tuple[int, ...]) -> Tensor:
    return torch.where(effects.has(subset), effects.scores[subset], torch.nan)


@pytest.mark.parametrize("metric", ["logit-difference", "answer-log-prob", "kl-divergence"])
@pytest.mark.parametrize("how", HOWS)
def test_scores_are_those_of_plain_runs(
    module: Any, model: TracedModel, how: How, metric: str
) -> None:
    """Every set of up to three tokens of prompts of four lengths, in passes of any size."""
    pairs = model.encode(random_task(LENGTHS, metric))
    last = 0 if how == "replace" else 1
    sets = [s for k in (1, 2, 3) for s in combinations(range(-6, -last), k)]
    expected = {subset: brute_force(module, pairs, subset, how) for subset in sets}
    assert max(float(scores.nansum().abs()) for scores in expected.values()) > 1e-3
    for size in (1, 7, None):
        effects = token_effects(
            model, pairs, how=how, order=3, replacement=NEW, batch_size=size, top=6
        )
        assert set(effects.scores) == set(sets)
        for subset in sets:
            found = measured(effects, subset)
            assert torch.allclose(found, expected[subset], 0, TOLERANCE, equal_nan=True), subset


@pytest.mark.parametrize("how", HOWS)
def test_dividends_are_inclusion_and_exclusion(model: TracedModel, how: How) -> None:
    """Written out for two and three tokens; over all sets within a set they sum to its score."""
    pairs = model.encode(random_task([5, 5]))
    effects = token_effects(model, pairs, how=how, order=4, replacement=NEW)
    v = effects.scores
    for a, b, c in combinations(effects.positions, 3):
        pair = v[a, b] - v[(a,)] - v[(b,)]
        assert (effects.dividend((a, b)) - pair).abs().max() < TOLERANCE
        triple = v[a, b, c] - v[a, b] - v[a, c] - v[b, c] + v[(a,)] + v[(b,)] + v[(c,)]
        assert (effects.dividend((a, b, c)) - triple).abs().max() < TOLERANCE
    for subset in v:
        within = [s for k in range(1, 5) for s in combinations(subset, k)]
        total = torch.stack([effects.dividend(part) for part in within]).sum(0)
        assert (total - v[subset]).abs().max() < TOLERANCE
    table = effects.table((-3, -2))
    rows = [v[-3, -2], v[(-2,)], v[(-3,)], torch.zeros(2)]
    assert (table - effects.clean - torch.stack(rows)).abs().max() < TOLERANCE


def test_corrupt_tokens_replace(module: Any, model: TracedModel) -> None:
    """Where clean and corrupt differ, the corrupt token stands in; all at once are that prompt."""
    task = Task("t", (PromptPair((3, 4, 5, 6), (3, 8, 9, 6), (1,), (2,)),))
    pairs = model.encode(task)
    effects = token_effects(model, pairs, order=2)
    for subset, ids in (((-3,), [3, 8, 5, 6]), ((-2,), [3, 4, 9, 6]), ((-3, -2), [3, 8, 9, 6])):
        logits, clean = (plain(module, i, [], "replace").logits[:, -1] for i in (ids, [3, 4, 5, 6]))
        expected = pairs.score(logits, clean) - pairs.score(clean, clean)
        assert (effects.scores[subset] - expected).abs() < TOLERANCE
    assert (effects.scores[-3, -2] - (effects.corrupt - effects.clean)).abs() < TOLERANCE


def test_drawn_tokens_are_the_tasks_own(
    module: Any, model: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that both prompts share is replaced by others, from other positions, and averaged."""
    task = Task(
        "t",
        (
            PromptPair((10, 4, 5, 6), (10, 8, 5, 6), (1,), (2,)),
            PromptPair((11, 4, 7, 6), (11, 9, 7, 6), (1,), (2,)),
        ),
    )
    pairs = model.encode(task)
    prompts: list[list[int]] = []

    def noted(tokens: Any, *rest: Any) -> Any:
        changed = ablate(tokens, *rest)
        prompts.extend(changed.ids.tolist())
        return changed

    ablate = engine.ablate
    monkeypatch.setattr(engine, "ablate", noted)
    effects = token_effects(model, pairs, order=1, draws=40)
    drawn = [prompt[2] for prompt in prompts if prompt[0] == 10 and prompt[2] != 5]
    assert len(drawn) == 40
    assert set(drawn) == {10, 11, 4, 8, 9, 6}, "all tokens of other positions, not 5 and not 7"
    total = 0.0
    clean = plain(module, [10, 4, 5, 6], [], "replace").logits[:, -1]
    one = pairs.rows([0])
    for token in drawn:
        logits = plain(module, [10, 4, token, 6], [], "replace").logits[:, -1]
        total += float(one.score(logits, clean) - one.score(clean, clean))
    assert abs(float(effects.scores[(-2,)][0]) - total / 40) < TOLERANCE
    assert len([p for p in prompts if p[0] == 10 and p[1] != 4]) == 1, "corrupt differs: no draw"
    again = token_effects(model, pairs, order=1, draws=40, batch_size=3)
    assert (again.scores[(-2,)] - effects.scores[(-2,)]).abs().max() < TOLERANCE
    other = token_effects(model, pairs, order=1, draws=3, seed=1)
    assert (other.scores[(-2,)] - effects.scores[(-2,)]).abs().max() > 1e-6


def test_special_tokens_are_not_drawn() -> None:
    """BOS begins every prompt and stands nowhere else, so it replaces nothing."""
    model = load_model("hand-induction")
    pairs = model.encode(Task.from_pair("c f g c", "a f g a", "f", "g"))
    new, drawn, able = engine._replacements(model, pairs, pairs.clean.mask, None, 50, 0)
    assert drawn.tolist() == [[True, False, True, True, False]]
    assert able.all()
    assert not torch.isin(new[:, drawn], torch.tensor(model.tokenizer.all_special_ids)).any()


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_feature_is_a_dot_product(
    module: Any, model: TracedModel, how: How, tmp_path: Path
) -> None:
    """It equals that of plain hidden states; tokens after it are left out, it is only replaced."""
    direction = torch.arange(16.0, dtype=torch.float64).cos()
    save_file({"d": direction}, tmp_path / "d.safetensors")
    pairs = model.encode(random_task([6, 3, 5]))
    feature = read_feature("resid_post.0[-2]", tmp_path / "d.safetensors", model, pairs)
    effects = token_effects(model, pairs, how=how, order=1, replacement=NEW, feature=feature)
    assert max(effects.positions) == (-2 if how == "replace" else -3)

    def value(ids: list[int], gone: list[int]) -> Tensor:
        states: Tensor = plain(module, ids, gone, how).hidden_states[1][0, -2]
        return states @ direction

    for row in range(3):
        ids = ids_of(pairs, row)
        for position in effects.positions:
            if effects.has((position,))[row]:
                expected = value(ids, [len(ids) + position]) - value(ids, [])
                found = effects.scores[(position,)][row]
                assert abs(float(found - expected)) < TOLERANCE
    assert max(abs(effects.mean((p,))) for p in effects.positions) > 1e-3


def test_feature_of_a_head_and_from_the_start(model: TracedModel, tmp_path: Path) -> None:
    """In prompts of one length a position may be counted from the start; heads have their width."""
    save_file({"d": torch.ones(8)}, tmp_path / "d.safetensors")
    pairs = model.encode(random_task([6, 6]))
    feature = read_feature("z.1.h1[3]", tmp_path / "d.safetensors", model, pairs)
    assert feature.name == "z.1.h1[-3]"
    effects = token_effects(model, pairs, how="knock-out", order=1, feature=feature)
    site = Site("z", 1, 1, 3)
    clean = model.run(pairs.clean, read=[site])[site].sum(-1)
    assert (effects.clean - clean).abs().max() < TOLERANCE
    assert effects.positions == (-6, -5, -4)


def test_any_function_of_a_run_is_a_feature(model: TracedModel) -> None:
    """In Python: the norm of what an MLP writes; a wrong shape, or NaN, is refused."""
    site = Site("mlp_out", 0)

    def norm(run: Run) -> Tensor:
        return run[site][:, -1].norm(dim=-1)

    task = random_task([5, 5])
    circuit = token_ablation(model, task, how="knock-out", feature=Feature("norm", (site,), norm))
    assert circuit.nodes["norm"] == {"kind": "feature", "layer": 0}
    assert "norm(tokens ablated)" in circuit.graph["score"]
    run = model.run(model.encode(task).clean, read=[site])
    assert torch.isfinite(norm(run)).all()
    with pytest.raises(OptionError, match=r"shape \[2, 5\] for 2 prompts"):
        token_ablation(model, task, feature=Feature("x", (site,), lambda run: run[site].sum(-1)))
    with pytest.raises(NumericsError, match="x is NaN or infinite in an ablated prompt of pair 1"):
        token_ablation(model, task, feature=Feature("x", (site,), lambda run: norm(run) / 0))


@pytest.mark.parametrize(
    "text", ["resid_post.1[-1]", "z.1.h0[3]", "embed[0]", "mlp_out.11", "embed"]
)
def test_sites_are_read_as_they_are_written(text: str) -> None:
    """``parse_site`` undoes ``str``."""
    assert str(parse_site(text)) == text


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("resid_post.0", "names no position; write resid_post.0[-1]"),
        ("resid_post[-1]", "needs a layer"),
        ("resid_post.0.h1[-1]", "has no heads"),
        ("resid post", "cannot be read; write KIND.LAYER[POSITION]"),
        ("z.0[-1]", "is 2 heads; name one, as z.0.h0"),
        ("pattern.0", "needs a site that holds vectors"),
        ("logits[-1]", "needs a site that holds vectors"),
        ("resid_post.0[2]", "prompts of 3 to 6 tokens have no common start"),
        ("resid_post.0[-4]", "the shortest prompt has 3 tokens; give a position from -3 to -1"),
        ("q.0.h0[-1]", r"holds tensors of shape [[16]]; site q.0.h0[-1] needs one vector of 8"),
    ],
)
def test_unclear_features_are_refused(
    model: TracedModel, tmp_path: Path, text: str, fact: str
) -> None:
    """The message says what is missing."""
    save_file({"d": torch.ones(16)}, tmp_path / "d.safetensors")
    with pytest.raises(OptionError) as caught:
        token_ablation(
            model, random_task([6, 3]), feature=text, direction=tmp_path / "d.safetensors"
        )
    assert fact in str(caught.value)


def test_unusable_directions_are_refused(model: TracedModel, tmp_path: Path) -> None:
    """No file, no safetensors, zeros, NaN; none given; a layer that the model does not have."""
    task, path = random_task([4]), tmp_path / "d.safetensors"

    def refusal() -> str:
        with pytest.raises(OptionError) as caught:
            token_ablation(model, task, feature="resid_post.0[-1]", direction=path)
        return str(caught.value)

    assert "cannot be read" in refusal()
    path.write_bytes(b"no tensors")
    assert "cannot be read" in refusal()
    save_file({"d": torch.zeros(16)}, path)
    assert "only zeros" in refusal()
    save_file({"d": torch.full((16,), torch.nan)}, path)
    assert "NaN or infinity" in refusal()
    save_file({"d": torch.ones(16)}, path)
    with pytest.raises(OptionError, match="give the direction to project it on: --direction FILE"):
        token_ablation(model, task, feature="resid_post.0[-1]")
    with pytest.raises(OptionError, match="name that with --feature"):
        token_ablation(model, task, direction=path)
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        token_ablation(model, task, feature="resid_post.7[-1]", direction=path)
