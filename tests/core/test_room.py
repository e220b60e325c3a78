"""Room for weights: counted without reading them, and refused where there is too little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitlab import ResourceError, room

CPU = torch.device("cpu")


def test_weights_are_counted_by_headers(ids_model: Path, ids_module: Any, tmp_path: Path) -> None:
    """As many as the module has, each shared one once; of a file that is none, no guess is made."""
    assert room.stored_weights(ids_model) == sum(p.numel() for p in ids_module.parameters())
    assert room.stored_weights(tmp_path) == 0
    for raw in (b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]", b"\4\0\0\0\0\0\0\0null"):
        (tmp_path / "x.safetensors").write_bytes(raw)
        assert room.stored_weights(tmp_path) == 0


def test_free_memory_is_some_of_the_machines() -> None:
    """More than nothing, less than all; of a device that cannot say, nothing is said."""
    import os

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = room.free_memory(CPU)
    assert free is not None
    assert 0 < free < whole
    assert room.free_memory(torch.device("meta")) is None


def test_row_40_a_model_that_cannot_fit_is_refused(
    lab: Callable[..., Any], ids_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 5 before a weight is read, with what is needed and what there is; narrower it fits."""
    n = room.stored_weights(ids_model)
    monkeypatch.setattr(room, "free_memory", lambda device: 3 * n)
    done = lab("models", "check", ids_model)
    assert (done.code, done.out) == (5, "")
    assert f"in float32, and {'cpu'} has {room.shown(3 * n)} free" in done.err
    assert f"the weights of '{ids_model}' take {room.shown(4 * n)} in" in done.err
    room.check_room(ids_model, torch.bfloat16, CPU)
    with pytest.raises(ResourceError, match="float64"):
        room.check_room(ids_model, torch.float64, CPU)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (5 * 2**20, "5 MiB"), (3.25 * 2**30, "3.25 GiB")],
)
def test_bytes_for_people(n_bytes: float, text: str) -> None:
    """Binary units, three digits."""
    assert room.shown(n_bytes) == text
