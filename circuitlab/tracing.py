"""Tracing: passes of a model on this machine; here and in ``remote`` nnsight is imported.

Interventions are plain data (see ``plans``); what a trace executes is one small interpreter of a
plan (see ``interpreter``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import nnsight
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from circuitlab.checkpoint import digest
from circuitlab.errors import NumericsError
from circuitlab.interpreter import interpret
from circuitlab.plans import Place, Plan
from circuitlab.prompts import Tokens

# nnsight takes -v or --verbose among any program's arguments for its own debug switch.
nnsight.CONFIG.APP.DEBUG = False


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass to be run.

    Attributes:
        tokens: The prompts.
        plan: What to read, write and tap.
        keep_all: Unembed all positions, else the last alone. Then every module is the model's own,
            and results equal plain ones bit for bit.
        gradient_of: From the last logits ``[batch, vocab]`` to numbers whose sum is differentiated
            at the taps; None where nothing is tapped.
    """

    tokens: Tokens
    plan: Plan
    keep_all: bool = False
    gradient_of: Callable[[Tensor], Tensor] | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        ids = self.tokens.ids
        return {
            "input_ids": ids,
            "attention_mask": self.tokens.mask.to(torch.int64),
            "position_ids": _positions(self.tokens),
            "use_cache": False,
            # An index gathers the last position into one block; a slice would make the unembedding
            # a strided product, four times slower.
            "logits_to_keep": 0 if self.keep_all else ids.new_tensor([ids.shape[1] - 1]),
        }


class Done(NamedTuple):
    """What a pass gave: logits, what it read, and gradients at its taps; all detached.

    There are no gradients where the logits hold NaN or infinity.
    """

    logits: Tensor
    read: dict[Place, Tensor]
    gradients: dict[Place, Tensor]


class Engine(Protocol):
    """Whatever runs passes: this machine, or a host.

    Attributes:
        remote: Whether a pass runs elsewhere. Then it is not run before its outcome is asked for,
            and all that were started by then go together.
        weights_digest: Short digest of the weights; of a host's, what it calls the model.
    """

    remote: bool

    @property
    def weights_digest(self) -> str:
        """See the attribute."""

    def start(self, wanted: Pass) -> Callable[[], Done]:
        """Begin a pass; the outcome when it is called for."""


class _Placed(nnsight.NNsight):  # type: ignore[misc]  # untyped upstream
    """A module whose inputs go to a given device, and not to that of its first weight."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._goes_to = device
        super().__init__(module)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self._goes_to


class Tracer:
    """Runs passes of a module on this machine.

    Args:
        module: Any causal language model.
        device: Where its inputs go; None for the device of its first weight.
    """

    remote = False

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        self._module = module
        self._envoy = nnsight.NNsight(module) if device is None else _Placed(module, device)
        self._slow = [
            (parent, name)
            for parent in module.modules()
            for name, child in parent.named_children()
            if isinstance(child, NewGELUActivation)
        ]

    @property
    def weights_digest(self) -> str:
        """Short digest of the weights."""
        return digest(self._module.state_dict())[:12]

    def start(self, wanted: Pass) -> Callable[[], Done]:
        """Run a pass at once.

        Raises:
            NumericsError: a gradient holds NaN or infinity; names the place and the prompt.
        """
        done = self._run(wanted)
        return lambda: done

    def _run(self, wanted: Pass) -> Done:
        plan, function = wanted.plan, wanted.gradient_of
        with (
            nullcontext() if function is None else _frozen(self._module),
            _replaced([] if wanted.keep_all else self._slow, _FUSED_GELU),
            torch.set_grad_enabled(function is not None),
        ):
            with self._envoy.trace(**wanted.inputs):
                kept = nnsight.save(interpret(self._envoy, plan))
        logits, taps, gradients = kept["logits"], kept["tap"], {}
        if function is not None and torch.isfinite(logits).all():
            with torch.enable_grad():
                total = function(logits[:, -1]).sum()
            # A tap that the metric does not depend on has gradient zero.
            found = torch.autograd.grad(total, list(taps.values()), materialize_grads=True)
            gradients = dict(zip(taps, found, strict=True))
            check_gradients(gradients)
        return Done(logits.detach(), kept["read"], gradients)


def check_gradients(gradients: dict[Place, Tensor]) -> None:
    """Refuse gradients that are not finite.

    Raises:
        NumericsError: one holds NaN or infinity; names the place and the prompt.
    """
    # Backward order: the first that is bad is where it went wrong.
    for (path, side, _), gradient in reversed(gradients.items()):
        bad = ~torch.isfinite(gradient.flatten(1)).all(1)
        if bad.any():
            raise NumericsError(
                f"the gradient at {path} ({side}), prompt {int(bad.nonzero()[0]) + 1} of the "
                f"batch, holds NaN or infinity; run in a wider type (--dtype float32)"
            )


def _positions(tokens: Tokens) -> Tensor:
    """Position ids, ``[batch, pos]``; one row serves prompts without padding, and is faster."""
    if tokens.positions is None and tokens.mask.all():
        return torch.arange(tokens.ids.shape[1], device=tokens.ids.device)[None]
    return tokens.position_ids


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
    # By name: hooks that bring weights from elsewhere put others in their place.
    learning = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name in learning:
        module.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in learning:
            module.get_parameter(name).requires_grad_(True)
