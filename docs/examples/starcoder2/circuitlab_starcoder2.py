"""StarCoder 2: LayerNorm, grouped queries, rotary embeddings, an MLP without a gate."""

import circuitlab
from circuitlab import Architecture, Projection


@circuitlab.hookimpl
def adapt_architecture(config):
    """Describe StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173); leave others to others."""
    if config.model_type != "starcoder2":
        return None
    d_head = config.hidden_size // config.num_attention_heads
    return Architecture(
        family="StarCoder 2",
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        n_positions=config.max_position_embeddings,
        embed="model.embed_tokens",
        rotary="model.rotary_emb",
        blocks="model.layers",
        final_norm="model.norm",
        attention_norm="input_layernorm",
        attention="self_attn",
        q=Projection("self_attn.q_proj", 0, d_head),
        k=Projection("self_attn.k_proj", 0, d_head),
        v=Projection("self_attn.v_proj", 0, d_head),
        output_projection="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        mlp="mlp",
        d_mlp=config.intermediate_size,
        mlp_input_projection="mlp.c_fc",
        mlp_activation="mlp.act",
        mlp_output_projection="mlp.c_proj",
        sliding_windows=(config.sliding_window or 0,) * config.num_hidden_layers,
    )
