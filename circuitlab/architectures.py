"""Architecture: where a model family keeps its attention, MLPs and norms, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuitlab.errors import ModelError
from circuitlab.wiring import Wiring

if TYPE_CHECKING:
    from transformers import PretrainedConfig


#: Sites of a model of which only the blocks are known.
STREAM_KINDS = ("embed", "resid_pre", "resid_post", "logits")


@dataclass(frozen=True, slots=True)
class Projection:
    """Where one of q, k, v is computed, and which columns of that output belong to a head.

    Head ``h`` has columns ``offset + h * stride`` to ``offset + h * stride + d_head``: this covers
    separate projections, thirds side by side (GPT-2, Phi-3) and heads interleaved (GPT-NeoX).
    """

    path: str
    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths and sizes of one model; what a plugin's ``adapt_architecture`` returns.

    Paths from ``attention_norm`` on are relative to one block. The traced model is checked against
    this description when it is loaded: sums, logits and an identity patch (see ``checks``).

    Attributes:
        family: Name of the family, for people.
        embed: Token embedding.
        blocks: The list of blocks.
        final_norm: Norm before the unembedding.
        attention_norm: Norm that feeds q, k and v; empty where they read the stream itself.
        attention: Attention module; returns ``(output, pattern)`` or the output.
        q: Query projection.
        k: Key projection.
        v: Value projection.
        output_projection: Maps the concatenated heads back to the residual stream.
        mlp_norm: Norm that feeds the MLP; empty where it reads the stream itself.
        mlp: MLP module.
        parallel: Whether attention and MLP of a block read the same residual stream.
        unembedding: Linear map from the final norm to the logits.
        attention_outputs: Length of the tuple that the attention module returns; 0 for a tensor.
        mlp_output_projection: Maps the MLP's hidden layer back to the residual stream; empty where
            it is not told, or no one linear map: then there is no ``mlp_post``.
        d_mlp: Width of that hidden layer; 0 without ``mlp_output_projection``.
        mlp_input_projection: Maps the normalised stream to the MLP's hidden layer; empty where that
            is not one linear map and a nonlinearity, or one and a gate.
        mlp_activation: That nonlinearity, of each number alone.
        mlp_gate_projection: Maps the normalised stream to the gate: its nonlinearity multiplies
            what ``mlp_input_projection`` gives (SwiGLU, GEGLU); empty where there is no gate.
        position_embed: Learned position embedding that is added to the tokens'; empty where there
            is none.
        rotary: Module that gives ``(cos, sin)`` of rotary embeddings, second half of the columns
            turned against the first (Llama, GPT-NeoX); empty where there are none.
        n_kv_heads: Key and value heads that the queries share in groups; 0 for one each.
        score_scales: What each layer multiplies ``q · k`` by; empty for ``1 / sqrt(d_head)``.
        attention_post_norm: Norm behind the attention: what it gives is added to the stream, and is
            ``attn_out`` (Gemma 2, OLMo 2); empty where the attention's own output is.
        mlp_post_norm: The same behind the MLP: what it gives is ``mlp_out``.
        q_norm: Norm of the projected queries, before any rotation: of each head alone, or of all
            heads side by side, as its width says (Qwen 3, OLMo 2). The site q lies before it.
        k_norm: The same of the keys.
        score_softcap: ``c`` of ``c tanh(score / c)``, taken of scores before the softmax (Gemma 2);
            0 for none.
        logit_softcap: The same of the logits.
        embed_scale: What the model multiplies the output of ``embed`` by. Not what that module
            multiplies its weight by itself (Gemma).
        sliding_windows: How many positions each layer sees back, its own counted; 0 for all of
            them. Empty where all layers see all.
        rotary_kinds: What each layer's rotary embedding is called, where ``rotary`` takes that as
            its third argument (Gemma 3); empty where it does not.
        mlp_input_offset: First of the ``d_mlp`` columns of ``mlp_input_projection``, where it gives
            the gate too (Phi-3).
        mlp_gate_offset: The same of ``mlp_gate_projection``.
        block_outputs: Length of the tuple that a block returns; 0 for a tensor.
    """

    family: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_positions: int
    embed: str
    blocks: str
    final_norm: str
    attention_norm: str
    attention: str
    q: Projection
    k: Projection
    v: Projection
    output_projection: str
    mlp_norm: str
    mlp: str
    parallel: bool = False
    unembedding: str = "lm_head"
    attention_outputs: int = 2
    mlp_output_projection: str = ""
    d_mlp: int = 0
    mlp_input_projection: str = ""
    mlp_activation: str = ""
    mlp_gate_projection: str = ""
    position_embed: str = ""
    rotary: str = ""
    n_kv_heads: int = 0
    score_scales: tuple[float, ...] = ()
    attention_post_norm: str = ""
    mlp_post_norm: str = ""
    q_norm: str = ""
    k_norm: str = ""
    score_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: float = 1.0
    sliding_windows: tuple[int, ...] = ()
    rotary_kinds: tuple[str, ...] = ()
    mlp_input_offset: int = 0
    mlp_gate_offset: int = 0
    block_outputs: int = 0

    @property
    def blocks_only(self) -> bool:
        """Whether nothing is known of what a block does, but that it hands a stream on."""
        return not self.attention

    def described(self) -> Architecture:
        """This description, where it tells the parts of a block.

        Raises:
            ModelError: only the blocks are known.
        """
        if self.blocks_only:
            raise ModelError(
                f"no installed plugin describes the heads, MLPs and norms of family "
                f"{self.family!r}: only the stream between its blocks can be read and written "
                f"({', '.join(STREAM_KINDS)}); a plugin can describe it by adapt_architecture"
            )
        return self

    @property
    def wiring(self) -> Wiring:
        """The residual graph of this model.

        Raises:
            ModelError: only the blocks of the model are known.
        """
        self.described()
        return Wiring(self.n_layers, self.n_heads, self.parallel)

    def block(self, layer: int, path: str = "") -> str:
        """Full path of a module of block ``layer``; of the block itself when ``path`` is empty."""
        return f"{self.blocks}.{layer}.{path}" if path else f"{self.blocks}.{layer}"

    @property
    def attention_entry(self) -> str:
        """What reads the stream for the attention: its norm, or the attention itself."""
        return self.attention_norm or self.attention

    @property
    def mlp_entry(self) -> str:
        """What reads the stream for the MLP: its norm, or the MLP itself."""
        return self.mlp_norm or self.mlp

    def n_heads_of(self, kind: str) -> int:
        """Number of heads of a per-head site: fewer for k and v where queries share them."""
        return self.n_kv_heads or self.n_heads if kind in ("k", "v") else self.n_heads

    def score_scale(self, layer: int) -> float:
        """What a layer multiplies ``q · k`` by."""
        return self.score_scales[layer] if self.score_scales else self.d_head**-0.5

    def projection(self, port: str) -> Projection:
        """The projection behind port q, k or v."""
        return {"q": self.q, "k": self.k, "v": self.v}[port]

    def module_paths(self) -> tuple[str, ...]:
        """Every path this description claims, one block's relative paths taken at layer 0."""
        in_block = filter(
            None,
            [
                self.attention_norm,
                self.attention,
                *(self.projection(port).path for port in "qkv"),
                self.q_norm,
                self.k_norm,
                self.output_projection,
                self.attention_post_norm,
                self.mlp_norm,
                self.mlp,
                self.mlp_post_norm,
                self.mlp_output_projection,
                self.mlp_input_projection,
                self.mlp_activation,
                self.mlp_gate_projection,
            ],
        )
        last = self.block(self.n_layers - 1)
        return (
            self.embed,
            *(self.block(0, path) for path in in_block),
            last,
            self.final_norm,
            self.unembedding,
            *filter(None, [self.position_embed, self.rotary]),
        )


def gpt2(config: PretrainedConfig) -> Architecture | None:
    """GPT-2 and models with its code (DistilGPT-2, DialoGPT); None for any other family.

    Raises:
        ModelError: a GPT-2 with cross-attention, whose block has a third writer.
    """
    if config.model_type != "gpt2":
        return None
    if config.add_cross_attention:
        raise ModelError(
            "the GPT-2 model has cross-attention, which writes to the residual stream beside heads "
            "and MLPs; circuits of decoder-only GPT-2 models can be traced"
        )
    d_model, n_heads, layers = config.n_embd, config.n_head, range(config.n_layer)
    d_head = d_model // n_heads
    scale = d_head**-0.5 if config.scale_attn_weights else 1.0
    by_layer = [layer + 1 if config.scale_attn_by_inverse_layer_idx else 1 for layer in layers]
    return Architecture(
        family="GPT-2",
        n_layers=config.n_layer,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        n_positions=config.n_positions,
        embed="transformer.wte",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        attention="attn",
        q=Projection("attn.c_attn", 0, d_head),
        k=Projection("attn.c_attn", d_model, d_head),
        v=Projection("attn.c_attn", 2 * d_model, d_head),
        output_projection="attn.c_proj",
        mlp_norm="ln_2",
        mlp="mlp",
        mlp_output_projection="mlp.c_proj",
        d_mlp=config.n_inner or 4 * d_model,
        mlp_input_projection="mlp.c_fc",
        mlp_activation="mlp.act",
        position_embed="transformer.wpe",
        score_scales=tuple(scale / divisor for divisor in by_layer),
    )


#: The core's own answers to ``adapt_architecture``, tried in order.
FAMILIES = (gpt2,)
