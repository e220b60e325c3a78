"""What a dictionary is trained for at one site: how it begins, and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import Dictionary, ModelError, Site
from circuitlab_feature_interactions.settings import TrainSettings

#: Threshold of ``jumprelu`` at the beginning, and width of its estimator's window, in units of the
#: size of a latent when all of a token's variance is in ``k`` of them.
THRESHOLD, BANDWIDTH = 0.3, 0.3


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and spread of a site's values, measured before the training.

    Attributes:
        mean: ``[width]``.
        spread: Mean squared distance from the mean.
    """

    mean: Tensor
    spread: float

    @classmethod
    def of(cls, values: Tensor, site: Site) -> Moments:
        """Moments of ``[n, width]``.

        Raises:
            ModelError: the values do not vary.
        """
        mean = values.double().mean(0)
        spread = float((values.double() - mean).square().sum(1).mean())
        rounding = torch.finfo(values.dtype).eps ** 2 * float(mean.square().sum())
        if spread <= 16 * rounding:
            raise ModelError(
                f"activations at {site} are the same at every token; there is nothing to learn, "
                f"name other sites or other data"
            )
        return cls(mean.to(values.dtype), spread)

    @property
    def unit(self) -> float:
        """Standard deviation of one of the numbers: what biases are measured in."""
        return float((self.spread / len(self.mean)) ** 0.5)

    def latent(self, k: int) -> float:
        """Size of a latent when the spread is in ``k`` of them."""
        return float((self.spread / k) ** 0.5)


@dataclass(frozen=True, eq=False)
class SiteLoss:
    """The loss of one dictionary on a batch.

    Attributes:
        total: What is minimised, a scalar.
        missed: Mean squared error over the spread, as a number: 1 - centred R².
        l0: Active latents per token.
        z: Latents, ``[n, n_latents]``, without gradient.
        error: What the reconstruction misses, ``[n, width]``, without gradient.
    """

    total: Tensor
    missed: float
    l0: float
    z: Tensor
    error: Tensor


def begin_dictionary(
    settings: TrainSettings, moments: Moments, generator: torch.Generator
) -> Dictionary:
    """A dictionary of random directions: encoder the decoder's transpose, ``b_d`` the mean.

    ``b_d`` is subtracted from the input, so that a large mean does not meet the encoder.

    Raises:
        OptionError: ``k`` and the expansion do not fit the width.
    """
    width = len(moments.mean)
    n = settings.n_latents(width)
    rows = torch.randn(n, width, generator=generator, dtype=torch.float64)
    w_d = functional.normalize(rows, dim=1).to(moments.mean)
    size = moments.latent(settings.k)
    zeros = moments.mean.new_zeros(n)
    gated, jumping = settings.arch == "gated", settings.arch == "jumprelu"
    return Dictionary(
        w_d.T,
        zeros,
        w_d,
        moments.mean,
        apply_b_dec_to_input=True,
        k=settings.k if settings.arch == "topk" else None,
        threshold=torch.full_like(zeros, THRESHOLD * size) if jumping else None,
        r_mag=zeros if gated else None,
        b_mag=zeros if gated else None,
        bandwidth=BANDWIDTH * size if jumping else 0.001,
    )


def site_loss(dictionary: Dictionary, x: Tensor, moments: Moments, sparsity: float) -> SiteLoss:
    """The loss of a dictionary at the tokens ``x``, ``[n, width]``.

    The mean squared error over the spread, and, times ``sparsity``: for ``relu`` the mean L1 norm
    of the latents over the root of the spread; for ``jumprelu`` the number of active latents; for
    ``gated`` the L1 norm of the rectified gates, and, not weighted, the error that these would make
    in the place of the latents with the decoder held fixed (Rajamanoharan et al. 2024,
    arXiv:2404.16014). Decoder rows have norm 1.
    """
    pre = dictionary.pre(x)
    z = dictionary.activate(pre)
    error = x.to(z.dtype) - dictionary.decode(z)
    missed = error.square().sum(1).mean() / moments.spread
    total = missed
    if dictionary.nonlinearity == "relu":
        total = total + sparsity * z.sum(1).mean() / moments.spread**0.5
    elif dictionary.nonlinearity == "jumprelu":
        total = total + sparsity * dictionary.l0(pre).mean()
    elif dictionary.nonlinearity == "gated":
        gates = pre.relu()
        by_gates = gates @ dictionary.W_d.detach() + dictionary.b_d.detach()
        total = total + sparsity * gates.sum(1).mean() / moments.spread**0.5
        total = total + (x - by_gates).square().sum(1).mean() / moments.spread
    active = (z > 0).sum(1).double().mean()
    return SiteLoss(total, float(missed.detach()), float(active), z.detach(), error.detach())


@torch.no_grad()
def project_gradient(dictionary: Dictionary) -> None:
    """Take out of the decoder's gradient what would only change the norm of its rows."""
    gradient, rows = dictionary.W_d.grad, dictionary.W_d
    assert gradient is not None
    gradient -= (gradient * rows).sum(1, keepdim=True) * rows


@torch.no_grad()
def restore_norms(dictionary: Dictionary) -> None:
    """Give decoder rows norm 1 again, and keep thresholds above 0, where they can be learned."""
    dictionary.W_d.copy_(functional.normalize(dictionary.W_d, dim=1))
    if dictionary.threshold is not None:
        dictionary.threshold.clamp_(min=1e-3 * dictionary.bandwidth)
