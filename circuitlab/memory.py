"""Memory: how many pairs and patches one pass takes, so that it is neither too large nor slow."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from circuitlab.errors import OptionError

if TYPE_CHECKING:
    from circuitlab.model import TracedModel
    from circuitlab.prompts import EncodedTask

#: Bytes that one batch's sources and receivers may take, when the batch size is not given.
PAIRS = 256 * 2**20
#: Bytes that the residual streams of the patches run together may take, by type of device. On a CPU
#: what fits into its caches is fastest.
PATCHES = {"cpu": 3 * 2**20, "cuda": 512 * 2**20}
#: Batches of patches whose receivers answer in one pass.
TOGETHER = 8


def choose_batch_size(model: TracedModel, pairs: EncodedTask, asked: int | None = None) -> int:
    """Pairs per pass such that their sources and receiver gradients fit in :data:`PAIRS`.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        asked: A size that is taken as it is, where one is given.

    Raises:
        OptionError: the size asked for is below 1.
    """
    if asked is not None:
        if asked < 1:
            raise OptionError(f"batch size {asked} is too small; use 1 or more, or auto")
        return asked
    ends = len(model.wiring.sources) + len(model.wiring.receivers)
    width = torch.promote_types(model.dtype, torch.float32).itemsize
    per_pair = ends * pairs.clean.ids.shape[1] * model.d_model * width
    return max(1, min(len(pairs), PAIRS // max(1, per_pair)))


def patches_at_once(model: TracedModel, n_pairs: int, n_positions: int) -> int:
    """How many patches of so many pairs are best run together, as rows of one batch."""
    memory = PATCHES.get(model.device.type, PATCHES["cuda"])
    return max(1, memory // (n_pairs * n_positions * model.d_model * model.dtype.itemsize))


@cache
def keep_freed_memory() -> None:
    """Have glibc keep the memory of the passes for the next one: a tenth of the time on a CPU.

    It returns to the system what is freed beyond twice the largest block freed so far, of 32 MB at
    most (mallopt(3)), and every page that comes back must be cleared: so one such block is freed.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)
