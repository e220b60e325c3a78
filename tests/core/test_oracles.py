"""The oracles themselves: each is checked against Hugging Face, autograd or arithmetic."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from oracles import Edge
from torch import Tensor, nn

F64 = torch.finfo(torch.float64).eps


def prompts() -> tuple[Tensor, Tensor]:
    """Clean and corrupt ids, ``[3, 6]`` each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (2, 3, 6), generator=generator)
    return ids[0], ids[1]


def left_pad(ids: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The last ``lengths`` tokens of each row, with a mask; the padding holds arbitrary ids."""
    positions = torch.arange(ids.shape[1])
    mask = (positions >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return torch.where(mask.bool(), ids, 7), mask


def logit_difference(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 5]


def log_prob(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, 3]


def metric_of(module: nn.Module, ids: Tensor, metric: oracles.MetricFunction) -> float:
    """Mean metric of the stock model."""
    with torch.no_grad():
        return float(metric(module(ids).logits[:, -1]).mean())


def rounding(*values: float) -> float:
    """Largest error of some ten thousand float64 additions of such size."""
    return 1e4 * F64 * (1 + math.fsum(abs(value) for value in values))


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "count"), [(4, 4, 479), (3, 4, 262), (12, 12, 32_491)]
)
def test_edge_count(n_layers: int, n_heads: int, count: int) -> None:
    """The graph has the published number of edges, each of them once."""
    edges = oracles.edge_names(n_layers, n_heads)
    assert len(edges) == len(set(edges)) == count


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_norm": False},
        {"mlp": False},
        {"activation": "linear"},
        {"n_layers": 3, "n_heads": 4},
    ],
)
def test_run_equals_stock_model(change: dict[str, Any]) -> None:
    """The split forward pass gives the stock model's logits, in float32 and float64."""
    clean, _ = prompts()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        module = oracles.random_gpt2(dtype=dtype, **change)
        with torch.no_grad():
            stock, split = module(clean).logits, oracles.run(module, clean).logits
        assert (stock - split).abs().max() <= tolerance * stock.abs().max()


def test_run_follows_attention_scaling() -> None:
    """The two attention-scaling switches of the configuration are obeyed."""
    clean, _ = prompts()
    for scaled, by_layer in ((False, False), (True, True)):
        module = oracles.random_gpt2()
        config = module.config
        config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx = scaled, by_layer
        stock: Any = type(module)(config).double()
        stock.eval()
        stock.load_state_dict(module.state_dict())
        with torch.no_grad():
            expected, got = stock(clean).logits, oracles.run(stock, clean).logits
        assert (expected - got).abs().max() <= 1e-13 * expected.abs().max()


def test_padding_changes_nothing() -> None:
    """A left-padded prompt gives the logits it gives alone, whatever stands in the padding."""
    module = oracles.random_gpt2()
    ids, mask = left_pad(prompts()[0], [6, 4, 2])
    with torch.no_grad():
        padded = oracles.run(module, ids, mask).logits
        for row, length in enumerate([6, 4, 2]):
            alone = module(ids[row : row + 1, -length:]).logits[0]
            assert (padded[row, -length:] - alone).abs().max() <= 1e-13 * alone.abs().max()


def test_padding_scores_nothing() -> None:
    """Every score of a padded batch is the mean of the scores of its prompts alone."""
    module, lengths = oracles.random_gpt2(), [6, 4, 2]
    clean, mask = left_pad(prompts()[0], lengths)
    corrupt, _ = left_pad(prompts()[1], lengths)
    for method in (oracles.exact_effects, oracles.eap, oracles.eap_ig):
        together = method(module, clean, corrupt, logit_difference, attention_mask=mask)
        alone = [
            method(module, clean[i : i + 1, -n:], corrupt[i : i + 1, -n:], logit_difference)
            for i, n in enumerate(lengths)
        ]
        for edge, score in together.items():
            mean = math.fsum(scores[edge] for scores in alone) / len(alone)
            assert abs(score - mean) <= rounding(score)


def test_mixes_of_all_edges_replay_the_other_run() -> None:
    """With every edge patched the clean prompt gives the corrupt prompt's logits."""
    module = oracles.random_gpt2()
    clean, corrupt = prompts()
    patched = oracles.patched_metric(
        module, clean, corrupt, logit_difference, oracles.edges_of(module)
    )
    expected = metric_of(module, corrupt, logit_difference)
    assert abs(float(patched.mean()) - expected) <= rounding(expected)


def test_identity_patch_has_no_effect() -> None:
    """An edge that carries the clean prompt's own output changes nothing."""
    module = oracles.random_gpt2()
    clean, _ = prompts()
    for method in (oracles.exact_effects, oracles.eap):
        effects = method(module, clean, clean, logit_difference)
        assert max(abs(effect) for effect in effects.values()) <= rounding(1.0)


def test_edge_into_logits_is_a_residual_swap() -> None:
    """An edge into the logits exchanges the MLP's output in the stock model's final stream."""
    module: Any = oracles.random_gpt2()
    clean, corrupt = prompts()
    written: list[Tensor] = []
    streams: list[Tensor] = []
    gpt2 = module.transformer
    with torch.no_grad():
        handles = [
            gpt2.h[0].mlp.register_forward_hook(lambda m, i, output: written.append(output)),
            gpt2.ln_f.register_forward_pre_hook(lambda m, args: streams.append(args[0])),
        ]
        module(clean), module(corrupt)
        for handle in handles:
            handle.remove()
        swapped = module.lm_head(gpt2.ln_f(streams[0] - written[0] + written[1]))[:, -1]
        patched = float(logit_difference(swapped).mean())
    expected = patched - metric_of(module, clean, logit_difference)
    edge = ("m0", "logits", "")
    effect = oracles.exact_effects(module, clean, corrupt, logit_difference, [edge])[edge]
    assert abs(effect - expected) <= rounding(expected)


def slope(module: nn.Module, edge: Edge, ablation: str, step: float) -> float:
    """Central difference of the mean metric by the patched fraction of one edge."""
    ends = [
        oracles.patched_metric(
            module, *prompts(), log_prob, [edge], ablation=ablation, fraction=fraction
        )
        for fraction in (step, -step)
    ]
    return float((ends[0] - ends[1]).mean()) / (2 * step)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_eap_is_the_slope_of_the_exact_mix(ablation: str) -> None:
    """EAP is the derivative of the exact patch by its fraction, at fraction 0, for every edge."""
    module = oracles.random_gpt2()
    scores = oracles.eap(module, *prompts(), log_prob, ablation=ablation)
    assert len(scores) == len(oracles.edge_names(2, 2))
    step = 1e-3
    for edge, score in scores.items():
        coarse = slope(module, edge, ablation, step)
        fine = slope(module, edge, ablation, step / 2)
        # Richardson: the combination is of fourth order, so its error is below the two's distance.
        extrapolated = (4 * fine - coarse) / 3
        assert abs(score - extrapolated) <= abs(coarse - fine) + rounding(score) / step


def test_eap_sums_to_the_attribution_of_a_component() -> None:
    """Edges out of a component sum to its attribution by the stock model's own backward pass."""
    module: Any = oracles.random_gpt2()
    clean, corrupt = prompts()
    scores = oracles.eap(module, clean, corrupt, log_prob)
    seen: dict[str, list[Any]] = {"mlp": [], "z": []}

    def keep(name: str, value: Tensor) -> None:
        if value.requires_grad:
            value.retain_grad()
        seen[name].append(value)

    block: Any = module.transformer.h[0]
    block.mlp.register_forward_hook(lambda m, i, output: keep("mlp", output))
    block.attn.c_proj.register_forward_pre_hook(lambda m, args: keep("z", args[0]))
    torch.autograd.backward(log_prob(module(clean).logits[:, -1]).mean())
    module(corrupt)
    mlp, z = (((other - own) * own.grad).detach().sum((0, 1)) for own, other in seen.values())
    expected = {"m0": float(mlp.sum()), "a0.h0": float(z[:8].sum()), "a0.h1": float(z[8:].sum())}
    for source, attribution in expected.items():
        assert abs(oracles.outgoing(scores, source) - attribution) <= rounding(attribution)


def completeness_gap(module: nn.Module, steps: int, rule: str, ablation: str) -> float:
    """Sum of EAP-IG over the input's edges, minus the change of the metric it should sum to."""
    clean, corrupt = prompts()
    scores = oracles.eap_ig(
        module, clean, corrupt, logit_difference, ablation=ablation, steps=steps, rule=rule
    )
    start = oracles.ablated_outputs(module, clean, corrupt, ablation)["input"]
    with torch.no_grad():
        ablated = logit_difference(oracles.run(module, clean, embedding=start).logits[:, -1]).mean()
    change = float(ablated) - metric_of(module, clean, logit_difference)
    return oracles.outgoing(scores, "input") - change


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("midpoint", 2)])
def test_eap_ig_is_complete_on_the_input_cut(rule: str, order: int, ablation: str) -> None:
    """EAP-IG out of the input tends to the total change, at the rate of its integration rule."""
    module = oracles.random_gpt2()
    coarse, fine = (completeness_gap(module, steps, rule, ablation) for steps in (64, 128))
    assert abs(coarse) > rounding(1.0)
    assert 0.7 < math.log2(abs(coarse / fine)) / order < 1.3


def test_completeness_from_zero_input() -> None:
    """Completeness holds from a zero input, given no LayerNorm, which is singular there."""
    module = oracles.random_gpt2(n_layers=1, layer_norm=False)
    coarse, fine = (completeness_gap(module, steps, "midpoint", "zero") for steps in (128, 256))
    assert abs(coarse) > rounding(1.0)
    assert 1.4 < math.log2(abs(coarse / fine)) < 2.6


def test_left_rule_begins_at_the_corrupt_input() -> None:
    """One left step is the gradient at the corrupt run: minus EAP with the prompts exchanged."""
    module = oracles.random_gpt2()
    clean, corrupt = prompts()
    left = oracles.eap_ig(module, clean, corrupt, log_prob, steps=1, rule="left")
    exchanged = oracles.eap(module, corrupt, clean, log_prob)
    for edge, score in left.items():
        assert abs(score + exchanged[edge]) <= rounding(score)


def linear_gpt2() -> nn.Module:
    """A model linear in its input: no LayerNorm, uniform attention, MLPs without activation."""
    module: Any = oracles.random_gpt2(n_layers=3, layer_norm=False, activation="linear")
    with torch.no_grad():
        for block in module.transformer.h:
            block.attn.c_attn.weight[:, : 2 * 16] = 0
            block.attn.c_attn.bias[: 2 * 16] = 0
    model: nn.Module = module
    return model


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_all_methods_agree_on_a_linear_model(ablation: str) -> None:
    """Where the model and the metric are linear, exact, EAP and EAP-IG are one number per edge."""
    module = linear_gpt2()
    clean, corrupt = prompts()
    exact, gradient, left, midpoint = (
        oracles.exact_effects(module, clean, corrupt, logit_difference, ablation=ablation),
        oracles.eap(module, clean, corrupt, logit_difference, ablation=ablation),
        *(
            oracles.eap_ig(
                module, clean, corrupt, logit_difference, ablation=ablation, steps=3, rule=rule
            )
            for rule in ("left", "midpoint")
        ),
    )
    assert max(abs(effect) for effect in exact.values()) > 0.1
    for edge, effect in exact.items():
        if edge[2] in ("q", "k"):
            assert effect == gradient[edge] == left[edge] == midpoint[edge] == 0
        else:
            for scores in (gradient, left, midpoint):
                assert abs(scores[edge] - effect) <= 100 * rounding(effect)


def test_logits_cut_of_a_model_without_final_norm() -> None:
    """Without a final LayerNorm the edges into the logits sum to the change of a linear metric."""
    module = oracles.random_gpt2(layer_norm=False)
    clean, corrupt = prompts()
    before, after = (metric_of(module, ids, logit_difference) for ids in (clean, corrupt))
    change = after - before
    for method in (oracles.exact_effects, oracles.eap, oracles.eap_ig):
        scores = method(module, clean, corrupt, logit_difference)
        assert abs(oracles.incoming(scores, "logits") - change) <= 100 * rounding(change)


def test_ablations_are_what_they_are_called() -> None:
    """Zero is 0; the mean is over real positions of clean prompts; padding does not enter it."""
    module = oracles.random_gpt2()
    clean, mask = left_pad(prompts()[0], [6, 4, 2])
    zero = oracles.ablated_outputs(module, clean, None, "zero", mask)
    mean = oracles.ablated_outputs(module, clean, None, "mean", mask)
    with torch.no_grad():
        rows = [
            oracles.run(module, clean[i : i + 1, -n:]).outputs["m1"][0]
            for i, n in enumerate([6, 4, 2])
        ]
    assert all(not output.any() for output in zero.values())
    assert (mean["m1"] - torch.cat(rows).mean(0)).abs().max() <= rounding(1.0)
    assert mean["m1"].shape == (3, 6, 16)


def test_wrong_names_are_refused() -> None:
    """An unknown edge, ablation or rule raises, and so does a missing corrupt prompt."""
    module = oracles.random_gpt2()
    clean, _ = prompts()
    backwards = {("m1", "a0.h0", "q"): torch.zeros(3, 6, 16)}
    with pytest.raises(ValueError, match="m1"):
        oracles.run(module, clean, mixes=backwards)
    with pytest.raises(ValueError, match="zero or mean"):
        oracles.ablated_outputs(module, clean, None, "resample")
    with pytest.raises(ValueError, match="corrupt_ids"):
        oracles.eap(module, clean, None, log_prob)
    with pytest.raises(ValueError, match="left or midpoint"):
        oracles.eap_ig(module, clean, clean, log_prob, rule="right")
