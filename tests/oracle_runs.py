"""Runs of small random models in both modes, on which the path oracles are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import path_oracles
import torch
from hooked_passes import random_neox
from path_oracles import Runs
from torch import Tensor

#: Some hundred thousand float64 sums, behind norms that amplify what is small.
TOLERANCE = 1e-10
#: GPT-NeoX takes its softmax in float32, whatever the type of the model.
FLOAT32_SOFTMAX = 1e-5
FAMILIES: dict[str, Callable[..., Any]] = {"gpt2": oracles.random_gpt2, "neox": random_neox}
MODES = ("noise", "denoise")
END = ("logits", "")


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupt ids, ``[3, 6]`` each, and their mask: two rows are padded on the left."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(1, 40, (2, 3, 6), generator=generator)
    mask = (torch.arange(6) >= torch.tensor([0, 2, 3])[:, None]).long()
    return clean, corrupt, mask


def runs_of(family: str, mode: str = "noise", **settings: Any) -> Runs:
    clean, corrupt, mask = prompts()
    module = FAMILIES[family](2, 2, 16, seed=1, **settings)
    return path_oracles.runs(module, clean, corrupt, mask, mode=mode)


def other_logits(run: Runs) -> Tensor:
    return plain_logits(run, run.other_ids)


def plain_logits(run: Runs, ids: Tensor | None = None) -> Tensor:
    """Last logits of the stock model without a hook."""
    rows = []
    for row, mask in zip(run.ids if ids is None else ids, run.mask, strict=True):
        # Without its padding, so that no mask of ours has a part in it.
        with torch.no_grad():
            rows.append(run.model.module(row[None, mask.bool()]).logits[:, -1])
    return torch.cat(rows)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def same(run: Runs, a: Tensor, b: Tensor) -> bool:
    return gap(a, b) < (FLOAT32_SOFTMAX if run.model.parallel else TOLERANCE)


def out_edges(run: Runs, source: str) -> list[oracles.Edge]:
    return [edge for edge in run.model.edges() if edge[0] == source]
