"""Memory: how many pairs and patches one pass takes, so that it is neither too large nor slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from circuitlab.errors import OptionError, ResourceError
from circuitlab.progress import tell
from circuitlab.room import free_memory, shown

if TYPE_CHECKING:
    from circuitlab.model import TracedModel
    from circuitlab.prompts import EncodedTask

Kind = Literal["pairs", "patches"]
Result = TypeVar("Result")

#: Bytes that one batch's sources and receivers may take, when the batch size is not given.
PAIRS = 256 * 2**20
#: Bytes that the residual streams of the patches run together may take, by type of device. On a CPU
#: what fits into its caches is fastest; of a host's, they travel.
PATCHES = {"cpu": 3 * 2**20, "cuda": 512 * 2**20, "remote": 32 * 2**20}
#: Runs whose gradients an attribution keeps at once.
KEPT_RUNS = 5
#: Bytes of a batch from which on it is told what it takes.
TOLD = 2**28
#: Batches of patches whose receivers answer in one pass.
TOGETHER = 8


@dataclass
class _Caps:
    """How much may run at once since memory ran out, and the most that was asked for since then."""

    most: dict[Kind, int] = field(default_factory=dict)
    asked: dict[Kind, int] = field(default_factory=dict)

    def halve(self) -> str:
        """Allow half of what was asked for; says so.

        Raises:
            ResourceError: it was one of each.
        """
        large = {kind: size for kind, size in self.asked.items() if size > 1}
        if not large:
            raise ResourceError(
                "out of memory with one pair and one patch at a time: use shorter prompts, a "
                "narrower type (--dtype bfloat16), another device, or --remote"
            )
        self.most |= {kind: size // 2 for kind, size in large.items()}
        self.asked.clear()
        told = ", ".join(f"{kind} {size} → {size // 2}" for kind, size in large.items())
        return f"out of memory: batches are halved, {told}"


_caps: ContextVar[_Caps | None] = ContextVar("circuitlab_caps", default=None)


def choose_batch_size(
    model: TracedModel, pairs: EncodedTask, asked: int | None = None, *, planned: bool = False
) -> int:
    """Pairs per pass such that their sources and receiver gradients fit in :data:`PAIRS`.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        asked: A size that is taken as it is, where one is given, as long as memory suffices.
        planned: Give the size of a run whose memory suffices, however this one fares: what is kept
            between runs is cut up by it.

    Raises:
        OptionError: the size asked for is below 1.
    """
    if planned:
        with as_planned():
            return choose_batch_size(model, pairs, asked)
    if asked is not None:
        if asked < 1:
            raise OptionError(f"batch size {asked} is too small; use 1 or more, or auto")
        return _capped("pairs", asked, len(pairs))
    if model.architecture.blocks_only:
        ends = 2 * model.n_layers
    else:
        ends = len(model.wiring.sources) + len(model.wiring.receivers)
    width = torch.promote_types(model.dtype, torch.float32).itemsize
    per_pair = ends * pairs.clean.ids.shape[1] * model.d_model * width
    return _capped("pairs", max(1, min(len(pairs), PAIRS // max(1, per_pair))), len(pairs))


def batch_memory(model: TracedModel, n_pairs: int, n_positions: int) -> int:
    """Bytes that attributing a batch takes beside the weights, within a factor of 2.

    Counted are what autograd keeps of one pass, what :data:`KEPT_RUNS` runs keep of queries, keys,
    values and their gradients, and the outputs of all sources and gradients of one layer's
    receivers.
    """
    a, width = model.architecture, torch.promote_types(model.dtype, torch.float32).itemsize
    inside, hidden = a.n_heads * a.d_head, a.d_mlp or 4 * a.d_model
    run = 8 * inside + 2 * a.d_model
    graph = 10 * inside + 6 * a.d_model + 3 * hidden + 3 * a.n_heads * n_positions
    ends = 2 * len(model.wiring.sources) + 6 * a.n_heads
    per_token = model.n_layers * (KEPT_RUNS * run + graph) + ends * a.d_model
    return n_pairs * width * (n_positions * per_token + 4 * model.vocab_size)


def foresee(model: TracedModel, pairs: EncodedTask, asked: int | None = None) -> str:
    """What scoring edges on the pairs takes, for people; empty where that is little, or a host's.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        asked: Pairs per batch, where a number is given.

    Raises:
        ResourceError: the outputs of all sources on one pair alone take more than is free.
        OptionError: the size asked for is below 1.
    """
    size = min(choose_batch_size(model, pairs, asked), len(pairs))
    if model.remote or model.architecture.blocks_only:
        return ""
    n_positions, free = pairs.clean.ids.shape[1], free_memory(model.device)
    width = torch.promote_types(model.dtype, torch.float32).itemsize
    least = len(model.wiring.sources) * n_positions * model.d_model * width
    if free is not None and least > free:
        raise ResourceError(
            f"what the {len(model.wiring.sources):,} components write on one pair of {n_positions} "
            f"tokens takes {shown(least)}, and {model.device} has {shown(free)} free: use shorter "
            f"prompts, another device, or --remote"
        )
    needed = batch_memory(model, size, n_positions)
    if needed < TOLD:
        return ""
    weights = model.n_parameters * model.dtype.itemsize
    of = "" if free is None else f" of {shown(free)} free"
    return (
        f"batches of {size} pairs of {n_positions} tokens take about {shown(needed)}{of}, beside "
        f"{shown(weights)} of weights"
    )


def patches_at_once(model: TracedModel, n_pairs: int, n_positions: int) -> int:
    """How many patches of so many pairs are best run together, as rows of one batch."""
    kind = "remote" if model.remote else model.device.type
    memory = PATCHES.get(kind, PATCHES["cuda"])
    each = n_pairs * n_positions * model.d_model * model.dtype.itemsize
    return _capped("patches", max(1, memory // each))


def patches_together(at_once: int) -> int:
    """Patches whose receivers answer in one pass, of so many run together after it."""
    caps = _caps.get()
    return at_once if caps is not None and caps.most else TOGETHER * at_once


def _capped(kind: Kind, size: int, n: int | None = None) -> int:
    """The size, or what is allowed of it; there are only ``n`` to run."""
    caps = _caps.get()
    if caps is None:
        return size
    allowed = min(size, caps.most.get(kind, size))
    needed = allowed if n is None else min(allowed, n)
    caps.asked[kind] = max(needed, caps.asked.get(kind, 1))
    return allowed


@contextmanager
def as_planned() -> Iterator[None]:
    """Sizes chosen inside are those of a run whose memory suffices."""
    token = _caps.set(None)
    try:
        yield
    finally:
        _caps.reset(token)


def fitting(work: Callable[[], Result]) -> Result:
    """What ``work`` returns; where memory runs out, it is done again with batches half as large.

    What its checkpoints have kept is not done again. Sums over batches of another size may differ
    in their last bits.

    Raises:
        ResourceError: memory runs out with one pair and one patch at a time.
    """
    caps = _Caps()
    token = _caps.set(caps)
    try:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                try:
                    tell([caps.halve()])
                except ResourceError as refusal:
                    raise refusal from error
            # Behind the block that holds the error, and by it the tensors of what failed.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        _caps.reset(token)


@cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of the passes for the next one: a tenth of the time on a CPU.

    It returns to the system what is freed beyond twice the largest block freed so far, of 32 MB at
    most (mallopt(3)), and every page that comes back must be cleared: so one such block is freed.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)
