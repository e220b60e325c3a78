"""Copy suppression: heads that look where a token stood that is now predicted, and unpredict it.

McDougall et al. 2023 (arXiv:2310.04625): earlier layers predict a token of the context; the head
attends to where it stood, and lowers its logit. Here the prediction is read by the logit lens, and
what the head does to the logit is its direct effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from circuitlab import Site, track

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Run, TracedModel
    from circuitlab_attention_heads.sequences import Repeats


@dataclass(frozen=True, eq=False, slots=True)
class Reader:
    """The unembedding with the final norm folded in, as far as sequences need it.

    Attributes:
        tokens: ``[n, pos, d_model]``, what raises the logit of the token at each column.
        biases: ``[n, pos]``, that logit's constant part.
        mean: ``[d_model]``, what raises the mean logit of the whole vocabulary.
    """

    tokens: Tensor
    biases: Tensor
    mean: Tensor

    @classmethod
    def of(cls, model: TracedModel, repeats: Repeats) -> Reader:
        """The reader of these sequences, in at least float32."""
        weight, bias = model.weights.unembedding(torch.promote_types(model.dtype, torch.float32))
        ids = repeats.tokens.ids
        return cls(weight.T[ids], bias[ids], weight.mean(1))


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """Which token of the context each layer's heads find predicted, and where it stood.

    Attributes:
        places: ``[n_layers, n, pos]``, its column; -1 where the query is not used.
    """

    places: Tensor

    def histogram(self, layer: int) -> Tensor:
        """How often the predicted token stood at each offset before the query, ``[pos]``."""
        places = self.places[layer]
        width = places.shape[-1]
        offsets = (torch.arange(width, device=places.device) - places)[places >= 0]
        return torch.bincount(offsets, minlength=width)


@dataclass(frozen=True, eq=False, slots=True)
class Suppression:
    """What the heads of one layer do with the predicted token; NaN where nothing was measured.

    Attributes:
        mass: ``[n, n_heads]``, attention to its earlier occurrence, mean over queries.
        control: Same shape, attention to where it stood at other queries.
        effect: Same shape, direct effect on its centred logit, in logits; negative lowers it.
    """

    mass: Tensor
    control: Tensor
    effect: Tensor


def find_predictions(
    model: TracedModel, repeats: Repeats, batches: Sequence[slice]
) -> tuple[Reader, Predictions]:
    """Read off what is predicted at every query of the second copy, before each layer.

    That is the token with the largest logit, by the logit lens of ``resid_pre``, of those that
    stand between the first token and the query; the query's own token does not count. Queries at
    which it already stood twice, or at which no token is ahead of the others, are not used: where
    the head should look is not one place.

    Args:
        model: Any traced model.
        repeats: The sequences.
        batches: Their rows, as many as one pass takes.
    """
    layers = range(model.n_layers)
    reader = Reader.of(model, repeats)
    found = []
    for rows in track(batches, "reading predictions"):
        part = repeats.rows(rows)
        sites = [Site("resid_pre", layer) for layer in layers]
        run = model.run(part.tokens, read=sites, logits="none")
        found.append(
            torch.stack(
                [
                    _places(part, _lens(model, run[site], reader.tokens[rows], reader.biases[rows]))
                    for site in sites
                ]
            )
        )
    return reader, Predictions(torch.cat(found, 1))


def measure(
    model: TracedModel,
    run: Run,
    repeats: Repeats,
    reader: Reader,
    predictions: Predictions,
    rows: slice,
    layer: int,
) -> Suppression:
    """What the heads of a layer do with the token that is predicted when they run.

    The control of a query is what the head gives it to the places where the predicted token stood
    at other queries, as offsets, weighted by how often: what looks back a fixed number of positions
    does not pass for looking at what is predicted. Queries without such a place are not used.

    The direct effect is that of all that the head writes, ``z @ W_O``, divided by the run's own
    scale of the final norm, and of a norm behind the attention, on the logit of the token less the
    mean logit of the vocabulary, before any cap of logits.

    Args:
        model: Any traced model.
        run: Of the sequences ``rows``; has the layer's ``pattern`` and ``z``, and the last
            ``resid_post``.
        repeats: All sequences.
        reader: As :func:`find_predictions` gave it.
        predictions: Likewise.
        rows: Sequences of the run.
        layer: Whose heads.
    """
    part, places = repeats.rows(rows), predictions.places[layer, rows]
    offsets, histogram = part.offsets, predictions.histogram(layer)
    keys = part.tokens.position_ids[:, None, :]
    target = torch.arange(places.shape[1], device=places.device) == places[..., None]
    others = (offsets > 0) & (keys > 0) & ~target
    control = torch.where(others, histogram[offsets.clamp(min=0)], 0).double()
    used = (places >= 0) & (control.sum(-1) > 0)
    control = control / control.sum(-1, keepdim=True).clamp(min=1)

    dtype = reader.mean.dtype
    pattern = run[Site("pattern", layer)].to(dtype)
    wanted = reader.tokens[rows].gather(
        1, places.clamp(min=0)[..., None].expand(-1, -1, model.d_model)
    )
    last = run[Site("resid_post", model.n_layers - 1)].to(dtype)
    direction = (wanted - reader.mean) / model.weights.norm_scale(None, last)
    output, z = model.weights.folded(layer, dtype).o, run[Site("z", layer)].to(dtype)
    per_head = torch.einsum("hed,bqd->bqhe", output, direction)
    effect = (z * per_head).sum(-1) / model.weights.scale_behind(Site("z", layer), z)
    share = used.to(dtype) / used.sum(-1, keepdim=True)  # 0 / 0 is NaN: nothing was measured
    return Suppression(
        torch.einsum("bq,bqk,bhqk->bh", share, target.to(dtype), pattern),
        torch.einsum("bq,bqk,bhqk->bh", share, control.to(dtype), pattern),
        torch.einsum("bq,bqh->bh", share, effect),
    )


def _lens(model: TracedModel, stream: Tensor, tokens: Tensor, biases: Tensor) -> Tensor:
    """Logits that a stream already has for the tokens of its sequence, ``[n, query, token]``."""
    stream = stream.to(tokens.dtype)
    scaled = stream / model.weights.norm_scale(None, stream)
    return scaled @ tokens.transpose(1, 2) + biases[:, None]


def _places(repeats: Repeats, logits: Tensor) -> Tensor:
    """Where the predicted token stood, ``[n, pos]``; -1 where the query is not used."""
    ids, places = repeats.tokens.ids, repeats.tokens.position_ids
    # Of a token that stood twice only the first occurrence is asked.
    asked = (repeats.offsets > 0) & ((places > 0) & ~repeats.queries)[:, None]
    asked &= ids[:, :, None] != ids[:, None, :]
    highest, ranked = logits.masked_fill(~asked, -torch.inf).topk(2, -1)
    best = ranked[..., 0]
    columns = torch.arange(ids.shape[1], device=ids.device)
    again = best + repeats.distance[:, None]
    repeated = repeats.queries.gather(1, again.clamp(max=ids.shape[1] - 1)) & (again < columns)
    return torch.where(repeats.queries & (highest[..., 0] > highest[..., 1]) & ~repeated, best, -1)
