"""Attributions: what active latents of one site do to those of the next, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import OptionError

if TYPE_CHECKING:
    from circuitlab import Dictionary


@dataclass(frozen=True, eq=False, slots=True)
class Attributions:
    """Input times gradient, ``R_ij = J_ij z_j``, of target latent i and source latent j.

    ``J`` is the Jacobian of target latents in source latents through decoder, model part and
    encoder. ``R`` is in the target latent's unit; positive: the source raises the target. Rescaling
    a source latent, its decoder row by the inverse, changes nothing; rescaling a target latent
    rescales its row, and its mean activation likewise. What is not active has 0.

    Attributes:
        values: The computed part of ``R``, ``[n, k_out, m]``, for ``n`` target tokens. Columns
            ``m`` are source latents: of the same token for an MLP, of every position of its prompt
            for a block. The identity skip of a block is not in it.
        target_index: Latents, ``[n, k_out]``.
        z_target: What they are where the Jacobian is taken, same shape; 0 is not active.
        source_index: Latents, ``[n, m]``; ``n_source`` stands for the error.
        z_source: What they are, same shape; 1 for the error.
        token: Number of each target token in ``x``, flattened, ``[n]``.
        scale: Weight of a token's sum over rows, ``[n]``: the mean over the ``n`` tokens of
            weighted sums estimates, without bias, the mean over all tokens of sums over all active
            target latents. 1 where nothing was sampled.
        rows_stand_for: How many active target latents each row stands for, ``[n]``, a factor of
            ``scale``; the other is how many tokens the token stands for.
        target_norm: Norm of each target latent's decoder row, ``[n, k_out]``: ``R`` times it is in
            the target stream's unit, and does not change when the target latent is rescaled.
        n_target: Latents of the target dictionary.
        n_source: Latents of the source dictionary.
        source_position: Position of each column, ``[n, m]``; None for an MLP.
        own: Columns at the target's own position, ``[n, k_in]``; None for an MLP.
        local: Share of ``values`` that comes through no attention, ``[n, k_out, k_in]``, for the
            columns ``own``: across a block through the MLP alone; between transcoders along the
            stream, from decoder row to encoder. None for an MLP, where that is all.
        skip: ``R`` of the identity skip of a block, likewise; not in ``values``. None elsewhere.
    """

    values: Tensor
    target_index: Tensor
    z_target: Tensor
    source_index: Tensor
    z_source: Tensor
    token: Tensor
    scale: Tensor
    rows_stand_for: Tensor
    target_norm: Tensor
    n_target: int
    n_source: int
    source_position: Tensor | None = None
    own: Tensor | None = None
    local: Tensor | None = None
    skip: Tensor | None = None

    def normalised(self, target_scale: Tensor) -> Tensor:
        """``values`` as shares of what each target latent is like, ``[n, k_out, m]``.

        Args:
            target_scale: Mean of each target latent where it is active, ``[n_target]``.
        """
        scale = target_scale.detach().to(self.values.dtype)
        return self.values / scale[self.target_index][..., None]


@dataclass(frozen=True, eq=False, slots=True)
class Latents:
    """Active latents at some tokens, and what the Jacobian sees of them.

    Attributes:
        index: ``[..., k]``.
        z: Same shape; 0 is not active.
    """

    index: Tensor
    z: Tensor

    @property
    def active(self) -> Tensor:
        """1 where active, 0 elsewhere, ``[..., k]``; without gradient."""
        return (self.z.detach() > 0).to(self.z.dtype)


def find_latents(dictionary: Dictionary, x: Tensor) -> Latents:
    """The active latents of ``x`` ``[..., d]``, differentiable in the dictionary and in ``x``."""
    return Latents(*dictionary.active(x))


def sample_rows(
    latents: Latents, rows: int | None, generator: torch.Generator | None
) -> tuple[Latents, Tensor]:
    """At most ``rows`` of the active latents of each token, drawn without replacement.

    Returns:
        The latents drawn, and how many active ones each of them stands for, ``[...]``.

    Raises:
        OptionError: ``rows`` is below 1.
    """
    n_active = latents.active.sum(-1)
    if rows is None or rows >= latents.index.shape[-1]:
        return latents, torch.ones_like(n_active)
    if rows < 1:
        raise OptionError(f"{rows} target latents per token are too few; give 1 or more")
    priority = torch.rand(latents.index.shape, generator=generator).to(latents.index.device)
    drawn = (priority + latents.active).topk(rows, -1).indices
    chosen = Latents(latents.index.gather(-1, drawn), latents.z.gather(-1, drawn))
    return chosen, n_active / n_active.clamp(max=rows).clamp(min=1)


def encoder_gain(dictionary: Dictionary, latents: Latents) -> Tensor:
    """Derivative of each latent in its ``x @ W_e``, ``[..., k]``; 0 where not active."""
    if dictionary.r_mag is None:
        return latents.active
    return latents.active * dictionary.r_mag.exp()[latents.index]


def decoder_norms(dictionary: Dictionary, latents: Latents) -> Tensor:
    """Norm of the decoder row of each latent, ``[..., k]``."""
    rows: Tensor = functional.embedding(latents.index, dictionary.W_d)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms


def gather_product(table: Tensor, index: Tensor, matrix: Tensor) -> Tensor:
    """``table[index] @ matrix``, each row that occurs multiplied once.

    Args:
        table: ``[n, d]``.
        index: ``[...]``.
        matrix: ``[d, m]``.

    Returns:
        ``[..., m]``.
    """
    if index.numel() >= 2 * len(table):
        return functional.embedding(index, table @ matrix)
    unique, where = torch.unique(index, return_inverse=True)
    return functional.embedding(where, functional.embedding(unique, table) @ matrix)


def check_dictionaries(
    source: Dictionary,
    target: Dictionary,
    d: int,
    dtype: torch.dtype,
    *,
    transcoders: bool = False,
) -> None:
    """Refuse dictionaries that do not fit a route.

    Raises:
        OptionError: a width, a type, or a transcoder in the place of an autoencoder or the other
            way round.
    """
    for name, dictionary in (("source", source), ("target", target)):
        if dictionary.transcoder and not transcoders:
            raise OptionError(
                f"the {name} dictionary is a transcoder, which writes another site than it reads; "
                f"give an autoencoder"
            )
        if transcoders and not dictionary.transcoder:
            raise OptionError(
                f"the {name} dictionary is an autoencoder, and between MLPs interact transcoders, "
                f"from what an MLP reads to what it writes; give one"
            )
        for verb, width in (("reads", dictionary.d_in), ("writes", dictionary.d_out)):
            if width != d:
                raise OptionError(
                    f"the {name} dictionary {verb} {width} numbers, and the model's streams have "
                    f"{d}; give one that was trained on this model"
                )
        if dictionary.W_e.dtype != dtype:
            raise OptionError(
                f"the {name} dictionary is {dictionary.W_e.dtype}, and the route {dtype}; make the "
                f"route with dtype={dictionary.W_e.dtype}"
            )
