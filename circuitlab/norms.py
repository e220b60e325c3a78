"""Norms: what one does as a formula, and gradients of head projections carried back through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from circuitlab.errors import ModelError


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm as a formula: ``gain * (x - mean) / scale + shift``, read off by trying it.

    Attributes:
        gain: ``[d_model]``, float64.
        shift: ``[d_model]``, float64.
        centred: Whether the mean is taken off, as LayerNorm does and RMSNorm does not.
        scaled: Whether the stream is divided by its size; False for an identity.
        epsilon: What is added to the mean square, of which ``scale`` is the root; 0 for an
            identity.
    """

    gain: Tensor
    shift: Tensor
    centred: bool
    scaled: bool
    epsilon: float = 0.0

    def fold(self, weight: Tensor) -> Tensor:
        """A map ``[..., d_model, n]`` of what the norm gives, as one of ``x / scale``."""
        folded = weight * self.gain.to(weight.dtype)[:, None]
        return folded - folded.mean(-2, keepdim=True) if self.centred else folded

    def scale(self, module: nn.Module, stream: Tensor) -> Tensor:
        """What the norm divides by at each position, ``[..., 1]``, in the type of the stream."""
        if not self.scaled:
            return torch.ones_like(stream[..., :1])
        # Nothing tells the scale of a stream of zeros; a tiny one has the same.
        tiny = torch.linspace(-_TINY, _TINY, stream.shape[-1]).to(stream)
        plain = stream - stream.mean(-1, keepdim=True) if self.centred else stream
        nothing = (plain == 0).all(-1, keepdim=True)
        plain = torch.where(nothing, tiny, plain)
        given = in_type(module, stream.dtype)(torch.where(nothing, tiny, stream))
        plain, given = plain * self.gain.to(stream.dtype), given - self.shift.to(stream.dtype)
        return (plain * plain).sum(-1, keepdim=True) / (plain * given).sum(-1, keepdim=True)


@torch.no_grad()
def shares(module: nn.Module, parts: Tensor) -> Tensor:
    """What each part is of the norm of their sum: divided by the sum's scale, times the gain.

    A norm's shift and what a bias adds to the sum belong to no part: without both, the shares sum
    to what the norm gives.

    Args:
        module: A LayerNorm, an RMSNorm or an identity.
        parts: ``[parts, ..., d_model]``, changed in place.

    Raises:
        ModelError: it is another kind of norm.
    """
    norm = read_norm(module, parts.shape[-1])
    scale = norm.scale(module, parts.sum(0))
    if norm.centred:
        parts -= parts.mean(-1, keepdim=True)
    return parts.mul_(norm.gain.to(parts)).div_(scale)


#: Rows made float64 at once.
_ROWS = 8192
#: A vector is an outlier when the logarithm of its norm lies so many deviations from the median.
OUTLIER = 4.0
#: Deviations are at least this: vectors whose norms differ by a few per cent are all alike.
_LEAST_DEVIATION = 0.05

#: How far a norm may be from its formula, as a share of the largest output: some norms compute in
#: float32 whatever they are given.
_TRIED = 1e-5
#: Inputs so large that the small number a norm adds to the variance is nothing; and so small that
#: nothing else is left.
_LARGE, _TINY = 1e4, 1e-9


@torch.no_grad()
def read_norm(module: nn.Module, width: int) -> Norm:
    """What a norm does, found by trying it on a few inputs; no class has to be known.

    Raises:
        ModelError: it is neither a LayerNorm, an RMSNorm nor an identity.
    """
    parameters = [tensor.detach().double() for tensor in module.state_dict().values()]
    device = next((tensor.device for tensor in parameters), torch.device("cpu"))
    norm = in_type(module, torch.float64)
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(8, width, dtype=torch.float64, generator=generator) * _LARGE
    tried = tried.to(device)
    shift = norm(torch.zeros_like(tried[0]))
    given = norm(tried) - shift

    def same(found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).abs().max() <= _TRIED * expected.abs().max())

    scaled = not same(norm(2 * tried) - shift, 2 * given)
    centred = scaled and same(norm(tried + _LARGE) - shift, given)
    plain = tried - tried.mean(-1, keepdim=True) if centred else tried
    if scaled:
        plain = plain / plain.square().mean(-1, keepdim=True).sqrt()
    # Of the inputs, the one that is largest in each coordinate tells its gain best.
    best = plain.abs().argmax(0, keepdim=True)
    gain = _exact((given.gather(0, best) / plain.gather(0, best))[0], parameters)
    if not same(gain * plain, given):
        raise ModelError(
            f"norm of class {type(module).__name__} is neither a LayerNorm, an RMSNorm nor an "
            f"identity, so it cannot be folded into the weights that read it"
        )
    found = Norm(gain, shift, centred, scaled)
    at_nothing = float(found.scale(module, torch.zeros_like(tried[:1])))
    return replace(found, epsilon=at_nothing**2 if scaled else 0.0)


def in_type(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The norm with parameters of another type."""
    state = {name: tensor.detach().to(dtype) for name, tensor in module.state_dict().items()}

    def norm(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, state, x)  # type: ignore[no-any-return]

    return norm


def _exact(gain: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gain without the rounding of trying: a parameter, one more than it, or ones."""
    ones = torch.ones_like(gain)
    for known in (
        ones,
        *(p + more for p in parameters for more in (0, 1) if p.shape == gain.shape),
    ):
        if torch.allclose(known, gain, rtol=_TRIED, atol=_TRIED * float(gain.abs().max())):
            return known
    return gain


@dataclass(frozen=True, slots=True)
class Readers:
    """Heads that read one residual stream through a norm and a projection of their own.

    Attributes:
        norm: Maps each position on its own.
        weight: The projections, ``[readers, d_model, d_head]``.
        at_shift: What the projections give where the norm gives its bias alone,
            ``[readers, d_head]``.
    """

    norm: nn.Module
    weight: Tensor
    at_shift: Tensor


def pull_back(readers: Readers, streams: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
    """The gradient at the stream of each reader's own reading of it, mean over runs.

    The norm is differentiated, not frozen: its scale depends on the stream. LayerNorm and RMSNorm
    have a closed form that costs one product for all runs; any other norm goes through autograd.

    Args:
        readers: Who reads.
        streams: What the norm reads, ``[runs, tokens, d_model]``.
        values: What the projections gave, ``[runs, readers, tokens, d_head]``.
        gradients: Gradient there, same shape.

    Returns:
        ``[readers, tokens, d_model]``.
    """
    back = readers.weight.transpose(-1, -2)
    norm = readers.norm
    if isinstance(norm, nn.Identity):
        return gradients.mean(0) @ back
    if type(norm) is nn.LayerNorm and norm.normalized_shape == streams.shape[-1:]:
        variance, mean = torch.var_mean(streams, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + norm.eps)
        weight = readers.weight
        if norm.weight is not None:
            weight = weight * norm.weight.detach().to(weight.dtype)[:, None]
        weight = weight - weight.mean(1, keepdim=True)
        return _closed_form(readers, weight, (streams - mean) * scale, scale, values, gradients)
    if (known := _root_mean_square(norm, streams.shape[-1])) is not None:
        scale = 1 / known.scale(norm, streams)
        weight = known.fold(readers.weight)
        return _closed_form(readers, weight, streams * scale, scale, values, gradients)
    total = torch.zeros(len(back), *streams.shape[1:], dtype=streams.dtype, device=streams.device)
    for stream, gradient in zip(streams, gradients, strict=True):
        with torch.enable_grad():
            at = stream.detach().expand(total.shape).clone().requires_grad_(True)
            total += torch.autograd.grad(norm(at), at, gradient @ back)[0]
    return total / len(streams)


def _root_mean_square(module: nn.Module, width: int) -> Norm | None:
    """The norm as a formula if it divides by the stream's size and does no more."""
    try:
        known = read_norm(module, width)
    except ModelError:
        return None
    plain = known.scaled and not known.centred and not known.shift.any()
    return known if plain else None


def _closed_form(
    readers: Readers,
    weight: Tensor,
    normal: Tensor,
    scale: Tensor,
    values: Tensor,
    gradients: Tensor,
) -> Tensor:
    """LayerNorm's and RMSNorm's closed form, for all runs at once.

    With ``n`` the normalised stream, ``s`` what it was multiplied by and ``G = g (weight W)^T``,
    centred where the norm centres, one run gives ``s (G - n mean(n G))``. The first term is linear
    in ``g``, so runs are summed before the product. In the second, ``n . G = g . (n weight W)``,
    and that is the projection's own value less what it gives at the shift: nothing of size d_model
    is made per reader and run.

    Args:
        readers: Who reads.
        weight: Their projections with the norm's gain, centred where it centres.
        normal: ``n``, ``[runs, tokens, d_model]``.
        scale: ``s``, ``[runs, tokens, 1]``.
        values: What the projections gave, ``[runs, readers, tokens, d_head]``.
        gradients: Gradient there, same shape.
    """
    n_runs, _, d_model = normal.shape
    scaled = gradients * (scale / n_runs)[:, None]
    along = (scaled * (values - readers.at_shift[:, None])).sum(-1) / d_model
    result = scaled.sum(0) @ weight.transpose(-1, -2)
    # [tokens, readers, runs] @ [tokens, runs, d_model], laid out by token
    result -= torch.bmm(along.permute(2, 1, 0), normal.transpose(0, 1)).transpose(0, 1)
    return result


def norm_outliers(vectors: Tensor) -> Tensor:
    """Which vectors are unlike the others in size, as unused tokens' are: bool ``[n]``.

    The logarithm of the norm is more than :data:`OUTLIER` deviations from the median, where a
    deviation is 1.4826 times the median absolute one, as of a normal distribution. Vectors of norm
    0 have no direction and are outliers too.

    Args:
        vectors: ``[n, width]``.
    """
    parts = [vectors[i : i + _ROWS].double() for i in range(0, len(vectors), _ROWS)]
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=-1) for rows in parts])
    if not bool((norms > 0).any()):
        return norms == 0
    sizes = norms.log()
    middle = sizes[norms > 0].median()
    distance = (sizes - middle).abs()
    deviation = 1.4826 * distance[norms > 0].median().clamp(min=_LEAST_DEVIATION / 1.4826)
    return distance > OUTLIER * deviation
