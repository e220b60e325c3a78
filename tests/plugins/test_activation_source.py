"""Pairs of sites, the stream of prompts, and the activations that trainings read."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.activations import MIXED, ActivationSource, Place
from circuitlab_feature_interactions.data import CHUNK, FIRST_SEED, PromptStream, pad
from circuitlab_feature_interactions.sites import site_pairs, sites_of

import circuitlab
from circuitlab import ModelError, OptionError, Site, SiteError, TaskError


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("ioi-mini")


@pytest.fixture
def write_ids(tmp_path: Path) -> Any:
    def write(*prompts: list[int]) -> Path:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        return path

    return write


def test_pairs_of_mlps(model: Any) -> None:
    """An MLP's pair is what it reads and what it writes; no number means all layers."""
    (pair,) = site_pairs("mlp.1", model)
    assert (pair.source, pair.target, pair.route) == (Site("mlp_in", 1), Site("mlp_out", 1), "mlp")
    assert [pair.layer for pair in site_pairs("mlp", model)] == [0, 1, 2]


@pytest.mark.parametrize("text", ["block", "resid", "resid.all"])
def test_neighbouring_blocks_share_a_site(model: Any, text: str) -> None:
    """All blocks have one site more than there are blocks; the last is the stream at the end."""
    pairs = site_pairs(text, model)
    streams = [*(Site("resid_pre", n) for n in range(3)), Site("resid_post", 2)]
    assert sites_of(pairs) == streams
    assert [(pair.source, pair.target) for pair in pairs] == list(pairwise(streams))


def test_unknown_pairs_are_refused(model: Any) -> None:
    """What is no pair, no layer, or named twice is refused."""
    for text in ("", "attention.0", "mlp.x", "mlp.0,", "mlp.0 mlp.1"):
        with pytest.raises(OptionError, match="unknown"):
            site_pairs(text, model)
    with pytest.raises(SiteError, match="layers of ioi-mini run from 0 to 2"):
        site_pairs("mlp.3", model)
    with pytest.raises(OptionError, match=r"name mlp\.1 more than once"):
        site_pairs("mlp, mlp.1", model)


def test_corpus_is_streamed_with_seeds_of_its_own(model: Any) -> None:
    """Prompts are the same for the same seed, in any order asked, and others for another."""
    stream, again, other = (PromptStream(model, None, None, seed) for seed in (3, 3, 4))
    far = CHUNK * 5 + 7
    late, early = again[far].tolist(), again[2].tolist()
    assert [stream[2].tolist(), stream[far].tolist()] == [early, late]
    assert [other[n].tolist() for n in range(9)] != [stream[n].tolist() for n in range(9)]
    assert FIRST_SEED > 10**9
    assert stream.digest == other.digest


def test_every_text_of_a_file_comes_once(ids_model: Path, write_ids: Any) -> None:
    """Each time through the file all prompts come, in another order."""
    model = circuitlab.load_model(str(ids_model))
    stream = PromptStream(model, write_ids(*([n, n] for n in range(20))), None, 0)
    epochs = [[int(stream[20 * e + n][0]) for n in range(20)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 3
    assert len(set(map(tuple, epochs))) == 3


def test_long_texts_are_cut_into_windows(ids_model: Path, write_ids: Any) -> None:
    """A text longer than the context gives windows one behind the other, nothing lost."""
    model = circuitlab.load_model(str(ids_model))
    stream = PromptStream(model, write_ids(list(range(11)), [30, 31]), 4, 0)
    found = sorted(stream[n].tolist() for n in range(4))
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [30, 31]]
    assert (stream.context_length, stream.repeats, stream.bos) == (4, 4, False)


def test_each_window_begins_with_bos(bos_model: Path, tmp_path: Path) -> None:
    """Where the tokenizer adds BOS, every window has it, and a short text is what it gives."""
    model = circuitlab.load_model(str(bos_model))
    path = tmp_path / "texts.txt"
    path.write_text("When Mary and John went to the store\nJohn gave\n")
    stream = PromptStream(model, path, 4, 0)
    windows = [stream[n] for n in range(stream.repeats or 0)]
    assert stream.bos
    assert {int(window[0]) for window in windows} == {model.tokenizer.bos_token_id}
    assert max(map(len, windows)) == 4
    short = model.tokens(["John gave"]).ids[0].tolist()
    assert short in [window.tolist() for window in windows]


def test_data_that_cannot_be_read_is_refused(
    ids_model: Path, write_ids: Any, tmp_path: Path
) -> None:
    """Text without a tokenizer, ids out of range, contexts that do not fit, no corpus."""
    model = circuitlab.load_model(str(ids_model))
    words = tmp_path / "words.txt"
    words.write_text("some words\n")
    with pytest.raises(TaskError, match="has no tokenizer"):
        PromptStream(model, words, None, 0)
    with pytest.raises(TaskError, match=r"text 2 .* ids of .* run from 0 to"):
        PromptStream(model, write_ids([1, 2], [3, 9999]), None, 0)
    with pytest.raises(OptionError, match="context length 0"):
        PromptStream(model, write_ids([1, 2]), 0, 0)
    with pytest.raises(ModelError, match="brings no texts"):
        PromptStream(model, None, None, 0)


def test_shuffled_tokens_are_the_model_s_own(model: Any) -> None:
    """Each token's activation is what a run of its prompt alone gives, at its position."""
    stream = PromptStream(model, None, None, 1)
    sites = [Site("mlp_in", 0), Site("mlp_out", 0)]
    source = ActivationSource(model, stream, sites, 64)
    batch, _ = next(source.batches())
    assert batch.values[sites[0]].shape == (64, model.d_model)
    assert len(set(batch.rows.tolist())) > 8
    for n in range(0, 64, 7):
        ids = stream[int(batch.rows[n])]
        place = int(batch.positions[n])
        assert int(batch.tokens[n]) == int(ids[place])
        run = model.run(pad([ids], model.device), read=sites)
        for site in sites:
            torch.testing.assert_close(
                batch.values[site][n], run[site][0, place], rtol=1e-4, atol=1e-5
            )


def test_no_token_of_a_mix_comes_twice(model: Any) -> None:
    """The batches of a mix are different tokens, and few are left out."""
    stream = PromptStream(model, None, None, 1)
    source = ActivationSource(model, stream, [Site("mlp_in", 0)], 32)
    seen: list[tuple[int, int]] = []
    for batch, after in source.batches():
        seen += zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)
        if after.prompt:
            break
    assert len(seen) == len(set(seen)) == 32 * MIXED
    assert sum(len(stream[n]) for n in range(after.prompt)) - len(seen) < 32


@pytest.mark.parametrize("whole", [False, True])
def test_goes_on_from_any_place(model: Any, whole: bool) -> None:
    """Batches from a place on are, bit for bit, those that come there without a stop."""
    sites = [Site("resid_pre", 1)]

    def source() -> ActivationSource:
        stream = PromptStream(model, None, None, 2)
        return ActivationSource(model, stream, sites, 16, whole=whole, seed=5)

    straight = list(islice(source().batches(), 2 * MIXED + 3))
    for stop in (1, MIXED, MIXED + 2):
        (batch, after) = next(source().batches(straight[stop - 1][1]))
        assert torch.equal(batch.values[sites[0]], straight[stop][0].values[sites[0]])
        assert torch.equal(batch.rows, straight[stop][0].rows)
        assert after == straight[stop][1]


def test_whole_prompts_leave_padding_out(model: Any) -> None:
    """Whole prompts have a mask, zeros where padded, and the right values where not."""
    stream = PromptStream(model, None, None, 1)
    site = Site("resid_pre", 1)
    source = ActivationSource(model, stream, [site], 100, whole=True)
    batch, after = next(source.batches())
    assert batch.n_tokens >= 100
    assert not batch.mask.all()
    assert not batch.values[site][~batch.mask].any()
    assert after == Place(len(batch.mask))
    assert batch.flat(site).shape == (batch.n_tokens, model.d_model)
    for row in range(len(batch.mask)):
        real = batch.mask[row]
        assert torch.equal(batch.tokens[row, real], stream[row].long())
        run = model.run(pad([stream[row]], model.device), read=[site])
        torch.testing.assert_close(batch.values[site][row, real], run[site][0])
