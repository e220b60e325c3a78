"""MlpRoute: attributions from the stream as an MLP reads it to what the MLP writes.

The function of the latents is ``encode(MLP(norm(decode(z))))``. Only active latents have a
derivative, so the Jacobian is a small block per token, in closed form: Farnik et al. 2025
(arXiv:2502.18147), here with the norm, and with the gate of a gated MLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import OptionError
from circuitlab_feature_interactions.attributions import (
    Attributions,
    check_dictionaries,
    decoder_norms,
    encoder_gain,
    find_latents,
    gather_product,
    sample_rows,
)
from circuitlab_feature_interactions.blocks import Mlp

if TYPE_CHECKING:
    from circuitlab import Dictionary, TracedModel


class MlpRoute:
    """Through the MLP of one layer, token by token.

    Raises:
        SiteError: its hidden layer is not told by the architecture.
        ModelError: a norm of it is none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        self.mlp = Mlp(model, layer, dtype)
        self.dtype = dtype

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the MLP writes, ``[batch, pos, d]``, at streams of that shape."""
        return self.mlp.at(x).written

    def attributions(
        self,
        source: Dictionary,
        target: Dictionary,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rows: int | None = None,
        tokens: int | None = None,
        generator: torch.Generator | None = None,
        with_error: bool = False,
    ) -> Attributions:
        """The attributions at tokens; differentiable in both dictionaries' parameters.

        Args:
            source: Dictionary of what the MLP reads.
            target: Dictionary of what it writes.
            x: What it reads, ``[..., d]``.
            mask: True at real tokens, ``[...]``; None where all are.
            rows: Target latents per token, drawn among the active ones; None for all.
            tokens: Tokens, drawn at random; None for all.
            generator: For the draws.
            with_error: Keep what the source dictionary misses as one more source, the last column.
                The Jacobian is then taken at ``x``, else at its reconstruction.

        Raises:
            OptionError: dictionaries that do not fit, or fewer than 1 row or token.
        """
        check_dictionaries(source, target, len(self.mlp.w_in), self.dtype)
        token = draw_tokens(x.shape[:-1], mask, tokens, generator).to(x.device)
        x = x.to(self.dtype).flatten(0, -2)[token]
        latents = find_latents(source, x)
        index, z, error = latents.index, latents.z, None
        stream = source.decode_active(index, z)
        if with_error:
            stream, error = x, x - stream
        state = self.mlp.at(stream)
        every = find_latents(target, state.written)
        chosen, scale = sample_rows(every, rows, generator)

        back = self.mlp.at_hidden(state, target.W_e.T, chosen.index)
        back = state.at_maps(back * encoder_gain(target, chosen)[..., None])
        ahead = gather_product(source.W_d, index, self.mlp.w_in)
        directions = functional.embedding(index, source.W_d)
        if error is not None:
            ahead = torch.cat([ahead, (error @ self.mlp.w_in)[:, None]], 1)
            directions = torch.cat([directions, error[:, None]], 1)
            index = functional.pad(index, (0, 1), value=source.n)
            z = functional.pad(z, (0, 1), value=1.0)
        taken = self.mlp.norm.along(state.normal, directions)
        jacobian = back @ ahead.transpose(1, 2)
        jacobian = jacobian - (back @ state.hidden[..., None]) * taken[:, None]
        return Attributions(
            values=jacobian / state.scale[..., None] * z[:, None],
            target_index=chosen.index,
            z_target=chosen.z,
            source_index=index,
            z_source=z,
            token=token,
            scale=scale,
            rows_stand_for=scale,
            target_norm=decoder_norms(target, chosen),
            n_target=target.n,
            n_source=source.n,
        )


def draw_tokens(
    shape: torch.Size, mask: Tensor | None, tokens: int | None, generator: torch.Generator | None
) -> Tensor:
    """Numbers of real tokens, rising, ``[n]``: all, or some drawn at random."""
    if tokens is not None and tokens < 1:
        raise OptionError(f"{tokens} tokens are too few; give 1 or more")
    real = torch.arange(shape.numel()) if mask is None else mask.flatten().nonzero()[:, 0].cpu()
    if tokens is None or tokens >= len(real):
        return real
    drawn = torch.randperm(len(real), generator=generator)[:tokens]
    return real[drawn.sort().values]
