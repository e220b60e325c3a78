"""Room: how much memory weights will take, and whether there is as much, before they are read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch

from circuitlab.errors import ResourceError

#: A process may be held to less memory than the machine has.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def stored_weights(folder: Path) -> int:
    """Number of weights in a folder's safetensors files, by their headers; 0 if unreadable."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    return 0
                header = json.loads(file.read(length))
            total += sum(
                math.prod(entry["shape"]) for name, entry in header.items() if name[:2] != "__"
            )
        except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError):
            return 0
    return total


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    for limit, used in _LIMITS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return free


def check_room(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit.

    Args:
        folder: Where its safetensors files are.
        dtype: Type they are loaded in.
        device: Where they go.

    Raises:
        ResourceError: they need more than is free; says how much, and what helps.
    """
    needed, free = stored_weights(folder) * dtype.itemsize, free_memory(device)
    if free is not None and needed > free:
        raise ResourceError(
            f"the weights of {str(folder)!r} take {shown(needed)} in "
            f"{str(dtype).removeprefix('torch.')}, and {device} has {shown(free)} free: use a "
            f"narrower type (--dtype bfloat16), another device, or --remote"
        )


def shown(n_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} GiB"
