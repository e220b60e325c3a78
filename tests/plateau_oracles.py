"""Walks done slowly: a stock model under hooks, one prompt at a time and without padding.

Nothing here is shared with the code under test but the prompts and points that both are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from circuitlab_activation_plateaus.walks.paths import lerp
from circuitlab_activation_plateaus.walks.responses import d_sym, speed
from circuitlab_activation_plateaus.walks.summaries import Summary, summarise
from circuitlab_activation_plateaus.walks.walking import Walks, clean
from families import random_module, traced
from oracles import random_gpt2
from torch import Tensor, nn

from circuitlab import Site, Tokens, TracedModel, load_model

LOGITS = Site("logits")
#: float32 through two small blocks, summed in another order.
NEAR = 2e-5
FAMILIES = ("gpt2", "llama", "neox")
LENGTHS = (6, 4, 5)
#: Where a Hugging Face block keeps its parts: attention, its output projection, the MLP.
PARTS = {
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp"),
    "llama": ("model.layers", "self_attn", "self_attn.o_proj", "mlp"),
    "neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp"),
}


def prompts(model: TracedModel, seed: int = 0) -> Tokens:
    """Prompts of unequal length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tuple(torch.randint(1, 40, (n,), generator=generator).tolist()) for n in LENGTHS]
    return model.tokens(rows)


def other_last(tokens: Tokens) -> Tokens:
    """The same prompts with other last tokens."""
    ids = tokens.ids.clone()
    ids[:, -1] = (ids[:, -1] + 7) % 40
    return Tokens(ids, tokens.mask)


def build(family: str) -> tuple[nn.Module, TracedModel]:
    gpt2 = family == "gpt2"
    module = random_gpt2(dtype=torch.float32) if gpt2 else random_module(family)
    return module, load_model((module, None)) if gpt2 else traced(module)


def between(model: TracedModel, tokens: Tokens, site: Site, n: int = 4) -> Tensor:
    """Points from each prompt's own value to another's."""
    a = clean(model, tokens, [site])[site]
    return lerp(a, a.roll(1, 0), torch.linspace(0, 1, n))


Change = Callable[[Tensor], Tensor]


class Hooked:
    """A stock model, one prompt at a time, with values put in by hooks and read the same way."""

    def __init__(self, module: nn.Module, family: str) -> None:
        self.module: Any = module
        self.blocks, self.attention, self.projection, self.mlp = PARTS[family]

    def run(self, ids: Tensor, changes: Mapping[Site, Change]) -> tuple[Tensor, dict[Site, Tensor]]:
        """Centred last logits, and the value at each changed site, ``[pos, width]``."""
        seen: dict[Site, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for site, change in changes.items():
                stack.callback(self._hook(site, change, seen).remove)
            logits = self.module(ids[None]).logits[0, -1]
        return logits - logits.mean(), seen

    def _hook(self, site: Site, change: Change, seen: dict[Site, Tensor]) -> Any:
        block = self.module.get_submodule(f"{self.blocks}.{site.layer}")

        def changed(value: Tensor) -> Tensor:
            seen[site] = change(value[0])
            return seen[site][None]

        def before(_: Any, args: Any) -> Any:
            return (changed(args[0]), *args[1:])

        def after(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (changed(output[0]), *output[1:])
            return changed(output)

        if site.kind == "resid_pre":
            return block.register_forward_pre_hook(before)
        if site.kind == "z":
            return block.get_submodule(self.projection).register_forward_pre_hook(before)
        part = {"attn_out": self.attention, "mlp_out": self.mlp, "resid_post": ""}[site.kind]
        return (block.get_submodule(part) if part else block).register_forward_hook(after)


def put(position: int, value: Tensor, columns: slice = slice(None)) -> Change:
    def change(whole: Tensor) -> Tensor:
        whole = whole.clone()
        whole[position, columns] = value
        return whole

    return change


def same(value: Tensor) -> Tensor:
    return value


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def summarised(walks: Walks) -> Summary:
    d = d_sym(walks.logits)
    return summarise(walks.t, d, speed(walks.t, walks.logits))
