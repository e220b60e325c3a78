"""Bundles of curves: closed forms, brute force by hooks, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuitlab_activation_plateaus.walks import bundle
from circuitlab_activation_plateaus.walks.bundle import Bundle, Settings, measure, on_grid
from circuitlab_activation_plateaus.walks.pairs import Bank, make_bank
from circuitlab_activation_plateaus.walks.paths import PATHS
from circuitlab_activation_plateaus.walks.walking import refined
from families import family_model
from oracles import random_gpt2
from plateau_oracles import Hooked, build, put, same
from torch import Tensor

from circuitlab import OptionError, PromptPair, Site, Task, TaskError, TracedModel, load_model
from circuitlab.testing import toy_task

SITE = Site("resid_pre", 1)


def linear_model() -> TracedModel:
    """Two layers without norms, the second of which writes nothing: a linear map to the logits."""
    module: Any = random_gpt2(layer_norm=False, mlp=False)
    with torch.no_grad():
        for parameter in module.transformer.h[1].attn.c_proj.parameters():
            parameter.zero_()
    return load_model((module, None))


def last_token(model: TracedModel, n: int = 12) -> Bank:
    """Padded pairs that differ in the last token."""
    return make_bank(model, toy_task(), "last-token", n)


def test_linear_model() -> None:
    """A linear map answers a straight walk evenly: d = t, width .8, slope 1, and all else."""
    model = linear_model()
    found = measure(model, last_token(model), Settings(SITE, "lerp", "d-rel"), "walking")
    expected = {"width": 0.8, "max_slope": 1.0, "location": 0.5, "participation": 1.0}
    expected |= {"boundaries": 0.0, "flat_start": 0.1, "flat_end": 0.1, "deviation": 0.0}
    assert found.rows == list(range(12))
    assert torch.allclose(found.response, found.t, atol=1e-9)
    for name, value in expected.items():
        for summary in (found.out, found.inside):
            numbers = getattr(summary, name).double()
            assert torch.allclose(numbers, torch.full_like(numbers, value), atol=1e-6), name
    assert found.reach == pytest.approx(torch.ones(12), abs=1e-9)


def slow(family: str, module: Any, bank: Bank, row: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """d_sym of logits and points on a straight walk, by hooks on one unpadded prompt."""
    hooked = Hooked(module, family)
    a, b = (side.ids[row][side.mask[row]] for side in (bank.a, bank.b))
    ends = [hooked.run(ids, {SITE: same})[1][SITE][-1] for ids in (a, b)]
    points = [(1 - x) * ends[0] + x * ends[1] for x in t.tolist()]
    logits = torch.stack([hooked.run(a, {SITE: put(-1, point)})[0] for point in points])
    curves = []
    for values in (logits, torch.stack(points)):
        near, far = (values - values[0]).norm(dim=-1), (values - values[-1]).norm(dim=-1)
        curves.append(near / (near + far))
    return curves[0], curves[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["last-token", "task"])
def test_brute_force(family: str, kind: str) -> None:
    """Curves of padded pairs are those of a stock model under hooks, prompt by prompt."""
    module, model = build(family)
    bank = make_bank(model, toy_task(), kind, 3)
    found = measure(model, bank, Settings(SITE, "lerp", steps=5, refine=2), "walking")
    assert found.rows == [0, 1, 2]
    for row in found.rows:
        response, reference = slow(family, module, bank, row, found.t[row])
        assert torch.allclose(found.response[row], response.double(), atol=1e-4)
        assert torch.allclose(found.reference[row], reference.double(), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_reach_and_misfit(family: str) -> None:
    """Where only the last token differs, B's activation gives what B gives; else it need not."""
    module, model = build(family)
    own = measure(model, last_token(model, 6), Settings(SITE), "walking")
    assert float(own.misfit.max()) < 1e-5
    assert torch.allclose(own.reach, torch.ones(6, dtype=torch.float64), atol=1e-5)
    bank = make_bank(model, toy_task(), "task", 3)
    other = measure(model, bank, Settings(SITE, "lerp"), "walking")
    hooked = Hooked(module, family)
    for row in range(3):
        a, b = (side.ids[row][side.mask[row]] for side in (bank.a, bank.b))
        (start, _), (target, seen) = (hooked.run(ids, {SITE: same}) for ids in (a, b))
        end = hooked.run(a, {SITE: put(-1, seen[SITE][-1])})[0]
        reach = float((end - start).norm() / (target - start).norm())
        misfit = float((end - target).norm() / target.norm())
        assert float(other.reach[row]) == pytest.approx(reach, rel=1e-3)
        assert float(other.misfit[row]) == pytest.approx(misfit, rel=1e-3)
        assert misfit > 0.01


def test_swapping_ends() -> None:
    """Walked from B to A, curves turn round: width and slope stay, the location is mirrored."""
    model = load_model((random_gpt2(), None))
    bank, settings = last_token(model, 6), Settings(SITE, refine=0)
    there, back = (measure(model, each, settings, "walking") for each in (bank, bank.swapped))
    for name in ("width", "max_slope", "participation", "deviation"):
        assert torch.allclose(getattr(there.out, name), getattr(back.out, name), atol=1e-6), name
    assert torch.allclose(there.out.location, 1 - back.out.location, atol=1e-6)
    assert torch.allclose(there.response, 1 - back.response.flip(1), atol=1e-6)


@pytest.mark.parametrize("response", ["d-sym", "kl"])
def test_few_pairs_at_a_time(response: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves do not depend on how many pairs are looked at together; walks are kept on request."""
    model = load_model((random_gpt2(), None))
    bank, settings = last_token(model, 5), Settings(SITE, response=response, steps=7, refine=2)
    whole = measure(model, bank, settings, "walking", read=[Site("resid_post", 1)])
    assert whole.walks is not None
    assert whole.walks.read[Site("resid_post", 1)].shape == (5, 9, 16)
    monkeypatch.setattr(bundle, "LOGITS", 2 * 8 * 40 * 9)
    parts = measure(model, bank, settings, "walking")
    assert parts.walks is None
    assert parts.rows == whole.rows
    for name in ("t", "response", "reference", "reach", "misfit"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-9), name
    assert torch.allclose(parts.out.width, whole.out.width, atol=1e-9)


def test_large_vocabulary() -> None:
    """Logits kept in the space of their differences have the same distances, speeds and ends."""
    model = load_model((random_gpt2(vocab=400), None))
    bank, settings = last_token(model, 5), Settings(SITE, steps=9, refine=2)
    found = measure(model, bank, settings, "walking", read=[])
    assert found.walks is not None
    assert found.walks.logits.shape == (5, 11, 16)
    ends = tuple(found.walks.points[:, place] for place in (0, -1))
    full = refined(
        model, bank.a, SITE, PATHS["slerp"], (ends[0], ends[1]), steps=9, refine=2
    ).logits
    assert full.shape == (5, 11, 400)
    near, far = ((full - full[:, [place]]).norm(dim=-1) for place in (0, -1))
    assert torch.allclose(found.response, near / (near + far), atol=1e-7)
    speeds = (full.diff(dim=1).norm(dim=-1) / found.t.diff(dim=1)) * found.t.diff(dim=1)
    kept = found.walks.logits.diff(dim=1).norm(dim=-1)
    assert torch.allclose(kept, speeds, rtol=1e-6)
    assert float(found.misfit.max()) < 1e-6


def test_large_vocabulary_of_capped_logits() -> None:
    """A cap bends logits out of that space: all of them are kept."""
    model = family_model("gemma2", vocab_size=400)
    bank, settings = last_token(model, 5), Settings(SITE, steps=9, refine=2)
    found = measure(model, bank, settings, "walking", read=[])
    assert found.walks is not None
    assert found.walks.logits.shape == (5, 11, 400)


def alike(module: Any) -> TracedModel:
    """The model, to which tokens 4 and 5 are the same."""
    with torch.no_grad():
        module.transformer.wte.weight[5] = module.transformer.wte.weight[4]
    return load_model((module, None))


def test_left_out() -> None:
    """A pair whose ends are one point has no curve; where no pair is left, that is an error."""
    model = alike(random_gpt2())
    prompts = [((1, 2, 4), (1, 2, 5)), ((1, 2, 4), (1, 2, 6)), ((7, 4), (7, 5))]
    task = Task("ends", tuple(PromptPair(a, b, (1,), (2,)) for a, b in prompts))
    bank = make_bank(model, task, "task")
    assert measure(model, bank, Settings(SITE), "walking").rows == [1]
    with pytest.raises(TaskError, match="none of the 2 pairs"):
        measure(model, bank.rows([0, 2]), Settings(SITE), "walking")
    deaf: Any = random_gpt2()
    with torch.no_grad():
        deaf.lm_head.weight.zero_()
    silent = load_model((deaf, None))
    with pytest.raises(TaskError, match="earlier --site"):
        measure(silent, last_token(silent), Settings(SITE), "walking")


def test_of() -> None:
    """Chosen rows of the bank keep their own numbers, in the order that is asked for."""
    model = load_model((random_gpt2(), None))
    found = measure(model, last_token(model, 4), Settings(SITE, steps=5), "walking", read=[])
    some = found.of([3, 1])
    assert isinstance(some, Bundle)
    assert some.rows == [3, 1]
    assert some.walks is None
    assert torch.equal(some.t, found.t[[3, 1]])
    assert torch.equal(some.out.width, found.out.width[[3, 1]])
    assert torch.equal(some.inside.max_slope, found.inside.max_slope[[3, 1]])


def test_on_grid() -> None:
    """Curves on a grid are their own values at their own places, and chords between."""
    t = torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.5, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.0, 1.0, 4.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    grid = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1.0, 2.0, 4.0], [2.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(on_grid(t, values, grid), expected)


def test_bands() -> None:
    """The mean lies in its interval; equal pairs and a single pair have none to speak of."""
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    mean, lo, hi = bundle.bands(values)
    assert mean == pytest.approx(values.mean(0).tolist(), abs=1e-6)
    spread = (values.std(0) / 40**0.5).tolist()
    for place in range(3):
        assert lo[place] < mean[place] < hi[place]
        assert hi[place] - lo[place] == pytest.approx(2 * 1.96 * spread[place], rel=0.15)
    assert bundle.bands(values[:1]) == (values[0].tolist(),) * 3


def test_site() -> None:
    """Streams between blocks have one name, as the next block reads them; others are refused."""
    assert bundle.parse_site("resid_post.0", 3) == Site("resid_pre", 1)
    assert bundle.parse_site(" resid_post.2", 3) == Site("resid_post", 2)
    assert bundle.parse_site("resid_mid.1", 3) == Site("resid_mid", 1)
    assert bundle.parse_site("resid_post.1", 3, "embed") == Site("resid_pre", 0)
    for bad in ("resid_post.3", "z.0", "resid_post", "resid_post.-1", ""):
        with pytest.raises(OptionError, match="such as resid_post"):
            bundle.parse_site(bad, 3)
    with pytest.raises(OptionError, match="--read 'mlp_out"):
        bundle.parse_stream("mlp_out.0", 3, "--read")
