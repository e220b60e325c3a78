"""Files of a bundled model: read and write the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from circuitlab.errors import ModelError, ResourceError
from circuitlab.zoo.network import finished

WEIGHTS = "model.safetensors"


def read(name: str, folder: Path) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """What :func:`write` wrote: the module in eval mode, its parameters frozen, and the tokenizer.

    Raises:
        ModelError: a file is missing or damaged.
    """
    try:
        config = GPT2Config.from_pretrained(
            folder, attn_implementation="eager", local_files_only=True
        )
        # The weights drawn here are replaced; the caller's random state must not move for them.
        with torch.random.fork_rng(devices=[]):
            module = GPT2LMHeadModel(config)
        module.load_state_dict(load_file(folder / WEIGHTS))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"bundled model {name!r} cannot be read from {folder}: {error}; reinstall circuitlab"
        ) from error
    return finished(module), tokenizer


def write(module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files into ``folder``.

    Raises:
        ModelError: the module has no norms, so a stock GPT-2 could not read it.
        ResourceError: the folder cannot be written.
    """
    if not isinstance(module.transformer.ln_f, nn.LayerNorm):
        raise ModelError(
            "the module has no norms, so a stock GPT-2 cannot read its weights; "
            "hand-made models are made anew by zoo.load"
        )
    weights = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # save_file would make the file readable by its owner alone.
        (folder / WEIGHTS).write_bytes(serialize(weights, metadata={"format": "pt"}))
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"folder {folder} cannot be written: {error}; name one that can"
        ) from error
