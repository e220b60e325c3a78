"""Directions of matched length, and the centres that they start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, TaskError
from circuitlab_activation_plateaus.pushes.families import (
    FAMILIES,
    NEGLIGIBLE,
    Pool,
    gaussian,
    whole,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from circuitlab import Site, Tokens, TracedModel

#: Ends the name of a family whose directions are made perpendicular to the base.
PERPENDICULAR = "-perp"
#: What a direction may start from; see :func:`centres`.
CENTRES = ("real", "gaussian", "dictionary-bag", "dictionary-structured")

#: Prompts that one pass reads.
_BATCH = 256


def directions(name: str, pool: Pool, base: Tensor, generator: Generator) -> Tensor:
    """A direction of length 1 for each base, drawn afresh for each.

    Families, each also with ``-perp`` at the end of its name, which takes its component along the
    base away. What is left cannot shrink or stretch the base, as ``target - base`` mostly does.

    * ``iso``: uniform on the sphere.
    * ``cov``: normal with the covariance of real activations; ``cov-mixture``: the difference of
      two normal activations (Lee & Heimersheim 2024, arXiv:2410.12555), the same distribution.
    * ``real-mixture``: the difference of two real activations; ``towards-real``: from the base to
      a real activation.
    * ``pca``: one of the first ten principal components.
    * ``dictionary``: a row of the decoder; ``dictionary-error``: reconstruction less base.
    * ``mean-difference``: corrupt less clean prompts of the task.
    * ``weight-svd``: a singular direction of what reads the site next.

    The code beside Lee & Heimersheim 2024 draws one normal vector for a whole batch; here no two
    rows share a draw.

    Args:
        name: Of the family.
        pool: What is drawn from.
        base: Where each direction starts, ``[n_rows, d]``.
        generator: On the CPU; the same one gives the same directions on every device.

    Returns:
        ``[n_rows, d]``, in the type of ``base``.

    Raises:
        OptionError: the family is unknown or lacks what it needs, or a direction would be 0.
        SiteError: the dictionary belongs to another site.
    """
    family = name.removesuffix(PERPENDICULAR)
    if family not in FAMILIES:
        raise OptionError(
            f"direction family {name!r} is unknown; use {', '.join(FAMILIES)}, or one of them with "
            f"{PERPENDICULAR} at its end"
        )
    drawn = _normed(FAMILIES[family](pool, base, generator))
    if name == family:
        return drawn
    drawn = perpendicular(drawn, base)
    along = drawn.norm(dim=-1) <= NEGLIGIBLE
    if bool(along.any()):
        raise OptionError(
            f"direction {name!r} of row {int(along.nonzero()[0]) + 1} lies along its base, nothing "
            f"of it is perpendicular; leave the family out"
        )
    return _normed(drawn)


def perpendicular(vectors: Tensor, base: Tensor) -> Tensor:
    """Vectors ``[n_rows, d]`` less their component along their base ``[n_rows, d]``."""
    square = base.square().sum(-1, keepdim=True)
    for _ in range(2):  # The second time takes away what the first one rounded.
        along = (vectors * base).sum(-1, keepdim=True)
        vectors = vectors - along / torch.where(square > 0, square, 1.0) * base
    return vectors


def centres(kind: str, pool: Pool, real: Tensor, generator: Generator) -> Tensor:
    """Activations that directions start from, ``[n_rows, d]``, drawn afresh for each row.

    Args:
        kind: One of

            * ``real``: the real ones as they are;
            * ``gaussian``: normal, with mean and covariance of real activations (Heimersheim &
              Mendel 2024);
            * ``dictionary-bag``: as many latents as a real activation has, any of those alive,
              each writing as long a vector as one of the real ones; a bag without structure;
            * ``dictionary-structured``: the latents that are active together on a real activation,
              each with a value that it has somewhere.

            The last two are controls like those of Giglemiani et al. 2024 (arXiv:2409.15019): both
            keep the number of active latents; only the second keeps which of them occur together,
            and so their cosines.
        pool: What is drawn from.
        real: The real activation of each row, ``[n_rows, d]``.
        generator: On the CPU.

    Raises:
        OptionError: the kind is unknown, or lacks what it needs.
        SiteError: the dictionary belongs to another site.
    """
    if kind == "real":
        return real
    if kind == "gaussian":
        return pool.normal.sample(len(real), generator).to(real)
    if kind == "dictionary-bag":
        return _bag(pool, len(real), generator).to(real)
    if kind == "dictionary-structured":
        return _structured(pool, len(real), generator).to(real)
    raise OptionError(f"centre {kind!r} is unknown; use {', '.join(CENTRES)}")


@torch.no_grad()
def _bag(pool: Pool, n: int, generator: Generator) -> Tensor:
    """Activations made of any live latents, as many and as long as those of real ones."""
    dictionary, alive = pool.autoencoder, pool.alive
    rows = _rows(pool, n, generator)
    indices, values = (part[rows] for part in pool.active)
    lengths = values * dictionary.W_d[indices].norm(dim=-1)
    # A row's latents all differ: the first of a random order of those alive. There are as many
    # columns as the fullest activation has latents; a latent that writes nothing is not alive.
    order = gaussian((n, len(alive)), generator, lengths).argsort(-1)[:, : lengths.shape[1]]
    lengths = lengths.sort(-1, descending=True).values[:, : order.shape[1]]
    units = _normed(dictionary.W_d[alive[order]])
    written: Tensor = (lengths[..., None] * units).sum(1) + dictionary.b_d
    return written


@torch.no_grad()
def _structured(pool: Pool, n: int, generator: Generator) -> Tensor:
    """Activations made of latents that are active together, with values from elsewhere."""
    indices, values = pool.active
    latents, order = indices[values > 0].sort(stable=True)
    known = values[values > 0][order]
    rows = _rows(pool, n, generator)
    indices, values = indices[rows], values[rows]
    first = torch.searchsorted(latents, indices)
    count = torch.searchsorted(latents, indices, right=True) - first
    share = torch.rand(indices.shape, generator=generator, dtype=torch.float64).to(first.device)
    chosen = first + (share * count).long().clamp(max=count - 1)
    drawn = torch.where(values > 0, known[chosen.clamp(0, len(known) - 1)], 0.0)
    return pool.autoencoder.decode_active(indices, drawn)


def _rows(pool: Pool, n: int, generator: Generator) -> Tensor:
    """``n`` activations on which some latent is active."""
    some = (pool.active[1] > 0).any(-1).nonzero()[:, 0].cpu()
    if not len(some):
        raise OptionError(
            "no latent of the dictionary is active on these activations; it belongs to other ones"
        )
    return some[whole(len(some), n, generator)].to(pool.activations.device)


@torch.no_grad()
def stream_activations(model: TracedModel, prompts: Sequence[Tokens], site: Site) -> Tensor:
    """What a model holds at a site over all positions of some prompts, each prefix once.

    The first position of each prompt is left out: it is the same for all prompts with a
    beginning-of-sequence token, and its activation is often tens of times as long as others.

    Args:
        model: Any traced model.
        prompts: Any number of batches.
        site: A whole site of the width of the stream.

    Returns:
        ``[n, d]``, at least float32.

    Raises:
        TaskError: no prompt has a second token.
    """
    seen: set[tuple[int, ...]] = set()
    found = []
    for tokens in (part for batch in prompts for part in _parts(batch)):
        values = model.run(tokens, read=[site], logits="none")[site]
        chosen = torch.zeros_like(tokens.mask)
        for row, (ids, mask) in enumerate(zip(tokens.ids, tokens.mask, strict=True)):
            known, places = tuple(ids[mask].tolist()), mask.nonzero()[:, 0].tolist()
            for length, place in enumerate(places[1:], 2):
                if known[:length] not in seen:
                    seen.add(known[:length])
                    chosen[row, place] = True
        found.append(values[chosen].to(torch.promote_types(model.dtype, torch.float32)))
    if not seen:
        raise TaskError("no prompt has a second token to take activations from; give longer ones")
    return torch.cat(found)


def _parts(tokens: Tokens) -> list[Tokens]:
    starts = range(0, len(tokens), _BATCH)
    return [tokens.rows(slice(start, start + _BATCH)) for start in starts]


def _normed(vectors: Tensor) -> Tensor:
    units: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return units
