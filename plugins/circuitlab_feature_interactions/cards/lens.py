"""Lens: the tokens whose logits a direction raises and lowers most, when nothing else sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab_feature_interactions.drawing import token_texts

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Tokens at either end.
ENDS = 8
#: A token is masked when the logarithm of its norm lies so many deviations from the median.
OUTLIER = 4.0
#: Deviations are at least this: tokens whose norms differ by a few per cent are all alike.
_LEAST_DEVIATION = 0.05


class LogitLens:
    """Reads directions of the residual stream through the unembedding, the final norm folded in.

    Args:
        model: Any traced model.

    Attributes:
        masked: Tokens whose vectors are unlike the others in size, as those of tokens that never
            were trained are, ``[vocab]``, bool; they are left out.
    """

    def __init__(self, model: TracedModel) -> None:
        self._model = model
        self._weight = model.weights.unembedding()[0]
        self.masked = outliers(self._weight.T)

    @torch.no_grad()
    def ends(self, direction: Tensor) -> dict[str, Any]:
        """Tokens that a direction ``[d_model]`` raises and lowers most, against their mean.

        Returns:
            ``raised`` and ``lowered``: lists of ``[text, value]``, the strongest first; ``masked``,
            how many tokens were left out. A value is what the logit gains, less the mean over the
            tokens that are left, per unit of activation; the final norm divides it by the size of
            the stream. A token is at one end only, and only on the side of its sign.
        """
        values = direction.to(self._weight) @ self._weight
        kept = (~self.masked).nonzero().flatten()
        values = values[kept] - values[kept].mean()
        order = values.argsort(descending=True, stable=True)
        told: dict[str, Any] = {"masked": int(self.masked.sum())}
        for name, chosen, sign in (("raised", order, 1), ("lowered", order.flip(0), -1)):
            found = [i for i in chosen[:ENDS].tolist() if sign * float(values[i]) > 0]
            texts = token_texts(self._model, kept[found].tolist()) if found else []
            told[name] = [[text, float(values[i])] for text, i in zip(texts, found, strict=True)]
        return told


def outliers(vectors: Tensor) -> Tensor:
    """Which vectors ``[n, width]`` are unlike the others in size, bool ``[n]``.

    The logarithm of the norm is more than :data:`OUTLIER` deviations from the median, where a
    deviation is 1.4826 times the median absolute one, as of a normal distribution. Vectors of 0
    have no direction and are outliers too.
    """
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    there: Tensor = norms > 0
    if not bool(there.any()):
        return ~there
    sizes = norms.log()
    distance = (sizes - sizes[there].median()).abs()
    deviation = (1.4826 * distance[there].median()).clamp(min=_LEAST_DEVIATION)
    far: Tensor = distance > OUTLIER * deviation
    return far
