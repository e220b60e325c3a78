"""Attenuation of virtual heads: how much of each later stream is what a component wrote.

What a component writes stays in the residual stream as it is; the stream around it grows, and norms
divide by its size. So what a later layer sees of an early write shrinks with the depth between
them, and a head that would read it ("virtual heads", Elhage et al. 2021, "A Mathematical Framework
for Transformer Circuits") has less to read (Heimersheim & Turner 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Self

import torch

from circuitlab import NumericsError
from circuitlab_attention_heads.growth import visible

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, TracedModel


@dataclass(frozen=True)
class Attenuation:
    """Sums over tokens of what each component's write o is in each later stream r, float64.

    Sources are ``wiring.sources``. Readers are the attention of each layer, at its ``resid_pre``,
    and the logits.

    Attributes:
        sizes: Of ``|o| / |r|``, ``[n_sources, n_layers + 1]``; NaN where the reader is not later.
        projections: Of ``o · r / |r|²``, the same shape: the signed share of the stream that the
            write makes up. Over all sources and biases they sum to 1 for each token.
        n_tokens: Number of tokens, ``[1]``.
        logs: Of ``log |o|`` over tokens where it is above 0, ``[n_sources]``.
        n_written: Number of these tokens, ``[n_sources]``.
    """

    sizes: Tensor
    projections: Tensor
    n_tokens: Tensor
    logs: Tensor
    n_written: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The sums over several batches."""
        names = [field.name for field in fields(cls)]
        return cls(*(reduce(torch.add, [getattr(part, name) for part in parts]) for name in names))

    def size(self) -> Tensor:
        """Mean ``|o| / |r|`` over tokens, ``[n_sources, n_layers + 1]``."""
        return self.sizes / self.n_tokens

    def projection(self) -> Tensor:
        """Mean ``o · r / |r|²`` over tokens, ``[n_sources, n_layers + 1]``."""
        return self.projections / self.n_tokens

    def write_norms(self) -> list[float | None]:
        """Geometric mean of ``|o|`` over tokens at which it is above 0; None where it never is."""
        counts = self.n_written.tolist()
        means = (self.logs / self.n_written.clamp(min=1)).exp().tolist()
        return [mean if count else None for mean, count in zip(means, counts, strict=True)]


def readers(n_layers: int) -> list[str]:
    """Names of the readers, in the order of an attenuation's columns."""
    return [*(f"layer {layer}" for layer in range(n_layers)), "logits"]


def attenuation(
    model: TracedModel, outputs: Tensor, streams: Tensor, *, centred: bool
) -> Attenuation:
    """Sums over tokens of some prompts.

    Args:
        model: The model.
        outputs: What each source writes, ``[n_sources, n_tokens, d_model]``.
        streams: What each reader reads, ``[n_layers + 1, n_tokens, d_model]``, as norms see it;
            nowhere 0.
        centred: See ``Weights.centres``.
    """
    written = visible(outputs, centred=centred)
    size, length = written.norm(dim=-1), streams.norm(dim=-1)
    sizes = torch.einsum("st,rt->sr", size, 1 / length)
    projections = torch.einsum("std,rtd->sr", written, streams / length[..., None].square())
    for layer in range(model.n_layers):
        later = model.wiring.first_source(layer)
        sizes[later:, layer] = projections[later:, layer] = torch.nan
    some = size > 0
    return Attenuation(
        sizes.cpu(),
        projections.cpu(),
        torch.tensor([written.shape[1]]),
        torch.where(some, size, 1.0).log().sum(-1).cpu(),
        some.sum(-1).cpu(),
    )


def final_shares(
    model: TracedModel, batch: EncodedTask, outputs: Tensor, stream: Tensor, *, centred: bool
) -> Tensor:
    """Signed share of the last residual stream that is each source's, and that is biases'.

    The share is ``o · r / |r|²`` at the last position; all of them sum to 1.

    Args:
        model: The model.
        batch: The pairs, for messages.
        outputs: What each source writes there, ``[n_sources, batch, d_model]``.
        stream: What the final norm reads there, ``[batch, d_model]``, as norms see it.
        centred: See ``Weights.centres``.

    Returns:
        ``[n_sources + 1, batch]``, float64; the last row is that of the attentions' output biases.

    Raises:
        NumericsError: a stream is 0 and has no shares.
    """
    length = stream.square().sum(-1)
    if bool((length == 0).any()):
        number = batch.numbers[int((length == 0).nonzero()[0])]
        raise NumericsError(
            f"task {batch.task.name!r}, pair {number}: the last residual stream of the clean "
            f"prompt is 0, so there are no shares of it; leave the pair out"
        )
    biases = [model.weights.attention_bias(layer).double() for layer in range(model.n_layers)]
    bias = torch.stack(biases).sum(0).expand_as(stream)
    written = visible(torch.cat([outputs.double(), bias[None]]), centred=centred)
    return ((written * stream).sum(-1) / length).cpu()
