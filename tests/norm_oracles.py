"""Norms of a stock model, prompt by prompt, to test ``norm-growth`` against."""

from __future__ import annotations

import math
from typing import Any

import families
import oracles
import torch
from circuitlab_attention_heads.growing import norm_growth
from random_tasks import random_task
from torch import Tensor

from circuitlab import CircuitGraph, Task, load_model

#: Padded prompts.
TASK = random_task([6, 4, 3, 6])
#: Tolerance of float64.
EXACT = {"rel": 1e-10, "abs": 1e-12}
#: GPT-NeoX and Llama take their softmax in float32, whatever the type of the model.
FAMILIES = {"gpt2": EXACT, "no-norm": EXACT, "neox": {"rel": 1e-4}, "llama": {"rel": 1e-4}}


def plain_module(family: str, n_layers: int = 3) -> Any:
    if family in ("gpt2", "no-norm"):
        return oracles.random_gpt2(n_layers, 2, 16, layer_norm=family == "gpt2", seed=1)
    return families.random_module(family, n_layers)


def parts_of(module: Any) -> tuple[Any, str, Any]:
    """The blocks, the name of their attention, and the final norm."""
    kind = module.config.model_type
    if kind == "gpt2":
        return module.transformer.h, "attn", module.transformer.ln_f
    if kind == "gpt_neox":
        return module.gpt_neox.layers, "attention", module.gpt_neox.final_layer_norm
    return module.model.layers, "self_attn", module.model.norm


def plain(module: Any, prompt: tuple[int, ...]) -> dict[str, list[Tensor]]:
    """Streams and writes of the stock model on one prompt, ``[pos, d_model]`` each, float64."""
    blocks, attention, final_norm = parts_of(module)
    kept: dict[str, list[Tensor]] = {"attention": [], "mlp": [], "stream": []}

    def keep(name: str) -> Any:
        def hook(_: Any, given: Any, output: Any = None) -> None:
            value = given[0] if output is None else output
            kept[name].append((value[0] if isinstance(value, tuple) else value)[0].double())

        return hook

    hooks = [getattr(block, attention).register_forward_hook(keep("attention")) for block in blocks]
    hooks += [block.mlp.register_forward_hook(keep("mlp")) for block in blocks]
    hooks.append(final_norm.register_forward_pre_hook(keep("end")))
    kept["end"] = []
    with torch.no_grad():
        hidden = module(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    # The last hidden state has been through the final norm.
    kept["stream"] = [*(state[0].double() for state in hidden[:-1]), *kept.pop("end")]
    return kept


def seen(vector: Tensor, family: str) -> Tensor:
    """A LayerNorm does not see the mean; an RMSNorm and an identity do."""
    return vector - vector.mean() if family in ("gpt2", "neox") else vector


def geometric(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def grown(module: Any, task: Task = TASK, **options: Any) -> CircuitGraph:
    model = load_model((module, None)) if module.config.model_type == "gpt2" else None
    return norm_growth(model or families.traced(module), task, **{"top": "all"} | options)
