"""Lens: the tokens whose logits a direction raises and lowers most, when nothing else sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import norm_outliers

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Tokens at either end.
ENDS = 8


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
        self.masked = norm_outliers(self._weight.T)

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
            texts = self._model.token_texts(kept[found].tolist()) if found else []
            told[name] = [[text, float(values[i])] for text, i in zip(texts, found, strict=True)]
        return told
