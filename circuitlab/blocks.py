"""Blocks: what can be told of a model that no plugin describes, found by running it.

Nearly every causal language model keeps a list of blocks, each of which reads the residual stream
and hands it on. Where that holds, the stream between the blocks can be read and written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from circuitlab.architectures import Architecture, Projection
from circuitlab.errors import ModelError

#: Where configurations keep the number of tokens a model reads at most.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
#: Where none does: the model reads any number of tokens.
_ENDLESS = 1 << 30


def blocks_only(module: nn.Module) -> Architecture:
    """A description that names the blocks, the embedding and the unembedding, and nothing else.

    Raises:
        ModelError: says what was looked for, and what is not there.
    """
    config: Any = module.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = int(getattr(config, "num_hidden_layers", 0))
    names = {id(part): name for name, part in module.named_modules()}
    embed, unembedding = (names.get(id(part)) for part in _ends(module))
    if not embed or not unembedding:
        raise ModelError("a token embedding and an unembedding were looked for, and one is missing")
    path, width, n_outputs = _stream_of(module, n_layers)
    none = Projection("", 0, 0)
    lengths = [getattr(config, name, None) for name in _LENGTHS]
    return Architecture(
        family=config.model_type,
        n_layers=n_layers,
        n_heads=0,
        d_model=width,
        d_head=0,
        n_positions=next(filter(None, lengths), _ENDLESS),
        embed=embed,
        blocks=path,
        final_norm="",
        attention_norm="",
        attention="",
        q=none,
        k=none,
        v=none,
        output_projection="",
        mlp_norm="",
        mlp="",
        unembedding=unembedding,
        attention_outputs=0,
        block_outputs=n_outputs,
    )


def _ends(module: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The embedding and the unembedding, as Hugging Face models name them."""
    asked = ("get_input_embeddings", "get_output_embeddings")
    embed, unembedding = (getattr(module, name, lambda: None)() for name in asked)
    return embed, unembedding


def _stream_of(module: nn.Module, n_layers: int) -> tuple[str, int, int]:
    """Path of the blocks, width of the stream, and length of what a block returns."""
    for path, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == n_layers:
            found = _stream(module, part)
            if found is not None:
                return path, *found
    raise ModelError(
        f"a list of {n_layers} blocks was looked for, each of which reads a stream [batch, pos, "
        f"width] and hands it on to the next, and there is none"
    )


def _stream(module: nn.Module, blocks: nn.ModuleList) -> tuple[int, int] | None:
    """Width of the stream and length of what a block returns, 0 for a tensor; None if no stream."""
    inputs: list[Any] = []
    outputs: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs.append(next(iter((*args, *kwargs.values())), None))
        outputs.append(output)

    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    ids = torch.zeros(1, 3, dtype=torch.int64, device=next(module.parameters()).device)
    try:
        with torch.no_grad():
            module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # code of a model may fail in every way
        raise ModelError(f"it cannot be run as a causal language model: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    lengths = {len(value) if isinstance(value, tuple) else 0 for value in outputs}
    if len(inputs) != len(blocks) or len(lengths) != 1:
        return None
    given = [value[0] if isinstance(value, tuple) else value for value in outputs]
    streams = [*inputs, given[-1]]
    if not all(isinstance(s, Tensor) and s.shape[:-1] == (1, 3) for s in streams):
        return None
    if not all(_same(one, other) for one, other in zip(given, streams[1:], strict=True)):
        return None
    return streams[0].shape[-1], lengths.pop()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether one is handed on as the other; without weights there are no values to compare."""
    return one is other if one.is_meta else torch.equal(one, other)
