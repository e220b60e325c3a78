"""Check runs: what a model's self-check looks at, in few round trips where it is on a host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab.sites import Site
from circuitlab.wiring import PORTS

if TYPE_CHECKING:
    from circuitlab.model import TracedModel
    from circuitlab.prompts import Tokens
    from circuitlab.run import Run


class CheckRuns:
    """The runs that checks look at, made when they are looked at.

    On a host those that are begun together share a round trip.
    """

    def __init__(self, model: TracedModel, tokens: Tokens) -> None:
        self.model, self.tokens = model, tokens
        self.layers = range(model.n_layers)
        self.last = Site("resid_post", model.n_layers - 1)

    def begin(self, *names: str) -> None:
        """Begin these, where that is of use."""
        if self.model.remote:
            for name in names:
                getattr(self, name)

    @property
    def closer(self) -> tuple[str, ...]:
        """Names of those whose checks need more weights than the attention's."""
        a = self.model.architecture
        hidden = ("hidden",) if a.mlp_output_projection else ()
        begun = ("begun",) if a.position_embed or a.rotary else ()
        return (*hidden, *begun, "ended")

    @cached_property
    def whole(self) -> Run:
        """Everything that the description names is read; of blocks, their ends."""
        ends = [Site(k, n) for n in self.layers for k in ("resid_pre", "resid_post")]
        inside = [Site(k, n) for n in self.layers for k in (*PORTS, "attn_out", "mlp_in")]
        some = () if self.model.architecture.blocks_only else (*self.model.source_sites, *inside)
        return self.model.run(self.tokens, read=[*ends, *some], logits="all")

    @cached_property
    def alone(self) -> Run:
        """The padded prompt by itself."""
        return self.model.run(self.tokens.rows([1]).trimmed(), logits="all")

    @cached_property
    def identity(self) -> Run:
        """What was read is written."""
        sites = [Site("resid_pre", 0)]
        if not self.model.architecture.blocks_only:
            inside = [Site(k, n) for n in self.layers for k in (*PORTS, "attn_out")]
            sites = [*self.model.source_sites, *inside]
        return self._written(sites, self.whole, logits="all")

    @cached_property
    def valueless(self) -> Run:
        """Heads without values."""
        zero = torch.zeros((), dtype=self.model.dtype)
        without = {Site("v", n): zero for n in self.layers}
        heads = [Site("z", n) for n in self.layers]
        return self.model.run(self.tokens, read=heads, write=without, logits="all")

    @cached_property
    def inner(self) -> Run:
        """What the last block begins with, and its attention."""
        sites = [Site(kind, self.last.layer) for kind in ("resid_pre", "attn_out")]
        return self.model.run(self.tokens, read=sites)

    @cached_property
    def short(self) -> Run:
        """All but the last block's MLP is left out, and all logits but two."""
        sites = [Site(kind, self.last.layer) for kind in ("resid_pre", "attn_out")]
        return self._written(sites, self.inner, vocabulary=self.two)

    @cached_property
    def ends(self) -> list[Run]:
        """For each block, all before its end is left out, and all logits but two."""
        sites = [Site("resid_post", n) for n in self.layers]
        return [self._written([site], self.whole, vocabulary=self.two) for site in sites]

    @cached_property
    def hidden(self) -> Run:
        """Hidden layers and outputs of the MLPs."""
        sites = [Site(k, n) for k in ("mlp_post", "mlp_out") for n in self.layers]
        return self.model.run(self.tokens, read=sites, logits="all")

    @cached_property
    def begun(self) -> Run:
        """The embeddings, and what heads attend with."""
        sites = [Site(kind, n) for n in self.layers for kind in (*PORTS, "z")]
        start = [Site("embed"), Site("resid_pre", 0)]
        return self.model.run(self.tokens, read=[*start, *sites], logits="none")

    @cached_property
    def ended(self) -> Run:
        """The last stream."""
        return self.model.run(self.tokens, read=[self.last])

    @property
    def two(self) -> Tensor:
        """Two tokens, if there are as many."""
        return torch.arange(min(2, self.model.vocab_size), device=self.model.device)

    def _written(self, sites: Sequence[Site], read: Run, **how: Any) -> Run:
        return self.model.run(self.tokens, write={site: read[site] for site in sites}, **how)
