"""Blocks of stock models of every family as functions of one prompt's stream, all in float64.

A block is the module's own code with what the model itself hands it: masks, windows, rotations.
Where that code goes down to float32, it stays in float64 here.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from families import ALL_FAMILIES, random_module
from oracles import random_gpt2
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitlab import TracedModel, load_model

Function = Callable[[Tensor], Tensor]

#: Families whose MLP is one.
FAMILIES = ("gpt2", *(family for family in ALL_FAMILIES if family != "mixtral"))
#: Norms before and behind attention and MLP, where they are called otherwise.
_NORMS = {
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "gpt2": ("ln_1", "", "ln_2", ""),
}
_NORMS["gemma3"] = _NORMS["gemma2"]


def family_pair(family: str) -> tuple[Any, TracedModel]:
    """A random model of a family: the module in float64, and as it is loaded, in float32."""
    gpt2 = family == "gpt2"
    module: Any = random_gpt2(dtype=torch.float32) if gpt2 else random_module(family)
    return deepcopy(module).double(), load_model((module, None))


class _InFloat64(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(wide, args), **named)


class StockBlock:
    """A block of a stock model: what its attention and MLP write, and the stream behind it.

    Args:
        module: The model, float64.
        family: Its family.
        layer: The block.
        n_tokens: Length of the prompt, without padding.
    """

    def __init__(self, module: Any, family: str, layer: int, n_tokens: int) -> None:
        kind = family.partition("-")[0]
        path = {"gpt2": "transformer.h", "neox": "gpt_neox.layers"}.get(kind, "model.layers")
        self.block: Any = module.get_submodule(f"{path}.{layer}")
        self._attention = {"gpt2": "attn", "neox": "attention"}.get(kind, "self_attn")
        plain = ("input_layernorm", "", "post_attention_layernorm", "")
        self._norms = [
            self.block.get_submodule(name) if name else nn.Identity()
            for name in _NORMS.get(kind, plain)
        ]
        self._of_block = self._handed(module, self.block, n_tokens)
        attention = self.block.get_submodule(self._attention)
        self._of_attention = self._handed(module, attention, n_tokens)

    @staticmethod
    @torch.no_grad()
    def _handed(module: Any, part: nn.Module, n_tokens: int) -> dict[str, Any]:
        """What the model hands a part beside the stream."""
        kept: list[dict[str, Any]] = []
        hook = part.register_forward_pre_hook(
            lambda _, args, named: kept.append(
                {k: v for k, v in named.items() if k != "hidden_states"} | {"args": args[1:]}
            ),
            with_kwargs=True,
        )
        module(torch.arange(1, 1 + n_tokens)[None], use_cache=False)
        hook.remove()
        return kept[0]

    def _run(self, part: Any, handed: dict[str, Any], x: Tensor) -> Tensor:
        named = {name: value for name, value in handed.items() if name != "args"}
        given = part(x[None], *handed["args"], **named)
        found: Tensor = given[0] if isinstance(given, tuple) else given
        return found[0]

    def attention(self, x: Tensor) -> Tensor:
        """What the attention writes, ``[pos, d]``, at a stream of that shape."""
        with _InFloat64():
            part = self.block.get_submodule(self._attention)
            return self._norms[1](self._run(part, self._of_attention, self._norms[0](x)))

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP writes, ``[..., d]``, at streams of that shape."""
        with _InFloat64():
            return self._norms[3](self.block.mlp(self._norms[2](x)))

    def whole(self, x: Tensor) -> Tensor:
        """The stream behind the block, ``[pos, d]``."""
        with _InFloat64():
            return self._run(self.block, self._of_block, x)
