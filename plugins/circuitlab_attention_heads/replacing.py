"""Runs in which heads divide their attention by another rule, everything after them recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from circuitlab import Site
from circuitlab_attention_heads.sharpness import (
    PORTS,
    Attention,
    Rule,
    attention_of,
    check_attention,
)

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, TracedModel


class Replacer:
    """A batch of clean prompts, run as they are and with other patterns.

    A pattern is not written: what a head carries under it is, z = pattern @ v.

    Attributes:
        run: The clean run; it read every source, ``resid_pre``, q, k and v.
        clean: Its metric, ``[batch]``, float64.
        corrupt: The metric of the corrupt prompts, likewise.
    """

    def __init__(self, model: TracedModel, pairs: EncodedTask) -> None:
        self._model = model
        self._pairs, self._vocabulary = pairs.narrowed()
        layers = range(model.n_layers)
        streams = [Site(kind, layer) for layer in layers for kind in ("resid_pre", *PORTS)]
        read = [*model.source_sites, *streams]
        self.run = model.run(pairs.clean, read=read, vocabulary=self._vocabulary)
        self._reference = self.run.logits[:, -1]
        corrupt = model.run(pairs.corrupt, vocabulary=self._vocabulary)
        self.clean, self.corrupt = self._score(self._reference), self._score(corrupt.logits[:, -1])

    def attention(self, layer: int) -> Attention:
        """Scores and values of a layer in the clean run.

        Raises:
            ModelError: its attention is not a softmax of them.
        """
        attention = attention_of(self._model, self.run, layer)
        check_attention(self._model, self.run, layer, attention)
        return attention

    def alone(self, layer: int, head: int, attention: Attention, rules: Sequence[Rule]) -> Tensor:
        """The metric when one head divides its attention by a rule, at all queries.

        Args:
            layer: The head's layer.
            head: Its number.
            attention: Of the layer, see :meth:`attention`.
            rules: One for each run.

        Returns:
            ``[n_rules, batch]``, float64.
        """
        patterns = torch.stack([rule(attention.scores[:, head]) for rule in rules])
        z = (patterns @ attention.values[:, head]).flatten(0, 1)
        stream, tokens = Site("resid_pre", layer), self.run.tokens.repeat(len(rules))
        write = {stream: self.run[stream].repeat(len(rules), 1, 1), Site("z", layer, head): z}
        logits = self._model.run(tokens, write=write, vocabulary=self._vocabulary).logits[:, -1]
        return torch.stack([self._score(part) for part in logits.chunk(len(rules))])

    def together(self, heads: Mapping[int, Sequence[int]], rule: Rule) -> Tensor:
        """The metric when several heads do, ``[batch]``, float64.

        Layer by layer: what later heads see is what the changed run gives them, and the rule is
        applied to that.

        Args:
            heads: Numbers of the heads of each layer; at least one.
            rule: How they divide their attention.
        """
        model, tokens, last = self._model, self.run.tokens, max(heads)
        stream = self.run[Site("resid_pre", min(heads))]
        for layer in range(min(heads), last):
            after = Site("resid_post", layer)
            write = self._written(layer, stream, heads.get(layer, ()), rule)
            stream = model.run(tokens, read=[after], write=write, logits="none")[after]
        write = self._written(last, stream, heads[last], rule)
        return self._score(
            model.run(tokens, write=write, vocabulary=self._vocabulary).logits[:, -1]
        )

    def _written(
        self, layer: int, stream: Tensor, heads: Sequence[int], rule: Rule
    ) -> dict[Site, Tensor]:
        """Writes that begin a layer with a stream and have some of its heads follow a rule."""
        write = {Site("resid_pre", layer): stream}
        if not heads:
            return write
        ports = [Site(port, layer) for port in PORTS]
        run = self._model.run(self.run.tokens, read=ports, write=write, logits="none")
        attention = attention_of(self._model, run, layer)
        z = attention.z(rule(attention.scores))
        return write | {Site("z", layer, head): z[:, :, head] for head in heads}

    def _score(self, logits: Tensor) -> Tensor:
        return self._pairs.score(logits, self._reference).double()
