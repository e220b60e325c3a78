"""Random small models of other families, plain and traced: Llama, Qwen2, Gemma and GPT-NeoX.

Their attention takes its softmax, and Llama's norm works, in float32 whatever the model's type.
MLPs of Llama, Qwen2 and Gemma are gated: SwiGLU, and GEGLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from circuitlab import Architecture, Projection, TracedModel, hookimpl, load_model
from circuitlab.architectures import gpt2
from circuitlab.registry import PluginInfo, Registry

#: 4 heads, d_model 16. Llama and Qwen2 have 2 key and value heads, ``llama-wide`` 1, and heads of 6
#: columns, Qwen2 has biases. GPT-NeoX turns 2 of a head's 4 columns; its blocks are parallel or
#: sequential. Gemma, which multiplies its embeddings, is made where it is asked for.
FAMILIES = ("llama", "llama-wide", "qwen2", "neox", "neox-sequential")

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


class Families:
    """A plugin that knows Llama, Qwen2, Gemma and GPT-NeoX."""

    @hookimpl
    def adapt_architecture(self, config: Any) -> Architecture | None:
        if config.model_type in ("llama", "qwen2", "gemma"):
            return _llama(config)
        return neox(config) if config.model_type == "gpt_neox" else None


def _llama(config: Any) -> Architecture:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, k, v = (Projection(f"self_attn.{port}_proj", 0, d_head) for port in "qkv")
    return Architecture(
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        n_positions=config.max_position_embeddings,
        embed="model.embed_tokens",
        blocks="model.layers",
        final_norm="model.norm",
        attention_norm="input_layernorm",
        attention="self_attn",
        q=q,
        k=k,
        v=v,
        output_projection="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        mlp_output_projection="mlp.down_proj",
        d_mlp=config.intermediate_size,
        mlp_input_projection="mlp.up_proj",
        mlp_activation="mlp.act_fn",
        mlp_gate_projection="mlp.gate_proj",
        rotary="model.rotary_emb",
        n_kv_heads=config.num_key_value_heads,
    )


def neox(config: Any) -> Architecture:
    """GPT-NeoX: heads interleaved in one projection, rotary embeddings, parallel if it says so."""
    d_head = config.hidden_size // config.num_attention_heads
    q, k, v = (Projection("attention.query_key_value", n * d_head, 3 * d_head) for n in (0, 1, 2))
    return Architecture(
        family="GPT-NeoX",
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        n_positions=config.max_position_embeddings,
        embed="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention_norm="input_layernorm",
        attention="attention",
        q=q,
        k=k,
        v=v,
        output_projection="attention.dense",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        parallel=config.use_parallel_residual,
        mlp_output_projection="mlp.dense_4h_to_h",
        d_mlp=config.intermediate_size,
        rotary="gpt_neox.rotary_emb",
    )


def random_module(
    family: str, n_layers: int = 2, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A small random model, far from linear, no bias at 0 and no gain at 1."""
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    sizes = {**_SIZES, "num_hidden_layers": n_layers}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module: nn.Module
        if family.startswith("neox"):
            sizes |= {"rotary_pct": 0.5, "use_parallel_residual": family == "neox"}
            module = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
        elif family == "qwen2":
            module = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2))
        elif family == "gemma":
            module = GemmaForCausalLM(GemmaConfig(**sizes, num_key_value_heads=2, head_dim=4))
        else:
            wide = family == "llama-wide"
            sizes |= {"num_key_value_heads": 1 if wide else 2, "head_dim": 6 if wide else 4}
            module = LlamaForCausalLM(LlamaConfig(**sizes))
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            matrix = parameter.ndim > 1
            parameter.copy_(1.5 * noise / 16**0.5 if matrix else parameter + 0.3 * noise)
    return module.to(dtype).eval()


def traced(module: nn.Module) -> TracedModel:
    """The model as CircuitLab loads it, self-check passed."""
    registry = Registry.load()
    registry.add(Families(), PluginInfo("families", "circuitlab-families", "0.1"))
    return load_model((module, None), registry=registry)


def unchecked(module: nn.Module) -> TracedModel:
    """The model as it is, for float64: with its softmax in float32 padding leaves a trace."""
    config: Any = module.config
    architecture = gpt2(config) or Families().adapt_architecture(config)
    assert architecture is not None
    return TracedModel(module, None, architecture, name="toy")


def family_model(family: str, n_layers: int = 2, *, seed: int = 0) -> TracedModel:
    """A random model of one of :data:`FAMILIES`, or of Gemma, float32."""
    return traced(random_module(family, n_layers, seed=seed))
