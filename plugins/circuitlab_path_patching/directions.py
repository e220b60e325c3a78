"""Directions: subspaces read from files, and their parts that readers see and do not see."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError

if TYPE_CHECKING:
    from torch import Tensor

#: Singular values of the readers below this share of the largest are taken for 0.
TOLERANCE = 1e-5
#: A part of a unit direction that is shorter than this is rounding.
SHORT = 1e-5


def read_tensor(
    path: Path, width: int, n_dims: Collection[int], needed: str, choices: str
) -> Tensor:
    """The only tensor of a file, ``[…, width]``, float64.

    Args:
        path: A safetensors file.
        width: Size of its last dimension.
        n_dims: How many dimensions it may have.
        needed: What was looked for, in words.
        choices: What may be given, in words.

    Raises:
        OptionError: the file cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = list(load_file(path).values())
    except (OSError, SafetensorError) as error:
        raise OptionError(
            f"direction {str(path)!r} cannot be read: {error}; give {choices}"
        ) from error
    shapes = [list(tensor.shape) for tensor in tensors]
    if len(shapes) != 1 or len(shapes[0]) not in n_dims or shapes[0][-1] != width:
        raise OptionError(f"direction {str(path)!r} holds tensors of shape {shapes}; {needed}")
    return tensors[0].double()


def read_subspace(path: Path, width: int, site: str) -> Tensor:
    """The space that the rows of a file's only tensor span, as orthonormal rows, float64.

    Raises:
        OptionError: the file cannot be read, or holds no directions of the site.
    """
    needed = f"site {site} needs one, [{width}] or [k, {width}]"
    choices = "mean-difference, pca, or a safetensors file"
    rows = read_tensor(path, width, (1, 2), needed, choices).view(-1, width)
    if not torch.isfinite(rows).all() or not rows.any():
        raise OptionError(
            f"direction {str(path)!r} holds NaN, infinity or only zeros; give finite numbers that "
            f"are not all 0"
        )
    return _spanned(rows, float(torch.linalg.matrix_norm(rows, 2)))


def row_space(readers: Iterable[Tensor]) -> Tensor:
    """What readers ``[width, n]`` see: an orthonormal basis, ``[width, n_seen]``, float64.

    Each is weighed by its own size. Directions whose singular value is below :data:`TOLERANCE`
    times the largest are not seen.
    """
    columns: list[Tensor] = []
    square: Tensor | None = None
    for reader in readers:
        columns.append(reader / (float(reader.norm()) or 1.0))
        if sum(part.shape[1] for part in columns) >= len(reader):
            # An unembedding is much wider than high: only its square is kept.
            joined = torch.cat(columns, 1)
            square = joined @ joined.T if square is None else square + joined @ joined.T
            columns = [joined[:, :0]]
    joined = torch.cat(columns, 1)
    directions: Tensor
    if square is None:
        directions, sizes, _ = torch.linalg.svd(joined, full_matrices=False)
    else:
        squares, directions = torch.linalg.eigh(square + joined @ joined.T)
        sizes = squares.clamp(min=0).sqrt()
    return directions[:, sizes > TOLERANCE * sizes.max()]


def split(basis: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a subspace inside and outside of what is seen, each as orthonormal rows.

    Args:
        basis: Orthonormal rows, ``[k, width]``.
        seen: Orthonormal columns, ``[width, n_seen]``.

    Returns:
        ``[k_visible, width]`` and ``[k_hidden, width]``: the spaces that the projections of the
        rows span.
    """
    inside = (basis @ seen) @ seen.T
    return _spanned(inside), _spanned(basis - inside)


def _spanned(rows: Tensor, size: float = 1.0) -> Tensor:
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    found: Tensor = directions[sizes > SHORT * size]
    return found
