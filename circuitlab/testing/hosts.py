"""A host in this process: what an analysis would send is looked at, unpacked and run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import nnsight
import torch

from circuitlab.interpreter import interpret
from circuitlab.model import TracedModel
from circuitlab.remote.client import Client
from circuitlab.remote.engine import RemoteEngine, Shipment
from circuitlab.remote.hosts import Host
from circuitlab.remote.skeleton import RemoteModule, empty_tokenizer, make_skeleton
from circuitlab.testing.clause import BrokenError

#: Packages that a host has, of those whose names plain data can hold.
THERE = frozenset({"torch", "collections", "builtins", "copyreg"})


class LocalHost(RemoteEngine):
    """Takes the shipments that would be sent to a host, and runs them on a model of this process.

    Each is pickled and read again by one that knows only what hosts have.

    Args:
        model: Has the weights.
        skeleton: The same modules without weights.
    """

    def __init__(self, model: TracedModel, skeleton: Any) -> None:
        client = Client(Host("http://127.0.0.1"), model.name)
        super().__init__(skeleton, empty_tokenizer(), client, model.d_model)
        self._here = nnsight.NNsight(model._module)

    def send(self, shipments: Sequence[Shipment]) -> list[dict[Any, Any]]:
        """What the shipments' plans keep, in their order.

        Raises:
            AssertionError: something in a plan is no plain data; names it.
        """
        return [self._run(*unpacked(tuple(shipment))) for shipment in shipments]

    def _run(self, inputs: dict[str, Any] | None, plan: Any, differentiate: bool) -> Any:
        if inputs is None:
            return interpret(self._here, plan)
        with torch.set_grad_enabled(differentiate):
            with self._here.trace(**inputs):
                kept = nnsight.save(interpret(self._here, plan))
        return kept


def on_host(model: TracedModel) -> TracedModel:
    """A model as it is seen from afar: its weights are on a host in this process."""
    skeleton = make_skeleton(model._module.config)
    engine = LocalHost(model, skeleton)
    module: Any = RemoteModule(skeleton, model.architecture, engine)
    return TracedModel(
        module,
        model.tokenizer,
        model.architecture,
        name=model.name,
        task_name=model.task_name,
        engine=engine,
    )


def unpacked(shipment: Any) -> Any:
    """A shipment as a host reads it.

    Raises:
        AssertionError: it names a class or function that a host does not have, or cannot be packed.
    """
    try:
        content = pickle.dumps(shipment)
    except Exception as error:
        raise BrokenError(
            f"what is sent to a host cannot be packed ({error}); send tensors"
        ) from error
    return _HostReader(io.BytesIO(content)).load()


class _HostReader(pickle.Unpickler):
    """Reads what was packed here, with the modules of a host alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in THERE:
            raise BrokenError(
                f"what is sent to a host names {module}.{name}, which no host has; send plain "
                f"tensors (tensor.as_subclass(torch.Tensor)) and keep the rest here"
            )
        return super().find_class(module, name)
