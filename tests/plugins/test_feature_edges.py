"""Edges between latents: statistics against loops and autograd, effects on the metric."""

from __future__ import annotations

import pytest
import torch
from circuitlab_feature_interactions.edges import (
    EdgeSums,
    Events,
    SparseSums,
    edges_holding,
    mass_curve,
)
from circuitlab_feature_interactions.gathering import COMPUTED, SKIP, gather
from circuitlab_feature_interactions.logits import metric_effects, removed_effects
from circuitlab_feature_interactions.sites import site_pairs
from feature_oracles import (
    N,
    dictionaries,
    prompts_of,
    random_dictionary,
    run_from,
    unpadded,
)
from path_scores import padded_pairs, small_model
from torch import Tensor

from circuitlab import (
    Site,
)

# --- statistics -----------------------------------------------------------------------------------


def random_events(n: int = 400, seed: int = 0) -> Events:
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, 30, (n,), generator=generator)
    target = torch.randint(0, 4, (n,), generator=generator)
    source = torch.randint(0, 6, (n,), generator=generator)
    value, z = torch.randn(2, n, generator=generator, dtype=torch.float64)
    offset = torch.randint(0, 5, (n,), generator=generator)
    return Events(token, target, source, value, z.abs(), offset)


def test_sums_by_key_are_those_of_a_dict() -> None:
    """Keys in any order and number, over several batches."""
    generator = torch.Generator().manual_seed(0)
    sums, expected = SparseSums(2), dict[int, Tensor]()
    for _ in range(5):
        keys = torch.randint(0, 1 << 40, (9,), generator=generator)
        keys = torch.cat([keys, keys[:4], torch.tensor([7])])
        values = torch.randn(14, 2, generator=generator, dtype=torch.float64)
        sums.add(keys, values)
        for key, value in zip(keys.tolist(), values, strict=True):
            expected[key] = expected.get(key, torch.zeros(2)) + value
    assert sums.keys.tolist() == sorted(expected)
    assert torch.allclose(sums.sums, torch.stack([expected[key] for key in sorted(expected)]))


def test_edge_statistics_are_those_of_a_loop() -> None:
    """Number, means, sign, line and offset of each pair; positions of one token are one event."""
    sums, z = EdgeSums(5, 4), torch.rand(50, 4, dtype=torch.float64) + 0.5
    batches = [random_events(seed=seed) for seed in (1, 2)]
    for events in batches:
        sums.add(events)
    sums.add_targets(torch.arange(4).expand(50, 4), z)
    table = sums.table()
    assert len(table) == 4 * 6
    for row, (i, j) in enumerate(zip(table.target.tolist(), table.source.tolist(), strict=True)):
        r, x, shifted, size = [], [], 0.0, 0.0
        for events in batches:
            for token in range(30):
                here = (events.token == token) & (events.target == i) & (events.source == j)
                if here.any():
                    r.append(float(events.value[here].sum()))
                    x.append(float(events.z_source[here].sum()))
                    shifted += float((events.value.abs() * events.offset)[here].sum())
                    size += float(events.value.abs()[here].sum())
        values, scale = torch.tensor(r, dtype=torch.float64), float(z[:, i].mean())
        assert int(table.n[row]) == len(r)
        assert float(table.mean[row]) == pytest.approx(float(values.mean()) / scale)
        assert float(table.mean_absolute[row]) == pytest.approx(float(values.abs().mean()) / scale)
        same = (values.sign() == values.mean().sign()).double().mean()
        assert float(table.sign_consistency[row]) == pytest.approx(float(same))
        assert float(table.offset[row]) == pytest.approx(shifted / size)
        line = torch.corrcoef(torch.stack([torch.tensor(x, dtype=torch.float64), values]))[0, 1]
        if j == 5:
            assert table.linearity[row].isnan()
        else:
            assert float(table.linearity[row]) == pytest.approx(float(line**2))


def test_a_line_has_r2_1_and_what_does_not_vary_has_none() -> None:
    """Contributions 3 z + 1 are a line; one that is always the same cannot be judged."""
    z = torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    source = torch.tensor([0, 0, 0, 1, 1, 1])
    value = torch.where(source == 0, 3 * z + 1, 2.0)
    zero = torch.zeros(6, dtype=torch.int64)
    sums = EdgeSums(2, 1)
    sums.add(Events(torch.arange(6), zero, source, value, z, zero))
    line, flat = sums.table().linearity
    assert float(line) == pytest.approx(1)
    assert flat.isnan()


def test_the_mass_of_edges() -> None:
    """The strongest first: 5 of 10, then 8, then all; 90 % takes all three."""
    mass = torch.tensor([3.0, 2.0, 5.0, 0.0])
    assert torch.allclose(mass_curve(mass), torch.tensor([0.5, 0.8, 1.0, 1.0]))
    assert [edges_holding(mass, share) for share in (0.5, 0.6, 0.9, 1.0)] == [1, 2, 3, 3]
    assert edges_holding(torch.zeros(3), 0.9) == 0


@pytest.mark.parametrize(("sites", "k"), [("mlp.0", 6), ("block.1", 4), ("block.0", None)])
def test_gathered_edges_are_those_of_autograd(sites: str, k: int | None) -> None:
    """Gradients of target latents at the stream, one by one, times what each source writes."""
    module, model = small_model("gpt2")
    (pair,) = site_pairs(sites, model)
    found = dictionaries([pair], k)
    reads, writes = found[pair.source], found[pair.target]
    tokens, alone = prompts_of(model)
    batches = [tokens.rows([0]), tokens.rows([1, 2])]
    (interactions,) = gather(model, [pair], found, batches).interactions
    computed: dict[tuple[int, int], list[float]] = {}
    carried: dict[tuple[int, int], list[float]] = {}
    active: dict[int, list[float]] = {}
    for ids in alone:
        x = model.run(unpadded(ids), read=[pair.source])[pair.source].requires_grad_()
        out = run_from(module, pair, ids, x)
        z, errors = reads.encode(x)[0].detach(), reads.error(x)[0].detach()
        y = writes.encode(out.detach())[0]
        written = torch.cat([z[..., None] * reads.W_d, errors[:, None]], 1)
        on = torch.cat([z != 0, torch.ones(len(z), 1).bool()], 1)
        for t, i in (y != 0).nonzero().tolist():
            active.setdefault(i, []).append(float(y[t, i]))
            (slope,) = torch.autograd.grad(out[0, t] @ writes.W_e[:, i], x, retain_graph=True)
            skip = torch.zeros_like(slope[0])
            if pair.route == "block":
                skip[t] = writes.W_e[:, i]
            for j in range(N + 1):
                seen = on[t, j] if pair.route == "mlp" else on[: t + 1, j].any()
                if seen:
                    by_position = ((slope[0] - skip) * written[:, j]).sum(-1)
                    computed.setdefault((i, j), []).append(float(by_position.sum()))
                if pair.route == "block" and on[t, j]:
                    carried.setdefault((i, j), []).append(float(skip[t] @ written[t, j]))
    for part, expected in ((COMPUTED, computed), (SKIP, carried)):
        if part not in interactions.sums:
            assert not expected
            continue
        table = interactions.sums[part].table()
        names = list(zip(table.target.tolist(), table.source.tolist(), strict=True))
        assert set(names) == set(expected)
        for row, name in enumerate(names):
            values = torch.tensor(expected[name], dtype=torch.float64)
            scale = sum(active[name[0]]) / len(active[name[0]])
            assert int(table.n[row]) == len(values)
            assert float(table.mean[row]) == pytest.approx(float(values.mean()) / scale, abs=1e-9)
            assert float(table.mean_absolute[row]) == pytest.approx(
                float(values.abs().mean()) / scale, abs=1e-9
            )


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["mlp_out.0", "resid_pre.1", "resid_post.1"])
def test_effects_on_the_metric_are_derivatives(site: str) -> None:
    """Gradient times activation is the slope of the metric as a latent is taken out a little."""
    _, model = small_model("gpt2")
    pairs, dictionary = padded_pairs(model), random_dictionary()
    kind, layer = site.split(".")
    place = Site(kind, int(layer))
    effects = metric_effects(model, pairs, place, dictionary, batch_size=2)
    run = model.run(pairs.clean, read=[place])
    x, reference, step = run[place], run.logits[:, -1], 1e-4
    assert torch.allclose(effects.metric, pairs.score(reference, reference))
    z = dictionary.encode(x)
    for latent in range(N + 1):
        written = dictionary.error(x) if latent == N else z[..., [latent]] * dictionary.W_d[latent]
        sides = [
            pairs.score(
                model.run(pairs.clean, write={place: (x + s * written)}).logits[:, -1],
                reference,
            )
            for s in (step, -step)
        ]
        assert torch.allclose(
            effects.effects[:, latent], (sides[0] - sides[1]) / (2 * step), atol=1e-6
        )
        on = torch.ones(3).bool() if latent == N else ((z[..., latent] != 0) & run.mask).any(1)
        assert torch.equal(effects.active[:, latent], on)


def test_removed_latents_are_those_of_single_runs() -> None:
    """metric(clean) - metric(without), for latents and the error."""
    _, model = small_model("gpt2")
    pairs, dictionary, site = padded_pairs(model), random_dictionary(), Site("resid_post", 0)
    found = removed_effects(model, pairs, site, dictionary, [3, N], batch_size=2)
    run = model.run(pairs.clean, read=[site])
    z, reference = dictionary.encode(run[site]), run.logits[:, -1]
    clean = pairs.score(reference, reference)
    without = torch.where(torch.arange(N) == 3, 0.0, z)
    values = [dictionary.decode(without) + dictionary.error(run[site]), dictionary(run[site])]
    for row, value in enumerate(values):
        logits = model.run(pairs.clean, write={site: value}).logits[:, -1]
        assert torch.allclose(found[row], clean - pairs.score(logits, reference))
