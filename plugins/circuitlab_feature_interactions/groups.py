"""Groups: what several latents, taken as one node, do to others, summed token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from circuitlab import track
from circuitlab_feature_interactions.edges import EdgeSums, Events, SparseSums
from circuitlab_feature_interactions.gathering import Interactions, events_by_part
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.sites import sites_of

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Dictionary, Run, Site, Tokens, TracedModel
    from circuitlab_feature_interactions.ablations import Latents
    from circuitlab_feature_interactions.interactions import Route


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes of a site, each one latent, several, or the error; none is in two.

    Attributes:
        latents: Of each node; the number after the last latent is the error.
        scale: Mean of each latent of the site where it is active, ``[n]``.
    """

    latents: Sequence[Latents]
    scale: Tensor

    def numbers(self) -> Tensor:
        """The node of each latent, the error last, ``[n + 1]``; -1 for those in none."""
        found = torch.full((len(self.scale) + 1,), -1)
        for number, latents in enumerate(self.latents):
            found[list(latents)] = number
        return found


class NodeActivity:
    """When nodes of a site are active, and at which tokens.

    A node is as active as its latents together, each as a share of its own mean.

    Args:
        n: Nodes.
        vocab_size: Of the model.

    Attributes:
        active: Tokens at which any latent of a node is active, ``[n]``, float64.
        tokens: Tokens so far.
    """

    def __init__(self, n: int, vocab_size: int) -> None:
        self.active = torch.zeros(n, dtype=torch.float64)
        self.tokens = 0
        self._by_token = SparseSums(2)
        self._vocab = vocab_size

    def add(self, values: Tensor, ids: Tensor) -> None:
        """Add the nodes' activation ``[n_tokens, n]`` at tokens ``[n_tokens]``."""
        self.active += (values != 0).double().sum(0).cpu()
        self.tokens += len(values)
        token, node = (values != 0).nonzero().unbind(1)
        sizes = values[token, node].double()
        sums = torch.stack([torch.ones_like(sizes), sizes], 1)
        self._by_token.add(node * self._vocab + ids[token], sums)

    def top_tokens(self, node: int, n: int) -> list[tuple[int, float]]:
        """Tokens at which a node is largest, in the mean over those where it is active."""
        ends = torch.tensor([node, node + 1]) * self._vocab
        start, end = torch.searchsorted(self._by_token.keys, ends).tolist()
        count, total = self._by_token.sums[start:end].unbind(1)
        order = (total / count).argsort(descending=True, stable=True)[:n]
        ids = (self._by_token.keys[start:end] - node * self._vocab)[order]
        return list(zip(ids.tolist(), (total / count)[order].tolist(), strict=True))


@torch.no_grad()
def gather_groups(
    model: TracedModel,
    interactions: Sequence[Interactions],
    dictionaries: Mapping[Site, Dictionary],
    nodes: Mapping[Site, Nodes],
    batches: Sequence[Tokens],
) -> tuple[list[Interactions], dict[Site, NodeActivity]]:
    """Activity of nodes and what they do to one another, over prompts.

    Args:
        model: Any traced model.
        interactions: Of latents; the same pairs and parts are measured.
        dictionaries: By site.
        nodes: By site.
        batches: Prompts.

    Returns:
        Of each pair the sums, in which latents are numbers of nodes. What a node does to another at
        one token is Σ R_ij / (mean of i where active) over their latents j and i: in the mean over
        the tokens at which any of these are active together. And the activity by site.
    """
    pairs = [one.pair for one in interactions]
    routes = [make_route(model, p, dtype=dictionaries[p.source].W_e.dtype) for p in pairs]
    found = [Interactions(pair) for pair in pairs]
    activity = {s: NodeActivity(len(nodes[s].latents), model.vocab_size) for s in sites_of(pairs)}
    for tokens in track(batches, "attributing groups"):
        run = model.run(tokens, read=[*activity], logits="none")
        for site, seen in activity.items():
            values = _values(dictionaries[site], nodes[site], run[site][tokens.mask])
            seen.add(values, tokens.ids[tokens.mask])
        for one, route in zip(found, routes, strict=True):
            _add(one, route, dictionaries, nodes, run)
    return found, activity


def _values(dictionary: Dictionary, nodes: Nodes, x: Tensor) -> Tensor:
    """The activation of each node, ``[n_tokens, n]``; 0 for the error."""
    shares = dictionary.encode(x).double() / nodes.scale.to(x.device)
    columns = [
        shares[:, [latent for latent in latents if latent != dictionary.n]].sum(1)
        for latents in nodes.latents
    ]
    return torch.stack(columns, 1) if columns else shares[:, :0]


def _add(
    one: Interactions,
    route: Route,
    dictionaries: Mapping[Site, Dictionary],
    nodes: Mapping[Site, Nodes],
    run: Run,
) -> None:
    """Add a batch across a pair of sites."""
    pair = one.pair
    source, target = nodes[pair.source], nodes[pair.target]
    ends = dictionaries[pair.source], dictionaries[pair.target]
    found = route.attributions(*ends, run[pair.source], mask=run.mask, with_error=True)
    for name, events in events_by_part(found, run.mask.shape[1]).items():
        if name not in one.sums:
            one.sums[name] = EdgeSums(len(source.latents), len(target.latents))
        one.sums[name].add(_between_nodes(events, source, target))


def _between_nodes(events: Events, source: Nodes, target: Nodes) -> Events:
    """The same between nodes, as shares of the target latents' means; other latents left out."""
    device = events.value.device
    sources = source.numbers().to(device)[events.source]
    targets = target.numbers().to(device)[events.target]
    inside = ((sources >= 0) & (targets >= 0)).nonzero()[:, 0]
    values = events.value.double() / target.scale.to(device)[events.target]
    within = Events(*(getattr(events, name)[inside] for name in events.__dataclass_fields__))
    return replace(
        within,
        source=sources[inside],
        target=targets[inside],
        value=values[inside],
        # The activation of several latents is no one number: no line is fitted to it.
        z_source=torch.zeros_like(values[inside]),
    )
