"""Feature cards: each number is that of plain runs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from card_oracles import SEED, alone, dictionary_of, read, write_card_set
from circuitlab_feature_interactions.cards import choosing, context, examples, measuring
from circuitlab_feature_interactions.cards.lens import LogitLens
from circuitlab_feature_interactions.cards.measuring import card_data
from circuitlab_feature_interactions.cards.reading import Feature, Readings, prompt_batches
from circuitlab_feature_interactions.data import generator_of
from torch import Tensor

import circuitlab
from circuitlab import Dictionary, OptionError, Site, Tokens, norm_outliers

N_TOKENS = 400
#: In words of the text model.
CORPUS = (
    "When Mary and John went to the store, John gave a drink to Mary",
    "When Tom and Anna went to the park, Tom gave a book to Anna",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("induction")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: Any) -> Path:
    return write_card_set(model, tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def cards(model: Any, folder: Path) -> Any:
    return card_data(
        model,
        dictionaries=folder,
        features="mlp_in.1: 3, 11; mlp_out.1: 5",
        n_tokens=N_TOKENS,
        seed=SEED,
    )


@pytest.fixture(scope="module")
def drawn(model: Any) -> list[Tensor]:
    """The prompts that :func:`cards` are of."""
    stream = measuring.PromptStream(model, None, None, measuring.seed_of(SEED, measuring._CARDS))
    return sorted(measuring.draw(stream, N_TOKENS)[1], key=len)


def active_cards(cards: Any) -> list[Any]:
    found = [card for pair in cards["cards"] for card in pair.values() if card]
    return [card for card in found if card["density"]["active"]]


def test_every_activation_shown_is_that_of_a_plain_run(
    model: Any, folder: Path, cards: Any, drawn: list[Tensor]
) -> None:
    """Density, histogram and the values of all excerpts are those of each prompt run alone."""
    assert len(active_cards(cards)) == 4
    for card in active_cards(cards):
        each = [read(model, folder, card, alone(ids))[0] for ids in drawn]
        values = torch.cat(each)
        facts = card["density"]
        assert facts["tokens"] == len(values) == cards["tokens"]
        assert facts["active"] == int((values > 1e-6).sum())
        assert facts["density"] == pytest.approx(facts["active"] / len(values))
        assert facts["interval"][0] < facts["density"] < facts["interval"][1]
        assert sum(card["histogram"]["counts"]) == facts["active"]
        assert card["top"]["value"] == pytest.approx(float(values.max()), rel=1e-4)
        for shown_one in [card["top"], *(e for b in card["bins"] for e in b["examples"])]:
            prompt, first = shown_one["prompt"], shown_one["first"]
            wanted = each[prompt][first : first + len(shown_one["values"])]
            assert shown_one["values"] == pytest.approx(wanted.tolist(), abs=1e-4)
            at = shown_one["position"] - first
            assert shown_one["values"][at] == shown_one["value"]
            ids = drawn[prompt][first : first + len(wanted)].tolist()
            assert shown_one["texts"] == model.tokenizer.convert_ids_to_tokens(ids)


def test_a_control_is_active_as_often_as_its_latent(cards: Any) -> None:
    """A random direction has the density of the latent beside it; a silent latent has none."""
    for pair in cards["cards"]:
        if pair["latent"]["density"]["active"]:
            assert pair["control"]["density"]["active"] == pair["latent"]["density"]["active"]
            assert pair["control"]["lens"] != pair["latent"]["lens"]
        else:
            assert pair["control"] is None
            assert pair["latent"]["latent"] == 11


def test_a_silent_latent_is_dead_only_after_enough_tokens(drawn: list[Tensor]) -> None:
    """Silence below the needed number is unknown; the bound is missed with probability 0.01."""
    for n, dead in ((400, "unknown"), (46_049, "unknown"), (46_050, True)):
        readings = Readings(drawn, torch.tensor([0, n]), torch.zeros(1, n))
        facts = examples.density_facts(readings, torch.zeros(n))
        assert (facts["active"], facts["dead"], facts["tokens_needed"]) == (0, dead, 46_050)
        assert (1 - facts["below"]) ** n == pytest.approx(0.01)


def test_examples_are_uniform_over_the_range_and_within_a_bin(model: Any) -> None:
    """Of a distribution with few large values each bin shows as many, every token as often."""
    sizes = torch.cat(
        [torch.full((1000,), 0.1), torch.tensor([0.3, 0.5, 0.55, 0.7]), torch.ones(6)]
    )
    values = torch.cat([torch.zeros(50), sizes])
    prompts = [torch.tensor([2, 3])] * (len(values) // 2)
    readings = Readings(prompts, torch.arange(0, len(values) + 1, 2), values[None])
    seen: dict[float, int] = {}
    tops = torch.zeros(6)
    for seed in range(60):
        bins = examples.draw_examples(model, readings, values, generator_of(seed))
        assert [found["tokens"] for found in bins] == [6, 1, 2, 1, 1000]
        assert [len(found["examples"]) for found in bins] == [2, 1, 2, 1, 2]
        for found in bins:
            for example in found["examples"]:
                assert found["low"] < example["value"] <= found["high"] + 1e-6
                seen[example["value"]] = seen.get(example["value"], 0) + 1
        for example in bins[0]["examples"]:
            tops[2 * example["prompt"] + example["position"] - len(values) + 6] += 1
        places = [example["prompt"] for example in bins[-1]["examples"]]
        assert len(set(places)) == 2
    # Two of six, 60 times: 20 each, with a standard deviation below 3.7.
    assert tops.sum() == 120
    assert bool(((tops - 20).abs() < 15).all())


def test_tokens_are_found_in_their_prompts() -> None:
    """Every token, the first and last of a prompt too, has its prompt and position; sums too."""
    prompts = [torch.tensor([1]), torch.tensor([2, 3, 4]), torch.tensor([5, 6])]
    readings = Readings(prompts, torch.tensor([0, 1, 4, 6]), torch.zeros(1, 6))
    wanted = [(row, place) for row, ids in enumerate(prompts) for place in range(len(ids))]
    assert [readings.place(token) for token in range(6)] == wanted
    assert readings.per_prompt(torch.cat(prompts)).tolist() == [1, 9, 11]


def test_bins_hold_their_upper_edge() -> None:
    """Value i / n of the largest is the last of bin i; what is not above 0 is in none."""
    values = torch.tensor([-1.0, 0.0, 0.01, 0.25, 0.26, 0.5, 0.75, 1.0])
    assert examples.bin_numbers(values, 4).tolist() == [-1, -1, 0, 0, 1, 1, 2, 3]
    counts = examples.histogram(values)
    assert sum(counts["counts"]) == 6
    assert counts["edges"][-1] == 1
    assert len(counts["edges"]) == len(counts["counts"]) + 1


def test_ablation_strips_are_those_of_changed_prompts(
    model: Any, folder: Path, cards: Any, drawn: list[Tensor]
) -> None:
    """Removed and hidden are plain runs of each changed prompt; BOS stays; the last has neither."""
    for card in active_cards(cards):
        top, strip = card["top"], card["ablations"]
        ids = drawn[top["prompt"]][: top["position"] + 1]
        assert strip["value"] == pytest.approx(top["value"], abs=1e-4)
        first, n = strip["first"], len(ids)
        assert len(strip["texts"]) == len(strip["removed"]) == len(strip["hidden"]) == n - first
        assert strip["removed"][-1] is strip["hidden"][-1] is None
        assert strip["replaced"][-1] is not None
        for place in range(first, n - 1):
            removed, hidden = (strip[name][place - first] for name in ("removed", "hidden"))
            if place == 0:
                assert removed is hidden is strip["replaced"][0] is None
                continue
            without = torch.cat([ids[:place], ids[place + 1 :]])
            wanted = float(read(model, folder, card, alone(without))[0, -1])
            assert removed == pytest.approx(wanted, abs=1e-4)
            chosen = torch.arange(n)[None] == place
            wanted = float(read(model, folder, card, alone(ids).hiding(chosen))[0, -1])
            assert hidden == pytest.approx(wanted, abs=1e-4)


def test_replacing_takes_the_mean_over_the_pool(model: Any, folder: Path, cards: Any) -> None:
    """Of one token it is the run with that in each place; of two, n eighths of both runs."""
    card = cards["cards"][0]["latent"]
    feature = Feature(*dictionary_of(folder, card), 3)
    ids = model.tokens(["bag cat dog bag"]).ids[0]
    words = model.tokens(["fox lamp"]).ids[0, -2:]
    runs = {}
    for name, pool in (("fox", words[:1]), ("lamp", words[1:]), ("both", words)):
        found = context.token_ablations(model, feature, ids, pool, generator_of(0), bos=True)
        assert found["replaced"][0] is None
        runs[name] = found["replaced"]
    mixed = 0
    for place in range(1, len(ids)):
        for name, token in zip(("fox", "lamp"), words, strict=True):
            changed = ids.clone()
            changed[place] = token
            wanted = float(read(model, folder, card, alone(changed))[0, -1])
            assert runs[name][place] == pytest.approx(wanted, abs=1e-4)
        fox, lamp, both = (runs[name][place] for name in ("fox", "lamp", "both"))
        if abs(lamp - fox) > 0.01:
            eighths = 8 * (both - fox) / (lamp - fox)
            assert eighths == pytest.approx(round(eighths), abs=0.01)
            mixed += 0 < round(eighths) < 8
    assert mixed


def test_context_dependence_is_that_of_single_runs(
    model: Any, folder: Path, cards: Any, drawn: list[Tensor], monkeypatch: Any
) -> None:
    """Both scores are 1 - what is left of all active tokens that have a context, run one by one."""
    monkeypatch.setattr(context, "ALONE", 10**6)
    card = cards["cards"][0]["latent"]
    feature = Feature(*dictionary_of(folder, card), 3)
    prompts = drawn[:4]
    values = [read(model, folder, card, alone(ids))[0] for ids in prompts]
    starts = torch.tensor([0, *map(len, prompts)]).cumsum(0)
    readings = Readings(prompts, starts, torch.cat(values)[None])
    found = context.context_dependence(
        model, feature, readings, torch.cat(values), generator_of(0), bos=True
    )
    whole, left = 0.0, {"alone": 0.0, "hidden": 0.0}
    count = 0
    for ids, row in zip(prompts, values, strict=True):
        for place in range(2, len(ids)):
            if row[place] <= 0:
                continue
            count, whole = count + 1, whole + float(row[place])
            both = ids[[0, place]]
            left["alone"] += float(read(model, folder, card, alone(both))[0, -1])
            two = Tokens(both[None], torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, place]]))
            left["hidden"] += float(read(model, folder, card, two)[0, -1])
    assert found["tokens"] == count > 3
    for name, value in left.items():
        assert found[name]["score"] == pytest.approx(1 - value / whole, abs=1e-4)
        low, high = found[name]["interval"]
        assert low <= found[name]["score"] <= high


def test_an_embedding_feature_needs_no_context(model: Any) -> None:
    """At the first block's input, context hidden changes nothing: the score is 0."""
    site = Site("resid_pre", 0)
    rows = torch.eye(model.d_model)
    zeros = torch.zeros(model.d_model)
    dictionary = Dictionary(rows, zeros, rows, zeros, apply_b_dec_to_input=False)
    prompts = [model.tokens(["bag cat dog fox cat"]).ids[0]]
    x = model.run(alone(prompts[0]), read=[site], logits="none")[site][0]
    latent = int(x[2:].sum(0).argmax())
    feature = Feature(site, dictionary, latent)
    values = x[:, latent].relu().double()
    readings = Readings(prompts, torch.tensor([0, len(values)]), values[None])
    found = context.context_dependence(model, feature, readings, values, generator_of(0), bos=True)
    assert found["tokens"] > 0
    assert found["hidden"]["score"] == pytest.approx(0, abs=1e-6)


def test_prompts_without_bos_lose_their_first_token_too(text_model: Path, tmp_path: Path) -> None:
    """Where no BOS is added every token of the context is ablated, the first among them."""
    model = circuitlab.load_model(text_model)
    write_card_set(model, tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(CORPUS))
    data = tmp_path / "texts.txt"
    found = card_data(model, dictionaries=tmp_path, features="mlp_out.1: 1, 2, 3", data=data)
    assert found["data"] == "texts.txt"
    assert found["tokens"] == sum(len(model.tokens([text]).ids[0]) for text in CORPUS)
    strips = [pair["latent"]["ablations"] for pair in found["cards"] if pair["control"]]
    assert any(len(strip["texts"]) > 1 for strip in strips)
    for strip in strips:
        assert strip["first"] == 0
        assert None not in [*strip["replaced"], *strip["removed"][:-1], *strip["hidden"][:-1]]


def test_the_lens_ranks_logits_and_leaves_outliers_out(
    model: Any, cards: Any, folder: Path
) -> None:
    """Both ends are those of all unmasked logits sorted, against their mean."""
    lens = LogitLens(model)
    weight = model.weights.unembedding(torch.float64)[0]
    for pair in cards["cards"]:
        card = pair["latent"]
        dictionary = circuitlab.read_dictionary(folder / card["site"])
        logits = dictionary.W_d[card["latent"]].detach().double() @ weight
        logits[lens.masked] = math.nan
        logits = logits - logits.nanmean()
        named = {
            text: value
            for text, value in zip(
                model.tokenizer.convert_ids_to_tokens(range(len(logits))), logits.tolist(),
                strict=True,
            )
            if not math.isnan(value)
        }  # fmt: skip
        order = sorted(named, key=lambda text: -named[text])
        found = card["lens"]
        assert [text for text, _ in found["raised"]] == order[:8]
        assert [text for text, _ in found["lowered"]] == order[::-1][:8]
        for text, value in [*found["raised"], *found["lowered"]]:
            assert value == pytest.approx(named[text], abs=1e-4)
        assert found["masked"] == int(lens.masked.sum())


def test_vectors_of_other_sizes_are_outliers() -> None:
    """Planted tiny, huge and zero vectors are found, and no other."""
    vectors = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    vectors[3], vectors[50], vectors[199] = vectors[3] / 100, vectors[50] * 100, 0
    assert norm_outliers(vectors).nonzero().flatten().tolist() == [3, 50, 199]


def test_the_largest_latents_are_those_of_brute_force(
    model: Any, folder: Path, drawn: list[Tensor]
) -> None:
    """``top:N`` ranks by variance times squared decoder norm; silent latents are never among."""
    found_set = measuring.read_set(folder, model)
    batches = prompt_batches(drawn, model.device)
    chosen = choosing.choose_latents("top:30", model, found_set.dictionaries, batches)
    for site, dictionary in found_set.dictionaries.items():
        runs = [model.run(alone(ids), read=[site], logits="none")[site][0] for ids in drawn]
        z = dictionary.encode(torch.cat(runs)).detach().double()
        sizes = z.var(0, correction=0) * dictionary.W_d.detach().double().square().sum(1)
        own = [latent for where, latent in chosen if where == site]
        assert own == sizes.argsort(descending=True)[: len(own)].tolist()
        assert sorted(own) == [n for n in range(12) if float(sizes[n]) > 1e-12]
        assert 11 not in own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no latents"),
        ("top:0", "no latents"),
        ("top", "names no latents"),
        ("mlp_in.1:", "names no latents"),
        ("mlp_in.0: 1", "there are those of mlp_in.1, mlp_out.1"),
        ("mlp_in.1: 12", "run from 0 to 11"),
        ("mlp_in.1: 3, 4; mlp_in.1: 3", "twice"),
    ],
)
def test_features_that_are_not_there_are_refused(
    model: Any, folder: Path, text: str, said: str
) -> None:
    """The message says what is there."""
    with pytest.raises(OptionError, match=re.escape(said)):
        card_data(model, dictionaries=folder, features=text, n_tokens=50)
