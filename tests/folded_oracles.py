"""Plain Hugging Face models of every family, watched by hooks: what folded weights must give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import oracles
import torch
from families import ALL_FAMILIES, random_module, unchecked
from torch import Tensor, nn

from circuitlab import Site, TracedModel, zoo

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
#: float64 sums of some dozen terms; and models whose norm works in float32 whatever their type.
EXACT, NORM32 = 1e-10, 1e-5
#: Softmax in float32, behind queries and keys that are as exact as their norm.
PATTERNS = {EXACT: 1e-6, NORM32: 1e-4}


def scaled_gpt2(**flags: bool) -> nn.Module:
    """A random GPT-2 that scales its scores in another way."""
    from transformers import GPT2LMHeadModel

    module: Any = oracles.random_gpt2(n_layers=3)
    config = module.config
    for flag, value in flags.items():
        setattr(config, flag, value)
    other = GPT2LMHeadModel(config).double().eval()
    other.load_state_dict(module.state_dict())
    return other


def type_of(name: str) -> torch.dtype:
    """The widest that a family works in: torch has no product of many experts in float64."""
    return torch.float32 if name == "mixtral" else torch.float64


def rotary(name: str) -> bool:
    """Whether positions turn queries and keys."""
    return not name.startswith(("gpt2", "hand"))


#: Ways of turning that are no plain power of a base: Llama 3's, and two whose turned columns grow.
TURNS: dict[str, dict[str, Any]] = {
    "llama-scaled": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "qwen3-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "phi3-long": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "factor": 4.0,
        "original_max_position_embeddings": 4,
    },
}


def turning(name: str) -> nn.Module:
    """A model of one of :data:`TURNS`."""
    rope = {"rope_theta": 9.0, **TURNS[name]}
    family = name.partition("-")[0]
    return random_module(family, dtype=torch.float64, rope_parameters=rope)


MODULES = {
    **{name: lambda name=name: turning(name) for name in TURNS},
    "gpt2": oracles.random_gpt2,
    "gpt2-no-norms": lambda: oracles.random_gpt2(layer_norm=False),
    "gpt2-by-layer": lambda: scaled_gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-unscaled": lambda: scaled_gpt2(scale_attn_weights=False),
    "hand-induction": lambda: zoo.load("hand-induction")[0].double(),
    **{n: lambda name=n: random_module(name, dtype=type_of(name)) for n in ALL_FAMILIES},
}


#: Families in which a norm stands behind attention and MLP.
POST_NORMS = ("gemma2", "gemma2-far", "gemma3", "olmo2")


@dataclass(frozen=True)
class Seen:
    """What a plain Hugging Face model computed, seen by hooks and its own outputs.

    ``heads`` has queries and keys behind their norms, ``projected`` before.
    """

    streams: list[Tensor]
    last_stream: Tensor
    heads: list[dict[str, Tensor]]
    projected: list[dict[str, Tensor]]
    patterns: list[Tensor]
    written: list[Tensor]
    logits: Tensor


@contextmanager
def watching(module: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of every submodule that takes and gives a tensor."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                kept[name] = given[0], output

        return keep

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    yield kept
    for handle in handles:
        handle.remove()


@cache
@torch.no_grad()
def case(name: str) -> tuple[TracedModel, Seen]:
    module: Any = MODULES[name]()
    with watching(module) as seen_there:
        done = module(IDS, output_attentions=True, output_hidden_states=True)
    kept = {path: (x.double(), y.double()) for path, (x, y) in seen_there.items()}
    n_layers = module.config.num_hidden_layers
    parts = "layers" if rotary(name) else "h"
    body = "model" if rotary(name) else "transformer"
    body = "gpt_neox" if name.startswith("neox") else body
    output = {"gpt_neox": "attention.dense", "model": "self_attn.o_proj"}.get(body, "attn.c_proj")
    output = "post_attention_layernorm" if name in POST_NORMS else output
    final = {"gpt_neox": "final_layer_norm", "model": "norm"}.get(body, "ln_f")
    blocks = [f"{body}.{parts}.{layer}." for layer in range(n_layers)]
    seen = Seen(
        streams=[stream.double() for stream in done.hidden_states[:-1]],
        last_stream=kept[f"{body}.{final}"][0].double(),
        heads=[heads(module, kept, block, normed=True) for block in blocks],
        projected=[heads(module, kept, block) for block in blocks],
        patterns=[pattern.double() for pattern in done.attentions],
        written=[kept[block + output][1].double() for block in blocks],
        logits=done.logits.double(),
    )
    return unchecked(module), seen


def heads(
    module: Any, kept: dict[str, tuple[Tensor, Tensor]], block: str, *, normed: bool = False
) -> dict[str, Tensor]:
    """q, k and v of every head, ``[batch, pos, n_heads, d_head]``, as the families store them."""
    n_heads = module.config.num_attention_heads
    if block.startswith("transformer"):
        fused = kept[block + "attn.c_attn"][1].unflatten(-1, (3, n_heads, -1))
        return dict(zip("qkv", fused.unbind(2), strict=True))
    if block.startswith("gpt_neox"):
        fused = kept[block + "attention.query_key_value"][1].unflatten(-1, (n_heads, 3, -1))
        return dict(zip("qkv", fused.unbind(3), strict=True))
    n_kv = module.config.num_key_value_heads
    counts = {"q": n_heads, "k": n_kv, "v": n_kv}
    joint, found = kept.get(f"{block}self_attn.qkv_proj"), {}
    widths = [n * module.config.hidden_size // n_heads for n in counts.values()]
    for port, n in counts.items():
        norm = kept.get(f"{block}self_attn.{port}_norm") if normed else None
        if norm is not None:
            own = norm[1]
        elif joint is not None:
            own = joint[1].split(widths, -1)["qkv".index(port)]
        else:
            own = kept[f"{block}self_attn.{port}_proj"][1]
        if own.ndim == 4 and own.shape[1] == n:
            own = own.transpose(1, 2)
        own = own.flatten(2).unflatten(-1, (n, -1))
        found[port] = torch.stack([own[:, :, h // (n_heads // n)] for h in range(n_heads)], 2)
    return found


def tolerance(name: str) -> float:
    return EXACT if name.startswith(("gpt2", "hand", "neox")) else NORM32


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def read(model: TracedModel, layer: int, seen: Seen) -> dict[str, Tensor]:
    """q, k and v by the folded weights, ``[batch, pos, n_heads, d_head]``."""
    stream = seen.streams[layer]
    folded = model.weights.folded(layer, torch.float64)
    plain = stream / model.weights.norm_scale(layer, stream)
    ports = (
        ("q", folded.q, folded.q_bias),
        ("k", folded.k, folded.k_bias),
        ("v", folded.v, folded.v_bias),
    )
    scales = {}
    for port in "qkv":
        group = model.n_heads // model.architecture.n_heads_of(port)
        value = seen.projected[layer][port][:, :, ::group]
        scales[port] = model.weights.scale_behind(Site(port, layer), value)
        scales[port] = scales[port].repeat_interleave(group, 2)
    return {p: (torch.einsum("bpd,hde->bphe", plain, w) + b) / scales[p] for p, w, b in ports}


def window(name: str, layer: int) -> int:
    """How far a layer of these families sees: one more than any prompt where all the way."""
    short = name == "mistral" or (name in ("gemma2", "gemma3") and layer % 2 == 0)
    return 3 if short else IDS.shape[1]
