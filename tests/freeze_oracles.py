"""Walks through a plain Hugging Face model under forward hooks, with parts of it held.

One prompt at a time, without padding: hooks change the last position of what modules read or give.
Nothing here is shared with the code under test but the paths of modules. Parts are named ``a1.h0``,
``a1``, ``m1``, and ``a1.norm``, ``m1.norm``, ``logits.norm``, whose values are the norms' scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from circuitlab import Architecture


def scale_of(norm: nn.Module, x: Tensor) -> Tensor:
    """What a LayerNorm or an RMSNorm divides by, ``[..., 1]``."""
    if isinstance(norm, nn.LayerNorm):
        return (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    if isinstance(norm, nn.Identity):
        return torch.ones_like(x[..., :1])
    epsilon: Any = getattr(norm, "variance_epsilon", None) or norm.eps
    return (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


class Plain:
    """A model whose parts can be held."""

    def __init__(self, module: nn.Module, architecture: Architecture) -> None:
        self.module: Any = module
        self.architecture = architecture
        self.blocks: Any = module.get_submodule(architecture.blocks)

    @torch.no_grad()
    def walk(
        self, ids: Tensor, layer: int, points: Tensor, hold: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Replace what block ``layer`` reads at the last position of a prompt by points.

        Returns:
            Centred logits ``[n_steps, vocab]``, and what each part gave, ``[n_steps, width]``.
        """
        seen: dict[str, Tensor] = {}

        def start(_: nn.Module, given: Any, named: Any) -> Any:
            stream = (given[0] if given else named["hidden_states"]).clone()
            stream[:, -1] = points
            if given:
                return (stream, *given[1:]), named
            return given, {**named, "hidden_states": stream}

        with ExitStack() as stack:
            for handle in self._hooks(seen, hold):
                stack.callback(handle.remove)
            handle = self.blocks[layer].register_forward_pre_hook(start, with_kwargs=True)
            stack.callback(handle.remove)
            logits = self.module(ids.expand(len(points), -1), use_cache=False).logits[:, -1]
        return logits - logits.mean(-1, keepdim=True), seen

    def _hooks(self, seen: dict[str, Tensor], hold: Mapping[str, Tensor]) -> Iterator[Any]:
        a = self.architecture
        for layer, block in enumerate(self.blocks):
            part = block.get_submodule
            for name, path in ((f"a{layer}", a.attention), (f"m{layer}", a.mlp)):
                yield part(path).register_forward_hook(_giving(name, seen, hold))
            yield part(a.output_projection).register_forward_pre_hook(
                self._heads(layer, seen, hold)
            )
            for name, path in ((f"a{layer}", a.attention_norm), (f"m{layer}", a.mlp_norm)):
                yield part(path).register_forward_hook(_normed(f"{name}.norm", seen, hold))
        final = self.module.get_submodule(a.final_norm)
        yield final.register_forward_hook(_normed("logits.norm", seen, hold))

    def _heads(
        self, layer: int, seen: dict[str, Tensor], hold: Mapping[str, Tensor]
    ) -> Callable[..., Any]:
        def hook(_: nn.Module, given: Any) -> Any:
            z, width = given[0].clone(), self.architecture.d_head
            for head in range(self.architecture.n_heads):
                name, columns = f"a{layer}.h{head}", slice(head * width, (head + 1) * width)
                if name in hold:
                    z[:, -1, columns] = hold[name]
                seen[name] = z[:, -1, columns].clone()
            return (z, *given[1:])

        return hook


def _giving(name: str, seen: dict[str, Tensor], hold: Mapping[str, Tensor]) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        if name in hold:
            value[:, -1] = hold[name]
        seen[name] = value[:, -1].clone()
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def _normed(name: str, seen: dict[str, Tensor], hold: Mapping[str, Tensor]) -> Callable[..., Any]:
    def hook(norm: nn.Module, given: Any, output: Tensor) -> Tensor:
        scale = scale_of(norm, given[0][:, -1])
        seen[name] = scale
        bias = getattr(norm, "bias", None)
        shift = torch.zeros(()) if bias is None else bias
        value = output.clone()
        value[:, -1] = shift + (output[:, -1] - shift) * scale / hold.get(name, scale)
        return value

    return hook
