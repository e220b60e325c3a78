"""BlockRoute: attributions across a whole block, from residual stream to residual stream.

Source latents are pushed forward to the heads' inputs, target latents pulled back to the heads'
outputs, and the two meet at the attention's own Jacobian: nothing of the size of a stream is made
for a pair of positions and latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import OptionError
from circuitlab_feature_interactions.attributions import (
    Attributions,
    Latents,
    check_dictionaries,
    decoder_norms,
    encoder_gain,
    find_latents,
    gather_product,
    sample_rows,
)
from circuitlab_feature_interactions.blocks import (
    Attention,
    AttentionState,
    Block,
    MlpState,
    rotate,
)

if TYPE_CHECKING:
    from circuitlab import Dictionary, TracedModel

#: Target tokens that are drawn in one prompt, when tokens are drawn.
_PER_PROMPT = 16


@dataclass(frozen=True, eq=False, slots=True)
class Targets:
    """Target tokens: as many slots in each of some prompts.

    Attributes:
        prompts: Numbers of the prompts, ``[batch]``.
        position: ``[batch, slots]``.
        real: False where a prompt has fewer real tokens than slots, ``[batch, slots]``.
        scale: How many real tokens each one stands for, over the mean of that, ``[batch, slots]``.
    """

    prompts: Tensor
    position: Tensor
    real: Tensor
    scale: Tensor

    def at(self, x: Tensor) -> Tensor:
        """The entries of ``[batch, pos, ...]`` at the target tokens, ``[batch, slots, ...]``."""
        return x[torch.arange(len(x), device=x.device)[:, None], self.position]


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """Source directions at each position: decoder rows of active latents, and perhaps the error.

    Attributes:
        index: ``[batch, pos, k]``.
        z: Same shape.
        directions: ``[batch, pos, k, d]``.
        ports: What they add to the heads' queries, keys and values, ``[batch, pos, k, 3 d_z]``.
    """

    index: Tensor
    z: Tensor
    directions: Tensor
    ports: Tensor


class BlockRoute:
    """Through the attention and the MLP of one block, and past them.

    Raises:
        SiteError: its MLP's hidden layer is not told by the architecture.
        ModelError: its norms are none that can be folded.
    """

    def __init__(self, model: TracedModel, layer: int, dtype: torch.dtype) -> None:
        self.block = Block(model, layer, dtype)
        self.dtype = dtype

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """The stream after the block, ``[batch, pos, d]``, at streams of that shape."""
        return self.block(x, mask)

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
            source: Dictionary of the stream before the block.
            target: Dictionary of the stream after it.
            x: The stream before it at whole prompts, ``[batch, pos, d]``.
            mask: True at real tokens, ``[batch, pos]``; None where all are. Padding is on the left.
            rows: Target latents per token, drawn among the active ones; None for all.
            tokens: Target tokens, about; None for all. Prompts are drawn, then tokens in each of
                them; sources are at every position.
            generator: For the draws.
            with_error: Keep what the source dictionary misses as one more source at each position.
                The Jacobian is then taken at ``x``, else at its reconstruction.

        Raises:
            OptionError: dictionaries that do not fit, shapes, or fewer than 1 row or token.
        """
        check_dictionaries(source, target, len(self.block.attention.weight), self.dtype)
        mask = mask_of(x, mask)
        targets = draw_targets(mask, tokens, generator)
        x, mask = x.to(self.dtype)[targets.prompts], mask[targets.prompts]
        latents = find_latents(source, x)
        stream, error = source.decode_active(latents.index, latents.z), None
        if with_error:
            stream, error = x, x - stream
        stream = readable(stream, mask)
        sources = find_sources(source, latents, error, mask, self.block.attention.weight)
        attention = self.block.attention.at(stream, mask)
        after = stream + attention.written
        mlp = self.block.mlp.at(targets.at(stream if self.block.parallel else after))
        out = targets.at(after) + mlp.written
        chosen, scale = sample_rows(find_latents(target, out), rows, generator)

        encoders = functional.embedding(chosen.index, target.W_e.T)
        encoders = encoders * encoder_gain(target, chosen)[..., None]
        by_mlp = self._through_mlp(target, chosen, mlp)
        reading = encoders if self.block.parallel else encoders + by_mlp
        ahead, query = through_attention(self.block.attention, attention, sources, targets, reading)
        own = targets.at(sources.directions).transpose(-1, -2)
        parts = (ahead, query + by_mlp @ own, by_mlp @ own, encoders @ own)
        return collect(parts, sources, targets, chosen, scale, mask, (target, source))

    def _through_mlp(self, target: Dictionary, chosen: Latents, mlp: MlpState) -> Tensor:
        """Gradient of target latents at what the MLP reads, ``[batch, slots, k_out, d]``."""
        part = self.block.mlp
        back = part.at_hidden(mlp, target.W_e.T, chosen.index)
        back = mlp.at_maps(back * encoder_gain(target, chosen)[..., None])
        return part.norm.pull_back(mlp.normal, mlp.scale, back @ part.w_in_back)


def mask_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mask ``[batch, pos]`` of whole prompts ``[batch, pos, d]``; None: all tokens are real.

    Raises:
        OptionError: these are no whole prompts.
    """
    mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    if x.ndim != 3 or mask.shape != x.shape[:2]:
        raise OptionError(
            f"streams of shape {list(x.shape)} with a mask of {list(mask.shape)} are no whole "
            f"prompts; give [batch, pos, d] and [batch, pos]"
        )
    return mask


def readable(stream: Tensor, mask: Tensor) -> Tensor:
    """Streams with something in the place of padding that a norm can read; nothing reads it on."""
    anything = torch.linspace(-1, 1, stream.shape[-1]).to(stream)
    return torch.where(mask[..., None], stream, anything)


def find_sources(
    source: Dictionary, latents: Latents, error: Tensor | None, mask: Tensor, weight: Tensor
) -> Sources:
    """The directions of latents ``[batch, pos, k]``, and of an error ``[batch, pos, d]`` if given.

    Args:
        source: Dictionary of the latents.
        latents: Those active.
        error: One more source at each position.
        mask: ``[batch, pos]``.
        weight: To queries, keys and values, ``[d, 3 d_z]``.
    """
    index, z = latents.index, latents.z * mask[..., None]
    ports = gather_product(source.W_d, index, weight)
    directions = functional.embedding(index, source.W_d)
    if error is not None:
        ports = torch.cat([ports, (error @ weight)[..., None, :]], -2)
        directions = torch.cat([directions, error[..., None, :]], -2)
        index = functional.pad(index, (0, 1), value=source.n)
        z = torch.cat([z, mask[..., None].to(z.dtype)], -1)
    return Sources(index, z, directions, ports)


def through_attention(
    part: Attention, state: AttentionState, sources: Sources, targets: Targets, reading: Tensor
) -> tuple[Tensor, Tensor]:
    """Jacobian of target latents in source latents through the attention.

    Args:
        part: The attention.
        state: The same at some streams.
        sources: The source directions.
        targets: The target tokens.
        reading: Gradient of target latents at the stream behind the attention,
            ``[batch, slots, k_out, d]``.

    Returns:
        Through keys and values ``[batch, slots, k_out, pos, k]``; and through the queries of
        the target's own position, ``[batch, slots, k_out, k]``.
    """
    reading = part.behind.pull_back(state.behind.picked(targets.at), reading)
    gradient = part.by_head(reading @ part.output.T)
    pattern = targets.at(state.pattern.transpose(1, 2))  # [batch, slots, n_heads, pos]
    z, q = targets.at(state.z), targets.at(state.q)
    felt = targets.at(state.felt.transpose(1, 2))
    # How far each key's q · k moves the target: A (v_j - z) . g, times the score's derivative
    moved = torch.einsum("bpha,btrha->btrhp", state.v, gradient)
    moved = moved - (z[:, :, None] * gradient).sum(-1)[..., None]
    moved = moved * felt[:, :, None]
    queries, keys, values = _read_by_heads(part, state, sources)
    # What a source adds to a score is the same for all rows of a token.
    scores = torch.einsum("btha,bpkha->bthpk", q, keys)
    ahead = torch.einsum("btrhp,bthpk->btrpk", moved, scores)
    by_head = torch.einsum("btrha,bpkha->bhtrpk", gradient, values)
    ahead = ahead + (by_head * pattern.transpose(1, 2)[:, :, :, None, :, None]).sum(1)
    at_queries = torch.einsum("btrhp,bpha->btrha", moved, state.k)
    return ahead, torch.einsum("btrha,btkha->btrk", at_queries, targets.at(queries))


def _read_by_heads(
    part: Attention, state: AttentionState, sources: Sources
) -> tuple[Tensor, Tensor, Tensor]:
    """What sources add to queries, keys and values, ``[batch, pos, k, n_heads, d_head]`` each.

    The norm takes out of a direction what points along the stream, and a norm behind what points
    along the query or key.
    """
    taken = part.norm.along(state.normal, sources.directions)[..., None]
    added = (sources.ports - taken * state.ports[..., None, :]) / state.scale[..., None]
    queries, keys, values = added.chunk(3, -1)
    queries = part.q_norm.push(state.queries, queries)
    keys = part.k_norm.push(state.keys, keys)
    queries, keys, values = (part.by_head(one) for one in (queries, keys, values))
    return rotate(queries, state.turn), rotate(keys, state.turn), values


def draw_targets(mask: Tensor, tokens: int | None, generator: torch.Generator | None) -> Targets:
    """Target tokens of prompts with a mask ``[batch, pos]``: all real ones, or some.

    Raises:
        OptionError: ``tokens`` is below 1, or nothing is real.
    """
    if tokens is not None and tokens < 1:
        raise OptionError(f"{tokens} target tokens are too few; give 1 or more")
    kept = mask.any(1).nonzero()[:, 0].cpu()
    if not len(kept):
        raise OptionError("no token of these prompts is real; give a mask that is True somewhere")
    n_all, slots = len(kept), int(mask.sum(1).max())
    if tokens is not None and tokens < int(mask.sum()):
        slots = min(slots, _PER_PROMPT, tokens)
        n_prompts = min(n_all, -(-tokens // slots))
        kept = kept[torch.randperm(n_all, generator=generator)[:n_prompts].sort().values]
    real = mask[kept.to(mask.device)].cpu()
    priority = torch.rand(real.shape, generator=generator) + real
    position = priority.topk(slots, -1).indices.sort(-1).values
    there = real.gather(1, position)
    stands = (real.sum(1, keepdim=True) / there.sum(1, keepdim=True)).double() * there
    share = n_all / len(kept) * int(there.sum()) / int(mask.sum())
    moved = (t.to(mask.device) for t in (kept, position, there, stands * share))
    return Targets(*moved)


def collect(
    parts: tuple[Tensor, Tensor, Tensor, Tensor | None],
    sources: Sources,
    targets: Targets,
    chosen: Latents,
    scale: Tensor,
    mask: Tensor,
    dictionaries: tuple[Dictionary, Dictionary],
) -> Attributions:
    """The Jacobian's parts as attributions, one row for each real target token.

    Args:
        parts: Ahead of all positions ``[batch, slots, k_out, pos, k]``, and at the target's own
            ``[batch, slots, k_out, k]``: computed beside that; of what is computed, the share
            through no attention; skip.
        sources: The source directions.
        targets: The target tokens.
        chosen: The target latents.
        scale: How many each stands for, ``[batch, slots]``.
        mask: ``[batch, pos]``.
        dictionaries: Target and source.
    """
    ahead, beside, local, skip = parts
    batch, n_positions, k = sources.index.shape
    here = functional.one_hot(targets.position, n_positions).to(ahead.dtype)
    full = ahead + beside[..., None, :] * here[:, :, None, :, None]
    positions = torch.arange(n_positions, device=mask.device)
    columns = torch.arange(n_positions * k, device=mask.device).view(n_positions, k)
    real, width = targets.real, n_positions * k

    def rows(x: Tensor) -> Tensor:
        """What each prompt has, ``[batch, m]``, for each of its target tokens."""
        return x[:, None].expand(-1, real.shape[1], -1)[real]

    z, z_own = sources.z.flatten(1), targets.at(sources.z)
    number = targets.prompts[:, None] * n_positions + targets.position
    return Attributions(
        values=(full.flatten(-2) * z[:, None, None])[real],
        target_index=chosen.index[real],
        z_target=chosen.z[real],
        source_index=rows(sources.index.flatten(1)),
        z_source=rows(z),
        token=number[real],
        scale=(scale * targets.scale.to(scale.dtype))[real],
        rows_stand_for=scale[real],
        target_norm=decoder_norms(dictionaries[0], chosen)[real],
        n_target=dictionaries[0].n,
        n_source=dictionaries[1].n,
        source_position=rows(positions[:, None].expand(-1, k).reshape(1, width).expand(batch, -1)),
        own=columns[targets.position][real],
        local=(local * z_own[:, :, None])[real],
        skip=None if skip is None else (skip * z_own[:, :, None])[real],
    )
