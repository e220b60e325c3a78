"""Spread: a model whose weights are on several devices, in memory and on disk, by accelerate.

Its hooks bring the weights of a module to where it runs, and the values it reads with them. What is
read outside of a pass, weights above all, is brought to one device here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitlab.checkpoint import digest
from circuitlab.errors import ModelError
from circuitlab.plans import Place, Plan
from circuitlab.tracing import Done, Pass, Tracer


def is_spread(module: nn.Module) -> bool:
    """Whether a module's weights are on more than one device, or not in memory at all."""
    devices = {parameter.device for parameter in module.parameters()}
    return len(devices) > 1 or any(device.type == "meta" for device in devices)


def first_device(module: nn.Module) -> torch.device:
    """Where prompts go and what is read comes together: the first accelerator, else the CPU."""
    places = getattr(module, "hf_device_map", {}).values()
    found = [place for place in places if str(place) not in ("cpu", "disk", "meta")]
    return torch.device(found[0] if found else "cpu")


class SpreadModule(nn.Module):
    """A module whose parts are given whole, on one device.

    Called, it runs the module. Nothing that is given is the module's own: to change it changes
    nothing.

    Args:
        module: As accelerate has dispatched it.
        device: Where to bring what is asked for.

    Raises:
        ModelError: a weight is on the meta device, and no hook of accelerate knows its values.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        super().__init__()
        # Whoever asks for a module's type and device looks at its first weight.
        empty = torch.empty(0, dtype=next(module.parameters()).dtype, device=device)
        self.first = nn.Parameter(empty, requires_grad=False)
        self.module = module
        self.config = module.config
        self._device = device
        for path, part in module.named_modules():
            if _absent(part) and not getattr(getattr(part, "_hf_hook", None), "offload", False):
                raise ModelError(
                    f"{type(module).__name__} has the weights of {path!r} on the meta device, and "
                    f"no hook of accelerate brings them; load it with from_pretrained"
                )

    def forward(self, **inputs: Tensor) -> Any:
        """What the module gives."""
        return self.module(**inputs)

    def get_submodule(self, target: str) -> nn.Module:
        """A copy of a part with its weights on the device, without hooks."""
        part: nn.Module = self.module.get_submodule(target)
        return _copied(part, self._device)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Each weight once: those that share their values do not do so on the meta device."""
        shared = getattr(self.module, "all_tied_weights_keys", {})
        names = {f"{prefix}.module.{name}".lstrip(".") for name in shared}
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if name not in names:
                yield name, parameter


class SpreadTracer(Tracer):
    """Runs passes of a module as accelerate has dispatched it; what they give is on one device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module, device)
        self._device = device

    @property
    def weights_digest(self) -> str:
        """Short digest of the weights, the same wherever they are."""
        return digest(_State(self._module))[:12]

    def start(self, wanted: Pass) -> Callable[[], Done]:
        """Run a pass at once.

        Raises:
            NumericsError: a gradient holds NaN or infinity; names the place and the prompt.
        """
        # The unembedding's weights are where it runs, and only while it does.
        plan: Plan = [("pick", step[2]) if step[0] == "unembed" else step for step in wanted.plan]
        done = self._run(replace(wanted, plan=plan))
        logits, read = done.logits.to(self._device), self._here(done.read)
        gathered = Done(logits, read, self._here(done.gradients))
        return lambda: gathered

    def _here(self, values: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        return {place: value.to(self._device) for place, value in values.items()}


class _State(Mapping[str, Tensor]):
    """A module's weights by name, each brought when it is asked for."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = list(module.state_dict())

    def __getitem__(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        part = self._module.get_submodule(path)
        with _brought(part, torch.device("cpu")):
            tensor: Tensor = getattr(part, own)
            return tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _copied(part: nn.Module, device: torch.device) -> nn.Module:
    copied = part.__class__.__new__(part.__class__)
    # Hooks, and nnsight's, are attributes of the object: the copy has its class's own forward.
    hooks = ("forward", "_hf_hook", "_old_forward")
    copied.__dict__ = {key: value for key, value in part.__dict__.items() if key not in hooks}
    with _brought(part, device):
        copied._parameters = {
            name: None if own is None else nn.Parameter(own.detach().to(device), False)
            for name, own in part._parameters.items()
        }
        copied._buffers = {
            name: None if own is None else own.to(device) for name, own in part._buffers.items()
        }
    copied._modules = {
        name: None if child is None else _copied(child, device)
        for name, child in part._modules.items()
    }
    return copied


def _absent(part: nn.Module) -> bool:
    """Whether a module's own weights are not in memory."""
    own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    return any(tensor.device.type == "meta" for tensor in own)


def _brought(part: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """A module's own weights are in memory inside."""
    if not _absent(part):
        return nullcontext()
    from accelerate.utils import align_module_device

    brought: AbstractContextManager[None] = align_module_device(part, device)
    return brought
