"""Tracing: the one trace block of CircuitLab, and the only module that imports nnsight.

Interventions are plain data (see ``plans``); what a trace executes is one small interpreter of a
plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from circuitlab.errors import NumericsError
from circuitlab.plans import Place, Plan, Step
from circuitlab.prompts import Tokens

# nnsight takes -v or --verbose among any program's arguments for its own debug switch.
nnsight.CONFIG.APP.DEBUG = False


class Kept(NamedTuple):
    """What a plan kept: logits, what it read, and what it tapped, still attached to the graph."""

    logits: Tensor
    read: dict[Place, Tensor]
    tapped: dict[Place, Tensor]

    def gradients(self, function: Callable[[Tensor], Tensor]) -> dict[Place, Tensor]:
        """Gradients at the taps of the sum of a function of the last logits ``[batch, vocab]``.

        Raises:
            NumericsError: one holds NaN or infinity; names the place and the prompt.
        """
        with torch.enable_grad():
            total = function(self.logits[:, -1]).sum()
        # A tap that the metric does not depend on has gradient zero.
        found = torch.autograd.grad(total, list(self.tapped.values()), materialize_grads=True)
        # Backward order: the first that is bad is where it went wrong.
        for (path, side, _), gradient in reversed(list(zip(self.tapped, found, strict=True))):
            bad = ~torch.isfinite(gradient.flatten(1)).all(1)
            if bad.any():
                raise NumericsError(
                    f"the gradient at {path} ({side}), prompt {int(bad.nonzero()[0]) + 1} of the "
                    f"batch, holds NaN or infinity; run in a wider type (--dtype float32)"
                )
        return dict(zip(self.tapped, found, strict=True))


class Tracer:
    """Executes plans on a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._envoy = nnsight.NNsight(module)
        self._slow = [
            (parent, name)
            for parent in module.modules()
            for name, child in parent.named_children()
            if isinstance(child, NewGELUActivation)
        ]

    def execute(self, tokens: Tokens, plan: Plan, *, keep_all: bool = False) -> Kept:
        """Run a plan; unembed all positions with ``keep_all``, else the last alone.

        With ``keep_all`` every module is the model's own, and results equal plain ones bit for bit.
        """
        differentiate = any(step[0] == "tap" for step in plan)
        inputs = {
            "input_ids": tokens.ids,
            "attention_mask": tokens.mask.to(torch.int64),
            "position_ids": _positions(tokens),
            "use_cache": False,
            # An index gathers the last position into one block; a slice would make the unembedding
            # a strided product, four times slower.
            "logits_to_keep": 0 if keep_all else tokens.ids.new_tensor([tokens.ids.shape[1] - 1]),
        }
        with (
            _frozen(self._module) if differentiate else nullcontext(),
            _replaced([] if keep_all else self._slow, _FUSED_GELU),
            torch.set_grad_enabled(differentiate),
        ):
            with self._envoy.trace(**inputs):
                kept = nnsight.save(_interpret(self._envoy, plan))
        return Kept(kept["logits"], kept["read"], kept["tap"])


def _positions(tokens: Tokens) -> Tensor:
    """Position ids, ``[batch, pos]``; one row serves prompts without padding, and is faster."""
    if tokens.positions is None and tokens.mask.all():
        return torch.arange(tokens.ids.shape[1], device=tokens.ids.device)[None]
    return tokens.position_ids


def _interpret(model: Any, plan: Plan) -> dict[str, Any]:
    """Execute a plan inside a trace. Everything it needs is in its arguments."""
    kept: dict[str, Any] = {"read": {}, "tap": {}}
    width = 0
    for step in plan:
        op, envoy = step[0], model.get(step[1])
        if op in ("last", "fork"):
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
            envoy.skip((step[2], *[None] * (step[3] - 1)) if step[3] else step[2])
        else:
            _visit(envoy, step, kept)
    return {"logits": model.output.logits, **kept}


def _visit(envoy: Any, step: Step, kept: dict[str, Any]) -> None:
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


#: The same function as NewGELUActivation in one pass over memory instead of seven.
_FUSED_GELU = nn.GELU(approximate="tanh")


@contextmanager
def _replaced(places: list[tuple[nn.Module, str]], module: nn.Module) -> Iterator[None]:
    """Children replaced inside; afterwards each is as it was."""
    earlier = [getattr(parent, name) for parent, name in places]
    for parent, name in places:
        setattr(parent, name, module)
    try:
        yield
    finally:
        for (parent, name), child in zip(places, earlier, strict=True):
            setattr(parent, name, child)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient inside; afterwards each is as it was."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
