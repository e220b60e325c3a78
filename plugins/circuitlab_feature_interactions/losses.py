"""What a dictionary is trained for at one site: how it begins, and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import Dictionary, ModelError, OptionError, Site
from circuitlab_feature_interactions.settings import TrainSettings

#: Threshold of ``jumprelu`` at the beginning, and width of its estimator's window, in units of the
#: size of a latent when all of a token's variance is in ``k`` of them.
THRESHOLD, BANDWIDTH = 0.3, 0.3
#: Of the mean variance of what a transcoder reads, added where it is divided by.
RIDGE = 1e-3


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


@torch.no_grad()
def begin_transcoder(
    settings: TrainSettings,
    read: Tensor,
    written: Tensor,
    moments: Moments,
    generator: torch.Generator,
) -> Dictionary:
    """A transcoder of random directions: a latent reads what its decoder row would be guessed from.

    The guess is the best linear one of what is written from what is read; an encoder column is a
    decoder row taken back through it, made as long as all others. Biases take the mean of what is
    read off, and add the mean of what is written.

    Args:
        settings: Its ``arch`` is not ``gated``.
        read: What it reads, ``[n, d_in]``.
        written: What it should write there, ``[n, d_out]``.
        moments: Of what it should write.
        generator: For the directions.

    Raises:
        OptionError: ``k`` and the expansion do not fit the width; or ``arch`` is ``gated``.
    """
    check_transcoder(settings)
    plain = begin_dictionary(settings, moments, generator)
    mean = read.double().mean(0)
    x, y = read.double() - mean, written.double() - moments.mean
    covariance = x.T @ x / len(x)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(mean)).to(covariance)
    guess = torch.linalg.solve(covariance + ridge, x.T @ y / len(x))
    columns = functional.normalize(guess @ plain.W_d.double().T, dim=0)
    # Latents as large as those of an autoencoder of what is written.
    columns = columns * moments.unit / float(covariance.diagonal().mean().sqrt())
    return Dictionary(
        columns.to(plain.W_e),
        (-mean @ columns).to(plain.W_e),
        plain.W_d,
        plain.b_d,
        apply_b_dec_to_input=False,
        transcoder=True,
        k=plain.k,
        threshold=plain.threshold,
        bandwidth=plain.bandwidth,
    )


def check_transcoder(settings: TrainSettings) -> None:
    """Refuse settings of which there is no transcoder.

    Raises:
        OptionError: ``arch`` is ``gated``.
    """
    if settings.arch == "gated":
        raise OptionError(
            "gated transcoders are not trained: their gate learns by giving back what it reads; "
            "use --arch topk, relu or jumprelu"
        )


def site_loss(
    dictionary: Dictionary,
    x: Tensor,
    moments: Moments,
    sparsity: float,
    target: Tensor | None = None,
) -> SiteLoss:
    """The loss of a dictionary at the tokens ``x``, ``[n, width]``.

    ``target``, of a transcoder, is what it should write there, ``[n, d_out]``; else it is ``x``.
    ``moments`` are the target's.

    The mean squared error over the spread, and, times ``sparsity``: for ``relu`` the mean L1 norm
    of the latents over the root of the spread; for ``jumprelu`` the number of active latents; for
    ``gated`` the L1 norm of the rectified gates, and, not weighted, the error that these would make
    in the place of the latents with the decoder held fixed (Rajamanoharan et al. 2024,
    arXiv:2404.16014). Decoder rows have norm 1.
    """
    pre = dictionary.pre(x)
    z = dictionary.activate(pre)
    error = (x if target is None else target).to(z.dtype) - dictionary.decode(z, x)
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
