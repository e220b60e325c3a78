"""Composition: how much of what one head writes another reads, from their weights alone.

Elhage et al. 2021, A Mathematical Framework for Transformer Circuits. With row vectors, a head
carries ``x @ W_OV`` and scores ``x_q @ W_QK @ x_k^T``. Head 2 reads head 1 through its query,
``‖W_OV1 W_QK2‖``, its key, ``‖W_OV1 W_QK2^T‖``, or its value, ``‖W_OV1 W_OV2‖``, each divided by
the norms of the two factors (Frobenius norms throughout).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from circuitlab import OptionError, track

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import HeadWeights, TracedModel

Port: TypeAlias = Literal["q", "k", "v"]
PORTS: tuple[Port, ...] = ("q", "k", "v")

#: A head is idle where its norm is at most this share of the largest: what is left is rounding.
IDLE = 1e-6
#: A factor whose ``d tr S² / (tr S)² - 1`` is at most this looks the same from everywhere.
_ROUND = 1e-4


@dataclass(frozen=True, slots=True)
class Compositions:
    """How all pairs of heads compose; head ``h`` of layer ``l`` is row ``l * n_heads + h``.

    Attributes:
        n_heads: Heads per layer.
        dimensions: Of the space that heads write to and read from: ``d_model``, one less where
            norms take the mean off, and less what was removed.
        raw: For each port ``[n, n]``, writers in rows, readers in columns: the norm of the product
            / the product of the norms, 0 to 1; float64, on the CPU. NaN where the reader is not in
            a later layer, or one of the two heads does nothing.
        z: How far the square of ``raw`` lies above chance, in standard deviations of chance. NaN
            where ``raw`` is, and where chance has no spread.
        ov_norms: ``‖W_OV‖`` of each head, ``[n]``.
        qk_norms: ``‖W_QK‖`` of each head, without the scale of its scores.
    """

    n_heads: int
    dimensions: int
    raw: Mapping[Port, Tensor]
    z: Mapping[Port, Tensor]
    ov_norms: Tensor
    qk_norms: Tensor

    def times_chance(self, port: Port) -> Tensor:
        """``raw`` / chance, ``[n, n]``; 1 is what unrelated heads have.

        Chance is ``1 / sqrt(dimensions)``: its square is the mean of that of ``raw`` when one of
        the two heads is turned by a random rotation.
        """
        return self.raw[port] * math.sqrt(self.dimensions)


@torch.no_grad()
def compositions(
    model: TracedModel,
    *,
    ports: Sequence[Port] = PORTS,
    offset: int = 0,
    directions: Tensor | None = None,
) -> Compositions:
    """Compositions of all pairs of heads, norms folded into the weights.

    Nothing of size ``d_model x d_model`` is made for a pair. With the triangular QR factors R of
    W_V1 and W_K2, ``‖W_OV1 W_QK2‖ = ‖R_V1 W_O1 W_Q2 R_K2^T‖``, and likewise for the others: one
    product for all pairs of two layers. Biases do not count: they do not depend on what is read
    through them.

    Args:
        model: Any traced model.
        ports: Through what heads read.
        offset: With rotary embeddings, how many tokens the query stands behind the key: W_QK is
            ``W_Q R_offset R_0^T W_K^T``. Without them it changes nothing.
        directions: Orthonormal rows ``[k, d_model]`` taken out of what heads write and read; where
            norms take the mean off, without a mean.

    Raises:
        OptionError: ``offset`` is negative.
        ModelError: a norm is neither a LayerNorm, an RMSNorm nor an identity.
    """
    if offset < 0:
        raise OptionError(f"offset {offset}: no query stands before its key; give 0 or more")
    removed = 0 if directions is None else len(directions)
    centred = model.weights.centres
    dimensions = model.d_model - centred - removed
    if dimensions < 2:
        raise OptionError(
            f"{removed} directions leave {dimensions} of the {model.d_model} dimensions of the "
            f"residual stream; remove fewer"
        )
    shape = (model.n_layers, model.n_heads, model.n_layers, model.n_heads)
    norms = {port: torch.zeros(shape, dtype=torch.float64) for port in ports}
    writers: list[Tensor] = []
    sizes: dict[str, list[Tensor]] = {name: [] for name in ("ov", "qk", "writer", *ports)}
    for layer in track(range(model.n_layers), "composing heads"):
        heads = model.weights.folded(layer, torch.promote_types(model.dtype, torch.float32))
        writer, readers = _factors(heads, _turn(model, offset, layer))
        sizes["ov"].append(_sizes(writer))
        sizes["qk"].append(_sizes(readers["q"].mT))
        left = {port: _without(readers[port].mT, directions) for port in ports}
        for port, reader in left.items():
            flat = reader.flatten(0, 1).T
            for earlier, other in enumerate(writers):
                norms[port][earlier, :, layer] = _norms(other, flat)
            sizes[port].append(_sizes(reader))
        writers.append(_without(writer, directions))
        sizes["writer"].append(_sizes(writers[-1]))
    flat_norms = {port: table.flatten(2).flatten(0, 1) for port, table in norms.items()}
    moments = {name: torch.cat(parts, 1) for name, parts in sizes.items()}
    return _scored(model.n_heads, dimensions, flat_norms, moments)


def _turn(model: TracedModel, offset: int, layer: int) -> Tensor | None:
    """What stands between W_Q and W_K^T, ``[d_head, d_head]``; None without rotary embeddings."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    turns = model.weights.rotations(torch.tensor([offset, 0], device=model.device), dtype, layer)
    return None if turns is None else turns[0] @ turns[1].T


def _factors(heads: HeadWeights, turn: Tensor | None) -> tuple[Tensor, dict[Port, Tensor]]:
    """Thin factors of one layer's heads with the norms of the whole.

    Returns:
        ``[n_heads, d_head, d_model]``, W_OV but for an orthogonal map from the left; and for each
        port ``[n_heads, d_model, d_head]``, what it reads but for one from the right.
    """
    q, k, v, o = (torch.linalg.qr(w, "r")[1] for w in (heads.q, heads.k, heads.v, heads.o.mT))
    query, key = (heads.q, heads.k) if turn is None else (heads.q @ turn, heads.k @ turn.T)
    return v @ heads.o, {"q": query @ k.mT, "k": key @ q.mT, "v": heads.v @ o.mT}


def _without(factors: Tensor, directions: Tensor | None) -> Tensor:
    """``[..., d_model]`` without what lies along the directions."""
    if directions is None:
        return factors
    along = directions.to(factors)
    return factors - factors @ along.T @ along


def _norms(writer: Tensor, reader: Tensor) -> Tensor:
    """Norms of products of ``[n_heads, d_head, d_model]`` and ``[d_model, n_heads * d_head]``."""
    n_heads, d_head, _ = writer.shape
    product = (writer.flatten(0, 1) @ reader).view(n_heads, d_head, n_heads, d_head)
    return product.square_().sum(-1).sum(1).sqrt().double().cpu()


def _sizes(factors: Tensor) -> Tensor:
    """Sums of the second and fourth powers of the singular values, ``[2, n_heads]``."""
    gram = factors @ factors.mT
    second, fourth = gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.square().sum((-2, -1))
    return torch.stack([second, fourth]).double().cpu()


def _scored(
    n_heads: int,
    dimensions: int,
    norms: Mapping[Port, Tensor],
    sizes: Mapping[str, Tensor],
) -> Compositions:
    """Norms of products ``[n, n]`` against the sizes of their factors, ``[2, n]`` each."""
    ov, qk = sizes["ov"][0].sqrt(), sizes["qk"][0].sqrt()
    layer = torch.arange(len(ov)) // n_heads
    later = layer[:, None] < layer
    writes = sizes["writer"][0].sqrt() > IDLE * ov.max()
    raw, z = {}, {}
    for port, product in norms.items():
        reads = sizes[port][0].sqrt() > IDLE * (ov if port == "v" else qk).max()
        scored = later & writes[:, None] & reads
        size = (sizes["writer"][0][:, None] * sizes[port][0]).sqrt()
        raw[port] = (product / size).masked_fill(~scored, torch.nan)
        spread = _chance_spread(dimensions, sizes["writer"], sizes[port])
        z[port] = (raw[port].square() - 1 / dimensions) / spread
    return Compositions(n_heads, dimensions, raw, z, ov, qk)


def _chance_spread(d: int, writers: Tensor, readers: Tensor) -> Tensor:
    """Standard deviation of ``‖A Q B‖² / (‖A‖² ‖B‖²)`` over random rotations Q, ``[n, n]``.

    With ``S = A^T A``, ``T = B B^T`` and ``X = Q T Q^T`` the score is ``tr(S X) / (tr S tr T)``. Of
    X, whose law no rotation changes, ``E[X_ij X_kl] = α δ_ij δ_kl + β (δ_ik δ_jl + δ_il δ_jk)``;
    ``tr X = tr T`` and ``tr X² = tr T²`` give ``α d² + 2 β d = (tr T)²`` and ``α d + β d (d + 1) =
    tr T²``. So ``E[(tr SX)²] = α (tr S)² + 2 β tr S²``, and the variance is
    ``2 (d s - 1)(d t - 1) / (d² (d - 1)(d + 2))`` with ``s = tr S² / (tr S)²``, likewise t. NaN
    where A or B is a multiple of a rotation, whose score is the same under every Q.
    """
    unequal = [d * fourth / second.square() - 1 for second, fourth in (writers, readers)]
    one, two = (torch.where(value > _ROUND, value, torch.nan) for value in unequal)
    return (2 * one[:, None] * two / (d**2 * (d - 1) * (d + 2))).sqrt()
