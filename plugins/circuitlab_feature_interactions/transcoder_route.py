"""TranscoderRoute: attributions from what one MLP's transcoder writes to what the next one's reads.

What a latent writes goes into the residual stream. From there it reaches the target's encoder along
the stream itself, decoder row times encoder column, and through the attention of the layer between.
Both are computed: a transcoder's latent does not persist in the stream, its MLP made it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab_feature_interactions.attributions import (
    Attributions,
    check_dictionaries,
    encoder_gain,
    find_latents,
    sample_rows,
)
from circuitlab_feature_interactions.block_route import (
    collect,
    draw_targets,
    find_sources,
    mask_of,
    readable,
    through_attention,
)
from circuitlab_feature_interactions.blocks import Attention, Mlp

if TYPE_CHECKING:
    from circuitlab import Dictionary, TracedModel


class TranscoderRoute:
    """From the MLP of one layer to that of the next.

    Sites are those before the MLPs' norms, so that encoders read the stream as it is. Where a
    block's attention and MLP read the same stream, no attention lies between.

    Raises:
        SiteError: the first MLP's hidden layer is not told by the architecture.
        ModelError: a norm is none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        self.parallel = model.architecture.parallel
        self.mlp = Mlp(model, layer, dtype)
        # Beside the first MLP, or before the second.
        self.attention = Attention(model, layer if self.parallel else layer + 1, dtype)
        self.dtype = dtype

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the second MLP reads, ``[batch, pos, d]``, where the first reads ``x``."""
        written = self.mlp.at(x).written
        at = x if self.parallel else x + written
        return x + written + self.attention.at(at, mask).written

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
            source: Transcoder of the first MLP.
            target: Transcoder of the second.
            x: What the first reads at whole prompts, ``[batch, pos, d]``; the stream goes on with
                it.
            mask: True at real tokens, ``[batch, pos]``; None where all are. Padding is on the left.
            rows: Target latents per token, drawn among the active ones; None for all.
            tokens: Target tokens, about; None for all. Prompts are drawn, then tokens in each of
                them; sources are at every position.
            generator: For the draws.
            with_error: Keep what the source transcoder misses of the MLP's output as one more
                source at each position. The Jacobian is then taken at that output, else at what the
                transcoder gives in its place.

        Raises:
            OptionError: dictionaries that do not fit, shapes, or fewer than 1 row or token.
        """
        weight = self.attention.weight
        check_dictionaries(source, target, len(weight), self.dtype, transcoders=True)
        mask = mask_of(x, mask)
        targets = draw_targets(mask, tokens, generator)
        mask = mask[targets.prompts]
        x = readable(x.to(self.dtype)[targets.prompts], mask)
        latents = find_latents(source, x)
        written, error = source.decode_active(latents.index, latents.z, x), None
        if with_error:
            output = self.mlp.at(x).written
            written, error = output, output - written
        stream = x + written
        sources = find_sources(source, latents, error, mask, weight)
        attention = self.attention.at(x if self.parallel else stream, mask)
        read = targets.at(stream + attention.written)
        chosen, scale = sample_rows(find_latents(target, read), rows, generator)

        encoders = functional.embedding(chosen.index, target.W_e.T)
        encoders = encoders * encoder_gain(target, chosen)[..., None]
        direct = encoders @ targets.at(sources.directions).transpose(-1, -2)
        if self.parallel:
            ahead = direct.new_zeros(*direct.shape[:3], *sources.z.shape[1:])
            parts = (ahead, direct, direct, None)
        else:
            ahead, query = through_attention(self.attention, attention, sources, targets, encoders)
            parts = (ahead, query + direct, direct, None)
        return collect(parts, sources, targets, chosen, scale, mask, (target, source))
