"""Random dictionaries on small models, and plain passes to hold feature circuits against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from circuitlab_feature_interactions.edges import (
    EdgeTable,
)
from circuitlab_feature_interactions.sites import Pair, sites_of
from path_scores import padded_pairs
from torch import Tensor
from torch.nn import functional

from circuitlab import (
    Dictionary,
    Site,
    Tokens,
    TracedModel,
)

N = 24


def random_dictionary(width: int = 16, n: int = N, seed: int = 0, k: int | None = 6) -> Dictionary:
    """Random unit rows; it reconstructs badly, so that errors matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, width, generator=generator, dtype=torch.float64)
    rows = functional.normalize(rows, dim=1)
    bias = 0.1 * torch.randn(n + width, generator=generator, dtype=torch.float64)
    found = Dictionary(rows.T, bias[:n], rows, bias[n:], apply_b_dec_to_input=True, k=k)
    return found.requires_grad_(False)


def dictionaries(pairs: list[Pair], k: int | None = 6) -> dict[Site, Dictionary]:
    """A random one for each site of the pairs."""
    return {site: random_dictionary(seed=seed, k=k) for seed, site in enumerate(sites_of(pairs))}


def some_edges(n: int, seed: int = 0, error: bool = True) -> EdgeTable:
    """Edges between random latents; the last one comes out of the error."""
    generator = torch.Generator().manual_seed(seed)
    target, source = torch.randint(0, N, (2, n), generator=generator)
    source[-1] = N if error else source[-1]
    zeros = torch.zeros(n, dtype=torch.float64)
    return EdgeTable(target, source, zeros.long(), zeros, zeros, zeros, zeros, zeros, zeros)


@contextmanager
def stream_written(module: Any, layer: int, value: Tensor) -> Iterator[None]:
    """Inside, a block of a plain module reads another stream."""
    hook = module.transformer.h[layer].register_forward_pre_hook(
        lambda _, args, kwargs: ((value, *args[1:]), kwargs), with_kwargs=True
    )
    yield
    hook.remove()


def run_from(module: Any, pair: Pair, ids: Tensor, x: Tensor) -> Tensor:
    """The target site of one prompt whose source site is ``x``, ``[1, pos, d_model]``."""
    if pair.route == "mlp":
        block = module.transformer.h[pair.layer]
        result: Tensor = block.mlp(block.ln_2(x))
        return result
    kept: list[Tensor] = []
    block = module.transformer.h[pair.layer]
    hook = block.register_forward_hook(
        lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with stream_written(module, pair.layer, x):
        module(ids)
    hook.remove()
    return kept[0]


def prompts_of(model: TracedModel) -> tuple[Tokens, list[Tensor]]:
    """Padded prompts, and each alone."""
    tokens = padded_pairs(model).clean
    return tokens, [ids[mask][None] for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def unpadded(ids: Tensor) -> Tokens:
    """Prompts of one length."""
    return Tokens(ids, torch.ones_like(ids).bool())


def every_edge(pairs: list[Pair]) -> list[dict[int, frozenset[int]]]:
    """Each target latent with all source latents."""
    return [{target: frozenset(range(N)) for target in range(N)} for _ in pairs]
