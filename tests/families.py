"""Random small models of other families than GPT-2, plain and traced, made from their configs.

They are loaded as any weights are. Their attention takes its softmax, and RMSNorms work, in float32
whatever the model's type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitlab import Tokens, TracedModel, load_model
from circuitlab.registry import Registry

#: 4 heads, d_model 16. Llama and Qwen2 have 2 key and value heads, ``llama-wide`` 1, and heads of 6
#: columns, Qwen2 has biases. GPT-NeoX turns 2 of a head's 4 columns; its blocks are parallel or
#: sequential. Gemma, which multiplies its embeddings, is made where it is asked for.
FAMILIES = ("llama", "llama-wide", "qwen2", "neox", "neox-sequential")
#: And those with windows of 3 positions (``-far``: longer than any prompt), soft caps that bend,
#: norms of queries and keys, norms behind, fused projections, experts.
ALL_FAMILIES = (
    *FAMILIES,
    "mistral",
    "mistral-far",
    "mixtral",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma2-far",
    "gemma3",
    "olmo2",
    "phi3",
)
#: Their classes in transformers.
_CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "neox": "GPTNeoX",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
}

_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


_KINDS = ("sliding_attention", "full_attention")


def _config(family: str, n_layers: int) -> dict[str, Any]:
    """What a small model of a family is configured by."""
    kind, _, variant = family.partition("-")
    window = 64 if variant == "far" else 3
    gemma2 = {
        "num_key_value_heads": 2,
        "head_dim": 4,
        "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 5.0,
        "sliding_window": window,
    }
    rotary = {"rope_type": "default"}
    more: dict[str, dict[str, Any]] = {
        "neox": {"rotary_pct": 0.5, "use_parallel_residual": variant != "sequential"},
        "llama": {"num_key_value_heads": 1, "head_dim": 6}
        if variant == "wide"
        else {"num_key_value_heads": 2, "head_dim": 4},
        "mistral": {"num_key_value_heads": 2, "sliding_window": window},
        "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3, "sliding_window": None},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 6},
        "gemma": {"num_key_value_heads": 2, "head_dim": 4},
        "gemma2": {**gemma2, "attn_logit_softcapping": 2.0},
        "gemma3": {
            **gemma2,
            "layer_types": [_KINDS[n % 2] for n in range(n_layers)],
            "rope_parameters": {
                "sliding_attention": {**rotary, "rope_theta": 9.0},
                "full_attention": {**rotary, "rope_theta": 99.0},
            },
        },
    }
    grouped = {"num_key_value_heads": 2, "pad_token_id": 0}
    return {**_SIZES, "num_hidden_layers": n_layers, **more.get(kind, grouped)}


def random_module(
    family: str,
    n_layers: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    """A small random model, far from linear, no bias at 0 and no gain at 1.

    Args:
        family: One of :data:`ALL_FAMILIES`.
        n_layers: Number of blocks.
        dtype: Type of the weights.
        seed: Draws the weights.
        changes: Other values of the configuration.
    """
    import transformers

    name = _CLASSES[family.partition("-")[0]]
    config_class = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")
    config = config_class(**{**_config(family, n_layers), **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            matrix = parameter.ndim > 1
            parameter.copy_(1.5 * noise / 16**0.5 if matrix else parameter + 0.3 * noise)
    return module.to(dtype).eval()


@torch.no_grad()
def plain(module: Any, tokens: Tokens) -> Tensor:
    """Logits of the module itself, all positions."""
    logits: Tensor = module(
        input_ids=tokens.ids,
        attention_mask=tokens.mask.long(),
        position_ids=tokens.position_ids,
        use_cache=False,
    ).logits
    return logits


def traced(module: nn.Module) -> TracedModel:
    """The model as CircuitLab loads it, self-check passed."""
    return load_model((module, None))


def unchecked(module: nn.Module) -> TracedModel:
    """The model as it is, for float64: with its softmax in float32 padding leaves a trace."""
    architecture = Registry.load().adapt(module.config)
    assert architecture is not None
    return TracedModel(module, None, architecture, name="toy")


def silent(module: nn.Module) -> TracedModel:
    """The model as a family describes it that does not say what the MLPs' hidden layers are."""
    described = unchecked(module).architecture
    names = {"mlp_input_projection": "", "mlp_activation": "", "mlp_gate_projection": ""}
    return TracedModel(module, None, replace(described, **names), name="toy")


def family_model(family: str, n_layers: int = 2, *, seed: int = 0, **changes: Any) -> TracedModel:
    """A random model of one of :data:`ALL_FAMILIES`, float32."""
    return traced(random_module(family, n_layers, seed=seed, **changes))
