"""Network: the ordinary GPT-2 that every bundled model is, before it has its weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from circuitlab.zoo.recipe import BOS, PAD, SPECIAL_WORDS


def gpt2(
    n_words: int,
    n_positions: int,
    *,
    n_layers: int,
    n_heads: int,
    d_model: int,
    n_inner: int,
    activation: str = "gelu_new",
    weight_std: float = 0.02,
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, untied embeddings, eager attention and no dropout."""
    config = GPT2Config(
        vocab_size=n_words,
        n_positions=n_positions,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        n_inner=n_inner,
        activation_function=activation,
        initializer_range=weight_std,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=SPECIAL_WORDS.index(BOS),
        eos_token_id=None,
        pad_token_id=SPECIAL_WORDS.index(PAD),
        tie_word_embeddings=False,
        use_cache=False,
    )
    module = GPT2LMHeadModel(config)
    module.set_attn_implementation("eager")
    return module


def silent(
    n_words: int, n_positions: int, *, width: int, n_layers: int, n_inner: int, n_heads: int = 2
) -> GPT2LMHeadModel:
    """A GPT-2 without norms whose weights are all zero."""
    with torch.random.fork_rng(devices=[]):
        module = gpt2(
            n_words,
            n_positions,
            n_layers=n_layers,
            n_heads=n_heads,
            d_model=width + width % n_heads,
            n_inner=n_inner,
            activation="relu",
        )
    norms = [name for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)]
    for name in norms:
        module.set_submodule(name, nn.Identity())
    for weight in parameters(finished(module)).values():
        weight.zero_()
    return module


def finished(module: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same module in eval mode, its parameters frozen."""
    module.eval()  # type: ignore[no-untyped-call]  # transformers gives its eval no types
    module.requires_grad_(False)
    return module


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters by name; writing into them changes the module."""
    return dict(module.named_parameters())
