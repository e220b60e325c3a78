"""Models of every family are read, written, cut short and summed as plain hooks on them say.

Where a family keeps its parts is written down here a second time, from the code of the models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, plain, random_module, traced, unchecked
from torch import Tensor, nn

from circuitlab import ModelError, QualityError, Site, Tokens, TracedModel, load_model
from circuitlab.checks import probe, require, run_checks

N_LAYERS = 3
#: float32, values of size 1 to 10, three layers.
CLOSE = {"rtol": 2e-4, "atol": 5e-5}
POST_NORMS = ("gemma2", "gemma2-far", "gemma3", "olmo2")
families = pytest.mark.parametrize("family", ALL_FAMILIES)


@cache
def made(family: str) -> tuple[Any, TracedModel, Tokens]:
    """The plain module, the traced one, and three prompts of 9, 4 and 6 tokens, padded."""
    module = random_module(family, N_LAYERS)
    model = traced(module)
    ids = [(3, 1, 4, 1, 5, 9, 2, 6, 5), (2, 6, 5, 7), (3, 5, 8, 9, 7, 2)]
    return module, model, model.tokens(ids)


# --- where plain hooks find things ----------------------------------------------------------------


def place(module: Any, site: Site) -> tuple[nn.Module, str]:
    """A module of a stock model, and whether the site is its input or its output."""
    kind = module.config.model_type
    neox = kind == "gpt_neox"
    block = (module.gpt_neox if neox else module.model).layers[site.layer]
    attention, mlp = block.attention if neox else block.self_attn, block.mlp
    fused = attention.query_key_value if neox else getattr(attention, "qkv_proj", None)
    behind = kind in ("gemma2", "gemma3_text", "olmo2")
    before_mlp = {
        "olmo2": "mlp",
        "gemma2": "pre_feedforward_layernorm",
        "gemma3_text": "pre_feedforward_layernorm",
    }.get(kind, "post_attention_layernorm")
    heard = getattr(block, before_mlp)
    return {
        "resid_pre": (block, "input"),
        "q": (fused or getattr(attention, "q_proj", None), "output"),
        "k": (fused or getattr(attention, "k_proj", None), "output"),
        "v": (fused or getattr(attention, "v_proj", None), "output"),
        "z": (attention.dense if neox else attention.o_proj, "input"),
        "pattern": (attention, "pattern"),
        "attn_out": (block.post_attention_layernorm if behind else attention, "output"),
        "resid_mid": (heard, "input"),
        "mlp_in": (heard, "input"),
        "mlp_post": (
            mlp.dense_4h_to_h if neox else getattr(mlp, "down_proj", None),
            "input",
        ),
        "mlp_out": (block.post_feedforward_layernorm if behind else mlp, "output"),
        "resid_post": (block, "output"),
    }[site.kind]


def part(module: Any, site: Site, whole: Tensor) -> Tensor:
    """The site's own part of what a hook sees, a view."""
    config = module.config
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if site.kind == "z":
        return whole.unflatten(-1, (-1, d))
    if site.kind not in ("q", "k", "v"):
        return whole
    number = "qkv".index(site.kind)
    if config.model_type == "gpt_neox":
        return whole.unflatten(-1, (-1, 3, d))[..., number, :]
    if config.model_type == "phi3":
        shared = config.num_key_value_heads
        whole = whole.split([d * config.num_attention_heads, d * shared, d * shared], -1)[number]
    return whole.unflatten(-1, (-1, d))


@contextmanager
def hook(module: Any, site: Site, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Hands the whole tensor to ``change`` and puts what it returns there."""
    at, side = place(module, site)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = change(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = change(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def after(_: Any, args: Any, output: Any) -> Any:
        if side == "pattern":
            change(output[1])
            return None
        if isinstance(output, tuple):
            new = change(output[0])
            return None if new is None else (new, *output[1:])
        return change(output)

    if side == "input":
        handle = at.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = at.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def read_plainly(module: Any, tokens: Tokens, site: Site) -> Tensor:
    seen: list[Tensor] = []

    def keep(whole: Tensor) -> None:
        seen.append(part(module, site, whole).clone())

    with hook(module, site, keep):
        plain(module, tokens)
    return seen[0]


def write_plainly(module: Any, tokens: Tokens, site: Site, value: Tensor) -> Tensor:
    """Logits when a hook puts ``value`` at the site."""
    if site.kind == "resid_mid":
        # The skip connection reads it too: let attention write what makes the sum come out so.
        value = value - read_plainly(module, tokens, Site("resid_pre", site.layer))
        site = Site("attn_out", site.layer)

    def put(whole: Tensor) -> Tensor:
        new = whole.clone()
        part(module, site, new)[...] = value
        return new

    with hook(module, site, put):
        return plain(module, tokens)


def sites_of(model: TracedModel, layer: int) -> list[Site]:
    kinds = ["resid_pre", "q", "k", "v", "z", "pattern", "attn_out", "mlp_in", "mlp_out"]
    kinds += ["resid_post"] + ["resid_mid"] * (not model.wiring.parallel)
    kinds += ["mlp_post"] * bool(model.architecture.d_mlp)
    return [Site(kind, layer) for kind in kinds]


# --- as loaded ------------------------------------------------------------------------------------


@families
def test_a_saved_model_passes_its_self_check(family: str, tmp_path: Path) -> None:
    """Written by save_pretrained and loaded from there, every check holds, the new ones too."""
    random_module(family).save_pretrained(tmp_path)  # type: ignore[operator]  # of transformers
    model = load_model(tmp_path)
    names = {check.name for check in run_checks(model, probe(model._module))}
    assert {
        "components sum to the residual stream",
        "the stream begins with the embeddings",
        "heads attend as their queries and keys say",
        "logits are read off the last stream",
    } <= names
    assert ("MLPs write what their hidden layers are projected to" in names) == (
        family != "mixtral"
    )


@families
def test_every_site_is_read_where_it_is(family: str) -> None:
    """All sites of all layers in one pass are what plain hooks see, and the logits are theirs."""
    module, model, tokens = made(family)
    sites = [site for layer in range(N_LAYERS) for site in sites_of(model, layer)]
    run = model.run(tokens, read=sites, logits="all")
    for site in sites:
        assert torch.equal(run[site], read_plainly(module, tokens, site)), site
    assert torch.equal(run.logits, plain(module, tokens))


@families
def test_every_site_is_written_where_it_is(family: str) -> None:
    """Random values at a site change the logits exactly as a plain hook that puts them there."""
    module, model, tokens = made(family)
    generator = torch.Generator().manual_seed(5)
    before = plain(module, tokens)[tokens.mask]
    for site in sites_of(model, 1):
        if site.kind == "pattern":
            continue
        shape = read_plainly(module, tokens, site).shape
        value = torch.randn(shape, generator=generator)
        run = model.run(tokens, write={site: value}, logits="all")
        expected = write_plainly(module, tokens, site, value)[tokens.mask]
        torch.testing.assert_close(run.logits[tokens.mask], expected, **CLOSE, msg=str(site))
        assert float((expected - before).abs().max()) > 1e-2, site
        short = model.run(tokens, write={site: value}, vocabulary=torch.tensor([3, 7])).logits
        end = write_plainly(module, tokens, site, value)[:, -1:, [3, 7]]
        torch.testing.assert_close(short, end, **CLOSE, msg=str(site))


@families
def test_leaving_out_changes_nothing(family: str) -> None:
    """Blocks, attention, MLPs and positions that nobody looks at are not run, and not missed.

    Masks and rotations of a block are its own: prompts are longer than the windows.
    """
    module, model, tokens = made(family)
    wanted = plain(module, tokens)
    sites = [site for layer in range(N_LAYERS) for site in sites_of(model, layer)]
    run = model.run(tokens, read=sites, logits="all")
    last = N_LAYERS - 1
    cut: list[tuple[str, ...]] = [("resid_pre",), ("resid_post",), ("resid_pre", "attn_out")]
    cut += [("resid_pre", "mlp_out"), ("q", "k", "v"), ("attn_out", "mlp_out"), ()]
    for layer in range(N_LAYERS):
        for kinds in cut:
            given = {Site(kind, layer): run[Site(kind, layer)] for kind in kinds}
            whole = model.run(tokens, write=given, logits="all").logits
            short = model.run(tokens, write=given).logits
            torch.testing.assert_close(whole[tokens.mask], wanted[tokens.mask], **CLOSE)
            torch.testing.assert_close(short[:, -1], wanted[:, -1], **CLOSE)
    heard = {
        Site(kind, last): run[Site(kind, last)] for kind in ("resid_pre", "attn_out", "mlp_in")
    }
    torch.testing.assert_close(model.run(tokens, write=heard).logits[:, -1], wanted[:, -1], **CLOSE)
    for site in sites:
        stopped = model.run(tokens, read=[site], logits="none")[site]
        torch.testing.assert_close(stopped, run[site], rtol=1e-5, atol=1e-5, msg=str(site))


@families
def test_padding_changes_nothing(family: str) -> None:
    """A prompt gives alone what it gives in a padded batch."""
    _, model, tokens = made(family)
    together = model.run(tokens, logits="all").logits
    for row in range(3):
        alone = model.run(tokens.rows([row]).trimmed(), logits="all").logits[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)


# --- components -----------------------------------------------------------------------------------


@families
def test_components_sum_to_the_stream(family: str) -> None:
    """What sources wrote before a layer, and the biases of its heads, are the stream it reads."""
    _, model, tokens = made(family)
    reads = [*model.source_sites, *(Site("resid_pre", n) for n in range(N_LAYERS))]
    run = model.run(tokens, read=reads)
    outputs = model.source_outputs(run)
    bias = torch.zeros(model.d_model)
    for layer in range(N_LAYERS):
        total = outputs[: model.wiring.first_source(layer)].sum(0) + bias
        expected = run[Site("resid_pre", layer)]
        torch.testing.assert_close(total[tokens.mask], expected[tokens.mask], **CLOSE)
        bias = bias + model.weights.attention_bias(layer)


@pytest.mark.parametrize("family", POST_NORMS)
def test_a_head_behind_a_norm_is_its_share_of_the_sum(family: str) -> None:
    """Each head's ``z @ W_O`` over the root mean square of that run's own sum, times the gain."""
    module, model, tokens = made(family)
    other = model.tokens([(7, 7, 2, 1, 5, 0, 2, 6, 5), (1, 6, 5, 7), (3, 5, 8, 2, 2, 2)])
    runs = [model.run(t, read=model.source_sites) for t in (tokens, other)]
    expected = []
    for run in runs:
        of_run = []
        for layer, block in enumerate(module.model.layers):
            z = run[Site("z", layer)].double()
            weight = block.self_attn.o_proj.weight.detach().double()
            d = z.shape[-1]
            heads = [z[:, :, h] @ weight[:, h * d : (h + 1) * d].T for h in range(model.n_heads)]
            norm = block.post_attention_layernorm
            gain = norm.weight.detach().double() + (0 if family == "olmo2" else 1)
            rms = (torch.stack(heads).sum(0).square().mean(-1, keepdim=True) + 1e-6).sqrt()
            of_run.append(torch.stack(heads) / rms * gain)
        expected.append(torch.stack(of_run) * tokens.mask[:, :, None])
    rows = [slice(model.wiring.first_source(n), None) for n in range(N_LAYERS)]

    def heads_of(outputs: Tensor) -> Tensor:
        return torch.stack([outputs[row][: model.n_heads] for row in rows]).double()

    found = heads_of(model.source_outputs(runs[0]))
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
    change = heads_of(model.source_outputs(runs[1], less=runs[0]))
    torch.testing.assert_close(change, expected[1] - expected[0], rtol=1e-4, atol=1e-4)


# --- descriptions that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "wrong", "fact"),
    [
        ("gemma2", {"attention_post_norm": ""}, "components sum to the residual stream: off by"),
        ("gemma2", {"mlp_post_norm": ""}, "components sum to the residual stream: off by"),
        ("gemma2", {"score_softcap": 0.0}, "heads attend as their queries and keys say: off by"),
        ("gemma2", {"logit_softcap": 0.0}, "logits are read off the last stream: off by"),
        ("gemma2", {"score_scales": ()}, "heads attend as their queries and keys say: off by"),
        ("gemma2", {"embed_scale": 4.0}, "the stream begins with the embeddings: off by"),
        ("gemma2", {"sliding_windows": ()}, "heads attend as their queries and keys say: off by"),
        ("gemma3", {"rotary_kinds": ("full_attention",) * 2}, "queries and keys say: off by"),
        ("mistral", {"sliding_windows": (4, 4)}, "queries and keys say: off by"),
        ("qwen3", {"q_norm": ""}, "heads attend as their queries and keys say: off by"),
        ("olmo2", {"k_norm": ""}, "heads attend as their queries and keys say: off by"),
        ("olmo2", {"mlp_norm": "post_attention_layernorm"}, "cannot be traced as OLMo 2"),
        ("llama", {"attention_norm": ""}, "projected from the residual stream: off by"),
        ("llama", {"rotary": "", "position_embed": "model.embed_tokens"}, "embeddings: off by"),
        ("neox", {"rotary": "gpt_neox.emb_dropout"}, "cannot be traced as GPT-NeoX"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_wrong_in_a_description_is_named(
    family: str, wrong: dict[str, Any], fact: str
) -> None:
    """Each new part of a description is checked against the model: wrong, it is refused."""
    module = random_module(family)
    right, given = unchecked(module), probe(module)
    require(right, run_checks(right, given))
    model = TracedModel(module, None, dataclasses.replace(right.architecture, **wrong), name="toy")
    with pytest.raises(QualityError, match=fact):
        require(model, run_checks(model, given))


@pytest.mark.parametrize(
    ("family", "changes", "fact"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "Gemma 2 model looks ahead"),
        ("gemma3", {"use_bidirectional_attention": True}, "Gemma 3 model looks ahead"),
        ("gemma2", {"attention_bias": True}, "Gemma 2 model adds a bias"),
        ("olmo2", {"attention_bias": True}, "OLMo 2 model adds a bias"),
    ],
)
def test_variants_that_cannot_be_described_are_refused(
    family: str, changes: dict[str, Any], fact: str
) -> None:
    """A model that looks ahead, or has a writer that is no component, is refused by name."""
    with pytest.raises(ModelError, match=fact):
        unchecked(random_module(family, 1, **changes))


def test_a_gemma_3_with_images_is_its_language_model() -> None:
    """The language model inside passes the self-check; it caps no logits, though it is told to."""
    import transformers as t

    text = random_module("gemma3").config.to_dict()
    image = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    config = t.Gemma3Config(
        text_config=text,
        vision_config=image | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=39,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = traced(module)
    assert model.architecture.family == "Gemma 3"
    assert text["final_logit_softcapping"] == 5.0
    assert model.architecture.logit_softcap == 0.0


def test_windows_are_told_layer_by_layer() -> None:
    """A window is the number of positions seen, 0 where a layer sees all; empty where all do."""
    windows = {f: made(f)[1].architecture.sliding_windows for f in ALL_FAMILIES}
    assert windows.pop("mistral") == (3, 3, 3)
    assert windows.pop("mistral-far") == (64, 64, 64)
    assert windows.pop("gemma2") == windows.pop("gemma3") == (3, 0, 3)
    assert windows.pop("gemma2-far") == (64, 0, 64)
    assert set(windows.values()) == {()}
    changes = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    qwen = traced(random_module("qwen3", N_LAYERS, **changes))
    assert qwen.architecture.sliding_windows == (0, 3, 3)
