"""Tracing: the one trace block of CircuitLab, and the only module that imports nnsight.

Interventions are plain data (see ``plans``); what a trace executes is one small interpreter of a
plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import nnsight
import torch
from torch import Tensor, nn

from circuitlab.errors import NumericsError
from circuitlab.plans import Place, Plan
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

    def execute(self, tokens: Tokens, plan: Plan, *, keep_all: bool) -> Kept:
        """Run a plan; unembed all positions with ``keep_all``, else the last alone."""
        differentiate = any(step[0] == "tap" for step in plan)
        inputs = {
            "input_ids": tokens.ids,
            "attention_mask": tokens.mask.to(torch.int64),
            "position_ids": tokens.position_ids,
            "use_cache": False,
            # An index gathers the last position into one block; a slice would make the unembedding
            # a strided product, four times slower.
            "logits_to_keep": 0 if keep_all else tokens.ids.new_tensor([tokens.ids.shape[1] - 1]),
        }
        with _frozen(self._module), torch.set_grad_enabled(differentiate):
            with self._envoy.trace(**inputs):
                kept = nnsight.save(_interpret(self._envoy, plan))
        return Kept(kept["logits"], kept["read"], kept["tap"])


def _interpret(model: Any, plan: Plan) -> dict[str, Any]:
    """Execute a plan inside a trace. Everything it needs is in its arguments."""
    read: dict[Any, Any] = {}
    tap: dict[Any, Any] = {}
    for step in plan:
        op, path = step[0], step[1]
        envoy = model.get(path)
        if op == "skip":
            envoy.skip(step[2])
            continue
        side, item = step[2], step[3]
        whole = envoy.output if side == "output" else envoy.input
        value = whole[item] if isinstance(whole, tuple) else whole
        if value is None:
            raise ValueError(f"{path} gives no item {item}")
        place = (path, side, item)
        changed = None
        if op == "read":
            read[place] = value.detach()
        elif op == "tap":
            how = step[4]
            if how == "leaf":
                value = changed = value.detach().requires_grad_(True)
            elif how == "branch":
                value = changed = value.view_as(value)
            tap[place] = value
        else:
            if op == "write":
                value = changed = value.clone()
            value[step[4]] = step[5].to(value.device, value.dtype)
        if changed is not None:
            new = (
                (*whole[:item], changed, *whole[item + 1 :])
                if isinstance(whole, tuple)
                else changed
            )
            if side == "output":
                envoy.output = new
            else:
                envoy.input = new
    return {"logits": model.output.logits, "read": read, "tap": tap}


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
