"""Receivers: gradients at what each reader of the residual stream reads, as it alone reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from circuitlab.attending import Attention
from circuitlab.errors import ModelError
from circuitlab.norms import Readers, pull_back, read_norm
from circuitlab.sites import Site
from circuitlab.wiring import PORTS

if TYPE_CHECKING:
    from circuitlab.architectures import Architecture
    from circuitlab.run import Run
    from circuitlab.weights import Weights
    from circuitlab.wiring import ReceiverBlock

#: How far z of a run may be from z by the description, as a share of the largest: in roundings of
#: the model's type, or of float32, in which most models take their softmax.
ROUNDINGS = 256
#: And never more than this.
LARGEST = 0.25


class Receivers:
    """Carries a run's gradients back to the receivers' own readings of the residual stream.

    At q, k and v of heads that have them to themselves the run has the gradient. Where heads share
    keys and values, or one norm takes the queries or keys of all heads, a site's gradient is that
    of several heads at once. There z has the gradient of each head, and it is carried back through
    the attention with queries, keys and values of every head's own.
    """

    def __init__(self, architecture: Architecture, weights: Weights, attention: Attention) -> None:
        self._architecture, self._weights, self._attention = architecture, weights, attention

    @cached_property
    def together(self) -> bool:
        """Whether heads share keys and values, or a norm of queries or keys."""
        a = self._architecture
        return a.n_heads_of("k") != a.n_heads or any(self._attention.joint(0, p) for p in PORTS)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where a run must be differentiated."""
        n_layers = self._architecture.n_layers
        kinds = (*PORTS, *["z"] * self.together, "mlp_in")
        sites = [Site(kind, layer) for layer in range(n_layers) for kind in kinds]
        return (*sites, Site("resid_post", n_layers - 1))

    def gradients(
        self, runs: Sequence[Run], dtype: torch.dtype
    ) -> Iterator[tuple[ReceiverBlock, Tensor]]:
        """Mean over the runs, one block of receivers at a time: see ``TracedModel``."""
        a = self._architecture
        last = Site("resid_post", a.n_layers - 1)
        for block in a.wiring.blocks():
            if block.kind == "attention":
                yield block, self._attention_gradients(runs, block.layer, dtype)
                continue
            site = last if block.kind == "logits" else Site("mlp_in", block.layer)
            total = runs[0].gradient(site).to(dtype)
            for run in runs[1:]:
                total = total + run.gradient(site)
            yield block, (total / len(runs))[None]

    def _attention_gradients(self, runs: Sequence[Run], layer: int, dtype: torch.dtype) -> Tensor:
        """``[3 * n_heads, batch, pos, d_model]`` of the q, k and v ports of a layer."""
        shape = (-1, *runs[0].mask.shape, self._architecture.d_model)
        if self.together:
            parts = [self._apart(run, layer, dtype) for run in runs]
            return (torch.stack(parts).sum(0) / len(runs)).view(shape)
        heads = [Site(port, layer) for port in PORTS]

        def gathered(kept: Callable[[Run, Site], Tensor]) -> Tensor:
            """``[runs, 3 * n_heads, tokens, d_head]`` of all ports."""
            ports = [torch.cat([kept(run, site) for site in heads], 2) for run in runs]
            return torch.stack(ports).to(dtype).flatten(1, 2).transpose(1, 2)

        gradients = gathered(lambda run, site: run.gradient(site))
        values = gathered(lambda run, site: run[site])
        streams = torch.stack([run[Site("resid_pre", layer)] for run in runs]).to(dtype)
        readers = self._weights.readers(layer, dtype)
        return pull_back(readers, streams.flatten(1, 2), values, gradients).view(shape)

    # --- heads that share -------------------------------------------------------------------------

    def _apart(self, run: Run, layer: int, dtype: torch.dtype) -> Tensor:
        """``[3 * n_heads, tokens, d_model]`` of one run."""
        n_heads = self._architecture.n_heads
        values = [run[Site(port, layer)].to(dtype) for port in PORTS]
        gradients = self._at_ports(run, layer, values)
        stream = run[Site("resid_pre", layer)].to(dtype).flatten(0, 1)
        readers = self._weights.readers(layer, dtype)
        carried = []
        for number, port in enumerate(PORTS):
            rows = slice(number * n_heads, (number + 1) * n_heads)
            own = Readers(readers.norm, readers.weight[rows], readers.at_shift[rows])
            value, gradient = (x[number].flatten(0, 1) for x in (values, gradients))
            norm = self._attention.norm(layer, port)
            if norm is not None and self._attention.joint(layer, port):
                carried.append(_behind_joint_norm(own, norm, stream, value, gradient))
            else:
                carried.append(_pulled(own, stream, _for_each(value, n_heads), gradient))
        return torch.cat(carried)

    def _at_ports(self, run: Run, layer: int, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients at each head's own q, k and v, ``[batch, pos, n_heads, d_head]`` each.

        Behind the norm of all heads where there is one, else before that of each.

        Raises:
            ModelError: the layer attends otherwise than its description says.
        """
        attention, z = self._attention, Site("z", layer)
        leaves, behind = [], []
        with torch.enable_grad():
            for port, value in zip(PORTS, values, strict=True):
                joint = attention.joint(layer, port)
                known = attention.normed(layer, port, value) if joint else value
                leaf = _for_each(known, self._architecture.n_heads).detach().requires_grad_(True)
                leaves.append(leaf)
                behind.append(leaf if joint else attention.normed(layer, port, leaf))
            made = attention.z(layer, run.tokens, *behind)
        self._check(run, layer, made.detach())
        return torch.autograd.grad(made, leaves, run.gradient(z).to(made.dtype))

    def _check(self, run: Run, layer: int, made: Tensor) -> None:
        """Refuse a description that does not give the z of the run."""
        real = run[Site("z", layer)]
        eps = max(torch.finfo(t).eps for t in (real.dtype, torch.float32))
        known = real[run.mask].to(made.dtype)
        off = float((made[run.mask] - known).abs().max() / known.abs().max().clamp(min=1e-30))
        if not off <= min(ROUNDINGS * eps, LARGEST):
            raise ModelError(
                f"layer {layer} attends otherwise than the architecture of "
                f"{self._architecture.family} says: off by {off:.2g}; its heads share keys, values "
                f"or a norm, so gradients of single heads cannot be told; path-patching patches "
                f"their edges one by one"
            )


def _for_each(value: Tensor, n_heads: int) -> Tensor:
    """What heads share, ``[..., n_own, d_head]``, as each has it: ``[..., n_heads, d_head]``."""
    return value.repeat_interleave(n_heads // value.shape[-2], -2)


def _pulled(readers: Readers, stream: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """:func:`pull_back` of one run, ``[readers, tokens, d_model]``.

    Args:
        readers: Who reads.
        stream: ``[tokens, d_model]``.
        value: What they read, ``[tokens, readers, d_head]``.
        gradient: Gradient there.
    """
    return pull_back(
        readers, stream[None], value.transpose(0, 1)[None], gradient.transpose(0, 1)[None]
    )


def _behind_joint_norm(
    readers: Readers, norm: nn.Module, stream: Tensor, value: Tensor, gradient: Tensor
) -> Tensor:
    """:func:`_pulled` where a norm of all heads side by side stands behind the projection.

    With ``n`` the normed projections without gain, ``s`` their scale and ``G = g gain / s``, where
    a head has ``g`` in its own columns and 0 elsewhere, the gradient at the projections is
    ``G - n mean(n G)``, its mean taken off where the norm does so. The first term lies in the
    head's own columns; of the second, ``n`` is carried back once for all heads.

    Args:
        readers: The heads.
        norm: The norm behind their projections.
        stream: ``[tokens, d_model]``.
        value: The projections, ``[tokens, n_own, d_head]``.
        gradient: Gradient behind the norm, ``[tokens, n_heads, d_head]``.
    """
    n_heads, group = len(readers.weight), len(readers.weight) // value.shape[1]
    whole = Readers(
        readers.norm,
        readers.weight[::group].transpose(0, 1).flatten(1)[None],
        readers.at_shift[::group].flatten()[None],
    )
    flat = value.flatten(1)
    known = read_norm(norm, flat.shape[1])
    scale = known.scale(norm, flat)
    normal = (flat - flat.mean(1, keepdim=True) if known.centred else flat) / scale
    gain = _for_each(known.gain.to(flat).view(value.shape[1:]), n_heads)
    direct = gradient * gain / scale[..., None]
    along = (direct * _for_each(normal.view_as(value), n_heads)).sum(-1) / flat.shape[1]
    weight, at_shift, own = readers.weight, readers.at_shift, _for_each(value, n_heads)
    if known.centred:
        weight = weight - weight.mean((0, 2), keepdim=True)
        at_shift, own = at_shift - at_shift.mean(), own - own.mean((1, 2), keepdim=True)
    found = _pulled(Readers(readers.norm, weight, at_shift), stream, own, direct)
    shared = _pulled(whole, stream, flat[:, None], normal[:, None])
    return found - along.T[..., None] * shared
