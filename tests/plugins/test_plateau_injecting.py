"""Injection: totals, components, neurons and slopes against stock models under hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import oracles
import pytest
import torch
from circuitlab_activation_plateaus.steering.injecting import (
    Injection,
    Readout,
    inject,
    readout,
    slopes,
)
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    EncodedTask,
    OptionError,
    PromptPair,
    QualityError,
    Site,
    SiteError,
    Task,
    TaskError,
    TracedModel,
    load_model,
)

#: And those with norms behind attention and MLP, caps, windows, fused projections and experts.
KINDS = ("gpt2", *families.FAMILIES, "gemma2", "gemma3", "olmo2", "qwen3", "phi3", "mixtral")
LENGTHS = [6, 4, 3]
STEPS = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.0], dtype=torch.float64)


def small(kind: str) -> tuple[Any, TracedModel]:
    if kind == "gpt2":
        module = oracles.random_gpt2(3, 2, 16, dtype=torch.float32, seed=1)
        return module, load_model((module, None))
    module = families.random_module(kind, 3, seed=1)
    return module, families.traced(module)


def blocks(module: Any) -> Any:
    return next(
        part
        for name, part in module.named_modules()
        if name in ("transformer.h", "model.layers", "gpt_neox.layers")
    )


def added_to(pairs: EncodedTask, width: int = 16) -> Tensor:
    """A vector of its own for every token; 0 at padding."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(*pairs.clean.ids.shape, width, generator=generator, dtype=torch.float64)
    return noise * pairs.clean.mask[..., None]


@torch.no_grad()
def plain_logits(module: Any, prompt: tuple[int, ...], layer: int, push: Tensor) -> Tensor:
    """Logits, before any cap, after the last token of a prompt whose stream is pushed."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        found.append(output[0, -1].double())

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + push, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + push}

    hooks = [
        blocks(module)[layer].register_forward_pre_hook(before, with_kwargs=True),
        module.get_output_embeddings().register_forward_hook(keep),
    ]
    try:
        module(torch.tensor([prompt]))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]


def difference(logits: Tensor, pair: PromptPair) -> float:
    right, wrong = (logits[list(ids)].mean() for ids in (pair.answers, pair.wrong_answers))
    return float(right - wrong)


def plain_totals(module: Any, task: Task, layer: int, added: Tensor) -> Tensor:
    """Logit differences ``[n_coefficients, n_prompts]``, one run for each number."""
    rows = []
    for c in STEPS.tolist():
        row = []
        for pair, push in zip(task.pairs, added, strict=True):
            assert isinstance(pair.clean, tuple)
            own = (c * push[-len(pair.clean) :]).to(next(module.parameters()).dtype)
            row.append(difference(plain_logits(module, pair.clean, layer, own), pair))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def scanned(
    model: TracedModel, task: Task, site: Site, **options: Any
) -> tuple[Injection, Readout, Tensor]:
    pairs = model.encode(task)
    read, added = readout(model, pairs), added_to(pairs)
    return inject(model, pairs.clean, site, added, STEPS, read, **options), read, added


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sum_of_components_is_the_plain_models_logit_difference(kind: str) -> None:
    """At every coefficient, on padded prompts, against one stock run per prompt and coefficient."""
    module, model = small(kind)
    task = random_task(LENGTHS)
    for layer in (0, 1):
        found, _, added = scanned(model, task, Site("resid_pre", layer))
        plain = plain_totals(module, task, layer, added)
        assert (found.totals - plain).abs().max() < 1e-4
        assert (found.attributions.sum(0) - plain).abs().max() < 1e-3
        assert found.gap == float((found.attributions.sum(0) - found.totals).abs().max())


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_every_stream_is_the_stream_before_what_follows(kind: str) -> None:
    """The end of a block is the beginning of the next; behind the last one only logits follow."""
    module, model = small(kind)
    task = random_task(LENGTHS)
    before, _, _ = scanned(model, task, Site("resid_pre", 1))
    after, _, _ = scanned(model, task, Site("resid_post", 0))
    assert torch.allclose(before.attributions, after.attributions, atol=1e-5)
    last, read, added = scanned(model, task, Site("resid_post", 2))
    assert (last.attributions.sum(0) - last.totals).abs().max() < 1e-3
    pair = task.pairs[0]
    assert isinstance(pair.clean, tuple)
    body = getattr(module, "transformer", None) or module.gpt_neox
    norm = getattr(body, "ln_f", None) or body.final_layer_norm
    streams: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: streams.append(args[0][0, -1]))
    module(torch.tensor([pair.clean]))
    hook.remove()
    for row, c in enumerate(STEPS.tolist()):
        with torch.no_grad():
            moved = streams[0] + (c * added[0, -1]).float()
            logits = module.get_output_embeddings()(norm(moved))
        assert abs(float(last.totals[row, 0]) - difference(logits.double(), pair)) < 1e-4
    assert read.what.startswith("mean logit of the right answers - mean logit")


def test_each_component_has_its_own_part() -> None:
    """Write · W over that row's own norm, from a model written out component by component."""
    module = oracles.random_gpt2(2, 2, 16, seed=4)
    model, task = load_model((module, None)), random_task([5, 3])
    found, _, added = scanned(model, task, Site("resid_pre", 0))
    norm, unembed = module.transformer.ln_f, module.lm_head.weight.double()
    assert found.names == (*model.wiring.sources, "biases", "injection")
    for number, pair in enumerate(task.pairs):
        ids = torch.tensor([pair.clean])
        own = oracles.run(module, ids).outputs["input"]
        direction = unembed[pair.answers[0]] - unembed[pair.wrong_answers[0]]
        for row, c in enumerate(STEPS.tolist()):
            push = c * added[number, -ids.shape[1] :]
            with torch.no_grad():
                run = oracles.run(module, ids, embedding=own + push)
                stream = run.inputs["logits", ""][0, -1]
                writes = {name: each[0, -1] for name, each in run.outputs.items()}
                writes |= {"input": own[0, -1], "injection": push[-1]}
                scale = (stream.var(correction=0) + norm.eps).sqrt()
                along = norm.weight * direction
                parts = {
                    name: float((each - each.mean()) @ along / scale)
                    for name, each in writes.items()
                }
            for name, part in parts.items():
                value = found.attributions[found.names.index(name), row, number]
                assert abs(float(value) - part) < 1e-9, name


def test_linear_model_gives_straight_lines() -> None:
    """Without norms and with frozen attention, one layer: slopes are v · W and those of OV."""
    module: Any = oracles.random_gpt2(1, 2, 16, layer_norm=False, mlp=False, seed=2)
    module.requires_grad_(False)
    attention = module.transformer.h[0].attn
    with torch.no_grad():  # no queries and keys: every token looks at all before it alike
        attention.c_attn.weight[:, :32] = 0
        attention.c_attn.bias[:32] = 0
    model, task = load_model((module, None)), random_task([5, 3])
    found, _, _ = scanned(model, task, Site("resid_pre", 0))
    pairs = model.encode(task)
    added, unembed = added_to(pairs), module.lm_head.weight.detach()
    value, output = attention.c_attn.weight[:, 32:], attention.c_proj.weight
    for number, pair in enumerate(task.pairs):
        own = added[number, -len(pair.clean) :]
        w = unembed[pair.answers[0]] - unembed[pair.wrong_answers[0]]
        slope = {"injection": own[-1] @ w}
        for head in (0, 1):
            columns = slice(8 * head, 8 * head + 8)
            slope[f"a0.h{head}"] = own.mean(0) @ value[:, columns] @ output[columns] @ w
        for row, name in enumerate(found.names):
            line = found.attributions[row, :, number]
            expected = line[2] + STEPS * float(slope.get(name, 0.0))
            assert torch.allclose(line, expected, atol=1e-9), name
        total = found.totals[:, number]
        assert torch.allclose(total, total[2] + STEPS * float(sum(slope.values())), atol=1e-9)


def test_neurons_sum_to_their_mlp() -> None:
    """Each neuron's activation times its output weights along W, over the row's norm."""
    module = oracles.random_gpt2(2, 2, 16, seed=4)
    model, task = load_model((module, None)), random_task([5, 3])
    found, _, added = scanned(model, task, Site("resid_pre", 0), neurons=1)
    assert found.neurons is not None
    mlp, norm, unembed = module.transformer.h[1].mlp, module.transformer.ln_f, module.lm_head.weight
    kept: list[Tensor] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1]))
        for part in (mlp.c_proj, norm)
    ]
    for number, pair in enumerate(task.pairs):
        assert isinstance(pair.clean, tuple)
        direction = unembed[pair.answers[0]] - unembed[pair.wrong_answers[0]]
        for row, c in enumerate(STEPS.tolist()):
            kept.clear()
            plain_logits(module, pair.clean, 0, c * added[number, -len(pair.clean) :])
            hidden, stream = kept
            out = mlp.c_proj.weight - mlp.c_proj.weight.mean(1, keepdim=True)
            scale = (stream.var(correction=0) + norm.eps).sqrt()
            parts = hidden * (out @ (norm.weight * direction)) / scale
            assert torch.allclose(found.neurons[:, row, number].double(), parts, atol=1e-5)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_gated_mlps_have_neurons_too(kind: str) -> None:
    """What the output projection reads, also through a norm behind the MLP."""
    _, model = small(kind)
    found, _, _ = scanned(model, random_task(LENGTHS), Site("resid_pre", 1), neurons=1)
    assert found.neurons is not None
    whole = found.attributions[found.names.index("m1")]
    assert torch.allclose(found.neurons.double().sum(0), whole, atol=1e-4)


# --- what must not matter -------------------------------------------------------------------------


def test_batches_and_padding_do_not_matter() -> None:
    """One row at a time, or one prompt without its padding, gives the same numbers."""
    _, model = small("gpt2")
    task = random_task(LENGTHS)
    whole, _, added = scanned(model, task, Site("resid_pre", 1))
    single, _, _ = scanned(model, task, Site("resid_pre", 1), batch_size=1)
    assert torch.allclose(whole.attributions, single.attributions, atol=1e-5)
    for number, pair in enumerate(task.pairs):
        alone = model.encode(replace(task, pairs=(pair,)))
        own = added[number : number + 1, -len(pair.clean) :]
        found = inject(model, alone.clean, Site("resid_pre", 1), own, STEPS, readout(model, alone))
        assert torch.allclose(
            found.attributions[..., 0], whole.attributions[..., number], atol=1e-5
        )


def test_totals_alone_are_the_same() -> None:
    """A control needs no components."""
    _, model = small("gpt2")
    task = random_task(LENGTHS)
    whole, _, _ = scanned(model, task, Site("resid_mid", 1))
    alone, _, _ = scanned(model, task, Site("resid_mid", 1), decompose=False)
    assert torch.allclose(whole.totals, alone.totals, atol=1e-5)
    assert alone.names == ()


# --- read-out and slopes --------------------------------------------------------------------------


def test_readout_of_several_answers_and_of_none() -> None:
    """Means over answers; without wrong ones the mean of all logits takes their place."""
    module, model = small("gpt2")
    prompt = (3, 7, 9)
    logits = module(torch.tensor([prompt])).logits[0, -1].detach().double()
    pair = PromptPair(prompt, (3, 7, 8), (4, 5), (6, 1, 2))
    free = PromptPair(prompt, (3, 7, 8), (4, 5))
    for task, expected in (
        (Task("several", (pair,)), difference(logits, pair)),
        (Task("free", (free,), "answer-log-prob"), float(logits[[4, 5]].mean() - logits.mean())),
    ):
        found, _, _ = scanned(model, task, Site("resid_pre", 1))
        assert abs(float(found.totals[2, 0]) - expected) < 1e-4
        assert found.gap < 1e-3
    mixed = Task("mixed", (pair, free), "answer-log-prob")
    with pytest.raises(TaskError, match="pair 2 names no wrong answer"):
        readout(model, model.encode(mixed))


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid"])
def test_slopes_are_derivatives(kind: str) -> None:
    """By central differences of the scan, and of the part that is injected at the last position."""
    model = load_model((oracles.random_gpt2(2, 2, 16, seed=4), None))
    pairs = model.encode(random_task([5, 3]))
    read, added = readout(model, pairs), added_to(pairs)
    site, h = Site(kind, 1), 1e-4
    near = inject(model, pairs.clean, site, added, torch.tensor([-h, h], dtype=torch.float64), read)
    whole, direct = slopes(model, pairs.clean, site, added, read, batch_size=1)
    assert torch.allclose(whole, near.totals.diff(dim=0)[0] / (2 * h), atol=1e-6)
    own = near.attributions[-1].diff(dim=0)[0] / (2 * h)
    assert torch.allclose(direct, own, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------


def test_what_does_not_add_up_is_refused() -> None:
    """A read-out along something else than the unembedding is noticed in the first pass."""
    _, model = small("gpt2")
    pairs = model.encode(random_task(LENGTHS))
    read = readout(model, pairs)
    wrong = replace(read, direction=1.01 * read.direction)
    with pytest.raises(QualityError, match="components sum to the model's logit difference but"):
        inject(model, pairs.clean, Site("resid_pre", 1), added_to(pairs), STEPS, wrong)


def test_what_does_not_fit_is_refused() -> None:
    """No batch of no rows, no layer that is not there, no neurons of such a layer."""
    _, model = small("gpt2")
    task = random_task(LENGTHS)
    with pytest.raises(OptionError, match="batch size 0 is too small"):
        scanned(model, task, Site("resid_pre", 1), batch_size=0)
    with pytest.raises(SiteError, match="layers run from 0 to 2"):
        scanned(model, task, Site("resid_pre", 7))
    with pytest.raises(SiteError, match="layers run from 0 to 2"):
        scanned(model, task, Site("resid_pre", 1), neurons=3)
