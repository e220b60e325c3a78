"""Replies: what a host sends back, read without letting it run anything here."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
import zstandard
from torch import Tensor

from circuitlab.errors import RemoteError
from circuitlab.labels import excerpt

#: Bytes that a reply may unpack to.
LARGEST = 64 * 2**30

_PLAIN = (str, int, float, bool, type(None))


def read_result(content: bytes, *, compressed: bool) -> Any:
    """The values a job saved: tensors in plain containers.

    torch's own unpickler for untrusted files builds tensors and containers and calls nothing else;
    what it built is looked through again.

    Raises:
        RemoteError: the reply holds anything else, or is damaged.
    """
    try:
        if compressed:
            content = zstandard.ZstdDecompressor().decompress(
                content, max_output_size=_size(content)
            )
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (whatever a foreign file brings about)
        fact = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RemoteError(
            f"the host's result was refused: it is damaged, or wants to run code here ({fact}); "
            f"nothing of it was run"
        ) from None
    return plain(found)


def plain(value: Any) -> Any:
    """The value, if it is tensors in plain containers.

    Raises:
        RemoteError: it holds something else.
    """
    if isinstance(value, dict):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, tuple):
        return tuple(plain(part) for part in value)
    if type(value) is Tensor and value.device.type == "cpu":
        return value.detach()
    if type(value) in _PLAIN:
        return value
    raise RemoteError(
        f"the host's result was refused: it holds a {type(value).__name__}, and only tensors, "
        f"numbers and texts are taken"
    )


def read_status(content: bytes) -> dict[str, str]:
    """A job's status: its id, how it stands, what is said of it, and where its result is.

    Raises:
        RemoteError: the host said something else.
    """
    try:
        found = json.loads(content)
        parts = {name: found.get(name) for name in ("id", "status", "description", "data")}
    except (ValueError, AttributeError):
        raise RemoteError(
            f"the host's answer is no status of a job: '{excerpt(content.decode(errors='replace'))}"
            f"'; it may not speak NDIF's protocol"
        ) from None
    return {name: part for name, part in parts.items() if isinstance(part, str)}


def _size(content: bytes) -> int:
    """Bytes a compressed reply says it unpacks to.

    Raises:
        ValueError: it does not say, or it is too much.
    """
    size = zstandard.get_frame_parameters(content).content_size
    if not 0 <= size <= LARGEST:
        raise ValueError(f"it would unpack to {size} bytes")
    return int(size)
