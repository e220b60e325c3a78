"""Interpreter: executes a plan inside a trace; all of CircuitLab's code that ever leaves a machine.

A remote host gets it as source text and runs it beside the model, so it names nothing but torch and
its own two functions, and gives plain containers of tensors.

Beside the steps of ``plans`` it knows, for hosts that cannot hand over live tensors:

    ("pick", ids)          of the logits, those of these tokens
    ("pull", cotangent)    gradients at the taps of the last logits times ``[batch, vocab]``
    ("dtype",)             instead of a pass: the type of the model's first weight, as text
    ("weights", path)      instead of a pass: parameters and buffers of a module itself
"""

from __future__ import annotations

from typing import Any

import torch


def interpret(model: Any, plan: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Execute a plan inside a trace; everything it needs is in its arguments."""
    kept: dict[str, Any] = {"read": {}, "tap": {}}
    asked: dict[str, Any] = {}
    width = 0
    for step in plan:
        op = step[0]
        envoy = model.get(step[1]) if len(step) > 1 and isinstance(step[1], str) else model
        if op in ("pick", "pull"):
            asked[op] = step[1]
        elif op == "dtype":
            asked[op] = str(next(iter(model.parameters())).dtype)
        elif op == "weights":
            named = [*envoy.named_parameters(recurse=False), *envoy.named_buffers(recurse=False)]
            asked[step[1]] = {name: tensor.detach().cpu() for name, tensor in named}
        elif op in ("last", "fork"):
            whole = envoy.input
            width = whole.shape[1]
            envoy.input = whole[:, -1:]
            if op == "fork":
                model.get(step[2]).input = whole
        elif op == "widen":
            envoy.output = envoy.output.expand(-1, width, -1)
        elif op == "unembed":
            weight, bias = envoy.weight[step[2]], getattr(envoy, "bias", None)
            value = envoy.input @ weight.T
            envoy.skip(value if bias is None else value + bias[step[2]])
        elif op == "pass":
            envoy.skip(envoy.input)
        elif op == "skip":
            # Plans come from elsewhere; parts of a model may be on several devices.
            places = (p.device for p in envoy.parameters() if p.device.type != "meta")
            value = step[2].to(next(places, step[2].device))
            envoy.skip((value, *[None] * (step[3] - 1)) if step[3] else value)
        else:
            visit(envoy, step, kept)
    if plan and plan[0][0] in ("dtype", "weights"):
        return asked
    logits = model.output.logits
    if "pick" in asked:
        logits = logits[..., asked["pick"].to(logits.device)]
    if "pull" not in asked:
        return {"logits": logits, **kept}
    pulled, taps = asked["pull"].to(logits.device), list(kept["tap"].values())
    found = torch.autograd.grad(logits[:, -1], taps, pulled, materialize_grads=True)
    return {"read": kept["read"], "gradient": dict(zip(kept["tap"], found, strict=True))}


def visit(envoy: Any, step: tuple[Any, ...], kept: dict[str, Any]) -> None:
    """Read, write or tap one place."""
    op, path, side, item = step[:4]
    whole = envoy.output if side == "output" else envoy.input
    value = whole[item] if isinstance(whole, tuple) else whole
    if value is None:
        raise ValueError(f"{path} gives no item {item}")
    place = (path, side, item)
    changed = None
    if op == "read":
        kept["read"][place] = value.detach()
    elif op == "tap":
        if step[4] == "leaf":
            value = changed = value.detach().requires_grad_(True)
        elif step[4] == "branch":
            value = changed = value.view_as(value)
        kept["tap"][place] = value
    else:
        if op == "write":
            value = changed = value.clone()
        value[step[4]] = step[5].to(value.device, value.dtype)
    if changed is None:
        return
    new = (*whole[:item], changed, *whole[item + 1 :]) if isinstance(whole, tuple) else changed
    if side == "output":
        envoy.output = new
    else:
        envoy.input = new
