"""Reads, writes and gradients of a traced model equal plain PyTorch hooks and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from circuitlab import Run, Site, Tokens, TracedModel, load_model

N_LAYERS, N_HEADS, D_HEAD = 3, 2, 8
#: float64 sums of some hundred terms, taken in another order.
TOLERANCE = 1e-12
#: Every kind but logits, in a middle layer.
WHOLE = [Site("embed")] + [
    Site(kind, 1)
    for kind in (
        *("resid_pre", "q", "k", "v", "z", "pattern", "attn_out"),
        *("resid_mid", "mlp_in", "mlp_post", "mlp_out", "resid_post"),
    )
]
WRITTEN = [
    *(site for site in WHOLE if site.kind != "pattern"),
    Site("q", 1, head=1),
    Site("k", 0, head=0),
    Site("v", 2, head=1, position=2),
    Site("z", 1, head=0, position=-1),
    Site("z", 0, position=3),
    Site("resid_pre", 0),
    Site("resid_pre", 2, position=-2),
    Site("resid_mid", 1, position=-1),
    Site("mlp_in", 2, position=4),
    Site("mlp_post", 2, position=1),
    Site("resid_post", 2),
]


@pytest.fixture(scope="module")
def module() -> Any:
    return oracles.random_gpt2(N_LAYERS, N_HEADS, N_HEADS * D_HEAD)


@pytest.fixture(scope="module")
def model(module: Any) -> TracedModel:
    return load_model((module, None))


@pytest.fixture(scope="module")
def tokens(model: TracedModel) -> Tokens:
    """Three prompts, two of them padded."""
    return model.tokens([(3, 1, 4, 1, 5, 9), (2, 6, 5), (3, 5, 8, 9, 7)])


def difference(logits: Tensor) -> Tensor:
    return (logits[:, 3] - logits[:, 5]) * logits[:, 7].tanh()


def named(path: str, module: nn.Module, site: Site) -> nn.Module:
    return module.get_submodule(f"transformer.h.{site.layer}{path}")


#: Where a plain hook finds each kind: submodule of the block, and side.
PLACES = {
    "resid_pre": ("", "input"),
    "q": (".attn.c_attn", "output"),
    "k": (".attn.c_attn", "output"),
    "v": (".attn.c_attn", "output"),
    "z": (".attn.c_proj", "input"),
    "pattern": (".attn", "pattern"),
    "attn_out": (".attn", "output"),
    "resid_mid": (".ln_2", "input"),
    "mlp_in": (".ln_2", "input"),
    "mlp_post": (".mlp.c_proj", "input"),
    "mlp_out": (".mlp", "output"),
    "resid_post": ("", "output"),
}


@torch.no_grad()
def plain(module: nn.Module, tokens: Tokens) -> Tensor:
    return differentiable(module, tokens)


@contextmanager
def hook(
    module: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """A plain hook that hands the whole tensor to ``change`` and puts what it returns there."""
    path, side = PLACES.get(site.kind, ("", "output"))
    at = module.transformer.wte if site.kind == "embed" else named(path, module, site)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = next(iter(kwargs)) if not args else None
        new = change(args[0] if key is None else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if side == "pattern":
            change(output[1])
            return None
        new = change(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) and new is not None else new

    if side == "input":
        handle = at.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = at.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def differentiable(module: nn.Module, tokens: Tokens) -> Tensor:
    return module(
        input_ids=tokens.ids,
        attention_mask=tokens.mask.long(),
        position_ids=tokens.position_ids,
        use_cache=False,
    ).logits


def part(site: Site, whole: Tensor) -> Tensor:
    """The site's own part of the tensor a plain hook sees; a view."""
    if site.kind in ("q", "k", "v"):
        whole = whole.chunk(3, -1)["qkv".index(site.kind)]
    if site.kind in ("q", "k", "v", "z"):
        whole = whole.view(*whole.shape[:2], N_HEADS, D_HEAD)
        whole = whole if site.head is None else whole[:, :, site.head]
    return whole if site.position is None else whole[:, site.position]


@torch.no_grad()
def read_plainly(module: nn.Module, tokens: Tokens, site: Site) -> Tensor:
    seen: list[Tensor] = []
    with hook(module, site, lambda whole: seen.append(part(site, whole).clone())):
        plain(module, tokens)
    return seen[0]


@torch.no_grad()
def write_plainly(module: nn.Module, tokens: Tokens, site: Site, value: Tensor) -> Tensor:
    """Logits when a plain hook puts ``value`` at the site."""

    def put(whole: Tensor) -> Tensor:
        new = whole.clone()
        part(site, new)[...] = value
        return new

    if site.kind != "resid_mid":
        with hook(module, site, put):
            return plain(module, tokens)
    # The skip connection reads it too: let attention write what makes the sum come out so.
    wanted = put(read_plainly(module, tokens, Site("resid_mid", site.layer)))
    before = read_plainly(module, tokens, Site("resid_pre", site.layer))
    with hook(module, Site("attn_out", site.layer), lambda _: wanted - before):
        return plain(module, tokens)


@pytest.mark.parametrize("site", WHOLE, ids=str)
def test_read_equals_plain_hook(
    module: nn.Module, model: TracedModel, tokens: Tokens, site: Site
) -> None:
    """A read gives, bit for bit, what a plain hook sees, and its parts are parts of it."""
    run = model.run(tokens, read=[site], logits="all")
    expected = read_plainly(module, tokens, site)
    assert torch.equal(run[site], expected)
    assert torch.equal(run.logits, plain(module, tokens))
    if site.kind in ("q", "k", "v", "z"):
        assert torch.equal(run[Site(site.kind, 1, 1)], expected[:, :, 1])
        assert torch.equal(run[Site(site.kind, 1, 0, -2)], expected[:, -2, 0])
    elif site.kind == "pattern":
        assert torch.equal(run[Site("pattern", 1, 1)], expected[:, 1])
    else:
        assert torch.equal(run[Site(site.kind, site.layer, position=2)], expected[:, 2])


def test_all_sites_at_once(module: nn.Module, model: TracedModel, tokens: Tokens) -> None:
    """Reading everything in one pass gives what reading each alone gives."""
    sites = [Site(s.kind, n) for s in WHOLE[1:] for n in range(N_LAYERS)] + [Site("embed")]
    run = model.run(tokens, read=sites, logits="all")
    for site in sites:
        assert torch.equal(run[site], read_plainly(module, tokens, site)), site


def test_last_logits_only(model: TracedModel, tokens: Tokens) -> None:
    """By default only the last position is unembedded."""
    everything = model.run(tokens, logits="all").logits
    last = model.run(tokens).logits
    assert last.shape == (3, 1, model.vocab_size)
    assert float((last - everything[:, -1:]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("site", WRITTEN, ids=str)
def test_written_site_equals_plain_hook(
    module: nn.Module, model: TracedModel, tokens: Tokens, site: Site
) -> None:
    """Writing changes exactly what a plain hook that puts the same value there changes."""
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(
        read_plainly(module, tokens, site).shape, generator=generator, dtype=torch.float64
    )
    run = model.run(tokens, write={site: value}, read=[site], logits="all")
    expected = write_plainly(module, tokens, site, value)
    assert float((run.logits - expected)[tokens.mask].abs().max()) < TOLERANCE
    assert torch.equal(run[site], value)
    changed = (plain(module, tokens) - expected)[tokens.mask].abs().max()
    assert float(changed) > 1e-3


@pytest.mark.parametrize("site", WRITTEN, ids=str)
def test_identity_write_changes_nothing(model: TracedModel, tokens: Tokens, site: Site) -> None:
    """Writing what was read leaves every bit of the logits."""
    run = model.run(tokens, read=[site], logits="all")
    again = model.run(tokens, write={site: run[site].clone()}, logits="all")
    assert torch.equal(again.logits[tokens.mask], run.logits[tokens.mask])


def test_mlp_in_is_not_resid_mid(model: TracedModel, tokens: Tokens) -> None:
    """What is written for the MLP alone is not in the stream beside it, though both are read."""
    sites = [Site("resid_mid", 1), Site("mlp_in", 1)]
    clean = model.run(tokens, read=sites)
    assert torch.equal(clean[sites[0]], clean[sites[1]])
    value = torch.ones((), dtype=torch.float64)
    run = model.run(tokens, read=sites, write={sites[1]: value})
    assert torch.equal(run[sites[0]], clean[sites[0]])
    assert torch.equal(run[sites[1]], value.expand(3, 6, 16))


def test_writes_at_two_sites(module: nn.Module, model: TracedModel, tokens: Tokens) -> None:
    """Two heads of one projection can be written in one run, in any order of naming."""
    one, two = Site("z", 1, 0), Site("v", 1, 1, position=-1)
    zero = torch.zeros(())
    run = model.run(tokens, write={one: zero, two: zero + 2}, logits="all")
    with hook(module, two, lambda w: set_part(two, w, 2.0)):
        expected = write_plainly(module, tokens, one, torch.zeros((), dtype=torch.float64))
    assert float((run.logits - expected)[tokens.mask].abs().max()) < TOLERANCE


def set_part(site: Site, whole: Tensor, value: float) -> Tensor:
    new = whole.clone()
    part(site, new)[...] = value
    return new


@pytest.mark.parametrize("site", WHOLE, ids=str)
def test_gradient_equals_autograd(
    module: nn.Module, model: TracedModel, tokens: Tokens, site: Site
) -> None:
    """A gradient is autograd's; at mlp_in that of the MLP's own reading, the skip left out."""
    kept: list[Tensor] = []

    def keep(whole: Tensor) -> Tensor | None:
        # A view of its own is read by the MLP alone, while the stream goes on beside it.
        here = whole.view_as(whole) if site.kind == "mlp_in" else whole
        here.requires_grad_(True) if here.is_leaf else None
        here.retain_grad()
        kept.append(here)
        return here if site.kind == "mlp_in" else None

    module.requires_grad_(True)
    try:
        with hook(module, site, keep):
            difference(differentiable(module, tokens)[:, -1]).sum().backward()
    finally:
        module.requires_grad_(False)
        module.zero_grad()
    assert kept[0].grad is not None
    expected = part(site, kept[0].grad)
    run = model.run(tokens, gradient_of=difference, gradient_at=[site])
    found = run.gradient(site)
    assert float((found - expected).abs().max()) < TOLERANCE * float(expected.abs().max())
    assert float(expected.abs().max()) > 1e-3


def test_gradients_of_many_sites_are_those_of_each(model: TracedModel, tokens: Tokens) -> None:
    """Sites do not disturb one another: together they have the gradients they have alone."""
    together = model.run(tokens, gradient_of=difference, gradient_at=WHOLE)
    for site in WHOLE:
        alone = model.run(tokens, gradient_of=difference, gradient_at=[site])
        gap = (together.gradient(site) - alone.gradient(site)).abs().max()
        assert float(gap) < TOLERANCE, site


def test_gradient_where_something_is_written(model: TracedModel, tokens: Tokens) -> None:
    """With a write the gradient is that of the written run: finite differences agree."""
    site, generator = Site("resid_pre", 1), torch.Generator().manual_seed(1)
    value = torch.randn(3, 6, 16, generator=generator, dtype=torch.float64)
    step = 1e-5 * torch.randn(3, 6, 16, generator=generator, dtype=torch.float64)
    run = model.run(tokens, write={site: value}, gradient_of=difference, gradient_at=[site])
    ends = [
        difference(model.run(tokens, write={site: value + sign * step}).logits[:, -1])
        for sign in (1, -1)
    ]
    slope = (run.gradient(site) * 2 * step).sum((1, 2))
    assert float((ends[0] - ends[1] - slope).abs().max()) < 1e-6 * float(slope.abs().max())


@pytest.mark.parametrize("layer", [1, 2])
def test_written_stream_skips_earlier_blocks(
    module: nn.Module, model: TracedModel, tokens: Tokens, layer: int
) -> None:
    """A written resid_pre gives the same logits without running the blocks before it."""
    site = Site("resid_pre", layer)
    full = model.run(tokens, read=[site], logits="all")
    ran: list[int] = []
    handles = [
        getattr(block, part).register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, block in enumerate(module.transformer.h)
        for part in ("attn", "mlp")
    ]
    try:
        short = model.run(tokens, write={site: full[site]}, logits="all")
        assert sorted(ran) == sorted([*range(layer, N_LAYERS)] * 2)
        ran.clear()
        model.run(tokens, write={site: full[site]}, read=[Site("mlp_out", 0)])
        assert sorted(ran) == sorted([*range(N_LAYERS)] * 2)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(short.logits[tokens.mask], full.logits[tokens.mask])


def test_run_leaves_no_trace() -> None:
    """Weights, requires_grad, grad, training mode and random state are as before a run."""
    module: Any = oracles.random_gpt2()
    model = load_model((module, None))
    module.requires_grad_(True)
    module.transformer.wte.weight.requires_grad_(False)
    module.lm_head.weight.grad = torch.ones_like(module.lm_head.weight)
    before = {n: (p.clone(), p.requires_grad, p.grad) for n, p in module.named_parameters()}
    state = torch.get_rng_state()
    run = model.run(
        [(1, 2, 3)], read=model.source_sites, gradient_of=difference, gradient_at=WHOLE[1:6]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training
    for name, parameter in module.named_parameters():
        value, requires_grad, grad = before[name]
        assert torch.equal(parameter, value), name
        assert parameter.requires_grad == requires_grad, name
        assert parameter.grad is grad, name
    assert not run.logits.requires_grad
    assert not run.gradient(WHOLE[1]).requires_grad


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_padding_changes_nothing(model: TracedModel, lengths: list[int], seed: int) -> None:
    """A prompt in a padded batch has the logits, outputs and gradients it has alone."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(0, 40, (n,), generator=generator).tolist()) for n in lengths]

    def full(prompts: list[tuple[int, ...]]) -> Run:
        return model.run(
            prompts,
            read=model.source_sites,
            gradient_of=difference,
            gradient_at=model.receiver_sites,
        )

    batch = full(prompts)
    outputs = model.source_outputs(batch)
    gradients = [gradient for _, gradient in model.receiver_gradients(batch)]
    for row, prompt in enumerate(prompts):
        alone, real = full([prompt]), slice(max(lengths) - len(prompt), None)
        compared = [
            (batch.logits[row], alone.logits[0]),
            (outputs[:, row, real], model.source_outputs(alone)[:, 0]),
        ]
        for whole, (_, own) in zip(gradients, model.receiver_gradients(alone), strict=True):
            compared.append((whole[:, row, real], own[:, 0]))
        for value, expected in compared:
            gap = (value - expected).abs().max()
            assert float(gap) < TOLERANCE * (1 + float(expected.abs().max()))
    assert not outputs[:, ~batch.mask].any()
