"""What sources write, what receivers' gradients are, and the weights behind both."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from circuitlab import Run, Site, SiteError, Tokens, TracedModel, load_model

#: float64 sums of some thousand terms of size up to 100.
TOLERANCE = 1e-10
LAST = Site("resid_post", 2)


@pytest.fixture(scope="module", params=[True, False], ids=["norms", "no norms"])
def module(request: pytest.FixtureRequest) -> Any:
    return oracles.random_gpt2(3, 2, 16, layer_norm=request.param, seed=4).requires_grad_(False)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


@pytest.fixture(scope="module")
def tokens(model: TracedModel) -> Tokens:
    """Three prompts, two of them padded."""
    return model.tokens([(3, 1, 4, 1, 5, 9), (2, 6, 5), (3, 5, 8, 9, 7)])


def difference(logits: Tensor) -> Tensor:
    return (logits[:, 3] - logits[:, 5]) * logits[:, 7].tanh()


def full_run(model: TracedModel, tokens: Tokens) -> Run:
    return model.run(
        tokens,
        read=[*model.source_sites, LAST],
        gradient_of=difference,
        gradient_at=model.receiver_sites,
    )


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def test_sources_are_those_of_the_split_model(
    module: Any, model: TracedModel, tokens: Tokens
) -> None:
    """Each source's output is the oracle's; with the biases they sum to the residual stream."""
    run = full_run(model, tokens)
    outputs = model.source_outputs(run)
    split = oracles.run(module, tokens.ids, tokens.mask.long()).outputs
    assert list(split) == list(model.wiring.sources)
    for name, output in zip(model.wiring.sources, outputs, strict=True):
        assert gap(output[tokens.mask], split[name][tokens.mask]) < TOLERANCE, name
    assert not outputs[:, ~tokens.mask].any()
    total = outputs.sum(0) + sum(model.weights.attention_bias(n) for n in range(3))
    assert gap(total[tokens.mask], run[LAST][tokens.mask]) < TOLERANCE


def test_receiver_gradients_are_the_oracles(
    module: Any, model: TracedModel, tokens: Tokens
) -> None:
    """The gradient at every receiver's own reading of the stream, norm differentiated."""
    blocks = list(model.receiver_gradients(full_run(model, tokens)))
    assert [block for block, _ in blocks] == list(model.wiring.blocks())
    found = torch.cat([gradient for _, gradient in blocks])
    expected = oracles.receiver_gradients(
        module, tokens.ids, difference, attention_mask=tokens.mask.long()
    )
    assert len(found) == len(model.wiring.receivers) == len(expected)
    for receiver, gradient in zip(model.wiring.receivers, found, strict=True):
        assert gap(gradient, expected[receiver]) < TOLERANCE, receiver


def test_receivers_sum_to_the_stream(model: TracedModel, tokens: Tokens) -> None:
    """All receivers that read one stream account for its whole gradient, in every layer."""
    start = Site("resid_pre", 0)
    run = model.run(
        tokens,
        read=model.source_sites,
        gradient_of=difference,
        gradient_at=[start, *model.receiver_sites],
    )
    total = sum(gradient.sum(0) for _, gradient in model.receiver_gradients(run))
    assert isinstance(total, Tensor)
    assert gap(total, run.gradient(start)) < TOLERANCE


def test_receiver_gradients_of_several_runs(model: TracedModel, tokens: Tokens) -> None:
    """Several runs give the mean of what each gives."""
    start = Site("resid_pre", 0)
    clean = full_run(model, tokens)
    runs = [clean] + [
        model.run(
            tokens,
            write={start: share * clean[start]},
            gradient_of=difference,
            gradient_at=model.receiver_sites,
        )
        for share in (0.5, 0.2)
    ]
    together = model.receiver_gradients(*runs)
    for found, *each in zip(together, *map(model.receiver_gradients, runs), strict=True):
        assert gap(found[1], torch.stack([own for _, own in each]).mean(0)) < TOLERANCE


def test_float32_receivers_are_float32(tokens: Tokens) -> None:
    """Half-precision models are scored in float32, others in their own type."""
    for dtype, scored in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = load_model((oracles.random_gpt2(3, dtype=dtype), None))
        run = full_run(model, tokens)
        assert run.logits.dtype == dtype
        assert model.source_outputs(run).dtype == scored
        assert {g.dtype for _, g in model.receiver_gradients(run)} == {scored}


@pytest.mark.parametrize("port", ["q", "k", "v"])
def test_projected_stream(model: TracedModel, tokens: Tokens, port: str) -> None:
    """The projection of a stream that was read is what the model computed; more axes may lead."""
    site, stream = Site(port, 1), Site("resid_pre", 1)
    run = model.run(tokens, read=[site, stream])
    assert gap(model.weights.projected(site, run[stream]), run[site]) < TOLERANCE
    shifted = torch.stack([run[stream], run[stream] + torch.arange(16)])
    both = model.weights.projected(site, shifted)
    assert both.shape == (2, *run[site].shape)
    written = model.run(tokens, write={stream: shifted[1]}, read=[site])
    assert gap(both[1], written[site]) < TOLERANCE


def test_head_weights_are_the_models(module: Any, model: TracedModel, tokens: Tokens) -> None:
    """q, k, v and o of each head multiply row vectors; they are views that cost no memory."""
    run = model.run(tokens, read=[Site("resid_pre", 1), Site("q", 1), Site("z", 1)])
    attn = module.transformer.h[1].attn
    normed = module.transformer.h[1].ln_1(run[Site("resid_pre", 1)])
    for number, port in enumerate(("q", "k", "v")):
        weights = model.weights.heads(1, port)
        assert weights.shape == (2, 16, 8)
        for head in range(2):
            columns = slice(16 * number + 8 * head, 16 * number + 8 * head + 8)
            assert torch.equal(weights[head], attn.c_attn.weight[:, columns])
    q = torch.einsum("bpd,hde->bphe", normed, model.weights.heads(1, "q"))
    assert gap(q + attn.c_attn.bias[:16].view(2, 8), run[Site("q", 1)]) < TOLERANCE
    output = model.weights.heads(1, "o")
    assert output.shape == (2, 8, 16)
    assert output.data_ptr() == attn.c_proj.weight.data_ptr()
    assert torch.equal(output[1], attn.c_proj.weight[8:])


def test_what_a_hidden_change_writes_is_the_change_times_its_reader(
    model: TracedModel, tokens: Tokens
) -> None:
    """One head's z reaches the stream through its own rows, the MLP's hidden layer through all."""
    for site, out in ((Site("z", 1, head=1), "attn_out"), (Site("mlp_post", 1), "mlp_out")):
        (weight,) = model.weights.reading(site)
        written = Site(out, 1)
        run = model.run(tokens, read=[site, written])
        change = torch.randn(run[site].shape, generator=torch.Generator().manual_seed(0))
        changed = model.run(tokens, write={site: run[site] + change}, read=[written])
        assert gap(changed[written] - run[written], change.double() @ weight) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "blind"),
    [
        ("resid_pre", {"attn.c_attn": 1, "mlp.c_fc": 1}),
        ("resid_mid", {"mlp.c_fc": 1}),
        ("resid_post", {}),
    ],
)
def test_readers_of_the_stream_are_all_that_come_after(kind: str, blind: dict[str, int]) -> None:
    """A direction that they are blind to changes no logit; each of them can end its blindness."""
    module: Any = oracles.random_gpt2(3, 2, 16, layer_norm=False, seed=4)
    direction = torch.nn.functional.normalize(torch.arange(16.0, dtype=torch.float64), dim=0)
    readers = [(name, 1) for name in blind] + [(name, 2) for name in ("attn.c_attn", "mlp.c_fc")]
    weights = [module.transformer.h[n].get_submodule(name).weight for name, n in readers]
    weights.append(module.lm_head.weight.T)
    with torch.no_grad():
        for weight in weights:
            weight -= torch.outer(direction, direction @ weight)
    model, site = load_model((module, None)), Site(kind, 1)
    tokens = model.tokens([(3, 1, 4, 1, 5, 9)])
    run = model.run(tokens, read=[site])

    def seen() -> tuple[float, float]:
        changed = model.run(tokens, write={site: run[site] + direction})
        felt = max(float((direction @ w).abs().max()) for w in model.weights.reading(site))
        return felt, float((changed.logits - run.logits).abs().max())

    assert max(seen()) < TOLERANCE
    for weight in weights:
        with torch.no_grad():
            weight += 0.5 * direction[:, None]
            assert min(seen()) > 1e-3
            weight -= 0.5 * direction[:, None]


def test_norms_are_folded_into_readers() -> None:
    """LayerNorm takes the mean out, so nothing after it sees a constant; its gain is folded."""
    module: Any = oracles.random_gpt2(3, 2, 16, seed=4)
    model = load_model((module, None))
    folded = torch.cat(list(model.weights.reading(Site("resid_post", 2))), 1)
    assert float(folded.sum(0).abs().max()) < TOLERANCE
    gained = module.transformer.ln_f.weight[:, None] * module.lm_head.weight.T
    assert torch.linalg.matrix_rank(torch.cat([folded, gained - gained.mean(0)], 1)) == 15


def test_attention_bias(module: Any, model: TracedModel) -> None:
    """The bias is the output projection's, detached."""
    module.transformer.h[2].attn.c_proj.bias.requires_grad_(True)
    try:
        bias = model.weights.attention_bias(2)
        assert torch.equal(bias, module.transformer.h[2].attn.c_proj.bias)
        assert not bias.requires_grad
    finally:
        module.requires_grad_(False)


def test_what_a_model_does_not_have_is_refused(model: TracedModel, tokens: Tokens) -> None:
    """Layers, heads and kinds that are not there are named, with what is there."""
    stream = model.run(tokens, read=[Site("resid_pre", 0)])[Site("resid_pre", 0)]
    with pytest.raises(SiteError, match=r"q\.3 does not exist: layers run from 0 to 2"):
        model.weights.heads(3, "q")
    with pytest.raises(SiteError, match="layers run from 0 to 2"):
        model.weights.attention_bias(7)
    with pytest.raises(SiteError, match=r"z\.0 is not a projection; give q, k or v"):
        model.weights.projected(Site("z", 0), stream)
    with pytest.raises(SiteError, match="layers run from 0 to 2"):
        model.weights.projected(Site("q", 5), stream)
    with pytest.raises(SiteError, match=r"z\.0 has no readers of its own; give z of one head"):
        next(model.weights.reading(Site("z", 0)))
    with pytest.raises(SiteError, match=r"z\.0 was not kept; name it in run\(\.\.\., read="):
        model.source_outputs(model.run(tokens, read=[Site("resid_pre", 0)]))
    with pytest.raises(SiteError, match="gradient_at="):
        list(model.receiver_gradients(model.run(tokens, read=model.source_sites)))


def test_sizes(module: Any, model: TracedModel) -> None:
    """A traced model states the sizes of the model it wraps."""
    config = module.config
    sizes = (model.n_layers, model.n_heads, model.d_model, model.vocab_size, model.n_positions)
    expected = (config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.n_positions)
    assert sizes == expected
    assert model.d_head * model.n_heads == model.d_model
    assert (model.device.type, model.dtype) == ("cpu", torch.float64)
    assert "3 layers, 2 heads, d_model 16" in repr(model)
