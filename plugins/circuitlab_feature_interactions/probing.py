"""Probing: whether a linear probe reads the exclusive or of two features, and by what margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import OptionError, Site

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Directions in which classes spread by less than this share of the most count as constant.
_FLAT = 1e-4


@dataclass(frozen=True, eq=False)
class XorProbe:
    """Fisher's linear discriminant of A xor B, and what makes it possible.

    Attributes:
        d_prime: Distance of the two classes' means along ``direction``, in standard deviations
            within the classes. All four states weigh the same.
        accuracy: Share told apart by the middle between the means, mean over the four states.
        cosine: Between what A adds given B and what it adds given not B; 1 where they are the same,
            and then no linear probe reads xor.
        direction: Of norm 1, ``[width]``, float64; positive: xor.
    """

    d_prime: float
    accuracy: float
    cosine: float
    direction: Tensor


def xor_probe(values: Tensor, a: Sequence[bool], b: Sequence[bool]) -> XorProbe:
    """Probe activations ``[n, width]`` for A xor B.

    It is fitted and judged on the same activations, so with few of them, as against their width, it
    flatters.

    Args:
        values: Activations.
        a: Whether A holds, for each.
        b: Whether B does.

    Raises:
        OptionError: lengths differ, or a state does not occur.
    """
    if not len(values) == len(a) == len(b):
        raise OptionError(f"{len(values)} activations, {len(a)} and {len(b)} labels: give as many")
    x = values.detach().double().cpu()
    states = 2 * torch.tensor(a).long() + torch.tensor(b).long()
    groups = [x[states == state] for state in range(4)]
    if not all(map(len, groups)):
        raise OptionError("a state of A and B does not occur; give activations of all four")
    neither, only_b, only_a, both = means = torch.stack([group.mean(0) for group in groups])
    apart = (only_a + only_b - neither - both) / 2
    scatter = sum(
        (group - group.mean(0)).T @ (group - group.mean(0)) / len(group) for group in groups
    )
    lines = torch.stack([only_a - only_b, both - neither])
    within = (scatter + lines.T @ lines / 2) / 4
    variances, axes = torch.linalg.eigh(within)
    kept = variances > _FLAT**2 * variances[-1]
    seen = axes[:, kept]
    direction = seen @ ((seen.T @ apart) / variances[kept])
    spread = float((direction @ within @ direction).sqrt())
    middle = direction @ means.mean(0)
    right = [
        ((group @ direction > middle) == (state in (1, 2))).double().mean()
        for state, group in enumerate(groups)
    ]
    norm = direction.norm()
    return XorProbe(
        d_prime=float(apart @ direction) / spread if spread > 0 else 0.0,
        accuracy=float(torch.stack(right).mean()),
        cosine=float(torch.cosine_similarity(both - only_b, only_a - neither, dim=0)),
        direction=direction / norm if norm > 0 else direction,
    )


def probe_model(
    model: TracedModel, prompts: Sequence[str], a: Sequence[bool], b: Sequence[bool], site: Site
) -> XorProbe:
    """:func:`xor_probe` of a model's activations at the last token of each prompt.

    Raises:
        OptionError: see :func:`xor_probe`.
        SiteError: the model has no such site.
        TaskError: a prompt cannot be read.
    """
    found = model.run(list(prompts), read=[site], logits="none")[site][:, -1]
    return xor_probe(found.flatten(1), a, b)
