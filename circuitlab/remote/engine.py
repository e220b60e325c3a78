"""Engine: passes of a model on a host, many in one job."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import nnsight
import torch
from nnsight.modeling.mixins.meta import MetaDevice
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from torch import Tensor

from circuitlab.errors import RemoteError
from circuitlab.interpreter import interpret
from circuitlab.labels import counted
from circuitlab.plans import Place, Plan, Step
from circuitlab.remote.client import Client
from circuitlab.tracing import Done, Pass, check_gradients

#: Bytes that the tensors of one job, sent and returned, may take together, as far as foreseen.
PER_JOB = 256 * 2**20

# The interpreter travels as source: hosts do not have CircuitLab.
nnsight.register("circuitlab.interpreter")


class Shipment(NamedTuple):
    """One plan and what the model is called with; no inputs where there is no pass."""

    inputs: dict[str, Any] | None
    plan: Plan
    differentiate: bool = False


class RemoteEngine:
    """Runs passes on a host.

    Args:
        skeleton: The model without weights, on the meta device.
        tokenizer: Its tokenizer; any where it has none: prompts travel as token ids.
        client: The way to the host.
        d_model: Width of the residual stream.
    """

    remote = True

    def __init__(self, skeleton: Any, tokenizer: Any, client: Client, d_model: int) -> None:
        self.client = client
        self._width = 4 * d_model
        with MetaDevice():
            self._envoy = nnsight.TransformersModel(
                skeleton, task="text-generation", tokenizer=tokenizer
            )
        self._waiting: list[weakref.ref[_Ticket]] = []
        self._foreseen = 0

    @property
    def weights_digest(self) -> str:
        """What the host calls the model."""
        return f"{self.client.model_key} on {self.client.host.url}"

    def start(self, wanted: Pass) -> Callable[[], Done]:
        """Begin a pass; the outcome when it is called for, with those of all begun by then.

        Whoever has forgotten the outcome by then has the pass not run.
        """
        ticket = _Ticket(self, wanted, _snapshot(wanted.plan))
        size = self._size(Shipment(wanted.inputs, ticket.plan))
        if self._foreseen and self._foreseen + size > PER_JOB:
            self.finish()
        self._waiting.append(weakref.ref(ticket))
        self._foreseen += size
        return ticket.done

    def finish(self) -> None:
        """Run all passes that were started: one round trip, two where some are differentiated."""
        waiting = [ticket for reference in self._waiting if (ticket := reference()) is not None]
        self._waiting, self._foreseen = [], 0
        try:
            # A function of the logits may be anything. It stays here: its gradient there is sent.
            replies = self.send([ticket.forward() for ticket in waiting])
            for ticket, reply in zip(waiting, replies, strict=True):
                ticket.take(reply)
            again = [ticket for ticket in waiting if ticket.cotangent is not None]
            replies = self.send([ticket.backward() for ticket in again]) if again else []
            for ticket, reply in zip(again, replies, strict=True):
                ticket.take_gradients(reply)
        except BaseException as error:
            for ticket in waiting:
                ticket.error = ticket.error or error
            raise

    def weights(self, paths: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Parameters and buffers of modules, by their path and then by their name."""
        return self.send([Shipment(None, [("weights", path) for path in paths])])[0]

    def dtype_and_weights(
        self, paths: Sequence[str]
    ) -> tuple[torch.dtype, dict[str, dict[str, Tensor]]]:
        """The type the host has loaded the model in, and weights; one round trip."""
        plan: Plan = [("dtype",), *(("weights", path) for path in paths)]
        found = self.send([Shipment(None, plan)])[0]
        name = found.pop("dtype", None)
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise RemoteError(f"host {self.client.host.url} has a model of unknown type {name!r}")
        return dtype, found

    def send(self, shipments: Sequence[Shipment]) -> list[dict[Any, Any]]:
        """What plans keep, in their order; in as few jobs as sizes allow.

        Raises:
            RemoteError: the host refuses or fails, or gives something else.
        """
        replies: list[dict[Any, Any]] = []
        for part in self._parts(shipments):
            backend = _Sending(self.client, self._envoy, part)
            _trace(self._envoy, backend, [tuple(shipment) for shipment in part])
            found = backend.saved.get("results") if isinstance(backend.saved, dict) else None
            if (
                not isinstance(found, list)
                or len(found) != len(part)
                or not all(isinstance(reply, dict) for reply in found)
            ):
                raise RemoteError(f"host {self.client.host.url} gave no result for each plan")
            replies += found
        return replies

    def _parts(self, shipments: Sequence[Shipment]) -> Iterable[list[Shipment]]:
        part: list[Shipment] = []
        total = 0
        for shipment in shipments:
            size = self._size(shipment)
            if part and total + size > PER_JOB:
                yield part
                part, total = [], 0
            part.append(shipment)
            total += size
        if part:
            yield part

    def _size(self, shipment: Shipment) -> int:
        """Bytes that travel there and back, as far as can be foreseen."""
        sent = sum(_stored(value) for step in shipment.plan for value in step)
        if shipment.inputs is None:
            return sent
        kept = sum(step[0] in ("read", "tap") for step in shipment.plan)
        return sent + kept * int(shipment.inputs["input_ids"].numel()) * self._width


class _Ticket:
    """A pass that waits to be run, and its outcome."""

    def __init__(self, engine: RemoteEngine, wanted: Pass, plan: Plan) -> None:
        self.engine, self.wanted, self.plan = engine, wanted, plan
        self.outcome: Done | None = None
        self.error: BaseException | None = None
        self.cotangent: Tensor | None = None

    def done(self) -> Done:
        """The outcome; everything that waits is run if need be."""
        if self.outcome is None and self.error is None:
            self.engine.finish()
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome

    def forward(self) -> Shipment:
        """The pass; where it is differentiated, for its logits alone."""
        plan = self.plan
        if self.wanted.gradient_of is not None:
            plan = [step for step in plan if step[0] not in ("read", "tap")]
        return Shipment(self.wanted.inputs, plan)

    def take(self, reply: dict[Any, Any]) -> None:
        """Keep what the pass gave; find the gradient at its logits."""
        logits = reply.get("logits")
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise RemoteError("the host's result has no logits; it may not run what it is sent")
        self.outcome = Done(logits, _places(reply.get("read")), {})
        function = self.wanted.gradient_of
        if function is None or not torch.isfinite(logits).all():
            return
        try:
            with torch.enable_grad():
                last = logits[:, -1].detach().requires_grad_(True)
                total = function(last).sum()
            found = torch.autograd.grad(total, last, materialize_grads=True)
            self.cotangent = found[0]
        except Exception as error:  # noqa: BLE001  (raised where its pass is looked at)
            self.error = error

    def backward(self) -> Shipment:
        """The pass again, differentiated."""
        return Shipment(self.wanted.inputs, [*self.plan, ("pull", self.cotangent)], True)

    def take_gradients(self, reply: dict[Any, Any]) -> None:
        """Keep what the pass gave this time."""
        assert self.outcome is not None
        gradients = _places(reply.get("gradient"))
        self.outcome = Done(self.outcome.logits, _places(reply.get("read")), gradients)
        try:
            check_gradients(self.outcome.gradients)
        except Exception as error:  # noqa: BLE001  (as above)
            self.error = error


class _Sending(Backend):  # type: ignore[misc]  # untyped upstream
    """Sends a captured block away instead of executing it."""

    def __init__(self, client: Client, envoy: Any, shipments: list[Shipment]) -> None:
        self._client, self._env = client, envoy._remoteable_get_env()
        self._shipments = shipments
        self.saved: Any = None

    def __call__(self, tracer: Any) -> None:
        envelope = RequestModel(model_key=self._client.model_key, compress=True, env=self._env)
        blob = RequestModel.serialize(tracer, compress=True)
        digest = hashlib.sha256(f"{envelope.metadata()}\n{interpret.__code__.co_code!r}".encode())
        _digest(digest, [tuple(shipment) for shipment in self._shipments])
        what = f"{counted(len(self._shipments), 'plan')}, {len(blob) / 1e6:.1f} MB"
        self.saved = self._client.run(envelope.metadata(), blob, digest.hexdigest(), what)


def _trace(envoy: Any, backend: Backend, shipments: list[tuple[Any, ...]]) -> None:
    """The block that travels: it names these arguments, torch, nnsight and the interpreter."""
    with envoy.session(backend=backend):
        results = nnsight.save([])
        for inputs, plan, differentiate in shipments:
            if inputs is None:
                results.append(interpret(envoy, plan))
            else:
                with torch.set_grad_enabled(differentiate):
                    with envoy.trace(**inputs):
                        kept = interpret(envoy, plan)
                results.append(kept)


def _places(found: Any) -> dict[Place, Tensor]:
    """What was kept at places."""
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise RemoteError("the host's result has no values; it may not run what it is sent")
    return found


def _snapshot(plan: Plan) -> Plan:
    """A plan as it travels: plain containers, tensors as they are now and no larger than shown."""
    return [_step(step) for step in plan]


def _step(step: Step) -> Step:
    if step[0] == "unembed":
        # The weights are where the model is, perhaps not where the plan is interpreted.
        return ("pick", _packed(step[2]))
    return tuple(_packed(value) if isinstance(value, Tensor) else value for value in step)


def _packed(tensor: Tensor) -> Tensor:
    """A copy that stores nothing twice, and nothing that is not part of it."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor.detach()[once].to("cpu", copy=True).contiguous().expand(tensor.shape)


def _stored(value: Any) -> int:
    return int(value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0


def _digest(digest: Any, value: Any) -> None:
    """Add a plain value to a digest."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        _digest(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"({len(value)}".encode())
        for part in value:
            _digest(digest, part)
    else:
        digest.update(json.dumps(repr(value)).encode())
