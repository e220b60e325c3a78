"""Descriptions of families: one function each, from a model's configuration to an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from circuitlab import Architecture, ModelError, Projection


def gpt_neox(config: Any) -> Architecture:
    """GPT-NeoX (Pythia): heads interleaved in one projection, blocks parallel if it says so."""
    d_head = config.hidden_size // config.num_attention_heads
    q, k, v = (Projection("attention.query_key_value", n * d_head, 3 * d_head) for n in range(3))
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
        mlp_input_projection="mlp.dense_h_to_4h",
        mlp_activation="mlp.act",
        rotary="gpt_neox.rotary_emb",
    )


def llama(config: Any, family: str = "Llama", **differences: Any) -> Architecture:
    """Llama: RMSNorms, keys and values shared in groups, rotary embeddings, SwiGLU.

    Args:
        config: The model's configuration.
        family: Name of the family.
        differences: Fields in which a family differs from Llama.
    """
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, k, v = (Projection(f"self_attn.{port}_proj", 0, d_head) for port in "qkv")
    fields: dict[str, Any] = {
        "family": family,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_positions": config.max_position_embeddings,
        "embed": "model.embed_tokens",
        "blocks": "model.layers",
        "final_norm": "model.norm",
        "attention_norm": "input_layernorm",
        "attention": "self_attn",
        "q": q,
        "k": k,
        "v": v,
        "output_projection": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp": "mlp",
        "mlp_output_projection": "mlp.down_proj",
        "d_mlp": config.intermediate_size,
        "mlp_input_projection": "mlp.up_proj",
        "mlp_activation": "mlp.act_fn",
        "mlp_gate_projection": "mlp.gate_proj",
        "rotary": "model.rotary_emb",
        "n_kv_heads": config.num_key_value_heads,
        "sliding_windows": _windows(config),
    }
    return Architecture(**(fields | differences))


def mistral(config: Any) -> Architecture:
    """Mistral: a Llama whose layers may see a window of positions only."""
    return llama(config, "Mistral")


def mixtral(config: Any) -> Architecture:
    """Mixtral: a Mistral with experts; all experts of a layer and their router are its one MLP."""
    return llama(
        config,
        "Mixtral",
        mlp_output_projection="",
        d_mlp=0,
        mlp_input_projection="",
        mlp_activation="",
        mlp_gate_projection="",
    )


def qwen2(config: Any) -> Architecture:
    """Qwen 2 and 2.5: a Llama with biases of q, k and v."""
    return llama(config, "Qwen 2")


def qwen3(config: Any) -> Architecture:
    """Qwen 3: a Llama whose queries and keys are normed, each head alone."""
    return llama(config, "Qwen 3", **_QK_NORMS)


def gemma(config: Any) -> Architecture:
    """Gemma: a Llama with GEGLU, whose embedding multiplies itself by ``sqrt(d_model)``."""
    _refuse_bidirectional(config, "Gemma")
    return llama(config, "Gemma")


def gemma2(config: Any, family: str = "Gemma 2", **differences: Any) -> Architecture:
    """Gemma 2: norms before and behind attention and MLP, soft caps, a window in every other layer.

    Gemma Team 2024 (arXiv:2408.00118).

    Raises:
        ModelError: it looks ahead, or its attention adds a bias before the norm behind it.
    """
    _refuse_bidirectional(config, family)
    _refuse_bias(config, family)
    fields = {
        "mlp_norm": "pre_feedforward_layernorm",
        "score_scales": (config.query_pre_attn_scalar**-0.5,) * config.num_hidden_layers,
        "score_softcap": config.attn_logit_softcapping or 0.0,
        "logit_softcap": config.final_logit_softcapping or 0.0,
        **_POST_NORMS,
    }
    return llama(config, family, **(fields | differences))


def gemma3(config: Any) -> Architecture:
    """Gemma 3, of text alone: a Gemma 2 with normed queries and keys, and two kinds of rotation.

    Gemma Team 2025 (arXiv:2503.19786).

    Raises:
        ModelError: as :func:`gemma2`.
    """
    # Its attention takes no cap, whatever the configuration says.
    more = {"rotary_kinds": tuple(config.layer_types), "score_softcap": 0.0, **_QK_NORMS}
    return gemma2(config, "Gemma 3", **more)


def gemma3_with_images(config: Any) -> Architecture:
    """Gemma 3 as it is published with an eye: its language model, which reads text alone here.

    Raises:
        ModelError: as :func:`gemma2`.
    """
    text = gemma3(config.get_text_config())
    inner = {
        name: getattr(text, name).replace("model.", "model.language_model.")
        for name in ("embed", "blocks", "final_norm", "rotary")
    }
    # It caps no logits, whatever the configuration says.
    return replace(text, logit_softcap=0.0, **inner)


def olmo2(config: Any) -> Architecture:
    """OLMo 2: norms behind attention and MLP alone, queries and keys normed over all heads.

    OLMo Team 2024 (arXiv:2501.00656).

    Raises:
        ModelError: its attention adds a bias before the norm behind it.
    """
    _refuse_bias(config, "OLMo 2")
    return llama(config, "OLMo 2", attention_norm="", mlp_norm="", **_POST_NORMS, **_QK_NORMS)


def phi3(config: Any) -> Architecture:
    """Phi-3: a Llama with q, k and v in one projection, and the gate and its input in another."""
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    starts = (0, n_heads, n_heads + n_kv)
    q, k, v = (Projection("self_attn.qkv_proj", start * d_head, d_head) for start in starts)
    return llama(
        config,
        "Phi-3",
        q=q,
        k=k,
        v=v,
        mlp_input_projection="mlp.gate_up_proj",
        mlp_input_offset=config.intermediate_size,
        mlp_gate_projection="mlp.gate_up_proj",
        mlp_activation="mlp.activation_fn",
    )


#: By ``model_type`` of the configuration.
FAMILIES: dict[str, Callable[[Any], Architecture]] = {
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3_with_images,
    "gemma3_text": gemma3,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
}

_POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def _windows(config: Any) -> tuple[int, ...]:
    """How far back each layer sees, 0 for all the way; empty where all layers do."""
    window: int | None = getattr(config, "sliding_window", None)
    if not window:
        return ()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * int(config.num_hidden_layers)
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _refuse_bidirectional(config: Any, family: str) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(
            f"the {family} model looks ahead (use_bidirectional_attention), so it predicts no next "
            f"token; circuits of models that look back alone can be traced"
        )


def _refuse_bias(config: Any, family: str) -> None:
    if config.attention_bias:
        raise ModelError(
            f"the {family} model adds a bias to its heads' sum before a norm (attention_bias), "
            f"which belongs to no head; circuits of {family} models without it can be traced"
        )
