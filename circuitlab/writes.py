"""Writes: what sources add to the residual stream, and what heads add when their z changes.

Where a norm stands behind the attention (Gemma 2, OLMo 2), what is added is the norm of the heads'
sum. A head then writes its share: its part of the sum, divided by the scale that the sum has in the
very run, times the gain. So heads still add up, and one head that changes moves the others' shares
too, by the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab.sites import Site

if TYPE_CHECKING:
    from circuitlab.model import TracedModel
    from circuitlab.run import Run
    from circuitlab.weights import Weights


def source_outputs(model: TracedModel, run: Run, less: Run | None = None) -> Tensor:
    """See :meth:`circuitlab.TracedModel.source_outputs`."""

    def value(site: Site) -> Tensor:
        return run[site] if less is None else run[site] - less[site]

    batch, pos = run.mask.shape
    dtype = torch.promote_types(model.dtype, torch.float32)
    if model.architecture.blocks_only:
        streams = torch.stack([value(site).to(dtype) for site in model.source_sites])
        added = torch.cat([streams[:1], streams.diff(dim=0)])
        return added * run.mask[None, :, :, None]
    outputs = torch.empty(
        len(model.wiring.sources), batch, pos, model.d_model, dtype=dtype, device=model.device
    )
    outputs[0] = value(Site("resid_pre", 0))
    for layer in range(model.n_layers):
        first, z = model.wiring.first_source(layer), Site("z", layer)
        heads = outputs[first : first + model.n_heads].view(model.n_heads, batch * pos, -1)
        if model.architecture.attention_post_norm:
            heads.copy_(_shares(model.weights, layer, run[z].to(dtype)))
            if less is not None:
                heads -= _shares(model.weights, layer, less[z].to(dtype))
        else:
            _by_head(model.weights, layer, value(z).to(dtype), out=heads)
        outputs[first + model.n_heads] = value(Site("mlp_out", layer))
    if not run.mask.all():
        outputs.mul_(run.mask[None, :, :, None])
    return outputs


def _by_head(weights: Weights, layer: int, z: Tensor, out: Tensor | None = None) -> Tensor:
    """``z @ W_O`` of each head, ``[n_heads, batch * pos, d_model]``."""
    weight = weights.heads(layer, "o").to(z.dtype)
    return torch.matmul(z.flatten(0, 1).transpose(0, 1), weight, out=out)


def _shares(weights: Weights, layer: int, z: Tensor) -> Tensor:
    """What each head is of the sum of all, as the norm behind the attention gives it."""
    return weights.shares(Site("attn_out", layer), _by_head(weights, layer, z))


class HeadWrites:
    """What heads add to the stream more than in a base run.

    Args:
        model: The traced model.
        base: A run that read every ``z``.
    """

    def __init__(self, model: TracedModel, base: Run) -> None:
        self._weights, self._base = model.weights, base
        self._normed = bool(model.architecture.attention_post_norm)

    def alone(self, layer: int, head: int, z_change: Tensor) -> Tensor:
        """Of one head whose z changes, ``[..., batch, pos, d_model]``.

        Args:
            layer: The layer.
            head: The head.
            z_change: ``[..., batch, pos, d_head]``; the positions may be the last ones alone.
        """
        weight, n_positions = self._weights.heads(layer, "o")[head], z_change.shape[-2]
        change = z_change @ weight
        if not self._normed:
            return change
        z = self._z(layer, n_positions)[:, :, head]
        own = z @ weight.to(z.dtype)
        rest = self._sum(layer, n_positions) - own
        return self._moved(layer, [own, rest], [change, torch.zeros_like(change)])[0]

    def answer(self, layer: int, change: Tensor) -> Tensor:
        """Of all heads when their sum changes by ``[..., batch, pos, d_model]``; same shape.

        The positions may be the last ones alone.
        """
        if not self._normed:
            return change
        return self._moved(layer, [self._sum(layer, change.shape[-2])], [change])[0]

    def groups(self, layer: int, z_change: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of groups of heads, each summed, ``[n, batch, pos, d_model]``, all heads having changed.

        Args:
            layer: The layer.
            z_change: ``[n, batch, pos, n_heads, d_head]``.
            groups: Heads, none of them twice.
        """
        weight = self._weights.heads(layer, "o")

        def summed(z: Tensor, heads: Sequence[int]) -> Tensor:
            chosen = list(heads)
            return z[..., chosen, :].flatten(-2) @ weight[chosen].flatten(0, 1).to(z.dtype)

        if not self._normed:
            return [summed(z_change, heads) for heads in groups]
        others = sorted({*range(len(weight))}.difference(*groups))
        parts = [*groups, *[others] * bool(others)]
        z = self._z(layer, z_change.shape[2])
        before, changes = ([summed(x, heads) for heads in parts] for x in (z, z_change))
        return self._moved(layer, before, changes)[: len(groups)]

    def _z(self, layer: int, n_positions: int) -> Tensor:
        """The base run's z at its last positions, at least float32."""
        z = self._base[Site("z", layer)][:, -n_positions:]
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def _sum(self, layer: int, n_positions: int) -> Tensor:
        """What all heads give together in the base run, at its last positions."""
        z = self._z(layer, n_positions).flatten(-2)
        return z @ self._weights.heads(layer, "o").flatten(0, 1).to(z.dtype)

    def _moved(self, layer: int, parts: list[Tensor], changes: list[Tensor]) -> list[Tensor]:
        """Change of the shares of the parts of one sum, in the type of the changes."""
        site = Site("attn_out", layer)
        after = [part + change for part, change in zip(parts, changes, strict=True)]
        first, second = (
            self._weights.shares(site, torch.stack(values)) for values in (parts, after)
        )
        return [(new - old).to(changes[0].dtype) for old, new in zip(first, second, strict=True)]
