"""Dead latents begin anew, where the reconstruction is worst."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import Dictionary
from circuitlab_feature_interactions.losses import THRESHOLD, Moments

#: Size of a new latent's encoder, in units of the mean of the others; ``topk`` compares latents, so
#: a small one would never be kept.
_SIZE = {"topk": 1.0, "relu": 0.2, "jumprelu": 1.0, "gated": 0.2}


@torch.no_grad()
def resample(
    dictionary: Dictionary,
    optimiser: torch.optim.Optimizer,
    dead: Tensor,
    error: Tensor,
    moments: Moments,
    k: int,
    generator: torch.Generator,
    read: tuple[Tensor, Tensor] | None = None,
) -> int:
    """Point dead latents at errors of the reconstruction, as Bricken et al. 2023 do.

    Tokens are drawn with probability proportional to their squared error, each once; the error's
    direction becomes decoder row and, scaled, encoder column; a transcoder's encoder column is what
    was read there, less its mean. Biases are 0, or take that mean off, and Adam forgets what it
    knew of these latents.

    Args:
        dictionary: Changed in place.
        optimiser: An Adam of its parameters.
        dead: ``[n]`` bool.
        error: ``[tokens, width]``, what the reconstruction misses.
        moments: Of the site.
        k: Latents that share a token's variance, for the threshold.
        generator: On the CPU.
        read: Of a transcoder what it read, ``[tokens, d_in]``, and the mean of that, ``[d_in]``.

    Returns:
        How many were changed: the dead, or fewer if there are not so many tokens with an error.
    """
    weight = error.double().square().sum(1).cpu()
    indices = dead.nonzero()[:, 0]
    chosen = indices[: int((weight > 0).sum())]
    if not len(chosen):
        return 0
    drawn = torch.multinomial(weight, len(chosen), generator=generator).to(error.device)
    rows = functional.normalize(error[drawn], dim=1)
    alive = ~dead
    norms = dictionary.W_e.norm(dim=0)
    size = _SIZE[dictionary.nonlinearity] * (float(norms[alive].mean()) if alive.any() else 1.0)
    dictionary.W_d[chosen] = rows
    columns = rows if read is None else functional.normalize(read[0][drawn] - read[1], dim=1)
    dictionary.W_e[:, chosen] = size * columns.T
    changed = {"b_e": 0.0, "r_mag": 0.0, "b_mag": 0.0, "threshold": THRESHOLD * moments.latent(k)}
    for name, value in changed.items():
        if (tensor := getattr(dictionary, name)) is not None:
            tensor[chosen] = value
    if read is not None:
        dictionary.b_e[chosen] = -read[1] @ dictionary.W_e[:, chosen]
    for name, parameter in dictionary.named_parameters():
        if name == "b_d":
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            moment = optimiser.state[parameter][key]
            (moment.T if name == "W_e" else moment)[chosen] = 0
    return len(chosen)
