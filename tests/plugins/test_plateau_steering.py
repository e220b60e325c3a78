"""Steering vectors: planted directions found, units, places, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from circuitlab_activation_plateaus.steering.vectors import (
    Choice,
    placed,
    prompt_of,
    random_like,
    steering,
)
from torch import Tensor

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    EncodedTask,
    OptionError,
    PromptPair,
    Site,
    SiteError,
    Task,
    TaskError,
    Tokens,
    TracedModel,
    load_model,
    write_dictionary,
)

PLANTED = torch.linspace(-2, 3, 16, dtype=torch.float64)


def planted(n: int = 6, scale: float = 1.0) -> tuple[Any, TracedModel, EncodedTask]:
    """A model whose corrupt last tokens are embedded like the clean ones plus a known vector."""
    module: Any = oracles.random_gpt2(2, 2, 16, seed=6)
    with torch.no_grad():
        module.transformer.wte.weight[20:40] = module.transformer.wte.weight[:20] + scale * PLANTED
    module.requires_grad_(False)
    model = load_model((module, None))
    pairs = tuple(
        PromptPair((*range(i, i + 2 + i % 3), i), (*range(i, i + 2 + i % 3), i + 20), (1,), (2,))
        for i in range(n)
    )
    return module, model, model.encode(Task("planted", pairs))


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() @ b.double()) / (a.norm() * b.norm()))


def stream(module: Any, prompt: Any) -> Tensor:
    """The stream before block 0 of one prompt, ``[pos, d_model]``."""
    gpt2 = module.transformer
    found: Tensor = gpt2.wte.weight[list(prompt)] + gpt2.wpe.weight[: len(prompt)]
    return found


# --- sources --------------------------------------------------------------------------------------


def test_planted_direction_is_the_mean_difference() -> None:
    """Corrupt less clean at the last position, whatever the prompts' lengths."""
    _, model, pairs = planted()
    found = steering(model, pairs, Choice(), site="resid_pre.0", unit="raw")
    assert torch.allclose(found.vectors, PLANTED[None])
    assert abs(found.raw_length - float(PLANTED.norm())) < 1e-9
    assert (found.site, found.length) == (Site("resid_pre", 0), found.raw_length)


def test_planted_direction_is_the_first_principal_component() -> None:
    """Where it is what differs most; it points to the corrupt prompts, one deviation long."""
    module, model, pairs = planted(scale=10.0)
    found = steering(model, pairs, Choice(source="pca"), site="resid_pre.0", unit="raw")
    assert cosine(found.vectors[0], PLANTED) > 0.99
    rows = [
        stream(module, prompt)[-1]
        for pair in pairs.task.pairs
        for prompt in (pair.clean, pair.corrupt)
    ]
    axis = found.vectors[0] / found.raw_length
    along = torch.stack(rows) @ axis
    assert abs(found.raw_length - float(along.std())) < 1e-9
    centred = torch.stack(rows) - torch.stack(rows).mean(0)
    values, axes = torch.linalg.eigh(centred.T @ centred)
    second = steering(model, pairs, Choice(source="pca", index=1), site="resid_pre.0", unit="raw")
    assert abs(abs(cosine(second.vectors[0], axes[:, values.argsort()[-2]])) - 1) < 1e-9


def test_pca_of_the_models_own_texts() -> None:
    """Of every position but the first, each prefix once."""
    model = load_model("gate-and")
    task = Task.from_pair("on on =", "off off =", "yes", "no")
    choice = Choice(source="pca", corpus=8)
    found = steering(model, model.encode(task), choice, site="resid_post.0", unit="raw")
    prompts = {tuple(model.tokens([text]).ids[0].tolist()) for text in model.corpus(8, 0)}
    prefixes = {prompt[:n] for prompt in prompts for n in range(2, len(prompt) + 1)}
    site = Site("resid_post", 0)
    rows = torch.stack(
        [model.run([prefix], read=[site])[site][0, -1].double() for prefix in prefixes]
    )
    centred = rows - rows.mean(0)
    largest = float(torch.linalg.eigvalsh(centred.T @ centred)[-1]) / (len(rows) - 1)
    assert abs(found.raw_length**2 - largest) < 1e-6 * largest


def test_act_add_is_aligned_from_the_front() -> None:
    """A vector for each token of the two prompts; at one place only their last tokens count."""
    module, model, pairs = planted()
    choice = Choice(source="act-add", towards="3, 9 4", away="3 2, 5")
    front = steering(model, pairs, choice, site="resid_pre.0", positions="front", unit="raw")
    both = stream(module, (3, 9, 4)) - stream(module, (3, 2, 5))
    assert torch.allclose(front.vectors, both)
    assert abs(front.length - float(both[1:].norm(dim=-1).mean())) < 1e-9
    last = steering(model, pairs, choice, site="resid_pre.0", positions="last", unit="raw")
    assert torch.allclose(last.vectors, both[-1:])


def saved(tmp_path: Path, site: str, **options: Any) -> Path:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(*shape, generator=generator) for shape in ((16, 5), (5,), (5, 16), (16,))]
    info = DictionaryInfo(site=site, model=options.pop("model", None), **options.pop("info", {}))
    write_dictionary(
        Dictionary(*parts, apply_b_dec_to_input=False, info=info, **options), tmp_path / "own"
    )
    return tmp_path / "own"


def test_dictionary_gives_its_site_and_what_a_latent_writes(tmp_path: Path) -> None:
    """The row of the decoder, where it belongs, with warnings about its training."""
    _, model, pairs = planted()
    folder = saved(tmp_path, "resid_post.1", model="another")
    choice = Choice(source="dictionary", index=3, dictionary=folder)
    found = steering(model, pairs, choice, unit="raw")
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(*shape, generator=generator) for shape in ((16, 5), (5,), (5, 16))][2]
    assert torch.allclose(found.vectors, rows[3:4].double())
    assert found.site == Site("resid_post", 1)
    assert "trained with another model" in found.warnings[0]
    with pytest.raises(OptionError, match=r"the dictionary writes resid_post\.1"):
        steering(model, pairs, choice, site="resid_pre.1")
    with pytest.raises(OptionError, match="latents 0 to 4"):
        steering(model, pairs, Choice(source="dictionary", index=5, dictionary=folder))


def test_dictionaries_of_other_places_are_refused(tmp_path: Path) -> None:
    """Nothing can be added but to a residual stream, and a transcoder must say what it writes."""
    _, model, pairs = planted()
    choice = Choice(source="dictionary", dictionary=saved(tmp_path, "mlp_out.1"))
    with pytest.raises(OptionError, match=r"site 'mlp_out.1' cannot be steered"):
        steering(model, pairs, choice)
    saved(tmp_path, "resid_pre.1", transcoder=True)
    with pytest.raises(OptionError, match="does not say which site it writes"):
        steering(model, pairs, choice)


def test_random_vectors_have_the_same_length() -> None:
    """Each stands for one vector; directions are drawn anew and follow the seed."""
    vectors = torch.diag(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    draw = random_like(vectors, torch.Generator().manual_seed(1))
    assert torch.allclose(draw.norm(dim=-1), torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    assert torch.equal(draw, random_like(vectors, torch.Generator().manual_seed(1)))
    many = random_like(torch.ones(4000, 3, dtype=torch.float64), torch.Generator().manual_seed(1))
    assert (many.mean(0).abs() < 0.1).all()
    _, model, pairs = planted()
    found = steering(model, pairs, Choice(source="random"), unit="raw")
    assert abs(found.length - found.stream_norm) < 1e-9


# --- units and places -----------------------------------------------------------------------------


def test_unit_is_the_mean_norm_of_the_stream_that_is_steered() -> None:
    """At the last position of the prompts that are steered; several vectors have it as mean."""
    module, model, pairs = planted()
    for prompts in ("clean", "corrupt"):
        norms = [stream(module, getattr(p, prompts))[-1].norm() for p in pairs.task.pairs]
        expected = float(torch.stack(norms).mean())
        options: Any = {"site": "resid_pre.0", "prompts": prompts}
        found = steering(model, pairs, Choice(), **options)
        assert abs(found.length - expected) < 1e-9
        assert abs(cosine(found.vectors[0], PLANTED) - 1) < 1e-9
        choice = Choice(source="act-add", towards="3 9 4", away="3 2 5")
        front = steering(model, pairs, choice, positions="front", **options)
        assert abs(float(front.vectors[1:].norm(dim=-1).mean()) - expected) < 1e-9


def test_site_is_in_the_middle_if_none_is_named() -> None:
    """Before the later half of the layers; of one layer, behind its attention."""
    _, model, pairs = planted()
    assert steering(model, pairs, Choice()).site == Site("resid_pre", 1)
    gate = load_model("gate-and")
    task = Task.from_pair("on on =", "off off =", "yes", "no")
    assert steering(gate, gate.encode(task), Choice()).site == Site("resid_mid", 0)


def test_vectors_go_where_they_should() -> None:
    """At all real tokens, at the last, or from each prompt's first one on; never at padding."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    tokens = Tokens(torch.zeros(2, 4, dtype=torch.int64), mask)
    vectors = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    everywhere = placed(vectors[:1], tokens, "all")
    assert torch.equal(everywhere[..., 0], mask.float())
    assert placed(vectors[:1], tokens, "last")[..., 1].tolist() == [[0, 0, 0, 10], [0, 0, 0, 10]]
    assert placed(vectors, tokens, "front")[..., 0].tolist() == [[0, 0, 1, 2], [1, 2, 0, 0]]
    with pytest.raises(OptionError, match="adds 3 vectors, and the shortest prompt has 2 tokens"):
        placed(torch.ones(3, 2), tokens, "front")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"source": "act-add", "towards": "1"}, "needs --away"),
        ({"source": "dictionary"}, "needs --dictionary"),
        ({"index": 2}, "--index says nothing to --direction mean-difference"),
        ({"source": "random", "towards": "x"}, "--towards says nothing to --direction random"),
        ({"source": "pca", "index": -1}, "--index -1 is negative"),
        ({"source": "pca", "index": 40}, "12 activations at resid_pre.1 have 11 principal"),
        ({"source": "act-add", "towards": "1 2", "away": "1"}, "has 2 tokens, --away 1"),
    ],
)
def test_sources_that_cannot_be_had_are_refused(choice: dict[str, Any], message: str) -> None:
    """What is missing, and what would be passed over in silence."""
    _, model, pairs = planted()
    with pytest.raises(OptionError, match=message):
        steering(model, pairs, Choice(**choice), positions="front")


def test_sites_and_prompts_that_cannot_be_had_are_refused() -> None:
    """No other sites, no difference of 0, no text without a tokenizer."""
    _, model, pairs = planted()
    with pytest.raises(OptionError, match=r"site 'z.0' cannot be steered"):
        steering(model, pairs, Choice(), site="z.0")
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        steering(model, pairs, Choice(), site="resid_pre.4")
    pair = PromptPair((3, 7), (4, 7), (1,), (2,))
    same = model.encode(Task("same-last-token", (pair,)))
    with pytest.raises(OptionError, match="there is nothing to add"):
        steering(model, same, Choice(), site="resid_pre.0")
    with pytest.raises(TaskError, match="--away 'a cat': the model has no tokenizer"):
        prompt_of(model, "a cat", "--away")
