"""Plans: plain data in execution order, of what was asked for and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuitlab import Architecture, Projection, Site, SiteError
from circuitlab.plans import Ending, Locator, make_plan
from circuitlab.sites import BLOCK_KINDS

N_LAYERS, N_HEADS, D_HEAD, D_MLP, BATCH, POS = 3, 2, 4, 12, 2, 5


def architecture(**changes: Any) -> Architecture:
    width = N_HEADS * D_HEAD
    fields: dict[str, Any] = {
        "family": "toy",
        "n_layers": N_LAYERS,
        "n_heads": N_HEADS,
        "d_model": width,
        "d_head": D_HEAD,
        "n_positions": 16,
        "embed": "wte",
        "blocks": "h",
        "final_norm": "ln_f",
        "attention_norm": "ln_1",
        "attention": "attn",
        "q": Projection("attn.qkv", 0, D_HEAD),
        "k": Projection("attn.qkv", width, D_HEAD),
        "v": Projection("attn.qkv", 2 * width, D_HEAD),
        "output_projection": "attn.out",
        "mlp_norm": "ln_2",
        "mlp": "mlp",
        "mlp_output_projection": "mlp.out",
        "d_mlp": D_MLP,
    }
    return Architecture(**(fields | changes))


SEQUENTIAL = Locator(architecture())
PARALLEL = Locator(architecture(parallel=True))
INTERLEAVED = Locator(
    architecture(
        q=Projection("attn.qkv", 0, 3 * D_HEAD),
        k=Projection("attn.qkv", D_HEAD, 3 * D_HEAD),
        v=Projection("attn.qkv", 2 * D_HEAD, 3 * D_HEAD),
    )
)

kinds = st.sampled_from(BLOCK_KINDS)
whole = st.builds(Site, kinds, st.integers(0, N_LAYERS - 1)) | st.just(Site("embed"))
wholes = st.lists(whole, max_size=6)


def is_plain(value: object) -> bool:
    """Nothing in it needs CircuitLab to be understood."""
    if type(value) in (tuple, list):
        return all(map(is_plain, value))  # type: ignore[call-overload]
    if type(value) is slice:
        return all(map(is_plain, (value.start, value.stop, value.step)))
    return value is None or type(value) in (str, int, Tensor)


def written(site: Site) -> Tensor:
    return torch.zeros(SEQUENTIAL.shape(site, BATCH, POS))


def moment(step: tuple[Any, ...]) -> tuple[int, int]:
    """When a step's module is reached, read off its path alone."""
    path, side = step[1], "output" if step[0] in ("skip", "pass") else step[2]
    if path == "wte":
        return -1, 0
    layer, _, inside = path.removeprefix("h.").partition(".")
    if step[0] == "skip" and not inside:
        return int(layer), -1
    order = [
        *[
            ("", "input"),
            ("ln_1", "output"),
            ("attn.qkv", "output"),
            ("attn.out", "input"),
            ("attn", "output"),
        ],
        *[
            ("ln_2", "input"),
            ("ln_2", "branch"),
            ("mlp.out", "input"),
            ("mlp", "output"),
            ("", "output"),
        ],
    ]
    return int(layer), order.index((inside, side))


@settings(max_examples=100, deadline=None)
@given(read=wholes, write=wholes, tap=wholes)
def test_plan_is_plain_data_in_execution_order(
    read: list[Site], write: list[Site], tap: list[Site]
) -> None:
    """Only tuples, lists, strings, integers, slices, tensors and None; modules as they are run."""
    values = {site: written(site) for site in write if site.kind != "pattern"}
    plan = make_plan(SEQUENTIAL, read, values, tap)
    assert is_plain(plan)
    assert [moment(step) for step in plan] == sorted(moment(step) for step in plan)
    assert sum(step[0] == "read" for step in plan) == len({site.whole for site in read})
    assert sum(step[0] == "tap" for step in plan) == len({site.whole for site in tap})


@settings(max_examples=50, deadline=None)
@given(site=whole.filter(lambda site: site.kind != "pattern"))
def test_site_is_written_then_tapped_then_read(site: Site) -> None:
    """A read shows what was written there, and a gradient is taken at what was written."""
    plan = make_plan(SEQUENTIAL, [site], {site: written(site)}, [site])
    *before, tap, read = [step[0] for step in plan if step[0] != "skip"]
    assert (tap, read) == ("tap", "read")
    assert set(before) == {"overwrite" if site.kind == "resid_mid" else "write"}


def skipped(plan: list[tuple[Any, ...]]) -> list[str]:
    """Paths of the modules that are not run."""
    return [step[1] for step in plan if step[0] in ("skip", "pass")]


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_skip_only_what_nobody_needs(layer: int) -> None:
    """A whole written stream skips every earlier block, unless something there is asked for."""
    site = Site("resid_pre", layer)
    value = {site: written(site)}

    everything = ["wte"] * (layer > 0) + [f"h.{earlier}" for earlier in range(layer)]
    assert skipped(make_plan(SEQUENTIAL, [], value, [])) == everything
    assert skipped(make_plan(SEQUENTIAL, [Site("z", N_LAYERS - 1)], value, [site])) == everything
    if layer:
        before = Site("z", layer - 1)
        assert skipped(make_plan(SEQUENTIAL, [before], value, [])) == []
        assert skipped(make_plan(SEQUENTIAL, [], value, [before])) == []
        assert skipped(make_plan(SEQUENTIAL, [], {**value, before: written(before)}, [])) == []
        assert skipped(make_plan(SEQUENTIAL, [Site("embed")], value, [])) == []
        last = Site("resid_pre", layer, position=-1)
        assert skipped(make_plan(SEQUENTIAL, [], {last: written(last)}, [])) == []


def test_module_whose_output_is_written_is_not_run() -> None:
    """Unless something inside it is asked for, or only a part of its output is written."""
    out, mlp, z = Site("attn_out", 1), Site("mlp_out", 1), Site("z", 1)
    ports = [Site(kind, 1) for kind in "qkv"]

    def plan(*write: Site, read: list[Site] | None = None, tap: list[Site] | None = None) -> Any:
        values = {site: written(site) for site in write}
        return skipped(make_plan(SEQUENTIAL, read or [], values, tap or []))

    assert plan(out) == ["h.1.ln_1", "h.1.attn"]
    assert plan(out, read=[Site("resid_mid", 1)]) == ["h.1.ln_1", "h.1.attn"]
    assert plan(out, read=[z]) == plan(out, ports[0]) == plan(out, tap=[out]) == []
    assert plan(mlp, read=[mlp]) == ["h.1.mlp"]
    hidden = Site("mlp_post", 1)
    assert plan(mlp, read=[hidden]) == plan(mlp, hidden) == plan(mlp, tap=[hidden]) == []
    assert plan(mlp, tap=[mlp]) == plan(Site("mlp_out", 1, position=0)) == []
    assert plan(*ports) == ["h.1.attn.qkv"]
    assert plan(*ports[:2]) == plan(*ports, tap=ports[:1]) == []
    assert plan(Site("resid_post", 1)) == ["wte", "h.0", "h.1"]
    assert plan(Site("resid_post", 1), read=[mlp]) == []


def test_end_of_a_pass_is_cut_to_what_is_asked() -> None:
    """The last position alone where only its logits count; nothing at all after the last site."""

    def steps(ending: Ending, *read: Site, write: tuple[Site, ...] = ()) -> list[tuple[str, str]]:
        values = {site: written(site) for site in write}
        plan = make_plan(SEQUENTIAL, read, values, [], ending)
        return [(step[0], step[1]) for step in plan if step[0] not in ("read", "write", "skip")]

    end = N_LAYERS - 1
    last, block, norm = Ending(last_only=True), f"h.{end}", f"h.{end}.ln_2"
    whole = [("fork", block), ("last", f"{block}.attn.out"), ("widen", "ln_f")]
    assert steps(Ending()) == []
    assert steps(last) == steps(last, Site("z", end), Site("mlp_out", end - 1)) == whole
    assert steps(last, Site("mlp_out", end)) == []
    assert steps(last, Site("attn_out", end)) == [("last", norm)]
    out, heard = Site("attn_out", end), Site("mlp_in", end)
    begun = [("last", block), ("pass", f"{block}.ln_1"), ("widen", "ln_f")]
    assert steps(last, write=(out,)) == begun
    assert steps(last, write=(out, heard)) == [("pass", f"{block}.ln_1"), ("last", norm)]
    assert steps(last, write=(Site("resid_post", end),)) == []
    tokens = Ending(last_only=True, tokens=torch.tensor([3, 5]))
    assert steps(tokens) == [*whole, ("unembed", "lm_head")]
    until = steps(Ending(last_only=True, stop=True), Site("z", 0), write=(Site("q", 0),))
    later = [("pass", f"h.{layer}") for layer in range(1, N_LAYERS)]
    assert until == [("last", "h.0.attn.out"), ("pass", "h.0.mlp"), *later, ("pass", "lm_head")]


@pytest.mark.parametrize("locator", [SEQUENTIAL, INTERLEAVED], ids=["thirds", "interleaved"])
def test_heads_have_their_own_columns(locator: Locator) -> None:
    """q, k and v of all heads tile the projection; a view takes what the columns say."""
    width = 3 * N_HEADS * D_HEAD
    value = torch.arange(BATCH * POS * width).view(BATCH, POS, width)
    columns = []
    for kind in ("q", "k", "v"):
        for head in range(N_HEADS):
            site = Site(kind, 0, head)
            own = locator.columns(site, head)
            columns += range(width)[own]
            assert torch.equal(locator.view(site, value), value[..., own])
            assert torch.equal(locator.view(Site(kind, 0), value)[:, :, head], value[..., own])
    assert sorted(columns) == list(range(width))


@pytest.mark.parametrize("kind", ["q", "z"])
def test_writing_all_heads_is_writing_each(kind: str) -> None:
    """A whole per-head site is written head by head, each value to its own columns."""
    value = torch.randn(BATCH, POS, N_HEADS, D_HEAD, generator=torch.Generator().manual_seed(0))
    together = list(INTERLEAVED.writes(Site(kind, 1), value))
    for head, step in enumerate(together):
        (alone,) = INTERLEAVED.writes(Site(kind, 1, head), value[:, :, head])
        assert step[:-1] == alone[:-1]
        assert torch.equal(step[-1], alone[-1])
    assert len(together) == N_HEADS


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_shape_of_a_site(kind: str) -> None:
    """Shapes are the words of Site.shape with this model's sizes."""
    names = {
        "batch": BATCH,
        "pos": POS,
        "n_heads": N_HEADS,
        "d_head": D_HEAD,
        "d_model": 8,
        "d_mlp": D_MLP,
    }
    names |= {"query": POS, "key": POS}
    words = Site(kind, 0).shape.strip("[]").split(", ")
    assert SEQUENTIAL.shape(Site(kind, 0), BATCH, POS) == tuple(names[word] for word in words)


def test_fit_broadcasts_and_refuses() -> None:
    """Tensors broadcast to the site; one that would broadcast the site is refused."""
    site = Site("z", 0, head=1, position=2)
    assert SEQUENTIAL.fit(site, torch.zeros(()), BATCH, POS).shape == (BATCH, D_HEAD)
    assert SEQUENTIAL.fit(site, torch.zeros(D_HEAD), BATCH, POS).shape == (BATCH, D_HEAD)
    for shape in ((BATCH, POS, D_HEAD), (3, D_HEAD), (D_HEAD + 1,)):
        with pytest.raises(SiteError, match=r"it must broadcast to .*, here \[2, 4\]"):
            SEQUENTIAL.fit(site, torch.zeros(shape), BATCH, POS)


def test_sites_that_a_family_lacks() -> None:
    """Parallel blocks have no stream in their middle, and some MLPs no one hidden layer."""
    with pytest.raises(SiteError, match=r"resid_mid\.1 does not exist: .* use resid_pre or resid_"):
        PARALLEL.place(Site("resid_mid", 1))
    with pytest.raises(SiteError, match=r"mlp_post\.1 does not exist: .* or use mlp_out"):
        Locator(architecture(mlp_output_projection="")).place(Site("mlp_post", 1))
    for kind in ("resid_pre", "resid_post", "mlp_in"):
        assert PARALLEL.place(Site(kind, 1)).path.startswith("h.1")


def test_sites_in_one_tensor_share_a_place() -> None:
    """q, k and v of a fused projection are one tensor; the MLP's own reading is not the stream."""
    fused = {SEQUENTIAL.place(Site(kind, 1)) for kind in ("q", "k", "v")}
    assert len(fused) == 1
    kinds = ("resid_pre", "q", "z", "pattern", "attn_out", "resid_mid", "mlp_in", "mlp_post")
    kinds = (*kinds, "mlp_out")
    assert len({SEQUENTIAL.place(Site(kind, 1)) for kind in kinds}) == len(kinds)
