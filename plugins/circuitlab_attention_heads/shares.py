"""Shares: how much of what a head does on a task's prompts the embeddings bring about directly.

The residual stream that a head reads is the sum of the token's embedding, the position's, and what
earlier components wrote. Its scores, its output, and the logits are sums over these parts, so that
each has a share in them, and the shares of all parts add up to 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from circuitlab import ModelError, Site, track
from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.qk import NEGLIGIBLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from circuitlab import HeadWeights, Run, Tokens, TracedModel

#: How far a pattern may be from the softmax of the scores, as the mean share of attention that goes
#: elsewhere; and in half precision, where the scores themselves are rough.
_ASTRAY, _ASTRAY_HALF = 0.01, 0.1
#: Roundings of its type that the first residual stream may be off by.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Shares:
    """What the parts of a head's input do, over all tokens of some prompts.

    Attributes:
        parts: ``token``, ``position`` where positions are learned, the earlier head that was named,
            ``earlier`` for what else was written before, and ``bias``, the head's own.
        scores: Shares of the variation of the scores over the keys that a query can see, by the
            query's part and the key's, ``[n_parts, n_parts]``: cov(part, score) / var(score), each
            query about its own mean, since the softmax does not see what all keys share. None where
            scores do not vary. Of a score that is capped each part is scaled as the whole is.
        values: Shares of the squared norm of what the head writes, ``[n_parts]``; None where it
            writes nothing.
        logits: The head's own share of the variation of the last token's logits over the
            vocabulary, before any cap, as it writes to them directly; None where they do not vary.
        scales: Mean 1/σ of the norms, by layer: that of the head, and of the earlier one; and, at
            the last token, of the final norm, whose key is None.
    """

    parts: tuple[str, ...]
    scores: Tensor | None
    values: Tensor | None
    logits: float | None
    scales: dict[int | None, float]


@dataclass
class _Sums:
    """Sums over prompts: products of each part with the whole, and squares of the whole."""

    parts: dict[str, Tensor | float] = field(default_factory=lambda: defaultdict(float))
    whole: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    least: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    scales: dict[int | None, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    astray: list[Tensor] = field(default_factory=list)

    def add(self, name: str, parts: Tensor, whole: Tensor, size: Tensor) -> None:
        """``size`` is what the whole is rounding of, squared."""
        self.parts[name] = self.parts[name] + parts
        self.whole[name] += float(whole)
        self.least[name] += NEGLIGIBLE**2 * float(size)

    def share(self, name: str) -> Tensor | None:
        whole, parts = self.whole[name], self.parts[name]
        if isinstance(parts, float) or whole <= self.least[name]:
            return None
        return parts / whole


@torch.no_grad()
def input_shares(
    model: TracedModel,
    batches: Sequence[Tokens],
    head: Head,
    written: Tensor,
    *,
    through: Head | None = None,
) -> Shares:
    """What the parts of a head's input do on some prompts.

    Args:
        model: Any traced model.
        batches: The prompts.
        head: Layer and number.
        written: What each coordinate of the head puts into the logits, ``[d_head, vocab]``, see
            :class:`circuitlab_attention_heads.ov.OVCircuit`.
        through: A head of an earlier layer that is a part of its own.

    Raises:
        ModelError: the first residual stream is not the embeddings' sum, or a pattern is not the
            softmax of the scores: then circuits read from weights would be of another model.
    """
    folded = model.weights.folded(head[0], torch.float64)
    reader, sums = _Reader(model, head, through, folded, written), _Sums()
    for batch in track(batches, "splitting scores"):
        reader.add(batch, sums)
    astray = float(torch.cat(sums.astray).mean())
    if astray > (_ASTRAY_HALF if model.dtype.itemsize < 4 else _ASTRAY):
        raise ModelError(
            f"{head_name(head)} of model {model.name!r} does not attend by the softmax of q · k, "
            f"as its architecture describes them: {astray:.1%} of its attention goes elsewhere; "
            f"its circuits cannot be read from the weights alone"
        )
    logits = sums.share("logits")
    return Shares(
        reader.names,
        sums.share("scores"),
        sums.share("values"),
        None if logits is None else float(logits),
        {layer: float(torch.cat(found).mean()) for layer, found in sums.scales.items()},
    )


@dataclass(frozen=True)
class _Batch:
    """What one run saw: streams, ``[batch, pos, d_model]``, and what norms divide them by.

    Attributes:
        streams: ``resid_pre`` by layer, float64; and under None the last one, at the last token.
        scales: σ of each, ``[batch, pos, 1]``.
    """

    run: Run
    streams: dict[int | None, Tensor]
    scales: dict[int | None, Tensor]


class _Reader:
    """Takes one prompt at a time, without its padding."""

    def __init__(
        self,
        model: TracedModel,
        head: Head,
        through: Head | None,
        folded: HeadWeights,
        written: Tensor,
    ) -> None:
        self.model, self.weights = model, model.weights
        self.head, self.through = head, through
        self.folded, self.written = folded, written
        self.positions = self.weights.positions(torch.float64)
        self.layers = {0, head[0], *([] if through is None else [through[0]])}
        self.last = Site("resid_post", model.n_layers - 1)
        self.own = {port: Site(port, head[0]) for port in ("q", "k", "z")}
        wide = torch.promote_types(model.dtype, torch.float32)
        capped = bool(model.architecture.logit_softcap)
        self.unembedding = self.weights.unembedding(wide) if capped else None
        position = [] if self.positions is None else ["position"]
        named = [] if through is None else [head_name(through)]
        self.names = ("token", *position, *named, *["earlier"] * (head[0] > 0), "bias")

    def add(self, tokens: Tokens, sums: _Sums) -> None:
        """Add what the prompts of a batch say."""
        read = [Site("pattern", self.head[0]), *(Site("resid_pre", n) for n in self.layers)]
        read += self.own.values()
        read += [] if self.through is None else [Site("z", self.through[0])]
        run = self.model.run(tokens, read=[*read, self.last])
        streams: dict[int | None, Tensor] = {
            layer: run[Site("resid_pre", layer)].double() for layer in self.layers
        }
        streams[None] = run[self.last][:, -1:].double()
        scales = {n: self.weights.norm_scale(n, stream) for n, stream in streams.items()}
        batch = _Batch(run, streams, scales)
        for row in range(len(tokens)):
            self._add(batch, row, sums)

    def _add(self, batch: _Batch, row: int, sums: _Sums) -> None:
        """Add what one prompt says."""
        (layer, number), run = self.head, batch.run
        real = run.mask[row]
        for each in {layer, layer if self.through is None else self.through[0]}:
            sums.scales[each].append(1 / batch.scales[each][row, real])
        sums.scales[None].append(1 / batch.scales[None][row])
        places = run.tokens.position_ids[row, real]
        parts = self._parts(batch, row, places) / batch.scales[layer][row, real]
        # The head's own bias is the last part, and is not divided.
        q, k, v = (
            torch.cat([parts @ weight[number], bias[number].expand(1, len(places), -1)])
            for weight, bias in (
                (self.folded.q, self.folded.q_bias),
                (self.folded.k, self.folded.k_bias),
                (self.folded.v, self.folded.v_bias),
            )
        )
        behind = {port: self._scale_behind(batch, row, port) for port in self.own}
        q, k = q / behind["q"], k / behind["k"]
        turns = self.weights.rotations(places, torch.float64, layer)
        if turns is not None:
            q, k = (torch.einsum("npd,pde->npe", each, turns) for each in (q, k))
        pattern = run[Site("pattern", layer, number)][row, real][:, real].double()
        a = self.model.architecture
        window = a.sliding_windows[layer] if a.sliding_windows else 0
        _add_scores(self.folded.scale * q, k, pattern, sums, window, a.score_softcap)
        z, output = pattern @ v / behind["z"], self.folded.o[number]
        gram, whole = output @ output.T, z.sum(0)
        sums.add(
            "values",
            torch.einsum("npd,de,pe->n", z, gram, whole),
            torch.einsum("pd,de,pe->", whole, gram, whole),
            (z.square().sum((0, 1)) * gram.diagonal()).sum(),
        )
        logits = self._logits(batch, row)
        centred = logits - logits.mean()
        own = (whole[-1] / batch.scales[None][row, 0]).to(self.written) @ self.written
        sums.add("logits", own.double() @ centred, centred @ centred, logits @ logits)

    def _scale_behind(self, batch: _Batch, row: int, port: str) -> Tensor:
        """What the norm behind q, k or z divides by, at each token: ``[pos, 1]``."""
        number = self.head[1]
        site, real = self.own[port], batch.run.mask[row]
        value = batch.run[site][row, real].double()
        scale = self.weights.scale_behind(site, value)
        return scale if port == "z" else scale[:, number * value.shape[1] // self.model.n_heads]

    def _logits(self, batch: _Batch, row: int) -> Tensor:
        """Logits of the last token before any cap, ``[vocab]``, float64."""
        if self.unembedding is None:
            return batch.run.logits[row, -1].double()
        weight, bias = self.unembedding
        normed = batch.streams[None][row, 0] / batch.scales[None][row, 0]
        return (normed.to(weight) @ weight + bias).double()

    def _parts(self, batch: _Batch, row: int, places: Tensor) -> Tensor:
        """The parts of the stream but for the bias, ``[n_parts, pos, d_model]``."""
        run, model = batch.run, self.model
        real = run.mask[row]
        parts = [self.weights.embedding(model.dtype)[run.tokens.ids[row, real]].double()]
        if self.positions is not None:
            parts.append(self.positions[places])
        first = batch.streams[0][row, real]
        off = float((first - sum(parts)).abs().max())
        if off > _ROUNDINGS * torch.finfo(model.dtype).eps * float(first.abs().max()):
            raise ModelError(
                f"block 0 of model {model.name!r} does not read the sum of token and position "
                f"embeddings but something {off:.2g} apart; circuits of these embeddings would be "
                f"of another model"
            )
        if self.through is not None:
            layer, number = self.through
            z = run[Site("z", layer)][row, real].double()
            written = z[:, number] @ self.weights.heads(layer, "o")[number].double()
            if self.model.architecture.attention_post_norm:
                written = z[:, number] @ self.weights.folded(layer, torch.float64).o[number]
            parts.append(written / self.weights.scale_behind(Site("z", layer), z))
        if self.head[0]:
            parts.append(batch.streams[self.head[0]][row, real] - sum(parts))
        return torch.stack(parts)


def _add_scores(
    q: Tensor, k: Tensor, pattern: Tensor, sums: _Sums, window: int, softcap: float
) -> None:
    """Scores of scaled queries and keys ``[n_parts, pos, d_head]``, of what each query can see."""
    raw = scores = q.sum(0) @ k.sum(0).T
    if softcap:
        scores = softcap * torch.tanh(raw / softcap)
    kept = torch.where(raw == 0, 1, scores / raw.where(raw != 0, 1))
    seen = torch.ones_like(scores, dtype=torch.bool).tril()
    if window:
        seen = seen.triu(1 - window)
    found = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    sums.astray.append((found - pattern).abs().sum(-1) / 2)
    scores = scores.where(seen, 0)
    mean = scores.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    centred = (scores - mean).where(seen, 0)
    # A row of it sums to 0, so that the parts need not be centred themselves.
    products = torch.einsum("aid,bid->ab", q, (centred * kept) @ k)
    sums.add("scores", products, centred.square().sum(), scores.square().sum())
